"""Fisher information among the columns of a large field, tile by tile: the columns that reach a tile are gathered for one matrix product."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import processes
from ..devices import SPREAD, WHOLE, filled, on_all, spread
from ..physics.focal_series import FocalSeries
from .arrow import ArrowMatrix, strips
from .drawing import MOVES, SIGNS, Window, by_columns_position, draw_columns, place, plain, precision_of, unfold, widest
from .problem import GLOBAL, PER_COLUMN, Problem, per_image, places

BAND = 3e8  # bytes that the products of tiles may hold at a time
TILE = 8  # pixels; the columns that reach a tile are gathered for one matrix product
MEMBERS = 8  # of a tile, filled up to a multiple


@partial(jax.jit, donate_argnums=0)
def _add_tile_products(
    total: Float[Array, "tile r r"], drawn: Float[Array, "column kind w w"], members: Array, offsets: Array, weights: Float[Array, "tile p p"]
) -> Float[Array, "tile r r"]:
    """Total plus, for each tile, the sum over its pixels of weight x rows x rows, rows (member, kind) of the windows that reach it.

    `offsets` (tile, member, 2) are where the tile begins in each window with a margin of a tile on each side; the last window is all zero.
    """
    kinds = drawn.shape[1]

    def one(item, drawn):
        total, members, offsets, weight = item
        cut = lambda c, o: jax.lax.dynamic_slice(drawn, (c, 0, o[0], o[1]), (1, kinds, TILE, TILE))[0]
        rows = jax.vmap(cut)(members, offsets).reshape(-1, TILE * TILE) * jnp.sqrt(weight).ravel()
        return total + rows @ rows.T

    def own(total, members, offsets, weights, drawn):
        with_margin = jnp.pad(drawn, [(0, 1), (0, 0), (TILE, TILE), (TILE, TILE)])
        return jax.lax.map(partial(one, drawn=with_margin), (total, members, offsets, weights))

    return spread(own, (SPREAD, SPREAD, SPREAD, SPREAD, WHOLE))(total, members, offsets, weights, drawn)


def column_information(
    parameters: dict, problem: Problem, rate: np.ndarray, windows: list[Window], grown: Problem | None = None, progress: Callable = lambda items, **_: items
) -> ArrowMatrix:
    """Fisher information among the columns' (depth, x, y), block-tridiagonal over strips; border and corner left at zero.

    Order of the full vector: all depths, all x, all y; before them, if there is a `grown` problem, the factors on its columns' images, and no border then.
    The field is taken in bands of tiles that hold at most `BAND` bytes.
    """
    parameters = plain(parameters)
    series, periodic = problem.series, problem.series.periodic
    n_columns, n_foci, (ny, nx) = len(problem.n_atoms), len(series.defocus), series.shape
    n_kinds = 3 + (grown is not None)
    parts = strips_of(parameters, series, windows)
    strip, row = np.empty(n_columns, int), np.empty(n_columns, int)
    for s, part in enumerate(parts):
        strip[part], row[part] = s, np.arange(len(part))
    rows_of = lambda c: (row[c][:, None] * n_kinds + np.arange(n_kinds)).ravel()
    diagonal = [np.zeros((n_kinds * len(p),) * 2) for p in parts]
    lower = [np.zeros((n_kinds * len(b), n_kinds * len(a))) for a, b in pairwise(parts)]
    scale = np.broadcast_to(np.asarray(series.dose, float), (n_foci,)) * series.pixel_size**2
    gain = np.exp(parameters["log_gain"])
    pad = widest(windows)
    jobs = []
    for window in windows:
        tiles = [processes.stretch(a) for a in _tiles(parameters, problem, window.images, window, pad)]
        per_tile = 4.0 * (n_kinds * tiles[1].shape[1]) ** 2
        bands = int(np.ceil(len(tiles[0]) * per_tile / BAND))
        jobs += [(window, part) for part in _split(tiles, bands)]
    for window, (origins, members) in progress(jobs, desc="Fisher information", unit="band"):
        here = np.unique(members[members >= 0])
        place_in = np.full(n_columns, 0)
        place_in[here] = np.arange(len(here))
        sub = {k: v[here] if k in PER_COLUMN else v for k, v in parameters.items()}
        small, small_grown = _subset(problem, here), grown and _subset(grown, here)
        own = np.where(members >= 0, place_in[members], 0)
        total = jnp.zeros((len(members), n_kinds * members.shape[1], n_kinds * members.shape[1]), jnp.float32)
        for i in window.images.tolist():
            placed = place(sub, small, i, window.half, pad)
            drawn = by_columns_position(np.asarray(draw_columns(sub, small, window, placed))[:, MOVES], sub, i)
            if small_grown is not None:
                drawn = np.concatenate([np.asarray(draw_columns(sub, small_grown, window, placed))[:, :1], drawn], 1)
            drawn = on_all(drawn)
            weight = np.pad(unfold(precision_of(rate[i].astype(float), problem, i)[None] * (scale[i] * gain[i]) ** 2, pad, periodic)[0], [(0, TILE), (0, TILE)])
            if periodic:  # count each pixel once: only the image itself
                weight[:pad], weight[pad + ny :], weight[:, :pad], weight[:, pad + nx :] = 0, 0, 0, 0
            cut = weight[origins[:, 0, None, None] + np.arange(TILE)[:, None], origins[:, 1, None, None] + np.arange(TILE)]
            offsets = _tile_offsets(origins, placed.corners[own], 2 * window.half + 1, (ny, nx) if periodic else None)
            outside = (members < 0) | (offsets <= 0).any(-1) | (offsets >= 2 * window.half + 1 + TILE).any(-1)
            ids = np.where(outside, len(drawn), own)
            offsets = np.where(outside[..., None], 0, offsets)
            total = _add_tile_products(total, drawn, jnp.asarray(ids), jnp.asarray(offsets), jnp.asarray(cut, jnp.float32))
        flip = np.tile(SIGNS[MOVES.stop - n_kinds : MOVES.stop], members.shape[1])
        _scatter(np.asarray(total), np.outer(flip, flip), members, strip, rows_of, diagonal, lower, n_kinds)
    diagonal, lower = processes.total((diagonal, lower))
    order = np.concatenate([(np.arange(n_kinds) * n_columns + np.asarray(p)[:, None]).ravel() for p in parts])
    k = len(per_image(problem)) * n_foci + len(GLOBAL) if grown is None else 0
    return ArrowMatrix(order, diagonal, lower, np.zeros((len(order), k)), np.zeros((k, k)))


def strips_of(parameters: dict, series: FocalSeries, windows: list[Window]) -> list[np.ndarray]:
    """Columns in strips across the longer side of the field, each as wide as two windows that touch."""
    xy = np.stack([parameters["x"], parameters["y"]], 1)
    axis = int(np.ptp(xy[:, 1]) > np.ptp(xy[:, 0]))
    return strips(xy[:, axis], (2 * max(w.half for w in windows) + 3) * series.pixel_size, series.shape[1 - axis] * series.pixel_size if series.periodic else None)


def _subset(problem: Problem, columns: np.ndarray) -> Problem:
    return eqx.tree_at(lambda p: p.n_atoms, problem, jnp.asarray(np.asarray(problem.n_atoms)[columns]))


def _tiles(parameters: dict, problem: Problem, images: np.ndarray, window: Window, pad: int):
    """Corners of the tiles on the canvas (T, 2) and the columns that may reach each in any of these images (T, K), -1 for none."""
    ny, nx = problem.series.shape
    px = problem.series.pixel_size
    origins = np.stack(np.meshgrid(np.arange(0, ny, TILE), np.arange(0, nx, TILE), indexing="ij"), -1).reshape(-1, 2)
    at = places(parameters, problem.series)[images, :, ::-1] / px
    middle, wander = (at.min(0) + at.max(0)) / 2, np.ptp(at, 0) / 2
    members = []
    for origin in origins:
        away = abs(middle - origin - (TILE - 1) / 2)
        if problem.series.periodic:
            size = np.array([ny, nx])
            away = np.minimum(np.mod(away, size), size - np.mod(away, size))
        gap = np.maximum(away - (TILE - 1) / 2 - wander, 0)
        members.append(np.flatnonzero(np.hypot(*gap.T) < window.half + 1))
    full = [j for j, m in enumerate(members) if len(m)]
    most = max((len(members[j]) for j in full), default=1)
    table = np.full((len(full), most), -1)
    for t, j in enumerate(full):
        table[t, : len(members[j])] = members[j]
    return origins[full] + pad, table


def _split(tiles, bands: int):
    """Tiles in bands that can be spread over devices, each with as many places for members as its own fullest tile needs."""
    for part in np.array_split(np.arange(len(tiles[0])), bands) if bands else ():
        members = tiles[1][part]
        most = int((members >= 0).sum(1).max())
        members = np.pad(members, [(0, 0), (0, MEMBERS)], constant_values=-1)[:, : -(-most // MEMBERS) * MEMBERS]
        more = [(0, filled(len(part), 8) - len(part)), (0, 0)]  # tiles of no members
        yield np.pad(tiles[0][part], more), np.pad(members, more, constant_values=-1)


def _tile_offsets(origins: np.ndarray, corners: np.ndarray, side: int, wraps) -> np.ndarray:
    """Where each tile begins in each member's window with its margin of one tile (T, K, 2)."""
    offsets = origins[:, None] - corners + TILE
    if wraps is not None:
        middle = (side + TILE) / 2
        size = np.array(wraps)
        offsets = offsets - np.round((offsets - middle) / size).astype(int) * size
    return offsets


def _scatter(total, factor, members, strip, rows_of, diagonal, lower, n_kinds) -> None:
    """Add each tile's products to the strips' blocks."""
    for product, some in zip(total, members, strict=True):
        some = some[some >= 0]
        product = product * factor
        local = np.arange(len(some))
        of_strip = strip[some]
        for s in np.unique(of_strip):
            a = local[of_strip == s]
            rows_a, here_a = rows_of(some[a]), (a[:, None] * n_kinds + np.arange(n_kinds)).ravel()
            diagonal[s][np.ix_(rows_a, rows_a)] += product[np.ix_(here_a, here_a)]
            b = local[of_strip == s + 1]
            if len(b):
                rows_b, here_b = rows_of(some[b]), (b[:, None] * n_kinds + np.arange(n_kinds)).ravel()
                lower[s][np.ix_(rows_b, rows_a)] += product[np.ix_(here_b, here_a)]
