"""How a large field is drawn: every column within a window around it, as wide as the probe at each defocus.

Signals beyond a window, less than `FAINT` of the column's peak in that image, are left to the background.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import processes
from ..devices import SPREAD, WHOLE, on_all, rounded, spread
from ..physics.focal_series import FocalSeries, background_images
from ..physics.library import ColumnLibrary
from ..physics.windows import BATCH, WindowRenderer, draw_windows, overlap_windows, paint_windows, window_renderer
from .problem import DARKEST, PER_IMAGE, Problem, by_position, distortions_of, field_of, places

FAINT = 7e-4
CLASSES = 4  # window sizes per series, at most
COLUMNS_A_CLASS = 700  # compiling for one window size more takes seconds: so many columns win them back
MOVES = slice(1, 4)  # of a column's windows: derivatives by z = defocus - depth, x and y; the image itself comes before
SIGNS = np.array([1.0, -1.0, 1.0, 1.0, 1.0])


class Window(NamedTuple):
    """Images that share one window size: which they are, half width in pixels, and how to draw a column in it."""

    images: np.ndarray
    half: int
    draw: WindowRenderer


def window_radius(library: ColumnLibrary, z: float, faint: float = FAINT) -> float:
    """Half width [Å] beyond which a column seen at defocus - depth of +-z stays below `faint` of its peak, for any atom number; at most that of the library's images."""
    n_y, n_x = library.images.shape[1:]
    y, x = (np.fft.fftfreq(n, 1 / n) * library.pixel for n in (n_y, n_x))
    radius = np.hypot(y[:, None], x)
    largest = 0.0
    for n in sorted({1, library.n_max // 2 + 1, library.n_max}):
        weights = np.asarray(library.weights(jnp.array([n, n]), jnp.array([[-z], [z]])))[:, 0]
        for image in np.tensordot(weights, np.asarray(library.images), 1):
            largest = max(largest, float(radius[abs(image) > faint * image.max()].max()))
    return min(largest, library.pixel * min(n_x, n_y) / 2)


def plan_windows(library: ColumnLibrary, series: FocalSeries, depths: np.ndarray, faint: float = FAINT, margin: float = 5.0, room: float = 0.0, classes: int | None = None) -> list[Window]:
    """Group images by the size of window that the farthest column from each focus needs, for depths that move by `margin` Å; `room` as of `window_renderer`.

    Of few columns depths a little different ask for the same windows, which are compiled once: sizes are even, and of foci 10 Å apart.
    """
    defocus, classes = np.asarray(series.defocus), classes or min(CLASSES, 1 + len(depths) // COLUMNS_A_CLASS)
    farthest = np.maximum(abs(defocus - np.min(depths)), abs(defocus - np.max(depths))) + margin
    few = classes < CLASSES
    ends = np.linspace(0, 10 * np.ceil(farthest.max() / 10) if few else farthest.max(), classes + 1)[1:]
    found = []
    for low, high in zip([-1.0, *ends[:-1]], ends, strict=True):
        images = np.flatnonzero((farthest > low) & (farthest <= high * (1 + 1e-9)))
        if len(images):
            half = int(np.ceil(window_radius(library, high, faint) / series.pixel_size)) + 1
            half += half % 2 * few
            found.append(Window(images, half, window_renderer(library, series.pixel_size, half, high, room)))
    return found


def windows_about(parameters: dict, problem: Problem, room: float = 0.0, classes: int | None = None) -> list[Window]:
    """Windows that serve while depths move by 30 Å: what they cut off goes to the backgrounds, so a fit keeps them from its first step to its last."""
    return plan_windows(problem.library, problem.series, np.asarray(parameters["depth"]), margin=30.0, room=room, classes=classes)


@partial(jax.jit, static_argnames=("widening_too",))
def _draw_spread(n_atoms, z, offset, source_variance, library, draw, widening_too: bool) -> Float[Array, "column kind w w"]:
    """Windows of all columns, with derivatives."""
    own = lambda *columns: draw_windows(*columns, True, widening_too)
    return spread(own, (SPREAD, SPREAD, SPREAD, WHOLE, WHOLE, WHOLE))(n_atoms, z, offset, source_variance, library, draw)


@partial(jax.jit, static_argnames=("shape", "derivatives", "widening_too"))
def _paint_spread(n_atoms, z, offset, corners, source_variance, library, draw, shape: tuple[int, int], derivatives: bool, widening_too: bool, share=None) -> Float[Array, "device kind y x"]:
    """Sum of the windows of each device's columns, or of a share (column,) of each."""
    own = lambda share, *arrays: paint_windows(*arrays, shape, derivatives, widening_too, share)[None]
    share = (n_atoms > 0).astype(jnp.float32) if share is None else share
    return spread(own, (SPREAD, SPREAD, SPREAD, SPREAD, SPREAD, WHOLE, WHOLE, WHOLE))(share, n_atoms, z, offset, corners, source_variance, library, draw)


@partial(jax.jit, static_argnames=("widening_too",))
def _overlap_spread(layers, n_atoms, z, offset, corners, source_variance, library, draw, widening_too: bool) -> Float[Array, "column kind layer"]:
    """Overlaps of all columns' windows with the layers."""
    own = lambda *columns: overlap_windows(*columns, widening_too)
    specs = (WHOLE, SPREAD, SPREAD, SPREAD, SPREAD, WHOLE, WHOLE, WHOLE)
    return spread(own, specs)(layers, n_atoms, z, offset, corners, source_variance, library, draw)


class Placed(NamedTuple):
    """Where the columns stand in one image: window corners on the padded canvas (C, 2: y, x), offsets (C, 2: x, y) [Å], z (C,) [Å].

    Filled up with columns beyond the canvas, to a number that can be spread over all devices.
    """

    corners: np.ndarray
    offsets: np.ndarray
    z: np.ndarray


def place(parameters: dict, problem: Problem, i: int, half: int, pad: int) -> Placed:
    series = problem.series
    px, shape = series.pixel_size, np.array(series.shape)
    at = places({name: value[i : i + 1] if name in PER_IMAGE else value for name, value in parameters.items()}, series)[0]
    if series.periodic:
        at = np.mod(at, shape[::-1] * px)
    first = np.floor(at / px).astype(int) - half
    low, high = np.array([-pad, -pad]), shape[::-1] + pad - (2 * half + 1)
    first = np.clip(first, low, high)
    nominal = np.asarray(series.defocus)
    focus = float(parameters["focus_offset"]) + nominal.mean() + float(parameters["focus_step"]) * (nominal[i] - nominal.mean())
    placed = Placed(np.ascontiguousarray((first + pad)[:, ::-1]), at - first * px, focus - np.asarray(parameters["depth"]))
    more = rounded(len(at), BATCH) - len(at)
    return Placed(*(np.pad(a, [(0, more)] + [(0, 0)] * (a.ndim - 1)) for a in placed))


def _fold(canvas: np.ndarray, pad: int, periodic: bool) -> np.ndarray:
    """The image within the padding, with what a periodic image finds beyond its edges."""
    if not periodic:
        return canvas[:, pad:-pad, pad:-pad]
    ny, nx = (n - 2 * pad for n in canvas.shape[1:])
    out = np.zeros((len(canvas), ny, nx), canvas.dtype)
    rows, cols = (np.arange(-pad, n + pad) % n for n in (ny, nx))
    half = np.zeros((len(canvas), ny, canvas.shape[2]), canvas.dtype)
    np.add.at(half, (slice(None), rows), canvas)
    np.add.at(out, (slice(None), slice(None), cols), half)
    return out


def unfold(layers: np.ndarray, pad: int, periodic: bool) -> np.ndarray:
    width = [(0, 0), (pad, pad), (pad, pad)]
    return np.pad(layers, width, mode="wrap") if periodic else np.pad(layers, width)


def plain(parameters: dict) -> dict:
    return {k: np.asarray(v, float) for k, v in parameters.items()}


def _columns_of(parameters: dict, problem: Problem, placed: Placed) -> tuple[Array, ...]:
    """Atom numbers (zero for columns that fill up), z, offsets and corners, and the source variance."""
    n = np.pad(np.asarray(problem.n_atoms), (0, len(placed.z) - len(problem.n_atoms)))
    return (*(jnp.asarray(a) for a in (n, placed.z, placed.offsets, placed.corners)), jnp.asarray(parameters["source_variance"], jnp.float32))


def draw_columns(parameters: dict, problem: Problem, window: Window, placed: Placed) -> Float[Array, "column kind w w"]:
    """Windows of all columns in one image, with derivatives; of those that fill up, zero."""
    n, z, offsets, _, variance = _columns_of(parameters, problem, placed)
    return _draw_spread(n, z, offsets, variance, problem.library, window.draw, "source_variance" in problem.free)


class Image(NamedTuple):
    """One image: where its columns stand, electrons per unit of their signal, and the expected counts of signal, background and both (ny, nx), and of the signal's derivatives by z, x, y and so on, if asked for."""

    placed: Placed
    unit: float
    signal: np.ndarray
    dark: np.ndarray
    rate: np.ndarray
    slopes: list[np.ndarray]


def painted(parameters: dict, problem: Problem, window: Window, placed: Placed, pad: int, derivatives: bool, share: np.ndarray | None = None) -> Float[np.ndarray, "kind y x"]:
    """Sums of all columns' windows, or of a share (C,) of each."""
    shape = tuple(n + 2 * pad for n in problem.series.shape)
    share = None if share is None else jnp.asarray(np.pad(share, (0, len(placed.z) - len(share))), jnp.float32)
    canvas = _paint_spread(*_columns_of(parameters, problem, placed), problem.library, window.draw, shape, derivatives, "source_variance" in problem.free, share)
    return _fold(np.asarray(canvas).sum(0), pad, problem.series.periodic).astype(float)


def _electrons(series: FocalSeries, i: int) -> float:
    """Incident on a pixel of image i."""
    return float(np.broadcast_to(np.asarray(series.dose, float), len(series.defocus))[i]) * series.pixel_size**2


def unit_of(parameters: dict, problem: Problem, i: int) -> float:
    """Electrons counted in image i per unit of its columns' signal."""
    return _electrons(problem.series, i) * float(np.exp(parameters["log_gain"][i]))


def image_of(parameters: dict, problem: Problem, i: int, window: Window, pad: int, derivatives: bool = False) -> Image:
    series, unit = problem.series, unit_of(parameters, problem, i)
    placed = place(parameters, problem, i, window.half, pad)
    signal, *slopes = unit * painted(parameters, problem, window, placed, pad, derivatives)
    own = field_of({name: value[i : i + 1] if name in PER_IMAGE else value for name, value in parameters.items()}, problem.n_atoms)
    dark = np.broadcast_to(_electrons(series, i) * np.asarray(background_images(own, series)[0], float), signal.shape)
    return Image(placed, unit, signal, dark, np.maximum(signal + dark, DARKEST), slopes)


def over_columns(parameters: dict, problem: Problem, image: Image, window: Window, layers: np.ndarray, pad: int) -> Float[np.ndarray, "column kind layer"]:
    """Sums over pixels of layers (L, ny, nx) times the derivatives by each column's amplitude, depth, x, y and the source variance."""
    seen = on_all(unfold(layers.astype(np.float32), pad, problem.series.periodic))
    columns = _columns_of(parameters, problem, image.placed)
    sums = np.asarray(_overlap_spread(seen, *columns, problem.library, window.draw, "source_variance" in problem.free), float)[: len(problem.n_atoms)]
    return sums * image.unit * SIGNS[: sums.shape[1], None]


def by_columns_position(by_place: np.ndarray, parameters: dict, i: int) -> np.ndarray:
    """Derivatives (C, kind, ...) of image i by each column's z, x and y from those by z and place."""
    distortions = distortions_of(parameters)
    if distortions is None or by_place.shape[1] < 3:
        return by_place
    return np.stack([by_place[:, 0], *by_position(by_place[:, 1], by_place[:, 2], distortions[i])], 1)


def precision_of(rate: np.ndarray, problem: Problem, i: int) -> np.ndarray:
    """Of the counts of image i, by pixel; zero where masked."""
    return np.asarray(problem.mask[i]) / (np.maximum(rate, DARKEST) + float(problem.read_variance)) / float(problem.dispersion)


def own_images(windows: list[Window], wanted: np.ndarray | range) -> list[tuple[Window, int]]:
    """Those that fall to this process, with their windows."""
    return processes.share([(w, i) for w in windows for i in w.images.tolist() if i in wanted])


def widest(windows: list[Window]) -> int:
    """Padding that takes in every window of a column at the field's edge."""
    return 2 * max(w.half for w in windows) + 2
