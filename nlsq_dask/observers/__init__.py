"""Observers of a fit: progress, logs, counters and a dashboard page."""
