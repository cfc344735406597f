"""The packaged Gram matrix is what its command makes, with the Monte-Carlo error it states."""

from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprob.config import read_config
from depthprob.data.make_library import CONFIGURATIONS, CORRECTIONS, MAX_ATOMS, SCRAMBLINGS
from depthprob.physics.gram import default_cell, default_sampling, prepare_sweep, required_sampling, sweep_column
from depthprob.physics.library import CHEAP_ANGLE, CHEAP_CELL, column_images, load_gram, thermal_draws
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
    assert packaged.blocks.shape[:2] == (SCRAMBLINGS, MAX_ATOMS)
    assert packaged.configurations == CONFIGURATIONS
    column, detector = column_of(config, MAX_ATOMS), detector_of(config)
    assert (packaged.element, packaged.spacing, packaged.debye_waller_b) == (column.element, column.spacing, column.debye_waller_b)
    assert (packaged.energy, packaged.inner, packaged.outer) == (microscope_of(config).energy, detector.inner, detector.outer)


@pytest.mark.parametrize("n", [2, 7, 12])
def test_stated_depth_error_is_the_spread_of_the_scramblings(packaged, library, config, n):
    """A second derivation, with other foci, on pixels instead of radii."""
    at, above, below = images(packaged.blocks[:, n - 1], packaged, n, microscope_of(config))
    depths = depth_fit(at.mean(0), above.mean(0), below.mean(0))(at)
    assert depths.std(ddof=1) / np.sqrt(SCRAMBLINGS) == pytest.approx(library.depth_error[n - 1], rel=0.4)


@pytest.mark.slow
def test_one_scrambling_of_two_atoms_made_anew_is_the_packaged_one(packaged, config):
    """The same displacements through the first two atoms of the library's sweeps: intensity to 0.5 % of the peak, depth to the stated error."""
    column, microscope, detector = column_of(config, MAX_ATOMS), microscope_of(config), detector_of(config)
    fine = default_sampling(packaged.energy, float(detector.outer), microscope.convergence_angle)
    cell = default_cell(column, packaged.energy, packaged.aperture, packaged.reach)
    coarse = max(fine, required_sampling(packaged.energy, CHEAP_ANGLE * float(detector.outer)))
    runs = []
    for sampling, side in ((coarse, CHEAP_CELL * cell), (fine, cell)):
        sweep = prepare_sweep(column, packaged.energy, packaged.aperture, detector, packaged.reach, sampling=sampling, cell=side)
        runs.append(jax.jit(lambda u, sweep=sweep: sweep_column(u, sweep, packaged.modes)))
    displacements = jnp.asarray(thermal_draws(MAX_ATOMS, column.debye_waller_b, CONFIGURATIONS, 0)[:, :2], jnp.float32)
    cheap = [np.asarray(runs[0](u)) for u in displacements]
    corrections = [np.asarray(runs[1](u)) - c for u, c in zip(displacements[:CORRECTIONS], cheap, strict=False)]
    anew = np.mean(cheap, 0) + np.mean(corrections, 0)
    for n in (1, 2):
        reference, above, below = (i[0] for i in images(packaged.blocks[:1, n - 1], packaged, n, microscope))
        made = images(anew[n - 1 : n], packaged, n, microscope)[0][0]
        difference, shift = abs(made - reference).max() / reference.max(), float(depth_fit(reference, above, below)(made))
        print(f"{n} atoms: {difference:.5f} of the peak, depth {shift:.4f} A")
        assert difference < 0.005
        assert abs(shift) < 0.03
