"""The engine: where a fit runs Dask. One task a block group, a fixed tree of sums."""
