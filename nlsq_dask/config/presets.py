"""Presets of ``HybridStreamingConfig``: named sets of options that differ from the defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nlsq_dask.config.options import HybridStreamingConfig

# By the name of the preset: its summary, and the options that it sets.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "aggressive": (
        "Favor speed: a short warm-up, a looser tolerance and large batches.",
        {
            "chunk_size": 2**21,
            "warmup_iterations": 50,
            "max_warmup_iterations": 100,
            "loss_plateau_threshold": 5e-4,
            "gradient_norm_threshold": 5e-3,
            "gauss_newton_tol": 1e-7,
        },
    ),
    "conservative": (
        "Favor precision: a tighter tolerance, more iterations and a smaller first step.",
        {
            "warmup_iterations": 30,
            "max_warmup_iterations": 80,
            "loss_plateau_threshold": 1e-5,
            "gradient_norm_threshold": 1e-4,
            "gauss_newton_tol": 1e-10,
            "gauss_newton_max_iterations": 200,
            "trust_region_initial": 0.5,
        },
    ),
    "memory_optimized": (
        "Favor low memory: small batches, float32, no cache, earlier use of conjugate gradients.",
        {
            "chunk_size": 2**17,
            "precision": "float32",
            "cache": 0,
            "warmup_iterations": 40,
            "max_warmup_iterations": 100,
            "checkpoint_frequency": 50,
            "cg_param_threshold": 1000,
        },
    ),
    "defense_strict": (
        "Take short warm-up steps, for starts close to the solution.",
        {
            "max_warmup_step_size": 0.05,
            "warmup_iterations": 25,
            "max_warmup_iterations": 60,
        },
    ),
    "defense_relaxed": (
        "Take long warm-up steps, tolerate more growth of the loss, skip the warm-up more often.",
        {
            "warm_start_threshold": 0.5,
            "cost_increase_tolerance": 0.5,
            "max_warmup_step_size": 0.5,
            "warmup_iterations": 50,
            "max_warmup_iterations": 120,
        },
    ),
    "defense_disabled": (
        "Disable all four defense layers of the warm-up, which guard against bad steps.",
        {
            "enable_warm_start_detection": False,
            "enable_adaptive_warmup_lr": False,
            "enable_cost_guard": False,
            "enable_step_clipping": False,
        },
    ),
    "scientific_default": (
        "Favor results for publication: a tight tolerance and up to 200 Gauss-Newton iterations.",
        {
            "warm_start_threshold": 0.05,
            "cost_increase_tolerance": 0.2,
            "warmup_iterations": 35,
            "max_warmup_iterations": 100,
            "gauss_newton_tol": 1e-10,
            "gauss_newton_max_iterations": 200,
        },
    ),
}


def preset(name: str) -> classmethod[HybridStreamingConfig, ..., HybridStreamingConfig]:
    """Return a class method that constructs the options of a preset."""
    summary, values = PRESETS[name]

    def construct(cls: type[HybridStreamingConfig], /, **overrides: Any) -> HybridStreamingConfig:
        return cls(**(values | overrides))

    settings = ",\n        ".join(f"``{option}={value!r}``" for option, value in values.items())
    construct.__name__, construct.__qualname__ = name, f"HybridStreamingConfig.{name}"
    construct.__doc__ = f"""{summary}

        Sets {settings}.

        Parameters
        ----------
        **overrides
            Options by name. They override the options of the preset.

        Returns
        -------
        HybridStreamingConfig
        """
    return classmethod(construct)
