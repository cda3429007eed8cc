"""The closing table."""

from __future__ import annotations

from slrnet.training.summary import quality_table

METRICS = {
    "pseudo_mask/miou": 0.5,
    "pseudo_mask/mfdr": 0.25,
    "pseudo_mask/mfnr": 0.125,
    "pseudo_mask/iou/background": 0.75,
    "pseudo_mask/fdr/background": 0.1,
    "pseudo_mask/fnr/background": 0.2,
    "pseudo_mask/iou/tv-monitor": 0.25,
    "pseudo_mask/fdr/tv-monitor": 0.25,
    "pseudo_mask/fnr/tv-monitor": 0.125,
    "val/miou_ss_gated_by_scores": 0.1234,
    "val/mfnr": 1.0,
    "val/images": 5,
    "val/iou/tv-monitor": 0.1234,
    "val/fnr/tv-monitor": 1.0,
    "train/epoch_loss": 2.0,
}


def test_table() -> None:
    lines = quality_table(METRICS, ("background", "tv/monitor")).splitlines()
    assert [line.split() for line in lines[:2]] == [["pseudo_mask", "val"], ["%", *["IoU", "FDR", "FNR"] * 2]]
    assert lines[3:5] == [
        "background    75.0    10.0    20.0       -       -       -",
        "tv/monitor    25.0    25.0    12.5    12.3       -   100.0",
    ]
    assert lines[6] == "mean          50.0    25.0    12.5    12.3       -   100.0"
    assert lines[2] == lines[5] == "-" * len(lines[3])
    assert lines[1].index("FDR") + 3 == lines[3].index("10.0") + 4  # right-aligned under its heading


def test_what_was_not_measured_has_no_columns() -> None:
    only_val = {name: value for name, value in METRICS.items() if not name.startswith("pseudo_mask")}
    lines = quality_table(only_val, ("background", "tv/monitor")).splitlines()
    assert lines[0].split() == ["val"]
    assert lines[4].split() == ["tv/monitor", "12.3", "-", "100.0"]
