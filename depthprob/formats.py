"""The formats that images come in: one reader for each, which checks what a file holds before it makes room for it."""

import importlib
import logging
import math
import mmap
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import InputError
from .storage import DAMAGE, PARSER_FAULTS, memory_bytes, naming, read_array

LENGTHS_A = {
    "\u00c5": 1.0,
    "\u212b": 1.0,
    "A": 1.0,
    "angstrom": 1.0,
    "nm": 10.0,
    "pm": 0.01,
    "m": 1e10,
    "µm": 1e4,
    "μm": 1e4,
    "um": 1e4,
    "micron": 1e4,
}
SMALLEST_DIRECTORY = 18  # bytes of a TIFF directory with one entry
HEAP = b"GCOL\1\0\0\0"  # how a global heap of HDF5 begins
MOST_COMPRESSED = 1100  # the best that deflate can do is 1032 to 1


class Content(NamedTuple):
    """What a file holds, before it is compared with the config; absent entries are None."""

    stack: np.ndarray
    defocus_A: np.ndarray | None = None
    pixel_size_A: float | None = None
    dose_e_per_A2: np.ndarray | None = None


def read_file(path: Path, ndim: int = 3) -> Content:
    """The stack (an image, where `ndim` is 2) of one file, by the format that its name tells."""
    reader = _READERS.get(path.suffix.lower(), _read_rosettasciio)
    return reader(path, ndim)


def _check_shape(path: Path, shape: Sequence[int], dtype: np.dtype, ndim: int) -> None:
    """Refuse from the header alone what cannot be a stack (an image, where `ndim` is 2) or cannot be held as float64."""
    if len(shape) != ndim or 0 in shape:
        if ndim == 2:
            raise InputError(f"{path}: the image has shape {tuple(shape)}; allowed is (y, x) in each file of a folder, none empty.")
        raise InputError(
            f"{path}: the stack has shape {tuple(shape)}; allowed is (defocus, y, x), three dimensions, none empty. "
            "Save the images of all foci as one array, or give a folder with a file for each focus."
        )
    if dtype.kind not in "uif":
        raise InputError(
            f"{path}: the stack holds {dtype}; allowed are real numbers (integer or floating)."
        )
    needed = math.prod(shape) * (dtype.itemsize + 8)
    if needed > memory_bytes():
        raise InputError(
            f"{path}: a stack of {tuple(shape)} {dtype} needs {needed / 2**30:.1f} GiB uncompressed, this computer "
            f"has {memory_bytes() / 2**30:.1f} GiB of memory. Crop or bin the images."
        )


def _scalar(path: Path, name: str, value: Any) -> float:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "uif":
        raise InputError(
            f"{path}: {name} has shape {array.shape} and type {array.dtype}; allowed is one number."
        )
    return float(array.reshape(()))


def _content(path: Path, stack: np.ndarray, get: Callable[[str], Any]) -> Content:
    """The stack with the entries that travel with it by the names of the contract."""
    vectors = {}
    for name in ("defocus_A", "dose_e_per_A2"):
        value = get(name)
        if value is not None:
            value = np.atleast_1d(np.asarray(value))
            if value.ndim != 1 or value.dtype.kind not in "uif":
                raise InputError(
                    f"{path}: {name} has shape {value.shape} and type {value.dtype}; allowed are numbers in one list."
                )
        vectors[name] = value
    pixel_size = get("pixel_size_A")
    if pixel_size is not None:
        pixel_size = _scalar(path, "pixel_size_A", pixel_size)
    return Content(stack, vectors["defocus_A"], pixel_size, vectors["dose_e_per_A2"])


def _missing_stack(path: Path, names: Sequence[str]) -> InputError:
    return InputError(
        f"{path}: holds no array 'stack', but {sorted(names)}. Name the (defocus, y, x) array 'stack'."
    )


def _read_npz(path: Path, ndim: int = 3) -> Content:
    with naming(path, *DAMAGE), zipfile.ZipFile(path) as archive:
        names = [n.removesuffix(".npy") for n in archive.namelist()]
        if "stack" not in names:
            raise _missing_stack(path, names)

        def check_length(name: str, shape: Sequence[int]) -> None:
            if math.prod(shape) > 1_000_000:
                raise InputError(f"{path}: {name} has shape {tuple(shape)}; allowed is one value for every image.")

        def get(name: str) -> np.ndarray | None:
            return read_array(path, archive, name, lambda shape, _: check_length(name, shape)) if name in names else None

        return _content(path, read_array(path, archive, "stack", lambda shape, dtype: _check_shape(path, shape, dtype, ndim)), get)


def _read_hdf5(path: Path, ndim: int = 3) -> Content:
    import h5py

    with naming(path, *PARSER_FAULTS), h5py.File(path, "r") as file:
        _check_heaps(path, file)
        stack = file.get("stack")
        if not isinstance(stack, h5py.Dataset):
            raise _missing_stack(path, list(file))
        _check_shape(path, stack.shape, stack.dtype, ndim)
        _check_stored(path, file)

        def get(name: str) -> Any:
            value = file.get(name)
            if isinstance(value, h5py.Dataset):
                return value[()]
            return stack.attrs.get(name, file.attrs.get(name))

        return _content(path, stack[()], get)


