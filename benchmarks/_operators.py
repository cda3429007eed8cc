"""Counts FLOPs and bytes of a training step's operators by stage, without running them.

Tensors are PyTorch's fake tensors: shapes and types without memory. The step is the trainer's own. The stages are its
profiler ranges and, in the forward pass, each part of the network. Backward operators are also attributed to the stage
whose gradient they compute. Where the code branches on the device, the count follows the GPU branch.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slrnet.config import Config
from slrnet.data.batch import Batch
from slrnet.distributed.process import Process
from slrnet.inference.forward import Inference
from slrnet.models.network import Network, autocast_dtype
from slrnet.models.slrnet import build_network
from slrnet.ops import cross_entropy_triton as cross_entropy_gpu
from slrnet.tools.profile import PREFIX, named_stages
from slrnet.training.listener import Listener
from slrnet.training.optim import build_optimizer
from slrnet.training.requests import Requests
from slrnet.training.trainer import Trainer

Kind = Literal["bf16", "tf32", "tf32x3", "fp32"]
"""Arithmetic that a GPU uses: tensor cores by type (`tf32x3`: three products each), or plain float32."""
BETWEEN = "between"
"""The stage of operators outside all ranges."""
BACKWARD = "backward"

FREE = {
    "aten::detach", "aten::alias", "aten::lift_fresh", "aten::promote_types", "aten::as_strided_", "aten::_unsafe_view",
    "aten::_local_scalar_dense",
}  # fmt: skip
"""Operators that move no data, in addition to views and allocations (`empty`); includes reads of single values."""
OVERWRITES = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::bernoulli_"}
"""In-place operators that do not read their output tensor."""
PICKS = {"aten::gather", "aten::index", "aten::index_select"}
"""Operators that read at most as many bytes of their first argument as they return."""
READ_TWICE = {"aten::native_batch_norm": ("input",), "aten::native_batch_norm_backward": ("grad_out", "input")}
"""Arguments that are read twice: once for the sums over the map, and once for the elementwise pass."""
PER_ELEMENT = {
    "aten::upsample_bilinear2d": 9, "aten::upsample_bilinear2d_backward": 9, "aten::_softmax": 5,
    "aten::_log_softmax": 5, "aten::_softmax_backward_data": 4, "aten::_log_softmax_backward_data": 4,
    "aten::native_batch_norm": 4, "aten::native_batch_norm_backward": 8, "aten::addcmul_": 2, "aten::lerp": 3,
}  # fmt: skip
"""FLOPs per element of the largest tensor; 1 for all other operators."""
COPIES = {
    "copy_", "_to_copy", "clone", "cat", "stack", "fill_", "zero_", "zeros_like", "ones_like", "new_zeros", "flip",
    "gather", "index", "replication_pad2d", "constant_pad_nd", "where", "slice_backward",
}  # fmt: skip
"""Names of operators that only copy data."""
CHUNK = 2**24
"""Approximate number of tensor elements that one kernel of PyTorch's `_foreach` operators handles."""


@dataclass(frozen=True, slots=True)
class Operator:
    """Cost of one operator.

    Attributes:
        name: PyTorch's name, with its namespace.
        stage: innermost range that it ran in, as in `slrnet.tools.profile.Profile.stages`; `BETWEEN` if none.
        source: the forward stage whose gradient it computes; its own stage for forward operators.
        kind: arithmetic that computes it.
        flops: number of additions and multiplications, each counted separately.
        moved: bytes of all tensors that it reads and writes, assuming no cache.
        kernels: minimum number of kernels that it launches.
        outputs: output values of a convolution, which are tiled over a GPU's multiprocessors; 0 for operators without
            this limit: elementwise ones, and matrix products and weight gradients, whose long sums can be split.
    """

    name: str
    stage: str
    source: str
    kind: Kind
    flops: int
    moved: int
    kernels: int
    outputs: int = 0


@dataclass(frozen=True)
class Count:
    """The operators of a training step of `images` images on one GPU.

    Attributes:
        operators: the operators in execution order.
        images: images in the step.
        gradients: bytes of the gradients of all trainable parameters, which ranks exchange.
        parameters: bytes of all parameters.
        kept: bytes that the forward pass saves for the backward pass, excluding parameters.
        moments: bytes of the optimizer's state.
    """

    operators: tuple[Operator, ...]
    images: int
    gradients: int
    parameters: int
    kept: int
    moments: int = 0

    @property
    def memory(self) -> int:
        """Minimum bytes that a step needs: parameters, gradients, moments and saved tensors, without workspace."""
        return self.parameters + self.gradients + self.moments + self.kept


