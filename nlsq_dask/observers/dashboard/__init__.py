"""A live page on the dashboard of a cluster, and Prometheus metrics."""
