"""The closed thermal average against plain multislice of still atoms, the single-event model, frozen phonons and differences."""

import dataclasses
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from single_event import prepare_radial, radial_gram

from depthprob.physics.column_images import column_images
from depthprob.physics.detector import AnnularDetector
from depthprob.physics.electron import wavelength
from depthprob.physics.gram import default_reach, laguerre_gauss_modes, prepare_sweep, sweep_column
from depthprob.physics.library import load_gram
from depthprob.physics.optics import Microscope
from depthprob.physics.particle import images_from_gram, particle_gram
from depthprob.physics.specimen import Column
from depthprob.physics.thermal import (
    _contraction,
    absorptive_gram,
    depth_derivatives,
    gram_of_depths,
    incident_disc,
    prepare_channel,
    principal_modes,
    thermal_gram,
)

ENERGY, ANGLE = 200e3, 20.0
DETECTOR = AnnularDetector(40.0, 90.0)
APERTURE = ANGLE * 1e-3 / float(wavelength(ENERGY))
COLUMN = Column("Cu", 3, 2.55, 0.55)
MODES = laguerre_gauss_modes(default_reach(COLUMN, ANGLE), APERTURE)


@pytest.fixture(scope="module")
def channel():
    return prepare_channel(COLUMN, ENERGY, APERTURE, DETECTOR)


def test_still_atoms_scatter_as_in_plain_multislice():
    # a wide cell, since images of the column beside it and the soft rim of its pixels move the FFT's result: 2 % at 10 A, 0.7 % at 16 A, 0.4 % at 24 A
    still = Column("Cu", 2, 2.55, 1e-9)
    reach = default_reach(still, ANGLE)
    sweep = prepare_sweep(still, ENERGY, APERTURE, DETECTOR, reach, sampling=0.045, cell=20.0)
    reference = np.asarray(sweep_column(jnp.zeros((2, 2), jnp.float32), sweep, laguerre_gauss_modes(reach, APERTURE)))
    modes = laguerre_gauss_modes(reach, APERTURE)
    channel = prepare_channel(still, ENERGY, APERTURE, DETECTOR)
    for n in (1, 2):
        ours = gram_of_depths(np.arange(n) * 2.55 - 1.275, channel, modes)
        np.testing.assert_allclose(ours, reference[n - 1], atol=6e-3 * abs(ours).max())


def test_one_atom_is_that_of_the_single_event_model(channel):
    with jax.enable_x64(True):
        single = radial_gram(jnp.zeros(1), prepare_radial(Column("Cu", 1, 2.55, 0.55), ENERGY, APERTURE, DETECTOR, MODES, thermal_nodes=12))
    ours = gram_of_depths(np.zeros(1), channel, MODES)
    np.testing.assert_allclose(ours, np.asarray(single), atol=1e-4 * abs(ours).max())  # its box is another


def test_one_pass_and_few_modes_give_every_number_of_atoms(channel):
    gram = thermal_gram(COLUMN, ENERGY, ANGLE, DETECTOR)
    microscope = Microscope(ENERGY, ANGLE, source_fwhm=0.7)
    disc = incident_disc(COLUMN, ENERGY, APERTURE)
    assert len(gram.modes.l) < len(disc.l) / 2
    at = lambda blocks, modes: column_images(np.asarray(blocks, complex)[None], modes, microscope, np.array([-30.0, 10.0]), 12.0, 100)
    for n in (1, 3):
        depths = (np.arange(n) - 1.0) * COLUMN.spacing  # the first at the top of the longest
        ours = at(gram_of_depths(depths, channel, disc), disc)
        np.testing.assert_allclose(at(gram.blocks[0, n - 1], gram.modes), ours, atol=5e-6 * ours.max())


def test_derivatives_are_limits_of_differences(channel):
    depths = np.array([-2.55, 0.1, 2.7])
    value, *exact = depth_derivatives(depths, channel, MODES)
    np.testing.assert_allclose(value, gram_of_depths(depths, channel, MODES), atol=1e-12)
    for derivative, step in zip(exact, np.eye(3) * 0.02, strict=True):
        difference = (gram_of_depths(depths + step, channel, MODES) - gram_of_depths(depths - step, channel, MODES)) / 0.04
        np.testing.assert_allclose(derivative, difference, atol=3e-5 * abs(derivative).max())  # the step's square: 1e-5