class OperatorCounter(TorchDispatchMode):
    """Dispatch mode that records every operator that moves data, with its stage."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Operator] = []
        self._open: list[str] = []
        self._borders: list[tuple[int, str]] = []  # autograd's next sequence number at each stage change, and the stage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name == "aten::_local_scalar_dense" and isinstance(args[0], FakeTensor):
            return 0.0  # fake tensors have no values to check
        out = func(*args, **kwargs)
        if name == "profiler::_record_function_enter_new":
            self._change(lambda: self._open.append(args[0]))
        elif name == "profiler::_record_function_exit":
            self._change(self._open.pop)
        elif not (func.is_view or name in FREE or "empty" in name or name.startswith("prim::")):
            self._note(func, args, kwargs, out)
        return out

    def _change(self, change: Callable[[], Any]) -> None:
        change()
        self._borders.append((torch._C._autograd._get_sequence_nr(), self._stage()))

    def _stage(self) -> str:
        names = [name for name in self._open if name.startswith(PREFIX)]
        return names[-1].removeprefix(PREFIX) if names else BETWEEN

    def _source(self, stage: str) -> str:
        node = torch._C._current_autograd_node()
        if stage != BACKWARD or node is None:
            return stage
        place = bisect.bisect_right(self._borders, node._sequence_nr(), key=lambda border: border[0])
        return self._borders[place - 1][1] if 0 < place < len(self._borders) else stage

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        name, stage = func._schema.name, self._stage()
        ranges, (kind, flops) = (stage, self._source(stage)), _work(name, args, out)
        if name == "aten::convolution_backward":
            for moved, outputs in _gradients(args, out):
                self.operators.append(Operator(name, *ranges, kind, flops, moved, 1, outputs))
            return
        moved = CUSTOM_BYTES[name](args) if name in CUSTOM_BYTES else moved_bytes(func, args, kwargs, out)
        if moved:
            outputs = out.numel() if name == "aten::convolution" else 0
            self.operators.append(Operator(name, *ranges, kind, flops, moved, _kernels(name, args), outputs))


def moved_bytes(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Returns the bytes of all tensors that an operator reads and writes."""
    name, schema, total = func._schema.name, func._schema, 0
    for place, argument in enumerate(schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        size = sum(map(_size, _tensors(value)))
        written = argument.alias_info is not None and argument.alias_info.is_write
        read = not (argument.is_out or (written and name in OVERWRITES))
        if place == 0 and name in PICKS:
            size = min(size, sum(map(_size, _tensors(out))))
        twice = argument.name in READ_TWICE.get(name, ()) and _trains(name, args)
        total += size * (written + read + twice)
    returned = out if isinstance(out, tuple) and len(schema.returns) > 1 else (out,)
    new = [value for value, kind in zip(returned, schema.returns, strict=False) if kind.alias_info is None]
    return total + sum(map(_size, _tensors(new)))


def _trains(name: str, args: tuple[Any, ...]) -> bool:
    """Returns True if a batch norm reads its input twice: in training mode, and always in the backward pass."""
    return name == "aten::native_batch_norm_backward" or bool(args[5])


def _gradients(args: tuple[Any, ...], out: tuple[Tensor | None, ...]) -> Iterator[tuple[int, int]]:
    """Yields bytes and limiting outputs of a convolution's input gradient and weight gradient, one kernel each."""
    slopes, inputs, weight = args[:3]
    if out[0] is not None:
        yield _size(slopes) + _size(weight) + _size(out[0]), out[0].numel()
    if out[1] is not None:
        yield _size(slopes) + _size(inputs) + _size(out[1]), 0


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    """Returns the bytes in memory; dimensions of stride 0 are stored once."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(side if stride else min(side, 1) for side, stride in sides) * tensor.element_size()


def _product(left: Tensor, right: Tensor) -> int:
    """Returns the FLOPs of a matrix product, also batched."""
    return 2 * left.numel() * right.shape[-1]


def _convolution(output: Tensor, weight: Tensor) -> int:
    return 2 * output.numel() * math.prod(weight.shape[1:])


MATRICES: dict[str, Callable[[tuple[Any, ...], Any], int]] = {
    "aten::mm": lambda args, out: _product(args[0], args[1]),
    "aten::bmm": lambda args, out: _product(args[0], args[1]),
    "aten::addmm": lambda args, out: _product(args[1], args[2]),
    "aten::baddbmm": lambda args, out: _product(args[1], args[2]),
    "aten::convolution": lambda args, out: _convolution(out, args[1]),
    "aten::convolution_backward": lambda args, out: _convolution(args[0], args[2]),  # per gradient
    "slrnet::factorize": lambda args, out: (2 * args[2] + 1) * _passes(args),
    "slrnet::factorize_backward": lambda args, out: (7 * len(args[2]) + 3) * _passes(args),
}


def _passes(args: tuple[Any, ...]) -> int:
    """Returns the FLOPs of one product of all features (N, d, P) with all codes (N, k, P)."""
    return 2 * int(args[0].numel()) * int(args[1].shape[1])


def _factorize_bytes(args: tuple[Any, ...]) -> int:
    """T sums over the positions, of which the first reads the codes, and a last pass that writes both results."""
    features, codes = _size(args[0]), _size(args[1])
    return (int(args[2]) + 2) * features + 2 * codes


def _factorize_backward_bytes(args: tuple[Any, ...]) -> int:
    """Passes over features, their gradients and codes, as `slrnet.ops.factorize_triton.backward` launches them."""
    features, codes, steps = _size(args[0]), _size(args[1]), len(args[2])
    last = (2 + 2 + 3) * features + 2 * codes  # dictionary sums, direction sums, feature gradient
    earlier = (1 + 3) * features
    return last + (steps - 1) * earlier + 3 * features + 2 * codes


def _cross_entropy_work(args: tuple[Any, ...]) -> int:
    """31 FLOPs per class and lane of a program: two blends of four neighbors, exponentials, sums, four gradients."""
    (images, classes, *old), new = args[0].shape, args[1].shape[1:]
    pixels, shared = cross_entropy_gpu.plan_of((old[0], old[1]), (new[0], new[1]))
    programs = images * (old[0] - 1) * (old[1] - 1) * shared
    return int(31 * programs * pixels * -(-classes // cross_entropy_gpu.BLOCK) * cross_entropy_gpu.BLOCK)


def _cross_entropy_bytes(args: tuple[Any, ...]) -> int:
    """Reads logits, labels and weights; writes four partial gradients, then reads and adds them one by one."""
    logits, labels, weights = args
    return _size(labels) + _size(weights) + (1 + 4 + 1 + 4 * 3) * _size(logits)


CUSTOM_BYTES: dict[str, Callable[[tuple[Any, ...]], int]] = {
    "slrnet::factorize": _factorize_bytes,
    "slrnet::factorize_backward": _factorize_backward_bytes,
    "slrnet::weighted_cross_entropy": _cross_entropy_bytes,
}


def _work(name: str, args: tuple[Any, ...], out: Any) -> tuple[Kind, int]:
    if name in MATRICES:
        return _kind(name, args), MATRICES[name](args, out)
    if name == "slrnet::weighted_cross_entropy":
        return "fp32", _cross_entropy_work(args)
    if name.partition("::")[2] in COPIES:
        return "fp32", 0
    elements = max((tensor.numel() for tensor in _tensors((args, out))), default=0)
    if name.startswith("aten::_foreach"):
        elements = sum(tensor.numel() for tensor in _tensors(args[0]))
    return "fp32", PER_ELEMENT.get(name, 1) * elements


def _kind(name: str, args: tuple[Any, ...]) -> Kind:
    """cuDNN uses TF32 for float32; cuBLAS does so only on request. Depthwise convolutions use no tensor cores."""
    if name.startswith("slrnet::"):
        return "tf32x3" if args[0].dtype == torch.float32 else "tf32"
    first = args[1] if name in ("aten::addmm", "aten::baddbmm") else args[0]
    if "convolution" in name:
        weight = args[2] if name.endswith("backward") else args[1]
        if weight.shape[1] == 1:
            return "fp32"
        return "bf16" if first.dtype in (torch.bfloat16, torch.float16) else "tf32"
    return "bf16" if first.dtype in (torch.bfloat16, torch.float16) else "fp32"


def _kernels(name: str, args: tuple[Any, ...]) -> int:
    if name == "slrnet::factorize":
        return 2 * int(args[2]) + 1
    if name == "slrnet::factorize_backward":
        return 3 * len(args[2]) + 2
    if name == "slrnet::weighted_cross_entropy":
        return 7
    if name.startswith("aten::_foreach"):
        return 1 + sum(tensor.numel() for tensor in _tensors(args[0])) // CHUNK
    return 1


def count_step(
    config: Config, *, num_classes: int, images: int, classes_per_image: int, masks_share: float = 0.0
) -> Count:
    """Counts an optimizer step with pseudo labels. Takes seconds, and allocates no memory for the tensors.

    Args:
        config: the run's settings; any `train.precision` other than fp32 means bf16 autocast.
        num_classes: K, including the background.
        images: images per step on one GPU.
        classes_per_image: foreground classes in each image's label; images without labels use all classes.
        masks_share: share of the images that have a ground-truth mask.
    """
    precision = "fp32" if config.train.precision == "fp32" else "bf16"
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):  # building may compute with numbers, which fake tensors have none of
        model = build_network(config, num_classes=num_classes, weights=False)
    with mode:
        model.to_empty(device="cpu").train()
    batch = _batch(config, mode, num_classes, images, classes_per_image, round(masks_share * images))
    trainer = _trainer(config, model, images)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    names = ("exp_avg", "exp_avg_sq") if config.optim.name == "adamw" else ("momentum_buffer",)
    for parameter in trainable:
        trainer.optimizer.state[parameter].update({name: torch.empty_like(parameter) for name in names})
        trainer.optimizer.state[parameter]["step"] = torch.zeros(())
    owned = {_storage(parameter) for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in owned:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    counter = OperatorCounter()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with as_on_gpu(), named_stages(model), hooks, counter:
        trainer._step(batch, 0, pretraining=False)
    sizes = [sum(map(_size, tensors)) for tensors in (trainable, list(model.parameters()))]
    moments = len(names) * sizes[0]
    return Count(tuple(counter.operators), images, sizes[0], sizes[1], sum(kept.values()), moments)


def count_validation(
    config: Config, *, num_classes: int, size: tuple[int, int], images: int = 1
) -> tuple[Operator, ...]:
    """Counts the prediction of images of `size` = (height, width) after an epoch."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model = build_network(config, num_classes=num_classes, weights=False)
        model.eval()
        pixels = torch.empty(images, 3, *size, dtype=torch.uint8)
    counter = OperatorCounter()
    with as_on_gpu(), named_stages(model), counter:
        Inference(model, config).single_scale(pixels)[0].argmax(dim=1)
    return tuple(counter.operators)


def count_classifier(model: Callable[[], nn.Module], *, images: int, size: int, bf16: bool) -> tuple[Operator, ...]:
    """Counts a training step of an image classifier with SGD, for comparison with published measurements."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        network = model()
        inputs = torch.empty(images, 3, size, size).contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, foreach=True)
    for parameter in network.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter)
    labels, counter = torch.zeros(images, dtype=torch.int64), OperatorCounter()
    with counter:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(network(inputs).float(), labels)
        loss.backward()
        optimizer.step()
    return tuple(counter.operators)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _batch(
    config: Config, mode: FakeTensorMode, num_classes: int, images: int, classes_per_image: int, masks: int
) -> Batch:
    """Builds a batch of real labels, because the code reads their values on the CPU, and fake images and masks."""
    size = (images, config.data.crop_size, config.data.crop_size)
    with mode:
        pixels = torch.empty(size[0], 3, *size[1:], dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        pixel_labels = torch.empty(size, dtype=torch.uint8) if masks else None
    known = torch.full((images,), config.setting != "sss")
    labels = torch.zeros(images, num_classes - 1)
    labels[:, :classes_per_image] = float(config.setting != "sss")
    keys = tuple(str(number) for number in range(images))
    return Batch(pixels, labels, known, keys, torch.arange(images) < masks, pixel_labels)


def step_trainer(config: Config, model: Network, images: int, device: torch.device) -> Trainer:
    """Builds a trainer that can only take steps; the constructor would need a dataset and real weights."""
    trainer, on_gpu = Trainer.__new__(Trainer), device.type == "cuda"
    trainer.config, trainer.process = config, Process(device=device)
    trainer.model = trainer.wrapped = model
    trainer.optimizer = build_optimizer(model, config.optim, batch_size=images, fused=on_gpu)
    half = autocast_dtype(config.train.precision, device) == torch.float16
    trainer.scaler = torch.amp.GradScaler(device.type, enabled=half)
    trainer.listener, trainer.average = Listener(), None
    trainer._requests, trainer._last_save = Requests(), time.monotonic()
    return trainer


def _trainer(config: Config, model: Network, images: int) -> Trainer:
    trainer = step_trainer(config, model, images, torch.device("cpu"))
    for group in trainer.optimizer.param_groups:
        group["foreach"] = True  # one kernel for many weights, as the fused optimizer of GPUs
    return trainer


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Context manager that makes code that branches on the device take the GPU branch for CPU tensors."""
    with (
        mock.patch("slrnet.models.cvlr._choose", lambda wanted, *_: "recompute" if wanted == "auto" else wanted),
        mock.patch("slrnet.calibration.refine.SPARSE_CHANNELS", 2**31),
    ):
        yield
