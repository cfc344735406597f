"""What is recorded of the exit wave."""

import equinox as eqx
from jaxtyping import ScalarLike


class AnnularDetector(eqx.Module):
    """Annulus of unit sensitivity between two angles [mrad]."""

    inner: ScalarLike
    outer: ScalarLike
