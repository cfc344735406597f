"""Files in and out: tables, structures and JSON, written under a temporary name and renamed, so that a file that exists is whole."""

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, Real

from .errors import InputError
from .storage import PARSER_FAULTS, atomic_write, naming
from .table import read_table

COLUMNS = (
    "column",
    "x_A",
    "y_A",
    "cross_section_A2",
    "cross_section_sd_A2",
    "n_atoms",
    "n_atoms_probability",
    "gaussian_depth_A",
    "gaussian_depth_sd_A",
    "depth_A",
    "depth_sd_A",
    "depth_q05_A",
    "depth_q95_A",
    "crlb_A",
    "goodness_of_fit",
)
STRUCTURES = {".xyz": "extxyz", ".extxyz": "extxyz", ".cif": "cif", ".vasp": "vasp", ".poscar": "vasp"}


def _text(value: Any) -> Any:
    """Cell of a table: whole numbers as they are, others to ten digits."""
    if isinstance(value, (float, np.floating)):
        return f"{value:.10g}"
    return value


def _write_csv(path: str | Path, rows: Mapping[str, Any]) -> None:
    columns = {name: np.asarray(values) for name, values in rows.items()}
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow([_text(value) for value in row])


def write_columns_csv(path: str | Path, rows: Mapping[str, Any]) -> None:
    """Write the table of columns, in the order of `COLUMNS`, further columns after them.

    Parameters
    ----------
    rows
        An array (column,) for every name in `COLUMNS`; `column` is counted from 0 when absent.
    """
    rows = dict(rows)
    rows.setdefault("column", np.arange(len(next(iter(rows.values())))))
    missing = [name for name in COLUMNS if name not in rows]
    if missing:
        raise ValueError(f"columns.csv lacks {missing}; every one of {COLUMNS} is needed.")
    order = [*COLUMNS, *(name for name in rows if name not in COLUMNS)]
    _write_csv(path, {name: rows[name] for name in order})


DISTORTIONS = [f"distortion_{element}{end}" for end in ("", "_sd") for element in ("xx", "xy", "yx", "yy")]  # in drift.csv, where they are free


def read_drift_csv(path: Path, defocus_A: Real[np.ndarray, " focus"], shape: tuple[int, int]) -> Real[np.ndarray, "focus 2"]:
    """Displacement (dx, dy) [pixel] of the object in every image, mean zero, from a table as `write_drift_csv` writes it.

    Columns image (counted from 0), dx_px and dy_px, rows in any order; a defocus_A must be the series' own, an sd_px and distortions are not read.

    Raises
    ------
    InputError
        No such file or no such table; not one row for each image; foci unlike the series'; shifts that are not finite or carry the object out of the field.
    """
    names = ("image", "dx_px", "dy_px")
    table = {name: np.asarray(values) for name, values in read_table(path, "focal_series.drift_file", names, ("defocus_A", "sd_px", *DISTORTIONS)).items()}
    count, order = len(defocus_A), np.argsort(table["image"])
    if any(len(values) != count for values in table.values()) or not np.array_equal(table["image"][order], np.arange(count)):
        raise InputError(f"{path} numbers its images {table['image'].tolist()}; the series has {count}, and allowed is one row for each, numbered from 0 to {count - 1}.")
    table = {name: values[order] for name, values in table.items()}
    unlike = ~np.isclose(table.get("defocus_A", defocus_A), defocus_A, atol=1e-3)
    if unlike.any():
        i = int(unlike.argmax())
        raise InputError(f"{path} has image {i} at defocus {table['defocus_A'][i]:g} Å, the config at {defocus_A[i]:g} Å. Give the shifts of this series, or leave the column out.")
    shifts = np.stack([table["dx_px"], table["dy_px"]], 1)
    shifts = shifts - shifts.mean(0)
    lost = ~(abs(shifts) < np.array(shape)[::-1] / 2).all(1)
    if lost.any():
        i = int(lost.argmax())
        raise InputError(
            f"{path} has the object of image {i} displaced by {shifts[i].tolist()} px from the series' mean; allowed is less than half the field of {shape[1]} x {shape[0]} px. "
            "Give pixels of this series."
        )
    return shifts


