"""Seconds of the forward model beside abtem's for the same job, in one run.

    python tests/benchmarks/forward_model.py [PART ...] [--threads N]

Parts, all by default: multislice, series, thermal, settings, derivative, thicknesses. Each runs in a process of its own and prints its settings,
seconds (the best of several runs after a warm-up, unless said) and peak memory. The paper's settings: gold, 300 kV, 21 mrad, 48-180 mrad, 10 atoms,
a potential sampled at 0.0342 A, 41 foci. No part needs 4 GB.
"""

import argparse
import os
import resource
import subprocess
import sys
import time

PARTS = ("multislice", "series", "thermal", "settings", "derivative", "thicknesses")


def best(function, runs=3):
    """Seconds of the fastest of some runs, after one that warms up."""
    function()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def once(function):
    """Result and seconds of one run."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def paper():
    """Lens, detector and column of ten atoms."""
    from depthprob import AnnularDetector, Column, Microscope

    return Microscope(energy=300e3, convergence_angle=21.0, source_fwhm=0.7), AnnularDetector(48.0, 180.0), Column("Au", 10, 4.08, 0.63)


def abtem_probes(cell, n, threads, probes, potential):
    """Seconds per probe of abtem's multislice with detection: float32, FFTW, transmission functions computed beforehand."""
    import abtem
    import numpy as np

    abtem.config.set({"diagnostics.progress_bar": False, "precision": "float32", "fftw.threads": threads})
    probe = abtem.Probe(energy=300e3, semiangle_cutoff=21.0, extent=cell, gpts=n)
    positions = np.random.default_rng(0).uniform(0, cell, (probes, 2))
    detector = abtem.AnnularDetector(48.0, 180.0)
    waves = probe.build(abtem.CustomScan(positions), lazy=False)
    array = waves.array.copy()

    def run():
        step = abtem.multislice.conventional_multislice_step
        propagator, band = abtem.multislice.FresnelPropagator(), abtem.antialias.AntialiasAperture()
        waves._array = array.copy()
        here = waves
        for i in range(len(potential)):
            here = step(here, potential.get_chunk(i, i + 1), propagator, band)
        return detector.detect(here).array

    return best(run) / probes


def abtem_planes(cell, n, atoms):
    """abtem's transmission functions, a slice of 4.08 A for each atom."""
    import abtem
    import ase

    abtem.config.set({"diagnostics.progress_bar": False, "precision": "float32"})
    model = ase.Atoms(["Au"] * atoms, [[cell / 2, cell / 2, 4.08 * i + 1.0] for i in range(atoms)], cell=[cell, cell, 4.08 * atoms], pbc=True)
    potential = abtem.Potential(model, gpts=n, slice_thickness=4.08, parametrization="lobato", projection="infinite").build(lazy=False)
    function = abtem.antialias.AntialiasAperture().bandlimit(potential.transmission_function(300e3))
    return abtem.potentials.iam.TransmissionFunction(function.array, 4.08, extent=cell, energy=300e3)


