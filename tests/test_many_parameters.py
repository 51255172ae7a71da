"""Conjugate gradients: as many parameters as a matrix of them would not fit for.

Compared with SciPy's sparse solution, and with the fit by matrices where that is possible, too.
"""

from __future__ import annotations

from typing import Any

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sparse
from distributed import Client
from scipy.optimize import OptimizeWarning
from scipy.sparse.linalg import spsolve

import nlsq_dask as nd
from nlsq_dask.data.sampling import plan_sample
from nlsq_dask.events import PassFinished
from nlsq_dask.solvers import probing
from nlsq_dask.solvers.conjugate_gradients import LinearSolve

Config = nd.HybridStreamingConfig


class Local:
    """Local amplitudes and offsets: ``a[g] exp(-x) + b[g]``, perhaps with one rate for all."""

    def __init__(self, n_groups: int, n_rows: int, rate: float | None = None, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.n_groups, self.rate = n_groups, rate
        self.group, self.t = rng.integers(0, n_groups, n_rows), rng.random(n_rows)
        self.x = np.column_stack([self.group, self.t])
        a, b = rng.uniform(1, 3, n_groups), rng.uniform(-1, 1, n_groups)
        decay = np.exp(-(1.0 if rate is None else rate) * self.t)
        noise = 0.1 * rng.standard_normal(n_rows)
        self.y = a[self.group] * decay + b[self.group] + noise
        self.start = np.ones(2 * n_groups + (rate is not None))

    def model(self, x: Any, *params: Any) -> Any:
        p, group = jnp.stack(params), x[:, 0].astype(int)
        rate = 1.0 if self.rate is None else p[-1]
        return p[group] * jnp.exp(-rate * x[:, 1]) + p[self.n_groups + group]

    def fit(self, chunk: int | None = None, **options: Any) -> nd.FitResult:
        own = ("sigma", "loss", "nan_policy", "callback")
        arguments = {k: options.pop(k) for k in own if k in options}
        options = {"verbose": 0, "cg_param_threshold": 10, "max_warmup_iterations": 30} | options
        x, y = options.pop("x", self.x), options.pop("y", self.y)
        if chunk is not None:
            x, y = da.from_array(x, (chunk, 2)), da.from_array(y, chunk)
        observers = options.pop("observers", ())
        optimizer = nd.AdaptiveHybridStreamingOptimizer(Config(**options), observers=observers)
        return optimizer.fit(self.model, x, y, self.start, **arguments)

    def dense(self, **options: Any) -> nd.FitResult:
        return self.fit(cg_param_threshold=10**6, gauss_newton_tol=1e-12, **options)

    def sparse_solution(self) -> tuple[np.ndarray, Any]:
        n = len(self.y)
        rows = np.tile(np.arange(n), 2)
        columns = np.concatenate([self.group, self.n_groups + self.group])
        values = np.concatenate([np.exp(-self.t), np.ones(n)])
        jacobian = sparse.csr_matrix((values, (rows, columns)), (n, 2 * self.n_groups))
        gram = (jacobian.T @ jacobian).tocsc()
        return spsolve(gram, jacobian.T @ self.y), gram


@pytest.fixture(scope="module")
def local() -> Local:
    return Local(9, 20_000)  # the program of 20 groups takes twice as long to compile


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_thousand_parameters_and_a_million_rows() -> None:
    problem = Local(2_500, 1_000_000)
    result = problem.fit(100_000, cg_param_threshold=2_000, cache=0)
    expected, gram = problem.sparse_solution()
    assert result.success
    assert result.n_passes <= 60
    errors = 0.1 / np.sqrt(gram.diagonal())
    np.testing.assert_allclose(result.x, expected, rtol=1e-6, atol=1e-6)
    assert np.abs(result.x - expected).max() < 1e-4 * errors.min()
    assert result.pcov is None
    assert np.isnan(result.perr).all()


def test_linear_in_its_parameters(local: Local) -> None:
    result = local.fit(4_000)
    expected, _ = local.sparse_solution()
    assert result.success
    np.testing.assert_allclose(result.x, expected, rtol=1e-7, atol=1e-8)
    dense = local.dense()
    for name in ("cost", "chi2", "sigma_sq", "r_squared", "reduced_chi2"):
        assert result[name] == pytest.approx(dense[name], rel=1e-9), name
    assert (result.dof, result.n_points) == (dense.dof, dense.n_points)
    assert result.pcov is None
    assert result.phase_history[2]["solver"] == "conjugate gradients"
    assert "??" in result.fit_report()
    method = "fitting method       = streaming Gauss-Newton"
    assert f"{method}, conjugate gradients\n" in result.fit_report()
    assert f"{method}\n" in dense.fit_report()
    assert "curvefit_covariance" not in result.to_xarray()
    values = result.predict(local.x[:5])
    np.testing.assert_allclose(values, dense.predict(local.x[:5]), rtol=1e-6)
    with pytest.raises(ValueError, match="no covariance of 18 parameters"):
        result.predict(local.x[:5], return_std=True)


SLOW = pytest.mark.slow
PENALTY = dict(
    enable_group_variance_regularization=True,
    group_variance_lambda=0.1,
    group_variance_indices=[(0, 20), (20, 40)],
)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="linear", marks=SLOW),
        pytest.param(dict(loss="huber"), id="huber", marks=SLOW),
        pytest.param(dict(sigma=0.1), id="sigma", marks=SLOW),
        pytest.param(PENALTY | dict(sigma=0.1, loss="huber"), id="all", marks=SLOW),
    ],
)
def test_what_matrices_find(options: dict[str, Any]) -> None:
    problem = Local(20, 20_000, rate=1.3)
    result, dense = problem.fit(4_000, **options), problem.dense(**options)
    assert result.success
    np.testing.assert_allclose(result.x, dense.x, rtol=1e-6, atol=1e-7)
    assert result.cost == pytest.approx(dense.cost, rel=1e-9)