def _check_heaps(path: Path, file) -> None:
    """Refuse an HDF5 file with a global heap, where texts and netCDF's dimensions lie, that never ends: HDF5 would step over nothing for ever.

    A heap is "GCOL", version 1, three zeros and its length; then objects, each of index (0 marks free space, whose length counts its header), references, length
    and content on a multiple of eight bytes. HDF5 File Format Specification 3.0, III.E.
    """
    _, width = file.id.get_create_plist().get_sizes()
    with path.open("rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as held:
        number = lambda at, size: int.from_bytes(held[at : at + size], "little")
        start = held.find(HEAP)
        while start >= 0:
            at, end = start + 8 + width, start + number(start + 8, width)
            while at + 8 + width <= min(end, len(held)):
                length = number(at + 8, width)
                step = 8 + width + -(-length // 8) * 8 if number(at, 2) else length
                if not 0 < step <= end - at:
                    raise ValueError(f"its heap at byte {start} holds an object of impossible length {length} at byte {at}")
                at += step
            start = held.find(HEAP, start + 8)


def _check_stored(path: Path, file) -> None:
    """Refuse an HDF5 file whose stack lies elsewhere, or was never written: HDF5 would read other files, or make up zeros for all that is declared."""
    import h5py

    stack, links = file["stack"], [file.get(name, getlink=True) for name in ("stack", "defocus_A", "pixel_size_A", "dose_e_per_A2") if name in file]
    if any(isinstance(link, h5py.ExternalLink) for link in links) or stack.is_virtual or stack.external:
        raise InputError(f"{path}: its arrays lie in other files, which are not read. Save it as one file.")
    chunks = math.prod(-(-n // m) for n, m in zip(stack.shape, stack.chunks, strict=True)) if stack.chunks else 1
    if stack.id.get_storage_size() == 0 or (stack.chunks and stack.id.get_num_chunks() != chunks):
        raise InputError(f"{path}: the stack declares {stack.shape} {stack.dtype}, but not all of it was written. Save it again.")


class _ReadOnce(mmap.mmap):
    """A file's bytes, of which no more are given out than there are: variables that declare the same bytes over and over would fill the memory."""

    given = 0

    def read(self, n: int | None = None) -> bytes:
        content = super().read(n)
        self.given += len(content)
        if self.given > len(self):
            raise ValueError(f"its variables declare more than the {len(self)} bytes that it holds")
        return content


def _read_netcdf(path: Path, ndim: int = 3) -> Content:
    import h5py

    with naming(path, *PARSER_FAULTS):
        if _starts_with(path, b"CDF"):  # scipy reads every variable at once, and leaves a file open that it does not understand: it gets one opened here
            size = path.stat().st_size
            if 2 * size > memory_bytes():
                raise InputError(f"{path}: has {size / 2**30:.1f} GiB, too much for {memory_bytes() / 2**30:.1f} GiB of memory. Crop or bin the images.")
            with path.open("rb") as file, _ReadOnce(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
                return _of_dataset(path, held, "scipy", ndim)
        with h5py.File(path, "r") as file:
            _check_heaps(path, file)
            if isinstance(file.get("stack"), h5py.Dataset):
                _check_shape(path, file["stack"].shape, file["stack"].dtype, ndim)
                _check_stored(path, file)
        return _of_dataset(path, path, "h5netcdf", ndim)


def _of_dataset(path: Path, source: Path | mmap.mmap, engine: str, ndim: int) -> Content:
    """The stack and its entries, as xarray's engine reads them from a path or an open file."""
    import xarray

    with xarray.open_dataset(source, engine=engine, decode_times=False) as data:
        if "stack" not in data:
            raise _missing_stack(path, [str(name) for name in data.variables])
        stack = data["stack"]
        wanted = ("defocus", "y", "x")[3 - ndim :]
        if set(stack.dims) == set(wanted):
            stack = stack.transpose(*wanted)
        _check_shape(path, stack.shape, stack.dtype, ndim)

        def get(name: str) -> Any:
            if name in data.variables:
                return data[name].values
            return stack.attrs.get(name, data.attrs.get(name))

        return _content(path, stack.values, get)


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _read_tiff(path: Path, ndim: int = 3) -> Content:
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # its words on damage would stand beside the one message
    with naming(path, *PARSER_FAULTS, tifffile.TiffFileError), tifffile.TiffFile(path) as file:
        size = path.stat().st_size
        if len(file.pages) * SMALLEST_DIRECTORY > size:
            raise ValueError(f"its list of {len(file.pages)} images does not fit into {size} bytes")
        if len(file.series) != 1:
            raise InputError(
                f"{path}: holds {len(file.series)} series of images; allowed is one in which all images have the "
                "same size and type. Export the focal series alone."
            )
        series = file.series[0]
        if "S" in series.axes:
            raise InputError(
                f"{path}: holds colour images; allowed is one number a pixel. Export in greyscale."
            )
        _check_shape(path, series.shape, np.dtype(series.dtype), ndim)
        if series.nbytes > MOST_COMPRESSED * size:
            raise ValueError(f"it declares {series.nbytes} bytes of images and holds {size}")
        needed = max(
            offset + length
            for page in series.pages
            if page is not None
            for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True)
        )
        if needed > size:  # tifffile would fill the rest with zeros
            raise InputError(
                f"cannot read {str(path)!r}: its images reach to byte {needed}, the file ends at byte "
                f"{size}. It is truncated; copy it again."
            )
        pixel_size = None
        page = file.pages.first
        unit = LENGTHS_A.get(
            str((file.imagej_metadata or {}).get("unit", "")).replace("\\u00B5", "µ")
        )
        if unit is not None and "XResolution" in page.tags:
            pixels, units = page.tags["XResolution"].value
            pixel_size = unit * units / pixels if pixels else None
        return Content(series.asarray(), pixel_size_A=pixel_size)


def _read_rosettasciio(path: Path, ndim: int = 3) -> Content:
    """Any other format, through RosettaSciIO; one three-dimensional data set of images."""
    try:
        import rsciio
    except ImportError:
        raise InputError(
            f"{path}: files {path.suffix!r} are read through RosettaSciIO, which is not installed. "
            "Run pip install 'depthprob[io]', or convert to .npz, .nc, .h5 or .tif."
        ) from None

    suffix = path.suffix.lower().removeprefix(".")
    plugins = [p for p in rsciio.IO_PLUGINS if suffix in (e.lower() for e in p["file_extensions"])]
    if not suffix or not plugins:
        raise InputError(
            f"{path}: no reader knows the format {path.suffix!r}. Allowed are .npz, .nc, .h5, .hdf5, .tif and what "
            "RosettaSciIO reads."
        )
    if path.stat().st_size > memory_bytes():
        raise InputError(
            f"{path}: {path.stat().st_size / 2**30:.1f} GiB do not fit into memory. Crop or bin the images."
        )
    plugins.sort(key=lambda plugin: plugin["name"].lower() != suffix)  # MRC before MRCZ
    for plugin in plugins:
        try:
            signals = _signals_of_rosettasciio(path, plugin)
            break
        except InputError:
            if plugin is plugins[-1]:
                raise
    stacks = [s for s in signals if np.ndim(s["data"]) == ndim]
    if len(stacks) != 1:
        shapes = [np.shape(s["data"]) for s in signals]
        wanted = "(defocus, y, x) stack" if ndim == 3 else "(y, x) image"
        raise InputError(f"{path}: holds data of shapes {shapes}; allowed is exactly one {wanted}.")
    data, axes = np.asarray(stacks[0]["data"]), stacks[0]["axes"]
    _check_shape(path, data.shape, data.dtype, ndim)
    return Content(data, *_axes_of_rosettasciio(path, axes))


def _signals_of_rosettasciio(path: Path, plugin: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All data sets of a file; its readers meet damage with whatever their next line raises."""
    with naming(path, *PARSER_FAULTS):
        try:
            reader = importlib.import_module(plugin["api"])
        except ImportError as error:
            raise InputError(
                f"{path}: the reader {plugin['name']!r} lacks a package: {error}. Install it."
            ) from None
        return reader.file_reader(str(path))


def _axes_of_rosettasciio(
    path: Path, axes: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray | None, float | None]:
    """Foci and pixel size where the file states them as lengths."""
    if all(axis.get("index_in_array") is not None for axis in axes):
        axes = sorted(axes, key=lambda axis: axis["index_in_array"])
    units = [str(axis.get("units") or "").replace("_", "") for axis in axes]
    if any("eV" in unit or "rad" in unit or "1/" in unit or "^-1" in unit for unit in units):
        raise InputError(
            f"{path}: its axes have the units {units}; allowed is a stack of images (defocus, y, x), no spectra, "
            "angles or diffraction patterns."
        )
    lengths = [
        abs(float(axis["scale"])) * LENGTHS_A[unit] if unit in LENGTHS_A else None
        for axis, unit in zip(axes, units, strict=True)
    ]
    height, width = lengths[-2:]
    if height is not None and width is not None and not math.isclose(height, width, rel_tol=1e-3):
        raise InputError(
            f"{path}: pixels are {height:g} Å high and {width:g} Å wide; allowed are square pixels. Resample the images."
        )
    defocus = None
    if len(axes) == 3 and "focus" in str(axes[0].get("name")).lower() and units[0] in LENGTHS_A:
        steps = np.arange(int(axes[0]["size"]))
        first, step = float(axes[0]["offset"]), float(axes[0]["scale"])
        defocus = (first + step * steps) * LENGTHS_A[units[0]]
    return defocus, width if height is not None else None


_READERS: dict[str, Callable[[Path, int], Content]] = {
    ".npz": _read_npz,
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
    ".nc": _read_netcdf,
    ".tif": _read_tiff,
    ".tiff": _read_tiff,
}
