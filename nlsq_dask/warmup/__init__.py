"""Phases 0 and 1: normalized parameters, multistart and L-BFGS on the sample."""