def test_moving_the_column_is_moving_the_focus(channel):
    disc = incident_disc(COLUMN, ENERGY, APERTURE)  # tapered modes would miss 4 %
    value, *by_atom = depth_derivatives(np.array([-2.55, 0.0, 2.55]), channel, disc)
    microscope = Microscope(ENERGY, ANGLE, source_fwhm=0.7)
    at = lambda gram, z: column_images(gram[None], disc, microscope, np.atleast_1d(z), 12.0, 100)[0]
    focus = np.array([-40.0, 0.0, 30.0])
    moved = at(sum(by_atom), focus)
    refocused = (at(value, focus - 0.1) - at(value, focus + 0.1)) / 0.2
    np.testing.assert_allclose(moved, refocused, atol=1e-4 * abs(moved).max())


GOLD = Microscope(300e3, 21.0, source_fwhm=0.7)
FOCUS = np.array([-120.0, -60.0, -20.0, 0.0, 20.0, 60.0, 120.0])


def profiles(gram, n, points=slice(0, 12, 2)):
    """(scrambling, focus, point) along x from the column of n atoms."""
    images = column_images(gram.blocks[:, n - 1].astype(complex), gram.modes, GOLD, FOCUS + gram.centre_of_mass[n - 1], 16.0, 140)
    return images[:, :, 0, points]


@pytest.fixture(scope="module")
def packaged():
    with resources.as_file(resources.files("depthprob.data").joinpath("gram_Au_001.npz")) as path:
        return load_gram(path)


def test_frozen_phonons_scatter_about_the_closed_form():
    # 512 configurations by FFT multislice of displaced atoms, another code; its eight scramblings tell its error. Ours in the same tapered
    # modes, which alone move an image by up to 0.3 % of its peak; 0.1 % is left for the FFT's grid and cell
    drawn = load_gram(Path(__file__).parent / "data" / "frozen_phonons_Au_001.npz")
    channel = prepare_channel(Column("Au", 5, 4.08, 0.63), 300e3, drawn.aperture, AnnularDetector(48.0, 180.0))
    for n in (1, 5):
        depths = (np.arange(n) - 5.5) * 4.08  # the modes' plane halves twelve atoms
        ours = gram_of_depths(depths, channel, drawn.modes)
        exact = profiles(dataclasses.replace(drawn, blocks=np.tile(ours, (1, drawn.n_max, 1, 1, 1))), n)[0]
        images = profiles(drawn, n)
        error = images.std(0, ddof=1) / np.sqrt(len(images))
        assert (abs(images.mean(0) - exact) < 4 * error + 1e-3 * images.max()).all(), n


def test_the_rim_of_the_disc_scatters_nothing(channel):
    # incident waves from far off once met a sharp end of what absorbs them: 1e-4 of the peak, and bounds on single atoms six times too low
    disc, microscope = incident_disc(COLUMN, ENERGY, APERTURE), Microscope(ENERGY, ANGLE, source_fwhm=0.7)
    at = lambda channel: column_images(gram_of_depths(np.array([-1.0, 1.55]), channel, disc)[None], disc, microscope, np.array([-60.0, 0.0, 60.0]), 14.0, 120)
    usual, far = at(channel), at(prepare_channel(COLUMN, ENERGY, APERTURE, DETECTOR, margin=3.0, edge_turns=10.0))
    np.testing.assert_allclose(usual, far, atol=1e-5 * far.max())


def test_what_nodes_see_twice_lies_outside():
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    values = np.array([0.0, 0.4, 1.0, 1.3])
    np.testing.assert_allclose(np.linalg.eigvalsh(_contraction(((axes * values) @ axes.T)[None]))[0], [0.0, 0.4, 0.7, 1.0], atol=1e-12)


@pytest.mark.slow
def test_nodes_do_for_columns_of_any_length(packaged):
    finer = thermal_gram(Column("Au", 45, 4.08, 0.63), 300e3, 21.0, AnnularDetector(48.0, 180.0), oversampling=1.5)
    for n, error in ((12, 2e-6), (30, 2e-4), (45, 1e-3)):
        np.testing.assert_allclose(profiles(packaged, n), profiles(finer, n), atol=error * profiles(finer, n).max())


def test_the_packaged_library_is_what_its_command_makes(packaged):
    made = thermal_gram(Column("Au", 2, 4.08, 0.63), 300e3, 21.0, AnnularDetector(48.0, 180.0))
    assert packaged.n_max == 45
    for n in (1, 2):
        np.testing.assert_allclose(profiles(made, n), profiles(packaged, n), atol=2e-4 * profiles(packaged, n).max())  # grids for 2 and for 45 atoms


