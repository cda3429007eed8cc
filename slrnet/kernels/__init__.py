"""Kernels in Triton for GPUs and in C for CPUs; the PyTorch form that each must equal stands where it is used."""
