"""One self-contained page that tells what was found, for somebody who has not read the manual."""

import base64
import hashlib
import html
import io as bytes_io
import json
from importlib import resources

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imsave
from scipy.spatial import cKDTree

from . import plotting
from .inference.gaussian_peak import disc_radius
from .reconstruction.columns import central_average
from .reconstruction.counting import expected_confusion
from .reconstruction.drift import shift_images
from .storage import atomic_write


def write_report(path, result) -> None:
    """Write report.html from a `Reconstruction`: figures, data and script inside, all text escaped, nothing fetched, readable without JavaScript."""
    truth_depth = _matched_truth(result)
    data = page_data(result, truth_depth)
    parts = [f"<h1>Depths of {len(result.depth)} columns of {html.escape(result.element)}</h1>"]
    parts += [f'<div class="warning" role="note">{html.escape(w)}</div>' for w in result.warnings]
    parts += [_summary(result, truth_depth), VIEWS, _table(data["quantities"])]
    for title, figure, caption in _figures(result, truth_depth):
        parts.append(f"<h2>{html.escape(title)}</h2><figure>{_image(figure, title)}<figcaption>{caption}</figcaption></figure>")
    parts += [_diagnostics(result), _provenance(result)]
    style, script = (resources.files("depthprob.data").joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"  # runs this script and no other
    encoded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")  # so that no name from a file ends the script element early
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>depthprob report</title><style>{style}</style></head><body>{"".join(parts)}'
        f'<script type="application/json" id="data">{encoded}</script><script>{script}</script></body></html>'
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


VIEWS = """
<noscript><p class="hint">With JavaScript, the map and the particle can be turned and zoomed here, and every column clicked; the figures below show the same.</p></noscript>
<section data-interactive hidden aria-label="Map, particle and single columns">
<p class="hint">Click a column in the map, the particle or the table to see its series. Drag to move or turn, wheel to zoom; with the keyboard: arrows, + and -, 0 for the whole.</p>
<div class="views">
<div class="view"><h3>Map</h3>
<div class="tools"><label>colour <select id="map-colour"></select></label><button type="button" data-for="map" data-key="+" aria-label="zoom in">+</button>
<button type="button" data-for="map" data-key="-" aria-label="zoom out">&minus;</button><button type="button" data-for="map" data-key="0">whole</button></div>
<canvas id="map" tabindex="0" role="img" aria-label="Map of the columns over the average image; the table below lists the same numbers"></canvas><div class="scale" id="map-scale"></div></div>
<div class="view"><h3>Particle</h3>
<div class="tools"><label>colour <select id="model-colour"><option value="depth">depth</option><option value="sd">sd of depth</option><option value="probability">site probability</option></select></label>
<button type="button" data-for="model" data-key="beam">beam view</button><button type="button" data-for="model" data-key="side">side view</button>
<button type="button" data-for="model" data-key="+" aria-label="zoom in">+</button><button type="button" data-for="model" data-key="-" aria-label="zoom out">&minus;</button>
<button type="button" data-for="model" data-key="0">whole</button></div>
<canvas id="model" tabindex="0" role="img" aria-label="Atoms of the particle in three dimensions; an arrow shows the beam"></canvas><div class="scale" id="model-scale"></div></div>
</div>
<div id="column"><header><h3 id="column-title" aria-live="polite"></h3><span><button type="button" id="previous">previous</button> <button type="button" id="next">next</button></span></header>
<svg id="series" role="img" aria-labelledby="column-title"></svg><table id="numbers"></table></div>
<div id="tip" hidden></div>
</section>
"""


def page_data(r, truth) -> dict:
    """What report.js draws: every column's numbers with their units, its series, and the atoms; long arrays as float32 in base64."""
    likely = lambda p: [[int(n) + 1, round(float(p[n]), 4)] for n in np.flatnonzero(p > 5e-4)]
    return {
        "palette": [to_hex(c) for c in colormaps["cividis"].colors],
        "count": len(r.depth),
        "first": int(np.argsort(r.depth_sd)[len(r.depth) // 2]),  # shown until another is chosen: one of median precision
        "disc_A": 0.42 * _neighbour_distance(r.positions),
        "atom_A": 0.42 * _neighbour_distance(r.atoms),
        "quantities": _quantities(r, truth),
        "probability": [likely(p) for p in r.n_probability],
        "defocus": _numbers(r.defocus),
        "variance_per_fraction": _numbers(_variance_per_fraction(r)),
        "series": {"measured": _packed(r.column_series), "gaussian": _packed(r.gaussian_fit_series), "joint": _packed(r.joint_fit_series)},
        "atoms": _packed(np.vstack([r.atoms.T, r.atom_sd[:, 2], r.site_probability, r.column_of_atom])),
        "image": {"src": _grey(r.average_image), "shape": r.average_image.shape, "pixel_A": r.pixel_size},
    }


def _quantities(r, truth):
    """What is known of every column, for table, map and panel; `colour` tells whether the map may be coloured by it."""
    values = [
        # key, label, unit, digits, values, standard deviation, colour
        ("x", "x", "Å", 2, r.positions[:, 0], None, False),
        ("y", "y", "Å", 2, r.positions[:, 1], None, False),
        ("n_atoms", "atoms", "", 0, r.n_atoms, None, True),
        ("depth", "depth, joint fit", "Å", 2, r.depth, r.depth_sd, True),
        ("q05", "5 % quantile", "Å", 2, r.depth_q05, None, False),
        ("q95", "95 % quantile", "Å", 2, r.depth_q95, None, False),
        ("gaussian", "depth, Gaussian peak", "Å", 2, r.gaussian_depth, r.gaussian_depth_sd, True),
        ("truth", "true depth", "Å", 2, truth, None, True),
        ("difference", "joint fit minus Gaussian peak", "Å", 2, r.depth - r.gaussian_depth, None, True),
        ("crlb", "Cramér-Rao bound", "Å", 2, r.crlb, None, True),
        ("lattice", "depth of its crystal plane", "Å", 2, r.lattice_depth, None, True),
        ("plane", "probability of that plane", "", 3, r.lattice_probability, None, True),
        ("cross_section", "scattering cross-section", "Å²", 4, r.cross_section, r.cross_section_sd, True),
        ("fit", "goodness of fit", "sd", 2, r.goodness_of_fit, None, True),
    ]
    return [
        {"key": key, "label": label, "unit": unit, "digits": digits, "values": _numbers(v), "sd": None if sd is None else _numbers(sd), "colour": colour}
        for key, label, unit, digits, v, sd, colour in values
        if v is not None
    ]


def _numbers(values):
    """Six digits of each; None, which JSON knows, for what is not finite."""
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in np.asarray(values, float)]


def _variance_per_fraction(r):
    """Variance of a column's mean intensity over that intensity, for each image, from the Poisson counts of its disc."""
    return 1 / (np.asarray(r.dose) * np.pi * disc_radius(r.positions) ** 2)


def _packed(values):
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def _neighbour_distance(points):
    """Median distance to the nearest other point; 3 for a single one."""
    return float(np.median(cKDTree(points).query(points, k=2)[0][:, 1])) if len(points) > 1 else 3.0


def _grey(image):
    buffer = bytes_io.BytesIO()
    imsave(buffer, image, cmap="gray", format="png")
    return _data_url(buffer)


def _data_url(buffer):
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


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
    if np.any(r.superposition_shift):
        text += f" Neighbouring columns in each other's beam move depths by {rms(r.superposition_shift):.2f} Å rms and {np.max(np.abs(r.superposition_shift)):.2f} Å at most; the depths here are corrected for it."
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
    fraction = r.stack / (np.asarray(r.dose)[:, None, None] * r.pixel_size**2)
    chosen = central_average(fraction, r.defocus)[1]
    images = fraction[chosen]
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    *pictures, residuals = figure.subplots(1, 4)
    plotting.plot_drift_correction(pictures, images.mean(0), shift_images(images, -r.drift_px[chosen]).mean(0), r.pixel_size)
    plotting.plot_drift(residuals, r.defocus, r.drift_start_px - r.drift_px, r.drift_sd_px)
    residuals.set(ylabel="start minus joint fit (pixels)", title="residual of the start")
    yield "Drift correction", figure, (
        f"Average of the {len(chosen)} sharpest images as they came and with their drift taken back (a picture only: the fit moves the model, not the data), and the "
        "difference. Right: by how much the shifts that the joint fit started from, by phase correlation or from a file, missed what it found; bands are its standard deviation."
    )
    if r.distortion is not None and r.distortion_sd is not None:
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        plotting.plot_distortion(figure.subplots(), r.defocus, r.distortion, r.distortion_sd)
        half = max(r.stack.shape[1:]) * r.pixel_size / 2
        yield "Distortion of the scan", figure, (
            f"How each image is stretched and sheared against the mean of all: displacement along x or y by distance in x or y from the middle of the field. Root mean square "
            f"{100 * np.sqrt(np.mean(r.distortion**2)):.2f} %, or {half * np.sqrt(np.mean(r.distortion**2)):.2f} Å at the edges of the field. What all images have in common is in the columns' positions."
        )
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    a, b, c = figure.subplots(1, 3)
    plotting.plot_cross_sections(a, r.cross_section, r.library_cross_section, r.hybrid.components)
    plotting.plot_icl(b, r.mixture.icl)
    plotting.plot_confusion(c, expected_confusion(r.n_atoms, r.n_probability))
    yield "Counting", figure, (
        "Left: scattering cross-sections of the columns; dashed lines are the simulated library's for 1, 2, 3 … atoms, curves a mixture whose components stay with the library. "
        "Middle: how many groups a Gaussian mixture needs without any simulation; its smallest ICL is marked. "
        "Right: how often each count is expected to be wrong, by the counts' own probabilities. "
        f"The mixture that stays with the library would count {int(np.sum(r.hybrid.n != r.n_atoms))} columns otherwise (n_atoms_hybrid in columns.csv)."
    )
    c = int(np.argsort(r.depth_sd)[len(r.depth_sd) // 2])
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    title = f"column {c}: {r.n_atoms[c]} atoms, depth {r.depth[c]:.2f} ± {r.depth_sd[c]:.2f} Å"
    plotting.plot_column_series(figure.subplots(), r.defocus, r.column_series[c], r.gaussian_fit_series[c], r.joint_fit_series[c], title, np.sqrt(np.maximum(r.column_series[c], 0) * _variance_per_fraction(r)))
    yield "One column through focus", figure, (
        "Intensity averaged around a column of median precision. The Gaussian's peak, corrected by simulation, is the classical estimate; "
        "the joint fit explains all pixels of all images with all columns at once, so it also follows the neighbours' blurred light."
    )
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    limits = (np.nanmin(r.depth), np.nanmax(r.depth))
    size = float(np.clip(9000 / len(r.depth), 4, 320))
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
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    axes = figure.subplot_mosaic([["top", "bottom"], ["thickness", "solid"]], per_subplot_kw={"solid": {"projection": "3d"}})
    maps = {"top": (r.ends.top, r.ends.top_sd), "bottom": (r.ends.bottom, r.ends.bottom_sd), "thickness": (r.ends.thickness, r.ends.thickness_sd)}
    for name, (value, sd) in maps.items():
        drawn = plotting.plot_depth_map(axes[name], r.positions, value, sd, (value.min(), value.max()), size)
        figure.colorbar(drawn, ax=axes[name], label="from first to last atom (Å)" if name == "thickness" else f"z of the {name} atom (Å)")
    solid = plotting.plot_surfaces(axes["solid"], r.positions, r.ends)
    if solid is not None:
        figure.colorbar(solid, ax=axes["solid"], label="sd (Å)", shrink=0.7, pad=0.15)
    yield "Top and bottom surface", figure, html.escape(_surface_text(r.surface))


def _surface_text(s):
    facets = "; ".join(
        f"{'top' if f.is_top else 'bottom'} ({' '.join(str(i) for i in f.hkl)}) of {len(f.columns)} columns, {f.area:.0f} Å², the plane fitted to measured depths "
        f"{f.misfit:.1f}° off (sd {f.normal_sd:.1f}°)"
        for f in s.facets[:6]
    )
    return (
        "First and last atom of every column, by its measured depth and number of atoms; the number in each disc is the standard deviation in Å, as are colours and bars of the last panel. "
        f"Volume {s.volume:.0f} ± {s.volume_sd:.0f} Å³ (convex hull of the centres: {s.hull_volume:.0f} Å³); {int(np.sum(s.coordination < s.bulk_coordination))} of {len(s.coordination)} "
        f"atoms have fewer neighbours than the {s.bulk_coordination} of the crystal. Facets: {facets or 'none of four columns or more'}. All of them are in surface.json."
    )


def _image(figure, title):
    buffer = bytes_io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="{html.escape(title)}" src="{_data_url(buffer)}">'


def _diagnostics(r):
    rows = "".join(f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(_short(v))}</td></tr>" for k, v in r.diagnostics.items() if k != "stages")
    stages = "".join(f"<tr><td>{html.escape(k)}</td><td>{v:.1f} s</td></tr>" for k, v in r.diagnostics.get("stages", {}).items())
    note = "R-hat under 1.01 and no divergences mean that the chains agree; ess is the effective number of independent draws."
    return f"<h2>Posterior diagnostics</h2><table>{rows}</table><p>{note}</p><details><summary>Time by stage</summary><table>{stages}</table></details>"


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(quantities, most=300):
    """All columns, sortable, by report.js into #rows; without it the first `most`."""
    count = len(quantities[0]["values"])
    shown = lambda v, digits: "–" if v is None else f"{v:.{digits}f}"
    cell = lambda q, c: shown(q["values"][c], q["digits"]) + (f" ± {shown(q['sd'][c], q['digits'])}" if q["sd"] else "")
    name = lambda q: f"{q['label']} ({q['unit']})" if q["unit"] else q["label"]
    head = "".join(f"<th>{html.escape(name(q))}</th>" for q in quantities)
    rows = "".join(f"<tr><td>{c}</td>{''.join(f'<td>{cell(q, c)}</td>' for q in quantities)}</tr>" for c in range(min(count, most)))
    note = "" if count <= most else f"<p>The first {most} of {count}; columns.csv has all.</p>"
    return (
        f'<h2>Every column in numbers</h2><div data-static><details><summary>Table</summary>{note}<div class="wide"><table><tr><th>column</th>{head}</tr>{rows}</table></div></details></div>'
        '<div data-interactive hidden><p class="tools"><button type="button" id="earlier">earlier</button><span id="pages"></span><button type="button" id="later">later</button>'
        '<span class="hint">A click on a heading sorts, on a row shows the column above.</span></p><div class="wide tall"><table id="rows"></table></div></div>'
        '<p class="hint">Goodness of fit: deviance near the column in standard deviations; above 5 something is wrong.</p>'
    )


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
