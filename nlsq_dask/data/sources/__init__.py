"""Conversion of x, y and sigma to Dask arrays, with one module per kind of array."""
