"""The likelihood of large fields: every column is seen only within a window around it, as wide as the probe at each defocus.

The same model as `likelihood`, whose products over the whole field grow with columns times pixels; here the cost is linear in columns.
Images and derivatives are float32, and so are sums over the pixels of a tile and the images of one window size; everything added after is float64.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from .. import processes
from ..physics.focal_series import from_middle, smooth_functions
from .arrow import ArrowFactor, ArrowMatrix, plus_diagonal
from .counts import growth
from .drawing import (
    FAINT,
    MOVES,
    Window,
    by_columns_position,
    image_of,
    over_columns,
    own_images,
    painted,
    place,
    plain,
    plan_windows,
    precision_of,
    unit_of,
    widest,
    windows_about,
)
from .likelihood import DEAR, LARGEST_STEP, ROUGH, Amplitudes, Estimate, Mode, Share, less_mean, share_beside
from .problem import (
    GLOBAL,
    MEAN_SD,
    PER_COLUMN,
    PER_IMAGE,
    SMOOTH,
    Problem,
    distortions_of,
    from_vector,
    log_prior,
    parameter_names,
    per_image,
    prior_curvature,
    prior_slope,
    to_vector,
)
from .tiles import BAND, column_information, strips_of

DIM = 1e-2  # of a column's peak, to where its derivatives enter Fisher information: standard deviations come out 0.4 % small, 2 % at most, at a third of the cost
MOSTLY = 0.7  # of what a step lacks is a few columns' doing, and not an old Fisher matrix's
CLOSE = 0.03  # standard deviations, root mean square over parameters, from the maximum: near enough
SHARP = 0.75  # of the images, nearest to focus, that tell the numbers of atoms: the others have the widest windows, blur neighbours into one, and would tell them 5 % better; half of the images tell them 40 % worse


class Sums(NamedTuple):
    """What `evaluate` adds up.

    Attributes
    ----------
    log_likelihood : float
    rate : (F, ny, nx) float32
        Expected counts.
    score : dict of arrays
        Derivative of the log-likelihood by every parameter.
    along : dict of (size, K) arrays
        Information between every parameter and the K directions that `evaluate` was given.
    """

    log_likelihood: float
    rate: np.ndarray
    score: dict
    along: dict


def rates(parameters: dict, problem: Problem, windows: list[Window] | None = None) -> np.ndarray:
    """Expected counts (F, ny, nx), float32."""
    return evaluate(parameters, problem, windows, derivatives=False).rate


def signals(parameters: dict, problem: Problem, windows: list[Window]) -> np.ndarray:
    """Expected counts (F, ny, nx) float32 of the columns alone, without background and of any sign."""
    parameters, pad = plain(parameters), widest(windows)
    total = np.zeros((len(problem.series.defocus), *problem.series.shape), np.float32)
    for window, i in own_images(windows, range(len(total))):
        placed = place(parameters, problem, i, window.half, pad)
        total[i] = unit_of(parameters, problem, i) * painted(parameters, problem, window, placed, pad, False)[0]
    return processes.total(total)


def _lever(problem: Problem, i: int) -> float:
    """Change of an image's focus [Å] by the focus step."""
    nominal = np.asarray(problem.series.defocus)
    return float(nominal[i] - nominal.mean())


def _smooth_shapes(parameters: dict, problem: Problem) -> np.ndarray:
    """Functions of `SMOOTH` (5, ny, nx), or none."""
    return smooth_functions(problem.series.shape) if SMOOTH[0] in parameters else np.empty((0, *problem.series.shape))


def _levers(parameters: dict, problem: Problem) -> np.ndarray:
    """x, y of the columns from the middle of the field (C, 2) [Å], by which distortions move them; (C, 0) where there are none."""
    positions = np.stack([parameters["x"], parameters["y"]], 1)
    return from_middle(positions, problem.series)[:, : 2 * (distortions_of(parameters) is not None)]


