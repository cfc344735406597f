"""Every device that JAX sees, as one row that work is spread over: columns and tiles. With one device nothing changes.

Devices do not wait for each other: sums over all of them are taken on the host. (Two threads of a busy processor that meet in a collective operation may
wait for ever.)
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SPREAD, WHOLE = PartitionSpec("device"), PartitionSpec()


def filled(n: int, batch: int = 1) -> int:
    """The smallest length of at least n that every device can take an equal part of, in whole batches."""
    part = batch * jax.device_count()
    return -(-n // part) * part


def _row() -> Mesh:
    return Mesh(np.array(jax.devices()), ("device",))


def on_all(array: np.ndarray) -> jax.Array:
    """A host's array on every device, for arguments that are `WHOLE`."""
    return jax.device_put(array, NamedSharding(_row(), WHOLE))


def spread(function: Callable, in_specs) -> Callable:
    """`function` run on every device at once, each with its part of the arguments that are `SPREAD` along their first axis and all of those `WHOLE`."""
    return jax.shard_map(function, mesh=_row(), in_specs=in_specs, out_specs=SPREAD, check_vma=False)
