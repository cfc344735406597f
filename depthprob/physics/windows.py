"""Images of columns in small windows: a few functions of y times a few functions of x.

The images of a library, band-limited and smooth, are sums over some fifteen products u_k(y) v_l(x), for any aberrations: with the basis images
B_r(y, x) = sum_kl u_k(y) C_r[k, l] v_l(x) a column's window is two small matrix products, about five times faster than a table of radii. A shift moves
the functions, and a wider source blurs them, for a Gaussian is a product of one of y and one of x: both exact, in their Fourier series.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .library import ColumnLibrary

TOLERANCE = 5e-5  # largest error of a column's image in its window, of its peak
BATCH = 64  # columns that a processor draws at a time: they stay in its cache
WIDE = 1024  # columns that a GPU draws at a time
FINEST = 0.02  # Å between positions of a column that functions are tabulated at, and interpolated between by cubic Hermite polynomials
# each kind of a column's windows as a sum of products of functions: (factor, image or its derivative by z, order of derivative along y, along x)
KINDS = (((1.0, 0, 0, 0),), ((1.0, 1, 0, 0),), ((-1.0, 0, 0, 1),), ((-1.0, 0, 1, 0),), ((0.5, 0, 0, 2), (0.5, 0, 2, 0)))


class WindowRenderer(NamedTuple):
    """What draws a column in its window.

    Attributes
    ----------
    cores : (R, K, L)
        Basis images in the functions of y and x.
    along_y, along_x : (K, q), (L, q) complex
        Fourier series of those functions.
    waves : (position, w, q) complex
        exp(2 pi i q t) at the window's pixels for a column at each tabulated position within a pixel; zero beyond the library's own images.
    q : (q,)
        [1/Å].
    step : float
        Between those positions [Å].
    first : float
        Position of a column at the first of them [Å].
    """

    cores: jax.Array
    along_y: jax.Array
    along_x: jax.Array
    waves: jax.Array
    q: jax.Array
    step: jax.Array
    first: jax.Array


def window_renderer(library: ColumnLibrary, pixel: float, half: int, farthest: float, room: float = 0.0, tolerance: float = TOLERANCE) -> WindowRenderer:
    """For windows of 2 half + 1 pixels of `pixel` Å and columns no farther than `farthest` Å from focus, in the middle pixel or up to `room` pixels beyond its edges; `tolerance` is its images' largest error, of their peak."""
    images = np.asarray(library.images, float)
    numbers = np.unique(np.linspace(1, library.n_max, 4).astype(int))
    z = np.linspace(-farthest, farthest, 33)
    seen = np.asarray(library.weights(jnp.asarray(numbers), jnp.asarray(np.tile(z, (len(numbers), 1))))).reshape(-1, len(images))
    examples = np.tensordot(seen, images, 1)
    examples /= abs(examples).max((1, 2), keepdims=True)
    vectors = [np.linalg.eigh(np.tensordot(examples, examples, ([0, 2 - axis], [0, 2 - axis])))[1][:, ::-1] for axis in (0, 1)]
    for k in range(6, len(vectors[0]) + 1, 2):
        u, v = (a[:, :k] for a in vectors)
        if abs(u @ (u.T @ examples @ v) @ v.T - examples).max() < tolerance:
            break
    size = images.shape[1]
    cell = size * library.pixel
    # zero at the edge of the cell, beyond which nothing is drawn: cut off there, an image would jump with its place between two pixels
    fade = np.clip((cell / 2 - abs(np.fft.fftfreq(size, 1 / cell)))[:, None] / library.pixel, 0, 1)
    q = np.arange(int(library.band_limit * cell) + 1) / cell
    spectrum = lambda a: (np.fft.rfft(a, axis=0)[: len(q)] * np.where(q > 0, 2.0, 1.0)[:, None] / size).T
    steps = int(np.ceil((1 + 2 * room) * pixel / FINEST))
    position = (half - room + (1 + 2 * room) * np.arange(steps + 1) / steps) * pixel
    t = np.arange(2 * half + 1) * pixel - position[:, None]
    waves = np.exp(2j * np.pi * t[..., None] * q) * (abs(t) <= cell / 2)[..., None]
    c64, f32 = lambda a: jnp.asarray(a, jnp.complex64), lambda a: jnp.asarray(a, jnp.float32)
    return WindowRenderer(f32(u.T @ images @ v), c64(spectrum(fade * u)), c64(spectrum(fade * v)), c64(waves), f32(q), f32(position[1] - position[0]), f32(position[0]))


