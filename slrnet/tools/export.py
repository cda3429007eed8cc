"""Exports a network for other programs (`slrnet export`): one view, by `torch.export` and ONNX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AvgPool2dSame, Conv2dSame
from timm.layers.padding import pad_same_arg
from timm.models.hiera import MaskUnitAttention
from torch import Tensor, nn
from torch.export import Dim

from slrnet.checkpoints.checkpoint import Checkpoint, restore_model
from slrnet.config import Config, EvaluationConfig
from slrnet.inference.forward import Inference
from slrnet.launch.evaluation import training_run, why_untracked
from slrnet.models.cvlr import CrossViewLowRank
from slrnet.models.network import Network
from slrnet.models.slrnet import SLRNet
from slrnet.storage.files import write_json, written_whole
from slrnet.tracking.mlflow import log_onnx_model

__all__ = ["SingleView", "export_network", "log_to_training_run"]

TOLERANCE = {"network.pt2": 1e-6, "network.onnx": 1e-4}
"""Largest difference of an output between an exported network and the network itself."""
CHANGE = 1e-5
"""A network that answers to such a relative change of its input by more may differ by as much: it amplifies rounding,
as a hundred layers of random weights do."""
MOST = 4096
"""Largest side of an image that the exported programs take, pixels."""
MOST_IMAGES = 1024
"""Largest batch that the exported programs take."""

Run = Callable[[Tensor], Sequence[Tensor]]
Sample = tuple[Tensor, list[Tensor]]
"""Images, and the network's outputs for them."""


class SingleView(nn.Module):
    """A network for one view, as `Inference.single_scale` runs it: images in, probabilities and class scores out.

    Args:
        model: the network. This class turns its evaluation mode on, sets its low-rank module and Hiera's attention to
            plain operators, and fixes the padding of its convolutions and pools.
        config: settings of the network's run.

    Attributes:
        outputs: names of the outputs, in order.
        fixed: the only side of images that the program takes, in pixels; 0: any.
    """

    def __init__(self, model: Network, config: Config) -> None:
        super().__init__()
        self.model = model.eval()
        for module in model.modules():
            if isinstance(module, CrossViewLowRank):
                module.implementation = "auto"  # plain operators during an export
            if isinstance(module, MaskUnitAttention):
                module.fused_attn = False  # ONNX has no fused attention for its five dimensions
        self.stride = model.encoder.size_step
        self.rest = config.data.crop_size % self.stride
        self.scale = config.evaluation.scale
        self.fixed = 0
        _fix_padding(model, self.rest)
        has_scores = isinstance(model, SLRNet) and not model.predict_background
        self.outputs = ["probabilities", *(["class_scores"] if has_scores else [])]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Predicts images (N, 3, H, W) float32 in [0, 1] of any size.

        Returns:
            (N, K, H, W) probabilities, background first; and (N, K - 1) sigmoids of the class scores, if the network
            has any.
        """
        size = images.shape[-2:]
        fitted = _resize(images, (self._fit(size[0]), self._fit(size[1])))
        outputs = self.model([self.model.encoder.normalize(fitted)])
        probs = _resize(outputs.logits[0].float().softmax(dim=1), size)
        return probs, *(scores.sigmoid() for scores in outputs.class_scores)

    def _fit(self, side: int) -> int:
        """The side that the network sees, as `Inference.fit` computes it, by operators that a program can hold."""
        if self.fixed:
            return max(1, round((self.fixed * self.scale - self.rest) / self.stride)) * self.stride + self.rest
        exact = (torch.scalar_tensor(side, dtype=torch.float64) * self.scale - self.rest) / self.stride
        cells: Any = exact.round().clamp(min=1).long().item()
        torch._check(cells >= 1)
        return cells * self.stride + self.rest  # type: ignore[no-any-return]


def export_network(checkpoint: Checkpoint, out: Path, *, onnx: bool = True) -> dict[str, Any]:
    """Writes a checkpoint's network into the folder `out`: network.pt2, with `onnx` network.onnx, and export.json.

    Each program takes any batch and size; where PyTorch cannot trace an encoder for any size, as with DINOv3 and Hiera,
    squares of the training crop's side. It is compared with the network before its file gets its name.

    Returns:
        The content of export.json: classes, input with its preprocessing, outputs, what the run's protocol adds and the
        programs leave out, and the largest difference of each file's outputs from the network's.

    Raises:
        ValueError: the extra is missing, PyTorch cannot export the network, or a file disagrees with the network.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if onnx and missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}; run `pip install 'slrnet[export]'`, or give --no-onnx")
    model, config = restore_model(checkpoint).eval(), checkpoint.config
    samples = _samples(model, config)
    view = SingleView(model, config)

    def sensitivity() -> float:
        return _largest(samples, lambda images: view(images * (1 + CHANGE)))

    sides = [Dim(name, min=1, max=MOST) for name in ("height", "width")]
    shapes = ({0: Dim("images", min=1, max=MOST_IMAGES), 2: sides[0], 3: sides[1]},)
    reason = ""
    try:
        program = _trace(view, samples[0][0], shapes)
    except ValueError as error:
        if model.encoder.one_more:
            raise
        reason, view.fixed = str(error).rpartition(";")[0], config.data.crop_size
        samples = _samples(model, config, shapes=[(count, 3, view.fixed, view.fixed) for count in (2, 1)])
        program = _trace(view, samples[0][0], ({0: Dim("images", min=1, max=MOST_IMAGES)},))
    differences = {}
    with written_whole(out / "network.pt2") as incoming:
        torch.export.save(program, incoming)
        differences["network.pt2"] = _compare(samples, torch.export.load(incoming).module(), "network.pt2", sensitivity)
    if onnx:
        with written_whole(out / "network.onnx") as incoming:
            run = _write_onnx(program, view.outputs, incoming)
            differences["network.onnx"] = _compare(samples, run, "network.onnx", sensitivity)
    record = _describe(checkpoint, view.outputs) | {"largest_difference": differences}
    if view.fixed:
        layout = f"(N, 3, {view.fixed}, {view.fixed}) float32 RGB in [0, 1]"
        record["input"] |= {"layout": layout, "at_most": {"images": MOST_IMAGES}, "why_one_size": reason}
        record["input"]["preprocessing"] += f" Resize images to {view.fixed} x {view.fixed} pixels before."
    write_json(out / "export.json", record)
    return record


