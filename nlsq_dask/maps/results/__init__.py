"""The Dataset of a map, with predictions, counts and plots of it."""
