"""Focal series against abtem, an independent multislice: the same displaced atoms in the same periodic cell.

What differs between the two, and how each difference is met here:

- Band limit. abtem cuts the projected potential at its own grid before it exponentiates, and spreads an atom between grid points over the
  nearest four of them; both errors vanish with its pixel, the second slowly. `planes_of_abtem` takes abtem's potential on a grid
  several times as fine, exponentiates, then low-passes to the working grid: only this recipe is shared with the code under test, not the
  scattering factors, potentials, probes, propagation, detection or units. `test_abtem_alone_converges_to_us` shares nothing.
- Zero plane. abtem refers its probe to the entrance of the cell, where here the first atoms lie: its defocus is ours minus their z.
- Edges of aperture and detector. Both soften the aperture over one pixel of the cell's reciprocal lattice (in an oblong cell abtem by the
  pixel's length along the radius, we by its geometric mean). Our detector has the same soft rim; abtem's counts whole pixels, `binned` below.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.ndimage

from depthprob.physics.column_images import plane_wave_images
from depthprob.physics.detector import AnnularDetector
from depthprob.physics.electron import wavelength
from depthprob.physics.gram import default_reach, laguerre_gauss_modes, prepare_sweep, sweep_column
from depthprob.physics.optics import Microscope
from depthprob.physics.particle import images_from_gram, particle_gram
from depthprob.physics.specimen import Column

abtem = pytest.importorskip("abtem")
ase = pytest.importorskip("ase")

ROUND = Microscope(300e3, 21.0)
EVERY_ABERRATION = Microscope(
    200e3,
    24.0,
    spherical_aberration=5e4,
    aberrations={"C12_A": 40.0, "phi12_deg": 20.0, "C21_A": 300.0, "phi21_deg": 70.0, "C23_A": 500.0, "phi23_deg": 15.0, "C32_A": 3e4, "phi32_deg": 10.0}
    | {"C34_A": 4e4, "phi34_deg": -8.0, "C41_A": 8e5, "phi41_deg": 50.0, "C43_A": 9e5, "phi43_deg": 25.0, "C45_A": 1e6, "phi45_deg": 33.0}
    | {"C50_A": 2e7, "C52_A": 2e7, "phi52_deg": 60.0, "C54_A": 2e7, "phi54_deg": 5.0, "C56_A": 2e7, "phi56_deg": 21.0},
)
PLACES = np.array([[0.0, 0.0], [0.15, 0.0], [0.3, 0.45], [0.75, 0.0], [0.0, 1.2], [-2.0, -1.5]])  # from the middle of the cell [Å]


@pytest.fixture(autouse=True, scope="module")
def quiet():
    with abtem.config.set({"diagnostics.progress_bar": False, "precision": "float32"}):
        yield


def column(n, spacing, rms, middle, seed=0):
    """n displaced atoms (n, 3), their mean z near zero."""
    displaced = rms * np.random.default_rng(seed).normal(size=(n, 2))
    return np.column_stack([np.asarray(middle) + displaced, (np.arange(n) - (n - 1) / 2) * spacing])


def particle(spacing, half, middle, rms, seed=0):
    """Displaced atoms (N, 3) of an fcc octahedron cut at |x| + |y| + |z| <= half, its layers moved along the beam too."""
    i = np.stack(np.meshgrid(*[np.arange(-half, half + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    i = i[(i.sum(1) % 2 == 0) & (abs(i).sum(1) <= half)]
    atoms = i * spacing / 2 + np.append(middle, 3.0)
    rng = np.random.default_rng(seed)
    atoms[:, 2] += rms * rng.normal(size=2 * half + 1)[i[:, 2] + half]
    return atoms + rms * rng.normal(size=atoms.shape) * [1, 1, 0]


def planes_of_abtem(atoms, element, cell, gpts, energy, oversampling, parametrization):
    """abtem's transmission functions of each height of atoms, which it scatters at the slice's top; with oversampling 1 all its own way.

    Else its potentials on a grid `oversampling` times as fine, exponentiated, then low-passed to two thirds of the working grid's Nyquist.
    """
    heights = np.unique(atoms[:, 2])
    thickness = (*np.diff(heights), 1.0)
    model = ase.Atoms([element] * len(atoms), atoms - [0, 0, heights[0]], cell=[*cell, sum(thickness)], pbc=True)
    options = dict(slice_thickness=thickness, parametrization=parametrization, projection="infinite")
    potential = abtem.Potential(model, gpts=tuple(oversampling * n for n in gpts), **options).build(lazy=False)
    if oversampling == 1:
        function = abtem.antialias.AntialiasAperture().bandlimit(potential.transmission_function(energy))
        return abtem.potentials.iam.TransmissionFunction(function.array, thickness, extent=cell, energy=energy)
    ix, iy = (np.fft.fftfreq(n, 1 / n).round().astype(int) for n in gpts)
    inside = np.hypot((ix / cell[0])[:, None], iy / cell[1]) < min(n / side for n, side in zip(gpts, cell, strict=True)) / 3
    arrays = np.empty((len(heights), *gpts), np.complex64)
    for low_passed, fine in zip(arrays, potential.array, strict=True):
        phase = np.float32(abtem.core.energy.energy2sigma(energy)) * fine
        spectrum = scipy.fft.fft2(np.exp(1j * phase)) / oversampling**2
        low_passed[:] = scipy.fft.ifft2(spectrum[ix[:, None], iy] * inside)
    return abtem.potentials.iam.TransmissionFunction(arrays, thickness, extent=cell, energy=energy)


def abtem_waves(planes, top, microscope, cell, gpts, foci, positions):
    """abtem's exit waves of probes at positions (P, 2) [Å], a `Waves` for each focus."""
    polar = {"C30": microscope.spherical_aberration}
    for name, value in microscope.aberrations.items():
        polar[name.split("_")[0]] = math.radians(value) if name.startswith("phi") else value
    for focus in foci:
        probe = abtem.Probe(
            energy=microscope.energy, semiangle_cutoff=microscope.convergence_angle, extent=cell, gpts=gpts, aberrations=polar | {"C10": top - focus}
        )
        waves = probe.build(abtem.CustomScan(positions), lazy=False)
        propagator, band = abtem.multislice.FresnelPropagator(), abtem.antialias.AntialiasAperture()
        for i in range(len(planes)):
            waves = abtem.multislice.conventional_multislice_step(waves, planes.get_chunk(i, i + 1), propagator, band)
        yield waves


