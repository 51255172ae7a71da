"""Nonlinear least squares over data larger than memory, on Dask and JAX."""

from nlsq_dask import accessor as accessor  # registers ``.nlsq``
from nlsq_dask._version import __version__
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.curve_fit import curve_fit
from nlsq_dask.curvefit import curvefit
from nlsq_dask.errors import (
    BlockReadError,
    CheckpointError,
    ClusterLostError,
    DataError,
    DataWarning,
    DeviceMemoryError,
    FitInProgressError,
    MissingChunksWarning,
    ModelError,
    NonFiniteDataError,
    PixelFitError,
    ResultFileError,
)
from nlsq_dask.maps.problem.plan import MapPlan
from nlsq_dask.maps.results.plotting import plot_map
from nlsq_dask.maps.results.predict import predict_each
from nlsq_dask.maps.results.statuses import status_table
from nlsq_dask.observers.dashboard.metrics import metrics_collector
from nlsq_dask.observers.telemetry import (
    DefenseLayerTelemetry,
    get_defense_telemetry,
    reset_defense_telemetry,
)
from nlsq_dask.optimizer import AdaptiveHybridStreamingOptimizer
from nlsq_dask.plan import Plan
from nlsq_dask.results.result import FitResult
from nlsq_dask.warmup.normalize import NormalizedModelWrapper, ParameterNormalizer

__all__ = [
    "__version__",
    "AdaptiveHybridStreamingOptimizer",
    "BlockReadError",
    "CheckpointError",
    "ClusterLostError",
    "DataError",
    "DataWarning",
    "DeviceMemoryError",
    "DefenseLayerTelemetry",
    "FitInProgressError",
    "FitResult",
    "HybridStreamingConfig",
    "MapPlan",
    "MissingChunksWarning",
    "ModelError",
    "NonFiniteDataError",
    "NormalizedModelWrapper",
    "ParameterNormalizer",
    "PixelFitError",
    "Plan",
    "ResultFileError",
    "curve_fit",
    "curvefit",
    "get_defense_telemetry",
    "metrics_collector",
    "plot_map",
    "predict_each",
    "reset_defense_telemetry",
    "status_table",
]
