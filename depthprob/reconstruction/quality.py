"""What a user should know before trusting a reconstruction: sentences of warning, from the counts, the fit and its residuals."""

import numpy as np
from scipy.ndimage import convolve
from scipy.stats import binom, poisson

from ..config import Config
from ..inference.goodness import Dispersion
from ..inference.held import Asked
from ..inference.likelihood import Share
from ..physics.electron import wavelength
from ..physics.optics import edge_phase
from .joint import ROUNDS, JointFit
from .lattice import Stretch
from .libraries import UNROUND, microscope_of
from .scan import ScanResiduals
from .superposition import Owed, is_thick

FALSE_ALARM = 1e-6  # chance that a test of the counts calls a sound series in question
DARK = 20.0  # times as bright as a line its neighbours may be: in a band-limited image the flank of a column falls by less from pixel to pixel
EDGE = 20.0  # Å from the end of the foci within which half of a column's peak is missing
WORTH_SAYING = 0.5  # Å of correction
HELD = "beam energy, convergence angle, aberrations, detector angles, Debye-Waller factor, source size, foci"
LEAST_PHASE = 0.3  # rad
LEAST_LEAN = 0.1  # Å that the ends of a column lie aside of its middle, about as far as atoms vibrate
FIRST_ORDER_LEAN = 0.2  # Å likewise, from where a tilt is understated: of 10 mrad that move them by 0.18 Å nine tenths are asked for, of 20 two thirds (tests/benchmarks/wrong_settings.py)
LEAST_STRETCH = 0.01  # of the lattice; particles are strained by less as a whole
LEAST_MOVE = 0.03  # Å, of columns by a distorted scan
MIXED, INDEPENDENT = 1.05, 100  # R-hat of chains that agree, and draws that tell an error bar to 7 %
LEAST_EXPLAINED = 0.5  # of the misfit, by a setting that passes for its cause


def doubts_of_counts(counts: np.ndarray, dose: np.ndarray, pixel_size: float, column_width: float, read_variance: float = 0.0) -> list[str]:
    """Warnings of counts (F, ny, nx) that no series of a particle has: saturated, dead, hot, more than the dose, or the same image twice.

    Parameters
    ----------
    dose : (F,)
        [e/Å^2].
    pixel_size, column_width : float
        [Å]; the width is the standard deviation of the columns on the average image.
    read_variance : float
        Of the read noise [e^2]: counts and it together are taken for Poisson's.
    """
    found = []
    top = counts.max()
    near = counts[counts >= top - max(top + read_variance, 0.0) ** 0.5]
    held = int(np.sum(near == top))
    # values become rarer towards the largest: of those within its Poisson noise it is not the commonest
    if binom.sf(held - 1, len(near), 1 / len(np.unique(near))) < FALSE_ALARM:
        found.append(f"{held} pixels hold the largest value, {top:.4g} e, too many for chance: the detector or its converter saturates. Bright columns are counted and placed wrongly; record with less gain.")
    everywhere, here = dark_lines(counts.sum(0, keepdims=True)), dark_lines(counts)
    if len(dark := everywhere if len(everywhere) else here):
        image, line, axis = dark[0]
        where = "every image" if len(everywhere) else f"image {image}"
        found.append(f"{len(dark)} lines of pixels are dark between bright ones, the first {' yx'[axis]} = {line} of {where}: dead lines of the detector, or a scan that stopped. Crop them off, or leave these images and their foci out.")
    noisy = np.maximum(np.round(counts + read_variance), 0)
    around = convolve(noisy, np.array([[[1.0, 1, 1], [1, 0, 1], [1, 1, 1]]]), mode="nearest")
    hot = np.argwhere(hot_pixels(noisy, around, pixel_size / column_width))
    if len(hot):
        image, y, x = hot[0]
        found.append(f"{len(hot)} pixels stand out of their neighbours as no column does, the first in image {image} at (y, x) = ({y}, {x}) with {counts[image, y, x]:.4g} e: hot pixels or stray radiation. Replace them by their neighbours' mean before anything is fitted.")
    brightest, sent = (noisy + around).max((1, 2)), dose * pixel_size**2  # of squares of nine pixels; in each
    if np.any(poisson.sf(brightest - 1, 9 * (sent + read_variance)) * counts.size < FALSE_ALARM):
        found.append(f"The brightest place holds {((brightest / 9 - read_variance) / sent).max():.2f} times the electrons that the dose sends there: dose, pixel size or detector.gain is wrong.")
    seen: dict[bytes, int] = {}
    is_noisy = np.array_equal(counts, np.round(counts))  # expected counts may be alike above and below focus
    twins = [(seen[key], i) for i, image in enumerate(counts) if is_noisy and seen.setdefault(key := image.tobytes(), i) != i]
    if twins:
        found.append(f"{len(twins)} images are copies of others, the first image {twins[0][1]} of image {twins[0][0]}: one of them has a wrong focus, and the noise of both is counted twice.")
    return found


