"""The `design` command: from a config to the best series of the same total dose."""

from collections.abc import Callable
from itertools import pairwise

import jax.numpy as jnp
import numpy as np

from ..config import Config
from ..errors import InputError
from ..inference.design import (
    CLEAR,
    Columns,
    Plan,
    RadialSignals,
    Space,
    depth_variances,
    further_gain,
    image_information,
    merge_images,
    optimise,
    radial_signals,
    ring_sensitivity,
    with_kept,
)
from .libraries import column_geometry, microscope_of
from .simulate import columns_of_structure

Z_STEP = 8.0  # Å; half of it changes the bound by less than 0.1 %
RING = 1.1  # outer over inner angle, of the rings that signals are recorded on while detector edges are sought; an edge within one takes its share, which moves bounds by up to 2 %
NARROWEST = 15.0  # annulus [mrad]
FEWEST = 1e-3  # of the dose; images below it are dropped
MODEL = (
    "isolated columns, thermal motion averaged in closed form, each by itself: neighbours' tails are not in the bound (those of `crlb` with specimen.structure_file have them). "
    "Positions and image shifts cost an isolated column nothing. Pixels are taken to be fine (below wavelength / 4 convergence angle); pixel size then plays no part at a given dose per area"
)


def design_series(config: Config, progress: Callable = lambda items, **_: items) -> dict:
    """Best foci, doses and angles within the ranges of [design], with the gain over the config's own series and the landscape around.

    Raises
    ------
    InputError
        For ranges that leave no room or nothing better than the given series, several annuli to start from, a measured sensitivity, tilt, or aberrations that are not round.
    """
    wanted, settings, microscope = config.design, config.focal_series, microscope_of(config)
    if any(config.specimen.tilt_mrad) or config.detector.sensitivity is not None:
        raise InputError(
            f"specimen.tilt_mrad is {list(config.specimen.tilt_mrad)} and detector.sensitivity is {config.detector.sensitivity!r}; design follows upright "
            "columns and annuli of unit sensitivity alone. Leave both out."
        )
    if len(config.detector.inner) > 1:
        raise InputError(
            f"detector.inner_mrad is {list(config.detector.inner)}; design starts from one annulus, since it counts annuli separately and the config adds "
            "them up. Give two numbers, and design.annuli for how many may be recorded at once."
        )
    given = wanted.columns or ((config.specimen.n_atoms, 0.0),)
    if not wanted.columns and config.specimen.structure_file:
        found = columns_of_structure(config)
        given = tuple(zip(found.n_atoms, found.depths, strict=True))
    pairs = [(int(n), float(z) + d) for n, z in given for d in {-wanted.depth_range_A, 0.0, wanted.depth_range_A}]
    n_atoms, kind = np.unique([n for n, _ in pairs], return_inverse=True)
    columns = Columns(kind, np.array([z for _, z in pairs]))
    defocus = settings.defocus
    room = wanted.defocus_range_A or (float(defocus.min()), float(defocus.max()))
    if "defocus" in wanted.vary and (room[0] > defocus.min() or room[1] < defocus.max() or room[0] == room[1]):
        raise InputError(f"design.defocus_range_A is {list(room)}; allowed is a range that holds the foci of [focal_series], {defocus.min():g} to {defocus.max():g} Å.")
    own_angle = config.microscope.convergence_angle_mrad
    vary_angle = "convergence_angle" in wanted.vary
    angles = wanted.convergence_angle_range_mrad if vary_angle else (own_angle, own_angle)
    inner, outer = float(config.detector.inner[0]), float(config.detector.outer[0])
    if inner < CLEAR * own_angle:
        raise InputError(
            f"detector.inner_mrad is {inner:g} and microscope.convergence_angle_mrad {own_angle:g}: the direct beam falls on the detector. Allowed is an inner angle from {CLEAR * own_angle:.4g} mrad on."
        )
    if vary_angle and "detector" not in wanted.vary:
        if inner <= CLEAR * angles[0]:
            raise InputError(
                f"design.convergence_angle_range_mrad begins at {angles[0]:g} mrad and the detector, which does not vary, at {inner:g}: the direct beam falls on it. "
                f'Allowed are angles below {inner / CLEAR:.4g} mrad, or "detector" in design.vary.'
            )
        angles = (angles[0], min(angles[1], inner / CLEAR))
    largest = max(angles[1], own_angle)
    dose = np.broadcast_to(np.asarray(settings.dose, float), defocus.shape).copy()
    share = wanted.spread_share if "dose" in wanted.vary else 0.0
    space = Space(wanted.vary, room, angles, wanted.detector_range_mrad, defocus[: len(defocus) if share else 0], share * dose[: len(dose) if share else 0])
    if "detector" in wanted.vary and space.clearance * angles[1] > wanted.detector_range_mrad[1] - NARROWEST:
        raise InputError(f"design.convergence_angle_range_mrad reaches {angles[1]:g} mrad and design.detector_range_mrad ends at {wanted.detector_range_mrad[1]:g}; no annulus fits between. Raise the latter.")
    farthest = max(abs(f - z) for f in (*room, *defocus) for z in columns.depth)
    spacing = column_geometry(config).spacing
    signals_on = lambda edges: radial_signals(
        config.specimen.element, spacing, config.specimen.debye_waller_b, tuple(n_atoms.tolist()), microscope, largest, tuple(edges),
        farthest, settings.field_of_view_A, config.simulation.parametrization, progress,
    )
    begin = max(wanted.detector_range_mrad[0], space.clearance * min(angles[0], own_angle))
    signals = signals_on(_ring_edges((begin, wanted.detector_range_mrad[1]), inner, outer) if "detector" in wanted.vary else (inner, outer))
    z_grid = np.arange(-farthest - 2 * Z_STEP, farthest + 3 * Z_STEP, Z_STEP)
    nuisances = tuple(n for n in wanted.nuisances)
    start = Plan(defocus, dose, np.array(own_angle), np.array([inner, outer]))
    seeded = start._replace(annuli=np.linspace(inner, outer, wanted.annuli + 1)) if "detector" in wanted.vary else start

    def bound(plan: Plan) -> np.ndarray:
        """Of each column [Å]; not a number where the direct beam would fall on the detector."""
        if plan.annuli[0] < CLEAR * float(plan.angle):
            return np.full(len(columns.kind), np.nan)
        return np.sqrt(np.asarray(depth_variances(Plan(*map(jnp.asarray, plan)), signals, columns, nuisances, jnp.asarray(z_grid))))

    score = lambda sd: float(np.sqrt(np.mean(sd**2)) if wanted.goal == "mean" else sd.max())

    plan, history = seeded._replace(dose=(1 - share) * dose), np.array([])
    if {"convergence_angle", "detector"} & set(wanted.vary):
        plan, history = optimise(plan, space, signals, columns, nuisances, wanted.goal, z_grid, wanted.steps, progress=progress)
    inners = np.zeros(0)
    if "detector" in wanted.vary:  # its edges are known
        low = max(space.detector[0], space.clearance * float(plan.angle))
        inners = np.linspace(low, min(plan.annuli[1] - NARROWEST / 3, low + 60), 9)
        signals = signals_on(np.unique([inner, outer, *plan.annuli, *inners]))
    timing = tuple(v for v in wanted.vary if v in ("defocus", "dose"))
    if timing:
        plan, polish = optimise(plan, space._replace(vary=timing), signals, columns, nuisances, wanted.goal, z_grid, 10 * wanted.steps, progress=progress)
        history = np.append(history, polish)
    if "defocus" in wanted.vary:
        plan = merge_images(plan, wanted.join_foci_closer_than_A, FEWEST)
    images, plan = plan, Plan(*map(np.asarray, with_kept(plan, space)))
    before, after = bound(start), bound(plan)
    if score(after) > score(before):
        raise InputError(
            f"within the ranges of [design] and {wanted.steps} steps nothing was found that is better than the given series: {score(after):.4g} Å beside {score(before):.4g} Å. Ranges that leave out the "
            "given foci or angles, and few steps, are the likely causes; widen design.defocus_range_A, convergence_angle_range_mrad or detector_range_mrad, or raise design.steps."
        )
    gain = (score(before) / score(after)) ** 2
    foci = np.linspace(*room, 81)
    return {
        "goal": f"{wanted.goal} over {len(given)} columns, each at its depth and {wanted.depth_range_A:g} A above and below",
        "total_dose_e_per_A2": float(dose.sum()),
        "given": _described(start, before, score),
        "best": _described(plan, after, score),
        "gain_in_dose": gain,
        "dose_for_the_given_precision_e_per_A2": float(dose.sum() / gain),
        "target_depth_sd_A": wanted.target_depth_sd_A,
        "total_dose_for_target_e_per_A2": {
            "given": float(dose.sum() * (score(before) / wanted.target_depth_sd_A) ** 2),
            "best": float(dose.sum() * (score(after) / wanted.target_depth_sd_A) ** 2),
        },
        "further_gain_in_dose_at_most": further_gain(images, signals, columns, nuisances, z_grid, foci) if wanted.goal == "mean" and "focus_step" not in nuisances else None,
        "spread_share": share,
        "depth_sd_by_step_A": history,
        "landscape": _landscape(start, plan, images, space, signals, columns, nuisances, z_grid, foci, inners, timing, wanted, bound, score, progress),
        "nuisances": list(nuisances),
        "model": MODEL,
        "caution": (
            "The bound is local: a single focus would also fit a column on the other side of it. The share of the dose spread over the given foci is there to "
            "tell the two apart, for drift, atom counts and goodness of fit; it costs at most that share."
        ),
    }


