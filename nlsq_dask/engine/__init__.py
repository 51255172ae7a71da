"""The engine runs a fit on Dask: one task per block group, a fixed tree of sums."""
