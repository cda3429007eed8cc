# PYTHON_ARGCOMPLETE_OK
"""The embedded demo data set: synthetic pictures of fish, kites, ladybirds and mushrooms, drawn from a seed.

    slrnet prepare demo --out DIR [--voc-folder DIR] [--train 240] [--val 60] [--image-size 128] [--hard] [--seed 0]

Nothing is downloaded: numpy draws a textured ground and, on it, one to four objects that overlap and vary in size. Each
class has its own range of colors and its own texture (fish: stripes; kite: quarters; ladybird: spots; mushroom: plain),
and most pictures show one object. So a few minutes of training are enough for masks that anyone would call right.

With `--hard` the classes share colors, outlines and textures, and the ground holds scraps that imitate their bodies.
A class then differs from the others by a small part alone (eye and fins; bows on a tail; head with feelers; stem), so
its class activation covers too little, as it does on photographs. Objects are smaller and may be cut by the border.

Masks are exact at pixel centers. The pictures are written in VOC's folder layout and take the same road into shards as
VOC itself.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt
from PIL import Image

if not __package__:  # run as a script: the folder above holds both packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep import voc
from data_prep.conversion import Output, add_common_arguments
from data_prep.shard_writer import check_output
from data_prep.workers import ConversionPool
from slrnet.data.catalog import BACKGROUND, voc_palette
from slrnet.data.images import encode_mask
from slrnet.data.manifest import DataError, DatasetInfo
from slrnet.storage.shown import say

__all__ = [
    "CLASSES",
    "add_arguments",
    "build_demo",
    "demo_data",
    "draw_scene",
    "drawn_demo",
    "make",
    "write_voc_folder",
]

Floats = npt.NDArray[np.float64]

CLASSES = (BACKGROUND, "fish", "kite", "ladybird", "mushroom")
"""Names of the classes, background first."""

GROUNDS = (
    ((66, 92, 52), (128, 140, 84)),
    ((150, 132, 100), (196, 182, 150)),
    ((84, 110, 138), (156, 178, 196)),
    ((96, 84, 74), (150, 140, 132)),
    ((118, 136, 110), (184, 186, 150)),
)
"""Pairs of colors between which the ground varies: grass, sand, sky, soil, meadow."""

CLASS_COLORS = {
    1: ((40, 96, 176), (58, 130, 196), (34, 132, 160)),
    2: ((250, 196, 30), (246, 160, 26), (255, 212, 60)),
    3: ((204, 40, 34), (186, 30, 56), (220, 70, 48)),
    4: ((132, 66, 150), (158, 80, 140), (104, 70, 160)),
}
"""Colors of the bodies of each class: blue fish, yellow kites, red ladybirds, violet mushrooms."""

BODY_COLORS = ((206, 52, 40), (226, 122, 36), (222, 178, 48), (52, 112, 186), (60, 152, 120), (150, 70, 150))
"""Colors of the bodies of all classes of the hard set, and of the scraps that imitate them."""

DARK, LIGHT = np.array([34.0, 30.0, 36.0]), np.array([244.0, 240.0, 228.0])

MAX_OBJECTS = 4


@dataclass(frozen=True)
class Scenery:
    """What distinguishes the two sets."""

    shared_looks: bool
    """Whether all classes share their colors, pairs of classes a texture, and scraps on the ground imitate both."""
    more_objects: tuple[float, ...]
    """Probabilities of 0, 1, ... objects beside the first one."""
    scales: tuple[float, float]
    """Smallest and largest scale of an object, as shares of the picture's side."""
    margin: float
    """Share of the side that an object's center keeps from the border."""


EASY = Scenery(shared_looks=False, more_objects=(0.6, 0.3, 0.08, 0.02), scales=(0.22, 0.4), margin=0.25)
HARD = Scenery(shared_looks=True, more_objects=(0.3, 0.4, 0.2, 0.1), scales=(0.17, 0.42), margin=0.08)

