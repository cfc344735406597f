"""A second derivation for tests: waves followed down a column, diffuse electrons straight to the detector, derivatives by JAX.

A thermally averaged column has the symmetry of a cylinder, so waves of different angular momentum l scatter separately and each is a
function of one radius. Thermal motion is that of independent atoms (Einstein): the mean wave meets the mean transmission of each
atom, and what an atom scatters out of the mean wave goes straight to the detector. The second step is an approximation, since
diffuse electrons may meet further atoms; tests compare the whole with frozen phonons.

Everything is float64 and complex128: bounds on single atoms rest on differences between almost equal images. Run under
`jax.enable_x64(True)`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from depthprob.physics.detector import AnnularDetector
from depthprob.physics.electron import wavelength
from depthprob.physics.gram import Modes, bessel, radial_modes, require_full_symmetry
from depthprob.physics.scattering import panels
from depthprob.physics.specimen import Column
from depthprob.physics.thermal import thermal_scattering


class RadialColumn(NamedTuple):
    """What scattering by a cylinder-symmetric column needs, for `radial_gram`. Waves carry the root of their quadrature weight.

    Attributes
    ----------
    incident : (l, p, k)
        Laguerre-Gauss modes in the plane z = 0.
    hankel : (l, r, k)
        Orthogonal transform between the radial grids.
    scattering : (r,)
        Thermal mean of exp(i sigma V) - 1.
    diffuse : (l, r, r)
        What the detector records of an atom's diffuse scattering, as a quadratic form of the wave upon it.
    detected : (k,)
        Sensitivity.
    propagation : (k,)
        pi wavelength k^2 [1/Å].
    """

    incident: jax.Array
    hankel: jax.Array
    scattering: jax.Array
    diffuse: jax.Array
    detected: jax.Array
    propagation: jax.Array


class _Grids(NamedTuple):
    """What `prepare_radial` shares between detectors: nodes [1/Å], [Å], operators as in `RadialColumn`, kernels (m, r, r) of an atom's
    diffuse scattering by angular momentum transfer, and transforms (l + m, r, k)."""

    k: np.ndarray
    incident: np.ndarray
    scattering: np.ndarray
    kernels: list
    transforms: np.ndarray


def prepare_radial(
    column: Column,
    energy: float,
    aperture: float,
    detector: AnnularDetector,
    modes: Modes,
    parametrization: str = "lobato",
    range_of_potential: float = 4.0,
    thermal_nodes: int = 8,
    oversampling: float = 1.15,
) -> RadialColumn:
    """Grids and operators of a column, for any depths of its atoms within half its length.

    Parameters
    ----------
    aperture : float
        Largest incident frequency [1/Å].
    modes : Modes
        Incident waves, centred in the middle of the column.
    range_of_potential : float
        Radius [Å] beyond which an atom is neglected.
    thermal_nodes : int
        Gauss-Laguerre nodes of the radius of the thermal displacement.
    oversampling : float
        Nodes in frequency over Nyquist's number.

    Raises
    ------
    InputError
        For a tilted column, or a detector that is not round.
    """
    require_full_symmetry(column, detector, "the deterministic thermal model")
    grids = _grids(column, energy, aperture, detector.edges, modes, parametrization, range_of_potential, thermal_nodes, oversampling)
    return _with_detector(grids, detector, energy, modes)


def _grids(column, energy, aperture, edges, modes, parametrization, range_of_potential=4.0, thermal_nodes=8, oversampling=1.15) -> _Grids:
    """`edges` [mrad] are angles at which a detector may begin or end."""
    lam = float(wavelength(energy))
    edges = np.unique([0.0, *edges]) * 1e-3 / lam
    k_max = 1.3 * (edges[-1] + aperture)
    extent = range_of_potential + lam * k_max * column.spacing * (column.n_atoms - 1)
    per_k = 2 * extent * oversampling
    edges = np.append(edges, k_max)
    k, w_k = panels(edges, np.ceil(np.diff(edges) * per_k) + 10)
    r_edges = np.array([0, 0.03, 0.12, 0.4, 1.2, range_of_potential])
    r, w_r = panels(r_edges, np.ceil(np.diff(r_edges) * 4 * k_max * oversampling) + np.array([12, 16, 16, 12, 12]))

    incident = np.zeros((modes.order + 1, modes.order // 2 + 1, len(k)), complex)
    for l in range(modes.order + 1):
        radial = radial_modes(modes, l, k)
        incident[l, : len(radial)] = radial * np.sqrt(2 * np.pi * k * w_k)

    grid_weight = 2 * np.pi * np.sqrt(np.outer(r * w_r, k * w_k))
    harmonics, share = thermal_scattering(column, energy, r, 2 * k_max, parametrization, thermal_nodes)
    mean = np.tensordot(share, harmonics[:, 0], 1)
    strength = (abs(harmonics) ** 2 * (r * w_r)).sum(-1).max(0)
    n_m = int(np.flatnonzero(strength > 1e-9 * strength.max())[-1]) + 1
    kernels = [np.einsum("s,sr,sq->rq", share, harmonics[:, m].conj(), harmonics[:, m], optimize=True) for m in range(n_m)]
    kernels[0] = kernels[0] - np.outer(mean.conj(), mean)
    transforms = bessel(modes.order + n_m - 1, 2 * np.pi * np.outer(r, k)) * grid_weight
    return _Grids(k, incident, mean, kernels, transforms)


def _with_detector(grids: _Grids, detector: AnnularDetector, energy: float, modes: Modes) -> RadialColumn:
    """The operators for a detector whose edges are among the grids'."""
    lam = float(wavelength(energy))
    k, kernels, transforms = grids.k, grids.kernels, grids.transforms
    detected = detector.sensitivity(k * 1e3 * lam, np.zeros_like(k))
    recorded = transforms[:, :, detected > 0]
    seen = (recorded * detected[detected > 0]) @ recorded.swapaxes(1, 2)
    diffuse = np.zeros((modes.order + 1, *seen.shape[1:]), complex)
    for l in range(modes.order + 1):
        for m, kernel in enumerate(kernels):
            diffuse[l] += kernel * (seen[l + m] + seen[abs(l - m)] if m else seen[l])
    hankel = transforms[: modes.order + 1]
    return RadialColumn(
        *(jnp.asarray(a) for a in (grids.incident, hankel, grids.scattering, diffuse, detected, np.pi * lam * k**2))
    )


