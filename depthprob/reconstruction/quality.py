"""What a user should know before trusting a reconstruction: sentences of warning, from the fit and its residuals."""

import numpy as np

from ..config import Config
from ..inference.held import Asked
from ..inference.likelihood import Dispersion
from .joint import JointFit

HELD = "beam energy, convergence angle, aberrations, detector angles, Debye-Waller factor, source size, foci"


def doubts_of_estimators(depth: np.ndarray, gaussian_depth: np.ndarray) -> list[str]:
    """A warning where joint fit and Gaussian peaks (C,) [Å] are far apart."""
    if abs(depth - gaussian_depth)[np.isfinite(gaussian_depth)].max(initial=0) > 15:
        return ["The two estimators differ by more than 15 Å for some columns; look at their series before trusting either."]
    return []


def doubts_of_fit(joint: JointFit, fit_quality: np.ndarray, spread: Dispersion, config: Config) -> list[str]:
    """Warnings of a joint fit with its columns' goodness of fit (C,) and the dispersion of its counts."""
    problem, parameters = joint.problem, joint.estimate.parameters
    n_atoms, depth, defocus = (np.asarray(a) for a in (problem.n_atoms, parameters["depth"], problem.series.defocus))
    library_sd, log_gain = np.nanmax(problem.library.depth_error[n_atoms - 1]), float(np.mean(parameters["log_gain"]))
    found = []
    if not joint.settled:
        found.append("Atom counts had not settled after eight rounds of counting and fitting.")
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
    if not joint.estimate.converged:
        found.append("The joint fit had not converged.")
    if abs(joint.amplitudes.value.mean() - 1) > 0.05 or abs(log_gain) > 0.05:
        found.append(f"Intensities are {np.exp(log_gain):.3f} times the library's: check dose, gain and detector angles.")
    if np.any(depth - defocus.min() < 20) or np.any(defocus.max() - depth < 20):
        found.append("Some columns lie within 20 Å of the end of the focus range: their depths hang on half a peak.")
    if library_sd > 0.1:
        found.append(f"The library's own Monte-Carlo error reaches {library_sd:.2f} Å of depth here; it is included in the error bars. More thermal configurations would lower it.")
    return found


def doubts_of_settings(tested: dict[str, Asked], config: Config, depth_sd: float) -> list[str]:
    """A warning of held settings that the residuals ask to be others, by five standard deviations and enough to matter to depths; the strongest first."""
    lens = config.microscope
    fwhm = lambda change: max(lens.source_fwhm_A**2 + 8 * np.log(2) * change, 0) ** 0.5
    spread = lambda change: max(lens.focal_spread_A**2 + change, 0) ** 0.5
    words = {
        "focus_step": lambda a: f"focus steps {1 + a.change:.3f} ± {a.sd:.3f} times those given",
        "source_variance": lambda a: f"a source image of {fwhm(a.change):.2f} Å FWHM where {lens.source_fwhm_A:g} is given",
        "convergence_angle": lambda a: f"a convergence angle of {lens.convergence_angle_mrad + a.change:.2f} ± {a.sd:.2f} mrad where {lens.convergence_angle_mrad:g} is given",
        "spherical_aberration": lambda a: f"C3 = {lens.spherical_aberration_mm + a.change * 1e-7:.5f} ± {a.sd * 1e-7:.5f} mm where {lens.spherical_aberration_mm:g} is given",
        "focal_variance": lambda a: f"a focal spread of {spread(a.change):.0f} Å where {lens.focal_spread_A:g} is given",
    }
    possible = {name: a for name, a in tested.items() if name != "focal_variance" or lens.focal_spread_A > 0 or a.change > 0}
    sure = [name for name, a in possible.items() if abs(a.significance) > 5 and np.abs(a.depth_moves).max() > depth_sd / 4]
    if not sure:
        return []
    first, *others = sorted(sure, key=lambda name: -abs(tested[name].significance))
    a = tested[first]
    text = f"The residuals ask for {words[first](a)} ({abs(a.significance):.0f} standard deviations; depths would move by up to {np.abs(a.depth_moves).max():.1f} Å)"
    return [text + "".join(f"; or, less well, for {words[name](tested[name])}" for name in others) + "."]
