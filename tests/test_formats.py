"""The formats of stacks: each is read, and what it holds amiss is found before it is believed."""

import builtins
import io as python_io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from depthprob.config import config_from_dict
from depthprob.errors import InputError
from depthprob.formats import HEAP
from depthprob.stack import Stack, read_stack, write_stack

FOCI = np.array([-10.0, 0.0, 10.0])
SHAPE = (3, 5, 4)
SETTINGS = config_from_dict({"focal_series": {"defocus_A": list(FOCI), "pixel_size_A": 0.2, "dose_e_per_A2": 1000.0}})
SHARED = Path(__file__).parents[2] / "shared" / "data"
STACK_FORMATS = (".npz", ".nc", ".h5", ".hdf5", ".tif", ".tiff")


@pytest.fixture
def counts():
    return np.random.default_rng(3).poisson(20.0, SHAPE).astype(float)


def save(path, stack):
    np.savez(path, stack=stack, defocus_A=FOCI, pixel_size_A=0.2)
    return path


def fault(path):
    with pytest.raises(InputError) as caught:
        read_stack(path, SETTINGS)
    return str(caught.value)


@pytest.mark.parametrize("suffix", STACK_FORMATS)
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.6, 0.97])
def test_a_truncated_file_is_an_input_error(tmp_path, suffix, kept):
    path = tmp_path / f"stack{suffix}"
    data = np.random.default_rng(0).poisson(50.0, (3, 64, 64))
    write_stack(path, Stack(data, FOCI, 0.2))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert "cannot read" in fault(path)


@pytest.mark.parametrize("suffix", STACK_FORMATS)
def test_rubbish_is_an_input_error(tmp_path, suffix):
    path = tmp_path / f"stack{suffix}"
    path.write_bytes(np.random.default_rng(0).bytes(3000))
    assert "cannot read" in fault(path)


def test_a_flipped_byte_in_a_compressed_stack_is_an_input_error(tmp_path):
    path = tmp_path / "stack.npz"
    np.savez_compressed(path, stack=np.random.default_rng(0).poisson(50.0, (3, 64, 64)))
    damaged = bytearray(path.read_bytes())
    damaged[2000] ^= 0xFF
    path.write_bytes(damaged)
    assert "cannot read" in fault(path)


def test_classic_netcdf_and_transposed_dimensions_are_read(tmp_path, counts):
    import xarray

    data = xarray.Dataset({"stack": (("x", "y", "defocus"), counts.T)}, attrs={"pixel_size_A": 0.2})
    for engine in ("scipy", "h5netcdf"):
        data.to_netcdf(tmp_path / "stack.nc", engine=engine)
        np.testing.assert_array_equal(read_stack(tmp_path / "stack.nc", SETTINGS).data, counts)


def test_a_damaged_classic_netcdf_file_is_refused_and_not_left_open(tmp_path, counts):
    import xarray

    path, open_files = tmp_path / "stack.nc", Path("/proc/self/fd")
    if not open_files.exists():
        pytest.skip("needs a system that lists open files")
    xarray.Dataset({"stack": (("defocus", "y", "x"), counts.astype("i4"))}).to_netcdf(path, engine="scipy")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="cannot read") as refused:
        read_stack(path, SETTINGS)
    assert refused.tb is not None  # which holds all that the reader had in hand
    assert str(path) not in {str(p.readlink()) for p in open_files.iterdir() if p.is_symlink()}


def test_classic_netcdf_variables_that_all_declare_the_same_bytes_are_refused(tmp_path, counts):
    import xarray

    path = tmp_path / "stack.nc"
    dims, values = ("defocus", "y", "x"), counts.astype("i4")
    xarray.Dataset({"stack": (dims, values), "again": (dims, values)}).to_netcdf(path, engine="scipy")
    whole = path.read_bytes()
    first, second = len(whole) - 2 * values.nbytes, len(whole) - values.nbytes
    assert whole.count(second.to_bytes(8, "big")) == 1  # where the second begins, in the 64-bit offset format
    path.write_bytes(whole.replace(second.to_bytes(8, "big"), first.to_bytes(8, "big"))[:second])
    with pytest.raises(InputError, match="declare more than the"):
        read_stack(path, SETTINGS)


def test_the_array_must_be_named_stack(tmp_path, counts):
    np.savez(tmp_path / "stack.npz", images=counts)
    assert "'images'" in fault(tmp_path / "stack.npz")


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4, 1), (0, 5, 4), (3,)])
def test_only_three_dimensions_are_a_stack(tmp_path, shape):
    assert "(defocus, y, x)" in fault(save(tmp_path / "stack.npz", np.ones(shape)))


@pytest.mark.parametrize("dtype", [complex, object, str, bool])
def test_only_real_numbers_are_a_stack(tmp_path, dtype):
    assert "real numbers" in fault(save(tmp_path / "stack.npz", np.ones(SHAPE).astype(dtype)))


