"""Columns drawn in windows, against the library's own Fourier sum."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprob.physics.windows import draw_windows, overlap_windows, paint_windows, window_renderer

pytestmark = pytest.mark.usefixtures("double_precision")
PIXEL, HALF = 0.4, 18


def astigmatic(library):
    """The same columns, blurred along a direction that is no axis."""
    q = np.fft.fftfreq(library.images.shape[1], library.pixel)
    along = 0.8 * q + 0.6 * q[:, None]
    spectrum = np.fft.fft2(library.images) * np.exp(-2 * (np.pi * 0.5 * along) ** 2)
    return dataclasses.replace(library, images=np.fft.ifft2(spectrum).real)


@pytest.mark.parametrize("change", [lambda library: library, astigmatic], ids=["round", "astigmatic"])
def test_windows_and_their_derivatives_are_those_of_the_fourier_sum(library, change):
    library = change(library)
    rng = np.random.default_rng(0)
    n, z = rng.integers(1, 12, 6), rng.uniform(-110, 110, 6)
    offset = (HALF + rng.uniform(0, 1, (6, 2))) * PIXEL
    draw = window_renderer(library, PIXEL, HALF, 120.0)
    drawn = np.asarray(draw_windows(jnp.asarray(n), jnp.asarray(z), jnp.asarray(offset), jnp.float32(0.0), library, draw, True), float)
    side = np.arange(2 * HALF + 1) * PIXEL

    def exact(c, dz=0.0, dx=0.0, dy=0.0):
        return library.series(int(n[c]), z[c] + dz, side - offset[c, 0] - dx, side - offset[c, 1] - dy)[0]

    def slope(c, by, step=1e-3):
        return (exact(c, **{by: step}) - exact(c, **{by: -step})) / (2 * step)

    def bend(c, by, step=0.01):
        return (exact(c, **{by: step}) + exact(c, **{by: -step}) - 2 * exact(c)) / step**2

    for c in range(6):
        kinds = (exact(c), slope(c, "dz"), slope(c, "dx"), slope(c, "dy"), (bend(c, "dx") + bend(c, "dy")) / 2)
        for own, expected, within in zip(drawn[c], kinds, (1e-4, 1e-3, 1e-3, 1e-3, 3e-3), strict=True):
            assert abs(own - expected).max() < within * abs(expected).max()


def test_images_wider_than_the_librarys_cell_change_by_their_derivatives(library):
    """Wherever between two pixels the cell's edge falls: samplers lean on a gradient that is the function's own."""
    half = int(library.images.shape[1] * library.pixel / 2 / PIXEL) + 2
    draw, step = window_renderer(library, PIXEL, half, 120.0, 0.5), 1e-3
    places = (half + np.stack(np.meshgrid(np.linspace(-0.4, 1.4, 181), [0.3]), -1).reshape(-1, 2)) * PIXEL

    def image(x):
        return np.asarray(draw_windows(jnp.full(181, 12), jnp.full(181, 110.0), places + np.array([x, 0.0]), jnp.float32(0.0), library, draw, True), float)

    by_x = image(0.0)[:, 2]
    difference = (image(step) - image(-step))[:, 0] / (2 * step)
    assert abs(difference - by_x).max() < 1e-3 * abs(by_x).max()


def test_a_wider_source_is_a_gaussian_blur(library):
    """The library's images, blurred in their own Fourier series."""
    q = np.fft.fftfreq(library.images.shape[1], library.pixel)
    blur = np.exp(-2 * np.pi**2 * 0.05 * (q**2 + q[:, None] ** 2))
    wider = dataclasses.replace(library, images=np.fft.ifft2(np.fft.fft2(library.images) * blur).real)
    draw = window_renderer(library, PIXEL, HALF, 120.0)
    at = jnp.full((1, 2), (HALF + 0.3) * PIXEL)
    drawn = np.asarray(draw_windows(jnp.array([5]), jnp.array([60.0]), at, jnp.float32(0.05), library, draw, False))[0, 0]
    side = np.arange(2 * HALF + 1) * PIXEL - float(at[0, 0])
    expected = wider.series(5, 60.0, side, side)[0]
    assert abs(drawn - expected).max() < 2e-4 * expected.max()


