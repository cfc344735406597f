"""A table that settings name: columns of numbers or texts, in CSV or TOML."""

import csv
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .checks import fail, nearest
from .errors import InputError


def read_table(path: Path, key: str, needed: Iterable[str], numbers: Iterable[str] = (), texts: Iterable[str] = ()) -> dict[str, list[Any]]:
    """The columns of a table named by the config's `key`, a row (CSV) or a list's entry (TOML) an image.

    Columns `needed` must be there and hold numbers; `numbers` and `texts` may be there.

    Raises
    ------
    InputError
        No such file, unknown or missing columns, rows of unequal length, text where a number belongs.
    """
    known = [*needed, *numbers, *texts]
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {key} {str(path)!r}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    if path.suffix.lower() == ".toml":
        try:
            columns = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits and brackets in thousands are no TOMLDecodeError
            raise InputError(f"{path} is no valid TOML: {error}.") from None
        for name, values in columns.items():
            if not isinstance(values, list):
                raise fail(f"{path}: {name}", values, "a list with one entry for every image")
    else:
        rows = [row for row in csv.reader(text.splitlines()) if any(cell.strip() for cell in row)]
        names = [cell.strip() for cell in rows[0]] if rows else []
        uneven = [i for i, row in enumerate(rows) if len(row) != len(names)]
        if uneven:
            raise InputError(f"{path}: row {uneven[0] + 1} has {len(rows[uneven[0]])} cells; allowed are {len(names)}, as in the first row.")
        columns = {name: [row[i].strip() for row in rows[1:]] for i, name in enumerate(names)}
    for name in columns:
        if name not in known:
            raise InputError(f"{path}: unknown column {name!r}. {nearest(name, known)}")
    missing = [name for name in needed if not columns.get(name)]
    if missing:
        raise InputError(f"{path} has the columns {list(columns)}; needed is {missing[0]} with a number for every image. Name it in the first row.")
    for name in columns.keys() - set(texts):
        try:
            columns[name] = [float(value) for value in columns[name]]
        except (TypeError, ValueError):
            raise InputError(f"{path}: {name} holds {columns[name]!r}; allowed are numbers.") from None
    return columns
