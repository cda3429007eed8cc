"""Operators on maps and their kernels."""
