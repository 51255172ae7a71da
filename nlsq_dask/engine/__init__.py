"""The engine: the only place where Dask runs. One task a block group, a fixed tree of sums."""