def evaluate(
    parameters: dict,
    problem: Problem,
    windows: list[Window] | None = None,
    images: np.ndarray | None = None,
    derivatives: bool = True,
    progress: Callable = lambda items, **_: items,
    directions: np.ndarray | None = None,
) -> Sums:
    """Log-likelihood, expected counts and score, one image at a time.

    Parameters
    ----------
    images : (m,) int, optional
        Only these; the rest of `rate` stays zero.
    derivatives : bool
        Without, only log-likelihood and rate.
    directions : (K, F, ny, nx), optional
        Changes of the expected counts, for `Sums.along`.
    """
    parameters = plain(parameters)
    windows = windows or plan_windows(problem.library, problem.series, parameters["depth"])
    n_columns, n_foci, shape = len(problem.n_atoms), len(problem.series.defocus), problem.series.shape
    names = per_image(problem)
    variance = float(problem.read_variance)
    directions = np.empty((0, n_foci, *shape)) if directions is None else directions
    size = dict.fromkeys(PER_COLUMN, n_columns) | dict.fromkeys(names, n_foci) | dict.fromkeys(GLOBAL, 1)
    along = {name: np.zeros((n, 1 + len(directions))) for name, n in size.items()}  # the score, then each direction
    rate = np.zeros((n_foci, *shape), np.float32)
    total = 0.0
    wanted = np.arange(n_foci) if images is None else np.asarray(images)
    pad, shapes, levers = widest(windows), _smooth_shapes(parameters, problem), _levers(parameters, problem)
    for window, i in progress(own_images(windows, wanted), desc="images", unit="image"):
        image = image_of(parameters, problem, i, window, pad)
        rate[i] = image.rate
        counts, used = np.asarray(problem.counts[i], float), np.asarray(problem.mask[i])
        total += float(np.where(used, (counts + variance) * np.log(image.rate + variance) - image.rate, 0.0).sum()) / float(problem.dispersion)
        if not derivatives:
            continue
        changes = np.stack([counts - image.rate, *(c[i] for c in directions)]) * precision_of(image.rate, problem, i)
        by_column = np.concatenate([over_columns(parameters, problem, image, window, change[None], pad) for change in changes], -1)  # compiled for one layer
        for name, sums in zip(PER_COLUMN, by_columns_position(by_column[:, MOVES], parameters, i).swapaxes(0, 1), strict=True):
            along[name] += sums
        # what moves all columns alike sums over them
        by_depth, by_x, by_y, *by_variance = by_column[:, 1:].sum(0)
        of_pixels = np.tensordot(np.stack([image.signal, image.dark, *(image.dark * shapes)]), changes, ([1, 2], [1, 2]))
        by_distortion = np.einsum("ca,ckl->kal", levers, by_column[:, 2:4]).reshape(-1, len(changes))
        for name, row in zip(names, (*of_pixels[:2], by_x, by_y, *of_pixels[2:], *by_distortion), strict=True):
            along[name][i] = row
        for name, row in zip(GLOBAL, (-by_depth, -by_depth * _lever(problem, i), *by_variance), strict=False):
            along[name] += row
    total, rate, along = processes.total((total, rate, along))
    return Sums(float(total), rate, {name: a[:, 0] for name, a in along.items()}, {name: a[:, 1:] for name, a in along.items()})


def information_along(parameters: dict, problem: Problem, directions: np.ndarray) -> np.ndarray:
    """Information (P, K) between the free parameters and changes of the expected counts (K, F, ny, nx), as `likelihood.information_along`."""
    along = evaluate(parameters, problem, directions=directions).along
    return np.concatenate([along[name] for name in problem.free])


