"""A tracking store of SQLite that the tests of this room share."""

from __future__ import annotations

import re

import pytest

from slrnet.tracking.location import resolve_uri
from slrnet.tracking.mlflow import create_run
from slrnet.tracking.protocol import RunHandle


@pytest.fixture(scope="session")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    # Creating the tables takes seconds, so the tests share one store. The characters in the path are on purpose.
    return resolve_uri("", tmp_path_factory.mktemp("storage") / "my runs? #50% & 'a' \"b\" 猫: v1@home" / "runs..")


@pytest.fixture
def handle(uri: str, request: pytest.FixtureRequest) -> RunHandle:
    name = re.sub(r"\W", "-", f"{request.node.name} of {request.path.stem}")
    return create_run(uri, "exp", name, params={}, tags={}, resume=False)