@partial(jax.jit, static_argnames=("derivatives", "widening_too"))
def draw_windows(
    n_atoms: Int[Array, " column"],
    z: Float[Array, " column"],
    offset: Float[Array, "column 2"],
    source_variance: Float[Array, ""],
    library: ColumnLibrary,
    draw: WindowRenderer,
    derivatives: bool,
    widening_too: bool = True,
) -> Float[Array, "column kind w w"]:
    """Fraction of the beam of each column in its own window, float32, the column at `offset` (x, y) [Å] from the centre of the first pixel, near the middle; of columns of no atoms, zero.

    Kinds: the image; with derivatives also its derivatives by z = defocus - depth, x, y and, `widening_too`, source variance, by which it diffuses:
    half its Laplacian.
    """
    factors = _factors(source_variance, library, draw, _orders(derivatives, widening_too))
    return _in_batches(lambda *at: _window(factors(*at), derivatives, widening_too), (n_atoms, z, offset))


@partial(jax.jit, static_argnames=("shape", "derivatives", "widening_too"))
def paint_windows(
    n_atoms: Int[Array, " column"],
    z: Float[Array, " column"],
    offset: Float[Array, "column 2"],
    corners: Int[Array, "column 2"],
    source_variance: Float[Array, ""],
    library: ColumnLibrary,
    draw: WindowRenderer,
    shape: tuple[int, int],
    derivatives: bool,
    widening_too: bool = True,
    share: Float[Array, " column"] | None = None,
) -> Float[Array, "kind y x"]:
    """Sum of all columns' windows, each at its corner (y, x) on a canvas of that shape, or of a `share` of each; no windows of columns of no atoms.

    A processor adds one window after another; elsewhere few large products make the whole canvas, for a thousand small steps would wait for each other.
    """
    factors = _factors(source_variance, library, draw, _orders(derivatives, widening_too))
    kinds, side = 1 + (3 + widening_too) * derivatives, draw.waves.shape[1]
    corners = jnp.clip(corners, 0, np.array(shape) - side)
    columns = n_atoms, z, offset, corners, ((n_atoms > 0) * (1.0 if share is None else share)).astype(jnp.float32)

    def add(canvas, item):
        window, corner = item
        start = (0, corner[0], corner[1])
        seen = jax.lax.dynamic_slice(canvas, start, (kinds, side, side))
        return jax.lax.dynamic_update_slice(canvas, seen + window, start), None

    def one_by_one(canvas, batch):
        def painted(canvas):
            n, z, offset, corners, share = batch
            windows = jax.vmap(lambda *at: _window(factors(*at), derivatives, widening_too))(jnp.maximum(n, 1), z, offset)
            return jax.lax.scan(add, canvas, (windows * share[:, None, None, None], corners))[0]

        return jax.lax.cond((batch[0] > 0).any(), painted, lambda canvas: canvas, canvas), None

    def all_at_once(canvas, batch):
        n, z, offset, corners, share = batch
        cores, uy, vx = jax.vmap(factors)(jnp.maximum(n, 1), z, offset)
        rows, across = (_placed(a, corner, size) for a, corner, size in zip((uy, vx), corners.T, shape, strict=True))
        product = lambda factor, c, y, x: jnp.einsum("cyl,cxl->yx", rows[:, y] @ (cores[c] * (factor * share)[:, None, None]), across[:, x])
        return canvas + jnp.stack([sum(product(*term) for term in kind) for kind in KINDS[:kinds]]), None

    painted = lambda step, size: lambda columns: jax.lax.scan(step, jnp.zeros((kinds, *shape), jnp.float32), _batches(columns, size))[0]
    return jax.lax.platform_dependent(columns, cpu=painted(one_by_one, BATCH), default=painted(all_at_once, min(WIDE, len(n_atoms))))


