"""One self-contained page that tells what was found, for somebody who has not read the manual."""

import base64
import html
import io as bytes_io
import json

import numpy as np
from matplotlib.figure import Figure

from . import plotting
from .storage import atomic_write

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.6em} h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #ddd}
img{max-width:100%} figure{margin:1em 0} figcaption{color:#444;font-size:.92em}
.warning{background:#fff4e0;border-left:5px solid #d55e00;padding:.6em 1em;margin:.5em 0}
.good{background:#eaf6f1;border-left:5px solid #009e73;padding:.6em 1em}
table{border-collapse:collapse;font-size:.85em} td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #eee}
pre{background:#f6f6f6;padding:1em;overflow:auto;font-size:.8em}
"""


def write_report(path, result) -> None:
    """Write report.html from a `Reconstruction`; all figures inside, all text escaped."""
    truth_depth = _matched_truth(result)
    parts = [f"<h1>Depths of {len(result.depth)} columns of {html.escape(result.element)}</h1>", _summary(result, truth_depth)]
    parts += [f'<div class="warning">{html.escape(w)}</div>' for w in result.warnings]
    for title, figure, caption in _figures(result, truth_depth):
        parts.append(f"<h2>{html.escape(title)}</h2><figure>{_image(figure, title)}<figcaption>{caption}</figcaption></figure>")
    parts += [_diagnostics(result), _table(result), _provenance(result)]
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>depthprob report</title><style>{STYLE}</style></head><body>{"".join(parts)}</body></html>'
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _summary(r, truth):
    rms = lambda x: float(np.sqrt(np.nanmean(np.square(x))))
    text = (
        f"{len(r.depth)} columns of {r.n_atoms.min()} to {r.n_atoms.max()} atoms, {int(r.n_atoms.sum())} atoms in all, from {len(r.defocus)} images. "
        f"The joint fit places a column in depth with a standard deviation of {np.median(r.depth_sd):.2f} Å (median; "
        f"the Cramér-Rao bound is {np.median(r.crlb):.2f} Å). Depths range over {np.ptp(r.depth):.1f} Å."
    )
    if truth is not None:
        e, g = r.depth - truth, r.gaussian_depth - truth
        e, g = e - np.nanmedian(e), g - np.nanmedian(g)
        text += f" Against the known atoms the error is {rms(e):.2f} Å rms for the joint fit and {rms(g):.2f} Å for Gaussian peaks, after removing the median offset."
    held = ", ".join(r.fixed) or "nothing"
    return f'<p class="good">{html.escape(text)}</p><p>Gauge: {html.escape(r.gauge)}. Held fixed: {html.escape(held)}.</p>'


def _figures(r, truth):
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    plotting.plot_stack(figure.subplots(1, 5), r.stack, r.defocus, r.pixel_size)
    yield "The series", figure, (
        "Counts at five of the foci. Positive defocus is underfocus: the probe then comes to its focus further down the beam, so a column at "
        "larger depth is sharp at larger defocus."
    )
    figure = Figure(figsize=(11, 4), layout="constrained")
    a, b = figure.subplots(1, 2)
    plotting.plot_drift(a, r.defocus, r.drift_px, r.drift_sd_px)
    plotting.plot_counts(b, r.average_image, r.positions, r.n_atoms, r.pixel_size)
    yield "Drift, columns and atom counts", figure, (
        "Left: displacement of the object in each image, as the joint fit found it; bands are one standard deviation. "
        "Right: average of the sharpest images, each column with its number of atoms."
    )
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    a, b = figure.subplots(1, 2)
    plotting.plot_cross_sections(a, r.cross_section, r.library_cross_section)
    plotting.plot_icl(b, r.mixture_icl)
    yield "Counting", figure, (
        "Left: scattering cross-sections of the columns; dashed lines are the simulated library's for 1, 2, 3 … atoms. "
        "Right: how many groups a Gaussian mixture needs without any simulation; its smallest ICL is marked."
    )
    c = int(np.argsort(r.depth_sd)[len(r.depth_sd) // 2])
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    title = f"column {c}: {r.n_atoms[c]} atoms, depth {r.depth[c]:.2f} ± {r.depth_sd[c]:.2f} Å"
    plotting.plot_column_series(figure.subplots(), r.defocus, r.column_series[c], r.gaussian_fit_series[c], r.joint_fit_series[c], title)
    yield "One column through focus", figure, (
        "Intensity averaged around a column of median precision. The Gaussian's peak, corrected by simulation, is the classical estimate; "
        "the joint fit explains all pixels of all images with all columns at once, so it also follows the neighbours' blurred light."
    )
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    limits = (np.nanmin(r.depth), np.nanmax(r.depth))
    size = float(np.clip(5000 / len(r.depth), 4, 220))
    for ax, depth, sd, name in ((axes[0], r.depth, r.depth_sd, "joint fit"), (axes[1], r.gaussian_depth, r.gaussian_depth_sd, "Gaussian peak")):
        drawn = plotting.plot_depth_map(ax, r.positions, depth, sd, limits, size)
        ax.set_title(name)
    figure.colorbar(drawn, ax=axes, label="depth of the column's centre of mass (Å)")
    yield "Depth maps", figure, "Colour is depth along the beam; the number in each disc is the standard deviation in Å."
    figure = Figure(figsize=(11, 4), layout="constrained")
    a, b = figure.subplots(1, 2, width_ratios=(1.6, 1))
    plotting.plot_estimates(a, r.depth, r.depth_sd, r.gaussian_depth, r.gaussian_depth_sd, truth)
    errors = (None, None) if truth is None else (r.depth - truth, r.gaussian_depth - truth)
    plotting.plot_against_bound(b, r.crlb, r.depth_sd, r.gaussian_depth_sd, *errors)
    yield "Estimators and the bound", figure, (
        "Left: both estimates with one standard deviation. Right: standard deviations against the Cramér-Rao bound, the least that any unbiased "
        "estimator can reach with these counts. The Gaussian's bar is its fit's own and knows nothing of the neighbours."
    )
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for ax, angle in zip(figure.subplots(1, 3), (None, 45.0, 90.0), strict=True):
        plotting.plot_particle(ax, r.atoms, r.atom_sd, angle)
    yield "The particle", figure, (
        "Atoms on the planes of the crystal, along the beam and from the side (turned by 45° and 90° about the beam). Each column sits on its most probable plane; "
        f"the mean probability of that choice is {np.nanmean(r.lattice_probability):.3f}."
    )


def _image(figure, title):
    buffer = bytes_io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def _diagnostics(r):
    rows = "".join(f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(_short(v))}</td></tr>" for k, v in r.diagnostics.items() if k != "stages")
    stages = "".join(f"<tr><td>{html.escape(k)}</td><td>{v:.1f} s</td></tr>" for k, v in r.diagnostics.get("stages", {}).items())
    note = "R-hat under 1.01 and no divergences mean that the chains agree; ess is the effective number of independent draws."
    return f"<h2>Posterior diagnostics</h2><table>{rows}</table><p>{note}</p><details><summary>Time by stage</summary><table>{stages}</table></details>"


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(r, most=300):
    names = ("column", "x (Å)", "y (Å)", "atoms", "depth (Å)", "sd (Å)", "bound (Å)", "Gaussian peak (Å)", "its sd (Å)", "on plane", "fit")
    values = np.column_stack([r.positions, r.n_atoms, r.depth, r.depth_sd, r.crlb, r.gaussian_depth, r.gaussian_depth_sd, r.lattice_probability, r.goodness_of_fit])
    rows = "".join(f"<tr><td>{i}</td>" + "".join(f"<td>{v:.0f}</td>" if j == 2 else f"<td>{v:.2f}</td>" for j, v in enumerate(row)) + "</tr>" for i, row in enumerate(values[:most]))
    note = "" if len(values) <= most else f"<p>The first {most} of {len(values)}; columns.csv has all.</p>"
    head = "".join(f"<th>{n}</th>" for n in names)
    return f"<h2>Columns</h2><details><summary>Every column in numbers</summary>{note}<table><tr>{head}</tr>{rows}</table><p>fit: deviance near the column in standard deviations; above 5 something is wrong.</p></details>"


def _provenance(r):
    return f"<h2>Provenance</h2><details><summary>Settings, versions, seeds</summary><pre>{html.escape(json.dumps(r.provenance, indent=1, default=str))}</pre></details>"


def _matched_truth(r):
    """Depth of the true column nearest each found one, or None."""
    if r.truth is None:
        return None
    columns = np.asarray(r.truth.columns)
    found = r.positions - (np.mean(r.positions, axis=0) - np.mean(columns[:, :2], axis=0))
    distance = np.hypot(*(found[:, None] - columns[None, :, :2]).transpose(2, 0, 1))
    return np.where(distance.min(1) < 1.0, columns[distance.argmin(1), 3], np.nan)
