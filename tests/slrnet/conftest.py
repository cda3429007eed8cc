"""A tiny data set, a tiny configuration and what the tests of the training layer run them with."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from pyarrow import fs
from torch import Tensor, nn

from data_prep.shard_writer import Sample, write_dataset
from ray_jobs.demo import free_ports
from slrnet.checkpoints.checkpoint import Checkpoint, TrainState, load_checkpoint, save_checkpoint
from slrnet.config import (
    CalibrationConfig,
    Config,
    CvlrConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from slrnet.data.catalog import voc_palette
from slrnet.data.manifest import ShardSet, load_dataset
from slrnet.distributed.process import Process
from slrnet.models.slrnet import SLRNet, build_model
from slrnet.storage import remote
from slrnet.tracking.mlflow import NullTracker
from slrnet.training.trainer import Trainer

Mask: TypeAlias = npt.NDArray[np.uint8]
MaskBytes: TypeAlias = Callable[[Sample, bytes], bytes | None]
ImageLabels: TypeAlias = Callable[[str, tuple[int, ...]], tuple[int, ...] | None]

CLASSES = ("background", "ant", "bee", "cat")
COLOURS = np.array([[90, 90, 90], [230, 40, 40], [40, 220, 60], [50, 60, 235]], dtype=np.uint8)
NUM_TRAIN, NUM_VAL, NUM_SHARDS = 9, 5, 4


def _scene(sample: Sample) -> tuple[npt.NDArray[np.uint8], Mask]:
    """Rectangles in the colours of their classes on noise, and their mask with a void line around it all."""
    number, classes = sample.source
    rng = np.random.default_rng(number)
    mask: Mask = np.zeros((sample.height, sample.width), dtype=np.uint8)
    for place, label in enumerate(classes):
        left = 4 + place * (sample.width // len(classes))
        top = int(rng.integers(4, sample.height // 2))
        mask[top : top + sample.height // 3, left : left + sample.width // 4] = label
    image = COLOURS[mask].astype(np.int64) + rng.integers(-20, 21, (*mask.shape, 3))
    mask[[0, -1]] = 255
    return image.clip(0, 255).astype(np.uint8), mask


def _png(mask: Mask) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def _samples(split: str, number: int, first: int, image_labels: ImageLabels) -> list[Sample]:
    """The first four are the subset `pixels`, the last two `few`; `source` is what the image really shows."""
    choices = [(1,), (2, 3), (1, 2), (3,), (1, 3), (2,)]
    return [
        Sample(
            key=f"{split}_{i}",
            split=split,
            width=64 + 8 * (i % 3),
            height=64 - 7 * (i % 2),
            classes=image_labels(f"{split}_{i}", choices[i % len(choices)]),
            subsets=(*(["pixels"] if i < 4 else []), *(["few"] if i >= number - 2 else [])),
            source=(first + i, choices[i % len(choices)]),
        )
        for i in range(number)
    ]


WriteTiny: TypeAlias = Callable[..., ShardSet]


@pytest.fixture(scope="session")
def write_tiny() -> WriteTiny:
    """Writes the tiny data set; `mask_bytes` may replace the PNG of a sample, `image_labels` the labels of a key."""

    def write(
        folder: Path,
        *,
        mask_bytes: MaskBytes = lambda sample, png: png,
        image_labels: ImageLabels = lambda key, classes: classes,
        num_train: int = NUM_TRAIN,
        num_val: int = NUM_VAL,
        shards: int = NUM_SHARDS,
        classes: tuple[str, ...] = CLASSES,
    ) -> ShardSet:
        def encode(sample: Sample) -> tuple[bytes, bytes | None]:
            image, mask = _scene(sample)
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=95)
            return file.getvalue(), mask_bytes(sample, _png(mask))

        write_dataset(
            folder,
            _samples("train", num_train, 0, image_labels) + _samples("val", num_val, 1000, image_labels),
            encode,
            name="tiny",
            classes=classes,
            palette=voc_palette(),
            made_by="python data_prep/tiny.py",
            shards=shards,
        )
        return load_dataset(folder)

    return write


@pytest.fixture(scope="session")
def tiny_data(write_tiny: WriteTiny, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """9 training and 5 validation images of about 64 pixels a side, 3 classes, 4 shards each; not to be changed."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "shards")