@partial(jax.jit, static_argnames=("widening_too",))
def overlap_windows(
    layers: Float[Array, "layer y x"],
    n_atoms: Int[Array, " column"],
    z: Float[Array, " column"],
    offset: Float[Array, "column 2"],
    corners: Int[Array, "column 2"],
    source_variance: Float[Array, ""],
    library: ColumnLibrary,
    draw: WindowRenderer,
    widening_too: bool = True,
) -> Float[Array, "column kind layer"]:
    """Sums over every column's window, its corner (y, x) somewhere on the layers, of each kind of `draw_windows`, derivatives too, times each layer; of columns of no atoms, zero.

    No window is drawn: layers are projected on the functions of y and x, at a quarter of the cost.
    """
    factors, side = _factors(source_variance, library, draw, _orders(True, widening_too)), draw.waves.shape[1]

    def one(n, z, offset, corner):
        cores, uy, vx = factors(n, z, offset)
        seen = jax.lax.dynamic_slice(layers, (0, corner[0], corner[1]), (len(layers), side, side))
        along_y = [jnp.einsum("yk,ayx->akx", u, seen) for u in uy]
        overlap = lambda factor, c, y, x: factor * jnp.einsum("kl,akl->a", cores[c], along_y[y] @ vx[x])
        return jnp.stack([sum(overlap(*term) for term in kind) for kind in KINDS[: 4 + widening_too]])

    return _in_batches(one, (n_atoms, z, offset, corners))


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def painted_image(
    n_atoms: Int[Array, " column"],
    z: Float[Array, " column"],
    offset: Float[Array, "column 2"],
    corners: Int[Array, "column 2"],
    source_variance: Float[Array, ""],
    library: ColumnLibrary,
    draw: WindowRenderer,
    shape: tuple[int, int],
    widening_too: bool,
) -> Float[Array, "y x"]:
    """The image that `paint_windows` paints, with a gradient by z, offset and, `widening_too`, source variance that costs one `overlap_windows`."""
    return paint_windows(n_atoms, z, offset, corners, source_variance, library, draw, shape, False)[0]


def _painted_forwards(*given):
    return painted_image(*given), given[:7]


def _painted_backwards(shape, widening_too, given, slope):
    _, z, offset, _, variance, _, _ = given
    sums = overlap_windows(slope[None], *given, widening_too)[:, 1:, 0]
    by_variance = sums[:, 3].sum() if widening_too else 0.0
    return None, sums[:, 0].astype(z.dtype), sums[:, 1:3].astype(offset.dtype), None, jnp.asarray(by_variance, variance.dtype), None, None


painted_image.defvjp(_painted_forwards, _painted_backwards)


def _orders(derivatives: bool, widening_too: bool) -> int:
    """Of derivatives by place that the kinds need, the function itself among them."""
    return 1 + (1 + widening_too) * derivatives


def _batches(columns, size: int):
    """Arrays (column, ...) in batches (batch, size, ...), filled up with zeros."""
    more = -len(columns[0]) % size
    return jax.tree.map(lambda a: jnp.pad(a, [(0, more)] + [(0, 0)] * (a.ndim - 1)).reshape(-1, size, *a.shape[1:]), columns)


