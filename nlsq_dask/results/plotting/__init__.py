"""Plots of a result; matplotlib is imported only when a plot is drawn."""
