"""Poisson likelihood of a whole stack: joint maximum and Fisher information."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..physics.focal_series import (
    Field,
    background_images,
    counts_per_fraction,
    defocus_minus_depth,
    displaced,
    expected_counts,
    from_middle,
    phases,
    q_squared,
    smooth_functions,
    to_pixels,
    widening,
)
from ..physics.library import ColumnLibrary
from .arrow import ArrowFactor, ArrowMatrix
from .counts import growth
from .problem import (
    AFFINE,
    DARKEST,
    GLOBAL,
    PER_COLUMN,
    PER_IMAGE,
    SMOOTH,
    Problem,
    by_position,
    field_of,
    from_vector,
    log_prior,
    parameter_names,
    per_image,
    prior_curvature,
    prior_precision,
    to_vector,
)


class Mode(NamedTuple):
    """Where the posterior is largest."""

    parameters: dict
    log_posterior: float
    iterations: int
    converged: bool
    curvature: ArrowFactor | None = None  # of a large field, to go on with


class Estimate(NamedTuple):
    """Result of a fit.

    Attributes
    ----------
    parameters : dict of arrays
    variances : (P,)
        Diagonal of the inverse of Fisher information plus priors, over the free parameters in `names` order.
    factor : (P, P) or ArrowFactor
        Lower Cholesky factor of that inverse; of a large field the factor of the information itself.
    information : (P, P) or ArrowMatrix
        Fisher information alone.
    names : list of (name, index)
    log_posterior, iterations, converged
    """

    parameters: dict
    variances: np.ndarray
    factor: np.ndarray | ArrowFactor
    information: np.ndarray | ArrowMatrix
    names: list
    log_posterior: float
    iterations: int
    converged: bool

    def sd(self, name: str) -> np.ndarray:
        """Standard deviations of one parameter array."""
        chosen = [i for i, (n, _) in enumerate(self.names) if n == name]
        return np.sqrt(self.variances[chosen])


def log_likelihood(parameters: dict, problem: Problem) -> jax.Array:
    """Poisson log-likelihood, without the term that depends on the counts alone; rates in float32, the sum in float64 under x64."""
    return jnp.sum(image_log_likelihoods(parameters, problem))


def image_log_likelihoods(parameters: dict, problem: Problem) -> jax.Array:
    """The same image by image (F,)."""
    rate = jnp.maximum(expected_counts(field_of(parameters, problem.n_atoms), problem.library, problem.series, problem.draw), DARKEST)
    v = problem.read_variance.astype(rate.dtype)
    terms = jnp.where(problem.mask, (problem.counts + v) * jnp.log(rate + v) - rate, 0.0)
    return jnp.sum(terms, axis=(1, 2), dtype=float) / problem.dispersion


LARGEST_STEP = {"depth": 15.0, "log_background": 2.0, "source_variance": 0.03} | dict.fromkeys(AFFINE, 0.02)  # of scoring; 0.3 for the rest
FLAT = 1e-3  # of the log-likelihood; a step of scoring that gains it starts 0.04 standard deviations from the maximum, and ends far nearer
DEAR = 12  # steps that a Fisher matrix costs
ROUGH = 0.1  # standard deviations from the maximum: near enough to count atoms by


def log_posterior(parameters: dict, problem: Problem) -> jax.Array:
    """Log-likelihood plus log-prior."""
    return log_likelihood(parameters, problem) + log_prior(parameters, problem)


def _spectra(field: Field, problem: Problem, weights: jax.Array, i: jax.Array) -> jax.Array:
    """Fourier coefficients (C, qy, qx) of columns that have these `weights` (C, r) of the library's images, each at its place in image i."""
    draw = problem.draw
    distortion = None if field.image_distortions is None else field.image_distortions[i]
    along_y, along_x = phases(draw, displaced(field.positions, field.image_shifts[i], distortion, problem.series))
    basis = draw.basis * widening(draw, field.source_variance)
    return jnp.einsum("cr,rab->cab", weights.astype(jnp.float32), basis) * (along_y[:, :, None] * along_x[:, None, :])


