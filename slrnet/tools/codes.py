"""Draws what the dictionary's atoms stand for, as in the paper's Fig. 5 and 7: `slrnet codes`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from slrnet.checkpoints.checkpoint import Checkpoint, restore_network
from slrnet.data.depth import Depth
from slrnet.data.images import open_image
from slrnet.inference.forward import Inference
from slrnet.inference.predictor import rgb_array
from slrnet.models.cvlr import CrossViewLowRank, LowRankViews
from slrnet.models.network import Network, Outputs
from slrnet.models.slrnet import SLRNet
from slrnet.ops.maps import resize
from slrnet.storage.files import written_whole
from slrnet.viz.lettering import drawable_names
from slrnet.viz.panels import Tile, draw_grid

__all__ = [
    "COLORS",
    "CodeMaps",
    "code_maps",
    "draw_code_maps",
    "heat",
    "iterations",
    "low_rank_module",
    "observe_low_rank",
    "write_code_maps",
]

COLORS = "viridis"
"""Colormap of codes: grows in lightness, so it reads the same in gray and to the color-blind."""
MAX_ATOMS = 6
"""Most atoms in a picture, if none are named."""
TILE = 220
"""Width of a tile, pixels."""


@dataclass(frozen=True)
class CodeMaps:
    """Codes of one image of H x W pixels after each number of iterations."""

    codes: dict[int, npt.NDArray[np.float32]]
    """By T: (k, H, W), in [0, 1] for methods whose codes are a softmax."""
    mask: npt.NDArray[np.int64]
    """(H, W) class ids that the network predicts with its own T."""
    class_codes: bool = True
    """Whether each atom stands for a class."""

    def choose_atoms(self, classes: Sequence[str], wanted: Sequence[str] | None = None) -> dict[int, str]:
        """Chooses the atoms to draw; returns their titles by index.

        Args:
            classes: names of the K classes, background first.
            wanted: some of these; None for the background and the largest classes of the mask. Atoms that stand for no
                class have no names: those with the largest mean code are chosen, whatever is wanted.

        Raises:
            ValueError: a wanted class is not among the classes.
        """
        if not self.class_codes:
            means = next(iter(self.codes.values())).mean(axis=(1, 2))
            most_used = np.argsort(-means, kind="stable")[:MAX_ATOMS].tolist()
            return {atom: f"atom {atom}" for atom in most_used}
        unknown = [name for name in wanted or () if name not in classes]
        if unknown:
            raise ValueError(f"there is no class {unknown[0]!r}; the checkpoint's are {', '.join(classes)}")
        if wanted:
            return {list(classes).index(name): name for name in wanted}
        counts = np.bincount(self.mask.ravel(), minlength=len(classes))
        present = [index for index in (np.argsort(-counts[1:]) + 1).tolist() if counts[index]]
        return {index: classes[index] for index in [0, *present[: MAX_ATOMS - 1]]}


def heat(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    """Colors (..., 3) uint8, from dark (0) to yellow (1), of values (...) in [0, 1], which are clipped."""
    colors: npt.NDArray[np.uint8] = mpl.colormaps[COLORS](np.clip(values, 0, 1), bytes=True)[..., :3]
    return colors


def low_rank_module(model: Network) -> CrossViewLowRank:
    """Returns a network's low-rank module; raises ValueError if the network is no SLRNet or has none."""
    if not isinstance(model, SLRNet):
        raise ValueError(f"the network is a {type(model).__name__}, which has no codes; name a checkpoint of SLRNet")
    if model.cvlr is None:
        raise ValueError("the network was trained without a low-rank module (cvlr.enabled is false): it has no codes")
    return model.cvlr


@contextmanager
def iterations(module: CrossViewLowRank, num_iters: int) -> Iterator[None]:
    """Lets a low-rank module take `num_iters` iterations, >= 1, inside the context."""
    trained, module.num_iters = module.num_iters, num_iters
    try:
        yield
    finally:
        module.num_iters = trained