@pytest.fixture(scope="session")
def tiny_config(tiny_data: ShardSet) -> Config:
    """Two epochs of two steps, the first one pretraining, with a thin decoder; both kinds of masks are measured."""
    return Config(
        recipe="tiny",
        data=DataConfig(path=str(tiny_data.folder), crop_size=64, workers=0),
        # timm's own test model: 0.1 million weights, seven times as fast as EfficientNet-Lite0.
        model=ModelConfig(
            encoder="timm:test_efficientnet",
            encoder_weights="none",
            output_stride=16,
            decoder_dim=8,
            skip_dim=4,
            aspp_dilations=(1, 2, 3),
        ),
        cvlr=CvlrConfig(dim=8),
        # Thresholds that leave each class some pixels even without training, so that there is a segmentation loss.
        calibration=CalibrationConfig(
            refine_iters=2, refine_dilations=(1, 2), confidence_threshold=0.9, background_threshold=0.9, floor=0.0
        ),
        optim=OptimConfig(lr=0.01),
        train=TrainConfig(epochs=2, pretrain_epochs=1, batch_size=4, log_every=1, precision="fp32"),
        evaluation=EvaluationConfig(pseudo_mask_images=3, panel_images=2),
    )


class RecordingTracker(NullTracker):
    """Keeps what a run logs, instead of sending it anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[str, int, tuple[int, int]]] = []
        self.tags: dict[str, str] = {}

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Keeps the tags."""
        super().set_tags(tags)
        self.tags |= tags

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keeps the points."""
        super().log_metrics(metrics, step)
        self.points.append((step, dict(metrics)))

    def log_image(self, key: str, image: Any, step: int) -> None:
        """Keeps name, step and size."""
        super().log_image(key, image, step)
        self.pictures.append((key, step, image.size))

    def curve(self, key: str) -> list[tuple[int, float]]:
        """The points of one curve."""
        return [(step, values[key]) for step, values in self.points if key in values]


@pytest.fixture
def tracker() -> RecordingTracker:
    """Records what is logged."""
    return RecordingTracker()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server on loopback."""
    moto_server = pytest.importorskip("moto.server", reason="needs moto's server, of the extra `dev`")
    found = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    found.start()
    host, port = found.get_host_and_port()
    yield f"http://{host}:{port}"
    found.stop()


