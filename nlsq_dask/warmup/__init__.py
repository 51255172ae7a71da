"""Phases 0 and 1 of a fit: normalization of parameters; multistart and L-BFGS on a sample."""
