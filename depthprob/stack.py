"""Focal series and tilt series, and their files: readers check everything that can be wrong with a stack before any computation."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Real

from .config import Config
from .errors import InputError
from .formats import Content, read_file
from .storage import HDF5_OVERHEAD, atomic_write
from .table import read_table


class Stack(NamedTuple):
    """A focal series.

    Attributes
    ----------
    data : (focus, y, x)
        Counts [e/pixel].
    defocus_A : (focus,)
        Foci [Å], positive is underfocus.
    pixel_size_A : float
        Pixel size [Å].
    metadata : dict
        Whatever else goes with it; `dose_e_per_A2` (focus,) and `signal` are set by `read_stack`.
    """

    data: Real[np.ndarray, "focus y x"]
    defocus_A: Real[np.ndarray, " focus"]
    pixel_size_A: float
    metadata: dict[str, Any] = {}  # noqa: RUF012 (never changed in place)


class TiltSeries(NamedTuple):
    """Projections at several tilts about the x axis: data (tilt, y, x) in the file's unit, tilts (tilt,) [degrees], pixel size [Å]."""

    data: Real[np.ndarray, "tilt y x"]
    tilts_deg: Real[np.ndarray, " tilt"]
    pixel_size_A: float


# Reading -------------------------------------------------------------------------------------------


def read_stack(path: str | Path, config: Config) -> Stack:
    """Read a focal series, check it against the config and convert its signal to counts.

    Parameters
    ----------
    path : path
        One file with all images, or a folder with one file for each focus: those named in the config's
        focal_series.image_files or foci_table, else all of them in natural order of their names (2 before 10).

    Returns
    -------
    Stack
        Counts: the file's values where `signal` is "counts", fraction * dose * pixel area for
        "fraction", (raw - offset) / gain for "raw".

    Raises
    ------
    InputError
        Missing, corrupt or unknown file; not three dimensions; larger than memory; number of images
        unlike the number of foci; foci, pixel size or dose of the file unlike the config's; NaN or
        infinity; negative values; counts that are not whole; an image without contrast.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"no stack file {str(path)!r}. Give the path of a focal series.")
    content = _read_folder(path, config) if path.is_dir() else read_file(path)
    _check_against_config(path, content, config)
    values = _checked_values(path, content.stack, config)
    series, detector = config.focal_series, config.detector
    if series.signal == "fraction":
        values *= (series.dose * series.pixel_size_A**2)[:, None, None]
    elif series.signal == "raw":
        values -= detector.offset
        values /= detector.gain
        _check_not_negative(path, values, config)
    metadata = {"file": path.name, "signal": series.signal, "dose_e_per_A2": series.dose}
    return Stack(values, series.defocus, series.pixel_size_A, metadata)


def read_tilt_series(path: str | Path, table: str | Path, pixel_size_A: float | None = None) -> TiltSeries:
    """Read a measured tilt series, one file of any format that `read_stack` takes, with its tilts from a table's column tilt_deg (CSV or TOML).

    Parameters
    ----------
    pixel_size_A : float, optional
        Needed where the file does not say.

    Raises
    ------
    InputError
        Missing, corrupt or unknown file or table; images and tilts of different number; NaN or infinity; pixel size missing, or other than the file's.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no tilt series {str(path)!r}. Give one file (.npz, .nc, .h5, .tif, .mrc, ...) that holds all images.")
    content = read_file(path)
    tilts = np.array(read_table(Path(table), "table of tilts", ["tilt_deg"])["tilt_deg"])
    if len(tilts) != len(content.stack):
        raise InputError(f"{path}: holds {len(content.stack)} images, but {str(table)!r} has {len(tilts)} tilts. Give a tilt for each image.")
    in_file = content.pixel_size_A
    if in_file is None and pixel_size_A is None:
        raise InputError(f"{path}: does not say how large its pixels are. Give pixel_size_A.")
    if in_file is not None and pixel_size_A is not None and abs(in_file - pixel_size_A) > 1e-4 * in_file:
        raise InputError(f"{path}: pixel_size_A is {in_file:g} in the file and {pixel_size_A:g} as given. Correct whichever is wrong, or leave it to the file.")
    values = np.array(content.stack, np.float64)
    finite = np.isfinite(values)
    if not finite.all():
        raise InputError(f"{path}: NaN or infinity in {_first(~finite)}. Every pixel needs a number: crop the images, or leave bad images and their tilts out.")
    return TiltSeries(values, tilts, float(pixel_size_A if in_file is None else in_file))


