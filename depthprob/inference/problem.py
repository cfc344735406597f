"""The problem of a stack: counts and the model they are compared with, its parameters, and what is known of them beforehand.

Parameters are a dictionary of arrays, one per name of `PARAMETERS`; depths and positions belong to columns, the rest to images.
Gain and background enter as logarithms. The gauge: image shifts sum to zero, and so do
distortions, so positions are those of the mean image.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..physics.focal_series import Field, FocalSeries, Renderer, displaced, from_middle, renderer
from ..physics.library import ColumnLibrary

PER_COLUMN = ("depth", "x", "y")
SMOOTH = ("background_x", "background_y", "background_xx", "background_xy", "background_yy")  # of a smooth background alone
AFFINE = ("distortion_xx", "distortion_xy", "distortion_yx", "distortion_yy")  # of distorted scans alone: what moves along the first, by the second
PER_IMAGE = ("log_gain", "log_background", "shift_x", "shift_y", *SMOOTH, *AFFINE)
GLOBAL = ("focus_offset", "focus_step", "source_variance")
PARAMETERS = PER_COLUMN + PER_IMAGE + GLOBAL
DARKEST = 1e-6  # e/pixel; a mean below it is not told from it by any series, and keeps logarithms finite
PRIOR_SD = dict.fromkeys(SMOOTH, 0.5) | dict.fromkeys(AFFINE, 0.02) | {"depth": 100.0, "x": 0.5, "y": 0.5, "log_gain": 0.1, "shift_x": 1.0, "shift_y": 1.0, "focus_offset": 20.0, "focus_step": 0.05, "source_variance": 0.05}
LARGE = 200  # columns beyond which fields are fitted window by window,
WIDE = 4e5  # and columns times pixels of an image that a window leaves out: every column is drawn in all of them otherwise, which compiles sooner
BACKGROUND_SHAPE = 4.0
MEAN_SD = {"shift_x": 1e-3, "shift_y": 1e-3} | dict.fromkeys(AFFINE, 1e-4)  # of means over the images, Å and 1; fixes the gauge


class Problem(eqx.Module):
    """A stack and the model it is compared with.

    Read noise of variance v [e^2] enters as the shifted Poisson distribution: counts + v is taken for Poisson with mean rate + v, which
    has the right mean and variance. Counts may then be negative; the score is linear in them, so none is clipped, which would bias it.

    Over-dispersed counts, of variance `dispersion` times Poisson's, divide the log-likelihood by it (quasi-likelihood; McCullagh and Nelder, Generalized
    Linear Models, 2nd edition, section 9.2): the maximum stays, error bars grow by its root. A detector whose pulses differ in height, or a gain wrongly
    stated, gives counts of just this kind; variance that grows with the square of the mean, as of a flickering beam, is the per-image gain's part.
    """

    counts: jax.Array
    library: ColumnLibrary
    series: FocalSeries
    draw: Renderer | None
    n_atoms: jax.Array
    mask: jax.Array
    start: dict
    read_variance: jax.Array
    free: tuple[str, ...] = eqx.field(static=True)
    dispersion: jax.Array | float = 1.0
    prior_sd: dict = eqx.field(default_factory=lambda: dict(PRIOR_SD))
    centre: dict = eqx.field(default_factory=dict)


def free_parameters(free: tuple[str, ...]) -> tuple[str, ...]:
    """Names in `PARAMETERS` behind the config's words; depths are always free."""
    words = {
        "positions": ("x", "y"),
        "background": ("log_background",),
        "gain": ("log_gain",),
        "image_shifts": ("shift_x", "shift_y"),
        "focus_offset": ("focus_offset",),
        "focus_step": ("focus_step",),
        "source_size": ("source_variance",),
        "smooth_background": SMOOTH,
        "image_distortions": AFFINE,
    }
    chosen = {"depth"} | {name for word in free for name in words[word]}
    return tuple(name for name in PARAMETERS if name in chosen)


def make_problem(
    counts: np.ndarray,
    field: Field,
    library: ColumnLibrary,
    series: FocalSeries,
    free: tuple[str, ...] = ("positions", "background", "gain", "image_shifts"),
    mask: np.ndarray | None = None,
    read_variance: float = 0.0,
    dense: bool = True,
    prior_sd: dict | None = None,
    centre: dict | None = None,
) -> Problem:
    """Gather a stack (F, ny, nx) [e/pixel], a starting field, what is free and the variance of read noise [e^2]; masked pixels (False) are not used.

    `free` holds the config's words and, for a background that varies slowly over each image, "smooth_background".

    Without `dense` only the functions of `local` take the result. `prior_sd` replaces entries of `PRIOR_SD`; one for "log_background"
    replaces its Gamma prior by a normal one. Priors stand about `centre`, a dictionary of parameters; absent, about the field, and depths about zero.
    """
    shifts, positions = np.asarray(field.image_shifts, float), np.asarray(field.positions, float)
    distortions = np.zeros((len(shifts), 2, 2)) if field.image_distortions is None else np.asarray(field.image_distortions, float)
    common, moved = distortions.mean(0), shifts.mean(0)
    positions = positions + moved + from_middle(positions, series) @ common.T
    distortions = (distortions - common) @ np.linalg.inv(np.eye(2) + common)  # of the field moved by what they have in common
    shifts = shifts - moved - distortions @ moved
    start = {
        "depth": field.depths,
        "x": positions[:, 0],
        "y": positions[:, 1],
        "log_gain": np.log(field.gain),
        "log_background": np.log(np.maximum(field.background, 1e-7)),
        "shift_x": shifts[:, 0],
        "shift_y": shifts[:, 1],
        "focus_offset": np.array(float(field.focus_offset)),
        "focus_step": np.array(float(field.focus_step)),
        "source_variance": np.array(float(field.source_variance)),
    }
    if "smooth_background" in free:
        shape = np.zeros((len(shifts), len(SMOOTH))) if field.background_shape is None else np.asarray(field.background_shape)
        start |= dict(zip(SMOOTH, shape.T, strict=True))
    if "image_distortions" in free or field.image_distortions is not None:
        start |= dict(zip(AFFINE, distortions.reshape(-1, 4).T, strict=True))
    start = {k: jnp.asarray(v, float) for k, v in start.items()}
    used = np.ones(np.shape(counts), bool) if mask is None else mask
    return Problem(
        jnp.asarray(counts, jnp.float32), library, series, renderer(library, series) if dense else None, jnp.asarray(field.n_atoms), jnp.asarray(used), start,
        jnp.asarray(float(read_variance)), free_parameters(free), prior_sd=PRIOR_SD | (prior_sd or {}), centre=centre or start | {"depth": 0 * start["depth"]},
    )