def _trace(view: SingleView, images: Tensor, shapes: tuple[dict[int, Dim], ...]) -> torch.export.ExportedProgram:
    # PyTorch prints hundreds of lines, the graph, where it cannot trace; the error has the reason.
    with torch.no_grad(), _explained("torch.export cannot trace the network"), redirect_stderr(StringIO()):
        return torch.export.export(view, (images,), dynamic_shapes=shapes, strict=False)


def _describe(checkpoint: Checkpoint, outputs: Sequence[str]) -> dict[str, Any]:
    plain, evaluation = EvaluationConfig(), checkpoint.config.evaluation
    names = ("protocol", "gating", "background_power")
    layouts = {
        "probabilities": "(N, K, H, W) float32, sum to 1 over the K classes, background first",
        "class_scores": "(N, K - 1) float32, sigmoids for the foreground classes",
    }
    return {
        "checkpoint": str(checkpoint.path.resolve()),
        "classes": checkpoint.state.classes,
        "input": {
            "name": "images",
            "layout": "(N, 3, H, W) float32 RGB in [0, 1]",
            "preprocessing": "Divide 8-bit values by 255. Subtract no mean and do not resize: the program does both.",
            "at_most": {"images": MOST_IMAGES, "side": MOST},
        },
        "outputs": {name: layouts[name] for name in outputs},
        "left_out": {
            f"evaluation.{name}": getattr(evaluation, name)
            for name in names
            if getattr(evaluation, name) != getattr(plain, name)
        },
    }


_SHAPES = ((2, 3, 101, 78), (1, 3, 64, 96), (3, 3, 7, 145))