def dark_lines(counts: np.ndarray) -> np.ndarray:
    """Image, line and axis (1 for rows, 2 for columns) (K, 3) of lines of images (F, ny, nx) whose pixels are all alike and dark, with bright lines on both sides."""
    lines = []
    for axis in (1, 2):
        images = np.moveaxis(counts, axis, 1)
        total, alive = images.sum(2), np.ptp(images, axis=2) > 0
        places = np.arange(total.shape[1])
        before = np.maximum.accumulate(np.where(alive, places, -1), 1)
        after = np.minimum.accumulate(np.where(alive, places, len(places))[:, ::-1], 1)[:, ::-1]
        beside = np.stack([np.take_along_axis(total, np.clip(at, 0, len(places) - 1), 1) for at in (before, after)])
        beside = np.where([before < 0, after == len(places)], np.inf, beside).min(0)
        dark = ~alive & (total < beside / DARK) & (beside / DARK > np.log(total.size / FALSE_ALARM)) & np.isfinite(beside)
        lines += [(image, line, axis) for image, line in np.argwhere(dark)]
    return np.array(lines, int).reshape(-1, 3)


def hot_pixels(counts: np.ndarray, around: np.ndarray, width: float) -> np.ndarray:
    """Pixels (F, ny, nx) that outshine the eight `around` them, together, by twice as much as the middle of a column does, beyond chance.

    Given the sum of a pixel and its neighbours, a Poisson pixel that is r times as bright as their mean holds a binomial share r / (r + 8).
    `width` is the pixel over the standard deviation of a column.
    """
    bell = np.exp(-0.5 * width**2)
    share = 1 / (1 + 2 * (bell + bell**2))
    hot = counts > share * (counts + around)
    hot[hot] = binom.sf(counts[hot] - 1, (counts + around)[hot], share) * counts.size < FALSE_ALARM
    return hot


def doubts_of_images(each: Dispersion, log_gain: np.ndarray, defocus: np.ndarray, config: Config) -> list[str]:
    """Warnings of single images (F,) that the fit of the others does not describe: another field, a wrong focus, no columns.

    What is wrong with the model changes little within the depth of focus, wavelength / angle^2; what is wrong with one image alone does. An
    image is doubted whose excess over Poisson's variance is twice that of every other within this depth of it, by more than chance.
    """
    found = []
    lens = config.microscope
    depth_of_focus = float(wavelength(lens.energy_keV * 1e3)) / (lens.convergence_angle_mrad * 1e-3) ** 2
    near = (abs(defocus[:, None] - defocus) <= depth_of_focus) & ~np.eye(len(defocus), dtype=bool)
    others = np.where(near, each.value, -np.inf).max(1)
    noise = np.hypot(each.sd * np.maximum(each.value, 1), each.sd * np.maximum(others, 1))
    odd = (near.sum(1) >= 2) & (each.value - 1 > 2 * np.maximum(others - 1, 0)) & (each.value - others > 5 * noise)
    if odd.any():
        k = int(np.argmax(np.where(odd, each.value, 0)))
        found.append(
            f"Image {k} does not belong to the others: it scatters about the fit with {each.value[k]:.2f} times Poisson's variance, those next to it in focus with at most {others[k]:.2f}"
            + (f"; likewise {_listed(np.flatnonzero(odd & (np.arange(len(odd)) != k)))}" if odd.sum() > 1 else "")
            + ". Another field, a wrong focus or damage: look at it, and leave it and its focus out."
        )
    brightness = np.exp(log_gain - np.median(log_gain))
    faint = np.flatnonzero((brightness < 0.5) | (brightness > 2))
    if len(faint):
        found.append(f"Columns in {_listed(faint, 'image')} are {brightness[faint[0]]:.2f} times as bright as in the others: no particle there, a blanked beam, or another dose.")
    return found


