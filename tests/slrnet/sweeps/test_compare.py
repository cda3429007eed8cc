"""SLRNet against its baseline, trained for a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slrnet.config import Config, apply_overrides
from slrnet.data.manifest import ShardSet
from slrnet.sweeps.compare import compare


@pytest.mark.slow
def test_both_are_trained_with_each_seed_and_compared(tiny_config: Config, tiny_data: ShardSet, tmp_path: Path) -> None:
    said: list[str] = []
    config = apply_overrides(tiny_config, [f"data.path={tiny_data.folder}", "evaluation.pseudo_mask_images=0"])
    result = compare(config, seeds=(0, 1), folder=tmp_path / "runs", say=said.append)
    assert (tmp_path / "runs" / "comparison.md").read_text() == result.text
    assert "so these train for 2 and " in said[0]
    scores = {}
    for name in ("baseline-0", "baseline-1", "slrnet-0", "slrnet-1"):
        last = max((tmp_path / "runs" / name / "checkpoints").iterdir())
        settings = json.loads((last / "config.json").read_text())
        ours = name.startswith("slrnet")
        assert settings["train"]["seed"] == int(name[-1])
        assert (len(settings["views"]["scales"]), settings["cvlr"]["enabled"]) == ((2, True) if ours else (1, False))
        state = json.loads((last / "state.json").read_text())
        assert state["epoch"] == settings["train"]["epochs"] >= 2
        scores[name] = state["metrics"]["val/miou_ss"]
    margins = [scores[f"slrnet-{seed}"] - scores[f"baseline-{seed}"] for seed in (0, 1)]
    assert result.margin.mean == pytest.approx(sum(margins) / 2)
    assert "| 2 views, CVLR | 1 view, no CVLR |" in result.text
    assert "Figures are of the last epoch, of 2 (SLRNet) and " in result.text