def memory(problem: Problem, draws: int = 0) -> float:
    """Bytes that fitting a field takes, with so many draws of its posterior: within a third of what fields of 400 to 6,000 columns took."""
    parameters, series, n_columns = plain(problem.start), problem.series, len(problem.n_atoms)
    wide, narrow = (plan_windows(problem.library, series, parameters["depth"], faint) for faint in (FAINT, DIM))
    rows = 3 * np.array([len(part) for part in strips_of(parameters, series, narrow)])
    matrix = 8.0 * ((rows**2).sum() + (rows[1:] * rows[:-1]).sum())
    nuisances = len(per_image(problem)) * len(series.defocus) + len(GLOBAL)
    per_column = 6 * 4 * (2 * max(w.half for w in wide) + 1) ** 2 + 3 * 8 * (5 * nuisances + 4 * draws)
    return 1e9 + 3.5 * matrix + 2 * BAND + n_columns * per_column + 12 * 8 * problem.counts.size


def information(parameters: dict, problem: Problem, rate: np.ndarray, progress: Callable = lambda items, **_: items) -> ArrowMatrix:
    """Fisher information over columns and all nuisances, free or not: `select` takes the free ones.

    Derivatives stop where they are `DIM`, all alike: so what columns and nuisances do in common (all positions and an image's shift) stays in common,
    and the matrix positive. Nuisances come after the columns, the k names `per_image`, image by image for each, then `GLOBAL`.
    """
    parameters = plain(parameters)
    windows = plan_windows(problem.library, problem.series, parameters["depth"], DIM)
    columns = column_information(parameters, problem, rate, windows, progress=progress)
    n_columns, n_foci, names, pad = len(problem.n_atoms), len(problem.series.defocus), per_image(problem), widest(windows)
    border, corner = np.zeros((3, n_columns, columns.corner.shape[0])), np.zeros_like(columns.corner)
    shapes, levers = _smooth_shapes(parameters, problem), _levers(parameters, problem)
    for window, i in own_images(windows, range(n_foci)):
        image = image_of(parameters, problem, i, window, pad, derivatives=True)
        by_z, by_x, by_y, *by_variance = image.slopes
        by_variance = by_variance or [np.zeros_like(by_z)]
        leant = [image.unit * painted(parameters, problem, window, image.placed, pad, True, lever)[2:4] for lever in levers.T]
        by_distortion = [of_lever[k] for k in range(2) for of_lever in leant]
        own = np.stack([image.signal, image.dark, by_x, by_y, *(image.dark * shapes), *by_distortion, by_z, by_z * _lever(problem, i), *by_variance])
        weighted = own * precision_of(rate[i].astype(float), problem, i)
        at = [j * n_foci + i for j in range(len(names))] + [len(names) * n_foci + j for j in range(len(GLOBAL))]
        corner[np.ix_(at, at)] += np.tensordot(weighted, own, ([1, 2], [1, 2]))
        border[:, :, at] += by_columns_position(over_columns(parameters, problem, image, window, weighted, pad)[:, MOVES], parameters, i).swapaxes(0, 1)
    border, corner = processes.total((border, corner))
    return columns._replace(border=border.reshape(3 * n_columns, -1)[columns.order], corner=corner)


def select(matrix: ArrowMatrix, problem: Problem) -> ArrowMatrix:
    """Only the free parameters, in the order of `problem.to_vector`."""
    n_columns, n_foci = len(problem.n_atoms), len(problem.series.defocus)
    kept, names = [], per_image(problem)
    for j, name in enumerate(names):
        if name in problem.free:
            kept += list(range(j * n_foci, (j + 1) * n_foci))
    kept += [len(names) * n_foci + j for j, name in enumerate(GLOBAL) if name in problem.free]
    matrix = matrix._replace(border=matrix.border[:, kept], corner=matrix.corner[np.ix_(kept, kept)])
    if "x" in problem.free:
        return matrix
    order, diagonal, lower, border = matrix.order, [], [], []
    keep = [np.flatnonzero(order[a:b] < n_columns) for a, b in zip(matrix.starts()[:-1], matrix.starts()[1:], strict=True)]
    at = matrix.starts()
    for s, k in enumerate(keep):
        diagonal.append(matrix.diagonal[s][np.ix_(k, k)])
        border.append(matrix.border[at[s] + k])
        if s + 1 < len(keep):
            lower.append(matrix.lower[s][np.ix_(keep[s + 1], k)])
    return ArrowMatrix(np.concatenate([order[at[s] + k] for s, k in enumerate(keep)]), diagonal, lower, np.concatenate(border), matrix.corner)