@jax.jit
def image_terms(parameters: dict, problem: Problem, i: jax.Array):
    """Derivatives of image i: by its columns (3C, pixel), its own parameters `per_image` (k, pixel), `GLOBAL` (3, pixel); and its rate."""
    field = field_of(parameters, problem.n_atoms)
    series, draw = problem.series, problem.draw
    z = defocus_minus_depth(field, series)[:, i]
    weights, slopes = jax.jvp(lambda z: problem.library.weights(problem.n_atoms, z), (z,), (jnp.ones_like(z),))
    distortion = None if field.image_distortions is None else field.image_distortions[i]
    image, by_z = _spectra(field, problem, weights, i), _spectra(field, problem, slopes, i)
    by_x = image * (-2j * jnp.pi * draw.qx).astype(jnp.complex64)
    by_y = image * (-2j * jnp.pi * draw.qy).astype(jnp.complex64)[:, None]
    scale = counts_per_fraction(series)[i, 0, 0]
    gain, background = field.gain[i], jnp.broadcast_to(background_images(field, series)[i], series.shape).ravel()
    flat = lambda s: to_pixels(draw, s).reshape(s.shape[0], -1) * gain
    d_z, d_x, d_y = flat(by_z), flat(by_x), flat(by_y)
    signal = to_pixels(draw, image.sum(0)).ravel() * gain
    nominal = jnp.asarray(series.defocus)
    defocus = nominal[i] - jnp.mean(nominal)
    own = jnp.stack([signal, background.astype(signal.dtype), d_x.sum(0), d_y.sum(0)])
    if field.background_shape is not None:
        own = jnp.concatenate([own, own[1] * smooth_functions(series.shape).reshape(len(SMOOTH), -1)])
    if distortion is not None:
        lever = from_middle(field.positions, series).T.astype(d_x.dtype)
        own = jnp.concatenate([own, lever @ d_x, lever @ d_y])
    d_x, d_y = by_position(d_x, d_y, distortion)
    by_variance = to_pixels(draw, image.sum(0) * (-2 * jnp.pi**2 * q_squared(draw))).ravel() * gain
    shared = jnp.stack([d_z.sum(0), d_z.sum(0) * defocus, by_variance])
    columns = jnp.concatenate([-d_z, d_x, d_y])
    return scale * columns, scale * own, scale * shared, scale * (signal + background)


@jax.jit
def _image_sums(parameters: dict, problem: Problem, i: jax.Array):
    columns, own, shared, rate = image_terms(parameters, problem, i)
    rate = jnp.maximum(rate, DARKEST).astype(float)
    root = jnp.where(problem.mask[i].ravel(), ((rate + problem.read_variance) * problem.dispersion) ** -0.5, 0.0)
    jacobian = jnp.concatenate([columns, own, shared]).astype(float) * root
    residual = (problem.counts[i].ravel() - rate) * root
    return jacobian @ jacobian.T, jacobian @ residual


def fisher_and_score(parameters: dict, problem: Problem, progress=lambda items, **_: items) -> tuple[np.ndarray, np.ndarray]:
    """Poisson Fisher matrix sum (dn)(dn)^T / n and score sum (N / n - 1) dn, over the free parameters, float64.

    One image at a time: memory is one image's derivatives, 3 columns + 7 rows of pixels (5 more with a smooth background, 4 with distorted scans). Both over the dispersion.
    """
    n_columns, n_foci = len(problem.n_atoms), len(problem.series.defocus)
    blocks = {}
    at = 0
    own_names = per_image(problem)
    for name in (*PER_COLUMN, *own_names, *GLOBAL):
        size = n_columns if name in PER_COLUMN else n_foci if name in PER_IMAGE else 1
        blocks[name] = at + np.arange(size)
        at += size
    fisher, score = np.zeros((at, at)), np.zeros(at)
    for i in range(n_foci):
        f, s = (np.asarray(a) for a in _image_sums(parameters, problem, i))
        rows = np.concatenate([np.arange(3 * n_columns), [blocks[n][i] for n in own_names], [blocks[n][0] for n in GLOBAL]])
        fisher[np.ix_(rows, rows)] += f
        score[rows] += s
    keep = np.concatenate([blocks[n] for n in problem.free])
    return fisher[np.ix_(keep, keep)], score[keep]


