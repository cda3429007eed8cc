"""deploy/kubernetes against KubeRay's own schema, with each overlay, and against what the documentation says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from slrnet.cli.main import build_parser
from slrnet.recipes import RECIPES
from slrnet.tracking.location import API

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
MANIFESTS = ROOT / "deploy" / "kubernetes"
README = (MANIFESTS / "README.md").read_text(encoding="utf-8")
POD = ("submitterPodTemplate", "spec")
Objects = dict[tuple[str, str], dict[str, Any]]


def load(file: Path) -> list[dict[str, Any]]:
    """The objects of a file, without YAML's aliases, so that a place can be changed alone."""
    objects: list[dict[str, Any]] = json.loads(as_json(file))
    return objects


@cache
def as_json(file: Path) -> str:
    return json.dumps(list(yaml.safe_load_all(file.read_text(encoding="utf-8"))))


def built(name: str) -> Objects:
    """What `kubectl apply -k` of a folder applies, by kind and name; knows what these files use of kustomize."""
    folder = MANIFESTS / name
    (kustomization,) = load(folder / "kustomization.yaml")
    objects: Objects = {}
    for resource in kustomization["resources"]:
        path = folder / resource
        objects |= (
            built(path.resolve().name)
            if path.is_dir()
            else {(found["kind"], found["metadata"]["name"]): found for found in load(path)}
        )
    for patch in kustomization.get("patches", []):
        target = objects[patch["target"]["kind"], patch["target"]["name"]]
        for change in yaml.safe_load(patch["patch"]):
            apply(target, change)
    return objects


def apply(target: Any, change: dict[str, Any]) -> None:
    """A change as JSON Patch (RFC 6902) describes it."""
    *way, last = [part.replace("~1", "/") for part in change["path"].split("/")[1:]]
    for part in way:
        target = target[int(part) if isinstance(target, list) else part]
    if change["op"] == "replace":
        assert last in target if isinstance(target, dict) else int(last) < len(target), change["path"]
    if isinstance(target, list):
        assert last == "-"
        target.append(change["value"])
    else:
        target[last] = change["value"]


@pytest.fixture(params=["base", "gke", "eks"])
def objects(request: pytest.FixtureRequest) -> Objects:
    return built(request.param)


@pytest.fixture
def spec(objects: Objects) -> dict[str, Any]:
    """Of the job."""
    found: dict[str, Any] = objects["RayJob", "slrnet"]["spec"]
    return found


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((HERE / "rayjob-schema.json").read_text())
    return loaded


def pods(objects: Objects) -> dict[str, dict[str, Any]]:
    job = objects["RayJob", "slrnet"]["spec"]
    cluster = job["rayClusterSpec"]
    return {
        "files": objects["Pod", "slrnet-files"]["spec"],
        "mlflow": objects["Deployment", "slrnet-mlflow"]["spec"]["template"]["spec"],
        "submitter": job["submitterPodTemplate"]["spec"],
        "head": cluster["headGroupSpec"]["template"]["spec"],
        "worker": cluster["workerGroupSpecs"][0]["template"]["spec"],
    }


