"""Exact derivatives of a focal series by depths beside central differences: agreement, effect on the bound, cost, and where differences fail.

    python tests/benchmarks/crlb.py [--atoms 1 2 7] [--phonons] [--abtem]

Ten gold atoms at the paper's Table 1 (300 kV, 21 mrad, 48-180 mrad, 41 foci, 8 Å field, 9612 e/Å^2 per image; pixels of 0.2 Å hold all that 0.1 Å do).
Thermal motion averaged in closed form, double precision; "single" rounds the Gram matrices, from which all images are made, to single precision, the least that
a program working in it loses. Only what lies above a moved atom is computed anew, for derivatives and differences alike; all atoms, the default, take a quarter of an
hour of a processor. With --phonons also one frozen-phonon configuration on either side of the step, each with displacements of its own, as a multislice
program makes it that draws them anew; with --abtem what abtem would take for the paper's 21 simulations of one configuration each, from its time per probe on one thread. "difference" is the largest error of the derivative in % of its peak; "bound" the change of the bound on that one depth, all
else known. Processor seconds.
"""

import argparse
import time

import jax
import numpy as np
from forward_model import abtem_planes, abtem_probes

jax.config.update("jax_enable_x64", True)

import depthprob as dp  # noqa: E402
from depthprob.inference.atoms import _counts, information_of  # noqa: E402
from depthprob.inference.fisher import poisson_fisher  # noqa: E402
from depthprob.physics import thermal  # noqa: E402
from depthprob.physics.electron import wavelength  # noqa: E402
from depthprob.physics.frozen_phonon import thermal_draws  # noqa: E402
from depthprob.physics.gram import default_reach, laguerre_gauss_modes, prepare_sweep, sweep_column  # noqa: E402

N = 10
STEPS_PM = (0.1, 1.0, 10.0, 100.0)
COLUMN = dp.Column("Au", N, 4.08, 0.63)
MICROSCOPE = dp.Microscope(energy=300e3, convergence_angle=21.0, source_fwhm=0.7)
DETECTOR = dp.AnnularDetector(inner=48.0, outer=180.0)
series_at = lambda shift: dp.FocalSeries(np.arange(-200.0, 201.0, 10.0) + shift, 0.2, 9612.0, (41, 41))
SERIES = series_at(0.0)
DEPTHS = (np.arange(N) - (N - 1) / 2) * 4.08


def timed(function):
    start = time.process_time()
    return function(), time.process_time() - start


def seen_from_each(channel):
    """The forms seen from the plane of each atom, that atom and all below it included; top atom first."""
    forms = [channel.gained]
    for _ in range(N - 1):
        forms.insert(0, channel.gained + thermal.scattered(thermal.flown(forms[0], 4.08, channel), channel))
    return forms


def upward(form, atom, channel):
    """A tangent from the plane of atom (0 is the top) to that of the first."""
    for _ in range(atom):
        form = thermal.scattered(thermal.flown(form, 4.08, channel), channel)
    return form


def tangent(atom, forms, channel, modes):
    """Derivative of the Gram blocks by one atom's depth [1/Å]."""
    own = thermal.by_distance(forms[atom], channel)
    if atom + 1 < N:
        own = own - thermal.scattered(thermal.by_distance(thermal.flown(forms[atom + 1], 4.08, channel), channel), channel)
    return thermal._of_top(upward(own, atom, channel), DEPTHS[0], channel, modes)


def with_moved(atom, step, forms, channel, modes):
    """Gram blocks of the column with one atom moved down by `step` [Å]."""
    form = channel.gained
    if atom + 1 < N:
        form = form + thermal.scattered(thermal.flown(forms[atom + 1], 4.08 - step, channel), channel)
    if atom == 0:
        return thermal._of_top(form + np.diag(channel.detected), DEPTHS[0] + step, channel, modes)
    form = channel.gained + thermal.scattered(thermal.flown(form, 4.08 + step, channel), channel)
    for _ in range(atom - 1):
        form = channel.gained + thermal.scattered(thermal.flown(form, 4.08, channel), channel)
    return thermal._of_top(form + np.diag(channel.detected), DEPTHS[0], channel, modes)


