"""Fields that a crystal fills from edge to edge: pieces cut out of stacks of full multislice, and of a sum of columns that goes on in all directions, reconstructed and compared with the truth.

    python tests/benchmarks/cuts.py FILE.npz CONFIG.toml SIDE [X Y]
    python tests/benchmarks/cuts.py --crystal CONFIG.toml SIDE [SEED]

FILE.npz is laid out as the packaged stack, and CONFIG.toml its config (periodic or not). The piece of SIDE Å has the middle of the true columns, or X, Y, in its middle. `--crystal` makes an fcc
crystal along [001] of 26 Å between two uneven surfaces, from the library of the config: a test of edges, not of truth.

Prints one JSON object for all columns and one for each range of distances from the nearest edge: columns that lie in the piece, those found and counted right, images left out, rms depth error of those
counted right less their median, beside the bound, coverage of 90 % intervals, and the Gaussian peaks.
"""

import dataclasses
import json
import sys
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

jax.config.update("jax_enable_x64", True)

from whole_particles import matched  # noqa: E402

from depthprob.config import Config, read_config  # noqa: E402
from depthprob.physics.focal_series import Field, FocalSeries, expected_counts  # noqa: E402
from depthprob.reconstruction.libraries import column_geometry, library_for  # noqa: E402
from depthprob.reconstruction.pipeline import reconstruct  # noqa: E402
from depthprob.stack import Stack  # noqa: E402

BEYOND = 9.0  # Å that the crystal goes on for
RANGES = (-np.inf, 1.0, 2.0, 4.0, np.inf)  # of distances from the nearest edge [Å]


def piece_of(path: Path, side: float, middle: np.ndarray | None) -> tuple[Stack, np.ndarray]:
    """The piece, and the true columns (C, 4) as seen from its corner."""
    with np.load(path) as saved:
        stack, foci, pixel, dose = saved["stack"], saved["defocus_A"], float(saved["pixel_size_A"]), float(saved["dose_e_per_A2"])
        columns = saved["columns"].astype(float)
    centre = (columns[:, :2].min(0) + columns[:, :2].max(0)) / 2 if middle is None else middle
    size = int(side / pixel)
    x, y = (round(m / pixel - size / 2) for m in centre)
    ny, nx = stack.shape[1:]
    if min(x, y) < 0 or x + size > nx or y + size > ny:
        raise SystemExit(f"a piece of {side:g} Å about {np.round(centre, 1)} leaves the stack of {nx * pixel:.1f} x {ny * pixel:.1f} Å.")
    columns[:, :2] -= np.array([x, y]) * pixel
    return Stack(stack[:, y : y + size, x : x + size].astype(float), foci, pixel, {"dose_e_per_A2": dose, "signal": "counts"}), columns


def crystal(config: Config, side: float, seed: int) -> tuple[Stack, np.ndarray]:
    """The same of a sum of columns, turned by 11 degrees."""
    rng, spacing, pixel = np.random.default_rng(seed), column_geometry(config).spacing, config.focal_series.pixel_size_A
    foci, dose, size = np.asarray(config.focal_series.defocus, float), float(config.focal_series.dose[0]), int(side / pixel)
    i, j = np.meshgrid(np.arange(-60, 61), np.arange(-60, 61))
    turned = np.array([[np.cos(0.19), -np.sin(0.19)], [np.sin(0.19), np.cos(0.19)]])
    at = spacing / 2 * np.stack([i, j], -1).reshape(-1, 2) @ turned + rng.uniform(0, 2, 2) + side / 2
    kept = ((at > -BEYOND) & (at < side + BEYOND)).all(1)
    at, half = at[kept], spacing / 2 * ((i + j).ravel()[kept] % 2)

    def surface(middle: float) -> np.ndarray:
        waves, phases = rng.normal(0, 1 / 9, (6, 2)), rng.uniform(0, 2 * np.pi, 6)
        return middle + 16 * np.sin(at @ waves.T + phases).mean(1)

    bottom, top, planes = surface(-12.0), surface(14.0), np.arange(-20, 21) * spacing
    depths = [(z := planes + up)[(z > low) & (z < high)] for low, high, up in zip(bottom, top, half, strict=True)]
    columns = np.array([(*place, len(z), z.mean()) for place, z in zip(at, depths, strict=True) if len(z)])
    drift = np.cumsum(rng.normal(0, 0.3, (len(foci), 2)), 0)
    drift -= drift.mean(0)
    field = Field(columns[:, :2], columns[:, 2].astype(int), columns[:, 3], np.full(len(foci), 1e-4), np.ones(len(foci)), drift)
    series = FocalSeries(foci, pixel, np.full(len(foci), dose), (size, size))
    means = np.asarray(expected_counts(field, library_for(config, int(columns[:, 2].max()), tqdm), series), float)
    return Stack(rng.poisson(np.maximum(means, 0)).astype(float), foci, pixel, {"dose_e_per_A2": dose, "signal": "counts"}), columns


def summary(found, columns: np.ndarray) -> list[dict]:
    """One row for each of `RANGES` and one for all."""
    width, height = extent = (np.array(found.stack.shape[:0:-1]) - 1) * found.pixel_size
    columns = columns[((columns[:, :2] > -1.0) & (columns[:, :2] < extent + 1.0)).all(1)]
    own = matched(found.positions, columns[:, :2])
    common = np.median((found.positions[own] - columns[:, :2])[own >= 0], 0)  # positions are those of the mean image
    x, y = (columns[:, :2] + common).T
    away = np.minimum(np.minimum(x, width - x), np.minimum(y, height - y))
    right = (own >= 0) & (found.n_atoms[own] == columns[:, 2])
    error, peak = (np.where(right, depth[own] - columns[:, 3], np.nan) for depth in (found.depth, found.gaussian_depth))
    offset = np.nanmedian(error)
    rms = lambda values: round(float(np.sqrt(np.nanmean(np.square(values)))), 3)
    rows = []
    for low, high in ((-np.inf, np.inf), *pairwise(RANGES)):
        there = (away >= low) & (away < high) & ((away >= 0) | (own >= 0))
        good = there & right
        row = {"edge_A": [low, high], "columns": int(there.sum()), "found": int((there & (own >= 0)).sum()), "right": int(good.sum())}
        if good.any():
            inside = (found.depth_q05[own] - offset < columns[:, 3]) & (columns[:, 3] < found.depth_q95[own] - offset)
            bound = rms(found.crlb[own][good])
            row |= {"error_A": rms(error[good] - offset), "crlb_A": bound, "error_over_crlb": round(rms(error[good] - offset) / bound, 2), "covered_90": round(float(inside[good].mean()), 2)}
            row |= {"gaussian_A": rms(peak[good] - np.nanmedian(peak))}
        rows.append(row)
    return rows


def main(source: str, config_path: str, side: str, *rest: str) -> None:
    config = read_config(Path(config_path))
    if source == "--crystal":
        stack, columns = crystal(config, float(side), int(rest[0]) if rest else 3)
    else:
        stack, columns = piece_of(Path(source), float(side), np.array(rest, float) if rest else None)
    series = dataclasses.replace(config.focal_series, periodic=False, pixel_size_A=stack.pixel_size_A)
    found = reconstruct(stack, dataclasses.replace(config, focal_series=series), method="laplace", quiet=True)
    whole, *parts = summary(found, columns)
    print(json.dumps(whole | {"images": len(found.defocus), "seconds": found.provenance["seconds"]["joint fit"], "warnings": found.warnings}, ensure_ascii=False))
    for part in parts:
        print(json.dumps(part))


if __name__ == "__main__":
    main(*sys.argv[1:])
