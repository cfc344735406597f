"""StatSTEM's files: what it stored comes out, what we write is as it writes, and damaged files are refused."""

from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from depthprob.errors import InputError
from depthprob.reconstruction.counting import count_by_hybrid, gaussian_mixture_counts
from depthprob.statstem import ColumnResult, read_statstem, write_statstem

STATSTEM = Path(__file__).parents[2] / "shared" / "data" / "statstem" / "ExamplePtIr.mat"
needs_example = pytest.mark.skipif(not STATSTEM.exists(), reason="ExamplePtIr.mat is not at hand")


@pytest.fixture
def result():
    """Two rows of columns on an image that is wider than high, one column at the centre of pixel (0, 0)."""
    rng = np.random.default_rng(0)
    x, y = (a.ravel() for a in np.meshgrid(np.arange(6) * 2.0, np.arange(2) * 2.0))
    n = rng.integers(1, 4, 12)
    volume = 0.02 * n + rng.normal(0, 5e-4, 12)
    image = rng.random((30, 80))
    mixture = gaussian_mixture_counts(volume, 5)
    return ColumnResult(image, 0.2, np.column_stack([x, y]), volume, np.full(12, 0.5), 0.003, image**2, 0.02 * np.arange(1.0, 6.0), mixture, n)


def assert_same(ours, theirs):
    for name in set(ColumnResult._fields) - {"mixture"}:
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-12, atol=1e-12, err_msg=name)
    for name in ("n", "icl", "components", "offset"):
        np.testing.assert_allclose(getattr(ours.mixture, name), getattr(theirs.mixture, name))
    for a, b in zip(ours.mixture.fits, theirs.mixture.fits, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y)


def test_what_is_written_is_read_back(result, tmp_path):
    write_statstem(tmp_path / "columns.mat", result, "Au")
    assert_same(read_statstem(tmp_path / "columns.mat"), result)


def test_coordinates_count_from_one_pixel_before_the_image(result, tmp_path):
    """As StatSTEM's meshgrid of (1 ... n) * dx: the centre of the first pixel is at (dx, dx)."""
    write_statstem(tmp_path / "columns.mat", result)
    np.testing.assert_allclose(loadmat(tmp_path / "columns.mat")["output"]["coordinates"][0, 0][0], [0.2, 0.2])


def test_results_without_counts_are_read(result, tmp_path):
    write_statstem(tmp_path / "columns.mat", result._replace(library=None, mixture=None, n_atoms=None))
    found = read_statstem(tmp_path / "columns.mat")
    assert found.library is found.mixture is found.n_atoms is None
    np.testing.assert_allclose(found.positions, result.positions)


@needs_example
def test_statstems_results_are_those_it_stored():
    found = read_statstem(STATSTEM)
    stored = loadmat(STATSTEM, struct_as_record=False, squeeze_me=True)
    assert found.image.shape == (512, 512) and found.pixel_size == 0.1211
    np.testing.assert_array_equal(found.positions, stored["output"].coordinates - 0.1211)
    np.testing.assert_array_equal(found.cross_section, stored["output"].volumes)
    np.testing.assert_array_equal(found.mixture.n, stored["atomcounting"].Counts)
    assert found.mixture.components == 10 and len(found.mixture.fits) == 20 and found.library[4] == 0.14929
    # the model's highest pixel by a column is within a pixel of its position: frame and axes
    for x, y in found.positions[::10] / found.pixel_size:
        part = found.model_image[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3]
        assert part[2, 2] > 0.95 * part.max()


