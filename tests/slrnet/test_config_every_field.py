"""No setting without effect: each field of `Config` is changed, and the part of the run that it rules must change.

`CHANGES` has an entry for every field; a new field without one fails here. An entry names another value and what must
become different: the trained weights, what is measured, what is logged, the network's size and so on. Where numbers
are not supposed to change (`cvlr.implementation`), the autograd graph must.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from slrnet.checkpoints.checkpoint import Checkpoint, TrainState, load_checkpoint, save_checkpoint
from slrnet.checkpoints.run_store import WEIGHTS
from slrnet.config import Config, ConfigError, apply_overrides
from slrnet.data.manifest import DataError, ShardSet, load_dataset
from slrnet.distributed.process import Process
from slrnet.launch import train as ray_loop
from slrnet.launch.prediction import MaskJob
from slrnet.launch.pseudo_label import launch_pseudo_labels
from slrnet.launch.rank import Report, train_rank
from slrnet.launch.train import LaunchOptions, launch
from slrnet.models.global_norm import GlobalBatchNorm2d
from slrnet.models.slrnet import build_network
from slrnet.tools.predict import load_predictor
from slrnet.tracking import gpu_monitor
from slrnet.tracking.protocol import NullTracker, RunHandle
from slrnet.training import trainer as trainer_module
from slrnet.training.listener import RunListener
from slrnet.training.trainer import Trainer
from tests.fixtures import small_encoders  # noqa: F401, registers the small models
from tests.fixtures.shards import shards_of


@dataclass(frozen=True)
class Change:
    """Another value of a field, what must differ then, and settings under which the field matters."""

    value: Any
    differs: str
    given: tuple[str, ...] = ()


change_weights = partial(Change, differs="weights")
change_size = partial(Change, differs="number of weights")
change_pseudo_masks = partial(Change, differs="pseudo masks", given=("evaluation.pseudo_mask_images=3",))
MS, CRF = ("evaluation.protocol=ms",), ("evaluation.protocol=ms_crf",)
change_crf = partial(Change, differs="prediction", given=CRF)
SEMI = ("setting=sss_image_labels", "data.pixel_labeled_subset=pixels", "data.pixel_oversampling=1")
ALONE = ("setting=sss", "data.pixel_labeled_subset=pixels", "cvlr.enabled=false")
TILES = ("inference.tile_above=100", "inference.tile_size=32", "inference.tile_overlap=8")
REORDERED = ("train.seed=4",)
"""The three images come in another order than without shuffling; with the default seed they happen not to."""
LONG = ("train.epochs=4", "train.batch_size=1")
PLAIN = ("losses.pseudo_balance=plain",)
GATED = ("evaluation.gating=scores", "evaluation.gating_threshold=0.0")

CHANGES: dict[str, Change] = {
    "recipe": Change("other", "run"),
    "setting": Change("sss", "number of weights", given=SEMI),
    "data.path": Change("/nowhere", "refused"),
    "data.train_split": change_weights("val"),
    "data.val_split": Change("train", "validation"),
    "data.crop_size": change_weights(80),
    "data.crop_scale": change_weights([0.3, 0.4]),
    "data.flip": change_weights(1.0, given=("data.flip=0.0",)),
    "data.crop_filter": change_weights("bicubic"),
    "data.shuffle_buffer": change_weights(1, given=REORDERED),
    "data.train_subset": change_weights("few", given=REORDERED),
    "data.pixel_labeled_subset": change_weights("few", given=SEMI),
    "data.pixel_oversampling": Change(3, "steps", given=SEMI),
    "data.pretrain_on": change_weights(
        "labeled", given=("setting=sss", "data.pixel_labeled_subset=few", "data.pixel_oversampling=1")
    ),
    "data.class_balance": change_weights(1.0, given=LONG),
    "data.balance_limit": change_weights(1.0, given=(*LONG, "data.class_balance=1.0")),
    "data.workers": Change(1, "readers"),
    "data.on_error": Change("skip", "damage"),
    "views.scales": change_weights([1.0, 0.75]),
    "views.flip": change_weights(False),
    "views.own_color": change_weights(False),
    "views.sizes": change_weights("truncated", given=("data.crop_size=65",)),
    "views.unwarp": change_weights("probs", given=("calibration.fusion=probs",)),
    "views.brightness": change_weights(0.0),
    "views.contrast": change_weights(0.0),
    "views.saturation": change_weights(0.0),
    "views.hue": change_weights(0.0),
    "cvlr.enabled": change_size(False),
    "cvlr.method": change_size("emau"),
    "cvlr.num_bases": change_weights(5, given=("cvlr.method=emau",)),
    "cvlr.form": change_weights("released"),
    "cvlr.dim": change_size(9),
    "cvlr.num_iters": change_weights(2),
    "cvlr.temperature": change_weights(0.5),
    "cvlr.centered": change_weights(True),
    "cvlr.start": Change("default", "first weights"),
    "cvlr.start_share": Change(0.1, "first weights"),
    "cvlr.implementation": Change("reference", "graph"),
    "model.architecture": change_size("deeplabv3plus", given=ALONE),
    "model.encoder": change_size("timm:test_resnet"),
    "model.encoder_weights": Change("auto", "first weights", given=("model.encoder=efficientnet_lite0",)),
    "model.output_stride": change_weights(8),
    "model.skip_stride": change_weights(4),
    "model.frozen_stages": Change(2, "trained weights"),
    "model.lora_rank": change_size(2, given=("model.encoder=timm:small_vit",)),
    "model.freeze_batch_norm": Change(False, "trained weights"),
    "model.sync_batch_norm": Change(False, "norms of several workers"),
    "model.decoder_dim": change_size(9),
    "model.skip_dim": change_size(5),
    "model.skip_share": change_weights(0.3),
    "model.aspp_dilations": change_weights([2, 3, 4]),
    "model.dropout": change_weights(0.1),
    "model.complementary_dropout": change_weights(1.0),
    "model.gate_rate": change_weights(0.6),
    "model.head_layers": change_size(1),
    "model.head_dropout": change_weights(0.1),
    "model.lift_skip": change_size(True),
    "model.bias_start": Change("default", "first weights"),
    "model.auxiliary_views": change_weights("first", given=("cvlr.form=released",)),
    "model.focal_power": change_weights(1.0),
    "model.focal_floor": change_weights(0.1),
    "calibration.supervision": change_weights("cps"),
    "calibration.fusion": change_weights("probs"),
    "calibration.view_weights": change_weights([1.0, 3.0]),
    "calibration.background_power": change_weights(3.0),
    "calibration.refine_image": change_weights("distorted", given=("views.own_color=false",)),
    "calibration.refine_iters": change_weights(0),
    "calibration.refine_dilations": change_weights([3, 4]),
    "calibration.refine_stride": change_weights(1),
    "calibration.refine_side": change_weights(4),
    "calibration.feature_share": change_weights(1.0),
    "calibration.feature_source": change_weights(
        "attention", given=("model.encoder=timm:small_vit", "calibration.feature_share=1.0")
    ),
    "calibration.peak_power": change_weights(1.0, given=(*PLAIN, "calibration.floor=0.24")),
    "calibration.masks": change_size("probe"),
    "calibration.source": change_weights("evaluation"),
    "calibration.rule": change_weights("normalized"),
    "calibration.confidence_threshold": change_weights(0.7),
    "calibration.background_threshold": change_weights(0.7),
    "calibration.floor": change_weights(0.5),
    "losses.mask_consistency": change_weights("probs"),
    "losses.code_consistency": change_weights("maximum"),
    "losses.class_divisor": change_weights("data"),
    "losses.pseudo_balance": change_weights("sqrt"),
    "losses.validity": change_weights("soft", given=(*PLAIN, "calibration.floor=0.24", "losses.class_divisor=data")),
    "losses.pixel_balance": change_weights(True, given=SEMI),
    "losses.positive_weight": change_weights(10.0),
    "losses.pixel_validity": change_weights(True, given=(*SEMI, "data.crop_scale=[0.1,0.1]")),
    "losses.mask_background": change_weights(False, given=("setting=sss", *SEMI[1:])),
    "weights.segmentation": change_weights(0.0),
    "weights.pixel_labels": change_weights(1.0, given=SEMI),
    "weights.pixel_pretraining": change_weights(1.0, given=SEMI),
    "weights.pixel_mean": change_weights(1.0, given=SEMI),
    "weights.classification": change_weights(0.5),
    "weights.consistency": change_weights(1.0),
    "weights.mask_consistency": change_weights(1.0),
    "weights.code_consistency": change_weights(1.0),
    "weights.auxiliary": change_weights(0.0),
    "weights.auxiliary_classification": change_weights(1.0),
    "optim.name": change_weights("adamw"),
    "optim.lr": change_weights(0.02),
    "optim.reference_batch_size": change_weights(8),
    "optim.new_lr_factor": change_weights(5.0),
    "optim.bias_lr_factor": change_weights(1.0),
    "optim.layer_decay": change_weights(0.5),
    "optim.warmup_steps": change_weights(5),
    "optim.momentum": change_weights(0.5),
    "optim.beta2": change_weights(0.5, given=("optim.name=adamw",)),
    "optim.weight_decay": change_weights(0.0),
    "optim.clip_norm": change_weights(1e-3),
    "train.epochs": Change(3, "checkpoints"),
    "train.pretrain_epochs": change_weights(0),
    "train.cosine_epochs": change_weights(5, given=LONG),
    "train.batch_size": change_weights(3),
    "train.accumulation": change_weights(2),
    "train.precision": change_weights("bf16"),
    "train.tf32": Change("off", "arithmetic"),
    "train.deterministic": Change(True, "arithmetic"),
    "train.compile": Change(True, "compiled regions"),
    "train.exchange": Change("bf16", "exchange"),
    "train.seed": change_weights(1),
    "train.ema": Change(0.5, "saved weights"),
    "train.init": Change("/nowhere", "refused"),
    "train.log_every": Change(2, "logged losses"),
    "train.checkpoint_minutes": Change(1e-9, "checkpoints", given=("train.batch_size=1",)),
    "train.checkpoint_every": Change(1, "checkpoints", given=("train.batch_size=1",)),
    "evaluation.every": Change(1, "logged figures"),
    "evaluation.pseudo_mask_images": Change(3, "pseudo masks"),
    "evaluation.panel_images": Change(1, "pictures", given=("evaluation.pseudo_mask_images=2",)),
    "evaluation.protocol": Change("ms", "prediction"),
    "evaluation.scales": Change([1.0, 0.5], "prediction", given=MS),
    "evaluation.resizing": Change("released", "prediction", given=MS),
    "evaluation.precision": Change("bf16", "validation"),
    "evaluation.scale": Change(0.5, "validation"),
    "evaluation.gating": Change("image_labels", "validation"),
    "evaluation.gating_threshold": Change(1.0, "validation", given=GATED),
    "evaluation.gating_top": Change(1, "validation", given=GATED),
    "evaluation.background_power": Change(0.1, "validation"),
    "crf.num_iters": change_crf(1),
    "crf.smooth_xy": change_crf(1.0),
    "crf.smooth_weight": change_crf(0.0),
    "crf.appearance_xy": change_crf(5.0),
    "crf.appearance_rgb": change_crf(100.0),
    "crf.appearance_weight": change_crf(0.0),
    "crf.background_power": change_crf(0.1),
    "inference.tile_above": Change(100, "prediction", given=("inference.tile_size=32", "inference.tile_overlap=8")),
    "inference.tile_size": Change(24, "prediction", given=TILES),
    "inference.tile_overlap": Change(16, "prediction", given=TILES),
    "inference.void_below": Change(1.0, "pseudo labels"),
    "tracking.uri": Change("sqlite:////elsewhere.db", "run"),
    "tracking.experiment": Change("other", "run"),
    "tracking.gpu_interval": Change(0.5, "gpu samples"),
}

TRAINING_ALONE = ("calibration.supervision", "calibration.refine_image", "calibration.source")
MEASURED_TOO = [key for key in CHANGES if key.startswith("calibration.") and key not in TRAINING_ALONE]
"""Fields that rule the training's pseudo labels and the measured ones alike."""


