"""Solvers: request sums over the rows, and compute the next step from them."""
