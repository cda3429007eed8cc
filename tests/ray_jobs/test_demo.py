"""What `slrnet demo` does without Ray; test_cluster.py starts one."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_jobs.demo import free_ports, wait_for


@pytest.mark.parametrize(
    ("said", "again"), [("The current node timed out during startup.", True), ("no memory", False)]
)
def test_a_head_that_timed_out_is_started_again_and_others_are_an_error(said: str, again: bool, tmp_path: Path) -> None:
    token, log = tmp_path / "token", tmp_path / "head.log"
    token.write_text("secret")
    log.write_text(said)
    head = subprocess.Popen([sys.executable, "-S", "-c", ""])
    head.wait()
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    if again:
        assert not wait_for(address, token, head, log, time.monotonic() + 60)
        return
    with pytest.raises(SystemExit, match="did not start; the end of its log:\nno memory"):
        wait_for(address, token, head, log, time.monotonic() + 60)


def test_it_does_not_wait_forever(tmp_path: Path) -> None:
    for name in ("token", "head.log"):
        (tmp_path / name).write_text("The current node timed out during startup.")
    head = subprocess.Popen([sys.executable, "-S", "-c", ""])
    head.wait()
    with pytest.raises(SystemExit, match="did not start"):
        wait_for("http://127.0.0.1:9", tmp_path / "token", head, tmp_path / "head.log", time.monotonic() - 1)