def gauge(problem: Problem) -> np.ndarray:
    """Precision (k, k) over the free nuisances that holds the mean image shift at zero, and the mean distortion."""
    n_foci = len(problem.series.defocus)
    names = [name for name in PER_IMAGE if name in problem.free]
    k = len(names) * n_foci + sum(name in problem.free for name in GLOBAL)
    precision = np.zeros((k, k))
    for j, name in enumerate(names):
        if name in MEAN_SD:
            precision[j * n_foci : (j + 1) * n_foci, j * n_foci : (j + 1) * n_foci] = 1 / (n_foci * MEAN_SD[name]) ** 2
    return precision


def maximum(problem: Problem, progress: Callable = lambda items, **_: items, before: Mode | None = None) -> Estimate:
    """Joint maximum with its covariance, as `likelihood.maximum`, for fields too large for its dense matrices: from near the maximum by the matrix there."""
    rough = find_mode(problem, progress, ROUGH, before=before)
    matrix = select(information(rough.parameters, problem, rates(rough.parameters, problem), progress), problem)
    factor = ArrowFactor(plus_diagonal(matrix, prior_curvature(problem), gauge(problem)))
    near = eqx.tree_at(lambda p: p.start, problem, rough.parameters)
    mode = find_mode(near, progress, before=rough._replace(curvature=factor))
    return Estimate(mode.parameters, factor.variances(), factor, matrix, parameter_names(problem), mode.log_posterior, rough.iterations + mode.iterations, mode.converged)


class _At(NamedTuple):
    """Parameters, their log-posterior and its slope by the free ones, and the expected counts."""

    parameters: dict
    value: float
    slope: np.ndarray
    rate: np.ndarray


