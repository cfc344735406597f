"""Files are whole or not there, and a damaged one is never misread."""

import errno
import multiprocessing
import os
import resource
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprob import storage
from depthprob.errors import InputError

ARRAYS = {"blocks": np.arange(60.0).reshape(3, 4, 5) / 7, "element": np.array("Au"), "tilt": np.array([0.0, 1.5]), "empty": np.zeros((0, 2))}


@pytest.fixture(scope="module", params=[storage.save_arrays, storage.save_checkpoint])
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("storage") / "arrays.npz"
    request.param(path, **ARRAYS)
    return path


def same(read):
    return read.keys() == ARRAYS.keys() and all(np.array_equal(read[k], v) and read[k].dtype == v.dtype for k, v in ARRAYS.items())


def test_arrays_read_back_the_same(file):
    assert same(storage.load_arrays(file))
    assert [p.name for p in file.parent.iterdir()] == ["arrays.npz"]


def test_no_altered_byte_is_misread(file):
    """Every byte of the file in turn: read as it was (dates, padding) or refused."""
    whole, damaged = file.read_bytes(), file.with_name("damaged.npz")
    refused = 0
    for k in range(len(whole)):
        changed = bytearray(whole)
        changed[k] ^= 1 << (k % 8)
        damaged.write_bytes(changed)
        try:
            assert same(storage.load_arrays(damaged)), k
        except InputError:
            refused += 1
    damaged.unlink()
    assert refused > 0.5 * len(whole)


def test_no_truncated_file_is_misread(file):
    whole, damaged = file.read_bytes(), file.with_name("damaged.npz")
    for k in range(0, len(whole), 7):
        damaged.write_bytes(whole[:k])
        with pytest.raises(InputError, match="cannot read"):
            storage.load_arrays(damaged)
    assert storage.load_checkpoint(damaged) == {}
    damaged.unlink()


def claiming(path, shape, content=b"", descr="<f8", length=None):
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("stack.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        member.write(content)
    return path


@pytest.mark.parametrize(
    ("shape", "content", "descr", "said"),
    [((10, 10**7, 10**7), b"", "<f8", "declares 8000000000000000 bytes"), ((2, 2), bytes(24), "<f8", "holds 24"), ((2, 2), bytes(40), "<f8", "holds 40"), ((2,), bytes(16), "|O", "Python objects")],
)
def test_an_array_that_declares_what_the_archive_does_not_hold_is_refused(tmp_path, shape, content, descr, said):
    with pytest.raises(InputError, match=said):
        storage.load_arrays(claiming(tmp_path / "a.npz", shape, content, descr))


def test_a_small_archive_that_unpacks_to_more_than_the_memory_is_refused_unopened(tmp_path, monkeypatch):
    path = claiming(tmp_path / "a.npz", (2**21,), bytes(2**24))
    assert path.stat().st_size < 2**15
    monkeypatch.setattr(storage, "memory_bytes", lambda: 2.0**23)
    monkeypatch.setattr(np.lib.format, "read_array", None)
    with pytest.raises(InputError, match=r"needs 0\.0 GiB of memory"):
        storage.load_arrays(path)


@pytest.mark.parametrize("write", [storage.save_arrays, storage.save_checkpoint])
def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path, write):
    write(tmp_path / "a.npz", **ARRAYS)
    _, hard = soft_hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        with pytest.raises(InputError, match=r"cannot write .*a\.npz.*too large.*Make room"):
            write(tmp_path / "a.npz", noise=np.random.default_rng(0).random(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)
    assert same(storage.load_arrays(tmp_path / "a.npz")) and len(list(tmp_path.iterdir())) == 1


def test_faults_of_ours_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), storage.atomic_write(tmp_path / "a.txt"):
        (tmp_path / "nowhere" / "b.txt").write_text("")
    with pytest.raises(OSError, match="Broken pipe"), storage.disk_refusals(tmp_path):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _write_many(path, value):
    for _ in range(15):
        storage.save_arrays(path, a=np.full(5000, value), b=np.full(3, value))


def test_two_writers_of_one_file_leave_one_of_theirs_whole_at_every_moment(tmp_path):
    path = tmp_path / "a.npz"
    storage.save_arrays(path, a=np.zeros(5000), b=np.zeros(3))
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(path, value)) for value in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    reads = []
    while any(writer.is_alive() for writer in writers) or not reads:
        read = storage.load_arrays(path)
        values = np.unique(np.concatenate([read["a"], read["b"]]))
        assert len(values) == 1
        reads.append(values[0])
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert set(reads) - {0.0} and len(list(tmp_path.iterdir())) == 1


def test_old_results_never_stand_beside_new_ones(tmp_path, monkeypatch):
    """The move into an existing folder, cut off after every one of its steps."""
    names = ["columns.csv", "posterior.nc", "provenance.json", "report.html"]
    for steps in range(9):
        folder = tmp_path / f"out{steps}"
        folder.mkdir()
        for name in [*names, "notes.txt"]:
            (folder / name).write_text("old")
        left = iter(range(steps))

        def step(does, *arguments, left=left, **options):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return does(*arguments, **options)

        unlink, replace = storage.Path.unlink, os.replace
        with monkeypatch.context() as patch:
            patch.setattr(storage.Path, "unlink", lambda self, missing_ok=False, unlink=unlink, step=step: step(unlink, self, missing_ok=missing_ok))
            patch.setattr(os, "replace", lambda a, b, replace=replace, step=step: step(replace, a, b))
            try:
                with storage.atomic_folder(folder) as temporary:
                    for name in names:
                        (temporary / name).write_text("new")
                finished = True
            except KeyboardInterrupt:
                finished = False
        there = {p.name: p.read_text() for p in folder.iterdir()}
        assert finished == (steps == 8) and there.pop("notes.txt") == "old"
        assert len(set(there.values())) <= 1
        if "provenance.json" in there:
            assert sorted(there) == names


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(storage.Path, "mkdir", refuse)
    for path in (tmp_path, tmp_path / "new"):
        with pytest.raises(InputError, match="permission denied"), storage.atomic_folder(path):
            raise AssertionError("the work has begun")


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_an_archive_altered_anywhere_is_read_as_it_was_or_refused(file, data):
    whole = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    damaged = file.with_name("damaged.npz")
    damaged.write_bytes(whole)
    try:
        read = storage.load_arrays(damaged)
    except InputError:
        return
    finally:
        damaged.unlink()
    # another name is another array, which no reader of ours asks for
    assert all(np.array_equal(value, ARRAYS[name]) for name, value in read.items() if name in ARRAYS)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), storage.atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        1 / 0  # noqa: B018
    assert (tmp_path / "a.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), storage.atomic_folder(tmp_path / "out") as temporary:
        (temporary / "columns.csv").write_text("half")
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_keeps_its_other_files(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "columns.csv").write_text("old")
    with storage.atomic_folder(tmp_path / "out") as temporary:
        (temporary / "columns.csv").write_text("new")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "columns.csv").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
