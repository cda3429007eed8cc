"""deploy/rayjob.yaml against KubeRay's own schema, and against what cluster.yaml and the documentation say."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from slrnet.cli.main import build_parser
from slrnet.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
MANIFEST = ROOT / "deploy" / "rayjob.yaml"
README = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
POD = ("submitterPodTemplate", "spec")


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    return {found["kind"]: found for found in yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))}


@pytest.fixture
def spec(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of the job; without YAML's aliases, so that a test can change one place."""
    copied: dict[str, Any] = json.loads(json.dumps(objects["RayJob"]["spec"]))
    return copied


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((HERE / "rayjob-schema.json").read_text())
    return loaded


def pods(objects: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    job = objects["RayJob"]["spec"]
    cluster = job["rayClusterSpec"]
    return {
        "files": objects["Pod"]["spec"],
        "submitter": job["submitterPodTemplate"]["spec"],
        "head": cluster["headGroupSpec"]["template"]["spec"],
        "worker": cluster["workerGroupSpecs"][0]["template"]["spec"],
    }


def place(values: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        values = values[step]
    return values


class TestSchema:
    def test_the_job_and_all_pods_fit(
        self, objects: dict[str, dict[str, Any]], spec: dict[str, Any], schema: dict[str, Any]
    ) -> None:
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(spec, schema)
        spec["submitterPodTemplate"]["spec"] = deepcopy(objects["Pod"]["spec"])
        jsonschema.validate(spec, schema)
        assert objects["RayJob"]["apiVersion"] == "ray.io/v1"

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
        self, spec: dict[str, Any], schema: dict[str, Any], path: tuple[str | int, ...], name: str, value: Any
    ) -> None:
        place(spec, path)[name] = value
        with pytest.raises(jsonschema.ValidationError) as caught:
            jsonschema.validate(spec, schema)
        assert name in str(caught.value)

    def test_no_object_of_the_schema_takes_unknown_fields(self, schema: dict[str, Any]) -> None:
        def parts(value: Any) -> Iterator[dict[str, Any]]:
            if isinstance(value, dict):
                yield value
                for inner in value.values():
                    yield from parts(inner)

        objects = [part for part in parts(schema) if part.get("type") == "object"]
        assert len(objects) > 100
        # A resource claim's parameters are its driver's own.
        assert all("additionalProperties" in part for part in objects)

    def test_its_script_closes_objects_and_shares_repeated_parts(self, tmp_path: Path) -> None:
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
        jsonschema.validate({"a": {"n" * 200: 1}, "names": {"k": "v"}, "any": {"k": 1}, "list": [{"x": "y"}]}, made)
        for wrong in (
            {},
            {"a": {"m": 1}},
            {"a": {}, "names": {"k": 1}},
            {"a": {}, "list": [{"z": 1}]},
            {"a": {}, "c": 1},
        ):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(wrong, made)


class TestJob:
    def test_images_are_those_of_the_cluster_file(self, objects: dict[str, dict[str, Any]]) -> None:
        docker = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))["docker"]
        images = {name: pod["containers"][0]["image"] for name, pod in pods(objects).items()}
        assert images.pop("worker") == docker["worker_image"]
        assert set(images.values()) == {docker["head_image"]}
        pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        assert pinned is not None
        assert objects["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] == pinned.group(1)

    def test_token_authentication_is_on_and_nothing_is_open(self, spec: dict[str, Any]) -> None:
        cluster = spec["rayClusterSpec"]
        assert cluster["authOptions"] == {"mode": "token", "secretName": "slrnet-ray-token"}
        assert "create secret generic slrnet-ray-token --from-literal=auth_token=" in README
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"

    def test_the_cluster_goes_when_the_job_is_done(self, spec: dict[str, Any]) -> None:
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["ttlSecondsAfterFinished"] > 0

    def test_workers_scale_down_to_none_and_up_to_what_the_training_asks_for(self, spec: dict[str, Any]) -> None:
        program, script, *arguments = shlex.split(spec["entrypoint"])
        assert (program, script) == ("python", "/shared/slrnet/ray_jobs/train.py")
        words = ["train", *arguments]
        options = build_parser(words).parse_args(words)
        (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
        assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is True
        assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (0, *[options.num_workers] * 2)
        assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert options.recipe in RECIPES
        assert str(options.storage).startswith("/shared/")
        assert options.data.startswith("/shared/")
        assert spec["backoffLimit"] == 0

    def test_memory_for_shared_batches(self, objects: dict[str, dict[str, Any]]) -> None:
        for name in ("head", "worker"):
            pod = pods(objects)[name]
            (mount,) = (m["name"] for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == "/dev/shm")
            (volume,) = (v for v in pod["volumes"] if v["name"] == mount)
            assert volume["emptyDir"]["medium"] == "Memory"
            memory = int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi"))
            # Ray keeps three tenths of the memory for objects, and leaves /dev/shm where they do not fit.
            assert 0.3 * memory < int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) < memory

    def test_all_see_the_shared_volume_under_the_same_path(self, objects: dict[str, dict[str, Any]]) -> None:
        claim = objects["PersistentVolumeClaim"]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        for name in ("files", "head", "worker"):
            pod = pods(objects)[name]
            volumes = {v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
            assert {"name": "shared", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}} in pod[
                "volumes"
            ]
            mounts = pod["containers"][0]["volumeMounts"]
            assert [m["mountPath"] for m in mounts if m["name"] in volumes] == ["/shared"]

    def test_no_pod_has_privileges(self, objects: dict[str, dict[str, Any]]) -> None:
        scaler = objects["RayJob"]["spec"]["rayClusterSpec"]["autoscalerOptions"]
        for pod in pods(objects).values():
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] == 1000
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in (*pod["containers"], scaler):
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                }
                assert {"requests", "limits"} <= container["resources"].keys()

    def test_values_to_set_are_marked(self) -> None:
        lines = MANIFEST.read_text(encoding="utf-8").splitlines()
        settings = re.compile(r"SET-|^ *(storageClassName|storage|entrypoint|replicas|maxReplicas): |value: unknown")
        unset = [line for line in lines if settings.search(line)]
        assert len(unset) == 7
        assert all("# SET: " in line for line in unset)
        assert [line.strip() for line in lines if "# SET: " in line and line not in unset] == [
            "resources: # SET: the resources of your GPU nodes per GPU"
        ]


def test_the_documentation_names_the_release_of_the_schema() -> None:
    origin = (HERE / "README.md").read_text(encoding="utf-8")
    version = re.search(r"KubeRay (\d+\.\d+\.\d+)", origin)
    assert version is not None
    assert f"--version {version.group(1)}" in README
    assert "Apache" in origin


def test_commands_of_the_documentation_name_what_there_is(objects: dict[str, dict[str, Any]]) -> None:
    named = {(kind.lower(), found["metadata"]["name"]) for kind, found in objects.items()}
    assert named == {("persistentvolumeclaim", "slrnet"), ("pod", "slrnet-files"), ("rayjob", "slrnet")}
    assert set(re.findall(r"rayjob[ /]([\w-]+)", README)) == {"slrnet"}
    assert set(re.findall(r"(?:pod/|exec -i |cp )(slrnet[\w-]*)", README)) == {"slrnet-files"}
    assert "deploy/rayjob.yaml" in README
    components = {found["metadata"]["labels"]["app.kubernetes.io/component"] for found in objects.values()}
    assert components == {"storage", "training"}
    assert set(re.findall(r"component=(\w+)", README)) == components
