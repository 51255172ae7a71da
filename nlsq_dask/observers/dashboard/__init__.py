"""A live page on the dashboard of a distributed cluster, and metrics for Prometheus."""
