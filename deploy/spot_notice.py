"""Runs `ray start --block ...` on an AWS spot node, and tells Ray when AWS will take the node away.

    python spot_notice.py ray start --block --address=HEAD:6379

AWS announces the end of a spot node two minutes ahead, in the instance's metadata. Ray does not look there. This script
does, every five seconds (IMDSv2), and then calls `ray drain-node`: Ray places nothing more on the node, and trainings
save a checkpoint. It ends with Ray, and passes SIGTERM on to it. It needs nothing but Python and Ray.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import UTC, datetime

METADATA = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
EVERY = float(os.environ.get("SPOT_NOTICE_SECONDS", "5"))
"""Seconds between two looks; AWS advises 5."""
WARNING = 120
"""Seconds from AWS's notice to the end, where it names no time."""


def ask(path: str, *, method: str = "GET", headers: dict[str, str]) -> str:
    request = urllib.request.Request(f"{METADATA}/latest/{path}", method=method, headers=headers)
    # Never through a proxy: the address is the instance's own.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=2) as answer:
        return str(answer.read().decode())


def notice() -> dict[str, str] | None:
    """AWS's notice, such as {"action": "terminate", "time": "2026-11-30T12:00:00Z"}; None while there is none."""
    token = ask("api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    try:
        answer: dict[str, str] = json.loads(
            ask("meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token})
        )
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    return answer


def seconds_left(announced: dict[str, str]) -> int:
    try:
        end = datetime.strptime(announced["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except (KeyError, ValueError):
        return WARNING
    return max(0, int((end - datetime.now(UTC)).total_seconds()))


def drain(announced: dict[str, str]) -> bool:
    """Tells Ray; False if that failed, for instance because Ray has not started yet."""
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", f"AWS will {announced.get('action', 'take')} this spot node"]
    command += ["--deadline-remaining-seconds", str(seconds_left(announced))]
    return subprocess.run(command, check=False).returncode == 0


def main(command: list[str]) -> int:
    ray = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: ray.terminate())
    told, silent = False, False
    while True:
        try:
            return ray.wait(None if told else EVERY)
        except subprocess.TimeoutExpired:
            pass
        try:
            announced = notice()
            silent = False
        except (OSError, ValueError) as error:
            if not silent:
                print(f"the instance's metadata cannot be read ({error}); trying on", file=sys.stderr, flush=True)
            silent = True
            continue
        if announced is not None:
            print(f"AWS announces: {announced}", file=sys.stderr, flush=True)
            told = drain(announced)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