def multislice(threads):
    """The same probes through the same slices, and the FFTs alone."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import scipy.fft

    from depthprob.physics.electron import wavelength
    from depthprob.physics.multislice import multislice as carry
    from depthprob.physics.multislice import transmission

    cell, n, probes, atoms = 16.3, 480, 8, 10
    print(f"plain multislice: {probes} probes, {n} x {n} points, cell {cell} A, {atoms} slices, complex64, {threads} thread(s)")
    theirs = abtem_probes(cell, n, threads, probes, abtem_planes(cell, n, atoms))
    lam, limit = wavelength(300e3), n / cell / 3
    q = np.hypot(*np.meshgrid(*[np.fft.fftfreq(n, cell / n)] * 2))
    detected = jnp.asarray((q * lam > 48e-3) & (q * lam < 180e-3))
    spectra = jnp.asarray(np.tile((q < 21e-3 / lam).astype(np.complex64), (probes, 1, 1)))
    planes = jnp.stack([transmission(np.full((1, 2), cell / 2), "Au", (cell, cell), (n, n), 300e3, limit)] * atoms)
    depths = jnp.arange(atoms) * 4.08
    one = lambda wave: jnp.sum(jnp.abs(carry(wave, planes, depths, (cell, cell), lam, limit)) ** 2 * detected)
    run = jax.jit(lambda waves: jax.lax.map(one, waves))
    ours = best(lambda: run(spectra).block_until_ready()) / probes
    propagator = np.exp(-1j * np.pi * lam * q**2 * 4.08).astype(np.complex64) * (q < limit)
    slices, seen = np.asarray(planes), np.flatnonzero(np.asarray(detected))

    def by_scipy():
        for wave in np.asarray(spectra):
            spectrum = wave.copy()
            for plane in slices:
                wave = scipy.fft.ifft2(spectrum, overwrite_x=True, workers=threads)
                wave *= plane
                spectrum = scipy.fft.fft2(wave, overwrite_x=True, workers=threads)
                spectrum *= propagator
            (abs(spectrum.ravel()[seen]) ** 2).sum()

    def floor():
        for wave in np.asarray(spectra):
            spectrum = wave.copy()
            for _ in range(atoms):
                spectrum = scipy.fft.fft2(scipy.fft.ifft2(spectrum, overwrite_x=True, workers=threads), overwrite_x=True, workers=threads)

    scipy_seconds, fft = best(by_scipy) / probes, best(floor) / probes
    for name, seconds in (("abtem", theirs), ("depthprob, JAX", ours), ("depthprob, SciPy (as particle_gram)", scipy_seconds), ("FFTs alone (SciPy)", fft)):
        print(f"  {name:38s}{1e3 * seconds:9.1f} ms per probe{theirs / seconds:8.2f} times abtem's speed")


def series(threads):
    """One thermal configuration of ten atoms, 41 foci, every 0.1 A of a 16.3 A cell."""
    import abtem
    import jax
    import jax.numpy as jnp
    import numpy as np

    from depthprob.physics.column_images import column_images
    from depthprob.physics.electron import wavelength
    from depthprob.physics.gram import default_reach, laguerre_gauss_modes, prepare_sweep, sweep_column

    microscope, detector, column = paper()
    cell, n, foci, pixels = 16.3, 480, 41, 163
    print(f"focal series of ten atoms, one thermal configuration: {foci} foci, {pixels} x {pixels} pixels of 0.1 A, potential at 0.0342 A, {threads} thread(s)")
    aperture = 21e-3 / wavelength(300e3)
    reach = default_reach(column, 21.0)
    modes = laguerre_gauss_modes(reach, aperture)
    sweep, prepared = once(lambda: prepare_sweep(column, 300e3, aperture, detector, reach, sampling=0.0342))
    run = jax.jit(lambda u: sweep_column(u, sweep, modes))
    displacements = jnp.asarray(0.0893 * np.random.default_rng(0).normal(size=(10, 2)), jnp.float32)
    blocks, first = once(lambda: np.asarray(run(displacements)))
    _, again = once(lambda: run(displacements).block_until_ready())
    images, imaged = once(lambda: column_images(blocks[-1:], modes, microscope, np.arange(-200.0, 201, 10), cell, pixels))
    print(f"  depthprob: {prepared:.1f} s preparation + {again:.1f} s sweep of {len(modes.l)} modes on {sweep.incident.shape[1]}^2 points (first time {first:.1f} s, with compilation)")
    print(f"             + {imaged:.1f} s for {images.size} pixels of 10 atoms; 1 to 9 atoms come with the sweep. Total {prepared + first + imaged:.1f} s")
    ours = prepared + first + imaged

    planes = abtem_planes(cell, n, 10)
    probe = abtem_probes(cell, n, threads, 8, planes)
    jobs = pixels**2 * foci
    print(f"  abtem's Probe: {1e3 * probe:.1f} ms per probe measured, x {jobs} probes = {probe * jobs / 3600:.1f} h extrapolated: {probe * jobs / ours:.0f} times longer")

    half, m = cell / 2, n // 2
    matrix = abtem.SMatrix(semiangle_cutoff=21.0, energy=300e3, extent=half, gpts=m, downsample="cutoff").build(lazy=False)
    scan = abtem.CustomScan(np.random.default_rng(0).uniform(0, half, (16, 2)))
    reduced = best(lambda: matrix.reduce(scan=scan, detectors=abtem.AnnularDetector(48.0, 180.0)), runs=2) / 16
    waves, points = matrix.array.shape[0], matrix.array.shape[-1]
    whole = reduced * 16  # four times the plane waves, four times the pixels
    print(f"  abtem's SMatrix: {1e3 * reduced:.1f} ms per probe measured in a cell half as wide ({waves} waves of {points}^2 points), x 16 for {4 * waves} waves of {2 * points}^2,")
    print(f"                   x {jobs} probes = {whole * jobs / 3600:.1f} h extrapolated, without building it: {whole * jobs / ours:.0f} times longer")


def thermal(threads):
    """Libraries of columns by the closed thermal average, against one frozen-phonon configuration."""
    import dataclasses

    import jax
    import numpy as np

    from depthprob.physics.electron import wavelength
    from depthprob.physics.frozen_phonon import CHEAP_ANGLE, CHEAP_CELL, thermal_draws
    from depthprob.physics.gram import default_cell, default_reach, laguerre_gauss_modes, prepare_sweep, required_sampling, sweep_column
    from depthprob.physics.thermal import thermal_gram

    _, detector, column = paper()
    aperture = 21e-3 / wavelength(300e3)
    print(f"Gram matrices of columns of 1 atom to n: the mean over all configurations in closed form, and one configuration of frozen phonons, {threads} thread(s)")
    for n in (12, 45):
        column = dataclasses.replace(column, n_atoms=n)
        start = time.process_time()
        _, closed = once(lambda column=column: thermal_gram(column, 300e3, 21.0, detector))
        processor = time.process_time() - start
        print(f"  1 to {n} atoms: closed form {closed:.1f} s ({processor:.1f} s of processor)", flush=True)
        reach = default_reach(column, 21.0)
        modes, cell = laguerre_gauss_modes(reach, aperture), default_cell(column, 300e3, aperture, reach)
        draw = thermal_draws(n, 0.63, 1, 0)[0].astype(np.float32)
        levels = {"accurate": (None, cell)} if n == 12 else {}  # of 45 atoms it needs more than 4 GB
        for name, (sampling, side) in (levels | {"cheap": (required_sampling(300e3, CHEAP_ANGLE * 180.0), CHEAP_CELL * cell)}).items():
            sweep = prepare_sweep(column, 300e3, aperture, detector, reach, sampling=sampling, cell=side)
            run = jax.jit(lambda u, sweep=sweep, modes=modes: sweep_column(u, sweep, modes))
            run(draw).block_until_ready()
            start = time.process_time()
            _, seconds = once(lambda run=run, draw=draw: run(draw).block_until_ready())
            own = time.process_time() - start
            print(f"    {name} sweep of {len(modes.l)} modes on {sweep.incident.shape[1]}^2 points {seconds:.1f} s ({own:.1f} s of processor): the closed form is worth {processor / own:.1f} of them", flush=True)


def settings(threads):
    """Another focus, source size, aberration of a Gram matrix at hand, against building it."""
    import dataclasses

    import numpy as np

    from depthprob import Microscope
    from depthprob.physics.column_images import column_images
    from depthprob.physics.thermal import thermal_gram

    microscope, detector, column = paper()
    gram, build = once(lambda: thermal_gram(dataclasses.replace(column, n_atoms=12), 300e3, 21.0, detector))
    print(f"Gram matrices of 1 to {gram.n_max} atoms in closed form: {build:.1f} s; images of all atom numbers, 24 A, 120 x 120 pixels, {threads} thread(s)")
    blocks, modes = gram.blocks[0], gram.modes
    lenses = {
        "another focus": (microscope, 1),
        "another source size, 41 foci": (Microscope(300e3, 21.0, source_fwhm=0.9), 41),
        "C3 and C5, 41 foci": (Microscope(300e3, 21.0, 0.7, spherical_aberration=1e4, aberrations={"C50_A": 1e7}), 41),
        "an aberration that is not round, a focus": (Microscope(300e3, 21.0, 0.7, aberrations={"C12_A": 20.0}), 1),
    }
    for name, (lens, foci) in lenses.items():
        seconds = best(lambda lens=lens, foci=foci: column_images(blocks, modes, lens, np.linspace(-200, 200, foci), 24.0, 120), runs=1)
        print(f"  {name:42s}{seconds:7.2f} s = {100 * seconds / build:.2f} % of the build")


def derivative(threads):
    """A directional derivative with its value, against the value alone."""
    from importlib import resources

    import jax
    import jax.numpy as jnp
    import numpy as np

    from depthprob import ColumnLibrary, Field, FocalSeries
    from depthprob.physics.electron import wavelength
    from depthprob.physics.focal_series import column_signal, renderer
    from depthprob.physics.multislice import multislice as carry
    from depthprob.physics.multislice import transmission

    print(f"a directional derivative (forward) with the value, against the value; {threads} thread(s)")

    def report(name, f, at, way):
        value, both = jax.jit(f), jax.jit(lambda x, v: jax.jvp(f, (x,), (v,)))
        seconds, double = (best(lambda g=g, a=a: jax.block_until_ready(g(*a))) for g, a in ((value, (at,)), (both, (at, way))))
        print(f"  {name:56s}{1e3 * seconds:9.1f} ms{1e3 * double:9.1f} ms{double / seconds:6.2f} times")

    cell, n, lam = 16.3, 480, wavelength(300e3)
    limit = n / cell / 3
    planes = jnp.stack([transmission(np.full((1, 2), cell / 2), "Au", (cell, cell), (n, n), 300e3, limit)] * 10)
    q = np.hypot(*np.meshgrid(*[np.fft.fftfreq(n, cell / n)] * 2)) * lam
    ring, probe = jnp.asarray((q > 48e-3) & (q < 180e-3)), jnp.asarray((q < 21e-3).astype(np.complex64))
    depths = jnp.arange(10) * 4.08
    signal = lambda z: jnp.sum(jnp.abs(carry(probe, planes, z, (cell, cell), lam, limit)) ** 2 * ring)
    report(f"multislice of a probe, {n}^2, 10 atoms, by depths", signal, depths, jnp.ones(10))

    name = next(f for f in resources.files("depthprob.data").iterdir() if f.name.startswith("library_"))
    with resources.as_file(name) as path:
        library = ColumnLibrary.load(path)
    foci, shape = np.arange(-200.0, 201, 10), (96, 96)
    recorded = FocalSeries(foci, 0.34, np.full(41, 9612.0), shape)
    rng = np.random.default_rng(0)
    positions, n_atoms = jnp.asarray(rng.uniform(4, 28, (56, 2))), jnp.asarray(rng.integers(4, 12, 56))
    draw = renderer(library, recorded)
    nuisances = (jnp.full(41, 1e-4), jnp.ones(41), jnp.zeros((41, 2)))
    moved = lambda z: column_signal(Field(positions, n_atoms, z, *nuisances), library, recorded, draw)
    report("field of 56 columns, 41 images of 96 x 96, by depths", moved, jnp.asarray(rng.normal(size=56), jnp.float32), jnp.ones(56))


def thicknesses(threads):
    """Columns of 1 to 20 atoms from one sweep, against the 20 atoms alone."""
    import jax
    import jax.numpy as jnp

    from depthprob.physics.electron import wavelength
    from depthprob.physics.frozen_phonon import CHEAP_ANGLE, CHEAP_CELL
    from depthprob.physics.gram import _blocks, _scatter, default_cell, default_reach, laguerre_gauss_modes, prepare_sweep, required_sampling
    from depthprob.physics.specimen import Column

    _, detector, _ = paper()
    column, aperture = Column("Au", 20, 4.08, 0.63), 21e-3 / wavelength(300e3)
    reach = default_reach(column, 21.0)
    modes = laguerre_gauss_modes(reach, aperture)
    options = dict(sampling=required_sampling(300e3, CHEAP_ANGLE * 180.0), cell=CHEAP_CELL * default_cell(column, 300e3, aperture, reach))
    sweep = prepare_sweep(column, 300e3, aperture, detector, reach, **options)
    scatter = jax.jit(lambda waves: _scatter(waves, jnp.array([0.05, 0.02]), sweep) * sweep.propagator)

    @jax.jit
    def gram(waves):
        seen = waves.reshape(len(modes.l), -1)[:, sweep.detected] * sweep.weight
        return _blocks(lambda g: seen[g].conj() @ seen[g].T, modes)

    step, product = (best(lambda f=f: f(sweep.incident).block_until_ready(), runs=1) for f in (scatter, gram))
    print(f"20 atoms, one configuration of the cheap sweep, {len(modes.l)} modes on {sweep.incident.shape[1]}^2 points, {threads} thread(s):")
    print(f"  {step:.2f} s through an atom, {product:.2f} s for a Gram matrix (both measured at one atom)")
    print(f"  1 to 20 atoms {20 * (step + product):.1f} s, 20 atoms alone {20 * step + product:.1f} s: {20 * (step + product) / (20 * step + product):.2f} times")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, choices=[*PARTS, []])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--here", action="store_true", help="run in this process")
    options = parser.parse_args()
    for part in options.parts:
        if options.here:
            globals()[part](options.threads)
            print(f"  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB", flush=True)
        else:
            subprocess.run([sys.executable, __file__, part, "--threads", str(options.threads), "--here"], check=True)


if __name__ == "__main__":
    main()
