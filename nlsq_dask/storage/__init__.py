"""Storage of records as files, for checkpoints and results; loading never runs code."""
