"""cluster.yaml, its roles and its script for spot nodes, as far as they can be checked without AWS."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
CLUSTER: dict[str, Any] = yaml.safe_load(TEXT)
NODES = {name: entry["node_config"] for name, entry in CLUSTER["available_node_types"].items()}
VERSION = re.search(r'__version__ = "(.*)"', (ROOT / "slrnet" / "version.py").read_text()).group(1)  # type: ignore[union-attr]


def policy(name: str) -> dict[str, dict[str, Any]]:
    """Statements by their names."""
    document = json.loads((DEPLOY / "aws" / f"{name}.json").read_text())
    return {statement["Sid"]: statement for statement in document["Statement"]}


def actions_of(statement: dict[str, Any]) -> list[str]:
    actions = statement["Action"]
    return actions if isinstance(actions, list) else [actions]


class TestClusterFile:
    @pytest.mark.parametrize("kind", NODES)
    def test_nodes_are_what_aws_takes(self, kind: str) -> None:
        """By the description of its interface that its own library has."""
        session = pytest.importorskip("botocore.session").get_session()
        from botocore.validate import ParamValidator

        shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
        asked = {**NODES[kind], "MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(asked, shape).has_errors()
        asked["BlockDeviceMappings"][0]["Ebs"]["Througput"] = 1
        assert ParamValidator().validate(asked, shape).has_errors()
        del asked["BlockDeviceMappings"][0]["Ebs"]["Througput"]

    def test_disks_are_fast_and_metadata_asks_for_tokens(self) -> None:
        for node in NODES.values():
            assert node["MetadataOptions"] == {"HttpTokens": "required"}
            disk = node["BlockDeviceMappings"][0]["Ebs"]
            assert disk["Encrypted"] is True
            assert disk["Throughput"] <= disk.get("Iops", 3000) / 4  # AWS's limit
        assert NODES["gpu_worker"]["BlockDeviceMappings"][0]["Ebs"]["Throughput"] >= 500

    def test_the_head_fits_a_new_accounts_quota(self) -> None:
        assert NODES["head"]["InstanceType"] == "m6i.xlarge"  # 4 of 5 cores

    def test_the_image_has_this_version_and_its_registry_is_logged_in_to(self) -> None:
        registry, _, tag = CLUSTER["docker"]["image"].rpartition("/")
        assert tag == f"slrnet:{VERSION}"
        (login,) = CLUSTER["initialization_commands"]
        assert login.endswith(f"--password-stdin {registry}")
        assert f"--region {CLUSTER['provider']['region']} " in login

    def test_workers_look_for_notices_and_end_with_ray(self) -> None:
        start = CLUSTER["worker_start_ray_commands"][-1]
        script = re.search(r"python ~/(\S+) ray start --block ", start)
        assert script is not None
        mounted = CLUSTER["file_mounts"][f"/home/ray/{script.group(1)}"]
        assert (ROOT / mounted).is_file()
        assert re.search(r"setsid nohup .* < /dev/null &$", start)  # outlives the launcher's connection
        assert "$RAY_HEAD_IP:6379" in start

    def test_values_to_set_are_marked(self) -> None:
        lines = [line for line in TEXT.splitlines() if re.search(r"ACCOUNT|ami-SET|us-west-2", line)]
        assert len(lines) == 5
        assert all("# SET: " in line for line in lines)


class TestRoles:
    def test_the_head_may_pass_the_nodes_role_and_no_other(self) -> None:
        passing = policy("head")["GiveNodesTheirRole"]
        assert passing["Action"] == "iam:PassRole"
        assert passing["Resource"] == f"arn:aws:iam::ACCOUNT:role/{NODES['gpu_worker']['IamInstanceProfile']['Name']}"
        assert passing["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}

    def test_the_head_ends_its_own_nodes_alone(self) -> None:
        tag = {"StringEquals": {"aws:ResourceTag/ray-cluster-name": CLUSTER["cluster_name"]}}
        allowed = [s for s in policy("head").values() if "ec2:TerminateInstances" in actions_of(s)]
        assert [statement["Condition"] for statement in allowed] == [tag]

    def test_no_role_has_more_than_it_needs(self) -> None:
        for name in ("head", "node"):
            for statement in policy(name).values():
                assert not any("*" in action for action in actions_of(statement))
        assert {s["Resource"] for name, s in policy("node").items() if name in ("Bucket", "Objects")} == {
            "arn:aws:s3:::BUCKET",
            "arn:aws:s3:::BUCKET/*",
        }

    def test_they_are_documents_that_aws_takes(self) -> None:
        validation = pytest.importorskip("moto.iam.policy_validation")
        for name in ("head", "node"):
            text = (DEPLOY / "aws" / f"{name}.json").read_text().replace("ACCOUNT", "1" * 12).replace("BUCKET", "b")
            validation.IAMPolicyDocumentValidator(text).validate()
            with pytest.raises(Exception, match="Syntax errors|must"):
                validation.IAMPolicyDocumentValidator(text.replace('"Effect"', '"Efect"')).validate()

    def test_what_the_head_does_is_allowed(self) -> None:
        """Ray's own code is searched for what it asks of EC2 while the cluster runs."""
        import importlib.util

        spec = importlib.util.find_spec("ray")
        assert spec is not None
        assert spec.origin is not None
        source = (Path(spec.origin).parent / "autoscaler/_private/aws/node_provider.py").read_text()
        asked = set(re.findall(r"client\.(\w+)\(|ec2(?:_fail_fast)?\.(\w+)\(", source))
        names = {"".join(part.title() for part in (one or two).split("_")) for one, two in asked}
        names = (names - {"CreateInstances", "StartInstances", "StopInstances"}) | {
            "RunInstances"
        }  # no node is stopped
        allowed = {
            a for s in policy("head").values() for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])
        }
        assert CLUSTER["provider"]["cache_stopped_nodes"] is False
        assert {f"ec2:{name}" for name in names} <= allowed