def information_along(parameters: dict, problem: Problem, directions: np.ndarray) -> np.ndarray:
    """Information J^T W c (P, K) between the free parameters and changes c of the expected counts (K, F, ny, nx), float64.

    J are the derivatives by the parameters and W the precision of the counts; of the residuals it is the score.
    """
    out = {name: np.zeros((max(1, problem.start[name].size), len(directions))) for name in (*PER_COLUMN, *per_image(problem), *GLOBAL)}
    for i in range(len(problem.series.defocus)):
        columns, own, shared, rate = (np.asarray(a, float) for a in image_terms(parameters, problem, i))
        weight = np.asarray(problem.mask[i]).ravel() / ((np.maximum(rate, DARKEST) + float(problem.read_variance)) * float(problem.dispersion))
        changes = (directions[:, i].reshape(len(directions), -1) * weight).T
        for name, rows in zip(PER_COLUMN, np.split(columns, 3), strict=True):
            out[name] += rows @ changes
        for name, row in zip(per_image(problem), own, strict=True):
            out[name][i] += row @ changes
        for name, row in zip(GLOBAL, shared, strict=True):
            out[name] += row @ changes
    return np.concatenate([out[name] for name in problem.free])


@jax.jit
def objective(vector: jax.Array, problem: Problem) -> jax.Array:
    """Log-posterior of the free parameters as a vector; compiled once for all problems of one shape."""
    return log_posterior(from_vector(vector, problem), problem)


_objective_and_slope = jax.jit(jax.value_and_grad(objective))


def maximum(problem: Problem, progress=lambda items, **_: items, before: Mode | None = None) -> Estimate:
    """Joint maximum of likelihood times weak priors, with its covariance. `before` is for `local` alone."""
    mode = find_mode(problem, progress)
    fisher, _ = fisher_and_score(mode.parameters, problem)
    covariance = np.linalg.inv(fisher + prior_precision(problem))
    factor = np.linalg.cholesky((covariance + covariance.T) / 2)
    return Estimate(mode.parameters, np.diag(covariance), factor, fisher, parameter_names(problem), mode.log_posterior, mode.iterations, mode.converged)


def find_mode(problem: Problem, progress=lambda items, **_: items, close: float = 2e-3, max_iterations: int = 60, before: Mode | None = None) -> Mode:
    """Joint maximum of likelihood times weak priors by Fisher scoring with Levenberg damping.

    Starts with a scan of one depth common to all columns, then scores until no step exceeds `close` standard deviations, or a whole one gains less than `FLAT`, or than
    there is within `close` of a normal distribution's maximum: where an image's edge hides most of a column, its depth creeps for ever. The Fisher matrix is kept while
    steps gain what it says, and are fewer at their pace than the `DEAR` ones that a new one costs. `before` is for `local` alone.
    """
    precision, enough = prior_precision(problem), max(FLAT, close**2 / 2)
    limit = np.array([LARGEST_STEP.get(n, 0.3) for n, _ in parameter_names(problem)])
    base = to_vector(problem.start, problem)
    depth = np.arange(len(base)) < len(problem.n_atoms)

    def look(vector: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
        value, slope = _objective_and_slope(vector, problem)
        return vector, float(value), np.asarray(slope)

    here = max((look(base + d * depth) for d in ([0.0] if np.any(base[depth]) else np.arange(-60, 61, 10.0))), key=lambda at: at[1])
    hessian, left, damping, converged, iteration = None, np.inf, 1e-3, False, 0
    for iteration in progress(range(max_iterations), desc="joint fit", unit="step"):
        vector, value, slope = here
        if fresh := hessian is None:
            hessian = fisher_and_score(from_vector(jnp.asarray(vector), problem), problem)[0] + precision
            covariance = np.linalg.inv(hessian)
            left = slope @ covariance @ slope
        while True:
            step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), slope)
            share = min(1.0, float(np.min(limit / np.maximum(abs(step), 1e-12))))
            step *= share
            moved = look(vector + step)
            if moved[1] >= value - 1e-6 or damping > 1e6 or not fresh:
                break
            damping *= 8
        gained, promised, away = moved[1] - value, step @ slope - step @ hessian @ step / 2, left
        if gained < -1e-6 and not fresh:
            hessian = None
            continue
        here, damping = moved, max(damping / 10, 1e-9)
        left = max(here[2] @ covariance @ here[2], 1e-12)  # for a quadratic twice what there is to gain
        relative = abs(step) / np.sqrt(np.diag(covariance))
        if (fresh or left < 2 * enough) and (relative.max() < close or (share == 1.0 and gained < enough)):
            converged = True
            break
        if gained < 0.5 * promised or (share == 1.0 and np.log(left / (2 * enough)) > DEAR * np.log(away / left)):
            hessian = None
    return Mode(from_vector(jnp.asarray(here[0]), problem), here[1], iteration + 1, converged)


