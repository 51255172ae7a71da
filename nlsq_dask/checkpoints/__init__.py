"""Checkpoints: the state of a fit on disk. Loading one executes no code."""
