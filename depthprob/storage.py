"""Files that are whole or not there: written under another name and renamed; arrays of an .npz checked against what the archive holds."""

import contextlib
import errno
import hashlib
import math
import os
import secrets
import shutil
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from .errors import InputError

# what a disk or a folder says no with; any other OSError while writing is a fault of ours
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST)
HDF5_OVERHEAD = 2**20  # bytes that a file of a few dozen arrays holds beside their own, generously
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, OSError, NotImplementedError, RuntimeError, struct.error, SyntaxError)

# what parsers of other packages raise on damaged files, in whatever line meets the damage
PARSER_FAULTS = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError, TypeError, ValueError, struct.error, zlib.error)


# Writing -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk_refusals(path: Path) -> Iterator[None]:
    """Say in one message why the disk does not take a file."""
    try:
        yield
    except OSError as fault:
        if fault.errno not in REFUSALS:
            raise
        raise InputError(f"cannot write {str(path)!r}: {os.strerror(fault.errno).lower()}. Make room there, or name another place.") from fault


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}. Make it first.")


def _this_computer() -> str:
    """Eight digits for this computer, and this container of it: process numbers mean something within."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _runs(process: int) -> bool:
    if os.name != "posix":  # elsewhere nobody can be asked without harm
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _temporary(folder: Path, path: Path) -> Path:
    """Name in a folder for what shall become `path`, after removing what killed processes of this computer left there under such names."""
    start, end = f".{path.stem}.{_this_computer()}-", f".partial{path.suffix}"
    for left in folder.iterdir() if folder.is_dir() else ():
        process = left.name.removeprefix(start).partition("-")[0]
        if left.name.startswith(start) and left.name.endswith(end) and process.isdecimal() and not _runs(int(process)):
            _remove(left)
    return folder / f"{start}{os.getpid()}-{secrets.token_hex(4)}{end}"


def _remove(path: Path) -> None:
    """A file or folder, if it is there and may be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def atomic_write(path: str | Path, size: int = 0) -> Iterator[Path]:
    """Temporary path beside `path` to write to; renamed to `path` on success, removed on failure, and by the next writer where a kill left it.

    The disk must first show room for `size` bytes: HDF5 ends the process with a segmentation fault where a write fails halfway.

    Raises
    ------
    InputError
        The folder does not exist, `path` is a folder, or the disk is full or refuses.
    """
    path = Path(path)
    _check_parent(path)
    if path.is_dir():
        raise InputError(f"cannot write {str(path)!r}: it is a folder. Give a file name.")
    with disk_refusals(path):
        temporary = _temporary(path.parent, path)
    try:
        with disk_refusals(path):
            if size and hasattr(os, "posix_fallocate"):
                with temporary.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path, last: str = "provenance.json") -> Iterator[Path]:
    """Temporary folder to fill; moved into place once whole, removed on failure, and by the next run where a kill left it.

    Files of an existing folder stay, except those of the same name. All of these go before the first new one comes, and the file named `last`
    goes first and comes last: old and new never stand side by side, and where `last` is, the others are.

    Raises
    ------
    InputError
        `path` is a file, it or the folder around it cannot be written to, or the disk is full.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"cannot write into {str(path)!r}: it is a file. Give the name of a folder.")
    _check_parent(path)
    path = path.resolve()
    with disk_refusals(path):
        beside = _temporary(path.parent, path)
        temporary = _temporary(path, path) if path.exists() else beside  # within a folder that may be another disk's
    try:
        with disk_refusals(path):
            temporary.mkdir()
        yield temporary
        with disk_refusals(path):
            if temporary.parent == path:
                names = sorted((file.name for file in temporary.iterdir()), key=lambda name: name == last)
                for name in reversed(names):
                    (path / name).unlink(missing_ok=True)
                for name in names:
                    os.replace(temporary / name, path / name)
            else:
                os.replace(temporary, path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def save_arrays(path: str | Path, write: Callable = np.savez_compressed, **arrays) -> None:
    """Write an .npz, whole or not at all, in a folder that is made if need be."""
    path = Path(path)
    with disk_refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        write(temporary, **arrays)


def save_checkpoint(path: str | Path, **arrays) -> None:
    """`save_arrays` without the time that compression takes."""
    save_arrays(path, np.savez, **arrays)


# Reading -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming(path: Path, *faults: type[Exception]) -> Iterator[None]:
    """Turn the faults a library reports for a damaged file into one readable message."""
    try:
        yield
    except InputError:
        raise
    except faults as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"cannot read {str(path)!r}: {reason}. The file is truncated, corrupt or of another format than its "
            "name says; copy or export it again."
        ) from error


def memory_bytes() -> float:
    """Physical memory of this computer, infinite where the system does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def read_array(path: Path, archive: zipfile.ZipFile, name: str, check: Callable[[Sequence[int], np.dtype], None] = lambda shape, dtype: None) -> np.ndarray:
    """One array of an open .npz; nothing is allocated before its header has been compared with the archive and the memory.

    `check` sees shape and type first. The archive's CRC guards header and content.
    """
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise InputError(f"{path}: {name} is of npy version {version}; allowed are 1.0 and 2.0.")
        shape, _, dtype = readers[version](file)
        check(shape, dtype)
        if dtype.hasobject:
            raise InputError(f"{path}: {name} holds Python objects, which are never loaded; allowed are numbers and text.")
        declared, held = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
        if declared != held:
            raise InputError(f"{path}: {name} declares {declared} bytes, {tuple(shape)} {dtype}, but the archive holds {held}. Save it again.")
        if declared > memory_bytes():
            raise InputError(f"{path}: {name} needs {declared / 2**30:.1f} GiB of memory, this computer has {memory_bytes() / 2**30:.1f}.")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz.

    Raises
    ------
    InputError
        Missing, truncated, altered, or declaring more than it holds.
    """
    path = Path(path)
    with naming(path, *DAMAGE), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        names = [n.removesuffix(".npy") for n in archive.namelist()]
        file.seek(-22, os.SEEK_END)
        mark, *_, many, _, _, _ = struct.unpack("<4s4H2LH", file.read())  # the end record; zipfile itself does not count
        if mark != b"PK\5\6" or many != len(names):
            raise zipfile.BadZipFile(f"its list of {len(names)} arrays is damaged")
        return {name: read_array(path, archive, name) for name in names}


def load_checkpoint(path: str | Path | None) -> dict[str, np.ndarray]:
    """Arrays of a checkpoint; none where there is no file, or a damaged one, which the next one replaces."""
    try:
        return load_arrays(path) if path and Path(path).exists() else {}
    except InputError:
        return {}
