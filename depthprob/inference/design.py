"""Experiments designed by gradient: which foci, dose split, convergence angle and detector give the best column depths.

The Poisson information of a series on the depth of an isolated column is a sum over its images, each a function of defocus minus depth
alone. Thermal motion averaged in closed form (`physics.rings`), that function is an integral over one radius, smooth in the convergence
angle too, so that the bound is differentiable in everything an experimenter sets. With angles fixed the best dose split over any set of
foci is a convex problem, and `further_gain` bounds what any other plan could still reach (Kiefer and Wolfowitz, 1960).

Float64 and complex128 throughout: run under `jax.enable_x64(True)`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from scipy.special import j0, roots_legendre

from ..errors import InputError
from ..physics.column_images import is_round
from ..physics.electron import wavelength
from ..physics.gram import DiscModes, bessel, radial_modes
from ..physics.optics import Microscope, aberration_phase
from ..physics.rings import ring_grams
from ..physics.specimen import Column
from .atoms import information_of
from .fisher import Information, poisson_fisher

CLEAR = 1.05  # times the convergence angle: a detector that begins there is out of the direct beam, whose edge is soft by 2 %
DARKEST = 1e-9  # fraction of the beam per image below which a point holds no electrons
ODD = ("positions", "image_shifts")  # their derivatives are odd about the column, those by depth even: they cost nothing
PER_IMAGE = ("gain", "background")
SHARED = ("focus_step", "source_size")


class RadialSignals(eqx.Module):
    """Images of isolated columns on rings of the detector, as functions of one radius; any convergence angle up to a largest.

    Attributes
    ----------
    channels : list over groups of (column, ring, l, p, p)
        Gram blocks in the modes that matter, of angular momenta with much the same number of them, filled up with zeros; of annuli instead of rings behind `recorded`.
    spectra : list over groups of (l, p, k)
        Those modes' radial parts, with quadrature weight.
    bessels : list over groups of (l, r, k)
        J_l(2 pi r k).
    k, k_weight : (k,)
        [1/Å]; weights of the integral over d^2k.
    r, area : (r,)
        [Å]; weights of the integral over the image [Å^2].
    inside : (r,)
        One within the field of view.
    to_q, from_q, q : (q, r), (r, q), (q,)
        Transform of a radial image and back, 1/Å.
    centre : (column,)
        Centre of mass of each column below the modes' plane [Å].
    edges : (ring + 1,)
        [mrad].
    """

    channels: list
    spectra: list
    bessels: list
    k: Array
    k_weight: Array
    r: Array
    area: Array
    inside: Array
    to_q: Array
    from_q: Array
    q: Array
    centre: Array
    edges: Array
    microscope: Microscope
    focal_spread: float = eqx.field(static=True)


def radial_signals(
    element: str,
    spacing: float,
    debye_waller_b: float,
    n_atoms: tuple[int, ...],
    microscope: Microscope,
    largest_angle: float,
    edges: tuple[float, ...],
    farthest: float,
    field_of_view: float,
    parametrization: str = "lobato",
    progress: Callable = lambda items, **_: items,
    tolerance: float = 1e-6,
) -> RadialSignals:
    """Carry the waves of the largest angle through the longest column once; all else follows.

    Parameters
    ----------
    largest_angle : float
        Convergence semi-angle [mrad] up to which the result holds.
    edges : (ring + 1,)
        Angles between which the detector is cut into rings [mrad]; the direct beam is not recorded where it falls on one.
    farthest : float
        Largest |defocus - depth| [Å].
    field_of_view : float
        Side of the square [Å] whose area the circular field has.
    tolerance : float
        Modes seen with less than this part of the strongest's signal are left out.

    Raises
    ------
    InputError
        For aberrations that are not round.
    """
    _require_round(microscope)
    lam = float(wavelength(microscope.energy))
    longest = Column(element, max(n_atoms), spacing, debye_waller_b)
    aperture = largest_angle * 1.02e-3 / lam
    grams, modes = ring_grams(longest, float(microscope.energy), aperture, edges, parametrization, unscattered=False, progress=progress)
    centre = (np.array(n_atoms) - max(n_atoms)) / 2 * spacing
    return _signals(grams[:, np.array(n_atoms) - 1], modes, centre, microscope, largest_angle, edges, farthest + spacing * max(n_atoms) / 2, field_of_view, tolerance)


def _require_round(lens: Microscope) -> None:
    if not is_round(lens):
        raise InputError(f"aberrations are {', '.join(lens.aberrations)}; design follows round ones only (C3, C50). Leave the others out of [microscope.aberrations].")


def _signals(grams, modes: DiscModes, centre, microscope: Microscope, largest_angle, edges, farthest, field_of_view, tolerance) -> RadialSignals:
    """From Gram blocks (ring, column, l, p, p) in modes that reach 2 % beyond the largest angle."""
    chosen = grams.swapaxes(0, 1)
    aperture = modes.aperture
    depth_of_k = np.pi * float(wavelength(microscope.energy)) * aperture**2 * farthest
    widest = 1e-3 * largest_angle * farthest + 7.0
    k, w_k = _nodes(aperture, int(depth_of_k + 2 * aperture * widest * 2) + 30)
    r, w_r = _nodes(widest, int(4 * aperture * widest * 1.2) + 20)
    q, w_q = _nodes(2 * aperture, int(4 * aperture * widest * 1.2) + 20)
    j_l = bessel(modes.order, 2 * np.pi * np.outer(r, k))
    channels, spectra, bessels = [], [], []
    strongest, largest = abs(chosen).max(), 0
    for l in range(modes.order + 1):
        radial = radial_modes(modes, l, k)
        blocks = chosen[:, :, l, : len(radial), : len(radial)]
        values, vectors = np.linalg.eigh((blocks.conj().swapaxes(2, 3) @ blocks).sum((0, 1)))
        kept = vectors[:, values > (tolerance * strongest) ** 2]
        if not kept.shape[1]:
            continue
        both = 2.0 if l else 1.0  # l and -l
        if 2 * kept.shape[1] <= largest or not channels:  # a group of its own: each is compiled once
            largest = kept.shape[1]
            for kind in (channels, spectra, bessels):
                kind.append([])
        kept = np.pad(kept, [(0, 0), (0, max(0, largest - kept.shape[1]))])
        channels[-1].append(both * np.einsum("pa,crpq,qb->crab", kept.conj(), blocks, kept))
        spectra[-1].append(kept.conj().T @ (radial.conj() * 2 * np.pi * k * w_k))
        bessels[-1].append(j_l[l])
    kernel = j0(2 * np.pi * np.outer(q, r))
    array = lambda a: jnp.asarray(a, float)
    return RadialSignals(
        [jnp.asarray(np.stack(group, 2)) for group in channels], *([jnp.asarray(np.stack(group)) for group in kind] for kind in (spectra, bessels)), array(k), array(2 * np.pi * k * w_k), array(r), array(2 * np.pi * r * w_r),
        array(r <= field_of_view / np.sqrt(np.pi)), array(kernel * 2 * np.pi * r * w_r), array(kernel.T * 2 * np.pi * q * w_q),
        array(q), array(centre), array(edges), microscope, float(microscope.focal_spread),
    )


def _nodes(end: float, n: int):
    x, w = roots_legendre(n)
    return (x + 1) / 2 * end, w / 2 * end


def recorded(signals: RadialSignals, sensitivity: Float[Array, "annulus ring"]) -> RadialSignals:
    """The same with annuli in the place of rings, so that images need not be made ring by ring."""
    seen = lambda part: jnp.einsum("ai,cilpq->calpq", sensitivity, part)  # of real parts: JAX 0.8 warns of a real gradient of complex products
    return dataclasses.replace(signals, channels=[jax.lax.complex(seen(grams.real), seen(grams.imag)) for grams in signals.channels])


def ring_images(signals: RadialSignals, angle: Array, z: Array, source_variance: Array | float) -> Float[Array, "column ring r"]:
    """Fraction of the beam on each ring, for convergence semi-angle `angle` [mrad] and z = defocus - depth [Å].

    The radial form of `physics.column_images`. The aperture's edge falls over some 2 % of its radius, so that the signal is smooth in it.
    """
    lam = wavelength(signals.microscope.energy)
    edge = angle * 1e-3 / lam
    # the edge falls as an error function over four nodes and 2 % of the radius, whichever is wider
    width = jnp.maximum(0.01 * edge, 1.5 * signals.k[-1] / len(signals.k))
    aperture = jax.scipy.stats.norm.cdf((edge - signals.k) / width)
    norm = jnp.sqrt(jnp.pi) * edge  # of the sharp aperture: then waves are its own to second order in the width
    chi = aberration_phase(signals.microscope, signals.k, jnp.zeros_like(signals.k), 0.0)

    def image(z, centre, of_column):
        a = aperture / norm * jnp.exp(-1j * (chi - jnp.pi * lam * signals.k**2 * (z + centre)))
        total = 0.0
        for gram, spectrum, j_l in zip(of_column, signals.spectra, signals.bessels, strict=True):
            sent = spectrum * a
            waves = jax.lax.complex(*(part @ j_l.swapaxes(1, 2) for part in (sent.real, sent.imag)))  # a real matrix need not be made complex
            total = total + jnp.einsum("lpr,ilpq,lqr->ir", waves.conj(), gram, waves).real
        return total

    spread = signals.focal_spread
    nodes, share = np.polynomial.hermite_e.hermegauss(5 if spread else 1)
    sharp = sum(
        s * jax.vmap(partial(image, z + spread * node))(signals.centre, signals.channels)
        for node, s in zip(nodes, share / share.sum(), strict=True)
    )
    blurred = jnp.exp(-2 * jnp.pi**2 * signals.q**2 * source_variance)
    return ((sharp @ signals.to_q.T) * blurred) @ signals.from_q.T


@partial(jax.jit, static_argnames=("nuisances",))
def image_information(
    signals: RadialSignals, angle: Array, sensitivity: Float[Array, "annulus ring"], z: Float[Array, " z"], nuisances: tuple[str, ...]
) -> Float[Array, "column z 2 2"]:
    """Poisson information of one image per e/Å^2 on (depth [1/Å^2], source variance), gain and background of that image profiled out.

    Alania et al. (2017), eq. 8, as an integral over the field. Annuli count separately, each with its own gain and background, and add.
    """
    variance = jnp.asarray(signals.microscope.source_fwhm, float) ** 2 / (8 * np.log(2))
    signals = recorded(signals, sensitivity)
    annuli = partial(ring_images, signals, angle)
    area = signals.area * signals.inside

    def at(z):
        image, by_z = jax.jvp(lambda z: annuli(z, variance), (z,), (jnp.ones_like(z),))
        by_v = jax.jvp(lambda v: annuli(z, v), (variance,), (jnp.ones_like(variance),))[1]
        rows = jnp.stack([-by_z, by_v, image, jnp.ones_like(image)])
        weight = area / jnp.maximum(image, DARKEST)
        full = jnp.einsum("icar,jcar,car->caij", rows, rows, weight)
        own = jnp.array([2 + i for i, name in enumerate(PER_IMAGE) if name in nuisances], int)
        wanted = full[..., :2, :2]
        if len(own):
            cross = full[..., :2, :][..., own]
            scale = jnp.sqrt(jnp.einsum("...ii->...i", full)[..., own])
            inner = full[..., own, :][..., own] / (scale[..., :, None] * scale[..., None, :])
            cross = cross / scale[..., None, :]
            wanted = wanted - cross @ jnp.linalg.solve(inner + 1e-12 * jnp.eye(len(own)), cross.swapaxes(-1, -2))
        return wanted.sum(1)

    return jax.lax.map(at, z).swapaxes(0, 1)


@jax.jit
def _series(signals: RadialSignals, angle: Array, z: Float[Array, " z"], source_variance: Array | float) -> Float[Array, "z ring r"]:
    """`ring_images` of the first column at each z."""
    return jax.lax.map(lambda z: ring_images(signals, angle, z, source_variance)[0], z, batch_size=8)


def atom_bounds_by_angle(
    column: Column,
    lenses: tuple[Microscope, ...],
    angles: Float[np.ndarray, " angle"],
    annuli: Float[np.ndarray, "angle 2"],
    defocus: Float[np.ndarray, " focus"],
    dose: float,
    field_of_view: float,
    parametrization: str = "lobato",
    progress: Callable = lambda items, **_: items,
) -> list[list[Information]]:
    """Information on the depth of a column and of its atoms under each lens (outer list) at each convergence semi-angle, all else known.

    Each angle has a pass of its own, `ring_grams` with exact derivatives, then integrals over one radius: modes of a wider aperture would add up to its edge with an error
    that moves bounds on single atoms by a sixth from 60 to 15 mrad. The aperture's edge is soft, as in `ring_images`.

    Parameters
    ----------
    lenses : tuple of Microscope
        Of one energy, with round aberrations; their own convergence angles do not count.
    angles, annuli
        [mrad]; inner and outer angle of the detector that goes with each.
    dose : float
        Of each image [e/Å^2].
    field_of_view : float
        Side of the square [Å] whose area the circular field has.

    Raises
    ------
    InputError
        Where the direct beam would fall on the detector, and for aberrations that are not round.
    """
    for lens in lenses:
        _require_round(lens)
    angles, annuli, defocus = (np.asarray(a, float) for a in (angles, annuli, defocus))
    for angle, (inner, outer) in zip(angles, annuli, strict=True):
        if inner < CLEAR * angle:
            raise InputError(f"the detector begins at {inner:g} mrad and the aperture ends at {angle:g}: the direct beam falls on it. Allowed is an inner angle from {CLEAR * angle:.4g} on.")
    energy, lam = float(lenses[0].energy), float(wavelength(lenses[0].energy))
    widest_spread = 4 * max(float(lens.focal_spread) for lens in lenses)
    farthest = float(abs(defocus).max()) + widest_spread + column.spacing * column.n_atoms / 2
    ends = np.arange(-1, 2, 2) * (abs(defocus).max() + widest_spread)
    found: list[list[Information]] = [[None] * len(angles) for _ in lenses]
    for angle in progress(np.unique(angles), desc="angles", unit="angle"):
        at, aperture = np.flatnonzero(angles == angle), angle * 1.02e-3 / lam
        edges = tuple(np.unique(annuli[at]).tolist())
        grams, modes = ring_grams(column, energy, aperture, edges, parametrization, derivatives=True, progress=progress)
        step = 0.8 / (aperture**2 * lam)  # Å; an image varies with defocus at no more than wavelength aperture^2 / 2 per Å
        planes = np.linspace(*ends, int(np.ceil(np.ptp(ends) / step)) + 1)
        with jax.enable_x64(True):
            base = _signals(grams, modes, np.zeros(grams.shape[1]), lenses[0], angle, edges, farthest, field_of_view, 1e-8)
            area = np.asarray(base.area * base.inside) * dose
            for i in at:
                seen = recorded(base, ring_sensitivity(jnp.asarray(annuli[i]), base.edges))
                # all entries lie in one plane: waves are made once for the lot of them, in the place of annuli
                together = dataclasses.replace(seen, channels=[grams.swapaxes(0, 1) for grams in seen.channels], centre=base.centre[:1], focal_spread=0.0)
                for lens, rows in zip(lenses, found, strict=True):
                    spread = float(lens.focal_spread)
                    signals = dataclasses.replace(together, microscope=eqx.tree_at(lambda m: m.focal_spread, lens, 0.0))
                    z = planes if spread else defocus
                    weights = np.exp(-(((defocus[:, None] - z) / spread) ** 2) / 2) if spread else np.eye(len(z))
                    values = np.asarray(_series(signals, jnp.asarray(angle), jnp.asarray(z), float(lens.source_fwhm) ** 2 / (8 * np.log(2))))
                    counts = np.einsum("fz,zcr->cfr", weights / weights.sum(1, keepdims=True), values) * area
                    counts[0] = np.maximum(counts[0], DARKEST * area)
                    rows[i] = information_of(poisson_fisher(counts[0], counts[1:]))
    return found


class Columns(NamedTuple):
    """Columns that a plan is for: which of the signals each has (its place in `n_atoms`), and its depth [Å]; (column,) each."""

    kind: np.ndarray
    depth: np.ndarray


class Plan(NamedTuple):
    """What an experimenter sets.

    Attributes
    ----------
    defocus : (image,)
        [Å].
    dose : (image,)
        [e/Å^2].
    angle : scalar
        Convergence semi-angle [mrad].
    annuli : (annulus + 1,)
        Detector angles in increasing order [mrad]; neighbouring annuli share an edge.
    """

    defocus: Array
    dose: Array
    angle: Array
    annuli: Array


def ring_sensitivity(annuli: Float[Array, " edge"], edges: Float[Array, " ring"]) -> Float[Array, "annulus ring"]:
    """Share of each ring that lies in each annulus, so that a detector edge within a ring takes part of it; differentiable."""
    low, high = edges[:-1], edges[1:]
    cover = lambda a, b: jnp.clip((jnp.minimum(b, high) - jnp.maximum(a, low)) / (high - low), 0, 1)
    return jax.vmap(cover)(annuli[:-1], annuli[1:])


@partial(jax.jit, static_argnames="nuisances")
def depth_variances(
    plan: Plan, signals: RadialSignals, columns: Columns, nuisances: tuple[str, ...], z_grid: Float[Array, " z"]
) -> Float[Array, " column"]:
    """Cramér-Rao bound on each column's depth, as a variance [Å^2]; differentiable in the plan.

    The information is computed on `z_grid` (uniform) and read at defocus - depth by cubic interpolation. Columns count by
    themselves: neighbours are neither known nor in the way. Positions and image shifts, odd about an isolated column, cost nothing.
    """
    table = image_information(signals, plan.angle, ring_sensitivity(plan.annuli, signals.edges), z_grid, nuisances)
    return _variances(table, plan.defocus, plan.dose, columns, nuisances, z_grid)


def _variances(table, defocus, dose, columns, nuisances, z_grid):
    z = defocus[None] - jnp.asarray(columns.depth, float)[:, None]
    each = jax.vmap(lambda t, at: _interpolate(t, z_grid, at))(table[jnp.asarray(columns.kind)], z) * dose[None, :, None, None]
    lever = defocus - jnp.sum(dose * defocus) / jnp.sum(dose)
    rows = {"depth": jnp.stack([jnp.ones_like(lever), 0 * lever]), "focus_step": jnp.stack([-lever, 0 * lever]), "source_size": jnp.stack([0 * lever, jnp.ones_like(lever)])}
    chosen = jnp.stack([rows["depth"]] + [rows[name] for name in SHARED if name in nuisances])
    total = jnp.einsum("pif,cfij,qjf->cpq", chosen, each, chosen)
    scale = jnp.sqrt(jnp.einsum("cpp->cp", total))
    inverse = jnp.linalg.inv(total / (scale[:, :, None] * scale[:, None, :]))
    return inverse[:, 0, 0] / scale[:, 0] ** 2


def _interpolate(values: Array, grid: Array, at: Array) -> Array:
    """Catmull-Rom interpolation of values (z, ...) on a uniform grid at points (m,); held constant beyond its ends."""
    step = grid[1] - grid[0]
    t = jnp.clip((at - grid[0]) / step, 1.0, len(grid) - 2.0 - 1e-9)
    i = jnp.floor(t).astype(int)
    u = (t - i).reshape(-1, *(1,) * (values.ndim - 1))
    a, b, c, d = (values[i + j] for j in (-1, 0, 1, 2))
    return b + u / 2 * (c - a + u * (2 * a - 5 * b + 4 * c - d + u * (3 * (b - c) + d - a)))


class Space(NamedTuple):
    """What may vary and how far: foci and angles between bounds; and images taken in any case, beside those that vary."""

    vary: tuple[str, ...]
    defocus: tuple[float, float]
    angle: tuple[float, float]
    detector: tuple[float, float]
    kept_defocus: np.ndarray
    kept_dose: np.ndarray
    clearance: float = 1.15  # of the innermost detector angle over the convergence angle: keep the direct beam off


def optimise(
    start: Plan,
    space: Space,
    signals: RadialSignals,
    columns: Columns,
    nuisances: tuple[str, ...],
    goal: str,
    z_grid: np.ndarray,
    steps: int = 300,
    rate: float = 0.1,
    progress: Callable = lambda items, **_: items,
) -> tuple[Plan, np.ndarray]:
    """Best plan of the same total dose, by Adam through the Fisher information, and the goal [Å] at every step.

    Start and result are the images that vary; `space.kept_defocus` and `kept_dose` come on top (`with_kept`).

    Parameters
    ----------
    goal : {"mean", "worst"}
        Root mean variance of the columns' depths, or their largest.
    """
    n = len(start.defocus)
    middle, half = np.mean(space.defocus), np.ptp(space.defocus) / 2
    total = float(np.sum(start.dose))
    logit = lambda value, low, high: float(np.log((value - low + 1e-9) / (high - value + 1e-9))) if high > low else 0.0
    inside = lambda x, low, high: low + (high - low) * jax.nn.sigmoid(x)
    squeeze = lambda v, low, high: float(np.clip(v, low + 0.02 * (high - low), high - 0.02 * (high - low)))
    free = {}  # strongly typed, or the first steps compile anew
    if "defocus" in space.vary:
        free["defocus"] = jnp.arctanh(jnp.clip((jnp.asarray(start.defocus, float) - middle) / half, -0.98, 0.98))
    if "dose" in space.vary:
        free["dose"] = jnp.log(jnp.asarray(start.dose, float) / total * n)
    if "convergence_angle" in space.vary:
        free["angle"] = jnp.asarray(logit(squeeze(float(start.angle), *space.angle), *space.angle), float)
    if "detector" in space.vary:
        gaps = np.diff([space.detector[0], *np.asarray(start.annuli), space.detector[1]])
        free["gaps"] = jnp.log(jnp.maximum(jnp.asarray(gaps, float), 1.0))

    def plan_of(x):
        angle = inside(x["angle"], *space.angle) if "angle" in x else jnp.asarray(float(start.angle))
        annuli = jnp.asarray(start.annuli, float)
        if "gaps" in x:
            low = jnp.maximum(space.detector[0], space.clearance * angle)
            annuli = low + jnp.cumsum(jax.nn.softmax(x["gaps"]))[:-1] * (space.detector[1] - low)
        return Plan(
            middle + half * jnp.tanh(x["defocus"]) if "defocus" in x else jnp.asarray(start.defocus, float),
            total * jax.nn.softmax(x["dose"]) if "dose" in x else jnp.asarray(start.dose, float),
            angle,
            annuli,
        )

    z_grid = jnp.asarray(z_grid, float)
    fixed_optics = not ({"convergence_angle", "detector"} & set(space.vary))
    table = image_information(signals, jnp.asarray(float(start.angle)), ring_sensitivity(jnp.asarray(start.annuli, float), signals.edges), z_grid, nuisances) if fixed_optics else None

    def score(x):
        plan = with_kept(plan_of(x), space)
        variances = depth_variances(plan, signals, columns, nuisances, z_grid) if table is None else _variances(table, plan.defocus, plan.dose, columns, nuisances, z_grid)
        # the worst as a high power mean, so that its gradient does not jump from one column to another
        return jnp.log(jnp.mean(variances)) / 2 if goal == "mean" else jnp.log(jnp.mean((variances / jnp.max(variances)) ** 16)) / 32 + jnp.log(jnp.max(variances)) / 2

    rule = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(x, state):
        value, gradient = jax.value_and_grad(score)(x)
        updates, state = rule.update(gradient, state)
        return optax.apply_updates(x, updates), state, value

    state, history, best = rule.init(free), [], (np.inf, free)
    for _ in progress(range(steps), desc="design", unit="step"):
        before = free
        free, state, value = step(free, state)
        history.append(float(np.exp(value)))
        if history[-1] < best[0]:
            best = (history[-1], before)
    return jax.tree.map(np.asarray, plan_of(best[1])), np.array(history)


def with_kept(plan: Plan, space: Space) -> Plan:
    """The plan together with the images taken in any case."""
    return plan._replace(
        defocus=jnp.concatenate([jnp.asarray(plan.defocus), jnp.asarray(space.kept_defocus)]),
        dose=jnp.concatenate([jnp.asarray(plan.dose), jnp.asarray(space.kept_dose)]),
    )


def merge_images(plan: Plan, closer_than: float, least: float) -> Plan:
    """The same plan with images closer than `closer_than` Å joined at their mean focus, and shares of dose under `least` given to the rest."""
    order = np.argsort(plan.defocus)
    defocus, dose = np.asarray(plan.defocus)[order], np.asarray(plan.dose)[order]
    groups = [[0]]
    for i in range(1, len(defocus)):
        if defocus[i] - defocus[groups[-1][0]] < closer_than:
            groups[-1].append(i)
        else:
            groups.append([i])
    joined = np.array([(np.average(defocus[g], weights=dose[g]), dose[g].sum()) for g in groups])
    kept = joined[joined[:, 1] >= least * joined[:, 1].sum()]
    return plan._replace(defocus=kept[:, 0], dose=kept[:, 1] * joined[:, 1].sum() / kept[:, 1].sum())


def further_gain(plan: Plan, signals: RadialSignals, columns: Columns, nuisances: tuple[str, ...], z_grid: np.ndarray, foci: np.ndarray) -> float:
    """Largest factor by which any other split of the dose over `foci` could lower the mean variance, angles kept (1: none).

    The mean variance v is convex in the doses and of degree -1: with g(f) = -dv / d(dose at f), no plan of the same dose goes below
    v / (max g * dose / v), Kiefer and Wolfowitz (1960). Exact without `focus_step`, whose lever shifts with the doses.
    """
    z_grid = jnp.asarray(z_grid, float)
    table = image_information(signals, jnp.asarray(plan.angle), ring_sensitivity(jnp.asarray(plan.annuli), signals.edges), z_grid, nuisances)
    everything = jnp.concatenate([jnp.asarray(plan.defocus), jnp.asarray(foci, float)])
    doses = jnp.concatenate([jnp.asarray(plan.dose), jnp.zeros(len(foci))])
    mean = lambda dose: jnp.mean(_variances(table, everything, dose, columns, nuisances, z_grid))
    value, gradient = jax.value_and_grad(mean)(doses)
    return float(jnp.max(-gradient) * jnp.sum(plan.dose) / value)