def field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All fields with a value, through all sections."""
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from field_names(section, f"{prefix}{name}.")
        else:
            yield prefix + name


def override(config: Config, key: str, value: Any) -> Config:
    return apply_overrides(config, [f"{key}={value if isinstance(value, str) else json.dumps(value)}"])


Observe = Callable[[Config], Mapping[str, Any]]


@pytest.fixture(scope="module")
def data(write_tiny: Callable[..., ShardSet], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Three training images, so that an epoch is one step; all are in the subset `pixels`, two in `few`."""
    return write_tiny(tmp_path_factory.mktemp("fields") / "shards", num_train=3, num_val=2, shards=2)


@pytest.fixture(scope="module")
def base(tiny_config: Config, data: ShardSet) -> Config:
    """Two steps, the first one of pretraining; measured at the end, without pseudo masks."""
    changes = [f"data.path={data.folder}", "data.shuffle_buffer=100", "train.batch_size=2", "evaluation.every=5"]
    return apply_overrides(tiny_config, [*changes, "evaluation.pseudo_mask_images=0", "evaluation.panel_images=0"])


class Log(NullTracker):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[str, int]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.points.append((step, dict(metrics)))

    def log_image(self, key: str, image: Any, step: int) -> None:
        self.pictures.append((key, step))

    def steps(self, key: str) -> list[int]:
        return [step for step, values in self.points if key in values]


