"""One fit: its arguments, its four phases, the passes over all rows, and its outcome."""
