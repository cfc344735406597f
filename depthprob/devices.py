"""Every device of this process, as one row that work is spread over: columns, tiles, chains and configurations. With one device nothing changes.

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
    part = batch * jax.local_device_count()
    return -(-n // part) * part


def rounded(n: int, batch: int = 1) -> int:
    """As `filled`, one of four lengths an octave: what is compiled for some serves a few more."""
    batches = -(-n // batch)
    step = 1 << max(0, batches.bit_length() - 3)
    return filled(-(-batches // step) * step * batch, batch)


def _row(most: int | None = None) -> Mesh:
    return Mesh(np.array(jax.local_devices()[:most]), ("device",))


def on_all(tree, most: int | None = None):
    """A host's arrays on every device, or the first `most`, for arguments that are `WHOLE`."""
    return jax.device_put(tree, NamedSharding(_row(most), WHOLE))


def spread(function: Callable, in_specs, most: int | None = None) -> Callable:
    """`function` run on every device at once, or the first `most`, each with its part of the arguments that are `SPREAD` along their first axis and all of those `WHOLE`."""
    return jax.shard_map(function, mesh=_row(most), in_specs=in_specs, out_specs=SPREAD, check_vma=False)