def test_the_first_columns_of_a_library_keep_their_images(packaged):
    np.testing.assert_array_equal(profiles(packaged.first(5), 5), profiles(packaged, 5))


@pytest.mark.slow
def test_accuracy_settings_do_not_matter():
    # light atoms are the hardest: diffuse scattering of copper from beyond 1.2 Å is 2e-4 of the peak, all else less
    column, disc = Column("Cu", 2, 2.55, 0.55), incident_disc(COLUMN, ENERGY, APERTURE)
    microscope = Microscope(ENERGY, ANGLE, source_fwhm=0.7)

    def images(**accuracy):
        gram = gram_of_depths(np.array([-1.0, 1.55]), prepare_channel(column, ENERGY, APERTURE, DETECTOR, **accuracy), disc)
        return column_images(gram[None], disc, microscope, np.array([-60.0, 0.0, 60.0]), 14.0, 120)

    usual = images()
    for finer in (dict(oversampling=1.5), dict(thermal_nodes=20), dict(margin=3.0), dict(edge_turns=9.0), dict(core=1.8)):
        np.testing.assert_allclose(images(**finer), usual, atol=3e-4 * usual.max())


def test_principal_modes_keep_the_form():
    rng = np.random.default_rng(1)
    disc = incident_disc(COLUMN, ENERGY, APERTURE)
    l, p = disc.radial.shape[:2]
    roots = rng.normal(size=(3, l, p, 2)) + 1j * rng.normal(size=(3, l, p, 2))  # of rank two for each of three columns
    roots[:, 4:] = 0  # which only waves of small angular momentum see
    blocks = roots @ roots.conj().swapaxes(2, 3)
    few, modes = principal_modes(blocks, disc, 1e-9)
    assert modes.radial.shape[:2] == (4, 6)
    lifted = modes.radial.swapaxes(1, 2) @ few @ modes.radial.conj()
    np.testing.assert_allclose(lifted, (disc.radial.swapaxes(1, 2) @ blocks @ disc.radial.conj())[:, :4], atol=1e-12 * abs(lifted).max())


def test_the_absorptive_model_is_the_single_event_model():
    column = Column("Cu", 2, 2.55, 0.55)
    microscope = Microscope(ENERGY, ANGLE, source_fwhm=0.7)
    at = lambda blocks, modes: column_images(np.asarray(blocks, complex)[None], modes, microscope, np.array([-30.0, 10.0]) + 1.275, 12.0, 100)
    ours = absorptive_gram(column, ENERGY, ANGLE, DETECTOR)
    with jax.enable_x64(True):
        wide = laguerre_gauss_modes(4.0, APERTURE)  # so that their taper does not matter
        theirs = radial_gram(jnp.array([-1.275, 1.275]), prepare_radial(column, ENERGY, APERTURE, DETECTOR, wide, thermal_nodes=12))
    reference = at(theirs, wide)
    np.testing.assert_allclose(at(ours.blocks[0, 1], ours.modes), reference, atol=3e-3 * reference.max())


def test_a_light_atom_is_that_of_plane_waves():
    # scattering far from the nucleus, next to the aperture, is what tapered modes miss by 2 %; 0.1 to 0.2 % are left for the rims of the detector's pixels
    carbon, energy, detector, side = Column("C", 1, 3.57, 0.0), 100e3, AnnularDetector(30.0, 60.0), 48.0
    microscope, focus = Microscope(energy, 15.0, source_fwhm=0.7), np.array([-60.0, 0.0, 60.0])
    aperture = 15e-3 / float(wavelength(energy))
    disc = incident_disc(carbon, energy, aperture)
    gram = gram_of_depths(np.zeros(1), prepare_channel(carbon, energy, aperture, detector), disc)
    ours = column_images(gram[None], disc, microscope, focus, 16.0, 64)[0, :, 0, :8]
    theirs = images_from_gram(*particle_gram(np.array([[24.0, 24.0, 0.0]]), "C", (side, side), microscope, detector, 0.1), (side, side), microscope, focus, (192, 192))
    brighter = 1 + 1 / (3 * aperture * side)  # the rim of a cell's aperture takes intensity of the normalisation
    np.testing.assert_allclose(ours, theirs[:, 96, 96:104] / brighter, atol=2.5e-3 * ours.max())
