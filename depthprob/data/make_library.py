"""Make the packaged library: gold along [001] at the settings of demo.toml, the paper's Table 1, 1 to 45 atoms.

    python -m depthprob.data.make_library [FOLDER]

Two minutes on two cores. The series of up to 12 atoms over demo.toml's foci lie beside the Gram matrices; others are made from them in seconds.
"""

import sys
from pathlib import Path

from tqdm import tqdm

from ..config import read_config
from ..physics.library import library_from_gram, save_gram
from ..physics.thermal import thermal_gram
from ..reconstruction.libraries import column_of, detector_of, library_name, microscope_of, z_range_of

MAX_ATOMS = 45


def make(folder: Path) -> None:
    """Write gram_Au_001.npz and the library for demo.toml's foci."""
    config = read_config(Path(__file__).with_name("demo.toml"))
    microscope = microscope_of(config)
    gram = thermal_gram(column_of(config, MAX_ATOMS), microscope.energy, microscope.convergence_angle, detector_of(config), progress=tqdm)
    save_gram(folder / "gram_Au_001.npz", gram)
    few, z_range = gram.first(config.inference.max_atoms), z_range_of(config)
    library_from_gram(few, microscope, z_range).save(folder / library_name(microscope, z_range, few))


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
