"""The processes of one job, on one machine or many, each with devices of its own: they divide the work and meet in sums.

All take the same steps on the same numbers: what is summed up is the same in each, bit by bit, and what decides comes from the first. A process
that works alone meets nobody, and is given back what it gives. Of each process one device takes part in a meeting: several of
one processor could wait for each other for ever.
"""

import contextlib
import io
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .errors import InputError

T = TypeVar("T")
LONGEST_REST = 3600  # seconds that processes which are done wait for the one that writes


def join() -> None:
    """Meet the other processes of this job, before JAX computes anything.

    Slurm, Open MPI and what else JAX knows say how many there are; elsewhere the environment: JAX_COORDINATOR_ADDRESS (host:port of the first, where
    all can reach it), JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0).

    Raises
    ------
    InputError
        When nothing says so.
    """
    told = {}
    for argument, name in {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}.items():
        if name in os.environ:
            try:
                told[argument] = int(os.environ[name])
            except ValueError:
                raise InputError(f"{name} is {os.environ[name]!r}; allowed is a whole number.") from None
    before = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(**told, shutdown_timeout_seconds=LONGEST_REST)
    except ValueError as fault:
        raise InputError(
            f"this is no process of a job of several ({fault}). Start it by srun or mpirun, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        ) from None
    signal.signal(signal.SIGTERM, before)  # JAX takes it for a warning alone


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """The whole of a process's work: processes that are done wait for the others. One that fails ends at once, without JAX's farewell, which would wait for them: they fail at their next meeting."""
    try:
        yield
        jax.distributed.shutdown()
    except BaseException as fault:
        if not hasattr(fault, "exit_code"):  # what has one has told its message
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(getattr(fault, "exit_code", 1))


def is_first() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return jax.process_index() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th of the items, for n processes."""
    return items[jax.process_index() :: jax.process_count()]


def stretch(array: np.ndarray) -> np.ndarray:
    """An n-th of an array in one piece, for n processes."""
    return np.array_split(array, jax.process_count())[jax.process_index()]


def devices_for(n: int) -> int:
    """Devices of each process that n pieces of work can keep busy: all that every process has, where there are enough pieces."""
    of_each = Counter(device.process_index for device in jax.devices())
    return min(*of_each.values(), -(-n // len(of_each)))


def own_part(now: list, devices: int) -> list:
    """What falls to this process's `devices` of pieces of work, at most as many as all processes have such: an equal number, the last piece again where there are fewer."""
    start = devices * jax.process_index()
    return (now + now[-1:] * devices * jax.process_count())[start : start + devices]


@lru_cache
def _meeting():
    """How arrays with a first axis over processes lie, and the sum over it, compiled once for each shape."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    row = Mesh(np.array([first[i] for i in range(jax.process_count())]), ("process",))
    whole = NamedSharding(row, PartitionSpec())
    return NamedSharding(row, PartitionSpec("process")), jax.jit(lambda parts: parts.sum(0, dtype=parts.dtype), out_shardings=whole)


def _sum(own: np.ndarray) -> np.ndarray:
    apart, summed = _meeting()
    try:
        with jax.enable_x64(True):
            return np.asarray(summed(jax.make_array_from_process_local_data(apart, own[None])).addressable_data(0))
    except (jax.errors.JaxRuntimeError, ValueError) as fault:  # the latter from what is compiled already
        raise RuntimeError("another process of this job has ended, or cannot be reached; look for its own message") from fault


def total(tree):
    """Sums over all processes of a pytree of arrays of real numbers, added up in float64."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda own: _sum(np.asarray(own, float)).astype(np.asarray(own).dtype), tree)


def gathered(tree):
    """A pytree of arrays, of the same shapes in each process, with those of all processes one after the other along their first axis, bit by bit."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)

    def leaf(own):
        own = np.ascontiguousarray(own)
        of_all = np.zeros((jax.process_count(), own.nbytes), np.uint8)
        of_all[jax.process_index()] = own.reshape(-1).view(np.uint8)
        return _sum(of_all).view(own.dtype).reshape(-1, *own.shape[1:])

    return jax.tree.map(leaf, tree)


def of_first(tree):
    """The first process's arrays in a pytree, whatever their values and shapes in the others."""
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    file = io.BytesIO()
    if is_first():
        np.savez(file, *leaves)
    size = int(_sum(np.array(len(file.getvalue()))))
    content = _sum(np.frombuffer(file.getvalue().ljust(size, b"\0"), np.uint8))
    with np.load(io.BytesIO(content.tobytes()), allow_pickle=False) as saved:
        return structure.unflatten([saved[f"arr_{i}"] for i in range(len(leaves))])