def place(values: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        values = values[step]
    return values


@pytest.fixture(scope="module")
def validator(schema: dict[str, Any]) -> Any:
    """Of a RayJob's spec. Importing jsonschema takes seconds, and so does checking the schema each time."""
    from jsonschema import Draft202012Validator

    return Draft202012Validator(schema)


class TestSchema:
    def test_the_job_and_all_pods_fit(self, objects: Objects, spec: dict[str, Any], validator: Any) -> None:
        validator.validate(spec)
        for pod in pods(objects).values():
            validator.validate(spec | {"submitterPodTemplate": {"spec": pod}})
        assert objects["RayJob", "slrnet"]["apiVersion"] == "ray.io/v1"

    @pytest.mark.parametrize(
        ("path", "name", "value"),
        [
            ((), "shutdownAfterJobFinish", True),
            ((), "ttlSecondsAfterFinished", "600"),
            (POD, "restartPolicies", "Never"),
            ((*POD, "containers", 0, "resources"), "request", {"cpu": 1}),
            (("rayClusterSpec",), "rayVersions", "2.60.0"),
            (("rayClusterSpec", "authOptions"), "mode", "password"),
            (("rayClusterSpec", "authOptions"), "secret", "x"),
            (("rayClusterSpec", "headGroupSpec"), "rayStartParams", {"num-cpus": 0}),
            (("rayClusterSpec", "headGroupSpec", "template", "spec", "volumes", 1, "emptyDir"), "size", "1Gi"),
            (("rayClusterSpec", "workerGroupSpecs", 0), "maxReplica", 4),
            (("rayClusterSpec", "workerGroupSpecs", 0), "replicas", "four"),
            (("rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0), "volumeMount", []),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, validator: Any, path: tuple[str | int, ...], name: str, value: Any
    ) -> None:
        spec = built("base")["RayJob", "slrnet"]["spec"]
        place(spec, path)[name] = value
        errors = list(validator.iter_errors(spec))
        assert any(name in str(error) for error in errors)

    def test_no_object_of_the_schema_takes_unknown_fields(self, schema: dict[str, Any], validator: Any) -> None:
        def parts(value: Any) -> Iterator[dict[str, Any]]:
            if isinstance(value, dict):
                yield value
                for inner in value.values():
                    yield from parts(inner)

        validator.check_schema(schema)
        objects = [part for part in parts(schema) if part.get("type") == "object"]
        assert len(objects) > 100
        # A resource claim's parameters are its driver's own.
        assert all("additionalProperties" in part for part in objects)

    def test_its_script_closes_objects_and_shares_repeated_parts(self, validator: Any, tmp_path: Path) -> None:
        part = {"type": "object", "description": "x" * 300, "properties": {"n" * 200: {"type": "integer"}}}
        fields = {
            "a": part,
            "b": part,
            "names": {"type": "object", "additionalProperties": {"type": "string"}},
            "any": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            "list": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "string"}}}},
        }
        spec = {"type": "object", "required": ["a"], "properties": fields}
        entry = {"name": "v1", "schema": {"openAPIV3Schema": {"properties": {"spec": spec}}}}
        (tmp_path / "crd.yaml").write_text(yaml.safe_dump({"spec": {"versions": [entry]}}))
        command = [sys.executable, str(HERE / "make_rayjob_schema.py"), str(tmp_path / "crd.yaml")]
        made = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        (name,) = made["$defs"]
        assert made["properties"]["a"] == made["properties"]["b"] == {"$ref": f"#/$defs/{name}"}
        small = type(validator)(made)
        small.validate({"a": {"n" * 200: 1}, "names": {"k": "v"}, "any": {"k": 1}, "list": [{"x": "y"}]})
        for wrong in (
            {},
            {"a": {"m": 1}},
            {"a": {}, "names": {"k": 1}},
            {"a": {}, "list": [{"z": 1}]},
            {"a": {}, "c": 1},
        ):
            assert list(small.iter_errors(wrong)), wrong


