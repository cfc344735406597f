"""What a reconstruction says when its config tells something wrong, and how wrong its depths then are.

    python tests/benchmarks/wrong_settings.py [FOLDER] [CASE ...]

The counts are of full multislice: of the packaged particle, new draws where a case changes them. Each case: columns with the right count, common offset of the depths
and rms of the rest [Å], share of 90 % intervals that hold the truth, the pooled goodness of fit in standard deviations, and the warnings. Half a minute a case; those with
other libraries take as long again, once. A lens with aberrations or a tilted crystal that nobody told are cases of a smaller particle, by full multislice too: each
tilt takes four frozen-phonon configurations, half a minute each on one core, whose Gram matrices are kept in FOLDER.
"""

import dataclasses
import sys
from importlib import resources
from pathlib import Path

import numpy as np
from whole_particles import Case, atoms_of, columns_of, gram_of

from depthprob.config import read_config
from depthprob.errors import InputError
from depthprob.physics.particle import images_from_gram
from depthprob.reconstruction.libraries import microscope_of
from depthprob.reconstruction.pipeline import reconstruct
from depthprob.stack import Stack, read_stack

FOLDER = resources.files("depthprob.data")
CONFIG = read_config(FOLDER / "demo.toml")
STACK = read_stack(FOLDER / "demo_stack.npz", CONFIG)
FOCI, PIXEL = np.asarray(STACK.defocus_A), STACK.pixel_size_A
with np.load(FOLDER / "demo_stack.npz") as saved:
    COLUMNS, DRIFT = saved["columns"], saved["drift_A"]
    STILL = (8 * saved["expected_a"].astype(float) + 7 * saved["expected_b"]) / 15 * CONFIG.focal_series.dose[0] * PIXEL**2
RNG = np.random.default_rng(5)
SMALL = Case({}, 4.4, 42.0, 4, vacuum=2.3, slope=(1.2, 0.0), off=(0.4, 1.02), mirrored=True, detector={"inner_mrad": 48.0, "outer_mrad": 90.0})


def told(section, **values):
    """The config with something else in one of its sections."""
    return dataclasses.replace(CONFIG, **{section: dataclasses.replace(getattr(CONFIG, section), **values)}), STACK, COLUMNS


def given(counts=None, foci=FOCI):
    """The stack with other counts or foci."""
    return CONFIG, STACK._replace(data=STACK.data if counts is None else np.asarray(counts, float), defocus_A=foci), COLUMNS


def moved(images, shifts):
    """Poisson counts of images (F, y, x) displaced by (dx, dy) [Å]: one pair for each image (F, 2), or for each of its lines (F, y, 2)."""
    qy, qx = (np.fft.fftfreq(n, PIXEL) for n in images.shape[1:])
    shifts = np.broadcast_to(shifts[:, None] if shifts.ndim == 2 else shifts, (*images.shape[:2], 2))
    images = np.fft.ifft(np.fft.fft(images, axis=1) * np.exp(-2j * np.pi * qy[:, None] * shifts[:, :1, 1:]), axis=1)
    images = np.fft.ifft(np.fft.fft(images, axis=2) * np.exp(-2j * np.pi * qx * shifts[:, :, :1]), axis=2)
    return RNG.poisson(np.maximum(images.real, 0))


def jitter(sd):
    """The drift, and every line displaced along x at random [Å]."""
    lines = np.repeat(DRIFT[:, None], STILL.shape[1], axis=1)
    lines[..., 0] += RNG.normal(0, sd, lines.shape[:2])
    return lines


def matched(positions, columns):
    """Atoms and depth [Å] of the true column nearest to each found one, NaN where none is within 1 Å."""
    offset = positions - positions.mean(0) + columns[:, :2].mean(0)
    distance = np.hypot(*(offset[:, None] - columns[:, :2]).transpose(2, 0, 1))
    return np.where(distance.min(1) < 1.0, columns[distance.argmin(1), 2:].T, np.nan)


def untold(tilt=0, **aberrations):
    """Counts of a smaller particle, its crystal tilted by so many mrad along x, under a lens with these aberrations; the config is silent about either."""
    pixels, cell = round(SMALL.side / SMALL.pixel), (SMALL.side, SMALL.side)
    pixel = SMALL.side / pixels
    config, columns = SMALL.config(pixel), columns_of(atoms_of(SMALL))
    halves, waves = gram_of(SMALL, Path(sys.argv[1]) / f"small_tilt{tilt}.npz", (float(tilt), 0.0))
    lens, dose = dataclasses.replace(microscope_of(config), aberrations=aberrations), float(config.focal_series.dose[0])
    images = images_from_gram(halves.mean(0), waves, cell, lens, FOCI, (pixels, pixels), DRIFT)
    counts = RNG.poisson(np.maximum(images, 0) * dose * pixel**2).astype(float)
    return config, Stack(counts, FOCI, pixel, {"dose_e_per_A2": dose, "signal": "counts"}), columns