@torch.no_grad()
def observe_low_rank(model: Network, views: Sequence[Tensor]) -> tuple[Outputs, tuple[Any, ...], LowRankViews]:
    """Runs a network on views (N, 3, H, W) in [0, 1], in full precision.

    Returns its outputs, and the arguments and the result of its low-rank module; raises ValueError if it has none.
    """
    calls: list[tuple[Any, Any]] = []
    with low_rank_module(model).register_forward_hook(lambda _, *call: calls.append(call)):
        outputs = model([model.encoder.normalize(view) for view in views])
    return outputs, *calls[0]


@torch.no_grad()
def code_maps(inference: Inference, image: npt.NDArray[np.uint8], num_iters: Sequence[int] | None = None) -> CodeMaps:
    """Computes the codes of an image (H, W, 3) uint8, seen in one view, for several numbers of iterations.

    Args:
        inference: an SLRNet and its settings; its own number of iterations is restored.
        image: the image; the maps have the size at which the network sees it (`Inference.fit`).
        num_iters: values of T, each >= 1; None for the network's own.

    Raises:
        ValueError: the network has no low-rank module, or a T is below 1.
    """
    model, module = inference.model, low_rank_module(inference.model)
    counts = [module.num_iters] if num_iters is None else num_iters
    if min(counts, default=0) < 1:
        raise ValueError(f"num_iters is {list(counts)}; whole numbers from 1 are allowed, at least one of them")
    pixels = inference.fit(torch.from_numpy(image).permute(2, 0, 1).to(inference.device))
    outputs, arguments, _ = observe_low_rank(model, [pixels])
    size, maps = pixels.shape[-2:], {}
    for count in counts:
        with iterations(module, count):
            maps[count] = resize(module(*arguments).codes[0], size)[0].cpu().numpy()
    mask = resize(outputs.logits[0].float(), size)[0].argmax(dim=0).cpu().numpy()
    return CodeMaps(maps, mask, module.class_codes)


def draw_code_maps(
    image: npt.NDArray[np.uint8], maps: CodeMaps, classes: Sequence[str], wanted: Sequence[str] | None = None
) -> Image.Image:
    """Draws an image (H, W, 3) uint8 and its code maps: a row for each T, a column for each of `maps.choose_atoms`."""
    chosen, names = maps.choose_atoms(classes, wanted), drawable_names(tuple(classes))
    atoms = {atom: names[atom] if maps.class_codes else title for atom, title in chosen.items()}
    size = (TILE, round(TILE * image.shape[0] / image.shape[1]))

    def tile(picture: npt.NDArray[np.uint8], caption: str) -> Tile:
        return Tile(np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)), caption)

    rows = [
        [tile(image, "image"), *(tile(heat(codes[atom]), title) for atom, title in atoms.items())]
        for codes in maps.codes.values()
    ]
    values = np.linspace(0, 1, 5)
    scale = [(f"{value:g}", tuple(color)) for value, color in zip(values, heat(values).tolist(), strict=True)]
    return draw_grid(rows, row_names=[f"T = {count}" for count in maps.codes], legend=scale)


def write_code_maps(
    checkpoint: Checkpoint,
    images: Mapping[str, Path],
    out: Path,
    num_iters: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
) -> Iterator[Path]:
    """Draws the code maps of images, NAME.codes.png; yields the path of each picture.

    Args:
        checkpoint: the network's checkpoint.
        images: paths by name.
        out: folder for the pictures.
        num_iters: values of T, a row each; None for the checkpoint's own.
        classes: names of the classes to draw; None for those that each mask holds.

    Raises:
        ValueError: the network has no codes, a class is unknown, or a T is below 1.
    """
    inference = Inference(restore_network(checkpoint, "cpu"), checkpoint.config)
    for name, path in images.items():
        with open_image(path) as file:
            pixels = rgb_array(file, Depth.parse(checkpoint.state.depth))
        maps = code_maps(inference, pixels, num_iters)
        picture = draw_code_maps(pixels, maps, checkpoint.state.classes, classes)
        with written_whole(out / f"{name}.codes.png") as incoming:
            picture.save(incoming)
        yield out / f"{name}.codes.png"
