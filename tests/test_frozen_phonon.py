"""Gram matrices by frozen phonons: reproducible, resumed where they stopped, refused where too large."""

import numpy as np
import pytest

from depthprob.errors import InputError
from depthprob.physics.detector import AnnularDetector
from depthprob.physics.frozen_phonon import build_gram
from depthprob.physics.library import load_gram, save_gram
from depthprob.physics.specimen import Column


def test_columns_too_long_for_whole_matrices_are_refused_before_the_work():
    with pytest.raises(InputError, match=r"45 atoms.*GB; allowed are 2 GB"):
        build_gram(Column("Au", 45, 4.08, 0.63, tilt=(5.0, 0.0)), 3e5, 21.0, AnnularDetector(48.0, 180.0))


def test_build_resumes_and_is_reproducible(tmp_path):
    column = Column("C", 2, 2.5, 0.5)
    settings = dict(energy=100e3, convergence_angle=15.0, detector=AnnularDetector(30.0, 60.0), configurations=2, scramblings=2)
    whole = build_gram(column, **settings)
    checkpoint = tmp_path / "partial.npz"
    build_gram(column, **settings, checkpoint=checkpoint)
    again = build_gram(column, **settings, checkpoint=checkpoint)
    np.testing.assert_array_equal(whole.blocks, again.blocks)
    save_gram(tmp_path / "gram.npz", whole)
    read = load_gram(tmp_path / "gram.npz")
    np.testing.assert_array_equal(read.blocks, whole.blocks)
    assert read.element == "C" and read.n_max == 2