@SLOW
def test_float32() -> None:
    problem = Local(20, 20_000, rate=1.3)
    result = problem.fit(4_000, precision="float32")
    assert result.success
    np.testing.assert_allclose(result.x, problem.dense().x, atol=1e-4)


@SLOW
def test_rows_that_cannot_be_used(local: Local) -> None:
    x, y = local.x.copy(), local.y.copy()
    x[[0, 4_100], 1] = np.nan
    y[9_000] = np.inf
    with pytest.raises(nd.NonFiniteDataError, match="3 of 20,000"):
        local.fit(4_000, x=x, y=y)
    result = local.fit(4_000, x=x, y=y, nan_policy="omit")
    kept = np.isfinite(x).all(axis=1) & np.isfinite(y)
    expected = local.fit(x=x[kept], y=y[kept])
    assert result.n_omitted == 3
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-7, atol=1e-8)


@SLOW
def test_chunks_and_processes_change_nothing(local: Local, process_client: Client) -> None:
    expected = local.fit(4_000)
    with process_client.as_current():
        same = local.fit(4_000)
    np.testing.assert_array_equal(same.x, expected.x)
    np.testing.assert_allclose(local.fit(777).x, expected.x, rtol=1e-7, atol=1e-8)


@SLOW
@pytest.mark.parametrize("absolute", [False, True])
def test_standard_errors(absolute: bool) -> None:
    local = Local(20, 20_000)

    def perr(n_probes: int, threshold: int = 10) -> np.ndarray:
        config = Config(verbose=0, cg_error_probes=n_probes, cg_param_threshold=threshold)
        optimizer = nd.AdaptiveHybridStreamingOptimizer(config)
        found = optimizer.fit(
            local.model, local.x, local.y, local.start, sigma=0.2, absolute_sigma=absolute
        )
        return found.perr

    exact = perr(0, 1000)
    np.testing.assert_allclose(perr(40), exact, rtol=1e-2)
    ratios = perr(24) / exact
    assert 0.9 < ratios.mean() < 1.1
    assert 0.0 < ratios.std() < 0.7 / np.sqrt(24)


