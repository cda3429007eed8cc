"""What code a run is made with: versions and the git commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from slrnet.version import __version__

__all__ = ["environment_tags", "git_state", "package_version"]

_PACKAGES = ("torch", "torchvision", "ray", "mlflow", "webdataset", "timm", "numpy")


def environment_tags() -> dict[str, str]:
    """Versions and the git commit of the code, as tags; nothing that names the host or its user.

    Uploaded or installed code has no history; its commit is the environment's `SLRNET_GIT_COMMIT`, or "unknown".
    """
    commit, state = git_state(Path(__file__).resolve())
    return {
        "git_commit": commit,
        "git_state": state,
        # MLflow's page shows these under its own names.
        "mlflow.source.git.commit": commit,
        "mlflow.source.name": "slrnet",
        "mlflow.source.type": "PROJECT",
        "version.slrnet": __version__,
        "version.python": platform.python_version(),
        **{f"version.{package}": package_version(package) for package in _PACKAGES},
    }


def git_state(file: Path) -> tuple[str, str]:
    """Commit and state ("clean", "dirty" or "unknown") of the checkout that holds a file."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # A package that is installed inside another project's checkout must not report that project's commit.
        git("ls-files", "--error-unmatch", file.name)
        commit = git("rev-parse", "HEAD")
        return commit, "dirty" if git("status", "--porcelain") else "clean"
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("SLRNET_GIT_COMMIT", "unknown"), "unknown"


def package_version(package: str) -> str:
    """Version of an installed package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
