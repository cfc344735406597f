"""Time and memory of `depthprob reconstruct` against the number of columns.

    python tests/benchmarks/large_fields.py LIBRARY.npz FOLDER [columns ...] [--corrected]

Makes the rounded tip of a gold nanorod along [001] of about so many columns (default 500, 1500, 6000) and up to LIBRARY's number of
atoms, by superposition of that library: it tests size, not truth. --corrected adds what every pair of neighbours lacks of it: `reconstruct` is to find out by itself which of the two it was given.
LIBRARY for 45 atoms: `depthprob library` with inference.max_atoms 45. Then reconstructs each in a process of its own and prints seconds, memory, counts and depth errors;
FOLDER/large_fields.png shows time and memory.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

CONFIG = """
[focal_series]
pixel_size_A = 0.51
[inference]
method = "laplace"
"""


def rod(n_columns: int, n_max: int, spacing: float = 4.08):
    """Positions (C, 2), atoms and depths of the columns of a rod of fcc along x, seen along [001], with a hemispherical end and its axis bent; as thick as the library allows."""
    radius = (n_max - 2) * spacing / 2
    step = spacing / 2
    width = min(radius, np.sqrt(n_columns * step**2 / 2.6))  # narrower than the cylinder for small fields: the middle of it
    length = n_columns * step**2 / (2 * width) + 0.3 * width * (width == radius)
    i, j = (a.ravel() for a in np.meshgrid(np.arange(int(length / step)), np.arange(-int(width / step), int(width / step) + 1)))
    x, y = step * i, step * j
    tip = np.minimum(x - radius, 0.0)
    half = np.sqrt(np.maximum(radius**2 - y**2 - tip**2, 0))
    middle, phase = 4 * np.sin(x / 30), (i + j) % 2 * step
    first = np.ceil((middle - half - phase) / spacing) * spacing + phase
    n = np.floor((middle + half - first) / spacing).astype(int) + 1
    ok = (n >= 2) & (n <= n_max)
    return np.stack([x, y + width], 1)[ok] + 16.0, n[ok], (first + (n - 1) * spacing / 2)[ok]


def make(library_path: Path, folder: Path, n_columns: int, corrected: bool = False) -> Path:
    import jax

    jax.config.update("jax_enable_x64", True)
    from depthprob.config import read_config
    from depthprob.inference import local
    from depthprob.inference.problem import make_problem
    from depthprob.physics.focal_series import Field, FocalSeries
    from depthprob.physics.library import ColumnLibrary
    from depthprob.reconstruction import superposition

    library = ColumnLibrary.load(library_path)
    positions, n, depths = rod(n_columns, library.n_max)
    defocus = np.arange(-200, 201, 10.0)
    shape = tuple(int(np.ceil((positions[:, a].max() + 16) / 0.51)) for a in (1, 0))
    rng = np.random.default_rng(0)
    drift = np.cumsum(rng.normal(0, 0.15, (41, 2)), 0)
    drift -= drift.mean(0)
    series = FocalSeries(defocus, 0.51, np.full(41, 9612.0), shape, False)
    field = Field(positions, n, depths, np.full(41, 1e-4), np.ones(41), drift)
    problem = make_problem(np.zeros((41, *shape)), field, library, series, dense=False)
    rates = local.rates(problem.start, problem)
    if corrected:
        rates = np.maximum(rates + superposition.lacking(problem.start, problem, read_config(folder / "rod.toml"))[0], 0)
    counts = rng.poisson(rates)
    path = folder / f"rod_{n_columns}{'_corrected' * corrected}.npz"
    np.savez_compressed(path, stack=counts.astype(np.uint16), defocus_A=defocus, pixel_size_A=0.51, columns=np.column_stack([positions, n, depths]), drift_A=drift)
    return path


def main(library: str, folder: str, *numbers: str) -> None:
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    config = folder / "rod.toml"
    corrected = "--corrected" in numbers
    config.write_text(CONFIG)
    rows = []
    for number in map(int, [n for n in numbers if n != "--corrected"] or (500, 1500, 6000)):
        stack = make(Path(library), folder, number, corrected)
        out = folder / f"out_{stack.stem}"
        command = [sys.executable, "-m", "depthprob.cli", "reconstruct", str(stack), "--config", str(config), "-o", str(out), "--library", library]
        start = time.perf_counter()
        process = subprocess.Popen(command)
        peak = 0.0
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status")
            try:
                peak = max(peak, next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1e6)
            except (OSError, StopIteration):
                pass
            time.sleep(0.5)
        if process.returncode:
            raise SystemExit(f"reconstruct failed for {number} columns")
        seconds = time.perf_counter() - start
        truth = np.load(stack)["columns"]
        table = np.genfromtxt(out / "columns.csv", delimiter=",", names=True)
        gap = np.hypot(table["x_A"][:, None] - truth[:, 0], table["y_A"][:, None] - truth[:, 1])
        match, near = gap.argmin(1), gap.min(1) < 0.7
        error = (table["depth_A"] - truth[match, 3])[near]
        right = (table["n_atoms"] == truth[match, 2])[near]
        inside = ((table["depth_q05_A"] < truth[match, 3]) & (truth[match, 3] < table["depth_q95_A"]))[near]
        rows.append({
            "columns": len(truth), "found": int(near.sum()), "seconds": round(seconds, 1), "GB": round(peak, 2),
            "counts right": round(float(right.mean()), 4), "covered by 90 %": round(float(inside.mean()), 3),
            "depth rms (A)": round(float(np.sqrt(np.mean(error**2))), 3), "of counts right, / bound": round(float(np.sqrt(np.mean(error[right] ** 2) / np.mean(table["crlb_A"][near][right] ** 2))), 3), "error / sd, rms": round(float(np.sqrt(np.mean((error / table["depth_sd_A"][near]) ** 2))), 3),
            "stages": json.loads((out / "provenance.json").read_text())["seconds"],
        })
        print(json.dumps(rows[-1], indent=1), flush=True)
    if len(rows) > 1:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3), layout="constrained")
        for ax, key, unit in zip(figure.subplots(1, 2), ("seconds", "GB"), ("s", "GB"), strict=True):
            ax.plot([r["columns"] for r in rows], [r[key] for r in rows], "o-", color="#0072B2")
            ax.set(xlabel="columns", ylabel=f"{'time' if key == 'seconds' else 'memory'} ({unit})", xlim=(0, None), ylim=(0, None))
        figure.savefig(folder / "large_fields.png", dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
