"""The packaged nanorod: its atoms, and its series beside the sum of its columns."""

from importlib import resources
from pathlib import Path

import numpy as np
import pytest

import depthprob as dp
from depthprob.data import make_nanorod as rod


@pytest.fixture(scope="module")
def packaged():
    with resources.as_file(resources.files("depthprob.data")) as folder:
        return *rod.load(Path(folder) / "nanorod.npz"), dp.ColumnLibrary.load(next(Path(folder).glob("library_*")))


def test_the_rod_is_fcc_rounded_at_one_end_and_its_own_mirror_image(packaged):
    atoms = packaged[1]
    np.testing.assert_array_equal(atoms, rod.nanorod())
    sites = np.round((atoms - atoms[0]) / 2.04).astype(int)
    assert np.all(sites.sum(1) % 2 == 0) and np.allclose(sites * 2.04 + atoms[0], atoms)
    as_set = lambda a: {tuple(p) for p in a.round(2)}
    assert as_set(atoms * [1, -1, 1] + [0, 2 * rod.AXIS[0], 0]) == as_set(atoms)
    width = lambda x: np.ptp(atoms[abs(atoms[:, 0] - x) < 1.1, 1])
    assert width(2.04) == pytest.approx(16.32) and width(22.44) < 5


def test_the_series_of_the_whole_rod_is_nearly_the_sum_of_its_columns(packaged):
    halves, atoms, library = packaged
    columns, foci = rod.columns_of(atoms), np.array([-100.0, 0.0, 10.0, 100.0])
    ones = np.ones(len(foci))
    field = dp.Field(columns[:, :2], columns[:, 2].astype(int), columns[:, 3], 0 * ones, ones, np.zeros((len(foci), 2)))
    series = dp.FocalSeries(foci, rod.PIXEL, ones / rod.PIXEL**2, halves.shape[2:], True)
    mean = halves.mean(0)[np.isin(rod.DEFOCUS, foci)]
    difference = np.asarray(dp.expected_counts(field, library, series)) - mean
    assert np.sqrt(np.mean(difference**2)) < 0.005 * mean.max()
    assert abs(difference.mean()) < 0.005 * mean.mean()