REACH = 1.75
"""How far from its center an object's parts may lie, in its own units; nothing is painted beyond."""
SMALLEST_SHARE = 0.015
"""Least share of the picture that an object must cover to be drawn."""
SMALLEST_VISIBLE = 0.4
"""Least share of an object's pixels that later objects must leave visible."""


def build_demo(
    out: str | Path,
    *,
    seed: int = 0,
    num_train: int = 240,
    num_val: int = 60,
    image_size: int = 128,
    hard: bool = False,
    voc_folder: str | Path | None = None,
    samples_per_shard: int = 32,
    shards: int | None = None,
    processes: int = 1,
) -> DatasetInfo:
    """Draws the data set and makes shards of it.

    Args:
        out: Folder to make; it must not exist or be empty.
        seed: Seed of the pictures; equal seeds and sizes give equal bytes.
        num_train: Pictures of the split `train`.
        num_val: Pictures of the split `val`.
        image_size: Side of the square pictures, pixels.
        hard: Whether classes share colors and textures; see the module's docstring.
        voc_folder: Where to keep the pictures in VOC's layout; None keeps the shards only.
        samples_per_shard: Samples that a shard holds at most, when `shards` is not given.
        shards: Number of shards of every split.
        processes: Worker processes; the output is the same for any number.

    Raises:
        DataError: the output folder is not empty, or a number is out of range; nothing is written then.
    """
    check_output(out)
    sizes = {"seed": seed, "train": num_train, "val": num_val, "image-size": image_size}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))] + ["--hard"] * hard
    words += ["--samples-per-shard", str(samples_per_shard)] if shards is None else ["--shards", str(shards)]
    with tempfile.TemporaryDirectory(prefix="demo-") as temporary:
        root = Path(temporary) if voc_folder is None else check_output(voc_folder)
        counts = {"num_train": num_train, "num_val": num_val}
        write_voc_folder(root, seed=seed, **counts, image_size=image_size, hard=hard, processes=processes)
        output = Output(
            out,
            name="demo",
            made_by=shlex.join(["python", "data_prep/demo.py", *words]),
            samples_per_shard=samples_per_shard,
            shards=shards,
            seed=seed,
        )
        return voc.convert(root, output)


def write_voc_folder(
    root: Path,
    *,
    seed: int,
    num_train: int,
    num_val: int,
    image_size: int,
    hard: bool = False,
    processes: int = 1,
) -> None:
    """Draws all pictures into a folder in VOC's layout, with masks, XML annotations, lists and labels.txt.

    Raises:
        DataError: a number is out of range.
    """
    if num_train < 1 or num_val < 1 or image_size < 32 or seed < 0:
        raise DataError(
            f"--train {num_train}, --val {num_val}, --image-size {image_size}, --seed {seed}: "
            "at least 1, 1, 32 and 0 are allowed"
        )
    for name in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "labels.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    pictures = []
    for split, count in (("train", num_train), ("val", num_val)):
        keys = [f"{split}_{index:05d}" for index in range(count)]
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(keys) + "\n", encoding="utf-8")
        pictures += [(key, (seed, split == "val", index)) for index, key in enumerate(keys)]
    with ConversionPool(processes) as workers:
        workers.map(partial(_write_picture, root, image_size, hard), pictures, label="drawing")


def demo_data(storage: Path) -> Path:
    """As `drawn_demo`; says that the shards stand in for real data."""
    hint = "Real data: slrnet train --recipe voc_wsss --data SHARDS, with shards from `slrnet prepare voc`."
    say(f"No --data given: training on the embedded, synthetic demo data. {hint}")
    return drawn_demo(storage)


def drawn_demo(storage: Path) -> Path:
    """The demo's shards in a folder of runs, built if they are missing."""
    folder = storage / "demo_data"
    if not folder.exists():
        build_demo(folder)
    return folder


