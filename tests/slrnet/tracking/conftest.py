"""A tracking store of SQLite that the tests of this room share."""

from __future__ import annotations

import re

import pytest

from slrnet.tracking.location import resolve_uri
from slrnet.tracking.mlflow import create_run
from slrnet.tracking.protocol import RunHandle
from tests.fixtures.stores import STRANGE, Stock


@pytest.fixture(scope="session")
def uri(stock: Stock, tmp_path_factory: pytest.TempPathFactory) -> str:
    return resolve_uri("", stock(tmp_path_factory.mktemp("storage") / STRANGE))


@pytest.fixture
def handle(uri: str, request: pytest.FixtureRequest) -> RunHandle:
    name = re.sub(r"\W", "-", f"{request.node.name} of {request.path.stem}")
    return create_run(uri, "exp", name, params={}, tags={}, resume=False)