@pytest.mark.slow
@pytest.mark.parametrize("n_probes", [7, 20])
def test_probes_are_in_memory_a_batch_at_a_time(
    n_probes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Local(10, 5_000)
    together = problem.fit(1_000, cg_error_probes=n_probes)
    monkeypatch.setattr(probing, "_BATCH_BYTES", 3 * 8 * 20)  # 3 at once
    batches = problem.fit(1_000, cg_error_probes=n_probes)
    assert batches.n_passes > together.n_passes
    np.testing.assert_allclose(batches.perr, together.perr, rtol=1e-12)


def test_what_a_batch_of_probes_takes_does_not_grow_with_their_number() -> None:
    for n_params in (2_000, 50_000, 3_000_000):
        sizes = {probing.batch_size(n_probes, n_params) for n_probes in (10**4, 10**5, 10**6)}
        assert max(sizes) * 8 * n_params <= max(2**23, 8 * n_params)


def test_exact_data_say_nothing_of_sensitivity() -> None:
    x = np.tile(np.arange(12.0), 100)
    truth = np.linspace(1, 2, 12)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(Config(verbose=0, cg_param_threshold=10))
    for start in (truth, truth + 1):
        result = optimizer.fit(lookup, x, truth[x.astype(int)], start)
        assert result.success
        np.testing.assert_allclose(result.x, truth, rtol=1e-12)


def lookup(x: Any, *p: Any) -> Any:
    return jnp.stack(p)[x.astype(int)]


@SLOW
@pytest.mark.filterwarnings("ignore::scipy.optimize.OptimizeWarning")
@pytest.mark.parametrize("case", ["rank", "too few iterations"])
def test_standard_errors_that_are_not_known_are_infinite(case: str) -> None:
    x = np.linspace(0, 1, 2_000)
    y = 1 + x + 0.1 * np.random.default_rng(0).standard_normal(len(x))

    def model(x: Any, *p: Any) -> Any:
        if case == "rank":
            return p[0] + (p[1] + p[2]) * x
        return sum(p[i] * x**i for i in range(6))

    options = dict(cg_param_threshold=2, cg_error_probes=6, cg_max_iterations=3, sample_rows=8)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(Config(verbose=0, **options))
    n_params = 3 if case == "rank" else 6
    assert np.isinf(optimizer.fit(model, x, y, np.ones(n_params)).perr).all()


@SLOW
def test_stations_that_start_far_away_do_not_spoil_one_another() -> None:
    rng = np.random.default_rng(0)
    n, stations = 150_000, 1_000
    station, t = rng.integers(0, stations, n), rng.uniform(0, 2, n)
    height, rate = rng.uniform(1, 3, stations), rng.uniform(0.5, 1.5, stations)
    y = height[station] * np.exp(-rate[station] * t) + 0.05 * rng.standard_normal(n)

    def model(x: Any, *p: Any) -> Any:
        q, i = jnp.stack(p), x[:, 0].astype(int)
        return q[i] * jnp.exp(-q[stations + i] * x[:, 1])

    optimizer = nd.AdaptiveHybridStreamingOptimizer(Config(verbose=0))
    result = optimizer.fit(model, np.column_stack([station, t]), y, np.ones(2 * stations))
    assert result.success
    assert result.n_passes <= 60
    assert 0.95 < result.reduced_chi2 / 0.05**2 < 1.05


@SLOW
def test_a_sample_unlike_the_rest() -> None:
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.random(39_000), rng.uniform(2e5, 3e5, 1_000)])
    y = np.exp(-1e-6 * x) + rng.standard_normal(len(x))

    def model(x: Any, a: Any, b: Any) -> Any:
        return a * jnp.exp(b * x)

    for seed in range(4):
        config = Config(verbose=0, cg_param_threshold=2, sample_rows=500, random_seed=seed)
        optimizer = nd.AdaptiveHybridStreamingOptimizer(config)
        lazy = da.from_array(x, 1_000), da.from_array(y, 1_000)
        found = optimizer.fit(model, *lazy, [1, -1e-5])
        assert found.success
        assert found.x[1] == pytest.approx(-1e-6, rel=0.5)


def test_a_new_sample_of_fewer_rows_than_parameters_changes_no_start(local: Local) -> None:
    """All rows fit the first one's solution badly, but five rows cannot tell a better start."""
    n_rows, n_blocks = 100, 200
    plan = plan_sample(np.full(n_blocks, n_rows), 160, 0, in_memory=True)
    y, sampled = np.full(n_rows * n_blocks, np.nan), []
    for i, (block,) in enumerate(plan.blocks):
        rows = slice(block * n_rows, (block + 1) * n_rows)
        y[rows] = local.y[rows]
        sampled += list(block * n_rows + plan.rows_of(i, n_rows))
    exact = local.model(local.x[sampled], *local.sparse_solution()[0])
    y[sampled] = np.asarray(exact) + 1e-3 * (y[sampled] - exact)
    starts: list[np.ndarray] = []
    result = local.fit(
        n_rows,
        y=y,
        sample_rows=160,
        nan_policy="omit",
        observers=[lambda e: starts.append(e.params) if isinstance(e, PassFinished) else None],
    )
    assert result.success
    np.testing.assert_array_equal(starts[0], starts[1])
    keep = np.isfinite(y)
    known = Local(9, 20_000)
    known.group, known.t, known.y = local.group[keep], local.t[keep], y[keep]
    np.testing.assert_allclose(result.x, known.sparse_solution()[0], rtol=1e-6, atol=1e-6)