def _read_folder(folder: Path, config: Config) -> Content:
    """One image a file; pixel size, focus and dose wherever every file states them."""
    names = config.focal_series.image_files
    if names is not None:
        paths = [folder / Path(name).name if (folder / Path(name).name).is_file() else folder / name for name in names]
        missing = [str(p) for p in paths if not p.is_file()]
        if missing:
            raise InputError(f"{len(missing)} of {len(paths)} images named in the config are not in {str(folder)!r}; the first is {missing[0]!r}.")
    else:
        paths = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and p.suffix.lower() not in (".csv", ".toml", ".txt", ".md")]
        paths.sort(key=lambda p: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", p.name.lower())])
        foci = len(config.focal_series.defocus)
        if len(paths) != foci:
            shown = ", ".join(p.name for p in paths[:5]) + (", ..." if len(paths) > 5 else "")
            raise InputError(
                f"{str(folder)!r} holds {len(paths)} image files ({shown}), but the config's focal_series has {foci} foci. Leave only one "
                "file for each focus, or name them in focal_series.image_files or a foci_table (columns file, defocus_A)."
            )
    images = [read_file(p, 2) for p in paths]
    shapes = [i.stack.shape for i in images]
    odd = next((k for k, shape in enumerate(shapes) if shape != shapes[0]), None)
    if odd is not None:
        raise InputError(f"{paths[odd]} has {shapes[odd]} pixels, {paths[0]} has {shapes[0]}; allowed is one size. Crop the images alike.")

    def gathered(name: str) -> np.ndarray | None:
        values = [getattr(i, name) for i in images]
        return None if any(v is None for v in values) else np.array([np.ravel(v)[0] for v in values], float)

    pixels = gathered("pixel_size_A")
    if pixels is not None and np.ptp(pixels) > 1e-4 * pixels[0]:
        odd = int(np.argmax(abs(pixels - pixels[0])))
        raise InputError(f"{paths[odd]} has pixels of {pixels[odd]:g} Å, {paths[0]} of {pixels[0]:g} Å; allowed is one size. Resample the images.")
    pixel = None if pixels is None else float(pixels[0])
    return Content(np.stack([i.stack for i in images]), gathered("defocus_A"), pixel, gathered("dose_e_per_A2"))


# Checks --------------------------------------------------------------------------------------------


def _check_against_config(path: Path, content: Content, config: Config) -> None:
    series = config.focal_series
    images, foci = len(content.stack), len(series.defocus)
    if content.defocus_A is not None and len(content.defocus_A) != images:
        raise InputError(
            f"{path}: holds {images} images, but its own defocus_A has {len(content.defocus_A)} values. Save it again."
        )
    if images != foci:
        raise InputError(
            f"{path}: holds {images} images, but the config's focal_series has {foci} foci ({series.defocus[0]:g} to "
            f"{series.defocus[-1]:g} Å). Make them equal: defocus_A = [ ... ], or defocus_start_A, _stop_A and _step_A."
        )
    pixel = None if content.pixel_size_A is None else np.atleast_1d(content.pixel_size_A)
    pairs = (
        ("defocus_A", content.defocus_A, series.defocus, 1e-4),
        ("pixel_size_A", pixel, np.atleast_1d(series.pixel_size_A), 1e-4 * series.pixel_size_A),
        ("dose_e_per_A2", content.dose_e_per_A2, series.dose, 1e-4 * series.dose),
    )
    for name, in_file, in_config, tolerance in pairs:
        if in_file is None:
            continue
        if len(in_file) not in (1, len(in_config)):
            raise InputError(f"{path}: holds {len(in_file)} values {name} for {images} images.")
        in_file = np.broadcast_to(np.asarray(in_file, float), in_config.shape)
        differs = ~(np.abs(in_file - in_config) <= tolerance + 1e-6 * np.abs(in_config))
        if differs.any():
            k = int(np.argmax(differs))
            where = f" of image {k}" if len(in_config) > 1 else ""
            raise InputError(
                f"{path}: {name}{where} is {in_file[k]:g} in the file and {in_config[k]:g} in the config (its default "
                f"if the config does not say). Correct whichever is wrong; focal_series.{name} must agree with the file."
            )


def _first(mask: np.ndarray) -> str:
    """Number of marked pixels and the place of the first."""
    image, y, x = (int(i) for i in np.unravel_index(np.argmax(mask), mask.shape))
    return f"{int(mask.sum())} pixels, the first in image {image} at (y, x) = ({y}, {x})"


def _checked_values(path: Path, stack: np.ndarray, config: Config) -> np.ndarray:
    """The stack as a new float64 array, after the checks on its values."""
    values = np.array(stack, dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.all():
        raise InputError(
            f"{path}: NaN or infinity in {_first(~finite)}. Every pixel needs a number: crop the images, or leave bad images and their foci out."
        )
    signal = config.focal_series.signal
    if signal != "raw":
        _check_not_negative(path, values, config)
    if signal == "counts" and (fractional := values != np.round(values)).any():
        raise InputError(
            f"{path}: focal_series.signal is 'counts', but the values are not whole in {_first(fractional)}. Set "
            "signal = 'fraction' for fractions of the beam, or 'raw' with detector.gain and offset (gain 1, offset 0 "
            "for expected counts)."
        )
    if signal == "fraction" and values.max() > 1:
        raise InputError(
            f"{path}: focal_series.signal is 'fraction', but the largest value is {values.max():g}; a fraction of the "
            "beam is at most 1. Set signal = 'counts' or 'raw'."
        )
    constant = np.flatnonzero(values.min(axis=(1, 2)) == values.max(axis=(1, 2)))
    if len(constant):
        raise InputError(
            f"{path}: {len(constant)} images are constant, the first is image {constant[0]} (all "
            f"{values[constant[0], 0, 0]:g}). Leave empty images and their foci out."
        )
    return values


def _check_not_negative(path: Path, values: np.ndarray, config: Config) -> None:
    """Refuse negative values, except those that read noise explains."""
    signal = config.focal_series.signal
    negative = values < 0
    if negative.any() and (signal == "counts" or config.detector.read_noise == 0):
        mend = "Set signal = 'raw' and detector.offset, gain and read_noise."
        if signal == "raw":
            mend = "Lower detector.offset, or state detector.read_noise if noise explains it."
        raise InputError(
            f"{path}: negative {'counts after (raw - offset) / gain' if signal == 'raw' else signal} in {_first(negative)}, "
            f"down to {values.min():g}; allowed are values from 0. {mend}"
        )




# Writing -------------------------------------------------------------------------------------------


STACK_SUFFIXES = (".npz", ".nc", ".h5", ".hdf5", ".tif", ".tiff")


def check_stack_name(path: str | Path) -> None:
    """Refuse a name whose ending `write_stack` does not know."""
    if Path(path).suffix.lower() not in STACK_SUFFIXES:
        raise InputError(
            f"cannot write a stack {str(path)!r}: allowed endings are {', '.join(STACK_SUFFIXES)}."
        )


def write_stack(path: str | Path, stack: Stack) -> None:
    """Write a focal series as .npz, .nc, .h5 or .tif (the last without foci, which stay in the config).

    A `dose_e_per_A2` in the metadata goes with it. Whole counts that fit are kept as integers.
    """
    check_stack_name(path)
    suffix = Path(path).suffix.lower()
    data = np.asarray(stack.data)
    if np.all(data == np.round(data)) and data.min() >= 0 and data.max() < 2**32:
        data = data.astype(np.uint16 if data.max() < 2**16 else np.uint32)
    entries: dict[str, np.ndarray] = {
        "defocus_A": np.asarray(stack.defocus_A, float),
        "pixel_size_A": np.asarray(stack.pixel_size_A, float),
    }
    if "dose_e_per_A2" in stack.metadata:
        entries["dose_e_per_A2"] = np.asarray(stack.metadata["dose_e_per_A2"], float)
    with atomic_write(path, 0 if suffix == ".npz" else data.nbytes + HDF5_OVERHEAD) as temporary:
        if suffix == ".npz":
            np.savez_compressed(temporary, stack=data, **entries)
        elif suffix == ".nc":
            _write_netcdf(temporary, data, entries)
        elif suffix in (".h5", ".hdf5"):
            import h5py

            with h5py.File(temporary, "w") as file:
                file.create_dataset("stack", data=data, compression="gzip")
                for name, value in entries.items():
                    file.create_dataset(name, data=value)
        else:
            import tifffile

            plain = data.astype(np.float32) if data.dtype == np.float64 else data
            tifffile.imwrite(temporary, plain, photometric="minisblack")


def _write_netcdf(path: Path, data: np.ndarray, entries: Mapping[str, np.ndarray]) -> None:
    import xarray

    units = {
        "defocus_A": "angstrom",
        "pixel_size_A": "angstrom",
        "dose_e_per_A2": "electron/angstrom^2",
    }
    variables: dict[str, Any] = {
        "stack": (("defocus", "y", "x"), data, {"units": "electron/pixel"})
    }
    for name, value in entries.items():
        variables[name] = (("defocus",)[: value.ndim], value, {"units": units[name]})
    encoding = {"stack": {"zlib": True}}
    xarray.Dataset(variables).to_netcdf(path, engine="h5netcdf", encoding=encoding)
