"""Where runs may be tracked, and what is refused."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from slrnet.tracking import location
from slrnet.tracking.location import VARIABLE, database_of, is_named, not_named, resolve_uri


class TestResolveUri:
    def test_default_is_an_absolute_sqlite_file_in_the_storage(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert resolve_uri("", "store/here") == f"sqlite:///{tmp_path}/store/here/mlflow.db"
        assert (tmp_path / "store" / "here").is_dir()

    def test_environment_comes_second(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/env.db")
        assert resolve_uri("", tmp_path) == f"sqlite:///{tmp_path}/env.db"
        assert resolve_uri(f"sqlite:///{tmp_path}/own.db", tmp_path) == f"sqlite:///{tmp_path}/own.db"

    @pytest.mark.parametrize("uri", ["file:///data/mlruns", "./mlruns", "mlruns", "postgresql://db/mlflow", "ftp://x"])
    def test_stores_that_cannot_hold_a_run_are_refused(self, uri: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"cannot be used.*http\(s\)://HOST:PORT.*sqlite:////ABSOLUTE"):
            resolve_uri(uri, tmp_path)

    def test_relative_sqlite_path_is_refused_and_the_absolute_one_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=f"working directory.*sqlite:///{tmp_path}/mlflow.db"):
            resolve_uri("sqlite:///mlflow.db", tmp_path)

    @pytest.mark.parametrize(
        "name", ["my runs?", "a#b", "50%", "%3F?", "a b&c=d", "'q' \"q\"", "猫ü", "v1..", "a:b", "me@home"]
    )
    def test_a_storage_of_any_name_gets_its_own_database(self, name: str, tmp_path: Path) -> None:
        storage = tmp_path / name
        uri = resolve_uri("", storage)
        assert database_of(uri) == storage / "mlflow.db"
        assert resolve_uri(uri, tmp_path) == uri
        engine = create_engine(uri)
        with engine.begin() as connection:
            connection.execute(text("create table t (x int)"))
        engine.dispose()
        assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path(name), Path(name, "mlflow.db")]

    def test_options_of_a_uri_are_refused_and_the_file_of_that_name_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"`\?`, where options begin; .* give sqlite\+pysqlite:////.*/a%3Fb.db$"):
            resolve_uri(f"sqlite:///{tmp_path}/a?b.db", tmp_path)
        assert not list(tmp_path.iterdir())

    def test_remote_storage_needs_a_server(self) -> None:
        with pytest.raises(ValueError, match=r"remote.*mlflow server.*tracking\.uri"):
            resolve_uri("", "s3://bucket/runs")

    def test_a_file_that_is_no_database_is_refused_at_once(self, tmp_path: Path) -> None:
        (tmp_path / "mlflow.db").write_text("hello, this is text")
        with pytest.raises(ValueError, match=r"mlflow\.db exists and is no SQLite database"):
            resolve_uri("", tmp_path)

    def test_storage_that_is_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "taken").write_text("")
        with pytest.raises(ValueError, match="cannot create"):
            resolve_uri("", tmp_path / "taken" / "deeper")

    @pytest.mark.parametrize("address", ["http://me:secret@host:5000", "http://me:p@secret@host:5000"])
    @pytest.mark.parametrize("named", [True, False])
    def test_credentials_belong_into_variables_of_their_own(
        self, address: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(VARIABLE, "" if named else address)
        with pytest.raises(
            ValueError, match=r"http://host:5000 is given with a user.* MLFLOW_TRACKING_PASSWORD"
        ) as caught:
            resolve_uri(address if named else "", tmp_path)
        assert "secret" not in str(caught.value)

    def test_closed_port_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        with pytest.raises(ValueError, match=rf"at http://127\.0\.0\.1:{port} does not answer.*mlflow server"):
            resolve_uri("", tmp_path)

    def test_silent_server_is_given_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(location, "SERVER_TIMEOUT", 0.2)
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            with pytest.raises(ValueError, match="does not answer"):
                resolve_uri(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)

    @pytest.mark.parametrize(
        ("status", "text", "message"),
        [
            (200, "", ""),
            (401, "You are not authenticated", ""),
            (403, "Invalid Host header - possible DNS rebinding", "under the name 127.*--allowed-hosts 127"),
            (404, "", "has no MLflow API"),
            (502, "", "does not answer .HTTP status 502"),
        ],
    )
    def test_what_counts_as_an_answer(self, status: int, text: str, message: str, tmp_path: Path) -> None:
        with answering(status, text) as (address, asked):
            if message:
                with pytest.raises(ValueError, match=message):
                    resolve_uri(address, tmp_path)
            else:
                assert resolve_uri(f"{address}/", tmp_path) == address
        assert asked == [location.API]


class answering:
    """An HTTP server that answers everything with one status and text, and notes what was asked for."""

    def __init__(self, status: int, text: str) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None:
                del format, args

        self.server = HTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> tuple[str, list[str]]:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}", self.asked

    def __exit__(self, *exc_info: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize(
    ("uri", "given", "variable", "used"),
    [
        ("", "", "", True),
        ("http://host:5000", "", "", False),
        ("http://host:5000", "http://host:5000/", "", True),
        ("http://host:5000", "", "http://host:5000", True),
        ("http://host:5000", "http://other:5000", "http://host", False),
        ("sqlite:///{}/mlflow.db", "", "", True),
        ("sqlite:///{}/../mlflow.db", "", "", False),
        ("sqlite:////var/other.db", "", "", False),
    ],
)
def test_a_store_that_a_file_alone_names_is_not_used(
    uri: str, given: str, variable: str, used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, variable)
    assert is_named(uri.format(tmp_path), tmp_path, given=given) == used
    assert not_named("http://me:secret@host").startswith("the tracking store http://host is named by a file alone")