def _samples(model: Network, config: Config, shapes: Sequence[tuple[int, ...]] = _SHAPES) -> list[Sample]:
    """Noise of several sizes and batches in [0, 1], and the network's outputs in full precision."""
    full = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"precision": "fp32"})})
    noise, samples = torch.Generator().manual_seed(0), []
    for shape in shapes:
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise)
        probs, scores = Inference(model, full).single_scale(images)
        samples.append((images.float() / 255, [probs, *([] if scores is None else [scores.sigmoid()])]))
    return samples


def _write_onnx(program: torch.export.ExportedProgram, outputs: list[str], path: Path) -> Run:
    import onnxruntime

    names = {"input_names": ["images"], "output_names": outputs}
    with _explained("PyTorch cannot write the network as ONNX"):
        written = torch.onnx.export(program, (), **names, dynamo=True, verbose=False)  # type: ignore[arg-type]
    assert written is not None
    written.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]

    return run


def _compare(samples: Sequence[Sample], run: Run, name: str, sensitivity: Callable[[], float]) -> float:
    """Returns the largest difference of an output from the expected one; raises ValueError above the tolerance.

    `sensitivity` gives the network's answer to a tiny change, and is asked for when the tolerance is exceeded.
    """
    largest = _largest(samples, run)
    if not largest <= TOLERANCE[name] and not largest <= sensitivity():
        raise ValueError(
            f"{name} differs from the network by {largest:.1e}, more than {TOLERANCE[name]:.0e}; use slrnet.load"
        )
    return largest


def _largest(samples: Sequence[Sample], run: Run) -> float:
    with torch.no_grad():
        pairs = [pair for images, expected in samples for pair in zip(run(images), expected, strict=True)]
    return float(torch.stack([(output - expected).abs().max().double() for output, expected in pairs]).max())


@contextmanager
def _explained(failure: str) -> Iterator[None]:
    """Turns whatever PyTorch's exporters raise into a ValueError of one line."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(f"{failure} ({type(error).__name__}: {reason}); use slrnet.load") from error


def _fix_padding(model: Network, rest: int) -> None:
    """Replaces convolutions and pools that compute their padding from the image's size by ones with constant padding.

    The network sees sides of `rest` plus a multiple of its output stride. The padding depends only on the remainder, so
    it is the same for all of them. The formula for any size would take an export hours.
    """
    paddings: dict[str, list[int]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: Any, arguments: tuple[Tensor]) -> None:
            dilation = getattr(layer, "dilation", (1, 1))
            fixed = (list(values) for values in (layer.kernel_size, layer.stride, dilation))
            paddings[name] = pad_same_arg(list(arguments[0].shape[-2:]), *fixed)

        return hook

    layers = {name: m for name, m in model.named_modules() if isinstance(m, Conv2dSame | AvgPool2dSame)}
    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    side = 4 * model.encoder.size_step + rest
    with torch.no_grad():
        model.encoder(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    for name, padding in paddings.items():
        layer = layers[name]
        if isinstance(layer, Conv2dSame):
            model.set_submodule(name, _PaddedConv2d(layer, padding))
        else:
            left, right, top, bottom = padding
            sizes = layer.kernel_size, layer.stride, 0
            pool = nn.AvgPool2d(*sizes, ceil_mode=layer.ceil_mode, count_include_pad=layer.count_include_pad)
            model.set_submodule(name, nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), pool))


class _PaddedConv2d(nn.Conv2d):
    """A convolution after constant padding (left, right, top, bottom)."""

    def __init__(self, conv: nn.Conv2d, sides: list[int]) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(conv.__dict__)
        self.sides = sides

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, self.sides))


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """As `ops.maps.resize`, but also resizes to the same size: a program cannot ask whether it is the same."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def log_to_training_run(checkpoint: Checkpoint, name: str, file: Path) -> str:
    """Logs an ONNX file to the training's MLflow run, for `mlflow models serve`; returns the URI of the model `name`.

    Raises:
        ValueError: the run cannot be reached.
    """
    if not (handle := training_run(checkpoint)):
        raise ValueError(
            f"the MLflow run of {checkpoint.path} is out of reach: {why_untracked(checkpoint)}; leave --mlflow out "
            "otherwise"
        )
    return log_onnx_model(handle, name, file)
