"""Sweeps without a cluster: what ASHA would have made of trials that were trained to the end.

Ray Tune takes seconds to import, so these tests import it, and not the process that collects them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from slrnet.config import Config
from slrnet.launch.cluster import WorkerPlan
from slrnet.launch.train import TrainingError
from slrnet.storage.remote import cached
from slrnet.sweeps.plan import SweepOptions, plan_sweep
from slrnet.sweeps.space import parse_domain


def replay_asha(curves: dict[str, list[float]], **options: Any) -> dict[str, int]:
    from slrnet.sweeps import run

    return run.replay_asha(curves, **options)


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


@pytest.mark.parametrize(
    ("sizes", "gpu", "most", "fixed", "growing"),
    [
        ([(8, 0), (16, 0), (0, 0)], False, None, [2, 4, 1], [3, 5, 1]),
        ([(8, 0), (16, 0), (0, 0)], False, 3, [2, 3, 1], [3, 3, 3]),
        ([(32, 3), (64, 8)], True, None, [1, 4], [2, 5]),
    ],
)
def test_trials_at_a_time_follow_the_cluster(
    sizes: list[tuple[int, int]],
    gpu: bool,
    most: int | None,
    fixed: list[int],
    growing: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two workers with two cores each."""
    from ray.tune.search.optuna import OptunaSearch

    from slrnet.sweeps import run

    now = [(0, 0)]
    monkeypatch.setattr(run, "cluster_resources", lambda: now[-1])
    workers = WorkerPlan(least=2, most=2, cpus=2, gpu=gpu)
    searchers = [
        make(run._Room(workers, most, grows=grows))
        for grows in (False, True)
        for make in (run._Grid, lambda room: run._Limiter(room, OptunaSearch()))
    ]
    for size, *expected in zip(sizes, fixed, growing, strict=True):
        now.append(size)
        assert [searcher.max_concurrent for searcher in searchers] == [n for n in expected for _ in range(2)]


def test_an_error_of_tune_itself_is_one_line(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import tune

    from slrnet.sweeps import run

    def fail(self: Any) -> Any:
        raise tune.TuneError("Traceback (most recent call last):\n  File x\nValueError: no metric\n")

    monkeypatch.setattr(tune.Tuner, "fit", fail)
    monkeypatch.setattr(tune.Tuner, "__init__", lambda self, *_, **__: None)
    monkeypatch.setattr(run, "_Progress", lambda plan: tune.Callback())
    plan = plan_sweep(
        tiny_config, SweepOptions(name="s", storage=tmp_path), space=[parse_domain("optim.lr=choice:1,2")]
    )
    workers = WorkerPlan(least=1, most=1, cpus=1, gpu=False)
    sweep = run._Sweep(plan, None, workers, run._Room(workers, 1, grows=False))  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"^Ray Tune ended: ValueError: no metric; continue with --resume s$"):
        sweep._fit("tune", {}, None, resume=False)


def tried(values: dict[str, Any], *, sweep: Any) -> None:
    """A trial without its training. The second one dies between its last epoch and its report."""
    from ray import tune

    from slrnet.sweeps import run

    def train(*_: Any, **__: Any) -> dict[str, float]:
        with (count := Path(sweep.plan.config.tracking.experiment)).open("a") as file:
            file.write("tried\n")
        starts, figures = count.read_text().count("tried"), {"epoch": 1, sweep.plan.options.metrics[0]: 0.1}
        if starts == 2:
            raise RuntimeError("killed")
        if starts == 3:
            return figures
        tune.report(figures)
        return {}

    run.train_trial = train  # type: ignore[assignment]
    run._trial(values, sweep=sweep)


@pytest.mark.slow
def test_tune_keeps_its_state_in_an_object_store(
    s3: Any, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep killed after a trial's last epoch goes on: the trial trains nothing again, and its figures count."""
    import ray

    from slrnet.sweeps import run

    s3.create_dir("runs")
    count = tmp_path / "count"
    tracking = tiny_config.tracking.model_copy(update={"experiment": str(count)})
    most: dict[str, Any] = {"max_concurrent": 1, "num_samples": 2, "max_failures": 0, "scheduler": "none"}
    options = SweepOptions(name="s", storage=cached("s3://runs/all"), remote="s3://runs/all", **most)
    config = tiny_config.model_copy(update={"tracking": tracking})
    space = [parse_domain(text) for text in ("optim.lr=loguniform:1e-4:1e-2", "cvlr.num_iters=int:1:3")]
    plan = plan_sweep(config, options, space=space)
    monkeypatch.setattr(run, "_trial", tried)
    ray.shutdown()  # an earlier test of this process may have left its connection
    root = str(Path(__file__).resolve().parents[3])
    ray.init(address="local", num_cpus=1, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    try:
        workers = WorkerPlan(least=1, most=1, cpus=1, gpu=False)
        sweep = run._Sweep(plan, None, workers, run._Room(workers, 1, grows=False))  # type: ignore[arg-type]
        for resume, scored in ((False, 1), (True, 2)):
            found = sweep._fit("tune", run._param_space(plan), run._tune_config(plan, sweep.room), resume=resume)
            scores = [result.metrics and result.metrics.get(plan.options.metrics[0]) for result in found]
            assert scores.count(0.1) == scored, scores
    finally:
        ray.shutdown()
    assert count.read_text().count("tried") == 3  # what had reported is not trained again
    stored = [info.path for info in s3.get_file_info(fs.FileSelector("runs/all/s/tune", recursive=True))]
    assert any("experiment_state" in path for path in stored)
    assert not (plan.folder / "tune").exists()
