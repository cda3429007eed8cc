"""The cost model: counters against hand-worked numbers and a real step, the roofline, runs, the measuring script."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import _operators, cost_model, gpu
from benchmarks._operators import (
    BACKWARD,
    MATRICES,
    Count,
    Operator,
    OperatorCounter,
    as_on_gpu,
    count_step,
)
from benchmarks.cost_model import A100, H100, WORKLOADS, Counts, Workload
from slrnet.config import (
    CalibrationConfig,
    Config,
    ConfigError,
    CvlrConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    TrainConfig,
    apply_overrides,
)
from slrnet.models.slrnet import build_network
from slrnet.ops.cross_entropy import sums_and_gradients
from slrnet.recipes import get_recipe

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 5


def tiny(*changes: str) -> Config:
    config = Config(
        recipe="tiny",
        data=DataConfig(crop_size=64, workers=0),
        model=ModelConfig(
            encoder="timm:test_resnet",
            encoder_weights="none",
            output_stride=16,
            decoder_dim=8,
            skip_dim=4,
            aspp_dilations=(1, 2, 3),
        ),
        cvlr=CvlrConfig(dim=8),
        calibration=CalibrationConfig(refine_iters=2, refine_dilations=(1, 2)),
        train=TrainConfig(epochs=2, pretrain_epochs=1, batch_size=2),
        evaluation=EvaluationConfig(pseudo_mask_images=3),
    )
    return apply_overrides(config, list(changes))


@pytest.fixture(scope="module")
def counts() -> Counts:
    load = Workload(classes=CLASSES, draws=5000, validation=10, present=2)
    return Counts(get=lambda _: tiny(), loads={"voc_wsss": load})


@pytest.fixture(scope="module")
def counted(counts: Counts) -> Count:
    return counts.step("voc_wsss", 2)


def counted_operators(work: Callable[[], Any]) -> list[Operator]:
    counter = OperatorCounter()
    with FakeTensorMode(), counter:
        work()
    return counter.operators


class TestCounter:
    def test_a_convolution_by_hand(self) -> None:
        def work() -> None:
            images = torch.empty(2, 3, 10, 12, dtype=torch.bfloat16, requires_grad=True)
            weight = torch.empty(8, 3, 3, 3, dtype=torch.bfloat16, requires_grad=True)
            nn.functional.conv2d(images, weight).backward(torch.empty(2, 8, 8, 10, dtype=torch.bfloat16))

        forward, of_input, of_weight = counted_operators(work)
        flops = 2 * (2 * 8 * 8 * 10) * (3 * 3 * 3)  # a product and a sum for each output and each weight of its channel
        image, weight, output = 2 * 2 * 3 * 10 * 12, 2 * 8 * 3 * 3 * 3, 2 * 2 * 8 * 8 * 10
        assert [operator.flops for operator in (forward, of_input, of_weight)] == [flops] * 3
        assert forward.moved == of_input.moved == of_weight.moved == image + weight + output
        assert {operator.kind for operator in (forward, of_input, of_weight)} == {"bf16"}
        assert [operator.outputs for operator in (forward, of_input, of_weight)] == [1280, 720, 0]

    def test_channels_by_themselves_are_no_work_for_tensor_cores(self) -> None:
        (found,) = counted_operators(
            lambda: nn.functional.conv2d(torch.empty(1, 4, 6, 6), torch.empty(4, 1, 3, 3), padding=1, groups=4)
        )
        assert (found.kind, found.flops) == ("fp32", 2 * 4 * 36 * 9)

    @pytest.mark.parametrize(
        ("work", "flops", "moved"),
        [
            (lambda: torch.empty(3, 5) @ torch.empty(5, 7), 2 * 3 * 5 * 7, 4 * (15 + 35 + 21)),
            (lambda: torch.bmm(torch.empty(2, 3, 5), torch.empty(2, 5, 7)), 2 * 2 * 3 * 5 * 7, 4 * 2 * (15 + 35 + 21)),
            (lambda: torch.empty(6).add_(torch.empty(6)), 6, 4 * (6 + 6 + 6)),
            (lambda: torch.empty(6).copy_(torch.empty(6)), 0, 4 * (6 + 6)),
            (lambda: torch.empty(6, 1).expand(6, 9) + torch.empty(6, 9), 54, 4 * (6 + 54 + 54)),
            (lambda: torch.empty(5, 9).gather(1, torch.empty(5, 2, dtype=torch.int64)), 0, 4 * 10 + 8 * 10 + 4 * 10),
            (
                lambda: nn.functional.interpolate(torch.empty(1, 2, 3, 3), size=(6, 6), mode="bilinear"),
                9 * 72,
                4 * (18 + 72),
            ),
        ],
    )
    def test_operators_by_hand(self, work: Callable[[], Any], flops: int, moved: int) -> None:
        (found,) = counted_operators(work)
        assert (found.flops, found.moved, found.kernels) == (flops, moved, 1)

    def test_cross_entropy_by_hand(self) -> None:
        """40 x 40 cells of at most 81 pixels, so 128 lanes each, and 21 classes in two blocks of 16."""
        pixels = 2 * 321 * 321
        sizes = (2, 321, 321)
        (found,) = counted_operators(
            lambda: sums_and_gradients(
                torch.empty(2, 21, 41, 41), torch.empty(sizes, dtype=torch.int64), torch.empty(sizes)
            )
        )
        assert (found.kind, found.flops) == ("fp32", 31 * 2 * 1600 * 128 * 32)
        assert found.moved == 12 * pixels + 18 * 4 * 2 * 21 * 41 * 41
        assert found.kernels == 7

    def test_what_moves_nothing_is_left_out(self) -> None:
        assert counted_operators(lambda: torch.empty(4, 6).view(2, 12).t()[1:].detach()) == []

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.slow
    def test_a_step_without_data_costs_what_a_real_one_does(self, precision: str) -> None:
        config = tiny(f"train.precision={precision}", "cvlr.implementation=reference")
        found = count_step(config, num_classes=CLASSES, images=2, classes_per_image=2)
        model = build_network(config, num_classes=CLASSES, weights=False)
        model.train()
        batch = _operators._batch(config, FakeTensorMode(), CLASSES, 2, 2, 0)
        batch = replace(batch, images=torch.randint(256, batch.images.shape, dtype=torch.uint8))
        batch = replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
        trainer = _operators._trainer(config, model, 2)
        with as_on_gpu():
            trainer._step(batch, 0, pretraining=False)  # momentum exists from then on
            with FlopCounterMode(display=False) as flops, OperatorCounter() as real:
                trainer._step(batch, 1, pretraining=False)
        ours = [operator for operator in found.operators if operator.name in MATRICES]
        assert sum(operator.flops for operator in ours) == flops.get_total_flops()
        seen, expected = ([(o.name, o.kind, o.flops) for o in of] for of in (found.operators, real.operators))
        assert seen == expected, "one operator after the other"
        # Batch norms keep their statistics in another type where nothing is computed.
        moved = [[o.moved for o in of] for of in (found.operators, real.operators)]
        names = {o.name for o, *pair in zip(found.operators, *moved, strict=True) if pair[0] != pair[1]}
        assert names <= {"aten::native_batch_norm", "aten::native_batch_norm_backward"}
        assert moved[0] == pytest.approx(moved[1], rel=0.02)

    def test_all_code_that_asks_for_the_device_is_known(self) -> None:
        asking = {
            path.name
            for folder in ("models", "losses", "calibration", "data", "ops", "views")
            for path in (ROOT / "slrnet" / folder).rglob("*.py")
            for line in path.read_text(encoding="utf-8").splitlines()
            if (".device.type" in line or ".is_cpu" in line or ".is_cuda" in line) and "autocast(" not in line
        }
        checks = {"pseudo_labels.py", "transforms.py"}  # of labels and of images, which are real
        patched = {"cvlr.py", "refine.py"}
        own = {"cross_entropy.py"}  # within an operator that is counted as the GPU's kernel
        triton = {"kernels.py", "factorize_triton.py"}  # whether the GPU's kernels can run
        assert asking == patched | own | triton | checks, "let `as_on_gpu` take a GPU's way there"

    @pytest.mark.slow
    def test_stages_are_those_of_the_profile(self, counted: Count) -> None:
        assert {o.stage for o in counted.operators} - {BACKWARD} == set(cost_model.STAGES)
        backward = {o.source for o in counted.operators if o.stage == BACKWARD}
        assert set(cost_model.STAGES[1:11]) <= backward, "every part of the network and the alignment have gradients"
        assert "optimizer" not in backward

    def test_gradients_cost_twice_the_forward_pass(self, counted: Count) -> None:
        for stage in ("aspp", "fusion", "mask_head"):
            own = [o for o in counted.operators if o.source == stage and "convolution" in o.name]
            forward = sum(o.flops for o in own if o.stage == stage)
            assert sum(o.flops for o in own if o.stage == BACKWARD) == 2 * forward

    def test_factorisation_by_hand(self) -> None:
        config = tiny("cvlr.implementation=triton")
        counted = count_step(config, num_classes=CLASSES, images=2, classes_per_image=2)
        positions = 8 * 8 + 4 * 4  # stride 8: crops of 64 and of 32 pixels
        product, features, codes = 2 * 2 * 8 * CLASSES * positions, 4 * 2 * 8 * positions, 4 * 2 * CLASSES * positions
        by_name = {o.name: o for o in counted.operators if o.name.startswith("slrnet::")}
        forward, backward = by_name["slrnet::factorize"], by_name["slrnet::factorize_backward"]
        assert (forward.flops, forward.moved) == (3 * product, 3 * features + 2 * codes)
        assert (backward.flops, backward.moved) == (10 * product, 10 * features + 4 * codes)
        assert forward.stage == backward.source == "cvlr"

    @pytest.mark.slow
    def test_more_images_cost_more_but_to_the_optimizer(self, counts: Counts) -> None:
        fewer, more = counts.step("voc_wsss", 1), counts.step("voc_wsss", 2)

        def flops(of: Count, stage: str) -> int:
            return sum(o.flops for o in of.operators if o.source == stage and o.name in MATRICES)

        assert flops(more, "encoder") == 2 * flops(fewer, "encoder") > 0
        steps = [[o for o in of.operators if o.stage == "optimizer"] for of in (fewer, more)]
        assert steps[0] == steps[1]
        assert more.gradients == fewer.gradients
        assert more.kept > fewer.kept > 0

    @pytest.mark.slow
    def test_masks_leave_images_out_of_the_calibration(self) -> None:
        config = tiny("setting=sss", "data.pixel_labeled_subset=some")
        full, half = (
            count_step(config, num_classes=CLASSES, images=4, classes_per_image=2, masks_share=share)
            for share in (0.0, 0.5)
        )
        moved = [sum(o.moved for o in of.operators if o.name == "aten::addcmul_") for of in (full, half)]
        assert moved[1] == moved[0] // 2

    def test_bytes_of_gradients_and_parameters(self, counted: Count) -> None:
        model = build_network(tiny(), num_classes=CLASSES, weights=False)
        sizes = [(p.numel() * 4, p.requires_grad) for p in model.parameters()]
        assert counted.parameters == sum(size for size, _ in sizes)
        assert counted.gradients == sum(size for size, trains in sizes if trains) < counted.parameters

    def test_validation_is_in_float32_without_gradients(self, counts: Counts) -> None:
        found = counts.validation("voc_wsss")
        assert {o.kind for o in found if "convolution" in o.name} == {"tf32"}
        assert not any("backward" in o.name for o in found)


def operator(**fields: Any) -> Operator:
    return replace(Operator("x", "aspp", "aspp", "bf16", flops=0, moved=0, kernels=1), **fields)


class TestRoofline:
    def test_the_slowest_counts(self) -> None:
        flops = 10**12
        assert cost_model.seconds_of(operator(flops=flops, moved=1), A100) == pytest.approx(1 / 312 / 0.7)
        moved = 10**9
        assert cost_model.seconds_of(operator(flops=1, moved=moved), A100) == pytest.approx(1 / 2039 / 0.85)
        assert cost_model.seconds_of(operator(flops=1, moved=1, kernels=3), A100) == pytest.approx(15e-6)
        assert cost_model.seconds_of(operator(flops=flops, kind="fp32"), H100) == pytest.approx(1 / 66.9 / 0.7)

    def test_few_tiles_leave_processors_idle(self) -> None:
        full = cost_model.seconds_of(operator(flops=10**12, outputs=108 * 128 * 64), A100)
        assert cost_model.seconds_of(operator(flops=10**12, outputs=108 * 128 * 16), A100) == pytest.approx(4 * full)
        assert cost_model.seconds_of(operator(flops=10**12, outputs=10**9), A100) == full

    def test_nothing_is_faster_than_the_roofline(self, counted: Count) -> None:
        for one in cost_model.GPUS:
            least = cost_model.least_seconds(counted.operators, one)
            assert 0 < least < cost_model.seconds(counted.operators, one)
        listed = [operator(flops=624 * 10**12), operator(flops=156 * 10**12, kind="tf32", moved=2039 * 10**9)]
        assert cost_model.least_seconds(listed, A100) == pytest.approx(2 + 1)

    def test_an_all_reduce_by_hand(self) -> None:
        size = 100 * 2**20  # four buckets
        assert cost_model.all_reduce_seconds(size, 1, A100) == 0
        two = cost_model.all_reduce_seconds(size, 2, A100)
        assert two == pytest.approx(size / (0.8 * 300e9) + 4 * 2 * 1 * 10e-6)
        eight = cost_model.all_reduce_seconds(size, 8, H100)
        assert eight == pytest.approx(2 * 7 / 8 * size / (0.8 * 450e9) + 4 * 2 * 3 * 10e-6)
        many = cost_model.all_reduce_seconds(size, 64, A100)
        assert many == pytest.approx(2 * 63 / 64 * size / (0.8 * 50e9) + 4 * 2 * 6 * 10e-6), "through the network"

    def test_both_bounds_of_a_step(self) -> None:
        operators = (operator(moved=2039 * 85 * 10**5), operator(stage=BACKWARD, moved=2039 * 170 * 10**5))
        of = Count(operators, images=3, gradients=240 * 10**6, parameters=0, kept=0)
        step = cost_model.step_of(of, 2, A100)
        exchange = cost_model.all_reduce_seconds(240 * 10**6, 2, A100)
        assert [step.forward, step.backward] == pytest.approx([0.01, 0.02])
        assert [step.hidden, step.exposed] == pytest.approx([0.03, 0.03 + exchange])
        assert step.images == 6
        assert replace(step, exchange=0.5).hidden == pytest.approx(0.51)

    def test_a_step_takes_as_long_as_its_host(self) -> None:
        of = Count((operator(kernels=10**4),), images=1, gradients=0, parameters=0, kept=0)
        step = cost_model.step_of(of, 1, A100)
        assert (step.forward, step.hidden, step.exposed) == pytest.approx((0.05, 0.08, 0.08))

    @pytest.mark.parametrize(
        ("operators", "expected"),
        [
            ([operator(moved=2039 * 85 * 10**6)], 0.1 / 8),
            ([operator(kernels=4000)], 0.032 / 8),
            ([operator()], 0.0025),
        ],
        ids=["GPU", "host", "reading"],
    )
    def test_a_validation_takes_as_long_as_the_slowest_part(self, operators: list[Operator], expected: float) -> None:
        assert cost_model.validation_seconds(operators, A100) == pytest.approx(expected)

    def test_advice_about_memory_names_the_first_accumulation_that_fits(self) -> None:
        counts = Counts(loads={})

        def kept(recipe: str, images: int, crop: int | None = None) -> Count:
            return Count((), images, gradients=0, parameters=10**9, kept=images * 10**9)

        counts.step = kept  # type: ignore[method-assign]
        lines = [
            cost_model.memory_advice("r", counts, crop=512, images=n, card=card)
            for n, card in ((16, 24e9), (8, 24e9), (16, 3e9))
        ]
        assert lines[0].endswith("16 images on a GPU: about 23 GB of 24; fits")
        assert lines[1].endswith("fits")
        assert lines[2].endswith("even one image needs 4 GB: use a smaller crop or a larger card")
        assert "set train.accumulation=2 (8 images at a time, 13 GB)" in cost_model.memory_advice(
            "r", counts, crop=512, images=16, card=20e9
        )

    def test_hours_by_hand(self) -> None:
        step = cost_model.Step(forward=1.0, backward=2.0, exchange=1.0, images=4)
        load = Workload(classes=CLASSES, draws=103, validation=10, present=2)
        measured = 10 + 2 * 3  # pseudo masks of three images in two views
        expected = 2 * (25 * 4 + math.ceil(measured / 4) * 0.5) / 3600  # two epochs; the rest of a batch is left out
        assert cost_model.hours_of(tiny(), load, step, 4, 0.5, hidden=False) == pytest.approx(expected)
        assert cost_model.hours_of(tiny(), load, step, 4, 0.5, hidden=True) < expected


class TestTables:
    @pytest.mark.slow
    def test_runs(self, counts: Counts) -> None:
        scales = ((2, 4), (64, 64))
        cheap, dear = (
            [
                [cell.strip() for cell in line.strip("|").split("|")]
                for line in cost_model.runs_table(
                    "voc_wsss", counts, {"A100": price, "H100": price}, scales=scales
                ).splitlines()[2:]
            ]
            for price in (1e5, 2e5)
        )
        assert [row[0] for row in cheap] == ["2 A100", "64 A100", "2 H100", "64 H100"]
        assert [row[1] for row in cheap[:2]] == ["4 (2)", "64 (1)"]
        assert [row[2] for row in cheap[:2]] == ["0.000125", "0.002"], "the rate follows the batch"
        dollars = [[float(row[7].split(" to ")[0].replace(",", "")) for row in rows] for rows in (cheap, dear)]
        assert dollars[1] == pytest.approx([2 * value for value in dollars[0]], rel=0.01)

    def test_stages_add_up(self, counted: Count) -> None:
        rows = [line.split("|") for line in cost_model.stage_costs(counted).splitlines()[2:]]
        assert len(rows) == len(cost_model.STAGES) + 1
        assert sum(int(row[6]) for row in rows[:-1]) == int(rows[-1][6]) == sum(o.kernels for o in counted.operators)
        times = [line.split("|") for line in cost_model.stage_seconds(counted).splitlines()[2:]]
        total = sum(float(row[2]) + float(row[3]) for row in times[:-1])
        assert float(times[-1][2]) + float(times[-1][3]) == pytest.approx(total, abs=0.01 * len(times))

    def test_the_paper_has_a_workload_for_each_recipe(self) -> None:
        for name, load in WORKLOADS.items():
            assert get_recipe(name).train.epochs == 20
            assert (load.masks > 0) == (get_recipe(name).setting != "wsss")
        assert WORKLOADS["voc_sss"].draws == 16438

    def test_the_documentation_has_the_assumptions(self) -> None:
        assert cost_model.assumptions() in (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--recipe", "nothing"], "nothing"),
            (["--recipe", "demo"], "voc_wsss"),
            (["--images", "0"], "--images"),
            (["--a100-price", "-1"], "prices"),
        ],
    )
    def test_mistakes_are_named(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cost_model.main(arguments) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("held", [True, False])
    @pytest.mark.slow
    def test_the_report_says_what_it_is(
        self, held: bool, counts: Counts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make = functools.partial(cost_model.report, counts=counts, scales=((2, 4),), compare=lambda: ("compared", held))
        words = ["--recipe", "voc_wsss", "--images", "2", "--out", str(tmp_path)]
        assert cost_model.main(words, make=make) == int(not held)
        written = (tmp_path / "cost.md").read_text(encoding="utf-8")
        assert "none of these figures has been measured on a GPU" in written
        assert written.strip() in capsys.readouterr().out


class TestMeasuring:
    def test_without_a_gpu(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert gpu.main([]) == 2
        said = capsys.readouterr()
        assert "no GPU here" in said.err
        assert said.out == ""

    def test_a_fake_profile_beside_its_prediction(self, counted: Count) -> None:
        predicted = gpu.predict(counted, A100)
        measured = gpu.Measured({name: 2 * value for name, value in predicted.items()}, step=0.25, memory=3 * 10**9)
        lines = gpu.comparison(measured, predicted, counted, A100, name="a GPU").splitlines()
        assert "predicted for A100" in lines[0]
        rows = {line.split("|")[1].strip(): line.split("|") for line in lines[2:-3]}
        assert len(rows) == 8 + 8 + 1
        assert {row[4].strip() for name, row in rows.items() if name != "**step**"} == {"2.00"}
        parts = sum(float(row[2]) for name, row in rows.items() if name.startswith("network: "))
        assert parts < float(rows["network"][2])
        whole = sum(cost_model.seconds_of(o, A100) for o in counted.operators)
        assert float(rows["**step**"][2]) == pytest.approx(1e3 * whole, abs=0.01)
        assert "measured 8.0" in lines[-2], "two images in a quarter of a second"
        assert "measured at most 3.0" in lines[-1]

    def test_a_real_step_on_the_processor_has_the_predicted_stages(self, counted: Count) -> None:
        sizes = {"num_classes": CLASSES, "present": 2}
        found = gpu.measure(tiny(), **sizes, steps=2, device="cpu", clock=gpu.PROCESSOR_CLOCK, warm_up=1)
        assert set(found.stages) == set(gpu.predict(counted, A100)) - {"between"}
        assert sum(found.stages[part] for part in gpu.PARTS) <= found.stages["network"]
        assert 0 < found.stages["network"] < found.step * 2

    def test_which_gpu(self) -> None:
        assert gpu.model_of("NVIDIA H100 80GB HBM3", None) is H100
        assert gpu.model_of("NVIDIA H200", None) is gpu.H200
        assert gpu.model_of("NVIDIA L4", "A100") is A100
        with pytest.raises(ValueError, match="no constants for NVIDIA L4; compare it with --like A100 or H100 or H200"):
            gpu.model_of("NVIDIA L4", None)

    def test_which_recipe(self) -> None:
        config = gpu.configuration("voc_wsss", crop=161, images=3)
        assert (config.data.crop_size, config.train.batch_size, config.model.encoder_weights) == (161, 3, "none")
        with pytest.raises(ConfigError, match="needs masks"):
            gpu.configuration("voc_sss", crop=161, images=3)

    @pytest.mark.slow
    def test_a_bare_machine_runs_every_part(self, tmp_path: Path) -> None:
        """Without the packages that only other commands need."""
        absent = ("ray", "mlflow", "tenacity", "pynvml", "scipy", "sklearn", "matplotlib", "pydensecrf")
        words = ["--tiny", "--steps", "1", "--images", "2", "--seconds", "0", "--out", str(tmp_path)]
        program = f"""
import contextlib, sys
sys.modules.update(dict.fromkeys({absent!r}))
from benchmarks import gpu
with contextlib.suppress(SystemExit):
    gpu.main(["--help"])
sys.exit(gpu.main({words!r}))
"""
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "--predict" in done.stdout
        record = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
        assert record.keys() >= gpu.ALL.keys()
        assert record["evaluation"]["fp32, 8 at a time, images/s"] > 0
        assert len(record["training"]["epochs"]) == 1
        assert "| stages / measured / predicted |" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