def column_bounds(estimate: Estimate, problem: Problem, relative: bool = False) -> np.ndarray:
    """Cramér-Rao bound on the depth of each column (C,) [Å] at an estimate, with the problem's nuisances free and no prior but the gauge.

    The Poisson bound, whatever the dispersion. `relative` asks for depths relative to the field's mean, all that is measured when nobody knows the focus offset.
    """
    return depth_bounds(estimate.information * float(problem.dispersion), problem, relative)


def depth_sd(estimate: Estimate, problem: Problem, relative: bool = False) -> np.ndarray:
    """Standard deviation of each depth (C,) [Å], or of each depth less the field's mean."""
    n = len(problem.n_atoms)
    variances = estimate.variances[:n]
    if relative:
        mean = np.zeros(len(estimate.variances))
        mean[:n] = 1 / n
        variances = less_mean(variances, (estimate.factor @ (estimate.factor.T @ mean))[:n])
    return np.sqrt(variances)


def less_mean(variances: np.ndarray, with_mean: np.ndarray) -> np.ndarray:
    """Variances of quantities less their mean, from their own variances and their covariances with the mean."""
    return variances - 2 * with_mean + with_mean.mean()


def depth_bounds(fisher: np.ndarray, problem: Problem, relative: bool = False) -> np.ndarray:
    """Cramér-Rao bound on the depth of each column (C,) [Å] from the Fisher information (P, P) over the problem's free parameters, or more; background enters with its Poisson information."""
    n = len(problem.n_atoms)
    depths = covariance_of(fisher, problem)[:n, :n]
    return np.sqrt(less_mean(np.diag(depths), depths.mean(1)) if relative else np.diag(depths))


def covariance_of(fisher: np.ndarray, problem: Problem) -> np.ndarray:
    """Inverse of the Fisher information (P, P) over the free parameters, and whatever follows them, with no prior but the gauge; a direction without any (below 1e-12 of the largest) is left out."""
    gauge, free = np.zeros_like(fisher), len(parameter_names(problem))
    gauge[:free, :free] = prior_precision(problem) - np.diag(prior_curvature(problem))
    scale = np.sqrt(np.maximum(np.diag(fisher), 1e-30))
    return np.linalg.pinv((fisher + gauge) / np.outer(scale, scale), rcond=1e-12, hermitian=True) / np.outer(scale, scale)


class Amplitudes(NamedTuple):
    """Factor on each column's cross-section that the stack asks for, and its standard deviation (C,)."""

    value: np.ndarray
    sd: np.ndarray
    curvature: ArrowFactor | None = None  # of a large field, to go on with


def column_amplitudes(parameters: dict, problem: Problem, before: Amplitudes | None = None) -> Amplitudes:
    """Amplitudes of all columns jointly; `before` is for `local` alone.

    One weighted least-squares step from one, along which columns become brighter as they do by more atoms (`growth`); depths, positions if free, and background per image
    are free beside it, gain is held. (At a maximum with a wrong count, depths and neighbours' positions have moved so as to hide it: of 26 to 32 atoms of gold
    along [001], in focus at once, one atom short showed as 1.9 % where its cross-section lacks 3.2 %, if the column as it is was scaled and nothing moved.)
    """
    n_columns = len(problem.n_atoms)
    covariance, right, _ = _about_amplitudes(parameters, problem)
    return Amplitudes(1 + covariance[:n_columns] @ right[:, 0], np.sqrt(np.maximum(np.diag(covariance)[:n_columns], 0.0)))


class Share(NamedTuple):
    """Of a change of the expected counts that residuals hold, and its standard deviation."""

    value: float
    sd: float


