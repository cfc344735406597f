"""Every device that JAX sees, as one row that work is spread over: columns, tiles, chains. With one device nothing changes."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

SPREAD, WHOLE = PartitionSpec("device"), PartitionSpec()


def filled(n: int, batch: int = 1) -> int:
    """The smallest length of at least n that every device can take an equal part of, in whole batches."""
    part = batch * jax.device_count()
    return -(-n // part) * part


def spread(function: Callable, in_specs, out_specs=SPREAD) -> Callable:
    """`function` run on every device at once, each with its part of the arguments that are `SPREAD` along their first axis and all of those `WHOLE`."""
    return partial(jax.shard_map, mesh=Mesh(np.array(jax.devices()), ("device",)), in_specs=in_specs, out_specs=out_specs, check_vma=False)(function)
