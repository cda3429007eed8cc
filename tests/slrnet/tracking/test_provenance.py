"""Versions and the commit that a run records."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from slrnet.tracking.provenance import environment_tags, git_state


class TestEnvironmentTags:
    def test_versions_and_nothing_of_the_host(self) -> None:
        tags = environment_tags()
        assert tags["version.python"] == ".".join(map(str, sys.version_info[:3]))
        assert tags["version.torch"].startswith("2.")
        assert tags["git_commit"] == tags["mlflow.source.git.commit"]
        values = " ".join(tags.values())
        assert socket.gethostname() not in values.split()
        assert str(Path.home()) not in values

    def test_git_state(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SLRNET_GIT_COMMIT", raising=False)
        code = tmp_path / "package" / "code.py"
        code.parent.mkdir()
        code.write_text("1")
        assert git_state(code) == ("unknown", "unknown")
        git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git, "init", "-q"], check=True)
        (tmp_path / "other").write_text("1")
        subprocess.run([*git, "add", "other"], check=True)
        subprocess.run([*git, "commit", "-qm", "m"], check=True)
        # The file is in a foreign checkout, not part of it.
        assert git_state(code) == ("unknown", "unknown")
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", "m"], check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        assert git_state(code) == (head, "clean")
        code.write_text("2")
        assert git_state(code) == (head, "dirty")

    def test_uploaded_code_names_its_commit_by_the_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SLRNET_GIT_COMMIT", "abc123")
        assert git_state(tmp_path / "code.py") == ("abc123", "unknown")
