"""What libraries say of themselves: the packaged one its settings, a Monte-Carlo one its error."""

import math
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from depthprob.config import read_config
from depthprob.data.make_library import MAX_ATOMS
from depthprob.physics.column_images import column_images
from depthprob.physics.library import library_from_gram, load_gram
from depthprob.reconstruction.libraries import column_of, detector_of, microscope_of

PLANES = np.arange(-60.0, 61.0, 20.0)
STEP = 5.0


@pytest.fixture(scope="module")
def packaged():
    with resources.as_file(resources.files("depthprob.data").joinpath("gram_Au_001.npz")) as path:
        return load_gram(path)


@pytest.fixture(scope="module")
def config():
    with resources.as_file(resources.files("depthprob.data").joinpath("demo.toml")) as path:
        return read_config(path)


def images(blocks, gram, n, microscope):
    """(matrix, z, y, x) at each of PLANES, then STEP above and below."""
    planes = np.concatenate([PLANES, PLANES - STEP, PLANES + STEP]) + gram.centre_of_mass[n - 1]
    return np.split(column_images(blocks, gram.modes, microscope, planes, 10.0, 44), 3, axis=1)


def depth_fit(reference, above, below):
    """Depths [Å] of series (..., z, y, x) near the reference by a Poisson-weighted fit of depth and amplitude."""
    slope, weight = (above - below) / (2 * STEP), 1 / np.maximum(reference, 1e-4 * reference.max())
    inner = lambda a, b: (a * b * weight).sum((-1, -2, -3))
    across = slope - reference * inner(slope, reference) / inner(reference, reference)
    return lambda series: inner(across, series - reference) / inner(across, across)


def test_packaged_gram_has_the_settings_of_its_command(packaged, config):
    assert packaged.blocks.shape[:2] == (1, MAX_ATOMS)
    assert packaged.configurations == math.inf
    column, detector = column_of(config, MAX_ATOMS), detector_of(config)
    assert (packaged.element, packaged.spacing, packaged.debye_waller_b) == (column.element, column.spacing, column.debye_waller_b)
    assert (packaged.energy, packaged.inner, packaged.outer) == (microscope_of(config).energy, detector.inner, detector.outer)


def test_stated_depth_error_is_the_spread_of_the_scramblings(config):
    # a second derivation, with other foci, on pixels instead of radii
    drawn = load_gram(Path(__file__).parent / "data" / "frozen_phonons_Au_001.npz").first(3)
    stated = library_from_gram(drawn, microscope_of(config), (-200.0, 200.0)).depth_error
    for n in (2, 3):
        at, above, below = images(drawn.blocks[:, n - 1], drawn, n, microscope_of(config))
        depths = depth_fit(at.mean(0), above.mean(0), below.mean(0))(at)
        assert depths.std(ddof=1) / np.sqrt(8) == pytest.approx(stated[n - 1], rel=0.4)
