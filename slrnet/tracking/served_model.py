"""The model that `mlflow models serve` serves. MLflow copies this file and runs it without slrnet.

Requests that the network is not made for are answered with status 400 and the reason.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

__all__ = ["ServedNetwork", "checked"]

MOST_IMAGES, MOST_SIDE, MOST_PIXELS = 64, 4096, 2**24
"""Of a request; each pixel takes some kilobytes of memory for a moment."""


class ServedNetwork(PythonModel):
    """An exported network, `network.onnx`."""

    def load_context(self, context: Any) -> None:
        """Opens the file."""
        self.session = onnxruntime.InferenceSession(context.artifacts["network"], providers=["CPUExecutionProvider"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def] # MLflow warns of types
        """The outputs by name, for a batch of images."""
        outputs = self.session.run(None, {"images": checked(model_input)})
        return dict(zip((output.name for output in self.session.get_outputs()), outputs, strict=True))


def checked(given: Any) -> npt.NDArray[np.float32]:
    """The images of a request, (N, 3, H, W) float32 in [0, 1].

    Raises:
        MlflowException: they are something else; the status is 400.
    """
    images = given.get("images") if isinstance(given, dict) else None
    if not isinstance(images, np.ndarray) or images.dtype.kind not in "fiu":
        raise _refused('the inputs are no numbers by the name "images"')
    if images.ndim != 4 or images.shape[1] != 3:
        raise _refused(f"images have the shape {images.shape}; (N, 3, H, W) is needed")
    count, _, height, width = images.shape
    if not (1 <= count <= MOST_IMAGES and 1 <= height <= MOST_SIDE and 1 <= width <= MOST_SIDE):
        raise _refused(
            f"there are {count} images of {width} x {height}; 1 to {MOST_IMAGES} of up to {MOST_SIDE} pixels "
            "a side are taken"
        )
    if images.size // 3 > MOST_PIXELS:
        raise _refused(f"the images have {images.size // 3:,} pixels; up to {MOST_PIXELS:,} in a request are taken")
    if not np.isfinite(images).all() or images.min() < 0 or images.max() > 1:
        raise _refused("values are not in 0 to 1, or not finite; divide 8-bit values by 255")
    return images.astype(np.float32, copy=False)


def _refused(reason: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(reason)


set_model(ServedNetwork())