def doubts_of_scan(scan: ScanResiduals, shape: tuple[int, int], pixel_size: float) -> list[str]:
    """Warnings of a scan that distorts images of `shape` pixels (y, x) of `pixel_size` [Å] against each other, or displaces their lines."""
    found, half = [], max(shape) * pixel_size / 2
    along, other = np.argmax(scan.lines), np.argmin(scan.lines)
    jitter = float(scan.lines[along])
    jitters = jitter**2 > 5 * scan.lines_noise[along] ** 2 and jitter > 2 * scan.lines[other] and jitter > LEAST_MOVE
    # lines that jitter by s shear an image of m by s sqrt(12 / m) / height, and a particle smaller than it by more
    of_lines = 3 * jitters * jitter * (12 / shape[along]) ** 0.5 / (shape[along] * pixel_size)
    if scan.distortion**2 > 5 * scan.distortion_noise**2 and scan.distortion > of_lines and scan.distortion * half > LEAST_MOVE:
        found.append(f"Images are stretched and sheared against each other by {100 * scan.distortion:.2f} % (root mean square), which moves columns at the edges of the field by {scan.distortion * half:.2f} Å: drift while they were scanned. Add \"image_distortions\" to inference.free.")
    if jitters:
        found.append(f"Lines along {'xy'[along]} are displaced against each other by {jitter:.2f} Å (root mean square; across them {scan.lines[other]:.2f} Å): the scan jitters. No model here follows it: it widens columns along {'xy'[along]} and makes error bars too small.")
    return found


def doubts_of_lattice(stretch: Stretch | None, spacing: float) -> list[str]:
    """A warning of a lattice on the images that is not the crystal's: of another size, or stretched."""
    if stretch is None:
        return []
    size, uneven, found = (stretch.most * stretch.least) ** 0.5, stretch.most / stretch.least, []
    if abs(size - 1) > max(LEAST_STRETCH, 5 * stretch.sd):
        found.append(f"The columns' lattice is {size:.3f} ± {stretch.sd:.3f} times as large as the crystal's: pixel_size_A or lattice_constant_A is wrong, and depths of atoms, {spacing:.2f} Å apart here, with the latter.")
    if uneven - 1 > max(LEAST_STRETCH, 5 * stretch.sd):
        found.append(f"The columns' lattice is {uneven:.3f} ± {stretch.sd:.3f} times longer at {stretch.direction:.0f}° from x towards y than across, against the crystal's: a scan that distorts all images alike, or strain. Depths are as they are, but x and y of columns and atoms hold it.")
    return found


def doubts_of_field(positions: np.ndarray, shifts: np.ndarray, shape: tuple[int, int], pixel_size: float, periodic: bool) -> list[str]:
    """A warning of columns (C, 2) [Å] that the drift (F, 2) [Å] carries out of images of `shape` pixels (y, x)."""
    places = positions[:, None] + shifts
    outside = ((places < 0) | (places > (np.array(shape[::-1]) - 1) * pixel_size)).any(2)
    if periodic or not outside.any():
        return []
    return [f"Drift carries {outside.any(1).sum()} of {len(positions)} columns out of the field, in up to {outside.sum(1).max()} of {len(shifts)} images; as many that are not in the fit may have come in on the other side. Crop the series to what all images show."]


def doubts_of_edges(seen: np.ndarray, defocus: np.ndarray, shape: tuple[int, int], pixel_size: float) -> list[str]:
    """A warning of images (F,) that were left out of the fit, since columns beyond the field of `shape` pixels (y, x) reach nearly all of them."""
    if seen.all():
        return []
    foci, (height, width) = defocus[~seen], np.array(shape) * pixel_size
    named = ", ".join(f"{f:g}" for f in np.sort(foci))
    return [f"{len(foci)} of {len(seen)} images, at defocus {named} Å, were left out: columns beyond the field of {width:.1f} x {height:.1f} Å, where the crystal goes on, reach nearly all of it that far from focus. Take a wider field."]


