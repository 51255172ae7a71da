"""The kernels: sums over blocks of rows, as programs that a worker runs, and what they return."""