def share_held(change: np.ndarray, parameters: dict, problem: Problem, amplitudes: Amplitudes) -> Share:
    """What share of a change (F, ny, nx) of the expected counts the residuals of a fit hold: one where the counts have it and the model has not, nought where neither has.

    The score test of that share (Rao, Proc. Camb. Phil. Soc. 44, 50 (1948)) beside what `column_amplitudes` frees: where columns lack something the fit has counted them
    wrong, and only what is not taken up by growing columns tells. `amplitudes` are for `local` alone.
    """
    covariance, right, own = _about_amplitudes(parameters, problem, change)
    return share_beside(own, right, covariance @ right[:, 1])


def share_beside(own: np.ndarray, common: np.ndarray, solved: np.ndarray) -> Share:
    """From the information (2, 2) among residuals and change, what parameters have in `common` with both (P, 2), and their inverse information times that with the change (P,).

    Where the parameters do all that the change does, or more by a matrix of other counts, nothing is known of the share: its standard deviation is infinite.
    """
    score, information = own[1] - solved @ common
    if information <= 1e-6 * own[1, 1]:
        return Share(0.0, np.inf)
    return Share(float(score / information), float(information**-0.5))


def _about_amplitudes(parameters: dict, problem: Problem, change: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Covariance (P, P) of amplitudes, depths, x and y, their information (P, K) with the residuals and a change, and that among these (K, K)."""
    grown, sums = growth(problem.library), [0.0, 0.0, 0.0]
    changes = jnp.zeros((0, *problem.counts.shape)) if change is None else jnp.asarray(change)[None]
    for i in range(len(problem.series.defocus)):
        sums = [total + np.asarray(part, float) for total, part in zip(sums, _amplitude_sums(parameters, problem, grown, changes, i), strict=True)]
    normal, right, own = sums
    unit = np.sqrt(np.maximum(np.diag(normal), 1e-30))
    return np.linalg.pinv(normal / np.outer(unit, unit), 1e-6, hermitian=True) / np.outer(unit, unit), right, own


@jax.jit
def _amplitude_sums(parameters: dict, problem: Problem, grown: ColumnLibrary, changes: jax.Array, i: jax.Array):
    """Normal matrix and right sides (float32) of `column_amplitudes` from one image: amplitudes, depths, x and y of all columns, beside the residuals and further changes."""
    moved, own, _, rate = image_terms(parameters, problem, i)
    if "x" not in problem.free:
        moved = moved[: len(problem.n_atoms)]
    field, draw = field_of(parameters, problem.n_atoms), problem.draw
    spectra = _spectra(field, problem, grown.weights(problem.n_atoms, defocus_minus_depth(field, problem.series)[:, i]), i)
    brighter = to_pixels(draw, spectra).reshape(len(problem.n_atoms), -1) * counts_per_fraction(problem.series)[i, 0, 0] * field.gain[i]
    rate = jnp.maximum(rate, DARKEST)
    root = jnp.where(problem.mask[i].ravel(), ((rate + problem.read_variance) * problem.dispersion) ** -0.5, 0.0)
    dark = own[1] * root
    dark = (dark / jnp.maximum(jnp.linalg.norm(dark), DARKEST)).astype(jnp.float32)
    rows = jnp.concatenate([brighter, moved]).astype(jnp.float32) * root.astype(jnp.float32)  # the largest of all that a small field needs
    layers = (jnp.concatenate([(problem.counts[i].ravel() - rate)[None], changes[:, i].reshape(len(changes), rate.size)]) * root).astype(jnp.float32)
    along, beside = rows @ dark, layers @ dark  # the image's background, profiled out
    return rows @ rows.T - jnp.outer(along, along), rows @ layers.T - jnp.outer(along, beside), layers @ layers.T - jnp.outer(beside, beside)


def rates(parameters: dict, problem: Problem) -> np.ndarray:
    """Expected counts (F, ny, nx), float32."""
    return np.asarray(_rates(parameters, problem))


@jax.jit
def _rates(parameters: dict, problem: Problem) -> jax.Array:
    return expected_counts(field_of(parameters, problem.n_atoms), problem.library, problem.series, problem.draw)
