"""Kernels: compiled programs that sum over rows on a worker, and the sums they return."""
