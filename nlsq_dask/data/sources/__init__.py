"""The kinds of arrays that x, y and sigma may come as, one a file."""
