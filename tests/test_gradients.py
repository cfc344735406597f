"""Derivatives through the whole model, forward and reverse, against differences.

The waves are single precision by choice: differences over a hundredth of each parameter's natural unit carry about 1e-4 of rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from depthprob.physics.electron import wavelength
from depthprob.physics.focal_series import Field, FocalSeries, column_signal, renderer
from depthprob.physics.multislice import exit_waves, transmission
from depthprob.physics.optics import Microscope, aberration_phase
from depthprob.physics.specimen import rms_from_debye_waller_b

pytestmark = pytest.mark.usefixtures("double_precision")

CELL, N, ENERGY = (5.0, 5.5), (72, 80), 200e3  # x, y
LIMIT = N[0] / CELL[0] / 3
DRAWS = np.array([[0.4, -1.1], [-0.7, 0.2], [1.2, 0.9]])  # thermal displacements in units of u
PROBES = np.array([[2.5, 2.7], [2.8, 2.6], [3.4, 3.1]])
START = dict(
    positions=np.array([[2.4, 2.6], [2.55, 2.75], [2.5, 2.7]]),
    depths=np.array([-3.1, 0.4, 4.2]),
    debye_waller_b=0.5,
    defocus=3.0,  # 10 A
    spherical_aberration=1.5,  # 10^5 A
    astigmatism=2.0,  # 10 A
    azimuth=3.0,  # 10 degrees
    convergence_angle=1.889,  # 10 mrad; no wave of the cell enters or leaves the soft rim within 0.4 mrad
    source_fwhm=0.7,
)


@jax.jit
def signals(p):
    """Fractions of the beam (probe,) scattered to 40-100 mrad by three copper atoms on a detector with soft rims."""
    lam = wavelength(ENERGY)
    microscope = Microscope(
        ENERGY,
        10 * p["convergence_angle"],
        spherical_aberration=1e5 * p["spherical_aberration"],
        aberrations={"C12_A": 10 * p["astigmatism"], "phi12_deg": 10 * p["azimuth"]},
    )
    moved = p["positions"] + rms_from_debye_waller_b(p["debye_waller_b"]) * DRAWS
    planes = jnp.stack([transmission(moved[i : i + 1], "Cu", CELL, N[::-1], ENERGY, LIMIT) for i in range(3)])
    j = np.stack(np.meshgrid(np.arange(-6, 7), np.arange(-6, 7)), -1).reshape(-1, 2)
    waves = j[np.hypot(*(j / CELL).T) < 24e-3 / lam + 0.1]
    spectra = exit_waves(waves, planes, p["depths"], CELL, lam, LIMIT).reshape(len(waves), -1)
    q = np.hypot(np.fft.fftfreq(N[0], CELL[0] / N[0]), np.fft.fftfreq(N[1], CELL[1] / N[1])[:, None]).ravel() * lam * 1e3
    detected = np.clip((q - 40) / 5 + 0.5, 0, 1) * np.clip((100 - q) / 5 + 0.5, 0, 1)
    kx, ky = (waves / CELL).T
    s = p["source_fwhm"] / np.sqrt(8 * np.log(2))
    source = jnp.exp(-2 * (np.pi * s) ** 2 * ((kx[:, None] - kx) ** 2 + (ky[:, None] - ky) ** 2))
    gram = (spectra.conj() * detected) @ spectra.T * source
    rim = 1 / np.sqrt(CELL[0] * CELL[1])
    amplitude = jnp.clip((1e-3 * microscope.convergence_angle / lam - np.hypot(kx, ky)) / rim + 0.5, 0, 1)
    chi = aberration_phase(microscope, kx, ky, 10 * p["defocus"])
    ramps = np.exp(-2j * np.pi * PROBES @ np.stack([kx, ky]))
    probe = amplitude / jnp.sqrt((amplitude**2).sum()) * jnp.exp(-1j * chi) * ramps
    return jnp.einsum("pk,kl,pl->p", probe.conj(), gram, probe).real


@pytest.fixture(scope="module")
def jacobians():
    """Value and derivatives, forward and reverse."""
    start = jax.tree.map(jnp.asarray, START)
    return signals(start), jax.jit(jax.jacfwd(signals))(start), jax.jit(jax.jacrev(signals))(start)


def test_whole_model_is_differentiable_in_both_modes():
    """Atoms, depths, B, defocus, C3, astigmatism, aperture and source at once, in random directions."""
    start = jax.tree.map(jnp.asarray, START)
    scale = 1 / signals(start).max()
    check_grads(lambda p: scale * signals(p), (start,), order=1, modes=("fwd", "rev"), eps=8e-3, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", START)
def test_derivative_by_each_parameter_is_its_difference(name, jacobians):
    """Depths by +-10 pm, as the paper differentiates; lateral positions by 1 pm, since a core is 5 pm wide; 0.02 units of the others."""
    start = jax.tree.map(jnp.asarray, START)
    value, forward, reverse = (j[name] if isinstance(j, dict) else j for j in jacobians)
    np.testing.assert_allclose(reverse, forward, atol=1e-5 * abs(forward).max())
    assert abs(forward).max() > 1e-3 * value.max(), "this parameter moves the signal"
    h = {"depths": 0.1, "positions": 0.01}.get(name, 0.02)
    for i in np.ndindex(start[name].shape):
        up, down = (signals(start | {name: start[name].at[i].add(way)}) for way in (h, -h))
        np.testing.assert_allclose(forward[(slice(None), *i)], (up - down) / (2 * h), atol=0.01 * abs(forward).max())


def two_columns(library):
    """Some pixels of two columns as a function of all a field's parameters, and where to start: positions, depths, gain, image shifts, focus offset and step, and source size."""
    series = FocalSeries(np.array([-40.0, 0.0, 30.0]), 0.4, np.full(3, 9612.0), (24, 24))
    draw = renderer(library, series)
    names = ("positions", "depths", "gain", "image_shifts", "focus_offset", "focus_step", "source_variance")

    def pixels(values):
        values = dict(zip(names, values, strict=True))
        values["focus_step"] = 1 + values["focus_step"] / 10
        values["source_variance"] = values["source_variance"] / 10
        moved = Field(n_atoms=np.array([3, 7]), background=np.full(3, 0.01), **values)
        return 10 * column_signal(moved, library, series, draw)[:, 6:16:3, 5:20:3].ravel()

    positions, shifts = np.array([[3.3, 4.1], [6.2, 4.4]]), np.array([[0.1, 0.0], [-0.1, 0.2], [0.0, -0.2]])
    return pixels, (positions, np.array([0.4, -0.6]), np.array([1.0, 1.1, 0.9]), shifts, np.array(0.7), np.array(0.1), np.array(0.2))


def test_field_of_columns_is_differentiable_in_both_modes(library):
    pixels, start = two_columns(library)
    check_grads(jax.jit(pixels), (start,), order=1, modes=("fwd", "rev"), eps=2e-3, atol=1e-3, rtol=1e-3)  # the step leaves 5e-4, falling with its square


def test_gradient_in_single_precision_is_that_in_double(library):
    """Differences would not do: defocus and depth hold 5e-6 Å in single precision, 0.2 % of a step."""

    def gradient(kind):
        pixels, start = two_columns(library)
        return jax.jit(jax.grad(lambda values: (pixels(values) ** 2).sum()))(jax.tree.map(lambda a: jnp.asarray(a, kind), start))

    double = gradient(jnp.float64)
    with jax.enable_x64(False):
        single = gradient(jnp.float32)
    for one, other in zip(single, double, strict=True):
        assert (one.dtype, other.dtype) == (jnp.float32, jnp.float64)
        np.testing.assert_allclose(one, other, atol=1e-4 * abs(other).max())