def radial_gram(depths: Float[Array, " atom"], column: RadialColumn) -> Complex[Array, "l p p"]:
    """Gram blocks of a column, as in `ColumnGram.blocks`, complex128; differentiable in the depths.

    Parameters
    ----------
    depths : (atom,)
        z of each atom [Å] in increasing order; z = 0 is the plane of the modes.
    """
    (waves, diffuse), _ = jax.lax.scan(lambda carry, distance: (_meet(carry, distance, column), None), *_start(depths, column))
    return _recorded(waves, diffuse, column)


def _start(depths, column: RadialColumn):
    """Carry of the sweep before the first atom, and the distances to each."""
    diffuse = jnp.zeros((*column.incident.shape[:2], column.incident.shape[1]), complex)
    return (column.incident, diffuse), jnp.diff(depths, prepend=0.0)


def _meet(carry, distance, column: RadialColumn):
    """Fly to the next atom and scatter: waves (l, p, k), and what was recorded of diffuse scattering so far (l, p, p)."""
    waves, diffuse = carry
    hankel = column.hankel.astype(complex)
    waves = waves * jnp.exp(-1j * column.propagation * distance)
    local = jnp.einsum("lrk,lpk->lpr", hankel, waves)
    diffuse = diffuse + jnp.einsum("lpr,lrs,lqs->lpq", local.conj(), column.diffuse, local)
    return waves + jnp.einsum("lrk,lpr->lpk", hankel, column.scattering * local), diffuse


def _recorded(waves, diffuse, column: RadialColumn):
    return diffuse + jnp.einsum("lpk,lqk->lpq", waves.conj() * column.detected, waves)