def annulus(detector, cell, gpts, energy):
    """Sensitivity (x, y) with rims as wide as the cell's sampling of frequency."""
    qx, qy = (np.fft.fftfreq(n, side / n) for n, side in zip(gpts, cell, strict=True))
    q, rim = np.hypot(qx[:, None], qy), 1 / math.sqrt(cell[0] * cell[1])
    disc = lambda angle: np.clip((angle * 1e-3 / wavelength(energy) - q) / rim + 0.5, 0, 1)
    return disc(detector.outer) - disc(detector.inner)


def abtem_signals(atoms, element, microscope, detector, cell, gpts, foci, positions, oversampling, parametrization="lobato"):
    """Fractions of the beam (focus, position) on a detector with soft rims, and as abtem's own detector bins them."""
    planes = planes_of_abtem(atoms, element, cell, gpts, microscope.energy, oversampling, parametrization)
    soft, binned = [], []
    for waves in abtem_waves(planes, atoms[:, 2].min(), microscope, cell, gpts, foci, positions):
        soft.append((abs(np.fft.fft2(waves.array)) ** 2 * annulus(detector, cell, gpts, microscope.energy)).sum((-1, -2)))
        binned.append(abtem.AnnularDetector(detector.inner, detector.outer).detect(waves).array)
    return np.array(soft), np.array(binned)