@pytest.fixture(scope="module")
def observe(data: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Observe:
    """Trains and says what came of it; the same configuration is trained once."""
    known: dict[Config, Mapping[str, Any]] = {}

    def run(config: Config) -> Mapping[str, Any]:
        if config not in known:
            known[config] = _observe(config, data, tmp_path_factory.mktemp("run"))
        return known[config]

    return run


def _observe(config: Config, data: ShardSet, folder: Path) -> Mapping[str, Any]:
    log = Log()
    process = Process()
    listener = RunListener(config, data.info, process=process, folder=folder, tracker=log)
    trainer = Trainer(config, data, process=process, folder=folder, listener=listener)
    if config.model.architecture == "slrnet":
        nn.init.constant_(trainer.model.mask_head.classify.bias, 1.2)  # else all is predicted as background
    first = _digest(trainer)
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    figures: dict[str, float] = {}
    trainer.fit(report=figures.update)
    return {
        "first weights": first,
        "weights": _digest(trainer),
        "saved weights": hashlib.sha256(max((folder / "checkpoints").glob(f"*/{WEIGHTS}")).read_bytes()).digest(),
        "number of weights": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "trained weights": trainable,
        "validation": {name: value for name, value in figures.items() if name.startswith("val/iou/")},
        "pseudo masks": {name: value for name, value in figures.items() if name.startswith("pseudo_mask/")},
        "logged losses": log.steps("train/loss"),
        "logged figures": [step for step, values in log.points if any(key.startswith("val/") for key in values)],
        "pictures": log.pictures,
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "steps": trainer.state.step,
        "segmentation": sum(figures.get(f"train/epoch_loss_{name}segmentation", 0.0) for name in ("", "pixel_")),
    }


def _digest(trainer: Trainer) -> str:
    digest = hashlib.sha256()
    for tensor in trainer.model.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_every_field_has_an_entry_and_every_entry_a_field() -> None:
    assert sorted(CHANGES) == sorted(field_names(Config))


def test_every_entry_changes_the_value(base: Config) -> None:
    for key, change in CHANGES.items():
        before = apply_overrides(base, change.given).flat()[key]
        assert before != change.value, key


@pytest.mark.parametrize("key", [key for key, change in CHANGES.items() if change.differs == "refused"])
def test_refused(key: str, base: Config, tmp_path: Path) -> None:
    launch_here = partial(launch, options=LaunchOptions(name="run", storage=tmp_path, num_workers=0))
    with pytest.raises((ConfigError, DataError, ValueError), match=str(CHANGES[key].value)):
        launch_here(override(base, key, CHANGES[key].value))
    assert not (tmp_path / "run").exists()


SPECIAL = ("refused", "run", "graph", "damage", "prediction", "readers", "pseudo labels", "gpu samples")
SPECIAL += ("norms of several workers", "arithmetic", "compiled regions", "exchange")
OBSERVED = [key for key, change in CHANGES.items() if change.differs not in SPECIAL]


@pytest.mark.parametrize("key", OBSERVED)
@pytest.mark.slow
def test_changes_the_run(key: str, base: Config, observe: Observe) -> None:
    change = CHANGES[key]
    config = apply_overrides(base, change.given)
    before, after = observe(config), observe(override(config, key, change.value))
    assert before["segmentation"] > 0  # else nothing that goes into pseudo labels could show
    assert before[change.differs] != after[change.differs]


@pytest.mark.parametrize("key", MEASURED_TOO)
@pytest.mark.slow
def test_changes_the_measured_pseudo_masks(key: str, base: Config, observe: Observe) -> None:
    config = apply_overrides(base, [*CHANGES[key].given, "evaluation.pseudo_mask_images=3"])
    before, after = observe(config), observe(override(config, key, CHANGES[key].value))
    assert before["pseudo masks"] != after["pseudo masks"]


@pytest.mark.parametrize("key", [key for key, change in CHANGES.items() if change.differs == "run"])
def test_changes_the_record_of_the_run(key: str, base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `launch` asks of the tracking store; the training itself is left out."""
    asked: list[Any] = []

    def create_run(uri: str, experiment: str, name: str, *, tags: Mapping[str, str], **_: Any) -> RunHandle:
        asked.append((uri, experiment, name, {tag: value for tag, value in tags.items() if "folder" not in tag}))
        raise KeyboardInterrupt

    monkeypatch.setattr(ray_loop, "resolve_uri", lambda uri, storage: uri)
    monkeypatch.setattr(ray_loop, "create_run", create_run)
    for index, config in enumerate((base, override(base, key, CHANGES[key].value))):
        with pytest.raises(KeyboardInterrupt):
            launch(config, LaunchOptions(name="run", storage=tmp_path / str(index), num_workers=0))
    assert asked[0] != asked[1]
    assert CHANGES[key].value in str(asked[1])


@pytest.mark.parametrize("key", [key for key, change in CHANGES.items() if change.differs == "readers"])
def test_changes_the_number_of_reader_processes(key: str, base: Config, data: ShardSet) -> None:
    """The samples do not depend on it."""

    def processes(config: Config) -> int:
        trainer = Trainer(config, data, process=Process(), folder=Path("unused"))
        next(iter(trainer.loader.epoch(0)))
        children = multiprocessing.active_children()
        trainer.loader.close()
        return len(children)

    assert (processes(base), processes(override(base, key, CHANGES[key].value))) == (0, CHANGES[key].value)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize(
    "key", [key for key, change in CHANGES.items() if change.differs == "norms of several workers"]
)
def test_changes_the_batch_norms_of_several_workers(key: str, base: Config, data: ShardSet) -> None:
    def shared(config: Config) -> int:
        modules = Trainer(config, data, process=Process(0, 2), folder=Path("unused")).model.modules()
        return sum(isinstance(module, GlobalBatchNorm2d) for module in modules)

    assert (shared(base), shared(override(base, key, CHANGES[key].value))) == (8, 0)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("key", [key for key, change in CHANGES.items() if change.differs == "compiled regions"])
def test_changes_what_is_compiled(key: str, base: Config, data: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several workers, what has no norms of theirs all."""
    asked: list[int] = []
    monkeypatch.setattr(trainer_module, "compile_regions", lambda regions, device: asked.append(len(regions)))
    changed = override(base, key, CHANGES[key].value)
    for config, workers in ((base, 1), (changed, 1), (changed, 2)):
        Trainer(config, data, process=Process(0, workers), folder=Path("unused"))
    assert asked == [7, 3]


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("key", [key for key, change in CHANGES.items() if change.differs == "exchange"])
def test_changes_the_numbers_that_workers_exchange(key: str, base: Config, data: ShardSet) -> None:
    """A worker's gradients as another one gets them."""

    def gradients(config: Config) -> list[Tensor]:
        trainer = Trainer(config, data, process=Process(0, 2), folder=Path("unused"))
        next(trainer.try_steps(1))
        return [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]

    before, after = gradients(base), gradients(override(base, key, CHANGES[key].value))
    assert not all(gradient.equal(gradient.bfloat16().float()) for gradient in before)
    for exact, rounded in zip(before, after, strict=True):
        torch.testing.assert_close(rounded, exact.bfloat16().float())


@pytest.mark.parametrize("key", [key for key, change in CHANGES.items() if change.differs == "gpu samples"])
def test_changes_the_interval_of_gpu_samples(
    key: str, base: Config, data: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    state = TrainState(epoch=0, step=0, classes=data.info.classes, data_fingerprint="", world_size=1)
    monkeypatch.setattr(gpu_monitor, "open_monitor", lambda device, interval: asked.append(interval))
    for config in (base, override(base, key, CHANGES[key].value), override(base, key, 0.0)):
        listener = RunListener(config, data.info, process=Process(), folder=tmp_path, tracker=NullTracker())
        listener.start(state, total=1)
        listener.close()
    assert asked == [1.0, CHANGES[key].value]


@pytest.mark.parametrize("key", [key for key, change in CHANGES.items() if change.differs == "arithmetic"])
def test_changes_the_arithmetic_of_gpus(key: str, base: Config) -> None:
    def arithmetic(config: Config) -> tuple[bool, ...]:
        with pytest.raises(KeyError, match="handle"):  # a rank sets it before anything else
            train_rank({"config": config.model_dump(mode="json")}, Process(), Report())
        tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        return *tf32, torch.are_deterministic_algorithms_enabled()

    changed = arithmetic(override(base, key, CHANGES[key].value))
    assert changed == ((False, False, False) if key == "train.tf32" else (True, False, True))
    assert arithmetic(base) == (True, False, False)


@pytest.mark.parametrize("key", [key for key, change in CHANGES.items() if change.differs == "graph"])
def test_changes_the_autograd_graph(key: str, base: Config) -> None:
    def nodes(config: Config) -> set[str]:
        model = build_network(config, num_classes=4)
        start = model([torch.zeros(1, 3, 32, 32)]).codes[0].grad_fn
        found, waiting = set(), [start]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in found:
                found.add(node)
                waiting += [parent for parent, _ in node.next_functions]
        return {node.name() for node in found}

    assert nodes(base) != nodes(override(base, key, CHANGES[key].value))


@pytest.mark.parametrize("key", [key for key, change in CHANGES.items() if change.differs == "prediction"])
@pytest.mark.slow
def test_changes_predictions(key: str, base: Config) -> None:
    pytest.importorskip("pydensecrf", reason="the extra `crf` is not installed")
    blocks = np.random.default_rng(0).integers(100, 156, (5, 7, 3), dtype=np.uint8)
    image = blocks.repeat(8, axis=0).repeat(8, axis=1)
    torch.manual_seed(0)
    model = build_network(base, num_classes=4)
    nn.init.normal_(model.mask_head.classify.weight)
    with torch.no_grad():  # no class dominates
        logits = model.eval()([torch.from_numpy(image / 127.5 - 1).float().permute(2, 0, 1)[None]]).logits[0]
        model.mask_head.classify.bias += 1 - logits[:, 1:].mean(dim=(0, 2, 3))

    def predict(config: Config) -> Any:
        state = TrainState(epoch=1, step=1, classes=("background", *"abc"), data_fingerprint="", world_size=1)
        found = load_predictor(Checkpoint(Path(), config, state, model.state_dict(), {}), device="cpu")(image)
        return found.mask if found.probs is None else found.probs

    config = apply_overrides(base, CHANGES[key].given)
    before, after = predict(config), predict(override(config, key, CHANGES[key].value))
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(before, predict(config))


@pytest.mark.parametrize("key", [key for key, change in CHANGES.items() if change.differs == "pseudo labels"])
def test_changes_the_written_pseudo_masks(key: str, base: Config, data: ShardSet, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_network(base, num_classes=4)
    state = TrainState(epoch=1, step=1, classes=data.info.classes, data_fingerprint="", world_size=1)
    path = save_checkpoint(
        tmp_path / "run" / "checkpoints", config=base, state=state, model=model.state_dict(), optimizer={}
    )
    digests = []
    for name, config in (("before", base), ("after", override(base, key, CHANGES[key].value))):
        launch_pseudo_labels(MaskJob(load_checkpoint(path), config, data, ("val",)), tmp_path / name)
        shards = sorted((tmp_path / name).glob("val-*.tar"))
        digests.append([hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards])
    assert digests[0] != digests[1]


@pytest.mark.parametrize("key", [key for key, change in CHANGES.items() if change.differs == "damage"])
def test_changes_what_damage_does(key: str, base: Config, data: ShardSet, tmp_path: Path) -> None:
    shutil.copytree(data.folder, tmp_path / "damaged")
    entry = shards_of(data.split("val"))[0]
    with (tmp_path / "damaged" / entry.name).open("r+b") as file:
        file.seek(int(entry.offsets[0]) + 512)
        file.write(b"\0" * 600)
    damaged = load_dataset(tmp_path / "damaged")
    with pytest.raises(DataError, match=entry.name):
        _observe(base, damaged, tmp_path / "stopped")
    assert _observe(override(base, key, CHANGES[key].value), damaged, tmp_path / "skipped")["validation"]