def test_overlaps_are_sums_over_the_windows_drawn(library):
    rng = np.random.default_rng(1)
    n, z = rng.integers(1, 12, 5), rng.uniform(-110, 110, 5)
    offset, corners, layers = (HALF + rng.uniform(0, 1, (5, 2))) * PIXEL, rng.integers(0, 20, (5, 2)), rng.normal(size=(3, 60, 60))
    draw, side, variance = window_renderer(library, PIXEL, HALF, 120.0), 2 * HALF + 1, jnp.float32(0.02)
    drawn = np.asarray(draw_windows(jnp.asarray(n), jnp.asarray(z), jnp.asarray(offset), variance, library, draw, True), float)
    seen = np.array([layers[:, y : y + side, x : x + side] for y, x in corners])
    found = overlap_windows(jnp.asarray(layers, jnp.float32), jnp.asarray(n), jnp.asarray(z), jnp.asarray(offset), jnp.asarray(corners), variance, library, draw)
    expected, scale = np.einsum("ckyx,clyx->ckl", drawn, seen), np.sqrt(np.einsum("ckyx,ckyx->ck", drawn, drawn))
    assert (abs(np.asarray(found) - expected) < 1e-4 * scale[..., None]).all()


@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_columns_of_no_atoms_show_nothing_and_leave_others_as_they_are(library, monkeypatch, platform):
    rng = np.random.default_rng(3)
    n = np.where(np.arange(200) // 64 == 1, 0, rng.integers(0, 3, 200))  # a whole batch of none, and some between others
    offset, corners, layers = (HALF + rng.uniform(0, 1, (200, 2))) * PIXEL, rng.integers(0, 20, (200, 2)), rng.normal(size=(1, 60, 60))
    given = (*(jnp.asarray(a) for a in (rng.uniform(-110, 110, 200), offset)), jnp.float32(0.0), library, window_renderer(library, PIXEL, HALF, 120.0))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, **ways: ways[platform](*arrays))
    drawn = lambda n: np.asarray(draw_windows.__wrapped__(jnp.asarray(n), *given, True))
    overlaps = lambda n: np.asarray(overlap_windows.__wrapped__(jnp.asarray(layers, jnp.float32), jnp.asarray(n), *given[:2], jnp.asarray(corners), *given[2:]))
    for seen in (drawn, overlaps):
        some, full = seen(n), seen(np.maximum(n, 1))
        assert not some[n == 0].any() and full[n == 0].any()
        np.testing.assert_allclose(some[n > 0], full[n > 0], rtol=1e-5, atol=1e-6 * abs(full).max())


def test_other_devices_paint_by_products_what_processors_paint_window_by_window(library, monkeypatch):
    rng = np.random.default_rng(2)
    n, z = rng.integers(0, 12, 150), rng.uniform(-110, 110, 150)  # some of no atoms
    offset, corners, share = (HALF + rng.uniform(0, 1, (150, 2))) * PIXEL, rng.integers(0, 40, (150, 2)), rng.uniform(0.5, 1.5, 150)
    draw, shape = window_renderer(library, PIXEL, HALF, 120.0), (70, 80)
    given = (*(jnp.asarray(a) for a in (n, z, offset, corners)), jnp.float32(0.02), library, draw, shape, True, True, jnp.asarray(share))
    drawn = np.asarray(draw_windows(*given[:3], *given[4:7], True)) * share[:, None, None, None]
    expected = np.zeros((5, *shape))
    for windows, (y, x) in zip(drawn, np.minimum(corners, np.array(shape) - (2 * HALF + 1)), strict=True):
        expected[:, y : y + 2 * HALF + 1, x : x + 2 * HALF + 1] += windows
    for platform in ("cpu", "default"):
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, own=platform, **ways: ways[own](*arrays))
        painted = np.asarray(paint_windows.__wrapped__(*given))
        assert (abs(painted - expected).max((1, 2)) < 2e-6 * abs(expected).max((1, 2))).all(), platform


@pytest.mark.parametrize(("set_before", "then"), [(None, "highest"), ("high", "high")])
def test_products_are_of_full_single_precision_unless_another_was_set(set_before, then):
    own = {k: v for k, v in os.environ.items() if k != "JAX_DEFAULT_MATMUL_PRECISION"} | ({"JAX_DEFAULT_MATMUL_PRECISION": set_before} if set_before else {})
    command = "import jax, depthprob.physics; print(jax.config.jax_default_matmul_precision)"
    assert subprocess.run([sys.executable, "-c", command], env=own, capture_output=True, text=True, check=True).stdout.strip() == then
