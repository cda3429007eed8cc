"""Generates the pages settings.md and recipes.md from the code: `python docs/generate.py`. `make docs` runs it."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from slrnet.config import Config  # noqa: E402
from slrnet.recipes import RECIPES  # noqa: E402

PAGES = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py; edit the docstrings in {source} instead. -->\n\n"


def settings_page() -> str:
    """Returns the settings page: each section's fields with allowed values, default and meaning."""
    schema = Config.model_json_schema()
    lines = [
        NOTE.format(source="slrnet/config.py") + "# Settings\n",
        "One `Config` (`slrnet/config.py:Config`) describes a run. `--set section.field=value` changes a field; "
        "write lists as `1.0,0.5`. Recipes override some of these defaults: see [Recipes](recipes.md).\n",
        "## Run\n",
        *table_of({name: field for name, field in schema["properties"].items() if "$ref" not in field}),
    ]
    for name, field in schema["properties"].items():
        if "$ref" in field:
            section = schema["$defs"][field["$ref"].rpartition("/")[2]]
            lines += [
                f"## {name}\n",
                section["description"] + "\n",
                *table_of(section["properties"], prefix=f"{name}."),
            ]
    return "\n".join(lines)


def table_of(fields: dict[str, Any], prefix: str = "") -> list[str]:
    rows = [
        f"| `{prefix}{name}` | {allowed(field)} | `{json.dumps(field['default'])}` | {in_cell(field['description'])} |"
        for name, field in fields.items()
    ]
    return ["| field | allowed | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]


def allowed(field: dict[str, Any]) -> str:
    """Returns the allowed values of a field in words, from its schema."""
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        return " or ".join(allowed(choice) for choice in field["anyOf"])
    if field["type"] == "array":
        return f"list of {allowed(field['items'] if 'items' in field else field['prefixItems'][0])}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[name]:g}" for name, sign in bounds.items() if name in field and field[name] < 2**32]
    kinds = {
        "boolean": "true, false",
        "string": "text",
        "integer": "whole number",
        "number": "number",
        "null": "`null`",
    }
    kind = kinds[field["type"]]
    return " ".join([kind, ", ".join(limits)]).strip()


def recipes_page() -> str:
    """Returns the recipes page: each recipe's docstring and the fields that differ from the defaults."""
    defaults = Config().flat()
    lines = [
        NOTE.format(source="slrnet/recipes.py") + "# Recipes\n",
        "A recipe is a named, complete configuration; `--recipe NAME` starts from it. All other fields have the "
        "defaults in [Settings](settings.md).\n",
    ]
    for name, recipe in RECIPES.items():
        changed = {key: value for key, value in recipe().flat().items() if value != defaults[key] and key != "recipe"}
        rows = [f"| `{key}` | `{json.dumps(value)}` |" for key, value in changed.items()]
        table = ["| field | value |", "| --- | --- |", *rows] if rows else ["All fields have their defaults."]
        lines += [f"## {name}\n", inspect.getdoc(recipe) or "", "", *table, ""]
    return "\n".join(lines)


def in_cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


if __name__ == "__main__":
    (PAGES / "settings.md").write_text(settings_page(), encoding="utf-8")
    (PAGES / "recipes.md").write_text(recipes_page(), encoding="utf-8")