class Shared(Local):
    """The same with a height for all groups, which their own ones can take over."""

    def model(self, x: Any, *params: Any) -> Any:
        return super().model(x, *params[:-1]) + params[-1]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(dict(cg_error_probes=4), marks=pytest.mark.slow),
        pytest.param(dict(loss="huber"), marks=pytest.mark.slow),
    ],
)
def test_what_the_data_do_not_determine_is_said(options: dict[str, Any]) -> None:
    problem = Shared(20, 20_000)
    problem.start = np.ones(41)
    with pytest.warns(OptimizeWarning, match="data do not constrain 'p20', .*, and 1 more"):
        result = problem.fit(4_000, **options)
    assert result.success
    assert "do not constrain: 'p20', 'p21'" in result.message
    assert result.diagnostics["undetermined"] == [f"p{i}" for i in range(20, 41)]
    assert np.isinf(result.perr).all()
    assert result.cost == pytest.approx(Local(20, 20_000).fit(4_000, **options).cost, rel=1e-8)


@pytest.mark.slow
def test_what_only_the_sample_does_not_determine_is_not_doubted(local: Local) -> None:
    result = local.fit(1_000, sample_rows=45)  # so few that some groups have no rows
    assert result.success
    assert not result.diagnostics["undetermined"]


@pytest.mark.slow
def test_what_is_hardly_determined_is_not_doubted() -> None:
    x = np.linspace(0, 1, 2_000)
    y = 1 + x + 0.1 * np.random.default_rng(0).standard_normal(len(x))
    optimizer = nd.AdaptiveHybridStreamingOptimizer(Config(verbose=0, cg_param_threshold=2))
    result = optimizer.fit(lambda x, *p: sum(p[i] * x**i for i in range(6)), x, y, np.ones(6))
    assert not result.diagnostics["undetermined"]


def test_a_parameter_without_rows() -> None:
    problem = Local(9, 20_000)
    problem.x[problem.x[:, 0] == 7, 0] = 8
    with pytest.warns(OptimizeWarning, match="insensitive to 'p7', 'p16' at this point"):
        result = problem.fit(4_000)
    assert not result.success
    assert "insensitive" in result.message
    assert result.diagnostics["undetermined"] == ["p7", "p16"]
    assert result.diagnostics["confounded"] == []
    assert result.x[7] == problem.start[7]


def test_the_callback_ends_it(local: Local) -> None:
    def stop(params: np.ndarray, loss: float, iteration: int) -> None:
        raise StopIteration

    result = local.fit(4_000, callback=stop, callback_frequency=1, max_warmup_iterations=0)
    assert not result.success
    assert "callback" in result.message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(cov_type="HC0"), "cov_type='HC0'"),
        (dict(gauss_newton_solver="qr"), "gauss_newton_solver='qr'"),
        (dict(enable_multistart=True), "enable_multistart"),
    ],
)
def test_what_needs_matrices(local: Local, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} cannot be combined.* 18 parameters"):
        local.fit(**options)


def test_bounds_need_matrices(local: Local) -> None:
    optimizer = nd.AdaptiveHybridStreamingOptimizer(Config(cg_param_threshold=18))
    with pytest.raises(ValueError, match="bounds cannot be combined"):
        optimizer.fit(local.model, local.x, local.y, local.start, (0, 9))
    with pytest.raises(ValueError, match="bounds cannot be combined"):
        optimizer.plan(local.model, local.x, local.y, local.start, (0, 9))


def test_a_model_that_has_no_forward_mode() -> None:
    import jax

    @jax.custom_vjp
    def decay(x: Any) -> Any:
        return jnp.exp(-x)

    decay.defvjp(lambda x: (jnp.exp(-x), x), lambda x, g: (-g * jnp.exp(-x),))

    def model(x: Any, *p: Any) -> Any:
        return sum(p[i] * decay(x * p[i]) for i in range(12))

    optimizer = nd.AdaptiveHybridStreamingOptimizer(Config(verbose=0, cg_param_threshold=10))
    with pytest.raises(nd.ModelError, match="forward and reverse mode"):
        optimizer.fit(model, np.linspace(0, 1, 500), np.ones(500), np.ones(12))


# --- the solver by itself


def test_ritz_values_are_eigenvalues() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(12, 8))
    matrix = root.T @ root
    solve: Any = LinearSolve.init(rng.normal(size=8), lambda v: v)
    first = -solve.residual
    for _ in range(8):
        solve = solve.update(matrix @ solve.direction, lambda v: v)
    assert solve.least_ritz_value == pytest.approx(np.linalg.eigvalsh(matrix).min(), rel=1e-6)
    np.testing.assert_allclose(matrix @ solve.step, -first, rtol=1e-6, atol=1e-8)
    promised = -(first @ solve.step + 0.5 * solve.step @ matrix @ solve.step)
    assert solve.reduction == pytest.approx(promised)
