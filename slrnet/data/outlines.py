"""Outlines of the regions of a mask, for tools that draw polygons.

Borders run along the edges of pixels: the pixel of column x and row y is the square from (x, y) to (x + 1, y + 1). So
the polygons hold exactly the pixels of their class. Neighboring regions share their borders, and simplified ones still
do: no gap opens between two classes. Needs shapely, of the extra `coco`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = ["Ring", "outlines_of"]

Ring = npt.NDArray[np.float64]
"""(P, 2) x and y of the corners of a polygon without holes, pixels, each once."""
_Edges = npt.NDArray[np.bool_]


def outlines_of(mask: npt.NDArray[np.uint8], *, tolerance: float = 0.0) -> dict[int, list[Ring]]:
    """Polygons of every id in a mask, its parts from top to bottom.

    No polygon has a hole: a region around another one is cut above and below it. Pixels that touch at a corner alone
    are parts of their own.

    Args:
        mask: (H, W) uint8 ids.
        tolerance: how much a border may move, >= 0, pixels: corners of triangles of less than the tolerance's square
            are dropped (Visvalingam-Whyatt); 0 keeps every pixel. The image's edge stays.

    Returns:
        For each id that occurs, ascending, the polygons that cover its pixels and do not overlap.
    """
    import shapely

    rows, columns = _borders(mask)
    for place in _ends_of_islands(_lines(rows, columns)):
        _cut(rows, columns, *place)
    lines = shapely.linestrings(_lines(rows, columns).astype(np.float64))
    faces = shapely.get_parts(shapely.polygonize(lines))
    corners, face_of = shapely.get_coordinates(faces, return_index=True)
    order = np.lexsort((corners[:, 0], corners[:, 1], face_of))
    first = corners[order[np.unique(face_of[order], return_index=True)[1]]].astype(int)  # its pixel is inside
    ids = mask[first[:, 1], first[:, 0]]
    if tolerance > 0:
        faces = shapely.coverage_simplify(faces, tolerance, simplify_boundary=False)
    rings: dict[int, list[Ring]] = {int(i): [] for i in np.unique(ids)}
    for face in np.lexsort((first[:, 0], first[:, 1])):
        rings[int(ids[face])].append(shapely.get_coordinates(faces[face])[:-1])
    return rings


def _borders(mask: npt.NDArray[np.uint8]) -> tuple[_Edges, _Edges]:
    """Edges between pixels of different ids: (H + 1, W) horizontal ones, and (H, W + 1) vertical ones."""
    padded = np.pad(mask.astype(np.int16), 1, constant_values=-1)
    return padded[1:, 1:-1] != padded[:-1, 1:-1], padded[1:-1, 1:] != padded[1:-1, :-1]


def _lines(rows: _Edges, columns: _Edges) -> npt.NDArray[np.int64]:
    """(N, 2, 2) first and last x and y of the lines of edges; a line ends where it turns or meets another."""
    left, right = np.pad(rows, ((0, 0), (1, 0))), np.pad(rows, ((0, 0), (0, 1)))
    above, below = np.pad(columns, ((1, 0), (0, 0))), np.pad(columns, ((0, 1), (0, 0)))
    level, upright = left & right & ~above & ~below, above & below & ~left & ~right
    across = np.stack([np.argwhere(right & ~level), np.argwhere(left & ~level)], axis=1)[..., ::-1]
    down = np.stack([np.argwhere((below & ~upright).T), np.argwhere((above & ~upright).T)], axis=1)
    return np.concatenate([across, down])


def _ends_of_islands(lines: npt.NDArray[np.int64]) -> list[tuple[int, int, bool]]:
    """Finds x and y of a highest corner and of a lowest one (True) of all borders apart from the image's edge.

    Borders that cross at a corner end there: a region that touches itself around others has to be cut as well.
    """
    numbers = lines.reshape(-1, 2) @ np.array([1 << 32, 1])  # one for each corner, that of the first corner is 0
    _, ends, degrees = np.unique(numbers, return_inverse=True, return_counts=True)
    numbers = np.where(degrees[ends] == 4, -1 - np.arange(len(ends)), numbers)
    _, one, ends = np.unique(numbers.view(np.uint64), return_index=True, return_inverse=True)
    corners, (first, last) = lines.reshape(-1, 2)[one], ends.reshape(-1, 2).T
    links = coo_array((np.ones(len(first), dtype=np.bool_), (first, last)), shape=(len(one), len(one)))
    island = connected_components(links, directed=False)[1]  # that of the image's edge has the first corner, so 0
    places = []
    for lowest in (False, True):
        order = np.lexsort((corners[:, 0], -corners[:, 1] if lowest else corners[:, 1], island))
        found = corners[order[np.unique(island[order], return_index=True)[1]]][1:]
        places += [(x, y, lowest) for x, y in found.tolist()]
    return places


def _cut(rows: _Edges, columns: _Edges, column: int, row: int, downward: bool) -> None:
    """Draws a line from a corner of an island straight to the next border, through the region around the island."""
    borders = np.flatnonzero(rows[:, column - 1] | rows[:, column])
    place = int(borders.searchsorted(row))
    start, stop = (row, borders[place + 1]) if downward else (borders[place - 1], row)
    columns[start:stop, column] = True
