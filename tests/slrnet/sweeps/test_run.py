"""Sweeps without a cluster: what ASHA would have made of trials that were trained to the end."""

from __future__ import annotations

from slrnet.sweeps.run import replay_asha


def test_asha_stops_the_poor_and_keeps_the_good() -> None:
    curves = {"good": [0.1, 0.5, 0.6, 0.7], "fair": [0.1, 0.4, 0.5, 0.6], "poor": [0.1, 0.1, 0.1, 0.9]}
    named = {"grace": 2, "reduction": 3.0, "concurrent": 1}
    assert replay_asha(curves, mode="max", **named) == {"good": 4, "fair": 2, "poor": 2}
    assert replay_asha(curves, mode="min", **named) == {"good": 4, "fair": 4, "poor": 4}, (
        "each better than those before"
    )


def test_nobody_is_stopped_before_the_grace_period_or_without_company() -> None:
    curves = {"a": [0.5, 0.5, 0.5], "b": [0.1, 0.1, 0.1]}
    assert replay_asha(curves, mode="max", grace=3, reduction=3.0, concurrent=2) == {"a": 3, "b": 3}
    assert replay_asha({"b": [0.1, 0.1, 0.1]}, mode="max", grace=1, reduction=3.0, concurrent=2) == {"b": 3}


def test_trials_run_side_by_side() -> None:
    """The poor one is first to its rung, and nothing is known yet that it could be compared with."""
    curves = {"poor": [0.1, 0.1, 0.1, 0.1], "good": [0.5, 0.5, 0.5, 0.5], "late": [0.2, 0.2, 0.2, 0.2]}
    epochs = replay_asha(curves, mode="max", grace=1, reduction=2.0, concurrent=2)
    assert epochs["good"] == 4
    assert epochs["late"] == 1
