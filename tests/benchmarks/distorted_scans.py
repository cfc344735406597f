"""What a scan that distorts images costs a reconstruction of the packaged particle, untold and with `image_distortions` free.

    python tests/benchmarks/distorted_scans.py [CASE ...]

The expected images of full multislice, periodic and band-limited, are seen at distorted places by their Fourier sum, before noise is drawn: spots are sheared with
the lattice, as in a microscope. Half a minute a case and fit.
"""

import dataclasses
import sys
from collections.abc import Callable
from importlib import resources

import numpy as np

from depthprob.config import read_config
from depthprob.reconstruction.pipeline import reconstruct
from depthprob.stack import read_stack

FOLDER = resources.files("depthprob.data")
CONFIG = read_config(FOLDER / "demo.toml")
STACK = read_stack(FOLDER / "demo_stack.npz", CONFIG)
PIXEL = STACK.pixel_size_A
with np.load(FOLDER / "demo_stack.npz") as saved:
    COLUMNS, DRIFT = saved["columns"], saved["drift_A"]
    STILL = (8 * saved["expected_a"].astype(float) + 7 * saved["expected_b"]) / 15 * CONFIG.focal_series.dose[0] * PIXEL**2


def seen(images: np.ndarray, distortions: np.ndarray, shifts: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """Expected counts (F, y, x) of an object at r displaced by E (r - m) + shift [Å], m the middle of the field, and each row by `lines` (F, y) along x."""
    ny, nx = images.shape[1:]
    at = np.stack(np.meshgrid(np.arange(nx), np.arange(ny)), -1).reshape(-1, 2) * PIXEL
    middle = (np.array([nx, ny]) - 1) * PIXEL / 2
    q = [np.fft.fftfreq(n, PIXEL) for n in (nx, ny)]
    out = []
    for image, distortion, shift, line in zip(images, distortions, shifts, lines, strict=True):
        back = at - np.stack([np.repeat(line, nx), np.zeros(ny * nx)], 1)
        x, y = (np.linalg.solve(np.eye(2) + distortion, (back - shift - middle).T).T + middle).T
        rows = np.exp(2j * np.pi * np.outer(y, q[1])) @ (np.fft.fft2(image) / (nx * ny))
        out.append((rows * np.exp(2j * np.pi * np.outer(x, q[0]))).sum(1).real.reshape(ny, nx))
    return np.maximum(out, 0)


def drawn(sd: float, shape: str, rng: np.random.Generator) -> np.ndarray:
    """Distortions (F, 2, 2): of a `drift` during each frame, which shears along x and stretches along the slow direction y, or `any`."""
    found = rng.normal(0, sd, (len(STILL), 2, 2))
    if shape == "drift":
        found[:, :, 0] = 0.0
    return found


CASES: dict[str, tuple[float, str, float]] = {  # sd of the distortion, its kind, jitter of the lines [Å]
    "none": (0.0, "drift", 0.0),
    "drift 0.5 %": (0.005, "drift", 0.0),
    "drift 1 %": (0.01, "drift", 0.0),
    "drift 2 %": (0.02, "drift", 0.0),
    "drift 4 %": (0.04, "drift", 0.0),
    "affine 2 %": (0.02, "any", 0.0),
    "lines 0.05 Å": (0.0, "drift", 0.05),
    "lines 0.1 Å": (0.0, "drift", 0.1),
    "lines 0.2 Å": (0.0, "drift", 0.2),
}


def main(names: list[str], write: Callable[[str], None] = print) -> None:
    """Print a row a case and fit, its warnings below."""
    write(f"{'case':16s} {'free':10s} columns counts  depth rms  median sd  covered  distortion rms, error, stated sd")
    for name in names or CASES:
        sd, shape, jitter = CASES[name]
        rng = np.random.default_rng(11)
        truth = drawn(sd, shape, rng)
        lines = jitter * rng.standard_normal(STILL.shape[:2])
        stack = STACK._replace(data=rng.poisson(seen(STILL, truth, DRIFT, lines)).astype(float))
        for told in (False, True):
            free = CONFIG.inference.free + ("image_distortions",) * told
            result = reconstruct(stack, dataclasses.replace(CONFIG, inference=dataclasses.replace(CONFIG.inference, free=free)), method="laplace", quiet=True)
            offset = result.positions - result.positions.mean(0) + COLUMNS[:, :2].mean(0)
            distance = np.hypot(*(offset[:, None] - COLUMNS[:, :2]).transpose(2, 0, 1))
            n, depth = np.where(distance.min(1) < 1.0, COLUMNS[distance.argmin(1), 2:].T, np.nan)
            error = result.depth - depth
            covered = np.mean((depth >= result.depth_q05) & (depth <= result.depth_q95))
            rms = lambda values: np.sqrt(np.nanmean(np.square(values)))
            row = f"{name:16s} {'affine' if told else 'as usual':10s} {len(n):7d} {np.sum(result.n_atoms == n):6d} {rms(error - np.nanmedian(error)):10.2f} {np.median(result.depth_sd):10.2f} {covered:8.2f}"
            if told:
                missed = result.distortion - (truth - truth.mean(0))
                row += f"  {rms(truth - truth.mean(0)):.4f} {rms(missed):.4f} {rms(result.distortion_sd):.4f}"
            write(row + "".join(f"\n    {warning}" for warning in result.warnings))


if __name__ == "__main__":
    main(sys.argv[1:])