def print_row(what, precision, step, derivative, exact, expected, seconds):
    error = 100 * abs(derivative - exact).max() / abs(exact).max()
    bound, true = (poisson_fisher(expected, d[None])[0, 0] ** -0.5 for d in (derivative, exact))
    print(f"{what:10s} {precision:12s} {step:>9s} {error:14.4f} {100 * (bound / true - 1):+10.4f} {seconds:9.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--atoms", type=int, nargs="*", default=list(range(1, N + 1)), metavar="1..10", help="top atom first")
    parser.add_argument("--phonons", action="store_true")
    parser.add_argument("--abtem", action="store_true")
    options = parser.parse_args()
    aperture = 21e-3 / float(wavelength(300e3))
    modes = thermal.incident_disc(COLUMN, 300e3, aperture)
    channel = thermal.prepare_channel(COLUMN, 300e3, aperture, DETECTOR)
    images = lambda grams: _counts(np.stack(grams), modes, COLUMN, MICROSCOPE, SERIES)
    forms, seconds = timed(lambda: seen_from_each(channel))
    whole = forms[0] + np.diag(channel.detected)
    print(f"the series itself: {seconds:.1f} s\n\ndepth of   precision         step   difference %    bound %   seconds")

    # the column as a whole: the derivative by the plane that it stands in
    at = lambda step: thermal._of_top(whole, DEPTHS[0] + step, channel, modes)
    grams, seconds = timed(lambda: [at(0.0), thermal._of_top(thermal.by_distance(whole, channel), DEPTHS[0], channel, modes)])
    expected, of_column = images(grams)
    moving = [("column", of_column, seconds, at)]
    tangents = {}
    for atom in options.atoms:
        tangents[atom], seconds = timed(lambda atom=atom: tangent(atom - 1, forms, channel, modes))
        moving.append((f"atom {atom}", images([tangents[atom]])[0], seconds, lambda step, atom=atom: with_moved(atom - 1, step, forms, channel, modes)))

    by_ten, took = [], np.zeros(2)
    for name, exact, own, moved in moving:
        print_row(name, "exact", "", exact, exact, expected, own)
        for step in STEPS_PM:
            pair, seconds = timed(lambda moved=moved, step=step: [moved(step / 100), moved(-step / 100)])
            difference = lambda pair, step=step: np.subtract(*images(pair)) / (2 * step / 100)
            print_row(name, "double", f"±{step:g} pm", difference(pair), exact, expected, seconds)
            print_row(name, "single", f"±{step:g} pm", difference([g.astype(np.complex64).astype(complex) for g in pair]), exact, expected, seconds)
            if step == 10 and name != "column":
                took += own, seconds
                by_ten.append((exact, *(difference([g.astype(kind).astype(complex) for g in pair]) for kind in (complex, np.complex64))))
    if len(options.atoms) == N:
        print("\nbound on each atom, the others unknown too (nm)")
        for name, derivatives in zip(("exact", "±10 pm, double", "±10 pm, single"), zip(*by_ten, strict=True), strict=True):
            print(f"{name:16s}" + " ".join(f"{sd / 10:7.2f}" for sd in information_of(poisson_fisher(expected, np.array(derivatives))).sd()))
        print(f"\nderivatives by all ten atoms: {took[0]:.0f} s exact, {took[1]:.0f} s by differences of ±10 pm, of which only what lies above the moved atom is computed anew")
    if options.abtem:
        probes = 21 * len(SERIES.defocus) * 81**2
        each = abtem_probes(16.3, 480, 1, 8, abtem_planes(16.3, 480, N))
        print(f"abtem: {1e3 * each:.1f} ms per probe measured, x {probes} probes of 21 series of 81 x 81 points = {each * probes / 3600:.0f} h extrapolated: {each * probes / took[0]:.0f} times the exact derivatives")
    if options.phonons:
        phonons(of_column, expected)


def phonons(exact, expected):
    """The column moved by ±10 pm, with new displacements of all atoms for either side; each averaged over turns and mirrors."""
    reach, aperture = default_reach(COLUMN, 21.0), 21e-3 / float(wavelength(300e3))
    modes = laguerre_gauss_modes(reach, aperture)
    sweep = prepare_sweep(COLUMN, 300e3, aperture, DETECTOR, reach)
    draws = thermal_draws(N, 0.63, 2, 0).astype(np.float32)
    sides, seconds = timed(lambda: [np.asarray(sweep_column(draw, sweep, modes)[-1]) for draw in draws])
    # a column moved down by d is one at rest, seen d further up
    one, other = (_counts(side[None], modes, COLUMN, MICROSCOPE, series_at(shift))[0] for side, shift in zip(sides, (-0.1, 0.1), strict=True))
    print_row("column", "phonons", "±10 pm", (one - other) / 0.2, exact, expected, seconds)


if __name__ == "__main__":
    main()