def test_a_header_that_asks_for_more_than_the_memory_is_refused_before_allocation(tmp_path):
    header = python_io.BytesIO()
    claim = {"descr": "<f8", "fortran_order": False, "shape": (3, 10**7, 10**7)}
    np.lib.format.write_array_header_1_0(header, claim)
    with zipfile.ZipFile(tmp_path / "stack.npz", "w") as archive:
        archive.writestr("stack.npy", header.getvalue())
    assert "memory" in fault(tmp_path / "stack.npz")


def hdf5(path, build):
    import h5py

    with h5py.File(path, "w") as file:
        build(file)
    return path


@pytest.mark.parametrize("suffix", [".h5", ".nc"])
@pytest.mark.parametrize(("chunks", "written"), [(None, 0), ((1, 5, 4), 0), ((1, 5, 4), 2)])
def test_an_hdf5_stack_that_was_not_all_written_is_refused(tmp_path, counts, suffix, chunks, written):
    def build(file):
        stack = file.create_dataset("stack", SHAPE, "u2", chunks=chunks)
        for k in range(written):
            stack[k] = counts[k]

    assert "not all of it was written" in fault(hdf5(tmp_path / f"stack{suffix}", build))


@pytest.mark.parametrize("suffix", [".h5", ".nc"])
def test_an_hdf5_stack_reads_no_other_file(tmp_path, counts, suffix):
    import h5py

    np.ones(SHAPE, "u2").tofile(tmp_path / "secret.bin")
    other = hdf5(tmp_path / "other.h5", lambda file: file.create_dataset("stack", data=counts))
    layout = h5py.VirtualLayout(SHAPE, "f8")
    layout[:] = h5py.VirtualSource(str(other), "stack", SHAPE)
    for name, build in {
        "external": lambda file: file.create_dataset("stack", SHAPE, "u2", external=[(str(tmp_path / "secret.bin"), 0, 120)]),
        "virtual": lambda file: file.create_virtual_dataset("stack", layout),
        "link": lambda file: file.__setitem__("stack", h5py.ExternalLink(str(other), "stack")),
    }.items():
        assert "other files" in fault(hdf5(tmp_path / f"{name}{suffix}", build))


@pytest.mark.parametrize("length", [0, 2**40, 2**64 - 16])
def test_a_netcdf_file_whose_heap_never_ends_is_refused(tmp_path, counts, length):
    """HDF5 itself would step over it for ever, by nothing at a time (2^64 - 16 wraps round to that)."""
    path = tmp_path / "stack.nc"
    write_stack(path, Stack(counts, np.array(FOCI), 0.2))
    whole = bytearray(path.read_bytes())
    at = whole.index(HEAP) + 16  # the first object: index, references, length
    whole[at : at + 2] = bytes(2)
    whole[at + 8 : at + 16] = length.to_bytes(8, "little")
    path.write_bytes(whole)
    assert f"object of impossible length {length}" in fault(path)


def test_colour_and_mixed_tiffs_are_refused(tmp_path):
    import tifffile

    tifffile.imwrite(tmp_path / "colour.tif", np.zeros((8, 8, 3), np.uint8), photometric="rgb")
    assert "colour" in fault(tmp_path / "colour.tif")
    with tifffile.TiffWriter(tmp_path / "mixed.tif") as file:
        file.write(np.zeros((8, 8), np.uint8))
        file.write(np.zeros((9, 8), np.uint8))
    assert "series" in fault(tmp_path / "mixed.tif")


def test_a_pixel_size_in_an_imagej_tiff_is_compared(tmp_path, counts):
    import tifffile

    for size_nm, agrees in ((0.02, True), (0.03, False)):
        tifffile.imwrite(
            tmp_path / "stack.tif",
            counts.astype(np.uint16),
            imagej=True,
            resolution=(1 / size_nm, 1 / size_nm),
            metadata={"unit": "nm", "axes": "ZYX"},
        )
        if agrees:
            read_stack(tmp_path / "stack.tif", SETTINGS)
        else:
            assert "0.3 in the file and 0.2 in the config" in fault(tmp_path / "stack.tif")


def test_other_formats_name_the_extra_when_it_is_absent(tmp_path, monkeypatch):
    imports = builtins.__import__

    def without_rosettasciio(name, *args, **kwargs):
        if name == "rsciio":
            raise ImportError(name)
        return imports(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rosettasciio)
    (tmp_path / "stack.dm4").write_bytes(struct.pack(">i", 4))
    assert "depthprob[io]" in fault(tmp_path / "stack.dm4")


def test_an_unknown_format_is_an_input_error(tmp_path):
    (tmp_path / "stack.docx").write_bytes(b"")
    fault(tmp_path / "stack.docx")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of trial data")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rsciio_test_STEM_image.dm3", "exactly one (defocus, y, x) stack"),
        ("ncem_dmTest_3D_int16_64-65-66.dm3", "30 Å high and 0.02 Å wide"),
        ("rsciio_prismatic_Si100_3D.emd", "mrad"),
        ("rsciio_velox_tem_stack.emd", "2 images"),
        ("ncem_temp.mrc", "2 in the file and 0.2 in the config"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_real_files_of_other_kinds_are_understood_and_refused(name, words):
    pytest.importorskip("rsciio")
    assert words in fault(SHARED / "files" / name)
