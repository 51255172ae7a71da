"""Conversion of the arguments of ``scipy.optimize.curve_fit`` to those of ``fit``."""
