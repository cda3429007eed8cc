"""Pretrained weights of timm's models: the Hugging Face hub, folders, licenses, and the way without a network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

__all__ = ["fetch_command", "file_of", "hub_file", "license_note"]

FREE = ("apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause", "cc0-1.0")
"""Licenses that allow any use."""
_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
"""Names of weights files in folders and repositories, the first ones preferred."""


def _source(model: str) -> Any:
    return timm.models.get_pretrained_cfg(model, allow_unregistered=True)


def _repository(model: str) -> str:
    config = _source(model)
    return (config and config.hf_hub_id) or ""


def hub_file(model: str) -> Path | None:
    """Fetches the weights of a timm model from the hub or its cache; None if timm has another source.

    `HF_ENDPOINT` names another hub, and `HF_HUB_CACHE` another folder for what it sends.

    Raises:
        OSError: the hub does not answer, refuses, or has no such file.
    """
    repository, _, revision = _repository(model).partition("@")
    if not repository:
        return None
    places = {"endpoint": os.environ.get("HF_ENDPOINT"), "cache_dir": os.environ.get("HF_HUB_CACHE")}
    own = _source(model).hf_hub_filename
    for name in (own,) if own else _FILES:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None, **places))  # type: ignore[call-overload]
        except LocalEntryNotFoundError as error:  # without an answer, other names have none either
            raise OSError(str(error).splitlines()[0]) from error
        except EntryNotFoundError:
            continue
    raise FileNotFoundError(f"{repository} has no file {', '.join(_FILES)}")


def fetch_command(model: str) -> str:
    """The command that fetches the weights on a machine with a network, and what to set here; "" without a hub."""
    repository = _repository(model).partition("@")[0]
    if not repository:
        return ""
    return (
        f"on a machine with a network, run `hf download {repository} --local-dir FOLDER`, copy FOLDER here, and set "
        "model.encoder_weights=FOLDER"
    )


def file_of(folder: Path) -> Path:
    """The weights file in a folder, such as one that `hf download` made.

    Raises:
        ValueError: it has none, or several that could be meant.
    """
    named = [folder / name for name in _FILES if (folder / name).is_file()]
    others = sorted([*folder.glob("*.safetensors"), *folder.glob("*.pth")])
    if named or len(others) == 1:
        return [*named, *others][0]
    held = f"holds {', '.join(path.name for path in others)}" if others else "has no weights file"
    raise ValueError(
        f"folder {folder.absolute()} {held}; model.encoder_weights takes a file, or a folder with {_FILES[0]} or with "
        "one .safetensors or .pth file"
    )


def license_note(model: str) -> str:
    """One line about the origin and license of a timm model's weights."""
    config = _source(model)
    place = _repository(model) or (config and config.url) or "an unknown place"
    license_ = (config and config.license) or ""
    if license_ in FREE:
        return f"weights of timm:{model}: {place}, license {license_}"
    terms = f"license {license_}, which may restrict use" if license_ else "no license stated"
    return f"weights of timm:{model}: {place}, {terms}; read its terms before you use or pass on what you train"