def draw_scene(
    random: np.random.Generator, size: int, *, first_class: int, hard: bool = False
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Draws one picture, (size, size, 3) uint8 RGB, and its mask, (size, size) uint8 of class ids.

    Args:
        random: Source of everything that varies.
        size: Side of the picture, pixels.
        first_class: Id 1..K-1 of a class that is shown for certain; the others come by chance.
        hard: Whether classes share colors and textures; see the module's docstring.
    """
    scenery = HARD if hard else EASY
    canvas = _draw_ground(random, size, scenery)
    mask = np.zeros((size, size), dtype=np.uint8)
    owners = np.zeros((size, size), dtype=np.int64)
    areas = [0]
    others = random.choice(MAX_OBJECTS, p=scenery.more_objects)
    wanted = [first_class, *random.integers(1, len(CLASSES), others)]
    for label in wanted:
        for _ in range(12):  # places are tried until one fits
            trial, covered = _draw_object(random, canvas, label, scenery)
            remaining = np.bincount(owners[~covered], minlength=len(areas))
            hidden = any(remaining[n] < SMALLEST_VISIBLE * areas[n] for n in range(1, len(areas)))
            if covered.mean() >= SMALLEST_SHARE and not hidden:
                canvas = trial
                mask[covered], owners[covered] = label, len(areas)
                areas.append(int(covered.sum()))
                break
    return _finish(random, canvas), mask


def _write_picture(root: Path, size: int, hard: bool, picture: tuple[str, tuple[int, int, int]]) -> None:
    key, seeds = picture
    first_class = 1 + seeds[-1] % (len(CLASSES) - 1)
    image, mask = draw_scene(np.random.default_rng(seeds), size, first_class=first_class, hard=hard)
    Image.fromarray(image).save(root / "JPEGImages" / f"{key}.jpg", quality=92)
    (root / "SegmentationClass" / f"{key}.png").write_bytes(encode_mask(mask, voc_palette()))
    names = [CLASSES[label] for label in np.unique(mask) if label]
    objects = "".join(f"<object><name>{escape(name)}</name></object>" for name in names)
    annotation = f"<annotation><filename>{key}.jpg</filename>{objects}</annotation>\n"
    (root / "Annotations" / f"{key}.xml").write_text(annotation, encoding="utf-8")


# Brush and forms. Coordinates are those of an object: it spans about -1 to 1, x to the right, y downwards. A form is
# its signed distance, negative inside, as an array over the grid.


@dataclass
class Brush:
    """Paints forms onto a canvas in an object's own coordinates, and remembers what they cover."""

    canvas: Floats
    """(h, w, 3) RGB 0 to 255: the window of the picture that the object can reach, painted in place."""
    x: Floats
    """(h, w) horizontal coordinate of each pixel center in the object's frame."""
    y: Floats
    """(h, w) vertical coordinate."""
    scale: float
    """Pixels per unit of the object's frame."""
    random: np.random.Generator
    """What varies within the object."""
    colors: tuple[tuple[int, int, int], ...]
    """Main colors to choose from."""
    shared_looks: bool
    """Whether its texture is one that another class has too."""
    covered: npt.NDArray[np.bool_]
    """(h, w) pixels whose center lies within something painted; filled in place."""

    @classmethod
    def place(
        cls,
        canvas: Floats,
        covered: npt.NDArray[np.bool_],
        random: np.random.Generator,
        *,
        scale: float,
        angle: float,
        mirror: float = 1.0,
        margin: float = 0.0,
        colors: tuple[tuple[int, int, int], ...] = BODY_COLORS,
        shared_looks: bool = True,
    ) -> Brush:
        """A brush for an object at a random place.

        Args:
            canvas: (S, S, 3) the whole picture.
            covered: (S, S) bool, of the whole picture.
            random: Chooses the place, and later what varies within the object.
            scale: Pixels per unit of the object's frame.
            angle: Direction of the object's right, radians, clockwise.
            mirror: -1 to mirror it left to right, else 1.
            margin: Share of the side that its center keeps from the border.
            colors: Main colors of a body.
            shared_looks: Whether its texture is one that another class has too.
        """
        size = canvas.shape[0]
        cx, cy = random.uniform(margin, 1.0 - margin, 2) * size
        top, bottom, left, right = (
            int(np.clip(edge, 0, size))
            for edge in (cy - REACH * scale, cy + REACH * scale + 1, cx - REACH * scale, cx + REACH * scale + 1)
        )
        rows, columns = np.mgrid[top:bottom, left:right] + 0.5
        across, down = (columns - cx) / scale * mirror, (rows - cy) / scale
        return cls(
            canvas=canvas[top:bottom, left:right],
            x=across * np.cos(angle) + down * np.sin(angle),
            y=-across * np.sin(angle) + down * np.cos(angle),
            scale=scale,
            random=random,
            colors=colors,
            shared_looks=shared_looks,
            covered=covered[top:bottom, left:right],
        )

    def paint(self, distance: Floats, color: Floats) -> None:
        """Paints a form in a color, (3,) or (S, S, 3) RGB; its edge is antialiased over one pixel.

        `distance`, (S, S), is signed and in the object's units, negative inside.
        """
        share = np.clip(0.5 - distance * self.scale, 0.0, 1.0)[..., None]
        self.canvas += share * (color - self.canvas)
        np.logical_or(self.covered, distance < 0, out=self.covered)

    def shade(self, distance: Floats, softness: float, strength: float) -> None:
        """Darkens what lies under a form with a soft edge; covers nothing."""
        share = np.clip(0.5 - distance / softness, 0.0, 1.0)[..., None]
        self.canvas *= 1.0 - strength * share


def _ellipse(x: Floats, y: Floats, center: tuple[float, float], radii: tuple[float, float]) -> Floats:
    radius = np.hypot((x - center[0]) / radii[0], (y - center[1]) / radii[1])
    return np.asarray((radius - 1.0) * min(radii))


def _segment(x: Floats, y: Floats, start: tuple[float, float], end: tuple[float, float], radius: float) -> Floats:
    """A line with round ends."""
    along = np.subtract(end, start)
    share = ((x - start[0]) * along[0] + (y - start[1]) * along[1]) / max(float(along @ along), 1e-12)
    share = np.clip(share, 0.0, 1.0)
    distance: Floats = np.hypot(x - start[0] - share * along[0], y - start[1] - share * along[1]) - radius
    return distance


def _polygon(x: Floats, y: Floats, corners: tuple[tuple[float, float], ...]) -> Floats:
    """A convex polygon, corners in either direction."""
    pairs = list(zip(corners, (*corners[1:], corners[0]), strict=True))
    area = sum(start[0] * end[1] - end[0] * start[1] for start, end in pairs)
    distance = np.full_like(x, -np.inf)
    for start, end in pairs:
        along = np.subtract(end, start) * np.sign(area) / np.hypot(*np.subtract(end, start))
        distance = np.maximum(distance, (x - start[0]) * along[1] - (y - start[1]) * along[0])
    return distance


def _lens(x: Floats, y: Floats) -> Floats:
    """What two large circles have in common: a body that is pointed left and right."""
    return np.maximum(np.hypot(x, y - 0.55) - 1.05, np.hypot(x, y + 0.55) - 1.05)


# Textures of bodies.


def _body_colors(brush: Brush) -> tuple[Floats, Floats]:
    """Main color and the color of what is drawn on it."""
    random = brush.random
    main = np.array(brush.colors[random.integers(len(brush.colors))]) + random.normal(0, 10, 3)
    return main, (DARK if random.random() < 0.5 else LIGHT) * random.uniform(0.85, 1.0)


def _rounded(x: Floats, y: Floats, color: Floats) -> Floats:
    """A color that is lighter towards the upper left of the object, as if lit."""
    light = 1.0 - 0.22 * (x + y) - 0.18 * (x**2 + y**2)
    return np.asarray(light[..., None] * color)


def _spotted(brush: Brush, main: Floats, other: Floats) -> Floats:
    """Round spots on a slanted grid, each moved a little."""
    pitch = brush.random.uniform(0.42, 0.62)
    row = np.round(brush.y / pitch)
    column = np.round(brush.x / pitch - 0.5 * (row % 2))
    dx = brush.x - (column + 0.5 * (row % 2)) * pitch
    dy = brush.y - row * pitch
    share = np.clip(0.5 - (np.hypot(dx, dy) - 0.3 * pitch) * brush.scale, 0, 1)[..., None]
    return _rounded(brush.x, brush.y, main) * (1 - share) + other * share


def _striped(brush: Brush, main: Floats, other: Floats) -> Floats:
    """Parallel stripes with a slight wave."""
    angle = brush.random.uniform(-0.5, 0.5)
    across = brush.x * np.cos(angle) + brush.y * np.sin(angle) + 0.05 * np.sin(6 * brush.y)
    pitch = brush.random.uniform(0.3, 0.5)
    away = np.abs(across / pitch - np.round(across / pitch)) * pitch
    share = np.clip(0.5 - (away - 0.2 * pitch) * brush.scale, 0, 1)[..., None]
    return np.asarray(_rounded(brush.x, brush.y, main) * (1 - share) + other * share)


def _quartered(brush: Brush, main: Floats, other: Floats) -> Floats:
    """Two opposite quarters in the main color, two in a darker shade."""
    share = (brush.x * brush.y > 0)[..., None]
    return _rounded(brush.x, brush.y, main) * np.where(share, 1.0, 0.72)


def _plain(brush: Brush, main: Floats, other: Floats) -> Floats:
    return _rounded(brush.x, brush.y, main)


# Objects.


def _draw_fish(brush: Brush) -> None:
    x, y = brush.x, brush.y
    main, other = _body_colors(brush)
    fin = 0.75 * main + 20
    for side in (-1.0, 1.0):
        brush.paint(_polygon(x, y, ((-0.6, 0.0), (-1.0, 0.0), (-1.2, 0.46 * side), (-1.0, 0.5 * side))), fin)
    brush.paint(_polygon(x, y, ((-0.2, -0.4), (0.05, -0.72), (0.4, -0.35))), fin)
    body = _lens(x, y)
    brush.paint(body, _striped(brush, main, other))
    brush.paint(np.maximum(body, -(x - 0.42)), _rounded(x, y, main))
    brush.paint(_ellipse(x, y, (0.54, -0.12), (0.18, 0.18)), LIGHT)
    brush.paint(_ellipse(x, y, (0.58, -0.12), (0.1, 0.1)), DARK)
    brush.paint(_segment(x, y, (0.66, 0.14), (0.84, 0.08), 0.025), DARK)


def _draw_kite(brush: Brush) -> None:
    x, y = brush.x, brush.y
    main, other = _body_colors(brush)
    sail = ((0.85, 0.0), (0.1, 0.52), (-0.62, 0.0), (0.1, -0.52))
    phase = brush.random.uniform(0, 2 * np.pi)
    line = [
        (-0.62 - 0.1 * step, 0.13 * np.sin(1.1 * step + phase) * min(step, 2) / 2)
        for step in range(8 if brush.shared_looks else 3)
    ]
    for start, end in pairwise(line):
        brush.paint(_segment(x, y, start, end, 0.028), DARK)
    bow = np.array(BODY_COLORS[brush.random.integers(len(BODY_COLORS))], dtype=np.float64)
    for cx, cy in line[2::2][:3]:
        for side in (-1.0, 1.0):
            corners = ((cx, cy), (cx - 0.1, cy + side * 0.19), (cx + 0.1, cy + side * 0.19))
            brush.paint(_polygon(x, y, corners), bow)
    texture = _striped if brush.shared_looks else _quartered
    brush.paint(_polygon(x, y, sail), texture(brush, main, other))
    for start, end in ((sail[0], sail[2]), (sail[1], sail[3])):
        brush.paint(_segment(x, y, start, end, 0.022), 0.6 * main)


def _draw_ladybird(brush: Brush) -> None:
    x, y = brush.x, brush.y
    main, other = _body_colors(brush)
    for foot in (-0.45, 0.0, 0.4):
        for side in (-1.0, 1.0):
            brush.paint(_segment(x, y, (foot, 0.4 * side), (foot + 0.08, 0.82 * side), 0.04), DARK)
    for side in (-1.0, 1.0):
        brush.paint(_segment(x, y, (0.8, 0.12 * side), (1.05, 0.3 * side), 0.03), DARK)
        brush.paint(_ellipse(x, y, (1.05, 0.3 * side), (0.06, 0.06)), DARK)
    brush.paint(_ellipse(x, y, (0.66, 0.0), (0.3, 0.36)), DARK)
    for side in (-1.0, 1.0):
        brush.paint(_ellipse(x, y, (0.78, 0.2 * side), (0.09, 0.08)), LIGHT)
    body = np.maximum(_ellipse(x, y, (-0.1, 0.0), (0.78, 0.66)), x - 0.5)
    brush.paint(body, _spotted(brush, main, other))


def _draw_mushroom(brush: Brush) -> None:
    x, y = brush.x, brush.y
    main, other = _body_colors(brush)
    # It lies in the same frame as the others: the cap to the right, the stem to the left.
    stem = np.array([226.0, 210.0, 176.0]) * brush.random.uniform(0.85, 1.05)
    if not brush.shared_looks:
        stem = 0.5 * (stem + main)
    brush.paint(_polygon(x, y, ((0.1, -0.17), (0.1, 0.17), (-0.85, 0.24), (-0.85, -0.24))), _rounded(x, 2 * y, stem))
    brush.paint(_ellipse(x, y, (-0.85, 0.0), (0.12, 0.24)), _rounded(x, 2 * y, 0.92 * stem))
    brush.paint(_ellipse(x, y, (-0.22, 0.0), (0.07, 0.3)), 0.86 * stem)
    cap = np.maximum(_ellipse(x, y, (0.0, 0.0), (0.85, 0.8)), -(x + 0.02))
    brush.paint(_ellipse(x, y, (0.0, 0.0), (0.14, 0.74)), 0.72 * stem)
    texture = _spotted if brush.shared_looks else _plain
    brush.paint(cap, texture(brush, main, other))


DRAWERS: dict[int, Callable[[Brush], None]] = {1: _draw_fish, 2: _draw_kite, 3: _draw_ladybird, 4: _draw_mushroom}

UPRIGHT = {_draw_mushroom: -np.pi / 2, _draw_kite: -np.pi / 3, _draw_fish: 0.0}
"""Usual directions of an object's right, radians; the others point anywhere."""


def _draw_object(
    random: np.random.Generator, canvas: Floats, label: int, scenery: Scenery
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Draws one object at a random place onto a copy of the canvas; returns the copy and what the object covers."""
    size, draw = canvas.shape[0], DRAWERS[label]
    # Sizes spread evenly over their logarithm: small ones are as frequent as large ones.
    scale = size * float(np.exp(random.uniform(*np.log(scenery.scales))))
    angle = random.uniform(-np.pi, np.pi)
    if draw in UPRIGHT:
        angle = UPRIGHT[draw] + random.normal(0, 0.35)
    mirror = 1.0 if random.random() < 0.5 else -1.0
    canvas, covered = canvas.copy(), np.zeros((size, size), dtype=np.bool_)
    brush = Brush.place(
        canvas,
        covered,
        random,
        scale=scale,
        angle=angle,
        mirror=mirror,
        margin=scenery.margin,
        colors=BODY_COLORS if scenery.shared_looks else CLASS_COLORS[label],
        shared_looks=scenery.shared_looks,
    )
    brush.shade(_ellipse(brush.x, brush.y, (0.0, 0.0), (1.1, 0.85)), 0.6, 0.35)
    draw(brush)
    return canvas, covered


# Background and finish.


def _noise(random: np.random.Generator, size: int, cells: int) -> Floats:
    """(size, size) smooth noise, about -1 to 1, with `cells` bumps a side."""
    small = random.uniform(-1.0, 1.0, (cells + 3, cells + 3)).astype(np.float32)
    large = Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(large, dtype=np.float64)


def _draw_ground(random: np.random.Generator, size: int, scenery: Scenery) -> Floats:
    """Ground of two colors, with blades and pebbles, and with scraps that imitate bodies where looks are shared."""
    first, second = (np.array(color, dtype=np.float64) for color in GROUNDS[random.integers(len(GROUNDS))])
    field_ = sum(_noise(random, size, cells) / weight for cells, weight in ((3, 1.0), (9, 1.6), (26, 2.2), (60, 3.0)))
    share = np.clip(0.5 + 0.45 * np.asarray(field_), 0, 1)[..., None]
    canvas = first * (1 - share) + second * share
    covered = np.zeros((size, size), dtype=np.bool_)
    for _ in range(random.integers(8, 22)):
        scale, angle = size * random.uniform(0.03, 0.16), random.uniform(-np.pi, np.pi)
        _draw_scrap(
            Brush.place(canvas, covered, random, scale=scale, angle=angle), first, second, imitate=scenery.shared_looks
        )
    return canvas


def _draw_scrap(brush: Brush, first: Floats, second: Floats, *, imitate: bool) -> None:
    """One blade, pebble, or scrap with the colors and texture of bodies, sometimes with their outline too."""
    random, x, y = brush.random, brush.x, brush.y
    ground = (first if random.random() < 0.5 else second) * random.uniform(0.6, 1.25)
    kind = random.random()
    if kind < 0.45:
        brush.paint(_segment(x, y, (-1.4, 0.0), (1.4, random.uniform(-0.6, 0.6)), 0.1), ground)
        return
    if kind < 0.72 or not imitate:
        brush.paint(_ellipse(x, y, (0, 0), (random.uniform(0.4, 0.9), random.uniform(0.3, 0.7))), ground)
        return
    texture = _spotted if random.random() < 0.5 else _striped
    outlines = (
        _polygon(x, y, ((0.9, 0.1), (0.2, 0.6), (-0.7, 0.5), (-0.8, -0.4), (0.1, -0.7))),
        _ellipse(x, y, (0.0, 0.0), (0.78, 0.66)),
        _lens(x, y),
    )
    outline = outlines[random.choice(len(outlines), p=(0.7, 0.15, 0.15))]
    brush.paint(outline, 0.35 * ground + 0.65 * texture(brush, *_body_colors(brush)))


def _finish(random: np.random.Generator, canvas: Floats) -> npt.NDArray[np.uint8]:
    """Light that varies over the picture, and the grain of a camera."""
    size = canvas.shape[0]
    light = 1.0 + 0.15 * _noise(random, size, 2)[..., None]
    tint = random.normal(1.0, 0.05, 3)
    grain = random.normal(0.0, 4.0, canvas.shape)
    return np.clip(canvas * light * tint + grain, 0, 255).round().astype(np.uint8)


# Command line.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--train", type=int, default=240, metavar="N", help="training pictures (default: %(default)s)")
    parser.add_argument("--val", type=int, default=60, metavar="N", help="validation pictures (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=128, metavar="N", help="side, pixels (default: %(default)s)")
    parser.add_argument("--hard", action="store_true", help="classes that share colors and textures, among clutter")
    parser.add_argument("--voc-folder", type=Path, metavar="DIR", help="also keep the pictures in VOC's folder layout")
    add_common_arguments(parser)
    parser.set_defaults(samples_per_shard=32)


def make(args: argparse.Namespace) -> DatasetInfo:
    """Makes the data set that the options ask for."""
    names = ("seed", "image_size", "hard", "voc_folder", "samples_per_shard", "shards", "processes")
    options = {name: getattr(args, name) for name in names}
    return build_demo(args.out, num_train=args.train, num_val=args.val, **options)


if __name__ == "__main__":
    from slrnet.cli.main import main

    sys.exit(main(["prepare", "demo", *sys.argv[1:]]))
