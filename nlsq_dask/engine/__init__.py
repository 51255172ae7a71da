"""Sums over the data on Dask: one task per group of blocks, and a fixed tree that adds the sums."""
