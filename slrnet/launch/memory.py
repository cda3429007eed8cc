"""What a training step needs of a GPU's memory, counted before it starts on tensors without memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from slrnet.config import Config
from slrnet.distributed.process import Process
from slrnet.models.network import Network
from slrnet.models.slrnet import build_network
from slrnet.storage.shown import say
from slrnet.views.geometry import view_size

__all__ = ["expected_memory", "memory_note", "say_memory"]

SPARE = 1.25
"""Memory beyond the counted one: workspaces and fragments, as a factor."""
CONTEXT = 1.5e9
"""Bytes of CUDA and its libraries."""


def say_memory(config: Config, num_classes: int, process: Process) -> None:
    """Warns if a step may not fit into this process's GPU; an encoder whose memory cannot be counted trains anyway."""
    images = -(-config.train.batch_size // (process.world_size * config.train.accumulation))
    card = torch.cuda.get_device_properties(process.device).total_memory
    try:
        note = memory_note(config, num_classes=num_classes, images=images, card=card)
    except Exception as error:
        note = f"the memory that a step needs cannot be counted before it runs ({' '.join(str(error).split())[:200]})"
    if note:
        say(f"warning: {note}")


def expected_memory(counted: float) -> float:
    """Bytes of a GPU that a step is expected to need, from those of the tensors that it holds."""
    return SPARE * counted + CONTEXT


def memory_note(config: Config, *, num_classes: int, images: int, card: float) -> str:
    """A line about a step of `images` images that is not expected to fit into a GPU of `card` bytes; "" if it fits.

    It says what is needed, and the first `train.accumulation` that fits.
    """
    fixed, of_image = _counted(config, num_classes)

    def needed(count: int) -> float:
        return expected_memory(fixed + count * of_image)

    if needed(images) <= card:
        return ""
    least = next((parts for parts in range(2, images + 1) if needed(-(-images // parts)) <= card), 0)
    part = -(-images // least) if least else 1
    remedy = (
        f"set train.accumulation={config.train.accumulation * least} ({part} images at a time, "
        f"{needed(part) / 1e9:.0f} GB)"
        if least
        else f"even one image needs {needed(1) / 1e9:.0f} GB: use a smaller data.crop_size or a larger GPU"
    )
    need = f"a step of {images} images is expected to need {needed(images) / 1e9:.0f} GB"
    return f"{need}, this GPU has {card / 1e9:.0f}; {remedy}"


def _counted(config: Config, num_classes: int) -> tuple[int, int]:
    """Bytes of weights, gradients and the optimizer's state, and those that an image keeps for the backward pass."""
    with torch.device("meta"):
        model = build_network(config, num_classes=num_classes, weights=False).train()
    weights = list(model.parameters())
    every = sum(weight.numel() for weight in weights)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    moments = 2 if config.optim.name == "adamw" else 1
    fixed = 4 * (every * (2 if config.train.ema else 1) + trained * (1 + moments))
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # weights without values become such of a CPU
    with mode:
        model.to_empty(device="cpu")
    side, stride = config.data.crop_size, model.encoder.size_step if config.views.sizes == "fitted" else None
    sizes = [view_size((side, side), scale, stride=stride) for scale in config.views.scales]
    half = torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision not in ("fp32", "fp64"))
    with mode, half:
        two, three = (_kept(model, [torch.empty(images, 3, *size) for size in sizes]) for images in (2, 3))
    return fixed + 3 * two - 2 * three, three - two  # autocast's copies of weights do not grow with the images


def _kept(model: Network, views: list[Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, besides the weights."""
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        """Notes a tensor that autograd saves."""
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(views)
    total = sum(storage.nbytes() for name, storage in kept.items() if name not in weights)
    del outputs  # until here no storage's name was free for another one
    return total
