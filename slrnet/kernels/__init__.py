"""Triton kernels; the torch form that each must equal stands in `models` or `calibration`."""
