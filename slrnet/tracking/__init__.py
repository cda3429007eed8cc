"""Curves, pictures, logs and progress of a run. Only `mlflow.py` imports MLflow and only `gpu_monitor.py` NVML."""
