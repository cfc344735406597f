"""Images of columns and atoms, and what they come from.

Importing this asks JAX for full single precision of matrix products, unless a precision has been set: by default GPUs round their factors to eleven bits, which moves images by 5e-4 of their peak.
"""

import jax

if jax.config.jax_default_matmul_precision is None:
    jax.config.update("jax_default_matmul_precision", "highest")