def _in_batches(one, columns):
    """`one` of every column, zero where its first argument, the number of atoms, is none; as many at a time as suit the device. A processor passes over batches of none."""

    def some(batch):
        n, *rest = batch
        return jax.vmap(lambda n, *rest: one(jnp.maximum(n, 1), *rest) * (n > 0))(n, *rest)

    def batched(size, own):
        def of_all(columns):
            found = jax.lax.map(own, _batches(columns, size))
            return found.reshape(-1, *found.shape[2:])[: len(columns[0])]

        return of_all

    none = lambda batch: jnp.zeros_like(jax.eval_shape(some, batch))
    unless_empty = lambda batch: jax.lax.cond((batch[0] > 0).any(), some, none, batch)
    return jax.lax.platform_dependent(columns, cpu=batched(BATCH, unless_empty), default=batched(min(WIDE, len(columns[0])), some))


def _factors(source_variance: Float[Array, ""], library: ColumnLibrary, draw: WindowRenderer, orders: int):
    """What makes, for one column, its image and that one's derivative by z in the functions of y and x, and these functions and their derivatives in its window."""
    tables = _tables(source_variance, draw, orders + 1)

    def one(n, z, offset):
        weights, slopes = jax.jvp(lambda z: library.weights(n[None], z[None])[0], (z,), (jnp.ones_like(z),))
        vx, uy = (_between(table, position, draw) for table, position in zip(tables, offset, strict=True))
        return tuple(jnp.tensordot(w.astype(jnp.float32), draw.cores, 1) for w in (weights, slopes)), uy, vx

    return one


def _window(factors, derivatives: bool, widening_too: bool) -> Float[Array, "kind w w"]:
    cores, uy, vx = factors
    product = lambda factor, c, y, x: factor * (uy[y] @ (cores[c] @ vx[x].T))
    return jnp.stack([sum(product(*term) for term in kind) for kind in KINDS[: 1 + (3 + widening_too) * derivatives]])


def _placed(functions: Float[Array, "column order w k"], first: Int[Array, " column"], size: int) -> Float[Array, "column order size k"]:
    """Functions along the canvas, zero outside their columns' windows."""
    at = jnp.arange(size) - first[:, None]
    inside = (at >= 0) & (at < functions.shape[2])
    return jnp.take_along_axis(functions, jnp.clip(at, 0, functions.shape[2] - 1)[:, None, :, None], 2) * inside[:, None, :, None]


def _tables(source_variance: Float[Array, ""], draw: WindowRenderer, orders: int) -> list[Float[Array, "position order w k"]]:
    """Of x and of y."""
    damping = jnp.exp(-2 * jnp.pi**2 * draw.q**2 * source_variance.astype(jnp.float32))
    return [_table(series * damping, draw, orders) for series in (draw.along_x, draw.along_y)]


def _table(series: Array, draw: WindowRenderer, orders: int) -> Float[Array, "position order w k"]:
    """Functions and their derivatives at the window's pixels, for each tabulated position."""
    by_order = jnp.stack([series * (2j * jnp.pi * draw.q).astype(jnp.complex64) ** m for m in range(orders)])
    # real part of a product, by real products
    return jnp.einsum("pwq,mkq->pmwk", draw.waves.real, by_order.real) - jnp.einsum("pwq,mkq->pmwk", draw.waves.imag, by_order.imag)


def _between(table: Float[Array, "position order w k"], position: Float[Array, ""], draw: WindowRenderer) -> Float[Array, "order w k"]:
    """Every order but the last for a column at a position [Å], from its slope, the order above it."""
    place = jnp.clip((position - draw.first) / draw.step, 0, len(table) - 1).astype(jnp.float32)
    i = jnp.minimum(place.astype(int), len(table) - 2)
    u = place - i
    low, high = table[i], table[i + 1]
    f0, f1, g0, g1 = low[:-1], high[:-1], -draw.step * low[1:], -draw.step * high[1:]
    return f0 + u * (g0 + u * (3 * (f1 - f0) - 2 * g0 - g1 + u * (2 * (f0 - f1) + g0 + g1)))