@pytest.fixture
def s3(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty S3 that the environment leads to, and a cache of the test's own; Arrow's file system for it."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server,
        "SLRNET_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    remote._open_filesystem.cache_clear()
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/moto-api/reset", method="POST"), timeout=30).close()
    return fs.S3FileSystem(
        access_key="testing",
        secret_key="testing",
        endpoint_override=s3_server,
        region="us-east-1",
        allow_bucket_creation=True,
    )


StartTrainer: TypeAlias = Callable[..., Trainer]


@pytest.fixture
def start_trainer(tiny_data: ShardSet, tmp_path: Path) -> StartTrainer:
    """Makes trainers; without `folder` each has its own."""
    made: list[Trainer] = []

    def start(
        config: Config, *, shards: ShardSet = tiny_data, folder: Path | None = None, tracker: Any = None
    ) -> Trainer:
        folder = folder or tmp_path / f"run-{len(made)}"
        made.append(Trainer(config, shards, process=Process(), folder=folder, tracker=tracker or NullTracker()))
        return made[-1]

    return start


@pytest.fixture(scope="session")
def spread_classes() -> Callable[[SLRNet], None]:
    """Gives a network weights with which its masks show several classes, trained or not."""

    def spread(model: SLRNet) -> None:
        torch.nn.init.normal_(model.mask_head.classify.weight, std=3.0)
        with torch.no_grad():  # no class dominates: on noise each has the background's logit on average
            logits = model.eval()([torch.randn(4, 3, 64, 64)]).logits[0]
            first = 0 if model.predict_background else 1
            model.mask_head.classify.bias += 1 - logits[:, first:].mean(dim=(0, 2, 3))

    return spread


@pytest.fixture(scope="session")
def tiny_run(
    tiny_data: ShardSet,
    tiny_config: Config,
    spread_classes: Callable[[SLRNet], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a finished training of the tiny configuration, without MLflow; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    trainer = Trainer(tiny_config, tiny_data, process=Process(), folder=folder, tracker=NullTracker())
    assert isinstance(trainer.model, SLRNet)
    spread_classes(trainer.model)
    trainer.fit(report=lambda metrics: None)
    return folder


@pytest.fixture(scope="session")
def digest() -> Callable[[nn.Module | Mapping[str, Tensor]], str]:
    """sha256 over names and bytes of all tensors: equal only where weights are equal to the bit."""

    def compute(weights: nn.Module | Mapping[str, Tensor]) -> str:
        tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
        total = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            total.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    return compute


BROWSER_PATIENCE = 600
"""Seconds that the browser may take for anything."""


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium that keeps what its console and its network say; skips where there is none."""
    chrome = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
    )
    driver = shutil.which("chromedriver")
    if not chrome or not driver:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, of the extra dev")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-sync",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    # A busy machine must not fail a test.
    started.set_page_load_timeout(BROWSER_PATIENCE)
    started.set_script_timeout(BROWSER_PATIENCE)
    started.command_executor.client_config.timeout = BROWSER_PATIENCE
    yield started
    started.quit()


Serve: TypeAlias = Callable[..., AbstractContextManager[str]]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Runs a module that serves a page on `--port`, until the block ends; gives the page's address once `path` answers.

    Without the variables by which libraries know pytest.
    """

    @contextmanager
    def run(*words: str, path: str = "") -> Iterator[str]:
        (port,) = free_ports(1)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        with (
            (tmp_path / "server.log").open("w+") as log,
            subprocess.Popen(
                [sys.executable, "-m", *words, "--port", str(port)],
                cwd=Path(__file__).resolve().parents[2],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            ) as server,
        ):
            try:
                deadline = time.monotonic() + 300
                while not _answers(f"http://127.0.0.1:{port}/{path}"):
                    log.seek(0)
                    assert server.poll() is None, log.read()
                    assert time.monotonic() < deadline, log.read()
                    time.sleep(0.2)
                yield f"http://127.0.0.1:{port}/"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGTERM)

    return run


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=10):
            return True
    except OSError:
        return False


CHECKPOINT_CLASSES = ("background", "ant", "bee", "cat")


@pytest.fixture(scope="session")
def make_checkpoint(
    spread_classes: Callable[[SLRNet], None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Config], Checkpoint]:
    """Saves a network with seeded weights, whose masks show several classes, and reads it back."""

    def make(config: Config) -> Checkpoint:
        torch.manual_seed(5)
        predicted = config.predicts_background
        model = build_model(
            config.model, config.cvlr, num_classes=len(CHECKPOINT_CLASSES), predict_background=predicted
        )
        spread_classes(model)
        state = TrainState(epoch=1, step=1, classes=CHECKPOINT_CLASSES, data_fingerprint="-", world_size=1)
        folder: Path = tmp_path_factory.mktemp("run") / "checkpoints"
        return load_checkpoint(
            save_checkpoint(folder, config=config, state=state, model=model.state_dict(), optimizer={})
        )

    return make


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Callable[[Config], Checkpoint], tiny_config: Config) -> Checkpoint:
    """Of the tiny configuration; not to be changed."""
    return make_checkpoint(tiny_config)
