"""Make the packaged stack: a gold particle by full frozen-phonon multislice, never by superposition.

    python -m depthprob.data.make_demo [FOLDER]

Takes four minutes a thermal configuration on one core; sums are kept in FOLDER, so that an interrupted run goes on. The
particle has no symmetry between its entrance and exit surface: a tilted dome of terraces above, another below.
"""

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..config import read_config
from ..physics.gram import default_sampling
from ..physics.particle import images_from_gram, simulate_particle
from ..reconstruction.libraries import detector_of, microscope_of

LATTICE = 4.08
CELL = 4.5 * LATTICE
CONFIGURATIONS = 16
SHAPE = (54, 54)


def demo_particle() -> tuple[np.ndarray, np.ndarray]:
    """Atoms (N, 3) and columns (C, 4: x, y, number of atoms, depth) [Å]: 28 columns of 3 to 11 atoms."""
    atoms, columns = [], []
    for i in range(9):
        for j in range(9):
            x, y = i * LATTICE / 2, j * LATTICE / 2
            dx, dy = x - 8.4, y - 8.0
            r = np.hypot(dx, dy)
            top = -19 + 1.5 * dx - 0.9 * dy + 0.30 * r**2
            bottom = 27 + 1.5 * dx - 0.4 * dy - 0.62 * r**2 - 1.5 * max(dy - 2, 0)
            z = (i + j) % 2 * LATTICE / 2 + np.arange(-20, 21) * LATTICE
            z = z[(z > top) & (z < bottom)]
            if r < 6.25 and len(z) >= 3:
                columns.append((x, y, len(z), z.mean()))
                atoms += [(x, y, height) for height in z]
    atoms, columns = np.array(atoms), np.array(columns)
    offset = columns[:, 3].mean().round(1) - 1.3
    atoms[:, 2] -= offset
    columns[:, 3] -= offset
    return atoms, columns


def make(folder: Path) -> None:
    """Simulate, drift, draw counts and write demo_stack.npz."""
    config = read_config(Path(__file__).with_name("demo.toml"))
    atoms, columns = demo_particle()
    microscope = microscope_of(config)
    halves, waves = simulate_particle(
        atoms,
        "Au",
        config.specimen.debye_waller_b,
        (CELL, CELL),
        microscope,
        detector_of(config),
        CONFIGURATIONS,
        0,
        default_sampling(microscope.energy, config.detector.outer[0], microscope.convergence_angle),
        checkpoint=folder / "demo_gram.npz",
        progress=tqdm,
    )
    rng = np.random.default_rng(2017)
    defocus = config.focal_series.defocus
    drift = np.cumsum(rng.normal(0, 0.2, (len(defocus), 2)), 0)
    drift -= drift.mean(0)
    images = lambda gram, shifts: images_from_gram(gram, waves, (CELL, CELL), microscope, defocus, SHAPE, shifts)
    still = [images(half, None).astype(np.float32) for half in halves]
    per_pixel = config.focal_series.dose[0] * config.focal_series.pixel_size_A**2
    counts = rng.poisson(np.maximum(images(halves.mean(0), drift), 0) * per_pixel)
    np.savez_compressed(
        folder / "demo_stack.npz",
        stack=counts.astype(np.uint16),
        expected_a=still[0],
        expected_b=still[1],
        defocus_A=defocus,
        pixel_size_A=config.focal_series.pixel_size_A,
        dose_e_per_A2=config.focal_series.dose[0],
        drift_A=drift,
        atoms_A=atoms,
        columns=columns,
        configurations_a=(CONFIGURATIONS + 1) // 2,
        configurations_b=CONFIGURATIONS // 2,
    )


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
