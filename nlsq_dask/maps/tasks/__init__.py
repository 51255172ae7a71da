"""What the Dask tasks of tiles do."""
