"""What a served model answers to requests that it is not made for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs the extra `export`")

GOOD = np.full((2, 3, 4, 5), 0.5)


def test_images_are_taken() -> None:
    from slrnet.tracking.served_model import checked

    for images in (GOOD, GOOD.astype(np.float32), np.ones((1, 3, 1, 1), int)):
        assert checked({"images": images}).dtype == np.float32


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"images": GOOD * np.nan}, "not finite"),
        ({"images": GOOD * 255}, "divide 8-bit values by 255"),
        ({"images": -GOOD}, "values are not in 0 to 1"),
        ({"images": GOOD[0]}, r"shape \(3, 4, 5\)"),
        ({"images": GOOD[:, :1]}, r"shape \(2, 1, 4, 5\)"),
        ({"images": GOOD[:0]}, "there are 0 images"),
        ({"images": np.zeros((1, 3, 1, 5000))}, "5000 x 1"),
        ({"images": np.zeros((5, 3, 4000, 1000), np.float16)}, "20,000,000 pixels"),
        ({"images": np.array([["x"]])}, "no numbers"),
        ({"pictures": GOOD}, "no numbers"),
        (GOOD, "no numbers"),
    ],
)
def test_others_are_refused_with_the_reason(given: Any, reason: str) -> None:
    from mlflow.exceptions import MlflowException

    from slrnet.tracking.served_model import checked

    with pytest.raises(MlflowException, match=reason) as caught:
        checked(given)
    assert caught.value.get_http_status_code() == 400
