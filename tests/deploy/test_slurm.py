"""deploy/slurm.sh with stand-ins for Slurm and Ray that write down what they are asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "slurm.sh"
STANDS_IN = 'printf "%s\\n" "$(basename "$0") ${*//$\'\\n\'/ }" >> "$CALLS"\n'
PROGRAMS = {
    "scontrol": 'printf "gpu07\\ngpu08\\ngpu09\\n"',
    "srun": 'case "$*" in *hostname*) echo "10.0.0.7 192.168.1.7" ;; esac',
    "ray": "",
    "python": "cat > /dev/null; exit ${PYTHON_STATUS:-0}",
    "work": 'printf "%s\\n" "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $RAY_ADDRESS" >> "$CALLS"; exit "$1"',
    "saves": 'trap "echo saved >> $CALLS; exit 143" TERM; echo begun >> "$CALLS"; while true; do sleep 0.05; done',
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name, text in PROGRAMS.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/bash\n{STANDS_IN}{text}\n")
        program.chmod(0o755)
    job = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "gpu[07-09]", "SLURM_JOB_NUM_NODES": "3", "SLURM_TMPDIR": "/l"}
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), **job}


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    folder = Path(environment["CALLS"]).parent
    return subprocess.run(
        [SCRIPT, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def calls(environment: dict[str, str]) -> list[str]:
    file = Path(environment["CALLS"])
    return file.read_text().splitlines() if file.exists() else []


def test_ray_starts_on_all_nodes_and_the_command_runs_once(environment: dict[str, str]) -> None:
    assert run(environment, "work", "3").returncode == 3
    asked = calls(environment)
    head, others = (call for call in asked if call.startswith("srun") and "ray start" in call)
    if "--head" not in head:
        head, others = others, head
    assert (
        "--nodes 1 --ntasks 1 --nodelist gpu07 ray start --head --block --node-ip-address 10.0.0.7 --port 6379" in head
    )
    assert "--nodes 2 --ntasks 2 --ntasks-per-node 1 --exclude gpu07" in others
    assert head.endswith("--temp-dir /l/ray-12")
    assert [call for call in asked if call.startswith("work")] == ["work 3"]
    assert "token 64 10.0.0.7:6379" in asked


def test_one_node_needs_no_others(environment: dict[str, str]) -> None:
    assert run(environment | {"SLURM_JOB_NUM_NODES": "1"}, "work", "0").returncode == 0
    assert sum("ray start" in call for call in calls(environment)) == 1


def test_nodes_that_do_not_join_end_the_job(environment: dict[str, str]) -> None:
    assert run(environment | {"PYTHON_STATUS": "1"}, "work", "0").returncode == 1
    assert not any(call.startswith("work") for call in calls(environment))


def test_the_command_saves_before_the_time_is_up(environment: dict[str, str]) -> None:
    with subprocess.Popen([SCRIPT, "saves"], cwd=SCRIPT.parent / "aws", env=environment) as job:
        deadline = time.monotonic() + 30
        while "begun" not in calls(environment):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=30) == 143
    assert calls(environment)[-1] == "saved"


@pytest.mark.parametrize(
    ("words", "removed", "message"),
    [([], "", "usage: sbatch"), (["work"], "SLURM_JOB_NODELIST", "submit it with sbatch")],
)
def test_mistakes_are_said(environment: dict[str, str], words: list[str], removed: str, message: str) -> None:
    done = run({name: value for name, value in environment.items() if name != removed}, *words)
    assert (done.returncode, calls(environment)) == (2, [])
    assert message in done.stderr
