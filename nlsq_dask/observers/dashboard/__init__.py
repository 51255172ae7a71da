"""The page on the Dask dashboard that shows the fits of a cluster, and metrics for Prometheus."""