def doubts_of_depths(depth: np.ndarray, defocus: np.ndarray) -> list[str]:
    """Warnings of depths (C,) beyond the foci (F,) or near their ends [Å]."""
    low, high = float(defocus.min()), float(defocus.max())
    beyond = int(np.sum((depth < low) | (depth > high)))
    edge = int(np.sum((depth < low + EDGE) | (depth > high - EDGE))) - beyond
    found = []
    if beyond:
        found.append(f"{beyond} of {len(depth)} columns lie beyond the foci, at depths of {depth.min():.0f} to {depth.max():.0f} Å for foci of {low:g} to {high:g} Å: the series does not reach them. Record foci on both sides of the particle.")
    if edge:
        found.append(f"{edge} of {len(depth)} columns lie within {EDGE:g} Å of the end of the focus range: their depths hang on half a peak.")
    return found


def doubts_of_thickness(n_atoms: np.ndarray, positions: np.ndarray, spacing: float, angle: float, owed: Owed, refused: Share | None = None) -> list[str]:
    """A warning of columns (C,) too thick for a sum of isolated columns, or corrected by more than their error bars.

    Within a column of thickness t the beam of semi-angle a [mrad] spreads to a t / 2, and what its neighbours, at a distance d, scatter of it is
    missing. Against full multislice, gold along [001], 300 kV, 21 mrad (tests/benchmarks/superposition.py): a column among its eight neighbours is off in depth
    by 0.02 +- 0.02 Å at a t / 2 d = 0.08 (4 atoms), 0.20 +- 0.04 Å at 0.25 (12 atoms, half the bound) and 1.01 +- 0.07 Å at 0.42 (20 atoms, twice the bound).
    `refused` is what share of the correction the residuals hold where it was therefore left out.
    """
    thickness = n_atoms * spacing
    thick = is_thick(n_atoms, positions, spacing, angle)
    if not thick.any():
        return []
    if owed.pairs:
        most = abs(owed.depth).max()
        if most < WORTH_SAYING:
            return []
        text = f"{thick.sum()} of {len(thick)} columns are so thick (up to {thickness.max():.0f} Å) that the beam spreads in them to their neighbours. Depths are corrected for it, by up to {most:.2f} Å; their error bars hold {owed.depth_sd.max():.2f} Å for what the correction may lack. It is proved for gold along [001], of up to 40 atoms."
        thickest = int(is_thick(n_atoms / 2, positions, spacing, angle).sum())
        return [text + f" {thickest} columns are so thick that they scatter some per cent less than alone, as the correction says; of 40 atoms of gold a third of it is an atom." * bool(thickest)]
    if refused is not None:
        found = f"residuals hold {max(refused.value, 0.0):.1f} of what these would take from each other, less than half"
        return [f"{thick.sum()} of {len(thick)} columns are so thick (up to {thickness.max():.0f} Å) that the beam spreads in them to their neighbours, but {found}. A series made as a sum of isolated columns looks like this, and nothing was corrected. If this one is measured, or simulated as a whole, something told is wrong; inference.superposition = \"corrected\" corrects it all the same."]
    limit = thickness[thick].min()
    return [f"{thick.sum()} of {len(thick)} columns are {limit:.0f} Å thick or more (up to {thickness.max():.0f} Å): the beam spreads in them towards their neighbours, and a sum of isolated columns is wrong by as much as the error bars say, which do not know of it."
            + (f" Set inference.superposition = \"corrected\", which may take {np.ceil(owed.seconds / 60):.0f} minutes here." if np.isfinite(owed.seconds) else " Of a tilted crystal or a detector that is not round this cannot be corrected.")]


def _listed(numbers: np.ndarray, word: str = "image") -> str:
    return f"{word}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:12]))}{', ...' * (len(numbers) > 12)}"


def doubts_of_estimators(depth: np.ndarray, gaussian_depth: np.ndarray) -> list[str]:
    """A warning where joint fit and Gaussian peaks (C,) [Å] are far apart."""
    if abs(depth - gaussian_depth)[np.isfinite(gaussian_depth)].max(initial=0) > 15:
        return ["The two estimators differ by more than 15 Å for some columns; look at their series before trusting either."]
    return []


