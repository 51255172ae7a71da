"""Options of a fit, the rules for their values, and presets."""

from nlsq_dask.config.options import HybridStreamingConfig

__all__ = ["HybridStreamingConfig"]
