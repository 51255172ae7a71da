"""Conversion of arrays of many kinds to Dask arrays with matching chunks, and sampling of rows."""