STEADY = lambda factors: moved(STILL * factors, DRIFT)
CASES = {
    "all right": lambda: (CONFIG, STACK, COLUMNS),
    "focus steps 3 % too large": lambda: given(foci=FOCI * 1.03),
    "focus steps 10 % too large": lambda: given(foci=FOCI * 1.1),
    "energy 290 for 300 keV": lambda: told("microscope", energy_keV=290.0),
    "energy 200 for 300 keV": lambda: told("microscope", energy_keV=200.0),
    "convergence angle 19 for 21 mrad": lambda: told("microscope", convergence_angle_mrad=19.0),
    "convergence angle 23 for 21 mrad": lambda: told("microscope", convergence_angle_mrad=23.0),
    "inner angle 40 for 48 mrad": lambda: told("detector", inner_mrad=40.0),
    "inner angle 60 for 48 mrad": lambda: told("detector", inner_mrad=60.0),
    "B 0.3 for 0.63 Å²": lambda: told("specimen", debye_waller_B_A2=0.3),
    "B 1.0 for 0.63 Å²": lambda: told("specimen", debye_waller_B_A2=1.0),
    "source 0.3 for 0.7 Å": lambda: told("microscope", source_fwhm_A=0.3),
    "source 1.0 for 0.7 Å": lambda: told("microscope", source_fwhm_A=1.0),
    "C3 +5 for 0 µm": lambda: told("microscope", spherical_aberration_mm=0.005),
    "C3 -5 for 0 µm": lambda: told("microscope", spherical_aberration_mm=-0.005),
    "small: all right": lambda: untold(),
    "small: C12 0.5 nm": lambda: untold(C12_A=5.0, phi12_deg=30.0),
    "small: C12 2 nm": lambda: untold(C12_A=20.0, phi12_deg=30.0),
    "small: C12 5 nm": lambda: untold(C12_A=50.0, phi12_deg=30.0),
    "small: C21 100 nm": lambda: untold(C21_A=1000.0, phi21_deg=30.0),
    "small: C21 500 nm": lambda: untold(C21_A=5000.0, phi21_deg=30.0),
    "small: C23 100 nm": lambda: untold(C23_A=1000.0, phi23_deg=30.0),
    "small: C23 500 nm": lambda: untold(C23_A=5000.0, phi23_deg=30.0),
    "small: crystal tilt 5 mrad": lambda: untold(tilt=5),
    "small: crystal tilt 10 mrad": lambda: untold(tilt=10),
    "small: crystal tilt 20 mrad": lambda: untold(tilt=20),
    "focal spread 30 for 0 Å": lambda: told("microscope", focal_spread_A=30.0),
    "lattice 3.9 for 4.08 Å": lambda: told("specimen", lattice_constant_A=3.9),
    "platinum for gold": lambda: told("specimen", element="Pt", lattice_constant_A=3.92),
    "dose 1.1 times": lambda: told("focal_series", dose_e_per_A2=1.1 * 9612.0),
    "dose twice": lambda: told("focal_series", dose_e_per_A2=2 * 9612.0),
    "dose half": lambda: told("focal_series", dose_e_per_A2=0.5 * 9612.0),
    "counts twice": lambda: given(2 * STACK.data),
    "current falls by 20 %": lambda: given(RNG.binomial(STACK.data.astype(int), np.linspace(1, 0.8, len(FOCI))[:, None, None])),
    "current falls by 50 %": lambda: given(RNG.binomial(STACK.data.astype(int), np.linspace(1, 0.5, len(FOCI))[:, None, None])),
    "current flickers by 5 % between images": lambda: given(STEADY(np.exp(0.05 * RNG.normal(size=(len(FOCI), 1, 1))))),
    "current flickers by 5 % between lines": lambda: given(STEADY(np.exp(0.05 * RNG.normal(size=(*STILL.shape[:2], 1))))),
    "lines jitter by 0.1 Å": lambda: given(moved(STILL, jitter(0.1))),
    "beam tilt 2 mrad": lambda: given(moved(STILL, DRIFT + 2e-3 * FOCI[:, None] * [1.0, 0.0])),
    "beam tilt 10 mrad": lambda: given(moved(STILL, DRIFT + 1e-2 * FOCI[:, None] * [1.0, 0.0])),
    "drift of 0.34 Å a step": lambda: given(moved(STILL, np.cumsum(RNG.normal(0, 0.34, DRIFT.shape), 0))),
}


def main(names) -> None:
    """Print a row a case, its warnings below."""
    print(f"{'case':40s} counts  offset    rms  median sd  covered  goodness")
    with_folder = bool(names) and names[0] not in CASES
    for name in names[with_folder:] or [c for c in CASES if with_folder or not c.startswith("small")]:
        config, stack, columns = CASES[name]()
        try:
            result = reconstruct(stack, config, method="laplace", quiet=True)
        except InputError as refusal:
            print(f"{name:40s} refused: {refusal}", flush=True)
            continue
        number, truth = matched(result.positions, columns)
        error = result.depth - truth
        covered = np.mean((truth >= result.depth_q05) & (truth <= result.depth_q95))
        pooled = result.goodness_of_fit.mean() * len(error) ** 0.5
        rms = np.nanmean((error - np.nanmedian(error)) ** 2) ** 0.5
        print(f"{name:40s} {np.sum(result.n_atoms == number):2d}/{len(columns)} {np.nanmedian(error):7.2f} {rms:6.2f} {np.median(result.depth_sd):8.2f} {covered:10.2f} {pooled:8.1f}")
        print("".join(f"    {warning}\n" for warning in result.warnings), end="", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