def write_drift_csv(
    path: str | Path,
    defocus_A: Real[np.ndarray, " focus"],
    displacement_px: Real[np.ndarray, "focus 2"],
    sd_px: Real[np.ndarray, " focus"],
    distortion: Real[np.ndarray, "focus 2 2"] | None = None,
    distortion_sd: Real[np.ndarray, "focus 2 2"] | None = None,
    images: Integer[np.ndarray, " focus"] | None = None,
) -> None:
    """Write the displacement (dx, dy) [pixel] of the object in every image and its standard deviation, and the distortion of each where there is one; `images` numbers them within the series, from 0, where some are left out."""
    displacement_px = np.asarray(displacement_px)
    sd_px = np.broadcast_to(np.asarray(sd_px, float), (len(displacement_px),))
    columns = {
        "image": np.arange(len(displacement_px)) if images is None else images,
        "defocus_A": np.asarray(defocus_A, float),
        "dx_px": displacement_px[:, 0],
        "dy_px": displacement_px[:, 1],
        "sd_px": sd_px,
    }
    if distortion is not None and distortion_sd is not None:
        both = np.concatenate([np.reshape(a, (-1, 4)) for a in (distortion, distortion_sd)], 1)
        columns |= dict(zip(DISTORTIONS, both.T, strict=True))
    _write_csv(path, columns)


def write_xyz(
    path: str | Path,
    element: str | Sequence[str],
    positions: Real[np.ndarray, "atom 3"],
    position_sd: Real[np.ndarray, "atom 3"],
    site_probability: Real[np.ndarray, " atom"],
    column: Any,
    coordination: Any,
    gauge: str,
) -> None:
    """Write atoms as extended XYZ [Å], in the frame of columns.csv, with their numbers of nearest neighbours; `gauge` says where depth zero is."""
    positions = np.asarray(positions, float)
    elements = [element] * len(positions) if isinstance(element, str) else list(element)
    properties = "species:S:1:pos:R:3:position_sd:R:3:site_probability:R:1:column:I:1:coordination:I:1"
    label = " ".join(gauge.replace('"', "'").split())
    atoms = zip(
        elements,
        positions,
        np.asarray(position_sd, float),
        np.asarray(site_probability, float),
        np.asarray(column, int),
        np.asarray(coordination, int),
        strict=True,
    )
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(
            f'{len(positions)}\nProperties={properties} pbc="F F F" unit=angstrom gauge="{label}"\n'
        )
        for symbol, position, sd, probability, index, neighbours in atoms:
            numbers = " ".join(f"{value:.6f}" for value in (*position, *sd, probability))
            file.write(f"{symbol} {numbers} {index} {neighbours}\n")


def _plain(value: Any) -> Any:
    """Python's own types for JSON; what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str):
        return value
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _plain(np.asarray(value).tolist())
    return str(value)


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write JSON; arrays become lists, infinity and NaN become null."""
    with atomic_write(path) as temporary:
        text = json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_atoms(path: Path):
    """Atoms of a structure file as `ase.Atoms`, by the format that its name tells.

    Only formats of plain text are read: others of ASE's (traj, bundletrajectory, db, json, ...) may run what a file holds, or read other files.

    Raises
    ------
    InputError
        For another name, or a file that ASE cannot read.
    """
    import ase.io

    name = path.name.lower()
    kind = STRUCTURES.get(path.suffix.lower()) or ("vasp" if name.startswith(("poscar", "contcar")) else None)
    if kind is None:
        raise InputError(f"cannot read {str(path)!r} as a structure: allowed are {', '.join(STRUCTURES)}, POSCAR and CONTCAR. Give an extended XYZ or CIF file.")
    with naming(path, *PARSER_FAULTS, ase.io.ParseError, StopIteration, MemoryError):
        _check_atoms(path.read_text(encoding="utf-8", errors="replace").splitlines(), kind)
        atoms = ase.io.read(path, format=kind, do_not_split_by_at_sign=True)
        if not len(atoms):
            raise ValueError("it holds no atoms")
        return atoms


def _check_atoms(lines: Sequence[str], kind: str) -> None:
    """Refuse a file that declares more atoms, or columns, than it has lines or characters for: ASE would make room for them, or look for them one by one."""
    declared = 0
    if kind == "extxyz":  # frames of a number, a comment, atoms, and perhaps vectors
        at, longest = 0, max(map(len, lines), default=0)
        while at < len(lines) and lines[at].strip():
            declared = int(lines[at])
            properties = re.search(r'properties="?([^\s"]*)', "".join(lines[at + 1 : at + 2]), re.IGNORECASE)
            columns = sum(int(n) for n in properties[1].split(":")[2::3]) if properties else 0
            if columns > longest:
                raise ValueError(f"it declares {columns} columns in lines of {longest} characters")
            at += declared + 2
            if not 0 <= declared <= len(lines):
                break
            while at < len(lines) and lines[at].startswith("VEC"):
                at += 1
    elif kind == "vasp":  # numbers of each element in the sixth line, or in the seventh
        counts = next((line.split() for line in lines[5:7] if line.strip()[:1].isdigit()), [])
        declared = sum(int(n) for n in counts)
    if not 0 <= declared <= len(lines):
        raise ValueError(f"it declares {declared} atoms in {len(lines)} lines")
