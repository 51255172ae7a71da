"""Options of a fit, their rules, and presets."""

from nlsq_dask.config.options import HybridStreamingConfig

__all__ = ["HybridStreamingConfig"]
