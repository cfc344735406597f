"""kill -9 at any moment, and two at once: nothing half-written is taken for whole, and a rerun ends where an undisturbed run ends.

The work is done by this file run as a program, `python test_accidents.py WORK FOLDER`, which the tests kill.
"""

import contextlib
import os
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from depthprob import storage

LINES = 200_000  # of a file, so that writing takes its time
FILES = ("columns.csv", "posterior.nc", "provenance.json", "report.html")


# What is killed ----------------------------------------------------------------------------------------------


def build_gram(folder):
    """The Gram matrix of tilted columns, whose phonons are drawn; kept and checkpointed in the folder."""
    os.environ["DEPTHPROB_CACHE"] = str(folder)
    from depthprob.physics.detector import AnnularDetector
    from depthprob.physics.optics import Microscope
    from depthprob.physics.specimen import Column
    from depthprob.reconstruction.libraries import gram_of

    column = Column("C", 2, 2.5, 0.5, (5.0, 0.0))
    gram = gram_of(column, Microscope(100e3, 15.0), AnnularDetector(30.0, 60.0), 128, 0, "frozen_phonon", "lobato", None, lambda items, **_: items)
    return [gram.blocks, np.array([gram.reach, gram.aperture])]


def simulate(folder):
    """Gram matrices of two atoms, mean of many configurations; the sums are kept in the folder."""
    from depthprob.physics.detector import AnnularDetector
    from depthprob.physics.optics import Microscope
    from depthprob.physics.particle import simulate_particle

    atoms = np.array([[1.0, 2.0, 0.0], [1.0, 2.0, 2.5]])
    checkpoint = folder / "sums.npz"
    return simulate_particle(atoms, "C", 0.5, (5.0, 5.0), Microscope(100e3, 15.0), AnnularDetector(30.0, 60.0), 40, 1, 0.15, checkpoint=checkpoint)


def sample(folder):
    """Draws of a bent normal by the package's NUTS, with its state in the folder."""
    import jax
    import jax.numpy as jnp

    from depthprob.inference import sampling

    sampling.log_density = lambda z, target: -jnp.sum((z - 0.1 * jnp.roll(z, 1) ** 2) ** 2) / 2
    target = sampling.Whitened(None, jnp.zeros(3), jnp.eye(3))
    z, statistics, _ = sampling.nuts(target, jax.random.key(1), 300, 2, 20, folder / "state.npz")
    return [z, *statistics.values()]


def write_folders(folder):
    """Results into one folder, again and again, each time other ones."""
    for generation in count(1):
        with storage.atomic_folder(folder / "out") as temporary:
            for name in FILES:
                (temporary / name).write_text(f"{generation}\n" * LINES)


def write_files(folder):
    """One file of arrays, again and again, each time others."""
    noise = np.random.default_rng(0).random(50_000)
    for generation in count(1):
        storage.save_arrays(folder / "cache" / "library.npz", a=generation + noise, b=np.full(3, generation))


@contextlib.contextmanager
def at_work(*command):
    """A program at work, killed at the end; it must not have ended before."""
    running = subprocess.Popen([sys.executable, *command])
    try:
        yield running
        assert running.poll() is None, "it ended before it could be killed"
    finally:
        running.kill()
        running.wait(timeout=60)


def wait_for(there, running):
    while not there():
        assert running.poll() is None, "it ended before it left anything"
        time.sleep(0.002)


def wait_for_change(path, running):
    stamp = lambda: path.stat().st_ino if path.exists() else None
    before = stamp()
    wait_for(lambda: stamp() not in (None, before), running)


# What is left ------------------------------------------------------------------------------------------------


def test_a_folder_of_results_is_old_or_new_or_without_its_last_file_whenever_its_writer_is_killed(tmp_path):
    rng, left = np.random.default_rng(0), 0
    (tmp_path / "out").mkdir()
    for _ in range(8):
        with at_work(__file__, "write_folders", tmp_path) as running:
            wait_for_change(tmp_path / "out" / FILES[-1], running)
            time.sleep(rng.uniform(0, 0.02))
        there = {p.name: p.read_text() for p in (tmp_path / "out").iterdir() if p.is_file()}
        assert len(set(there.values())) <= 1 and set(there) <= set(FILES)
        assert all(text.count("\n") == LINES for text in there.values())
        assert "provenance.json" not in there or len(there) == len(FILES)
        left += len(list((tmp_path / "out").glob("*.partial")))
    assert left > 0  # some kills fell into the writing
    with storage.atomic_folder(tmp_path / "out") as temporary:
        for name in FILES:
            (temporary / name).write_text("last")
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == dict.fromkeys(FILES, "last")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_is_whole_whenever_its_writer_is_killed_and_the_next_one_clears_up(tmp_path):
    rng, path, left = np.random.default_rng(1), tmp_path / "cache" / "library.npz", 0
    for _ in range(8):
        with at_work(__file__, "write_files", tmp_path) as running:
            wait_for_change(path, running)
            time.sleep(rng.uniform(0, 0.02))
        left += len(list(path.parent.iterdir())) - 1
        read = storage.load_arrays(path)
        assert len(read["a"]) == 50_000 and np.all(np.floor(read["a"]) == read["b"][0])
    assert left > 0  # some kills fell into the writing
    storage.save_arrays(path, a=np.zeros(2))
    assert list(path.parent.iterdir()) == [path]


def test_what_a_living_process_writes_is_not_cleared_up(tmp_path):
    with storage.atomic_write(tmp_path / "a.txt") as first:
        first.write_text("first")
        with storage.atomic_write(tmp_path / "a.txt") as second:
            second.write_text("second")
        assert (tmp_path / "a.txt").read_text() == "second"
    assert (tmp_path / "a.txt").read_text() == "first"


@pytest.mark.parametrize(("work", "checkpoint"), [(sample, "state.npz"), pytest.param(simulate, "sums.npz", marks=pytest.mark.slow), pytest.param(build_gram, "*.partial.npz", marks=pytest.mark.slow)])
def test_killed_work_goes_on_and_ends_bit_by_bit_where_undisturbed_work_ends(tmp_path, monkeypatch, work, checkpoint):
    from depthprob.inference import sampling

    monkeypatch.setattr(sampling, "log_density", sampling.log_density)  # what the work changes is put back
    monkeypatch.setenv("DEPTHPROB_CACHE", "")
    sampling._kernel.cache_clear()
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    with at_work(__file__, work.__name__, tmp_path / "killed") as running:
        wait_for(lambda: [p for p in (tmp_path / "killed").glob(checkpoint) if not p.name.startswith(".")], running)
        time.sleep(0.03)
    whole = work(tmp_path / "whole")
    again = work(tmp_path / "killed")
    sampling._kernel.cache_clear()
    assert len(whole) == len(again) > 1
    for a, b in zip(whole, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_two_that_build_one_library_at_once_do_no_harm_to_each_other(tmp_path):
    for name in ("alone", "both"):
        (tmp_path / name).mkdir()
    both = [subprocess.Popen([sys.executable, __file__, "build_gram", tmp_path / "both"]) for _ in range(2)]
    assert [running.wait(timeout=600) for running in both] == [0, 0]
    whole = build_gram(tmp_path / "alone")
    (path,) = (tmp_path / "both").iterdir()
    assert path.name == next((tmp_path / "alone").iterdir()).name
    np.testing.assert_array_equal(storage.load_arrays(path)["blocks"], whole[0])


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
