"""Draws what the dictionary's atoms stand for: `slrnet codes`.

For each image, NAME.codes.png has a row for each number of iterations (`--num-iters 1 2 6`: the paper's Fig. 7) and a
column for each atom: the code map C_k over the image, from dark (0) to yellow (1). With CVLR an atom is a class, and
the classes that the image's mask holds are drawn (Fig. 5); of other methods the most used atoms are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from slrnet.checkpoints.checkpoint import Checkpoint, restore_network
from slrnet.inference.forward import fit_image
from slrnet.inference.predictor import rgb_array
from slrnet.models.network import Normalize
from slrnet.models.slrnet import SLRNet
from slrnet.ops.maps import channels_last, resize
from slrnet.storage.files import written_whole

__all__ = ["CodeMaps", "classes_of", "code_maps", "draw_code_maps", "heat", "most_used", "write_code_maps"]

MAX_COLUMNS = 6
_TILE, _GAP, _LINE = 220, 8, 24
# Dark violet, teal, yellow: grows in lightness, so it reads the same in grey and to the colour-blind.
_STOPS = np.array([[40, 10, 70], [50, 90, 140], [50, 160, 130], [150, 210, 80], [250, 230, 60]], dtype=np.float64)


@dataclass(frozen=True)
class CodeMaps:
    """Codes of one image of H x W pixels after each number of iterations."""

    codes: dict[int, npt.NDArray[np.float32]]
    """By T: (k, H, W), in [0, 1] for methods whose codes are a softmax."""
    mask: npt.NDArray[np.int64]
    """(H, W) class ids that the network predicts with its own T."""


@torch.no_grad()
def code_maps(model: SLRNet, image: Tensor, normalize: Normalize, num_iters: Sequence[int]) -> CodeMaps:
    """Computes the codes of an image, seen in one view, for several numbers of iterations.

    Args:
        model: in evaluation mode; its own number of iterations is restored.
        image: (1, 3, H, W) in [0, 1], of a size that the network is used to (`fit_image`), on the model's device.
        normalize: of the encoder.
        num_iters: values of T, each >= 1.

    Raises:
        ValueError: the network has no low-rank module, or a T below 1.
    """
    module = model.cvlr
    if module is None:
        raise ValueError("the network was trained without a low-rank module (cvlr.enabled is false): it has no codes")
    if min(num_iters, default=0) < 1:
        raise ValueError(f"num_iters is {list(num_iters)}; whole numbers from 1 are allowed, at least one of them")
    inputs: list[tuple[Any, ...]] = []
    handle = module.register_forward_pre_hook(lambda _, given: inputs.append(given))
    try:
        outputs = model([channels_last(normalize(image))])
    finally:
        handle.remove()
    size, maps, trained = image.shape[-2:], {}, module.num_iters
    try:
        for count in num_iters:
            module.num_iters = count
            maps[count] = resize(module(*inputs[0]).codes[0], size)[0].cpu().numpy()
    finally:
        module.num_iters = trained
    return CodeMaps(maps, resize(outputs.logits[0].float(), size)[0].argmax(dim=0).cpu().numpy())


def draw_code_maps(
    image: npt.NDArray[np.uint8], maps: CodeMaps, *, names: Sequence[str] | None, atoms: Sequence[int]
) -> Image.Image:
    """Draws the image and the chosen code maps, a row for each number of iterations.

    Args:
        image: (H, W, 3) uint8.
        maps: of this image.
        names: of the atoms by index; None where they have none.
        atoms: indices of the atoms to draw, left to right.
    """
    font = ImageFont.load_default(15)
    height = round(_TILE * image.shape[0] / image.shape[1])
    left = 60
    page = Image.new(
        "RGB",
        (left + (len(atoms) + 1) * (_TILE + _GAP), _LINE + _GAP + len(maps.codes) * (height + _GAP) + _LINE),
        (255, 255, 255),
    )
    draw = ImageDraw.Draw(page)
    titles = ["image", *(names[atom] if names else f"atom {atom}" for atom in atoms)]
    for column, title in enumerate(titles):
        draw.text((left + column * (_TILE + _GAP) + _TILE / 2, _LINE / 2 + 2), title, (34, 34, 34), font, anchor="mm")
    for row, (count, codes) in enumerate(maps.codes.items()):
        top = _LINE + _GAP + row * (height + _GAP)
        draw.text((8, top + height / 2), f"T = {count}", (34, 34, 34), font, anchor="lm")
        for column, tile in enumerate([image, *(heat(codes[atom]) for atom in atoms)]):
            picture = Image.fromarray(tile).resize((_TILE, height), Image.Resampling.BILINEAR)
            page.paste(picture, (left + column * (_TILE + _GAP), top))
    bar = heat(np.linspace(0, 1, _TILE, dtype=np.float32)[None].repeat(12, axis=0))
    page.paste(Image.fromarray(bar), (left, page.height - 18))
    draw.text((left - 8, page.height - 12), "0", (34, 34, 34), font, anchor="rm")
    draw.text((left + _TILE + 8, page.height - 12), "1", (34, 34, 34), font, anchor="lm")
    return page


def write_code_maps(
    checkpoint: Checkpoint,
    images: Mapping[str, Path],
    out: Path,
    num_iters: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
) -> Iterator[Path]:
    """Draws the code maps of images; yields the path of each picture.

    Args:
        checkpoint: the network's checkpoint.
        images: paths by name.
        out: folder for the pictures, NAME.codes.png.
        num_iters: values of T, a row each; None for the checkpoint's own.
        classes: names of the classes to draw; None for those that each mask holds.

    Raises:
        ValueError: the network has no codes, a class is unknown, or a T is below 1.
    """
    model, normalize = restore_network(checkpoint, torch.device("cpu"))
    if not isinstance(model, SLRNet):
        raise ValueError(f"{checkpoint.path} is a {type(model).__name__}, which has no codes; name one of SLRNet")
    known = checkpoint.state.classes
    for name, path in images.items():
        with Image.open(path) as file:
            pixels = rgb_array(file)
        tensor = fit_image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), checkpoint.config)
        maps = code_maps(model, tensor, normalize, num_iters or [checkpoint.config.cvlr.num_iters])
        named = model.cvlr is not None and model.cvlr.class_codes
        atoms = classes_of(maps, known, classes) if named else most_used(maps)
        out.mkdir(parents=True, exist_ok=True)
        with written_whole(out / f"{name}.codes.png") as incoming:
            draw_code_maps(pixels, maps, names=known if named else None, atoms=atoms).save(incoming)
        yield out / f"{name}.codes.png"


def classes_of(maps: CodeMaps, classes: Sequence[str], wanted: Sequence[str] | None) -> list[int]:
    """Atoms to draw where atoms are classes: the wanted ones, or the background and the largest classes of the mask.

    Args:
        maps: of the image.
        classes: names of the K classes, background first.
        wanted: names; None for those that the mask holds.

    Raises:
        ValueError: a wanted class is not among the classes.
    """
    if wanted:
        unknown = [name for name in wanted if name not in classes]
        if unknown:
            raise ValueError(f"there is no class {unknown[0]!r}; the checkpoint's are {', '.join(classes)}")
        return [list(classes).index(name) for name in wanted]
    counts = np.bincount(maps.mask.ravel(), minlength=len(classes))
    present = [int(index) for index in np.argsort(-counts[1:]) + 1 if counts[index]]
    return [0, *present[: MAX_COLUMNS - 1]]


def most_used(maps: CodeMaps) -> list[int]:
    """Atoms to draw where atoms have no names: those with the largest mean code."""
    codes = next(iter(maps.codes.values()))
    return [int(index) for index in np.argsort(-codes.mean(axis=(1, 2)), kind="stable")[:MAX_COLUMNS]]


def heat(codes: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Colours (h, w, 3) of codes (h, w) in [0, 1], which are clipped: from dark (0) to yellow (1)."""
    place = np.clip(codes, 0, 1) * (len(_STOPS) - 1)
    below = np.minimum(place.astype(np.intp), len(_STOPS) - 2)
    share = (place - below)[..., None]
    colours: npt.NDArray[np.uint8] = np.rint(_STOPS[below] * (1 - share) + _STOPS[below + 1] * share).astype(np.uint8)
    return colours
