"""Reading stacks: every fault is found and named; writing: whole or not at all."""

import resource
from pathlib import Path

import numpy as np
import pytest

from depthprob.config import config_from_dict
from depthprob.errors import InputError
from depthprob.stack import Stack, _read_folder, read_stack, write_stack

FOCI = np.array([-10.0, 0.0, 10.0])
SHAPE = (3, 5, 4)
SHARED = Path(__file__).parents[2] / "shared" / "data"
STACK_FORMATS = (".npz", ".nc", ".h5", ".hdf5", ".tif", ".tiff")


def settings(**changes):
    detector = changes.pop("detector", {})
    series = {"defocus_A": list(FOCI), "pixel_size_A": 0.2, "dose_e_per_A2": 1000.0}
    return config_from_dict({"focal_series": series | changes, "detector": detector})


@pytest.fixture
def counts():
    return np.random.default_rng(3).poisson(20.0, SHAPE).astype(float)


def save(path, stack, **entries):
    entries = {"defocus_A": FOCI, "pixel_size_A": 0.2} | entries
    np.savez(path, stack=stack, **entries)
    return path


def fault(path, config=None):
    with pytest.raises(InputError) as caught:
        read_stack(path, config or settings())
    return str(caught.value)


@pytest.mark.parametrize("suffix", STACK_FORMATS)
def test_a_stack_written_reads_back_the_same(tmp_path, counts, suffix):
    path = tmp_path / f"stack{suffix}"
    write_stack(path, Stack(counts, FOCI, 0.2, {"dose_e_per_A2": np.full(3, 1000.0)}))
    read = read_stack(path, settings())
    np.testing.assert_array_equal(read.data, counts)
    np.testing.assert_array_equal(read.defocus_A, FOCI)
    assert read.data.dtype == np.float64
    assert read.pixel_size_A == 0.2
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_foci_and_pixels_may_be_absent_from_the_file(tmp_path, counts):
    np.savez(tmp_path / "stack.npz", stack=counts)
    assert read_stack(tmp_path / "stack.npz", settings()).pixel_size_A == 0.2


def test_fractions_become_counts_by_dose_and_pixel_area(tmp_path):
    fraction = np.random.default_rng(0).uniform(0, 0.2, SHAPE)
    path = save(tmp_path / "stack.npz", fraction)
    read = read_stack(path, settings(signal="fraction", dose_e_per_A2=[100.0, 200.0, 400.0]))
    np.testing.assert_allclose(
        read.data, fraction * np.array([4.0, 8.0, 16.0])[:, None, None], rtol=1e-12
    )


def test_raw_values_become_counts_by_offset_and_gain(tmp_path, counts):
    path = save(tmp_path / "stack.npz", 2.5 * counts + 7)
    read = read_stack(path, settings(signal="raw", detector={"gain": 2.5, "offset": 7.0}))
    np.testing.assert_allclose(read.data, counts, atol=1e-12)


def test_missing_files_and_folders_are_named(tmp_path):
    assert "no stack file" in fault(tmp_path / "none.npz")
    assert "holds 0 image files" in fault(tmp_path)


def test_the_number_of_images_must_be_the_number_of_foci(tmp_path, counts):
    np.savez(tmp_path / "stack.npz", stack=counts)
    message = fault(tmp_path / "stack.npz", config_from_dict({}))
    assert "3 images" in message and "41 foci" in message


@pytest.mark.parametrize(
    ("entry", "given", "stated"),
    [
        ({"defocus_A": np.array([-10.0, 0.0, 11.0])}, "11", "10"),
        ({"defocus_A": -FOCI}, "10", "-10"),
        ({"pixel_size_A": 0.25}, "0.25", "0.2"),
        ({"dose_e_per_A2": 999.0}, "999", "1000"),
        ({"pixel_size_A": np.nan}, "nan", "0.2"),
    ],
)
def test_a_contradiction_names_both_values(tmp_path, counts, entry, given, stated):
    message = fault(save(tmp_path / "stack.npz", counts, **entry))
    assert f"is {given} in the file and {stated} in the config" in message


