"""Records as bytes, bytes as files: for checkpoints and results; nothing in them is code."""
