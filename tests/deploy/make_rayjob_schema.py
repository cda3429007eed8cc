"""Makes rayjob-schema.json from KubeRay's CRD: `make_rayjob_schema.py ray.io_rayjobs.yaml > rayjob-schema.json`.

The JSON schema of a RayJob's `spec` as the API server checks it: an object takes the fields that the CRD names and no
others, unless the CRD says that it keeps unknown ones. Descriptions, the status, and rules in Kubernetes' own
expression language (x-kubernetes-validations) are left out. Parts that occur several times, such as the template of a
pod, stand once in `$defs`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

VERSION = "v1"
SMALLEST_SHARED = 200
"""Characters from which on a part is worth a definition of its own."""


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes as a JSON schema that refuses unknown fields."""
    kept = {key: value for key, value in schema.items() if key != "description" and not key.startswith("x-kubernetes-")}
    if "properties" in schema:
        kept["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
    if isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = strict(schema["additionalProperties"])
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        kept["additionalProperties"] = False
    if "items" in schema:
        kept["items"] = strict(schema["items"])
    return kept


def share(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema with its repeated parts as definitions."""
    counts: Counter[str] = Counter()
    _count(schema, counts)
    definitions: dict[str, Any] = {}
    return {**_refer(schema, counts, definitions), "$defs": definitions}


def _count(part: Any, counts: Counter[str]) -> None:
    if isinstance(part, dict):
        counts[_text(part)] += 1
        for value in part.values():
            _count(value, counts)


def _refer(part: Any, counts: Counter[str], definitions: dict[str, Any]) -> Any:
    if not isinstance(part, dict):
        return part
    text = _text(part)
    name = hashlib.sha256(text.encode()).hexdigest()[:8]
    if name not in definitions:
        inner = {key: _refer(value, counts, definitions) for key, value in part.items()}
        if counts[text] == 1 or len(text) < SMALLEST_SHARED or not {"type", "properties"} <= part.keys():
            return inner
        definitions[name] = inner
    return {"$ref": f"#/$defs/{name}"}


def _text(part: Any) -> str:
    return json.dumps(part, sort_keys=True)


def main(crd: Path) -> None:
    versions = yaml.load(crd.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)["spec"]["versions"]
    schema = next(entry["schema"]["openAPIV3Schema"] for entry in versions if entry["name"] == VERSION)
    json.dump(share(strict(schema["properties"]["spec"])), sys.stdout, separators=(",", ":"), sort_keys=True)
    print()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
