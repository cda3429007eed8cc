"""Exports a network for other programs (`slrnet export`): one view, by `torch.export` and ONNX."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from slrnet.checkpoints.checkpoint import Checkpoint, restore_model
from slrnet.config import Config
from slrnet.launch.evaluation import training_run
from slrnet.models.cvlr import CrossViewLowRank
from slrnet.models.network import Network
from slrnet.ops.maps import resize
from slrnet.storage.files import write_json, written_whole
from slrnet.tracking.mlflow import log_onnx_model

__all__ = ["SingleView", "export_network", "log_to_training_run"]

TOLERANCE = 1e-4
"""Largest difference of a probability between an exported network and the network itself."""
MOST = 4096
"""Largest side of an image that the exported programs take, pixels."""


class SingleView(nn.Module):
    """A network for one view: images in, probabilities and class scores out.

    Args:
        model: the network; its evaluation mode is turned on, and its low-rank module set to plain operators.
        config: settings of the network's run.
    """

    def __init__(self, model: Network, config: Config) -> None:
        super().__init__()
        self.model = model.eval()
        for module in model.modules():
            if isinstance(module, CrossViewLowRank):
                module.implementation = "auto"  # plain operators during an export
        self.stride = model.encoder.output_stride
        self.rest = config.data.crop_size % self.stride

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts images (N, 3, H, W) float32 in [0, 1]; H and W are multiples of the output stride, plus `rest`.

        Returns:
            (N, K, H, W) probabilities, background first, and (N, K - 1) sigmoids of the class scores, or (N, 0) if the
            network has none.
        """
        outputs = self.model([self.model.encoder.normalize(images)])
        probs = resize(outputs.logits[0].float().softmax(dim=1), images.shape[-2:])
        scores = outputs.class_scores[0].sigmoid() if outputs.class_scores else probs.new_zeros(len(images), 0)
        return probs, scores

    def example(self, cells: tuple[int, int] = (6, 7), count: int = 2) -> Tensor:
        """Returns noise (count, 3, H, W) of a size that fits: `cells` times the output stride, plus `rest`."""
        size = [side * self.stride + self.rest for side in cells]
        return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


def export_network(checkpoint: Checkpoint, out: Path, *, onnx: bool = True) -> dict[str, Any]:
    """Writes a checkpoint's network into the folder `out`: network.pt2, with `onnx` network.onnx, and export.json.

    Each program takes any batch and size. It is compared with the network before its file gets its name.

    Returns:
        The content of export.json: classes, layouts, sizes, and the largest difference of each file's probabilities
        from the network's.

    Raises:
        ValueError: the extra is missing, or a file disagrees with the network.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if onnx and missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}; run `pip install 'slrnet[export]'`, or give --no-onnx")
    view = SingleView(restore_model(checkpoint), checkpoint.config)
    stride, rest = view.stride, view.rest
    height, width = (stride * Dim(name, min=2, max=(MOST - rest) // stride) + rest for name in ("h", "w"))
    shapes = ({0: Dim("n", min=1, max=1024), 2: height, 3: width},)
    with torch.no_grad():
        program = torch.export.export(view, (view.example(),), dynamic_shapes=shapes, strict=False)
    differences = {}
    with written_whole(out / "network.pt2") as incoming:
        torch.export.save(program, incoming)
        differences["network.pt2"] = _compare(view, torch.export.load(incoming).module(), "network.pt2")
    if onnx:
        with written_whole(out / "network.onnx") as incoming:
            differences["network.onnx"] = _write_onnx(view, program, incoming)
    record = {
        "checkpoint": str(checkpoint.path.resolve()),
        "classes": checkpoint.state.classes,
        "input": {
            "layout": "(N, 3, H, W) float32 RGB in [0, 1]",
            "side": {"multiple_of": stride, "plus": rest, "at_most": MOST},
        },
        "outputs": ["probabilities (N, K, H, W)", "sigmoids of the class scores (N, K - 1)"],
        "largest_difference": differences,
    }
    write_json(out / "export.json", record)
    return record


def _write_onnx(view: SingleView, program: torch.export.ExportedProgram, path: Path) -> float:
    import onnxruntime

    names = {"input_names": ["images"], "output_names": ["probabilities", "class_scores"]}
    written = torch.onnx.export(program, (), **names, dynamo=True, verbose=False)  # type: ignore[arg-type]
    assert written is not None
    written.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]

    return _compare(view, run, "network.onnx")


def _compare(view: SingleView, other: Callable[[Tensor], Any], name: str) -> float:
    """Returns the largest difference of probabilities, also at sizes and batches other than the example's."""
    largest = 0.0
    with torch.no_grad():
        for cells, count in (((6, 7), 2), ((9, 5), 1), ((3, 12), 3)):
            images = view.example(cells, count)
            largest = max(largest, float((other(images)[0] - view(images)[0]).abs().max()))
    if not largest <= TOLERANCE:
        raise ValueError(
            f"{name} differs from the network by {largest:.1e}, more than {TOLERANCE:.0e}; use slrnet.load"
        )
    return largest


def log_to_training_run(checkpoint: Checkpoint, name: str, file: Path) -> str:
    """Logs an ONNX file to the training's MLflow run, for `mlflow models serve`; returns the URI of the model `name`.

    Raises:
        ValueError: the run cannot be reached.
    """
    if not (handle := training_run(checkpoint)):
        raise ValueError(
            f"the MLflow run of {checkpoint.path} is out of reach: set MLFLOW_TRACKING_URI to its server, or leave "
            "--mlflow out"
        )
    return log_onnx_model(handle, name, file)
