"""Simulated series follow every setting of detector and specimen, from config to counts."""

import ase
import numpy as np
import pytest

from depthprob.config import config_from_dict
from depthprob.errors import InputError
from depthprob.reconstruction.simulate import simulate

SERIES = {"defocus_A": [-40.0, 0.0, 30.0], "pixel_size_A": 0.25, "dose_e_per_A2": 1e6, "field_of_view_A": 4.0}
PLACES = np.array([[1.0, 2.0, 0.0], [3.0, 2.5, 0.0], [1.0, 2.0, 2.5], [3.0, 2.5, 1.25]])
SYMBOLS, B = ["O", "Ti", "Sr", "Ti"], np.array([0.9, 0.4, 0.6, 0.4])


def counts(folder, microscope=(200.0, 12.0), configurations=2, **sections):
    raw = {"focal_series": SERIES, "thermal": {"configurations": configurations}, "microscope": {"energy_keV": microscope[0], "convergence_angle_mrad": microscope[1]}}
    return simulate(config_from_dict(raw | sections, folder), noise=False, quiet=True).data


@pytest.fixture
def particle(tmp_path):
    def write(order=(0, 1, 2, 3), **arrays):
        order = list(order)
        atoms = ase.Atoms([SYMBOLS[i] for i in order], positions=PLACES[order], cell=[5.0, 5.0, 5.0], pbc=True)
        shaking = {} if "rms_displacement_A" in arrays else {"debye_waller_B_A2": B}
        for name, values in (shaking | arrays).items():
            atoms.set_array(name, np.asarray(values)[order])
        atoms.write(tmp_path / "particle.xyz", format="extxyz")
        return {"structure_file": "particle.xyz"}

    write.folder = tmp_path
    return write


def test_two_annuli_count_what_each_counts(particle):
    signal = lambda inner, outer: counts(particle.folder, detector={"inner_mrad": inner, "outer_mrad": outer}, specimen=particle(), simulation={"potential_sampling_A": 0.08})
    low, high, both = signal(30, 45), signal(60, 80), signal([60, 30], [80, 45])
    np.testing.assert_allclose(both, low + high, rtol=1e-4)  # complex64 waves
    assert 0.1 < low.sum() / high.sum() < 10


def test_a_file_of_several_elements_may_be_in_any_order(particle):
    signal = lambda **file: counts(particle.folder, detector={"inner_mrad": 30, "outer_mrad": 60}, specimen=particle(**file), simulation={"potential_sampling_A": 0.1})
    one = signal()
    np.testing.assert_array_equal(one, signal(order=(2, 0, 3, 1)))
    assert abs(one - signal(occupancy=[1.0, 1.0, 0.0, 1.0])).max() > 0.1 * one.max()


def test_thermal_motion_of_each_atom_may_be_given_as_b_or_as_displacement(particle):
    signal = lambda **file: counts(particle.folder, detector={"inner_mrad": 30, "outer_mrad": 60}, specimen=particle(**file), simulation={"potential_sampling_A": 0.1})
    one = signal()
    np.testing.assert_allclose(signal(rms_displacement_A=np.sqrt(B / (8 * np.pi**2))), one, rtol=1e-5)  # eight decimals in the file
    assert abs(signal(debye_waller_B_A2=B[::-1]) - one).max() > 0.01 * one.max()


def test_atoms_that_are_there_more_than_once_are_refused(particle):
    with pytest.raises(InputError, match="occupancy"):
        counts(particle.folder, specimen=particle(occupancy=[1.0, 1.2, 0.0, 1.0]))


def test_a_map_of_halves_counts_half_of_a_column(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHPROB_CACHE", str(tmp_path))
    np.save(tmp_path / "ones.npy", np.ones((41, 41)))
    np.save(tmp_path / "halves.npy", np.full((41, 41), 0.5))
    still = {"element": "C", "structure": "diamond", "lattice_constant_A": 3.57, "n_atoms": 1, "debye_waller_B_A2": 0.0}
    signal = lambda **more: counts(tmp_path, (100.0, 15.0), 1, detector={"inner_mrad": 30, "outer_mrad": 60} | more, specimen=still)
    ones, halves = (signal(sensitivity=name, sensitivity_pixel_mrad=5.0) for name in ("ones.npy", "halves.npy"))
    np.testing.assert_allclose(halves, ones / 2, atol=1e-4 * ones.max())
