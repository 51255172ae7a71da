"""The mathematics: pure functions on small immutable records; no Dask, files, clocks or logging."""
