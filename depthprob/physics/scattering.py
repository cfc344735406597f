"""Electron scattering factors of neutral atoms, from published tables."""

import functools
import json
from importlib import resources

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import k0, k1

from ..errors import InputError

POTENTIAL_PER_SCATTERING_FACTOR = 47.87801  # h^2 / (2 pi m e) [V Å^2]


@functools.cache
def _table(parametrization: str) -> dict[str, list]:
    return json.loads(
        resources.files("depthprob.data").joinpath(f"{parametrization}.json").read_text()
    )


def parameters(element: str, parametrization: str = "lobato") -> np.ndarray:
    """Published coefficients of one element: lobato (2, 5) rows a [Å], b [Å^2]; kirkland (4, 3) rows a, b, c, d.

    Raises
    ------
    InputError
        For a table that is not packaged, or an element outside it.
    """
    if parametrization not in ("lobato", "kirkland"):
        raise InputError(f"parametrization is {parametrization!r}; give 'lobato' or 'kirkland'.")
    table = _table(parametrization)
    if element not in table:
        raise InputError(
            f"element is {element!r}; the {parametrization} table holds {', '.join(table)}."
        )
    return np.array(table[element])


def scattering_factor(
    element: str, q: Float[Array, "..."], parametrization: str = "lobato"
) -> Float[Array, "..."]:
    """Electron scattering factor f_e [Å] at frequency q [1/Å] (first Born approximation, rest mass).

    Lobato and Van Dyck, Acta Cryst. A70, 636 (2014), eq. 16: sum a (2 + b q^2) / (1 + b q^2)^2;
    Kirkland, Advanced Computing in Electron Microscopy, 2nd ed. (2010), eq. C.15: sum a / (q^2 + b) + c exp(-d q^2).
    """
    q2 = jnp.asarray(q)[..., None] ** 2
    if parametrization == "lobato":
        a, b = parameters(element, "lobato")
        return (a * (2 + b * q2) / (1 + b * q2) ** 2).sum(-1)
    a, b, c, d = parameters(element, parametrization)
    return (a / (q2 + b) + c * jnp.exp(-d * q2)).sum(-1)


def projected_potential(element: str, r: np.ndarray, parametrization: str = "lobato") -> np.ndarray:
    """Potential of an atom projected along the beam [V Å] at radius r > 0 [Å].

    Two-dimensional Fourier transform of `scattering_factor` in closed form; Kirkland (2010), eq. C.20, and its like for Lobato's terms.
    """
    r = np.asarray(r, float)[..., None]
    if parametrization == "lobato":
        a, b = parameters(element, "lobato")
        x = 2 * np.pi * r / np.sqrt(b)
        total = (2 * np.pi * a / b * (k0(x) + x / 2 * k1(x))).sum(-1)
    else:
        a, b, c, d = parameters(element, parametrization)
        total = (2 * np.pi * a * k0(2 * np.pi * r * np.sqrt(b)) + np.pi * c / d * np.exp(-((np.pi * r) ** 2) / d)).sum(-1)
    return POTENTIAL_PER_SCATTERING_FACTOR * total


def panels(edges, counts) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights, panel by panel."""
    nodes, weights = [], []
    for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True):
        x, w = np.polynomial.legendre.leggauss(int(n))
        nodes.append((high + low + (high - low) * x) / 2)
        weights.append(w * (high - low) / 2)
    return np.concatenate(nodes), np.concatenate(weights)
