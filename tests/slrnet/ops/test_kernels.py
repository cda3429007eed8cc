"""When kernels may be chosen (by device, switch and compiler), and on which GPU Triton launches them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from slrnet.ops import cross_entropy_triton, factorize_triton, kernels

ON_GPU: Any = SimpleNamespace(device=torch.device("cuda"))


@pytest.fixture(autouse=True)
def _ask_again() -> Iterator[None]:
    kernels.triton_obstacle.cache_clear()
    yield
    kernels.triton_obstacle.cache_clear()


def test_triton_serves_gpus_unless_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_missing_for_launches", lambda: None)
    assert kernels.triton_serves(ON_GPU)
    assert not kernels.triton_serves(torch.zeros(1))
    monkeypatch.setenv(kernels.SWITCH, "off")
    assert not kernels.triton_serves(ON_GPU)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "finds no .*/cc; install one"),
        ("echo 'fatal error: Python.h: No such file' >&2; exit 1", r"\(fatal error: Python.h: .*\); install Python's"),
    ],
    ids=["no compiler", "no headers"],
)
def test_without_compiler_or_headers_operators_do_the_work_and_the_log_says_so_once(
    script: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "cc"
    if script is not None:
        compiler.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert not kernels.triton_serves(ON_GPU)
    assert not kernels.triton_serves(ON_GPU)
    (record,) = caplog.records
    assert record.getMessage().startswith("Triton's kernels are not used, and PyTorch's slower operators do their work")
    assert re.search(message, record.getMessage())
    monkeypatch.setattr(factorize_triton, "INTERPRETED", False)
    features: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(1, 8, 9))
    assert "cannot run here: " in str(factorize_triton.misfit(features, 3))


@pytest.mark.parametrize(
    ("k", "kilobytes", "fits"),
    [(21, 64, True), (500, 99, True), (1000, 99, False), (1000, 163, False), (1000, 227, True)],
)
def test_atoms_are_limited_by_the_gpus_shared_memory(
    k: int, kilobytes: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factorize_triton, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "_missing_for_launches", lambda: None)
    properties = SimpleNamespace(shared_memory_per_block_optin=kilobytes << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    features: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(1, 256, 9))
    problem = factorize_triton.misfit(features, k)
    assert (problem is None) == fits
    assert fits or f"KiB of shared memory for k = {k}, and this GPU has {kilobytes}; use 'recompute'" in str(problem)


class _Launches:
    """Stands for a kernel; notes which GPU is the current one at each launch."""

    def __init__(self, current: Callable[[], int]) -> None:
        self.current = current
        self.seen: list[int] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: self.seen.append(self.current())


def test_kernels_are_launched_on_their_tensors_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    def exchange(device: int) -> int:
        old, current[0] = current[0], device if device >= 0 else current[0]
        return old

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    launches = _Launches(lambda: current[0])
    for module in (factorize_triton, cross_entropy_triton):
        for name, kernel in list(vars(module).items()):
            if name.startswith("_") and hasattr(kernel, "run") and hasattr(kernel, "fn"):
                monkeypatch.setattr(module, name, launches)

    class OnSecond(Tensor):
        is_cuda = True

        def get_device(self) -> int:
            return 1

    def tensor(*shape: int) -> Tensor:
        return torch.zeros(shape).as_subclass(OnSecond)

    n, d, k, p = 1, 4, 3, 5
    features, codes = tensor(n, d, p), tensor(n, k, p)
    dictionaries, masses, last, rebuilt = factorize_triton.forward(features, codes, 2, 1.0)
    factorize_triton.backward(features, codes, dictionaries, masses, (dictionaries[-1], last, rebuilt), 1.0)
    cross_entropy_triton.sums_and_gradients(
        tensor(n, k, 2, 2), torch.zeros(n, 3, 3, dtype=torch.int64), tensor(n, 3, 3)
    )
    assert launches.seen == [1] * (5 + 8 + 1)
    assert current == [0]
