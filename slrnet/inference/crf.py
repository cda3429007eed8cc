"""Refines masks with the dense CRF of the protocol `ms_crf` (Kraehenbuehl and Koltun 2011).

It makes masks follow the edges of the image. The package pydensecrf2 (the extra `crf`) computes it on the CPU, one core
per image, in helper processes beside the network.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from slrnet.config import CrfConfig
from slrnet.data.processes import end_with, helper_context

__all__ = ["crf_masks", "dense_crf", "require_crf"]

Key = TypeVar("Key")
_Masked = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]
PROBABILITY_FLOOR = 1e-5
"""Lower probabilities are raised to it before the logarithm, as in pydensecrf's own helper."""


def require_crf() -> None:
    """Checks that the extra is installed.

    Raises:
        ValueError: it is missing; the message says how to install it.
    """
    if find_spec("pydensecrf") is None:
        raise ValueError(
            "protocol ms_crf needs pydensecrf2, which is not installed; run `pip install 'slrnet[crf]'` (it is built "
            "with a C compiler in about two minutes), or use the protocol ms"
        )


def dense_crf(image: npt.NDArray[np.uint8], probs: npt.NDArray[np.float32], config: CrfConfig) -> npt.NDArray[Any]:
    """Refines the probabilities of one image (H, W, 3) uint8.

    They are (K, H, W) float32 in [0, 1], as the result; a class that is 0 everywhere cannot come back.

    Raises:
        ValueError: the extra is missing, or the sizes differ.
    """
    require_crf()
    from pydensecrf.densecrf import DenseCRF2D

    if image.shape[:2] != probs.shape[1:]:
        raise ValueError(f"image {image.shape} and probs {probs.shape} differ in size; resize the probs to the image")
    height, width = probs.shape[1:]
    possible = np.flatnonzero(probs.max(axis=(1, 2)) > 0)
    refined = np.zeros_like(probs, dtype=np.float32)
    if len(possible) < 2:
        refined[possible] = 1
        return refined
    field = DenseCRF2D(width, height, len(possible))
    energy = -np.log(np.clip(probs[possible], PROBABILITY_FLOOR, 1))
    field.setUnaryEnergy(np.ascontiguousarray(energy.reshape(len(possible), -1), dtype=np.float32))
    field.addPairwiseGaussian(sxy=config.smooth_xy, compat=config.smooth_weight)
    colors, spread = np.ascontiguousarray(image), {"sxy": config.appearance_xy, "srgb": config.appearance_rgb}
    field.addPairwiseBilateral(rgbim=colors, compat=config.appearance_weight, **spread)
    refined[possible] = np.array(field.inference(config.num_iters)).reshape(len(possible), height, width)
    return refined


def crf_masks(
    items: Iterable[tuple[Key, npt.NDArray[np.uint8], npt.NDArray[np.float32]]], config: CrfConfig, *, processes: int
) -> Iterator[tuple[Key, npt.NDArray[np.uint8], npt.NDArray[np.float32]]]:
    """Refines the masks of many images in one or more helper processes, while the caller prepares the next images.

    `items` has per image a key that comes back with the mask, the image, and its probabilities (see `dense_crf`).

    Yields:
        Key, (H, W) uint8 class ids and the (H, W) float32 probability of each pixel's class, in the order of the items.
    """
    require_crf()
    context = helper_context([__name__])
    with ProcessPoolExecutor(processes, mp_context=context, initializer=end_with, initargs=(os.getpid(),)) as pool:
        pending: deque[tuple[Key, Future[_Masked]]] = deque()
        for key, image, probs in items:
            possible = np.flatnonzero(probs.max(axis=(1, 2)) > 0).astype(np.uint8)  # the others are not sent
            pending.append((key, pool.submit(_mask, image, probs[possible], possible, config)))
            while len(pending) > 2 * processes or (pending and pending[0][1].done()):
                first, result = pending.popleft()
                yield first, *result.result()
        for key, result in pending:
            yield key, *result.result()


def _mask(
    image: npt.NDArray[np.uint8], probs: npt.NDArray[np.float32], classes: npt.NDArray[np.uint8], config: CrfConfig
) -> _Masked:
    refined = dense_crf(image, probs, config)
    return classes[refined.argmax(axis=0)], refined.max(axis=0)