def doubts_of_fit(joint: JointFit, fit_quality: np.ndarray, spread: Dispersion, config: Config) -> list[str]:
    """Warnings of a joint fit with its columns' goodness of fit (C,) and the dispersion of its counts."""
    problem, parameters = joint.problem, joint.estimate.parameters
    n_atoms = np.asarray(problem.n_atoms)
    library_sd, log_gain = np.nanmax(problem.library.depth_error[n_atoms - 1]), float(np.mean(parameters["log_gain"]))
    found = []
    if not joint.settled:
        found.append(f"Atom counts had not settled after {ROUNDS} rounds of counting and fitting.")
    poor = np.flatnonzero(fit_quality > 5)
    if len(poor):
        found.append(f"{len(poor)} of {len(n_atoms)} columns fit badly (goodness of fit above 5 standard deviations): columns {', '.join(map(str, poor[:12]))}.")
    pooled = float(np.nanmean(fit_quality)) * len(n_atoms) ** 0.5
    if np.nanmean(fit_quality) > 0.75 and pooled > 5:
        found.append(f"The fit as a whole is worse than noise allows: goodness of fit {np.nanmean(fit_quality):.2f} on average over columns, {pooled:.0f} standard deviations of that. Check what is held fixed: {HELD}.")
    if config.thermal.model == "absorptive":
        found.append("The absorptive library is brighter than frozen phonons, by 2 to 11 % from three to ten atoms of gold, and its error is not in the error bars: counts and depths are provisional.")
    if config.inference.noise != "over_dispersed" and spread.value > max(1.2, 1 + 5 * spread.sd):
        found.append(f"Counts scatter about the fit with {spread.value:.2f} times Poisson's variance: error bars are too small. See goodness of fit, or set inference.noise = \"over_dispersed\".")
    if spread.value < min(1 / 1.2, 1 - 5 * spread.sd):
        found.append(f"Counts scatter about the fit with only {spread.value:.2f} times Poisson's variance: they are not numbers of electrons, but scaled, averaged, denoised or free of noise. Counts of atoms and error bars cannot be trusted; set signal = \"raw\" with detector.gain and offset, and give unprocessed images.")
    faint = joint.amplitudes.value < 5 * joint.amplitudes.sd
    if faint.any():
        found.append(f"{faint.sum()} of {len(faint)} columns are not five standard deviations brighter than nothing: noise may have passed for columns.")
    most = problem.library.n_max
    brighter = (n_atoms == most) & (joint.amplitudes.value > 1 + 0.5 / most)
    if brighter.any():
        found.append(f"{brighter.sum()} columns are brighter than the library's longest, of {most} atoms, and are counted as that: raise inference.max_atoms, or check the dose.")
    if not joint.estimate.converged:
        found.append("The joint fit had not converged.")
    if abs(joint.amplitudes.value.mean() - 1) > 0.05 or abs(log_gain) > 0.05:
        found.append(f"Intensities are {np.exp(log_gain):.3f} times the library's: check dose, gain and detector angles.")
    if library_sd > 0.1:
        found.append(f"The library's own Monte-Carlo error reaches {library_sd:.2f} Å of depth here; it is included in the error bars. More thermal configurations would lower it.")
    return found


def doubts_of_chains(diagnostics: dict) -> list[str]:
    """Warnings of draws by NUTS that left their path, or that say too little for an error bar; of `Posterior.diagnostics`."""
    found = []
    if lost := diagnostics.get("divergences", 0):
        found.append(f"{lost} draws of NUTS diverged: the posterior has places that it cannot reach, and error bars may be too small. Compare with method = \"laplace\", and leave out parameters that the data hardly tell (inference.free).")
    r_hat, ess = diagnostics.get("r_hat_max", 1.0), diagnostics.get("ess_min", np.inf)
    if r_hat > MIXED or ess < INDEPENDENT:
        draws = diagnostics["samples"] * diagnostics["chains"]
        disagree = f", and chains disagree by an R-hat of up to {r_hat:.2f} (wanted: {MIXED:g})" if np.isfinite(r_hat) else ""
        found.append(f"{draws} draws of NUTS are worth {ess:.0f} independent ones for the parameter that mixes worst{disagree}: its error bar is known to {100 / np.sqrt(2 * ess):.0f} % at best. Raise inference.samples.")
    return found


