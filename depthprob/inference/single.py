"""Library maximum likelihood, or least squares, for columns one by one, thousands at a time; and any estimator compared with the bound.

Each column is fitted in a patch of its own, which holds no other: what isolated columns are for when an estimator is studied. Columns
of a crystal overlap, and belong into `likelihood` or `local`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..devices import SPREAD, WHOLE, filled, spread
from ..physics.focal_series import FocalSeries
from ..physics.library import ColumnLibrary
from .gaussian_peak import fit_gaussian_peaks
from .goodness import null_table
from .problem import BACKGROUND_SHAPE, DARKEST, PRIOR_SD

STEPS = 8  # tabulated positions per pixel; between them a second-order expansion, good to 1e-3 of the brightest pixel
FREE = ("depth", "x", "y", "log_gain", "log_background")
LARGEST_STEP = (10.0, 0.15, 0.15, 0.3, 1.5)
NEAR = 1.6  # Å from the middle of a patch along x and y: pixels enough to bring a fit close
CLOSER = 4  # steps of scoring with these pixels, then two with all; between these,
BETWEEN = 30  # steps at most with the information of the first, which cost half as much, until one is
SHORT = 0.01  # of a standard deviation
NULL = 2**15  # places in the table of the deviance's null mean and variance, so many that the nearest is near enough


class SingleFit(NamedTuple):
    """Columns fitted one by one (C,).

    Attributes
    ----------
    depth, sd : [Å]
        Maximum of likelihood times weak priors, and root of the inverse of Fisher information plus prior; of least squares its own standard deviation.
    crlb : [Å]
        Cramér-Rao bound at the estimate, what is free profiled out.
    x, y : [Å]
        From the centre of the patch.
    gain, background :
        Factor on the signal; fraction of the beam.
    goodness_of_fit :
        Deviance over the patch, standardised by its own null mean and variance: about N(0, 1).
    converged : bool
        The last step was under 1 % of a standard deviation.
    """

    depth: np.ndarray
    sd: np.ndarray
    crlb: np.ndarray
    x: np.ndarray
    y: np.ndarray
    gain: np.ndarray
    background: np.ndarray
    goodness_of_fit: np.ndarray
    converged: np.ndarray


class _Tables(NamedTuple):
    """Basis images and their derivatives 1, x, y, xx, xy, yy on the pixels of a patch, for every tabulated position.

    values (offset y, offset x, kind, R, pixel) float32; positions (offset,) [Å].
    """

    values: jax.Array
    positions: jax.Array


def _tables(library: ColumnLibrary, pixel: float, shape: tuple[int, int]) -> _Tables:
    n_y, n_x = library.images.shape[1:]
    spectra = np.fft.fft2(np.asarray(library.images, float)) / (n_y * n_x)
    offsets = (np.arange(STEPS + 1) / STEPS - 0.5) * pixel

    def waves(n_fine: int, n: int):
        """Fourier sums at a patch's pixels minus each offset, and their first and second derivatives by the offset."""
        q = np.fft.fftfreq(n_fine, library.pixel)
        at = (np.arange(n) - (n - 1) / 2) * pixel
        base = np.exp(2j * np.pi * (at[None, :, None] - offsets[:, None, None]) * q)
        return [base * (-2j * np.pi * q) ** k for k in range(3)]

    wave_y, wave_x = waves(n_y, shape[0]), waves(n_x, shape[1])
    along_y = [np.einsum("oya,rab->oryb", w, spectra, optimize=True) for w in wave_y]
    pairs = ((0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (2, 0))
    kinds = [np.einsum("oryb,pxb->opryx", along_y[ky], wave_x[kx], optimize=True).real for ky, kx in pairs]
    values = np.stack(kinds, 2).reshape(len(offsets), len(offsets), 6, len(spectra), -1)
    return _Tables(jnp.asarray(values, jnp.float32), jnp.asarray(offsets))


class _Parts(NamedTuple):
    """A column's counts as a sum over R products of a function of focus and an image, float32: rate = weights @ images[0] + background.

    images (3, R, pixel): basis images, and their derivatives by x and y [1/Å]; weights, slopes (F, R): times the incident counts, and their derivative by
    depth [1/Å]; background (F, 1).
    """

    images: jax.Array
    weights: jax.Array
    slopes: jax.Array
    background: jax.Array


def _parts(theta, n, library, tables, defocus, scale) -> _Parts:
    depth, x, y, log_gain, log_background = theta
    spacing = tables.positions[1] - tables.positions[0]
    nearest = lambda v: jnp.clip(jnp.round((v - tables.positions[0]) / spacing), 0, STEPS).astype(int)
    i, j = nearest(y), nearest(x)
    dx, dy = (x - tables.positions[j]).astype(jnp.float32), (y - tables.positions[i]).astype(jnp.float32)
    zero, one = jnp.zeros_like(dx), jnp.ones_like(dx)
    expansion = jnp.array([[one, dx, dy, dx**2 / 2, dx * dy, dy**2 / 2], [zero, one, zero, dx, dy, zero], [zero, zero, one, zero, dx, dy]])
    kinds, rank, pixels = tables.values.shape[2:]
    there = jax.lax.dynamic_slice(tables.values, (i, j, 0, 0, 0), (1, 1, kinds, rank, pixels))
    images = (expansion @ there.reshape(kinds, -1)).reshape(3, rank, pixels)
    weights, slopes = jax.jvp(lambda d: library.weights(n[None], (defocus - d)[None])[0], (depth,), (jnp.ones_like(depth),))
    signal = scale * jnp.exp(log_gain).astype(jnp.float32)
    background = scale * jnp.exp(log_background).astype(jnp.float32)
    return _Parts(images, signal * weights.astype(jnp.float32), signal * slopes.astype(jnp.float32), background)


def _rate(parts: _Parts):
    """Expected counts (F, pixel)."""
    return jnp.maximum(parts.weights @ parts.images[0] + parts.background, DARKEST)


def _derivatives(parts: _Parts):
    """Derivatives of the expected counts by `FREE` (5, F, pixel)."""
    images, weights, slopes, background = parts
    bright = weights @ images[0]
    return jnp.stack([slopes @ images[0], weights @ images[1], weights @ images[2], bright, jnp.broadcast_to(background, bright.shape)])


def _along_derivatives(residual, parts: _Parts):
    """Sums over pixels of a residual (F, pixel) times each derivative (5,), without the derivatives' images: the residual meets the basis images first."""
    kinds, rank, pixels = parts.images.shape
    seen = (residual @ parts.images.reshape(-1, pixels).T).reshape(-1, kinds, rank)
    factors = [parts.slopes * seen[:, 0], parts.weights * seen[:, 1], parts.weights * seen[:, 2], parts.weights * seen[:, 0], parts.background[:, 0] * jnp.sum(residual, 1)]
    return jnp.stack([jnp.sum(a, dtype=float) for a in factors])


def _rate_and_derivatives(theta, n, library, tables, defocus, scale):
    """Expected counts (F, pixel) and derivatives by `FREE` (5, F, pixel), float32."""
    parts = _parts(theta, n, library, tables, defocus, scale)
    return _rate(parts), _derivatives(parts)


def _scan_table(depths, background, library, tables, defocus, scale, least_squares):
    """What the log-likelihood of a column in the patch's middle is linear in, for all atom numbers: it is counts . images - sums.

    images (n_max, depth, F * pixel) float32: logarithms of expected counts, or these themselves; sums (n_max, depth).
    """
    image = tables.values[STEPS // 2, STEPS // 2, 0]

    def one(n):
        weights = library.weights(jnp.full(len(depths), n), defocus - depths[:, None]).astype(jnp.float32)
        rate = jnp.maximum(scale * (weights @ image + background), DARKEST)
        images, sums = (rate, rate**2 / 2) if least_squares else (jnp.log(rate), rate)
        return images.reshape(len(depths), -1), jnp.sum(sums, (1, 2))

    return jax.lax.map(one, jnp.arange(1, library.n_max + 1))


@partial(jax.jit, static_argnames="least_squares")
def _fit(patches, n, near, start, scan, free, library, tables, defocus, scale, null, least_squares):
    """Estimates (C, 5), covariances (C, 5, 5), Fisher matrices (C, 5, 5), last steps (C,) in standard deviations, and goodness of fit (C,).

    A scan of the depth and the first steps see the pixels `near` alone; all but the estimate is of the point before the last step. Sums over images in float64
    under x64. Columns are spread over all devices.
    """
    prior = jnp.array([PRIOR_SD["depth"] ** -2, PRIOR_SD["x"] ** -2, PRIOR_SD["y"] ** -2, PRIOR_SD["log_gain"] ** -2, BACKGROUND_SHAPE])
    limit = jnp.array(LARGEST_STEP)

    def own(patches, n, near, start, scan, free, library, tables, defocus, scale, null):
        known = jnp.diag(prior * free + 1.0 - free)
        tables_near = tables._replace(values=tables.values[..., near])
        seen_in_scan, sums_in_scan = _scan_table(scan, jnp.exp(start[4]).astype(jnp.float32), library, tables_near, defocus, scale, least_squares)

        def one(item):
            counts, n = item
            even = jnp.mean(counts)  # every pixel's variance, to least squares
            seen = counts[:, near]
            variance = lambda rate: jnp.full_like(rate, even) if least_squares else rate
            parts_of = lambda theta, tables: _parts(theta, n, library, tables, defocus, scale)

            def moved(theta, score, hessian):
                """The next estimate from the score of the data, and its distance in standard deviations."""
                slope = jnp.where(jnp.arange(5) == 4, BACKGROUND_SHAPE, -prior * (theta - start.at[0].set(0.0)))
                move = jnp.clip(jnp.linalg.solve(hessian, (score + slope) * free), -limit, limit)
                return theta + move, jnp.sqrt(move @ hessian @ move)

            def rows_of(theta, tables):
                """Derivatives (5, pixel) over the root of the variance taken for each pixel's, that root, and expected counts."""
                parts = parts_of(theta, tables)
                rate = _rate(parts)
                root = jnp.sqrt(variance(rate))
                return (_derivatives(parts) * (free.astype(jnp.float32)[:, None, None] / root)).reshape(5, -1), root.ravel(), rate

            squared = lambda rows: (rows @ rows.T).astype(float)

            def scored(theta, counts, tables):
                rows, root, rate = rows_of(theta, tables)
                hessian = squared(rows) + known
                return *moved(theta, (rows @ ((counts - rate).ravel() / root)).astype(float), hessian), hessian, (rows, root, rate)

            def followed(state):
                """A step with an information from before."""
                theta, _, taken, hessian = state
                parts = parts_of(theta, tables)
                rate = _rate(parts)
                return *moved(theta, _along_derivatives((counts - rate) / variance(rate), parts), hessian), taken + 1, hessian

            theta = start.at[0].set(scan[jnp.argmax(seen_in_scan[n - 1] @ seen.ravel() - sums_in_scan[n - 1])])
            theta = jax.lax.fori_loop(0, CLOSER, lambda _, theta: scored(theta, seen, tables_near)[0], theta)
            theta, last, hessian, _ = scored(theta, counts, tables)
            theta = jax.lax.while_loop(lambda state: (state[1] > SHORT) & (state[2] < BETWEEN), followed, (theta, last, 0, hessian))[0]
            theta, last, hessian, (rows, root, rate) = scored(theta, counts, tables)
            inverse, fisher = jnp.linalg.inv(hessian), hessian - known
            covariance = inverse
            if least_squares:
                ratio = jnp.sqrt(rate).ravel() / root
                covariance, fisher = inverse @ (squared(rows * ratio) + known) @ inverse, squared(rows / ratio)
            return theta, covariance, fisher, last, _goodness(counts, rate, null)

        return jax.lax.map(one, (patches, n))

    return spread(own, (SPREAD, SPREAD) + (WHOLE,) * 9)(patches, n, near, start, scan, free, library, tables, defocus, scale, null)


def _goodness(counts, rate, null):
    """Deviance of all pixels, standardised by its null mean and variance; `null` as of `goodness.null_table`, even in the logarithm."""
    logarithm = jnp.log(rate)
    place = jnp.round((logarithm - null[0, 0]) * ((null.shape[1] - 1) / (null[0, -1] - null[0, 0]))).astype(jnp.int32)
    mean, variance = null[1:, jnp.clip(place, 0, null.shape[1] - 1)]
    deviance = 2 * (jnp.where(counts > 0, counts * (jnp.log(jnp.maximum(counts, 1e-30)) - logarithm), 0.0) - counts + rate)
    over_images = lambda each: jnp.sum(jnp.sum(each, 1), dtype=float)
    return over_images(deviance - mean) / jnp.sqrt(over_images(variance))


def _fine_null_table(largest: float) -> np.ndarray:
    """`null_table` drawn out to `NULL` places."""
    coarse = null_table(largest)
    fine = np.linspace(coarse[0, 0], coarse[0, -1], NULL)
    return np.array([fine, *(np.interp(fine, coarse[0], row) for row in coarse[1:])])


def fit_single_columns(
    patches: Float[np.ndarray, "column focus y x"],
    n_atoms: Int[np.ndarray, " column"],
    library: ColumnLibrary,
    series: FocalSeries,
    free: tuple[str, ...] = ("positions", "background"),
    background: float = 1e-3,
    deepest: float = 100.0,
    least_squares: bool = False,
) -> SingleFit:
    """Depths of isolated columns by maximum likelihood: a scan of the depth, then Fisher scoring. Run under `jax.enable_x64(True)`.

    Parameters
    ----------
    patches : (C, F, ny, nx)
        Counts [e/pixel], the column within half a pixel of the patch's centre.
    series : FocalSeries
        Of one patch.
    free : some of "positions", "gain", "background"
        Beside the depth. What is held is at the centre, one, and `background`.
    background : float
        Fraction of the beam, start or fixed value; one number for all images of a column.
    deepest : float
        |depth| up to which the scan looks [Å].
    least_squares : bool
        Instead take every pixel for equally uncertain; the error bars are of Poisson counts all the same.
    """
    words = {"positions": (1, 2), "gain": (3,), "background": (4,)}
    unknown = [w for w in free if w not in words]
    if unknown:
        raise ValueError(f"free names {unknown[0]!r}; allowed for single columns are {', '.join(words)}.")
    mask = np.zeros(5)
    mask[[0, *(k for w in free for k in words[w])]] = 1
    tables = _tables(library, series.pixel_size, series.shape)
    count = len(n_atoms)
    more = filled(count) - count
    start = np.array([0.0, 0.0, 0.0, 0.0, np.log(background)])
    scan = np.arange(-deepest, deepest + 1, 20.0)
    scale = (np.broadcast_to(np.asarray(series.dose, float), np.shape(series.defocus)) * series.pixel_size**2)[:, None]
    y, x = (np.arange(n) - (n - 1) / 2 for n in series.shape)
    near = np.flatnonzero((abs(y[:, None]) * series.pixel_size <= NEAR) & (abs(x) * series.pixel_size <= NEAR))
    flat = np.asarray(patches, np.float32).reshape(count, len(scale), -1)
    last = np.minimum(np.arange(count + more), count - 1)  # filled up with the last column, for as many on every device
    result = _fit(
        jnp.asarray(flat[last] if more else flat), jnp.asarray(np.asarray(n_atoms)[last]), jnp.asarray(near), jnp.asarray(start), jnp.asarray(scan), jnp.asarray(mask), library, tables,
        jnp.asarray(series.defocus, float), jnp.asarray(scale, jnp.float32), jnp.asarray(_fine_null_table(1.2 * float(flat.max()) + 10.0), jnp.float32), least_squares,
    )  # fmt: skip
    theta, covariance, fisher, step, goodness = (np.asarray(a)[:count] for a in result)
    chosen = np.flatnonzero(mask)
    bound = np.sqrt(np.linalg.inv(fisher[:, chosen][:, :, chosen])[:, 0, 0])
    return SingleFit(theta[:, 0], np.sqrt(covariance[:, 0, 0]), bound, theta[:, 1], theta[:, 2], np.exp(theta[:, 3]), np.exp(theta[:, 4]), goodness, step < SHORT)


class Comparison(NamedTuple):
    """How one estimator does on isolated columns of one kind.

    Attributes
    ----------
    estimator : str
    n_atoms : int
    dose : float
        [e/Å^2] per image.
    series : int
        Simulated.
    failed : int
        Without an estimate (nan); left out of the rest.
    bias, bias_error : float
        Mean error and its standard error [Å].
    sd, sd_error : float
        Of the errors [Å].
    crlb : float
        Bound with the positions and background of the simulation free [Å].
    covered : float
        Share of true depths within the estimator's own 90 % interval; nan for one that states none.
    """

    estimator: str
    n_atoms: int
    dose: float
    series: int
    failed: int
    bias: float
    bias_error: float
    sd: float
    sd_error: float
    crlb: float
    covered: float


Estimator = Callable[[np.ndarray, np.ndarray, ColumnLibrary, FocalSeries], "np.ndarray | tuple[np.ndarray, np.ndarray]"]


def library_maximum(patches, n_atoms, library, series):
    """`fit_single_columns` as an estimator."""
    fit = fit_single_columns(patches, n_atoms, library, series)
    return fit.depth, fit.sd


def library_least_squares(patches, n_atoms, library, series):
    """`fit_single_columns` by least squares as an estimator."""
    fit = fit_single_columns(patches, n_atoms, library, series, least_squares=True)
    return fit.depth, fit.sd


def gaussian_peak(patches, n_atoms, library, series):
    """The paper's method as an estimator, one column a patch, at the true positions."""
    count, n_foci, ny, nx = patches.shape
    centre = np.array([[(nx - 1) / 2, (ny - 1) / 2]]) * series.pixel_size
    scale = (np.broadcast_to(np.asarray(series.dose, float), (n_foci,)) * series.pixel_size**2)[:, None, None]
    side_by_side = np.concatenate(list(patches), 2) / scale  # patches in one wide image
    positions = centre + np.arange(count)[:, None] * np.array([[nx * series.pixel_size, 0.0]])
    fit = fit_gaussian_peaks(side_by_side, positions, n_atoms, library, series, np.zeros((n_foci, 2)), radius=1.0)
    return fit.depth, fit.sd


ESTIMATORS: dict[str, Estimator] = {"library maximum likelihood": library_maximum, "library least squares": library_least_squares, "Gaussian peak": gaussian_peak}


def compare_estimators(
    library: ColumnLibrary,
    defocus: np.ndarray,
    n_atoms: tuple[int, ...],
    doses: tuple[float, ...],
    estimators: dict[str, Estimator] | None = None,
    series_count: int = 1000,
    depth_range: float = 10.0,
    background: float = 1e-3,
    pixel: float = 0.4,
    half_field: float = 4.0,
    seed: int = 0,
    batch: int = 500,
    progress: Callable = lambda items, **_: items,
) -> list[Comparison]:
    """Simulate isolated columns at random depths and positions, and hold every estimator's errors against the Cramér-Rao bound.

    Data and estimators share one library, so this studies statistics; model error is the business of whole particles. Run under x64.

    Parameters
    ----------
    estimators : {name: function}
        Functions of counts (S, F, ny, nx), atom numbers (S,), library and series, that return depths (S,) [Å] or depths and their
        standard deviations; `ESTIMATORS` by default.
    depth_range : float
        Depths are uniform within plus or minus this [Å].
    """
    estimators = estimators or ESTIMATORS
    side = 2 * int(np.ceil(half_field / pixel)) + 1
    tables = _tables(library, pixel, (side, side))
    rng = np.random.default_rng(seed)
    rows = []
    for n in n_atoms:
        for dose in progress(doses, desc=f"{n} atoms", unit="dose"):
            series = FocalSeries(np.asarray(defocus, float), pixel, np.full(len(defocus), float(dose)), (side, side))
            depth = rng.uniform(-depth_range, depth_range, series_count)
            bounds, found = [], {name: [] for name in estimators}
            for part in np.array_split(np.arange(series_count), max(1, series_count // batch)):
                at = np.column_stack([depth[part], rng.uniform(-0.1, 0.1, (len(part), 2)) * pixel, np.zeros(len(part)), np.full(len(part), np.log(background))])
                rate, fisher = (np.asarray(a) for a in _expected(jnp.asarray(at), jnp.asarray(n), library, tables, jnp.asarray(series.defocus), jnp.float32(dose * pixel**2)))
                bounds.append(np.linalg.inv(fisher)[:, 0, 0])
                counts = rng.poisson(rate).reshape(len(part), len(defocus), side, side)
                for name, estimator in estimators.items():
                    result = estimator(counts, np.full(len(part), n), library, series)
                    found[name].append(result if isinstance(result, tuple) else (result, np.full(len(part), np.nan)))
            bound = float(np.sqrt(np.mean(np.concatenate(bounds))))
            rows += [_compared(name, n, float(dose), depth, *(np.concatenate(a) for a in zip(*parts, strict=True)), bound) for name, parts in found.items()]
    return rows


@jax.jit
def _expected(theta, n, library, tables, defocus, scale):
    """Expected counts of columns and their Fisher matrices over depth, x, y and log background."""

    def one(theta):
        rate, rows = _rate_and_derivatives(theta, n, library, tables, defocus, scale)
        rows = rows[jnp.array([0, 1, 2, 4])].reshape(4, -1) * jax.lax.rsqrt(rate).ravel()
        return rate, (rows @ rows.T).astype(float)

    return jax.lax.map(one, theta)


def _compared(name: str, n: int, dose: float, truth: Array, depth: np.ndarray, sd: np.ndarray, bound: float) -> Comparison:
    good = np.isfinite(depth)
    error = (depth - truth)[good]
    m = len(error)
    spread = float(error.std(ddof=1))
    fourth = np.mean((error - error.mean()) ** 4) / spread**4
    covered = np.mean(abs(error) < 1.6449 * sd[good]) if np.isfinite(sd[good]).all() else np.nan
    return Comparison(
        name, int(n), dose, len(depth), int((~good).sum()), float(error.mean()), spread / np.sqrt(m), spread,
        spread * float(np.sqrt(max(fourth - 1, 0.0) / m)) / 2, bound, float(covered),
    )  # fmt: skip