def find_mode(problem: Problem, progress: Callable = lambda items, **_: items, close: float = CLOSE, max_iterations: int = 20, before: Mode | None = None) -> Mode:
    """Joint maximum to `close` standard deviations, root mean square over parameters.

    The Fisher matrix is kept as long as steps predict their gain well, or are fewer at their present pace than the `DEAR` ones it costs: from the mode `before` atom numbers were mended, too. (One from a
    part of the images only is no substitute: common moves of all positions, soft against the image shifts, then never come to rest.) Where few columns
    lead astray, such as thin ones far from their place, they are held back while the others go on.
    """
    parameters = plain(problem.start)
    names = parameter_names(problem)
    prior = prior_curvature(problem)
    most = np.array([LARGEST_STEP.get(n, 0.3) for n, _ in names])
    column = np.array([c for name, c in names if name in PER_COLUMN])
    if not np.any(parameters["depth"]):
        windows = plan_windows(problem.library, problem.series, parameters["depth"], margin=70.0)
        tried = [parameters | {"depth": parameters["depth"] + d} for d in np.arange(-60, 61, 20.0)]
        parameters = max(progress(tried, desc="common depth", unit="depth"), key=lambda p: evaluate(p, problem, windows, np.arange(len(problem.series.defocus))[::4], derivatives=False).log_likelihood)
    windows = windows_about(parameters, problem)

    def look(parameters: dict) -> _At:
        sums = evaluate(parameters, problem, windows)
        slope = np.concatenate([np.ravel(sums.score[n]) for n in problem.free]) + np.asarray(prior_slope(to_vector(parameters, problem), problem))
        value, slope = processes.of_first((sums.log_likelihood + float(log_prior(parameters, problem)), slope))
        return _At(parameters, float(value), slope, sums.rate)

    move = lambda at, step: look(plain(from_vector(to_vector(at.parameters, problem) + step, problem)))
    factor, damping, limit = before.curvature if before else None, 1e-6, most
    here, newton, away, iteration = look(parameters), np.zeros(len(names)), np.inf, 0
    lagging = converged = False
    for iteration in progress(range(max_iterations), desc="joint fit", unit="step"):
        if factor is not None:
            newton = processes.of_first(factor.solve(here.slope))
            left = newton @ here.slope
            factor = None if lagging and np.log(left / (close**2 * len(names))) > DEAR * np.log(away / left) else factor
        if factor is None:
            matrix = select(information(here.parameters, problem, here.rate), problem)
            factor = ArrowFactor(plus_diagonal(matrix, prior + damping * _diagonal(matrix), gauge(problem)))
            newton = processes.of_first(factor.solve(here.slope))
        step = np.clip(newton, -limit, limit)
        moved = move(here, step)
        # for a quadratic the slope predicts twice the gain, which is half the squared distance to the maximum in standard deviations
        expected, gained, away = processes.of_first((float(step @ here.slope) / 2, moved.value - here.value, float(newton @ here.slope)))
        limit, lagging = np.minimum(2 * limit, most), False
        if gained < 0.5 * expected:
            # what each column's gain, by the trapezoidal rule, lacks of what was expected
            lacks = np.maximum(0, np.bincount(column, (-step * moved.slope)[: len(column)]))
            astray = lacks > 0.01 * lacks.sum()
            few = lacks[astray].sum() > MOSTLY * lacks.sum()
            if few:
                held = np.pad(astray[column], (0, len(step) - len(column)))
                limit = np.where(held, abs(step) / 4, limit)
                moved = moved if gained > 0 else move(here, np.where(held, 0.0, step))
            better = moved.value > here.value
            lagging, factor = better and not few, factor if better else None
            if lagging or not better:
                damping = min(100.0, 30 * damping) if gained < 0 else damping / 3
        here = max(here, moved, key=lambda at: at.value)
        if away < close**2 * len(step):
            converged = True
            break
    return Mode({k: jnp.asarray(v) for k, v in here.parameters.items()}, here.value, iteration + 1, converged, factor)


def _diagonal(matrix: ArrowMatrix) -> np.ndarray:
    out = np.empty(matrix.size)
    out[matrix.order] = np.concatenate([np.diag(d) for d in matrix.diagonal])
    out[len(matrix.order) :] = np.diag(matrix.corner)
    return out


def factor_of(matrix: ArrowMatrix, problem: Problem) -> ArrowFactor:
    """Factor of the Fisher information over the free parameters, with no prior but the gauge and a part in 10^10 for directions that no image informs."""
    held = gauge(problem)
    further = len(matrix.corner) - len(held)
    return ArrowFactor(plus_diagonal(matrix, 1e-10 * _diagonal(matrix), np.pad(held, (0, further))))


def column_bounds(estimate: Estimate, problem: Problem, relative: bool = False) -> np.ndarray:
    """Cramér-Rao bound on the depth of each column (C,) [Å] at an estimate, no prior but the gauge, as `likelihood.column_bounds`."""
    return depth_bounds(estimate.information, problem, relative) / float(problem.dispersion) ** 0.5


def depth_bounds(matrix: ArrowMatrix, problem: Problem, relative: bool = False) -> np.ndarray:
    """The same from a Fisher matrix over the free parameters, and whatever follows them, as `likelihood.depth_bounds`."""
    factor = factor_of(matrix, problem)
    return _depth_sd(factor, factor.variances(), len(problem.n_atoms), relative)


def depth_sd(estimate: Estimate, problem: Problem, relative: bool = False) -> np.ndarray:
    """Standard deviation of each depth (C,) [Å], or of each depth less the field's mean."""
    return _depth_sd(estimate.factor, estimate.variances, len(problem.n_atoms), relative)


def _depth_sd(factor: ArrowFactor, variances: np.ndarray, n: int, relative: bool) -> np.ndarray:
    mean = np.zeros(len(variances))
    mean[:n] = 1 / n
    return np.sqrt(less_mean(variances[:n], factor.solve(mean)[:n]) if relative else variances[:n])