def test_metadata_in_single_precision_is_no_contradiction(tmp_path, counts):
    foci = np.array([-10.1, 0.3, 10.7])
    path = save(
        tmp_path / "s.npz", counts, defocus_A=foci.astype("f4"), pixel_size_A=np.float32(0.2)
    )
    read_stack(path, settings(defocus_A=list(foci)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_counted_and_located(tmp_path, counts, bad):
    counts[1, 2, 3] = counts[2, 0, 0] = bad
    message = fault(save(tmp_path / "stack.npz", counts))
    assert "2 pixels, the first in image 1 at (y, x) = (2, 3)" in message


def test_negative_counts_are_located(tmp_path, counts):
    counts[2, 4, 1] = -1
    assert "1 pixels, the first in image 2 at (y, x) = (4, 1)" in fault(
        save(tmp_path / "s.npz", counts)
    )


def test_negative_raw_values_need_read_noise(tmp_path, counts):
    path = save(tmp_path / "stack.npz", counts - 30)
    assert "read_noise" in fault(path, settings(signal="raw"))
    noisy = settings(signal="raw", detector={"read_noise": 15.0})
    np.testing.assert_array_equal(read_stack(path, noisy).data, counts - 30)


def test_counts_that_are_not_whole_point_to_the_signal(tmp_path, counts):
    message = fault(save(tmp_path / "stack.npz", counts / 3))
    assert "'fraction'" in message and "'raw'" in message


def test_a_fraction_above_one_points_to_the_signal(tmp_path, counts):
    assert "at most 1" in fault(save(tmp_path / "stack.npz", counts), settings(signal="fraction"))


def test_constant_images_are_found(tmp_path, counts):
    counts[1] = 7
    assert "the first is image 1" in fault(save(tmp_path / "stack.npz", counts))


@pytest.mark.parametrize("suffix", STACK_FORMATS)
def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path, suffix):
    noise = np.random.default_rng(0).poisson(500, (3, 100, 100))
    own = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, own[1]))
        with pytest.raises(InputError, match=r"file too large\. Make room"):
            write_stack(tmp_path / f"stack{suffix}", Stack(noise, FOCI, 0.2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, own)
    assert not list(tmp_path.iterdir())


def write_images(folder, counts, names):
    import tifffile

    folder.mkdir()
    for name, image in zip(names, counts, strict=True):
        tifffile.imwrite(folder / name, image.astype(np.float32))
    return folder


def test_a_folder_of_images_is_read_in_natural_order(tmp_path, counts):
    folder = write_images(tmp_path / "s", counts[[2, 0, 1]], ["focus_10.tif", "focus_1.tif", "focus_2.tif"])
    (folder / "notes.txt").write_text("not an image")
    np.testing.assert_array_equal(read_stack(folder, settings()).data, counts)
    (folder / "focus_3.tif").write_bytes((folder / "focus_1.tif").read_bytes())
    message = fault(folder)
    assert "4 image files" in message and "3 foci" in message


def test_a_folder_with_images_of_two_sizes_names_the_odd_one(tmp_path, counts):
    folder = write_images(tmp_path / "s", [counts[0], counts[1], counts[2][:, 1:]], ["a.tif", "b.tif", "c.tif"])
    assert "c.tif" in fault(folder) and "(5, 3)" in fault(folder)


@pytest.mark.parametrize("suffix", ["csv", "toml"])
def test_a_table_of_foci_names_files_foci_and_doses(tmp_path, counts, suffix):
    folder = write_images(tmp_path / "s", counts, ["c.tif", "a.tif", "b.tif"])
    table = tmp_path / f"foci.{suffix}"
    if suffix == "csv":
        table.write_text("file,defocus_A,dose_e_per_A2\nc.tif,-30,100\na.tif, 0.5,200\nb.tif,12,300\n")
    else:
        table.write_text('file = ["c.tif", "a.tif", "b.tif"]\ndefocus_A = [-30, 0.5, 12]\ndose_e_per_A2 = [100, 200, 300]\n')
    read = lambda **more: config_from_dict({"focal_series": {"foci_table": table.name, "pixel_size_A": 0.2} | more}, tmp_path)
    stack = read_stack(folder, read())
    np.testing.assert_array_equal(stack.data, counts)
    np.testing.assert_array_equal(stack.defocus_A, [-30, 0.5, 12])
    np.testing.assert_array_equal(stack.metadata["dose_e_per_A2"], [100, 200, 300])
    with pytest.raises(InputError, match="both foci_table and defocus_A"):
        read(defocus_A=[1.0, 2.0, 3.0])


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of trial data")
def test_single_images_of_microscopes_are_read_from_a_folder(tmp_path):
    pytest.importorskip("rsciio")
    for k in range(3):
        (tmp_path / f"{k}.dm3").write_bytes((SHARED / "files" / "rsciio_test_STEM_image.dm3").read_bytes())
    content = _read_folder(tmp_path, settings())
    assert content.stack.shape[0] == 3 and content.pixel_size_A > 0


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of trial data")
def test_the_trial_particle_is_read():
    config = config_from_dict({"focal_series": {"pixel_size_A": 0.204, "periodic": True}})
    stack = read_stack(SHARED / "particle_D.npz", config)
    assert stack.data.shape == (41, 100, 100)
    assert stack.data.dtype == np.float64
