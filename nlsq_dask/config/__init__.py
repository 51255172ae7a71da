"""The options of a fit: their defaults, rules and documentation, and the presets."""

from nlsq_dask.config.options import HybridStreamingConfig

__all__ = ["HybridStreamingConfig"]
