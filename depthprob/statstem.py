"""StatSTEM's result files (.mat): columns fitted with Gaussians, and their atom counts.

The files hold structs as StatSTEM 1 saves them (StatSTEM 2 opens them too): `input` (the image obs, pixel size dx, library), `output` (coordinates,
widths rho, heights eta, background zeta, model, volumes), `atomcounting` (Gaussian mixtures) and `libcounting` (counts by the library).
Their coordinates count from one pixel before the image: a column in the centre of the first pixel lies at (dx, dx).
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import InputError
from .reconstruction.counting import Components, Mixture
from .storage import atomic_write

STRUCTS = ("input", "output", "atomcounting", "libcounting")
RIM = 2.0  # Å; a column this far off the image can still be seen on it


class ColumnResult(NamedTuple):
    """What StatSTEM keeps of an image.

    Attributes
    ----------
    image : (ny, nx)
        Fraction of the beam.
    pixel_size : float
        [Å].
    positions : (C, 2)
        x, y from the centre of pixel (0, 0) [Å].
    cross_section : (C,)
        Volume of each Gaussian [Å^2].
    width : (C,)
        Standard deviation of each Gaussian [Å].
    background : float
    model_image : (ny, nx)
    library : (n_max,), optional
        Simulated cross-sections of 1, 2, ... atoms [Å^2].
    mixture : Mixture, optional
        Counts by Gaussian mixture.
    n_atoms : (C,) int, optional
        Counts by the library.
    """

    image: np.ndarray
    pixel_size: float
    positions: np.ndarray
    cross_section: np.ndarray
    width: np.ndarray
    background: float
    model_image: np.ndarray
    library: np.ndarray | None = None
    mixture: Mixture | None = None
    n_atoms: np.ndarray | None = None


def read_statstem(path: str | Path) -> ColumnResult:
    """Read what StatSTEM found in an image, in this package's units and frame.

    Raises
    ------
    InputError
        No such file; no MATLAB file of versions 4 to 7; no fitted columns; objects in place of structs; arrays of other shapes or kinds
        than StatSTEM's; NaN or infinity; a pixel size or width not above zero; columns off the image; counts that are not whole.

    Notes
    -----
    A damaged tag in a file saved without compression can crash scipy's reader itself (scipy pull request 25829); compressed ones, MATLAB's default,
    carry a checksum.
    """
    from scipy.io import loadmat

    path = Path(path)
    if not path.is_file():
        raise InputError(f"no StatSTEM file {str(path)!r}. Give the path of a .mat file with results.")
    try:
        content = loadmat(path, struct_as_record=False, variable_names=STRUCTS, appendmat=False)
    except NotImplementedError:
        raise InputError(f"cannot read {str(path)!r}: it is of MATLAB's version 7.3; allowed are versions 4 to 7. Save it with -v7.") from None
    except Exception as error:  # whatever damaged bytes lead the library into
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot read {str(path)!r} as a MATLAB file: {reason}. Copy or export it again.") from error
    structs = {name: _struct(path, name, content[name]) for name in STRUCTS if name in content}
    for name in ("input", "output"):
        if name not in structs:
            raise InputError(f"{path}: holds no struct {name!r}; needed are 'input' and 'output', which StatSTEM writes once it has fitted columns. Fit them and save again.")
    given, found = structs["input"], structs["output"]
    image = _array(path, given, "input.obs", (None, None))
    pixel = _array(path, given, "input.dx", (1,), above=0)[0]
    positions = _array(path, found, "output.coordinates", (None, 2)) - pixel
    columns = len(positions)
    size = pixel * np.array(image.shape[::-1])
    off = np.any((positions < -RIM) | (positions > size + RIM), axis=1)
    if off.any():
        odd = int(np.argmax(off))
        raise InputError(f"{path}: column {odd} lies at {positions[odd].round(3).tolist()} Å, off the image of {size.round(3).tolist()} Å; check input.dx and output.coordinates.")
    width = _array(path, found, "output.rho", (None,), above=0)
    if len(width) not in (1, columns):
        raise InputError(f"{path}: output.rho has {len(width)} values for {columns} columns; allowed is one, or one for each.")
    library = mixture = n_atoms = None
    if hasattr(given, "library") and given.library.size:
        library = _array(path, given, "input.library", (None, 2))
        if not np.array_equal(library[:, 0], np.arange(1, len(library) + 1)):
            raise InputError(f"{path}: input.library is for {library[:, 0].tolist()} atoms; allowed is one row for each of 1, 2, 3, ... atoms.")
        library = library[:, 1]
    if "atomcounting" in structs:
        mixture = _mixture(path, structs["atomcounting"], columns)
    if "libcounting" in structs:
        n_atoms = _counts(path, structs["libcounting"], "libcounting.Counts", columns)
    return ColumnResult(
        image,
        float(pixel),
        positions,
        _array(path, found, "output.volumes", (columns,)),
        np.broadcast_to(width, columns).copy(),
        float(_array(path, found, "output.zeta", (1,))[0]),
        _array(path, found, "output.model", image.shape),
        library,
        mixture,
        n_atoms,
    )


def _struct(path: Path, name: str, value: Any) -> Any:
    if getattr(value, "size", 0) != 1 or not hasattr(value.flat[0], "_fieldnames"):
        raise InputError(f"{path}: {name!r} is no struct but {type(value).__name__}, perhaps an object of a MATLAB class; turn it into one with {name} = struct({name}) and save again.")
    return value.flat[0]


def _array(path: Path, struct: Any, name: str, shape: tuple[int | None, ...], above: float = -np.inf) -> np.ndarray:
    """Field of a struct as float64; a vector may be a row or a column."""
    value = np.asarray(getattr(struct, name.rpartition(".")[2], None))
    if len(shape) == 1 and value.ndim == 2 and 1 in value.shape:
        value = value.ravel()
    fits = value.ndim == len(shape) and value.size > 0 and all(want in (None, have) for want, have in zip(shape, value.shape, strict=True))
    if not fits or value.dtype.kind not in "uif":
        wanted = " x ".join("any" if n is None else str(n) for n in shape)
        raise InputError(f"{path}: {name} is {value.dtype} of shape {value.shape}; allowed are real numbers of shape {wanted}. Save the results again from StatSTEM.")
    value = value.astype(float)
    if not np.all(np.isfinite(value) & (value > above)):
        raise InputError(f"{path}: {name} holds NaN, infinity{f' or values not above {above:g}' if np.isfinite(above) else ''}; allowed are finite numbers. Fit again without these columns.")
    return value


def _counts(path: Path, struct: Any, name: str, columns: int | None) -> np.ndarray:
    value = _array(path, struct, name, (columns,), above=-1)
    if np.any(value != np.round(value)) or value.max() > 2**31:
        raise InputError(f"{path}: {name} holds counts that are not whole; allowed are 0, 1, 2, ... Count again.")
    return value.astype(int)


def _mixture(path: Path, struct: Any, columns: int) -> Mixture:
    icl = _array(path, struct, "atomcounting.ICL", (None,))
    likelihoods = -_array(path, struct, "atomcounting.mLogLik", (len(icl),))
    n = _counts(path, struct, "atomcounting.Counts", columns)
    chosen = int(_counts(path, struct, "atomcounting.selMin", 1)[0])
    offset = int(_counts(path, struct, "atomcounting.offset", 1)[0])
    if not 1 <= chosen <= len(icl):
        raise InputError(f"{path}: atomcounting.selMin is {chosen}; allowed is 1 to {len(icl)}, the components fitted. Choose the minimum of the ICL again.")
    name = "atomcounting.estimatedDistributions"
    stored = np.asarray(getattr(struct, "estimatedDistributions", None)).ravel()
    if len(stored) != len(icl):
        raise InputError(f"{path}: {name} holds {len(stored)} mixtures for {len(icl)} values of the ICL; allowed is one for each. Count again.")
    fits = []
    for k, (cell, likelihood) in enumerate(zip(stored, likelihoods, strict=True), start=1):
        own = _struct(path, f"{name}{{{k}}}", np.asarray(cell))
        means, weights = (_array(path, own, f"{name}.{field}", (k,)) for field in ("mu", "PComponents"))
        width = np.sqrt(_array(path, own, f"{name}.Sigma", (1,), above=0)[0])
        order = np.argsort(means)
        fits.append(Components(means[order], weights[order], float(width), np.inf, float(likelihood)))
    return Mixture(n, icl, tuple(fits), chosen, offset)


def write_statstem(path: str | Path, result: ColumnResult, element: str = "1") -> None:
    """Write results so that StatSTEM opens them; `element` names the type of all columns.

    A mixture whose widths depend on the dose is written with their mean square: StatSTEM's stored form knows one width alone.

    Raises
    ------
    InputError
        Where the file cannot be written.
    """
    from scipy.io import savemat

    pixel = float(result.pixel_size)
    coordinates = np.asarray(result.positions) + pixel
    image, model = np.asarray(result.image, float), np.asarray(result.model_image, float)
    types = np.empty((1, 1), object)
    types[0, 0] = element
    column = lambda values: np.asarray(values, float).reshape(-1, 1)
    given = {"obs": image, "dx": pixel, "coordinates": np.pad(coordinates, [(0, 0), (0, 1)], constant_values=1.0), "types": types}
    volumes = column(result.cross_section)
    width = column(result.width)
    content: dict[str, dict[str, Any]] = {
        "input": given,
        "output": {
            "coordinates": coordinates,
            "rho": width,
            "eta": volumes / (2 * np.pi * width**2),
            "zeta": float(result.background),
            "model": model,
            "volumes": volumes,
            "lsq": float(np.sum((model - image) ** 2)),
        },
    }
    if result.library is not None:
        given["library"] = np.column_stack([np.arange(1.0, len(result.library) + 1), result.library])
    if result.mixture is not None:
        fits, chosen = result.mixture.fits, result.mixture.fits[result.mixture.components - 1]
        cells = np.empty((1, len(fits)), object)
        for k, fit in enumerate(fits):
            cells[0, k] = {"mu": column(fit.means), "Sigma": float(fit.weights @ fit.widths**2), "PComponents": fit.weights[None]}
        content["atomcounting"] = {
            "coordinates": coordinates,
            "volumes": volumes,
            "selType": np.zeros((0, 0)),
            "N": float(len(coordinates)),
            "offset": float(result.mixture.offset),
            "ICL": np.asarray(result.mixture.icl)[None],
            "estimatedDistributions": cells,
            "mLogLik": -np.array([[fit.log_likelihood for fit in fits]]),
            "selMin": float(result.mixture.components),
            "estimatedLocations": column(chosen.means),
            "estimatedWidth": chosen.width,
            "estimatedProportions": chosen.weights[None],
            "Counts": column(result.mixture.n),
            "TotalNumberAtoms": float(np.sum(result.mixture.n)),
        }
    if result.n_atoms is not None:
        content["libcounting"] = {
            "coordinates": coordinates,
            "volumes": volumes,
            "library": given.get("library", np.zeros((0, 2))),
            "Counts": column(result.n_atoms),
            "TotalNumberAtoms": float(np.sum(result.n_atoms)),
        }
    with atomic_write(path) as temporary:
        savemat(temporary, content, appendmat=False, do_compression=True, oned_as="column")
