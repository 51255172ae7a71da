"""The Zarr store of a map, to which tiles are written as they finish."""
