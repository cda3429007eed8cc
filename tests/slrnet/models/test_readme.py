"""The examples of the module's README run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

README = Path(__file__).resolve().parents[3] / "slrnet" / "models" / "README.md"


def test_examples() -> None:
    names: dict[str, Any] = {"__name__": "example"}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert [tuple(view.shape) for view in names["out"].features] == [(2, 256, 40, 40), (2, 256, 20, 20)]
    assert [tuple(view.shape) for view in names["out"].codes] == [(2, 10, 40, 40), (2, 10, 20, 20)]
    encoder, head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
    network = names["Siamese"](encoder, head, 8, 4)
    images = torch.randn(1, 3, 12, 12), torch.randn(1, 3, 6, 6)
    for view, image in zip(network(*images), images, strict=True):
        assert torch.allclose(view, head(encoder(image)), atol=1e-6)  # it starts as the identity
