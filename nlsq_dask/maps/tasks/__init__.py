"""Functions of the Dask tasks of tiles."""