@needs_example
def test_a_file_written_has_the_fields_shapes_and_values_of_statstems_own(tmp_path):
    write_statstem(tmp_path / "columns.mat", read_statstem(STATSTEM), "1")
    ours, theirs = (loadmat(path, struct_as_record=False) for path in (tmp_path / "columns.mat", STATSTEM))
    for name in ("input", "output", "atomcounting"):
        a, b = ours[name][0, 0], theirs[name][0, 0]
        assert a._fieldnames == b._fieldnames
        for field in a._fieldnames:
            x, y = getattr(a, field), getattr(b, field)
            assert x.shape == y.shape, field
            if field == "estimatedDistributions":
                for one, other in zip(x[0], y[0], strict=True):
                    assert one[0, 0]._fieldnames == other[0, 0]._fieldnames
                    np.testing.assert_allclose(np.sort(one[0, 0].mu, 0), np.sort(other[0, 0].mu, 0))
                    assert one[0, 0].PComponents.shape == other[0, 0].PComponents.shape
            elif (name, field) == ("input", "coordinates"):  # where the fit began, which we do not keep
                np.testing.assert_array_equal(x[:, 2], y[:, 2])
            elif field == "types":
                assert x[0, 0] == y[0, 0] == "1"
            else:
                np.testing.assert_allclose(x, y, rtol=1e-9, err_msg=field)


@needs_example
def test_the_hybrid_counts_statstems_columns_as_its_mixture_did():
    """Its operator chose ten components on sight; the hybrid finds the like without one, the rest off by one."""
    found = read_statstem(STATSTEM)
    ours = count_by_hybrid(found.cross_section, found.library)
    assert np.mean(ours.n == found.mixture.n) >= 0.93 and abs(ours.n - found.mixture.n).max() <= 1


def spoil(path, **fields):
    """Write the file anew with some fields ("struct__field") replaced, or dropped where None."""
    content = loadmat(path)
    structs = {name: {f: content[name][f][0, 0] for f in content[name].dtype.names} for name in ("input", "output", "atomcounting", "libcounting")}
    for name, value in fields.items():
        struct, _, field = name.partition("__")
        if not field:
            structs[struct] = value
        else:
            structs[struct][field] = value
    savemat(path, {name: value for name, value in structs.items() if value is not None})


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"output": None}, "Fit them"),
        ({"input": np.ones(3)}, "no struct"),
        ({"input__dx": 0.0}, "not above 0"),
        ({"input__dx": "0.2"}, "real numbers"),
        ({"input__dx": np.array([0.2, 0.2])}, "shape 1"),
        ({"input__obs": np.ones((3, 3, 3))}, "any x any"),
        ({"input__obs": np.full((30, 80), np.nan)}, "NaN"),
        ({"input__obs": np.ones((30, 80)) * 1j}, "real numbers"),
        ({"input__library": np.array([[1, 0.1], [3, 0.3]])}, "1, 2, 3"),
        ({"output__coordinates": np.zeros((12, 3))}, "any x 2"),
        ({"output__coordinates": np.zeros((0, 2))}, "any x 2"),
        ({"output__coordinates": np.full((12, 2), 100.0)}, "off the image"),
        ({"output__volumes": np.ones(11)}, "output.volumes"),
        ({"output__rho": np.ones(5)}, "output.rho"),
        ({"output__model": np.ones((80, 30))}, "output.model"),
        ({"atomcounting__Counts": np.full(12, 1.5)}, "not whole"),
        ({"atomcounting__selMin": 9.0}, "selMin"),
        ({"atomcounting__estimatedDistributions": np.zeros((0, 0))}, "estimatedDistributions"),
        ({"libcounting__Counts": -np.ones(12)}, "libcounting.Counts"),
    ],
)
def test_odd_contents_are_refused_by_name(result, tmp_path, fields, word):
    path = tmp_path / "columns.mat"
    write_statstem(path, result)
    spoil(path, **fields)
    with pytest.raises(InputError, match=word):
        read_statstem(path)


def test_damaged_and_foreign_files_are_refused(result, tmp_path):
    path = tmp_path / "columns.mat"
    with pytest.raises(InputError, match="no StatSTEM file"):
        read_statstem(path)
    write_statstem(path, result)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for length in (0, 4, 100, 128, 140, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_statstem(path)
    for _ in range(60):  # bytes at random; where they lie in the image the file may still be read
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 20):
            damaged[at] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            read_statstem(path)
        except InputError:
            pass
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n")
    with pytest.raises(InputError, match=r"version 7\.3"):
        read_statstem(path)
