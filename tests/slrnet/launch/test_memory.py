"""The memory that a step is expected to need, and what is advised for a GPU that is too small."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from slrnet.config import Config, apply_overrides
from slrnet.distributed.process import Process
from slrnet.launch import memory
from slrnet.launch.memory import memory_note, say_memory


@pytest.mark.parametrize(
    ("card", "images", "note"),
    [
        (40e9, 16, ""),
        (20e9, 16, "set train.accumulation=2 (8 images at a time, 14 GB)"),
        (10e9, 16, "set train.accumulation=4 (4 images at a time, 9 GB)"),
        (4e9, 16, "even one image needs 5 GB: use a smaller data.crop_size or a larger GPU"),
    ],
)
def test_advice_names_the_first_accumulation_that_fits(
    card: float, images: int, note: str, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_counted", lambda config, num_classes: (2 * 10**9, 10**9))
    told = memory_note(tiny_config, num_classes=4, images=images, card=card)
    assert told.endswith(note)
    assert bool(told) == bool(note)


def test_the_start_of_a_run_warns_of_a_small_gpu_and_of_nothing_else(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU of 16 GB, and a batch of 64 for two workers, with two passes: 16 images at a time."""
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=16e9))
    config = apply_overrides(tiny_config, ["train.batch_size=64", "train.accumulation=2"])
    counted: list[Any] = [(0, 10**8), (2 * 10**9, 10**9)]
    monkeypatch.setattr(memory, "_counted", lambda config, num_classes: counted.pop(0))
    process = Process(rank=0, world_size=2)
    say_memory(config, 4, process)
    assert not capsys.readouterr().out
    say_memory(config, 4, process)
    assert "warning: a step of 16 images is expected to need 24 GB, this GPU has 16; set train.accumulation=4" in (
        capsys.readouterr().out
    )
    say_memory(config, 4, process)  # nothing left to pop
    assert "cannot be counted before it runs (pop from empty list)" in capsys.readouterr().out


@pytest.mark.slow
def test_the_count_follows_crop_and_optimizer(tiny_config: Config) -> None:
    """Four times the pixels keep four times the activations; AdamW has one value more for each weight."""
    base = apply_overrides(tiny_config, ["data.crop_size=64", "views.scales=[1.0]"])
    fixed, of_image = memory._counted(base, 4)
    larger, of_larger = memory._counted(apply_overrides(base, ["data.crop_size=128", "optim.name=adamw"]), 4)
    assert of_larger == pytest.approx(4 * of_image, rel=0.1)
    assert 1.2 < larger / fixed < 1.4