def column_amplitudes(parameters: dict, problem: Problem, before: Amplitudes | None = None) -> Amplitudes:
    """As `likelihood.column_amplitudes`, from the `SHARP` images, with backgrounds held at the fit's.

    The Fisher matrix is taken over from amplitudes `before` where columns are much the same: a step with it is right to first order in
    its change, which for a few counts mended by one atom is a few per cent.
    """
    parameters = plain(parameters)
    score, _, rate = _about_amplitudes(parameters, problem)
    curvature = before.curvature if before else None
    if curvature is None:
        n_columns, sharp = len(problem.n_atoms), _sharp_images(parameters, problem)
        narrow = [w._replace(images=np.intersect1d(w.images, sharp)) for w in plan_windows(problem.library, problem.series, parameters["depth"], DIM)]
        matrix = column_information(parameters, problem, rate, [w for w in narrow if len(w.images)], _grown(problem))
        held = 1e-10 if "x" in problem.free else 1e10
        curvature = ArrowFactor(plus_diagonal(matrix, np.repeat([1e-10, 1e-10, held, held], n_columns) * _diagonal(matrix)))
    amplitude = slice(len(problem.n_atoms))
    return Amplitudes(1 + curvature.solve(score[:, 0])[amplitude], before.sd if before else np.sqrt(curvature.variances()[amplitude]), curvature)


def share_held(change: np.ndarray, parameters: dict, problem: Problem, amplitudes: Amplitudes) -> Share:
    """As `likelihood.share_held`, from the `SHARP` images. With a Fisher matrix that `amplitudes` have taken over from other counts it is off by up to 0.7 of the share, and 0.15 where there is none."""
    common, own, _ = _about_amplitudes(plain(parameters), problem, change)
    return share_beside(own, common, amplitudes.curvature.solve(common[:, 1]))


def _about_amplitudes(parameters: dict, problem: Problem, change: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Information of amplitudes, depths, x and y with the residuals and a change (4 C, K), that among these (K, K), and expected counts (F, ny, nx), of the `SHARP` images alone."""
    grown, windows = _grown(problem), windows_about(parameters, problem)
    pad, kinds = widest(windows), 1 + (change is not None)
    common, own, rate = np.zeros((len(problem.n_atoms), 4, kinds)), np.zeros((kinds, kinds)), np.zeros(problem.counts.shape, np.float32)
    for window, i in own_images(windows, _sharp_images(parameters, problem)):
        image = image_of(parameters, problem, i, window, pad)
        rate[i] = image.rate
        layers = np.stack([np.asarray(problem.counts[i], float) - image.rate, *([] if change is None else [change[i]])])
        weight = precision_of(image.rate, problem, i)
        if change is not None:  # beside the image's background, too
            dark = image.dark * weight
            layers = layers - np.multiply.outer(np.tensordot(layers, dark, 2) / np.sum(dark * image.dark), image.dark)
        own += np.tensordot(layers * weight, layers, ([1, 2], [1, 2]))
        overlap = lambda of: np.concatenate([over_columns(parameters, of, image, window, layer[None], pad) for layer in layers * weight], -1)  # noqa: B023
        common += np.concatenate([overlap(grown)[:, :1], by_columns_position(overlap(problem)[:, MOVES], parameters, i)], 1)
    common, own, rate = processes.total((common, own, rate))
    return common.swapaxes(0, 1).reshape(-1, kinds), own, rate


def _grown(problem: Problem) -> Problem:
    """Columns that become brighter as they do by more atoms."""
    return dataclasses.replace(problem, library=growth(problem.library))


def _sharp_images(parameters: dict, problem: Problem) -> np.ndarray:
    away = abs(np.asarray(problem.series.defocus) - np.median(parameters["depth"]))
    return np.flatnonzero(away <= np.quantile(away, SHARP))
