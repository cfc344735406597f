"""Make the packaged library: gold along [001] at the settings of demo.toml, 1 to 12 atoms.

    python -m depthprob.data.make_library [FOLDER]

About half an hour on two cores, and an interrupted run goes on.
"""

import sys
from pathlib import Path

from tqdm import tqdm

from ..config import read_config
from ..physics.library import build_gram, library_from_gram, save_gram
from ..reconstruction.libraries import column_of, detector_of, library_name, microscope_of, z_range_of

MAX_ATOMS = 12
SCRAMBLINGS, CONFIGURATIONS, CORRECTIONS = 8, 64, 4


def make(folder: Path) -> None:
    """Write gram_Au_001.npz and the library for demo.toml's foci."""
    config = read_config(Path(__file__).with_name("demo.toml"))
    column = column_of(config, MAX_ATOMS)
    microscope = microscope_of(config)
    gram = build_gram(
        column,
        microscope.energy,
        microscope.convergence_angle,
        detector_of(config),
        configurations=CONFIGURATIONS,
        scramblings=SCRAMBLINGS,
        corrections=CORRECTIONS,
        checkpoint=folder / "gram_Au_001.partial.npz",
        progress=tqdm,
    )
    save_gram(folder / "gram_Au_001.npz", gram)
    z_range = z_range_of(config)
    library_from_gram(gram, microscope, z_range).save(folder / library_name(microscope, z_range, gram))


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
