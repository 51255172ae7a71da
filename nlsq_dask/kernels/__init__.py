"""Kernels: compiled programs that run on a worker, sum over rows, and return the sums."""
