"""Plots of a ``FitResult``; matplotlib is imported only when a plot is drawn."""