class TestJob:
    def test_ray_is_the_tested_one(self, spec: dict[str, Any]) -> None:
        pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        assert pinned is not None
        assert spec["rayClusterSpec"]["rayVersion"] == pinned.group(1)

    def test_token_authentication_is_on_and_nothing_is_open(self, objects: Objects, spec: dict[str, Any]) -> None:
        cluster = spec["rayClusterSpec"]
        assert cluster["authOptions"] == {"mode": "token", "secretName": "slrnet-ray-token"}
        assert "create secret generic slrnet-ray-token --from-literal=auth_token=" in README
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert "type" not in objects["Service", "slrnet-mlflow"]["spec"]

    def test_kueue_takes_the_job(self, spec: dict[str, Any], objects: Objects) -> None:
        """Its webhook refuses clusters that scale themselves or stay; its queue covers what the pods ask for."""
        queues = {found["kind"]: found for found in load(MANIFESTS / "kueue.yaml")}
        label = objects["RayJob", "slrnet"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
        assert label == queues["LocalQueue"]["metadata"]["name"]
        assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is False
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["ttlSecondsAfterFinished"] > 0
        covered = queues["ClusterQueue"]["spec"]["resourceGroups"][0]["coveredResources"]
        asked = {
            name
            for pod in ("submitter", "head", "worker")
            for kind in pods(objects)[pod]["containers"][0]["resources"].values()
            for name in kind
        }
        assert asked == set(covered)

    def test_a_worker_for_each_gpu_and_a_pod_for_each_node(self, spec: dict[str, Any]) -> None:
        program, *words = shlex.split(spec["entrypoint"])
        options = build_parser(words).parse_args(words)
        (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
        gpus = group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        assert program == "slrnet"
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
        assert options.num_workers == group["replicas"] * gpus
        assert gpus > 1
        assert options.recipe in RECIPES
        assert str(options.storage).startswith("/shared/")
        assert options.data.startswith("/shared/")

    def test_trainings_have_time_to_save(self, objects: Objects) -> None:
        for name in ("head", "worker"):
            pod = pods(objects)[name]
            variables = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
            drain = float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
            if name == "worker":
                assert 0 < drain < pod["terminationGracePeriodSeconds"] <= 120

    def test_mlflow_answers_under_the_name_that_trainings_use(self, objects: Objects) -> None:
        service = objects["Service", "slrnet-mlflow"]
        (port,) = service["spec"]["ports"]
        name = f"{service['metadata']['name']}:{port['port']}"
        (server,) = pods(objects)["mlflow"]["containers"]
        options = dict(word.removeprefix("--").split("=", 1) for word in server["args"])
        assert name in options["allowed-hosts"].split(",")
        probe = server["readinessProbe"]["httpGet"]
        assert probe["path"] == API
        assert probe["httpHeaders"] == [{"name": "Host", "value": name}]
        for pod in ("head", "worker"):
            variables = {entry["name"]: entry["value"] for entry in pods(objects)[pod]["containers"][0]["env"]}
            assert variables["MLFLOW_TRACKING_URI"] == f"http://{name}"
        from mlflow.cli import server as mlflow_server

        mlflow_server.make_context("server", list(server["args"]))

    def test_memory_for_shared_batches(self, objects: Objects) -> None:
        for name in ("head", "worker"):
            pod = pods(objects)[name]
            (mount,) = (m["name"] for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == "/dev/shm")
            (volume,) = (v for v in pod["volumes"] if v["name"] == mount)
            assert volume["emptyDir"]["medium"] == "Memory"
            memory = int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi"))
            # Ray keeps three tenths of the memory for objects, and leaves /dev/shm where they do not fit.
            assert 0.3 * memory < int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) < memory

    def test_all_see_the_shared_volume_under_the_same_path(self, objects: Objects) -> None:
        claim = objects["PersistentVolumeClaim", "slrnet"]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        for name in ("files", "head", "worker"):
            pod = pods(objects)[name]
            assert {"name": "shared", "persistentVolumeClaim": {"claimName": "slrnet"}} in pod["volumes"]
            mounts = pod["containers"][0]["volumeMounts"]
            assert [m["mountPath"] for m in mounts if m["name"] == "shared"] == ["/shared"]

    def test_no_pod_has_privileges(self, objects: Objects) -> None:
        for pod in pods(objects).values():
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] == 1000
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                assert container["image"] == "slrnet"  # kustomization.yaml has its place and version
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                }
                assert {"requests", "limits"} <= container["resources"].keys()

    def test_values_to_set_are_marked(self) -> None:
        settings = re.compile(r"SET-|^ *(storageClassName|entrypoint|replicas|minReplicas|maxReplicas): |storage: 500")
        lines = [line for file in MANIFESTS.glob("base/*.yaml") for line in file.read_text().splitlines()]
        unset = [line for line in lines if settings.search(line) and line.strip() != "replicas: 1"]
        assert len(unset) == 7
        assert all("# SET: " in line for line in unset)


def test_the_documentation_names_the_release_of_the_schema() -> None:
    origin = (HERE / "README.md").read_text(encoding="utf-8")
    version = re.search(r"KubeRay (\d+\.\d+\.\d+)", origin)
    assert version is not None
    assert f"--version {version.group(1)}" in README
    assert "Apache" in origin


def test_commands_of_the_documentation_name_what_there_is() -> None:
    objects = built("base")
    assert set(re.findall(r"rayjob[ /]([\w-]+)", README)) == {"slrnet"}
    assert set(re.findall(r"(?:pod/|exec -i |cp )(slrnet[\w-]*)", README)) == {"slrnet-files"}
    assert set(re.findall(r"deployment/([\w-]+)", README)) == {"slrnet-mlflow"}
    applied = set(re.findall(r"-[kf] (deploy/kubernetes/\S+)", README))
    assert applied >= {"deploy/kubernetes/base", "deploy/kubernetes/kueue.yaml"}
    assert all((ROOT / path).exists() for path in applied)
    components = {found["metadata"]["labels"]["app.kubernetes.io/component"] for found in objects.values()}
    assert set(re.findall(r"component[ =](?:in \()?([\w, ]+)", README)) <= {*components, "storage, mlflow"}
