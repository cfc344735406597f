"""Make the packaged focal series of a gold nanorod's tip: full frozen-phonon multislice of the whole rod, never superposition.

    python -m depthprob.data.make_nanorod [FOLDER]

Takes two to three minutes a thermal configuration on one core and 2.5 GB; sums are kept in FOLDER, so that an interrupted run goes on.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..physics.detector import AnnularDetector
from ..physics.optics import Microscope
from ..physics.particle import images_from_gram, simulate_particle

LATTICE = 4.08
CELL = (6 * LATTICE, 5 * LATTICE)  # x, y
AXIS = (2.5 * LATTICE, 3.0)  # y and z of a lattice site in the rod's middle
RADIUS = 9.0
LEAN = 0.1  # of the rod's axis out of the plane across the beam
CONFIGURATIONS = 8
DEFOCUS = np.arange(-200, 201, 10.0)
PIXEL = 0.204  # under half the finest period, 0.469 Å, in an image of a 21 mrad probe: nothing is lost
SAMPLING = 0.03  # carries scattering to 219 mrad


def nanorod(radius: float = RADIUS, length: float = 20.7, start: float = LATTICE / 2, axis: tuple[float, float] = AXIS, lean: float = LEAN) -> np.ndarray:
    """Atoms (N, 3) [Å] of an FCC gold rod from x = `start` on: a cylinder whose far end is rounded to a half sphere.

    A cube axis lies along z, the beam, and one along x; `axis` (y, z) is a lattice site, and the mirror y of the rod. Midway along the
    rod the cylinder's axis passes it, and falls along the beam by `lean` for each Å in x.
    """
    half = LATTICE / 2
    sites = np.arange(-int(max(radius, length) // half) - 1, int(max(radius, length) // half) + 2)
    i, j, k = np.meshgrid(sites[sites >= 0], sites, sites, indexing="ij")
    x, y, z = (half * n[(i + j + k) % 2 == 0] for n in (i, j, k))
    beyond, below = np.maximum(x - (length - radius), 0), z - lean * (x - length / 2)
    inside = beyond**2 + y**2 + below**2 < radius**2
    return np.column_stack([x + start, y + axis[0], z + axis[1]])[inside]


def columns_of(atoms: np.ndarray) -> np.ndarray:
    """Columns along z (C, 4: x, y, number of atoms, mean z) of atoms (N, 3)."""
    place, column = np.unique(atoms[:, :2].round(3), axis=0, return_inverse=True)
    number = np.bincount(column.ravel())
    return np.column_stack([place, number, np.bincount(column.ravel(), atoms[:, 2]) / number])


def simulate(folder: Path, atoms: np.ndarray, cell: tuple[float, float], configurations: int, progress: Callable = tqdm) -> np.ndarray:
    """Expected focal series of two halves of the configurations (2, F, y, x), fraction of the beam, at the paper's settings and `PIXEL`."""
    microscope = Microscope(energy=300e3, convergence_angle=21.0, source_fwhm=0.7)
    halves, waves = simulate_particle(
        atoms, "Au", 0.63, cell, microscope, AnnularDetector(48.0, 180.0), configurations, 0, SAMPLING, checkpoint=folder / "nanorod_gram.npz", progress=progress
    )
    shape = tuple(round(side / PIXEL) for side in cell[::-1])
    return np.array([images_from_gram(half, waves, cell, microscope, DEFOCUS, shape) for half in halves])


def make(folder: Path) -> None:
    """Simulate and write nanorod.npz: each half of the configurations is averaged with its mirror image, as the rod is its own mirror image."""
    atoms = nanorod()
    halves = simulate(folder, atoms, CELL, CONFIGURATIONS)
    halves = (halves + np.roll(halves[:, :, ::-1], 1, 2)) / 2
    mean, difference = halves.mean(0), (halves[0] - halves[1]) / 2
    steps = mean.max() / 65535, abs(difference).max() / 127
    np.savez_compressed(
        folder / "nanorod.npz",
        mean=np.maximum(mean / steps[0], 0).round().astype(np.uint16),
        difference=(difference / steps[1]).round().astype(np.int8),
        steps=steps,
        atoms_A=atoms,
        configurations=CONFIGURATIONS,
    )


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Expected focal series of the two halves (2, F, y, x), fraction of the beam on `PIXEL`, and atoms (N, 3) [Å]; wraps around."""
    with np.load(path, allow_pickle=False) as saved:
        mean, difference = (saved[name] * step for name, step in zip(("mean", "difference"), saved["steps"], strict=True))
        return np.array([mean + difference, mean - difference]), saved["atoms_A"]


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
