"""One fit: the problem, its four phases, the passes over all rows, and what they find."""
