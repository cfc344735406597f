"""Columns a second of the per-column estimators, beside loops of SciPy that do the same one by one.

    python tests/benchmarks/estimators.py [columns [of the loop]]

Isolated columns of 5 to 12 atoms of gold at the paper's Table 1, 41 images, patches of 21 x 21 pixels (default 5000 columns, of which 100 go through the
loop). Gaussian peaks beside `scipy.optimize.curve_fit` with the same four parameters, on the same averages around the columns, which are left out of both;
library maximum likelihood with bounds and goodness of fit, compilation left out, on all cores as JAX's devices. Seconds of all cores (wall) and of the
processor, the least of several runs: where other programs share the machine, the second is the fairer. Prints one JSON object.
"""

import json
import os
import sys
import time
from importlib import resources

import jax
import numpy as np
from scipy.optimize import curve_fit

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))

from depthprob.inference.gaussian_peak import fit_gaussians  # noqa: E402
from depthprob.inference.single import fit_single_columns  # noqa: E402
from depthprob.physics.column_images import at_points  # noqa: E402
from depthprob.physics.focal_series import FocalSeries  # noqa: E402
from depthprob.physics.library import ColumnLibrary  # noqa: E402

DEFOCUS = np.arange(-200.0, 201.0, 10.0)
SIDE, PIXEL, DOSE = 21, 0.4, 9612.0


def timed(function, runs: int = 1):
    """Result, wall seconds and processor seconds, the least of some runs."""
    seconds = []
    for _ in range(runs):
        wall, processor = time.perf_counter(), time.process_time()
        result = function()
        seconds.append((time.perf_counter() - wall, time.process_time() - processor))
    return result, *map(min, zip(*seconds, strict=True))


def patches_of(library: ColumnLibrary, count: int):
    """Poisson counts (C, F, y, x), atom numbers and depths [Å]."""
    rng = np.random.default_rng(0)
    n, depth = rng.integers(5, 13, count), rng.uniform(-10, 10, count)
    along = (np.arange(SIDE) - SIDE // 2) * PIXEL
    weights = np.asarray(library.weights(n, DEFOCUS - depth[:, None]))
    fraction = np.tensordot(weights, at_points(np.asarray(library.images), library.pixel, along, along), 1) + 1e-3
    return rng.poisson(np.maximum(fraction, 0) * DOSE * PIXEL**2).astype(np.float32), n, depth


def bell(f, amplitude, peak, width, background):
    return amplitude * np.exp(-(((f - peak) / width) ** 2) / 2) + background


def one_by_one(rows: np.ndarray) -> np.ndarray:
    """Peaks by curve_fit, from the brightest focus and an eighth of their range; nan where it fails."""
    peaks = []
    for row in rows:
        start = [np.ptp(row), DEFOCUS[row.argmax()], np.ptp(DEFOCUS) / 8, row.min()]
        try:
            peaks.append(curve_fit(bell, DEFOCUS, row, start)[0][1])
        except RuntimeError:
            peaks.append(np.nan)
    return np.array(peaks)


def main(count: str = "5000", loop: str = "100") -> None:
    columns, few = int(count), int(loop)
    name = next(f for f in resources.files("depthprob.data").iterdir() if f.name.startswith("library_"))
    with resources.as_file(name) as path:
        library = ColumnLibrary.load(path)
    patches, n, depth = patches_of(library, columns)
    middle = slice(SIDE // 2 - 2, SIDE // 2 + 3)
    averages = patches[:, :, middle, middle].mean((2, 3), dtype=float)
    peaks, slow_wall, slow = timed(lambda: one_by_one(averages[:few]), 5)
    (theta, _), fast_wall, fast = timed(lambda: fit_gaussians(DEFOCUS, averages), 20)
    same = np.isfinite(peaks)
    assert np.allclose(peaks[same], theta[:few, 1][same], atol=0.01)
    series = FocalSeries(DEFOCUS, PIXEL, np.full(len(DEFOCUS), DOSE), (SIDE, SIDE))
    fit = lambda: fit_single_columns(patches, n, library, series)
    fit()
    found, wall, processor = timed(fit)
    assert found.converged.mean() > 0.99 and abs(np.std((found.depth - depth) / found.crlb) - 1) < 0.1
    row = lambda number, wall, processor: {"columns": number, "seconds": round(wall, 3), "processor seconds": round(processor, 3), "columns per second": number / wall, "columns per processor second": number / processor}
    print(json.dumps({
        "cores": len(os.sched_getaffinity(0)),
        "Gaussian peaks": row(columns, fast_wall, fast),
        "curve_fit": row(few, slow_wall, slow),
        "ratio": {"wall": columns / fast_wall * slow_wall / few, "processor": columns / fast * slow / few},
        "library maximum likelihood": row(columns, wall, processor),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
