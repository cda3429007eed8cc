"""Curves, pictures and logs of a run; MLflow is behind `mlflow.py`, NVML behind `gpu_monitor.py`."""