def _ring_edges(room: tuple[float, float], *own: float) -> tuple[float, ...]:
    """Edges of rings over the range, the config's own detector angles among them [mrad]: each `RING` times the one before, since most of what is recorded is so near the beam."""
    fixed = sorted({*room, *own})
    edges = [fixed[0]]
    for a, b in pairwise(fixed):
        edges += np.geomspace(a, b, max(1, round(np.log(b / a) / np.log(RING))) + 1)[1:].tolist()
    return tuple(edges)


def _described(plan: Plan, sd: np.ndarray, score) -> dict:
    return {
        "depth_sd_A": score(sd),
        "depth_sd_by_column_A": sd,
        "defocus_A": np.asarray(plan.defocus),
        "dose_e_per_A2": np.asarray(plan.dose),
        "convergence_angle_mrad": float(plan.angle),
        "detector_edges_mrad": np.asarray(plan.annuli),
    }


def _landscape(start, plan, images, space, signals: RadialSignals, columns, nuisances, z_grid, foci, inners, timing, wanted, bound, score, progress) -> dict:
    """Bounds around the plan: by convergence angle, by inner detector angle, and what an image at each focus is worth."""
    found = {}
    if "convergence_angle" in wanted.vary:
        angles = np.linspace(*space.angle, 9)
        kept, again = [], []
        for angle in progress(angles, desc="angles", unit="angle"):
            there = [p._replace(angle=np.array(angle)) for p in (start, plan)]
            kept.append(score(bound(there[0])))
            if timing and plan.annuli[0] >= CLEAR * angle:
                again_images, _ = optimise(images._replace(angle=np.array(angle)), space._replace(vary=timing), signals, columns, nuisances, wanted.goal, z_grid, wanted.steps)
                there[1] = with_kept(again_images, space)
            again.append(score(bound(there[1])))
        found["convergence_angle"] = {"angle_mrad": angles, "depth_sd_of_given_foci_A": kept, "depth_sd_of_best_foci_and_detector_A": again}
    if len(inners):
        found["detector"] = {"inner_mrad": inners, "depth_sd_A": [score(bound(plan._replace(annuli=np.append(a, plan.annuli[1:])))) for a in inners]}
    worth = {}
    for name, p in (("given", start), ("best", plan)):
        table = image_information(signals, jnp.asarray(p.angle), ring_sensitivity(jnp.asarray(p.annuli), signals.edges), jnp.asarray(foci), nuisances)
        worth[name] = np.asarray(table[:, :, 0, 0]).mean(0)
    found["information"] = {"defocus_minus_depth_A": foci, "per_e_per_A2": worth}
    return found
