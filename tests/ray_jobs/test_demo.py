"""What `slrnet demo` does without Ray; test_cluster.py starts one."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
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
    pages = [f"http://127.0.0.1:{free_ports(1)[0]}"]
    if again:
        assert not wait_for(pages, token, head, log, time.monotonic() + 60)
        return
    with pytest.raises(SystemExit, match="did not start; the end of its log:\nno memory"):
        wait_for(pages, token, head, log, time.monotonic() + 60)


def test_it_does_not_wait_forever(tmp_path: Path) -> None:
    for name in ("token", "head.log"):
        (tmp_path / name).write_text("The current node timed out during startup.")
    head = subprocess.Popen([sys.executable, "-S", "-c", ""])
    head.wait()
    with pytest.raises(SystemExit, match="did not start"):
        wait_for(["http://127.0.0.1:9"], tmp_path / "token", head, tmp_path / "head.log", time.monotonic() - 1)


def test_it_waits_until_the_server_and_its_agent_answer(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    asked: list[tuple[str, str | None]] = []

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name is the library's
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(503 if asked.count(asked[-1]) < 2 else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pages = [f"http://127.0.0.1:{server.server_port}/{name}" for name in ("jobs", "agent")]
        head = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
        assert wait_for(pages, tmp_path / "token", head, tmp_path / "head.log", time.monotonic() + 60)
        head.communicate()
        server.shutdown()
    assert asked == [("/jobs", "Bearer secret")] * 2 + [("/agent", "Bearer secret")] * 2
