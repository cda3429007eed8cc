"""Logs an exported network as a model of MLflow."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from slrnet.tracking.location import public
from slrnet.tracking.mlflow import client_of, load_mlflow, store_errors
from slrnet.tracking.protocol import RunHandle
from slrnet.tracking.provenance import package_version

__all__ = ["log_onnx_model"]


def log_onnx_model(handle: RunHandle, name: str, file: Path) -> str:
    """Logs an ONNX file as an MLflow model, with its inputs' and outputs' names, types and open sizes as signature.

    Args:
        handle: the run that gets the model.
        name: the model's name, which becomes a folder of the run's artifacts: letters, digits and `_ - .`.
        file: the ONNX file; MLflow stores a copy.

    Returns:
        The model's URI for `mlflow models serve -m URI`, with the store as MLFLOW_TRACKING_URI.

    Raises:
        ValueError: the name is not usable, or the store refuses the model.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name):
        raise ValueError(f"model name {name!r} is not usable; allowed are up to 100 letters, digits and _ - .")
    import onnx

    mlflow, model = load_mlflow(), onnx.load(file)
    signature = mlflow.models.ModelSignature(_schema(model.graph.input), _schema(model.graph.output))
    pins = [f"{package}=={package_version(package)}" for package in ("mlflow", "onnx", "onnxruntime")]
    with tempfile.TemporaryDirectory() as folder:
        mlflow.onnx.save_model(model, f"{folder}/{name}", signature=signature, pip_requirements=pins)
        try:
            client_of(handle.uri).log_artifacts(handle.run_id, folder, "models")
        except store_errors() as error:
            raise ValueError(f"the tracking store {public(handle.uri)} refused the model: {error}") from error
    return f"runs:/{handle.run_id}/models/{name}"


def _schema(values: Any) -> Any:
    types = load_mlflow().types
    shapes = {value.name: [side.dim_value or -1 for side in value.type.tensor_type.shape.dim] for value in values}
    return types.Schema([types.TensorSpec(np.dtype(np.float32), shape, name) for name, shape in shapes.items()])