def field_of(parameters: dict, n_atoms: jax.Array) -> Field:
    """The field that a parameter dictionary describes."""
    p = parameters
    return Field(
        positions=jnp.stack([p["x"], p["y"]], 1),
        n_atoms=n_atoms,
        depths=p["depth"],
        background=jnp.exp(p["log_background"]),
        gain=jnp.exp(p["log_gain"]),
        image_shifts=jnp.stack([p["shift_x"], p["shift_y"]], 1),
        focus_offset=p["focus_offset"],
        focus_step=p["focus_step"],
        source_variance=p["source_variance"],
        background_shape=jnp.stack([p[name] for name in SMOOTH], 1) if SMOOTH[0] in p else None,
        image_distortions=jnp.stack([p[name] for name in AFFINE], 1).reshape(-1, 2, 2) if AFFINE[0] in p else None,
    )


def distortions_of(parameters: dict) -> np.ndarray | None:
    """E of every image (F, 2, 2), if images are distorted."""
    return np.stack([parameters[name] for name in AFFINE], 1).reshape(-1, 2, 2) if AFFINE[0] in parameters else None


def places(parameters: dict, series: FocalSeries) -> np.ndarray:
    """x, y of every column in every image (F, C, 2) [Å]."""
    positions, shifts = (np.stack([parameters[name + "x"], parameters[name + "y"]], 1) for name in ("", "shift_"))
    return displaced(positions, shifts, distortions_of(parameters), series)


def by_position(by_x, by_y, distortion) -> tuple:
    """Derivatives by a column's x and y from those by its place in an image with this distortion (2, 2), if any."""
    if distortion is None:
        return by_x, by_y
    return by_x + by_x * distortion[0, 0] + by_y * distortion[1, 0], by_y + by_x * distortion[0, 1] + by_y * distortion[1, 1]


def per_image(problem: Problem) -> tuple[str, ...]:
    """Names of the parameters that every image of a problem has of its own."""
    return tuple(name for name in PER_IMAGE if name in problem.start)


def log_prior(parameters: dict, problem: Problem) -> jax.Array:
    """Normal priors (`Problem.prior_sd` about `Problem.centre`), weak unless asked to be else, a Gamma prior for the background, and the gauge.

    Background has the improper Gamma density b^(BACKGROUND_SHAPE - 1), worth that many
    electrons in a whole image: nothing beside the signal, but it keeps the logarithm's posterior close to normal when b is zero.
    """
    total = 0.0
    for name in problem.free:
        value = parameters[name]
        if name not in problem.prior_sd:  # log_background
            total = total + BACKGROUND_SHAPE * jnp.sum(value)
        else:
            total = total - jnp.sum((value - problem.centre[name]) ** 2) / (2 * problem.prior_sd[name] ** 2)
    for name, sd in MEAN_SD.items():
        if name in problem.free:
            total = total - jnp.mean(parameters[name]) ** 2 / (2 * sd**2)
    return total


def parameter_names(problem: Problem) -> list:
    """(name, index) of every free parameter, in the order of the Fisher matrix."""
    return [(name, i) for name in problem.free for i in range(max(1, problem.start[name].size))]


def prior_curvature(problem: Problem) -> np.ndarray:
    """Curvature of each free parameter's own log-prior (P,); of a Gamma prior `BACKGROUND_SHAPE`, its value at the mode."""
    sd = problem.prior_sd
    return np.array([sd[n] ** -2 if n in sd else BACKGROUND_SHAPE for n, _ in parameter_names(problem)], float)


def prior_precision(problem: Problem) -> np.ndarray:
    """Curvature of the log-prior over the free parameters (P, P), the gauge included."""
    names = parameter_names(problem)
    precision = np.diag(prior_curvature(problem))
    for name, sd in MEAN_SD.items():
        chosen = np.array([i for i, (n, _) in enumerate(names) if n == name], int)
        if len(chosen):
            precision[np.ix_(chosen, chosen)] += 1 / (len(chosen) * sd) ** 2
    return precision


def to_vector(parameters: dict, problem: Problem) -> np.ndarray:
    """Free parameters in the order of the Fisher matrix."""
    return np.concatenate([np.ravel(parameters[n]) for n in problem.free])


def from_vector(vector, problem: Problem) -> dict:
    """Parameter dictionary with the free ones taken from a vector (works under jit)."""
    parameters, at = dict(problem.start), 0
    for name in problem.free:
        shape = problem.start[name].shape
        size = int(np.prod(shape))
        parameters[name] = vector[at : at + size].reshape(shape)
        at += size
    return parameters


@jax.jit
def prior_slope(vector: jax.Array, problem: Problem) -> jax.Array:
    """Gradient of the log-prior by the free parameters (P,)."""
    return jax.grad(lambda v: log_prior(from_vector(v, problem), problem))(vector)