def our_signals(atoms, element, microscope, detector, cell, gpts, foci, positions, parametrization="lobato"):
    """Fractions of the beam (focus, position) of the Gram matrix of one configuration, and the peak of the series."""
    gram, waves = particle_gram(atoms, element, cell, microscope, detector, max(side / n for n, side in zip(gpts, cell, strict=True)), parametrization)
    series = images_from_gram(gram, waves, cell, microscope, np.asarray(foci), (64, 64))
    found = np.zeros((len(foci), len(positions)))
    for i, (x, y) in enumerate(positions):  # each position as a displacement of the object to the corner
        found[:, i] = images_from_gram(gram, waves, cell, microscope, np.asarray(foci), (1, 1), np.full((len(foci), 2), [-x, -y]))[:, 0, 0]
    return found, series.max()


CASES = {
    "ten gold atoms": dict(
        atoms=column(10, 4.08, 0.0893, (3, 3.5)), element="Au", microscope=ROUND, detector=AnnularDetector(48.0, 180.0), cell=(6.0, 7.0), gpts=(180, 210)
    ),
    "ten gold atoms, 200 kV, every aberration": dict(
        atoms=column(10, 4.08, 0.0893, (3, 3.5)), element="Au", microscope=EVERY_ABERRATION, detector=AnnularDetector(60.0, 220.0), cell=(6.0, 7.0), gpts=(180, 210)
    ),
    "gold particle": dict(
        atoms=particle(4.08, 2, (4.0, 5.0), 0.09), element="Au", microscope=ROUND, detector=AnnularDetector(48.0, 180.0), cell=(8.0, 10.0), gpts=(240, 300)
    ),
    "six carbon atoms, 80 kV": dict(
        atoms=column(6, 3.57, 0.05, (3, 3.5)), element="C", microscope=Microscope(80e3, 25.0), detector=AnnularDetector(60.0, 200.0), cell=(6.0, 7.0), gpts=(144, 168)
    ),
    "six copper atoms, Kirkland's potential": dict(
        atoms=column(6, 3.61, 0.08, (3, 3.5)), element="Cu", microscope=ROUND, detector=AnnularDetector(48.0, 180.0), cell=(6.0, 7.0), gpts=(180, 210), parametrization="kirkland"
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_focal_series_agree_within_half_a_per_cent_of_the_peak(case):
    settings = CASES[case] | dict(foci=[-100.0, 0.0, 60.0])
    settings |= dict(positions=np.array(settings["cell"]) / 2 + PLACES)
    ours, peak = our_signals(**settings)
    soft, binned = abtem_signals(**settings, oversampling=6)
    assert soft.max() > 0.5 * peak, "some probe must see the specimen well"
    print(f"{case}: soft rims {abs(ours - soft).max() / peak:.5f}, abtem's detector {abs(ours - binned).max() / peak:.5f} of the peak")
    assert abs(ours - soft).max() < 0.005 * peak
    assert abs(ours - binned).max() < 0.01 * peak


@pytest.mark.slow
def test_abtem_alone_converges_to_us():
    """Nothing shared: abtem's own transmission functions, its pixel refined 16-fold. Two displaced gold atoms, on and off axis."""
    cell, foci = (4.0, 4.0), [0.0]
    settings = dict(atoms=column(2, 4.08, 0.0893, (2, 2)), element="Au", microscope=ROUND, detector=AnnularDetector(48.0, 180.0), cell=cell, foci=foci)
    settings |= dict(positions=np.array([[2.0, 2.0], [2.3, 2.0]]))
    ours, peak = our_signals(**settings, gpts=(160, 160))  # `default_sampling`: abtem's limit has no band limit near the detector
    error = [abs(abtem_signals(**settings, gpts=(n, n), oversampling=1)[0] - ours).max() / peak for n in (120, 480, 1920)]
    print("abtem at 0.033, 0.0083 and 0.0021 A against us:", error)
    assert error[0] > 0.01, "at the paper's sampling abtem is far from its own limit"
    assert error[2] < error[1] < error[0]
    assert error[2] < 0.005


def images_of_column(n, displacements, lens, foci, cell, size):
    """Symmetrised images (focus, y, x) of one configuration by Laguerre-Gauss modes."""
    model = Column("Au", n, 4.08, 0.63)
    aperture = lens.convergence_angle * 1e-3 / wavelength(lens.energy)
    reach = default_reach(model, lens.convergence_angle)
    modes = laguerre_gauss_modes(reach, aperture)
    sweep = prepare_sweep(model, lens.energy, aperture, AnnularDetector(48.0, 180.0), reach)
    blocks = jax.jit(lambda u: sweep_column(u, sweep, modes))(jnp.asarray(displacements, jnp.float32))
    return plane_wave_images(np.asarray(blocks)[-1:], modes, lens, np.asarray(foci), cell, size)[0]


def on_circles(n, displacements, foci, cell, gpts, radii, turns, oversampling):
    """abtem's mean over `turns` probes on each circle about the column: an image averaged over all turns, as (focus, radius)."""
    atoms = np.column_stack([cell / 2 + displacements, (np.arange(n) - (n - 1) / 2) * 4.08])
    phi = 2 * np.pi * np.arange(turns) / turns
    circle = np.column_stack([np.cos(phi), np.sin(phi)])
    positions = np.concatenate([cell / 2 + r * circle[: turns if r else 1] for r in radii])
    soft, _ = abtem_signals(atoms, "Au", ROUND, AnnularDetector(48.0, 180.0), (cell, cell), (gpts, gpts), foci, positions, oversampling)
    return np.stack([part.mean(1) for part in np.split(soft, np.cumsum([turns if r else 1 for r in radii])[:-1], axis=1)], 1)


@pytest.mark.parametrize(
    ("n", "foci", "cell", "radii", "turns"),
    [
        (2, [-20.0, 0.0], 7.0, [0, 3], 12),
        pytest.param(10, [-200.0, -60.0, 0.0, 60.0], 16.3, [0, 2, 4, 8], 16, marks=pytest.mark.slow),
    ],
)
def test_modes_of_a_column_agree_within_half_a_per_cent_of_the_peak(n, foci, cell, radii, turns):
    """The library's Gram matrix of one configuration, averaged over turns and mirrors, at pixels `radii` from the column; the same waves in the aperture."""
    displacements = 0.0893 * np.random.default_rng(1).normal(size=(n, 2))
    size = round(cell * 5)
    ours = images_of_column(n, displacements, ROUND, foci, cell, size)
    theirs = on_circles(n, displacements, foci, cell, round(cell * 40), np.array(radii) * cell / size, turns, 6)
    print(f"{n} atoms in modes: {abs(ours[:, 0, radii] - theirs).max() / ours.max():.5f} of the peak")
    assert abs(ours[:, 0, radii] - theirs).max() < 0.005 * ours.max()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ten gold atoms", "gold particle"])
def test_whole_images_agree_within_half_a_per_cent_of_the_peak(case):
    """Every pixel of the cell at Nyquist's sampling of the probe, with a source of 0.7 A."""
    settings = CASES[case] | dict(foci=[-200.0, -60.0, 0.0, 20.0, 200.0])
    cell = settings["cell"]
    shape = [math.ceil(4.4 * 21e-3 / wavelength(300e3) * side) for side in cell]  # x, y
    grid = np.meshgrid(*(np.arange(n) * side / n for n, side in zip(shape, cell, strict=True)), indexing="ij")
    gram, waves = particle_gram(settings["atoms"], settings["element"], cell, ROUND, settings["detector"], cell[0] / settings["gpts"][0])
    ours = images_from_gram(gram, waves, cell, eqx.tree_at(lambda m: m.source_fwhm, ROUND, 0.7), np.array(settings["foci"]), shape[::-1])
    sharp = []
    for rows in np.array_split(np.stack(grid, -1).reshape(-1, 2), 12):
        sharp.append(abtem_signals(**settings, positions=rows, oversampling=6)[0])
    theirs = np.concatenate(sharp, 1).reshape(-1, *shape)
    sd = [0.7 / math.sqrt(8 * math.log(2)) / (side / n) for n, side in zip(shape, cell, strict=True)]
    theirs = scipy.fft.ifft2(scipy.ndimage.fourier_gaussian(scipy.fft.fft2(theirs), [0, *sd])).real.transpose(0, 2, 1)
    print(f"{case}, {theirs.size} pixels: {abs(ours - theirs).max() / ours.max():.5f} of the peak")
    assert abs(ours - theirs).max() < 0.005 * ours.max()
