"""The cache of libraries: what lies there is checked before it is believed."""

import dataclasses
from importlib import resources

import numpy as np
import pytest

from depthprob import storage
from depthprob.config import config_from_dict
from depthprob.errors import InputError
from depthprob.physics.detector import AnnularDetector
from depthprob.physics.library import ColumnLibrary, load_gram, save_gram
from depthprob.physics.optics import Microscope
from depthprob.physics.specimen import Column
from depthprob.reconstruction import libraries

COLUMN, MICROSCOPE, DETECTOR = Column("Au", 3, 4.08, 0.7), Microscope(300e3, 21.0, source_fwhm=0.7), AnnularDetector(48.0, 180.0)


@pytest.fixture
def built(tmp_path, monkeypatch):
    """The builds of a session with an empty cache; a build takes no time and gives the packaged gold, said to be of another B."""
    with resources.as_file(resources.files("depthprob.data") / "gram_Au_001.npz") as path:
        packaged = load_gram(path).first(3)
    builds = []

    def thermal_gram(column, *_):
        builds.append(column)
        return dataclasses.replace(packaged, debye_waller_b=column.debye_waller_b)

    monkeypatch.setenv("DEPTHPROB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(libraries, "thermal_gram", thermal_gram)
    return builds


def library():
    return libraries.build_library(COLUMN, MICROSCOPE, DETECTOR, z_range=(-20.0, 20.0))


def library_for(config, n_max):
    return libraries.library_for(config, n_max, lambda items, **_: items)


def same(a, b):
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))


def cached(kind):
    (path,) = libraries.cache_folder().glob(f"{kind}_*.npz")
    return path


def test_a_second_library_comes_from_the_cache(built):
    assert same(library(), library()) and len(built) == 1


@pytest.mark.parametrize("kind", ["gram", "library"])
@pytest.mark.parametrize("harm", ["truncated", "altered", "empty", "other version"])
def test_a_damaged_file_of_the_cache_is_built_anew(built, kind, harm):
    whole, path = library(), cached(kind)
    good = path.read_bytes()
    if harm == "other version":  # without an array that this version needs
        arrays = storage.load_arrays(path)
        arrays.pop("element")
        storage.save_arrays(path, **arrays)
    else:
        middle = len(good) // 2
        path.write_bytes({"truncated": good[:middle], "altered": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :], "empty": b""}[harm])
    with pytest.warns(UserWarning, match=f"{path.name}.* built anew"):
        again = library()
    assert same(again, whole) and len(built) == (2 if kind == "gram" else 1)
    assert {k: v.tobytes() for k, v in storage.load_arrays(path).items()}.keys() == storage.load_arrays(cached(kind)).keys()
    assert same(library(), whole) and len(built) == (2 if kind == "gram" else 1)  # and no warning more


def test_another_columns_file_under_this_name_is_not_believed(built):
    whole = library()
    save_gram(cached("gram"), dataclasses.replace(load_gram(cached("gram")), debye_waller_b=0.1))
    assert same(library(), whole) and len(built) == 2


def test_a_file_of_another_format_is_another_file(built, monkeypatch):
    library()
    monkeypatch.setattr(libraries, "FORMAT", libraries.FORMAT + 1)
    library()
    assert len(built) == 2 and len(list(libraries.cache_folder().iterdir())) == 4


def test_a_cache_that_cannot_be_made_is_named(built, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEPTHPROB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"cannot write .*file/cache.*not a directory"):
        library()


@pytest.mark.parametrize("rubbish", [b"", b"PK\x05\x06" + bytes(18), b"rubbish" * 100])
def test_a_library_that_is_none_is_an_input_error(tmp_path, rubbish):
    (tmp_path / "library.npz").write_bytes(rubbish)
    with pytest.raises(InputError):
        ColumnLibrary.load(tmp_path / "library.npz")
    with pytest.raises(InputError):
        ColumnLibrary.load(tmp_path / "none.npz")


def test_a_library_file_serves_the_settings_it_was_written_for_and_no_others(built, tmp_path):
    config = lambda **sections: config_from_dict({"inference": {"max_atoms": 2}, "focal_series": {"defocus_A": [-10.0, 10.0]}} | sections)
    path = tmp_path / "library.npz"
    libraries.write_library(path, config(), lambda items, **_: items)
    assert same(libraries.read_library(path, config()), library_for(config(), 2))
    for section, key, value in (
        ("microscope", "energy_keV", 200.0), ("microscope", "aberrations", {"C12_A": 20.0}), ("detector", "inner_mrad", 60.0), ("detector", "outer_mrad", 150.0),
        ("specimen", "tilt_mrad", [1.0, 0.0]), ("specimen", "debye_waller_B_A2", 0.5), ("thermal", "model", "absorptive"), ("simulation", "parametrization", "kirkland"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"for other settings: {section}.{key} is .* in the library and .* in the config"):
            libraries.read_library(path, config(**{section: {key: value}}))
    library_for(config(), 2).save(path)
    with pytest.raises(InputError, match="does not say for which microscope"):
        libraries.read_library(path, config())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", np.zeros((3, 4))), ("images", np.full((4, 6, 6), np.nan)), ("coefficients", np.zeros((3, 9, 7))), ("coefficients", np.zeros((3, 2, 4))), ("cross_section", np.zeros(2)),
        ("centre", np.zeros(3, complex)), ("z_step", np.array(0.0)), ("spacing", np.array("wide")), ("pixel", np.array([0.1, 0.1])), ("depth_error", np.array([0.1, np.inf, 0.1])),
    ],
)  # fmt: skip
def test_arrays_that_no_library_has_are_refused(tmp_path, name, value):
    arrays = {"images": np.ones((4, 6, 6), np.float32), "coefficients": np.ones((3, 9, 4)), "cross_section": np.ones(3), "depth_error": np.full(3, np.nan), "centre": np.ones(3)}
    arrays |= {"pixel": 0.2, "z_start": -20.0, "z_step": 5.0, "element": "Au", "spacing": 4.08, "source_fwhm": 0.7, "band_limit": 2.1}
    path = tmp_path / "library.npz"
    storage.save_arrays(path, **arrays)
    assert ColumnLibrary.load(path).n_max == 3
    storage.save_arrays(path, **arrays | {name: value})
    with pytest.raises(InputError, match="is no column library"):
        ColumnLibrary.load(path)
