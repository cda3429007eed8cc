"""When kernels may be chosen: by device, and by the switch in the environment."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from slrnet.ops import kernels


def test_triton_serves_gpus_unless_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    assert kernels.triton_serves(on_gpu)  # type: ignore[arg-type]
    assert not kernels.triton_serves(torch.zeros(1))
    monkeypatch.setenv(kernels.SWITCH, "off")
    assert not kernels.triton_serves(on_gpu)  # type: ignore[arg-type]