class TestSpotNotice:
    """The script against a server that answers as an instance's metadata do."""

    @pytest.fixture
    def metadata(self) -> Iterator[tuple[str, list[Any]]]:
        """Its address, and what it answers in turn: a notice, None for none, or a status."""
        answers: list[Any] = []

        class Metadata(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                known = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                self.answer(200 if known else 400, "secret")

            def do_GET(self) -> None:
                if self.headers["X-aws-ec2-metadata-token"] != "secret":
                    self.answer(401, "")
                elif self.path != "/latest/meta-data/spot/instance-action":
                    self.answer(400, "")
                else:
                    said = answers.pop(0) if len(answers) > 1 else answers[0]
                    status = said if isinstance(said, int) else 200 if said else 404
                    self.answer(status, json.dumps(said))

            def answer(self, status: int, text: str) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}", answers
            server.shutdown()

    def run(self, address: str, folder: Path, ray: str) -> tuple[int, list[list[str]]]:
        """Exit status, and what `ray` was called with, where each call is `ray`, a script in Bash."""
        program, calls = folder / "ray", folder / "calls"
        program.write_text(f'#!/bin/bash\nprintf "%s\\x1f" "$@" >> {calls}; echo >> {calls}\n{ray}\n')
        program.chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": address,
            "SPOT_NOTICE_SECONDS": "0.05",
            "http_proxy": "http://127.0.0.1:1",
        }
        command = [sys.executable, str(DEPLOY / "spot_notice.py"), "ray", "start", "--block"]
        done = subprocess.run(command, env=environment, timeout=60, check=False, capture_output=True)
        return done.returncode, [line.split("\x1f")[:-1] for line in calls.read_text().splitlines()]

    def test_a_notice_drains_the_node_once(self, metadata: tuple[str, list[Any]], tmp_path: Path) -> None:
        address, answers = metadata
        end = datetime.now(UTC) + timedelta(seconds=118)
        notice = {"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")}
        answers += [None, 500, None, notice]
        done = tmp_path / "done"
        # Ray refuses once, as it does while it starts; later it ends with the node.
        ray = (
            f'if [ "$1" = start ]; then while [ ! -e {done}2 ]; do sleep 0.05; done; sleep 0.3; exit 7; fi\n'
            f"if [ -e {done} ]; then touch {done}2; else touch {done}; exit 1; fi"
        )
        status, calls = self.run(address, tmp_path, ray)
        assert status == 7
        start, *drains = calls
        assert start == ["start", "--block"]
        assert len(drains) == 2
        for drain in drains:
            from ray.scripts.scripts import drain_node

            parsed = drain_node.make_context("drain-node", drain[1:]).params
            assert drain[0] == "drain-node"
            assert parsed["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
            assert 60 < parsed["deadline_remaining_seconds"] <= 118
            assert "terminate" in parsed["reason_message"]

    def test_without_metadata_ray_runs_as_it_would(self, tmp_path: Path) -> None:
        assert self.run("http://127.0.0.1:1", tmp_path, "sleep 0.3; exit 3") == (3, [["start", "--block"]])


class TestImage:
    TEXT = (DEPLOY / "Dockerfile").read_text()

    def test_linters_have_nothing_to_say(self) -> None:
        """Where they are installed, as `make` does."""
        for linter, file in (("hadolint", "Dockerfile"), ("shellcheck", "slurm.sh")):
            program = Path(sys.executable).with_name(linter)
            if not program.is_file():
                pytest.skip(f"{linter} is not installed")
            done = subprocess.run([program, str(DEPLOY / file)], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout) == (0, "")

    def test_it_fits_pytorchs_cuda_and_runs_unprivileged(self) -> None:
        base = re.search(r"^FROM nvidia/cuda:(\d+)\.\d+\.\d+-base-\S+@sha256:[0-9a-f]{64}$", self.TEXT, re.MULTILINE)
        assert base is not None
        assert f"nvidia-cuda-runtime=={base.group(1)}." in (ROOT / "requirements.lock").read_text()
        assert re.findall(r"^USER (.*)$", self.TEXT, re.MULTILINE) == ["1000"]

    def test_what_it_copies_exists_and_is_sent(self) -> None:
        sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
        copied = {
            word
            for line in re.findall(r"^COPY --chown=1000:100 (.*) \S+$", self.TEXT, re.MULTILINE)
            for word in line.split()
        }
        assert copied == sent
        assert all((ROOT / name).exists() for name in copied)

    def test_it_installs_what_the_wheel_reads_and_every_part_of_the_project(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        packages = {name.removesuffix("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
        assert packages <= set(re.findall(r"slrnet-src/(\w+)$", self.TEXT, re.MULTILINE))

    PIP = tuple(re.findall(r"pip (install [^&\n]*)", TEXT))

    @pytest.mark.parametrize("line", PIP)
    def test_its_installations_are_commands_of_pip(self, line: str) -> None:
        from pip._internal.commands import create_command

        options, named = create_command("install").parse_args(shlex.split(line)[1:])
        assert (options.require_hashes, options.requirements) == (not named, [] if named else ["requirements.lock"])

    @pytest.mark.slow
    @pytest.mark.skipif(
        "SLRNET_TEST_IMAGE" not in os.environ, reason="downloads several GB; SLRNET_TEST_IMAGE=1 runs it"
    )
    def test_its_installations_work(self, tmp_path: Path) -> None:
        """In a fresh environment of this machine's Python, where the image has Ubuntu's."""
        source = tmp_path / "slrnet-src"
        source.mkdir()
        for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "slrnet", "data_prep", "ray_jobs"):
            (source / name).symlink_to(ROOT / name)
        (tmp_path / "requirements.lock").symlink_to(ROOT / "requirements.lock")
        subprocess.run([sys.executable, "-m", "venv", "venv"], cwd=tmp_path, check=True)
        for line in self.PIP:
            subprocess.run(["venv/bin/pip", *shlex.split(line)], cwd=tmp_path, check=True)
        assert subprocess.run(["venv/bin/slrnet", "--help"], cwd=tmp_path, check=False).returncode == 0

    def test_every_package_has_hashes_and_the_tested_version(self) -> None:
        lock = (ROOT / "requirements.lock").read_text()
        tested = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
        locked = re.findall(r"^([\w.-]+)==([^\s;]+)[^\n]*\\\n    --hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE)
        assert len(locked) == len(re.findall(r"^[\w.-]+==", lock, re.MULTILINE)) > 100
        assert {name: version for name, version in locked if tested.get(name, version) != version} == {}
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = [*(ROOT / "requirements.txt").read_text().splitlines()]
        wanted += [
            text for extra in ("aws", "crf", "coco", "distill") for text in project["optional-dependencies"][extra]
        ]
        names = {re.split(r"[^\w.-]", text)[0].lower() for text in wanted if text and not text.startswith("#")}
        assert names <= {name for name, _ in locked}