def doubts_of_settings(tested: dict[str, Asked], config: Config, depth_sd: float, thickness: float) -> list[str]:
    """A warning of held settings that the residuals ask to be others, by five standard deviations and enough to matter to depths; the strongest first.

    What is not round moves depths of isolated columns to second order alone, which a score test does not see: an aberration matters from a phase of `LEAST_PHASE` at
    the aperture's edge in any case, a tilt where it moves the ends of the thickest column, of `thickness` Å, by `LEAST_LEAN`.
    """
    settings = config.microscope
    fwhm = lambda change: max(settings.source_fwhm_A**2 + 8 * np.log(2) * change, 0) ** 0.5
    spread = lambda change: max(settings.focal_spread_A**2 + change, 0) ** 0.5
    words = {
        "focus_step": lambda a: f"focus steps {1 + a.change:.3f} ± {a.sd:.3f} times those given",
        "source_variance": lambda a: f"a source image of {fwhm(a.change):.2f} Å FWHM where {settings.source_fwhm_A:g} is given",
        "convergence_angle": lambda a: f"a convergence angle of {settings.convergence_angle_mrad + a.change:.2f} ± {a.sd:.2f} mrad where {settings.convergence_angle_mrad:g} is given",
        "spherical_aberration": lambda a: f"C3 = {settings.spherical_aberration_mm + a.change * 1e-7:.5f} ± {a.sd * 1e-7:.5f} mm where {settings.spherical_aberration_mm:g} is given",
        "debye_waller_b": lambda a: f"B = {config.specimen.debye_waller_b + a.change:.2f} ± {a.sd:.2f} Å² where {config.specimen.debye_waller_b:g} is given",
        "background": lambda a: f"a background that varies by {100 * a.change:.0f} % over the field, as of a support film (inference.background = \"smooth\"), where a constant one is told",
        "focal_variance": lambda a: f"a focal spread of {spread(a.change):.0f} Å where {settings.focal_spread_A:g} is given",
    }
    lens = microscope_of(config)
    found = []
    for name, a in tested.items():
        moved = np.abs(a.depth_moves).max()
        possible = name in words and (name != "focal_variance" or settings.focal_spread_A > 0 or a.change > 0)
        if possible and abs(a.significance) > 5 and moved > depth_sd / 4:
            found.append((abs(a.significance), words[name](a), moved, a.explained))
    unround = {name: edge_phase(lens, n) / LEAST_PHASE for name, (n, _) in UNROUND.items()} | {"tilt": 1e-3 * thickness / 2 / LEAST_LEAN}
    for name, matters in unround.items():
        if f"{name}_a" in tested:
            a, b = tested[f"{name}_a"], tested[f"{name}_b"]
            amount, significance, moved = np.hypot(a.change, b.change), np.hypot(a.significance, b.significance), np.abs(a.depth_moves + b.depth_moves).max()
            if significance > 5 and (moved > depth_sd / 4 or amount * matters > 1):
                sd = np.hypot(a.change * a.sd, b.change * b.sd) / amount
                more = " (and more: this test, to first order, understates a tilt so large, and what it does to depths)" * bool(amount * matters * LEAST_LEAN > FIRST_ORDER_LEAN)
                asked_for = (
                    f"a crystal tilted by {a.change:.1f} ± {a.sd:.1f} mrad along x and {b.change:.1f} ± {b.sd:.1f} along y{more} where none is given"
                    if name == "tilt"
                    else f"{name} = {amount:.1f} ± {sd:.1f} Å at {np.degrees(np.arctan2(b.change, a.change)) / UNROUND[name][1]:.0f}° where none is given"
                )
                found.append((significance, asked_for, moved, min(1.0, a.explained + b.explained)))
    if not found:
        return []
    found = sorted(found, key=lambda one: -one[0])
    each = [f"{asked_for} ({significance:.0f} standard deviations; depths would move by up to {moved:.1f} Å)" for significance, asked_for, moved, _ in found]
    explained = found[0][3]
    text = f"The residuals ask for {'; or, less well, for '.join(each)}."
    if len(found) > 1:
        text += f" Until it is known which of them is wrong, depths are not to be trusted within {max(moved for _, _, moved, _ in found):.1f} Å."
    return [text + f" But the first explains {explained:.0%} of the misfit alone: the cause is another, or more than this test to first order can follow." * (explained < LEAST_EXPLAINED)]
