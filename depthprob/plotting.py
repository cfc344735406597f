"""Figures of a reconstruction, one function per figure, on matplotlib axes."""

import numpy as np
from matplotlib.colors import BoundaryNorm
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.tri import Triangulation
from mpl_toolkits.mplot3d.art3d import Line3DCollection
from scipy.ndimage import rotate
from scipy.stats import binom

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"  # Okabe and Ito's colour-blind safe palette


def _extent(shape, pixel_size):
    ny, nx = shape
    return (-pixel_size / 2, (nx - 0.5) * pixel_size, (ny - 0.5) * pixel_size, -pixel_size / 2)


def plot_image(ax, image, pixel_size, title="", origin=(0.0, 0.0)):
    """An image in grey; `origin` is the place (x, y) of pixel (0, 0) [Å]."""
    left, right, bottom, top = _extent(image.shape, pixel_size)
    ax.imshow(image, cmap="gray", extent=(left + origin[0], right + origin[0], bottom + origin[1], top + origin[1]))
    ax.set(xlabel="x (Å)", ylabel="y (Å)", title=title)


def plot_stack_volume(ax, stack, defocus, pixel_size, column):
    """The drift-corrected stack as a volume cut open in the row of a column (x, y) [Å]: its first image on top, defocus downwards, the column marked.

    Every image has its own grey scale, so that the blurred ones show as well. The top face is drawn slantwise, half as deep as it is wide.
    """
    low, high = stack.min((1, 2), keepdims=True), stack.max((1, 2), keepdims=True)
    stack = (stack - low) / (high - low)
    n_y, n_x = stack.shape[1:]
    row = int(np.clip(round(column[1] / pixel_size), 1, n_y - 1))
    x = (np.arange(n_x + 1) - 0.5) * pixel_size
    y = (np.arange(row + 2) - 0.5) * pixel_size
    step = np.diff(defocus).mean()
    z = np.append(defocus, defocus[-1] + step) - step / 2
    back = y[-1] - y  # behind the cut
    slant_x, slant_z = 0.5, 0.5 * np.ptp(z) / np.ptp(x)  # of axis units for an Å to the back
    shades = {"cmap": "gray", "vmin": 0, "vmax": 1, "rasterized": True}
    ax.pcolormesh(x, z, stack[:, row], **shades)
    ax.pcolormesh(x[None] + slant_x * back[:, None], z[0] - slant_z * back[:, None] + 0 * x, stack[0, : row + 1], **shades)
    side_x, side_z = np.broadcast_arrays(x[-1] + slant_x * back[None], z[:, None] - slant_z * back[None])
    ax.pcolormesh(side_x, side_z, 0.8 * stack[:, : row + 1, -1], **shades)
    ax.plot([column[0]] * 2, [z[0], z[-1]], ":", color=ORANGE, lw=1)
    ax.plot(column[0], z[0], "o", color=ORANGE, ms=5)
    ax.annotate(f"y, {back[0]:.0f} Å", (x[0] + slant_x * back[0] / 2, z[0] - slant_z * back[0] / 2), xytext=(-6, 4), textcoords="offset points", ha="right", fontsize=8)
    ax.set(xlabel="x (Å)", ylabel="defocus (Å): depth in focus", ylim=(z[-1], z[0] - 1.04 * slant_z * back[0]), yticks=np.linspace(defocus[0], defocus[-1], 5))
    ax.spines[["top", "right"]].set_visible(False)


def plot_stack(axes, stack, defocus, pixel_size):
    """The stack at as many foci as there are axes, each on its own grey scale; defocus positive is underfocus."""
    for ax, i in zip(axes, np.linspace(0, len(stack) - 1, len(axes)).round().astype(int), strict=True):
        plot_image(ax, stack[i], pixel_size)
        ax.set_title(f"defocus {defocus[i]:+.0f} Å", fontsize=9)
        if ax is not axes[0]:
            ax.set_ylabel("")


def plot_drift(ax, defocus, drift_px, sd_px):
    """Displacement of the object in every image with one standard deviation."""
    for k, (name, color, style) in enumerate((("x", BLUE, "-"), ("y", ORANGE, "--"))):
        ax.plot(defocus, drift_px[:, k], style, color=color, label=f"along {name}")
        ax.fill_between(defocus, drift_px[:, k] - sd_px, drift_px[:, k] + sd_px, color=color, alpha=0.25, lw=0)
    ax.set(xlabel="defocus (Å)", ylabel="displacement (pixels)")
    ax.legend(frameon=False, fontsize=8)


def plot_distortion(ax, defocus, distortion, sd):
    """Stretch and shear of every image (F, 2, 2) against their mean, in per cent, with one standard deviation."""
    for k, (name, color, style) in enumerate((("x by x", BLUE, "-"), ("x by y", ORANGE, "--"), ("y by x", GREEN, ":"), ("y by y", PURPLE, "-."))):
        value, error = (100 * np.reshape(a, (-1, 4))[:, k] for a in (distortion, sd))
        ax.plot(defocus, value, style, color=color, label=name)
        ax.fill_between(defocus, value - error, value + error, color=color, alpha=0.2, lw=0)
    ax.set(xlabel="defocus (Å)", ylabel="distortion (%)")
    ax.legend(frameon=False, fontsize=8)


def plot_drift_correction(axes, before, after, pixel_size):
    """Averages of the same images as they came and with their drift taken back, on one grey scale, and what that changed."""
    extent = _extent(before.shape, pixel_size)
    limits = {"vmin": min(before.min(), after.min()), "vmax": max(before.max(), after.max())}
    change = after - before
    pictures = ((before, "before", "gray", limits), (after, "after", "gray", limits), (change, "after minus before", "PuOr", {"vmin": -abs(change).max(), "vmax": abs(change).max()}))
    for ax, (image, name, colours, scale) in zip(axes, pictures, strict=True):
        drawn = ax.imshow(image, cmap=colours, extent=extent, **scale)
        ax.set(xlabel="x (Å)", title=name if image is change else f"{name}: sd / mean {image.std() / image.mean():.2f}")
        ax.figure.colorbar(drawn, ax=ax, label="fraction of beam", shrink=0.8)
    axes[0].set_ylabel("y (Å)")


def plot_counts(ax, image, positions, n_atoms, pixel_size):
    """Average of the sharpest images with every column's number of atoms."""
    plot_image(ax, image, pixel_size)
    if len(positions) <= 250:
        for (x, y), n in zip(positions, n_atoms, strict=True):
            ax.text(x, y, str(n), color="#F0E442", ha="center", va="center", fontsize=8, path_effects=[withStroke(linewidth=2, foreground="black")])
    else:
        ax.figure.colorbar(ax.scatter(*positions.T, c=n_atoms, s=3, cmap="viridis"), ax=ax, label="atoms")


def plot_count_map(ax, positions, n_atoms, probability=None, size=120.0):
    """Columns as discs coloured by their number of atoms, ringed where its probability is below 0.95; returns what a colour bar needs."""
    edges = np.arange(n_atoms.min() - 0.5, n_atoms.max() + 1)
    colours = BoundaryNorm(edges, 256)
    drawn = ax.scatter(*positions.T, c=n_atoms, s=size, cmap="viridis", norm=colours)
    if probability is not None:
        ax.scatter(*positions[probability < 0.95].T, s=size, facecolors="none", edgecolors=ORANGE, linewidths=2)
    ax.set(xlabel="x (Å)", ylabel="y (Å)", aspect="equal")
    ax.invert_yaxis()
    return drawn


def plot_cross_sections(ax, cross_section, library, fit=None):
    """Histogram of scattering cross-sections over the library's values, under the `Components` of a fitted mixture."""
    bars, edges, _ = ax.hist(cross_section, bins=min(60, max(12, 2 * len(cross_section))), color=BLUE, alpha=0.5)
    if fit is not None:
        x = np.linspace(min(0, edges[0]), 1.1 * edges[-1], 2000)
        expected = len(cross_section) * (edges[1] - edges[0]) * fit.density(x)
        ax.plot(x, expected, color=GREY, lw=0.7)
        ax.plot(x, expected.sum(1), color="black", lw=1.2, label="fitted mixture")
        ax.legend(framealpha=1, edgecolor="none", fontsize=7)  # over the dashed lines
        ax.set_ylim(0, 1.15 * max(bars.max(), min(expected.sum(1).max(), 2 * bars.max())))
    shown = [(n + 1, v) for n, v in enumerate(library) if v <= 1.1 * cross_section.max()]
    for n, v in shown:
        ax.axvline(v, color=ORANGE, ls="--", lw=0.8)
        if n % -(-len(shown) // 15) == 0:
            ax.text(v, ax.get_ylim()[1], str(n), color=ORANGE, ha="center", va="bottom", fontsize=7)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="scattering cross-section (Å²)", ylabel="columns")


def plot_confusion(ax, confusion):
    """Expected confusion (n_max, n_max) of counts: of the columns counted as so many atoms (row), the share that holds so many (column)."""
    found = np.flatnonzero(confusion.sum(1) > 0)
    first, last = np.flatnonzero(confusion.sum(0) + confusion.sum(1) > 0.05)[[0, -1]]
    share = confusion[found] / confusion[found].sum(1, keepdims=True)
    side = np.arange(len(found))
    ax.imshow(share[:, first : last + 1], cmap="Blues", vmin=0, vmax=1, aspect="auto", extent=(first + 0.5, last + 1.5, len(found) - 0.5, -0.5))
    if len(found) <= 15:
        for row, column in zip(*np.nonzero(share >= 0.005), strict=True):
            ax.text(column + 1, row, f"{100 * share[row, column]:.0f}", ha="center", va="center", fontsize=7, color="white" if share[row, column] > 0.6 else "black")
    wrong = confusion.sum() - np.trace(confusion)
    labels = [f"{n + 1}  ({confusion[n].sum():.0f})" for n in found]
    step = -(-len(found) // 15)
    ax.set_yticks(side[::step], labels[::step], fontsize=7)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="true atoms; shares in %", ylabel="counted atoms (columns)")
    ax.set_title(f"expected wrong: {wrong:.1f} of {confusion.sum():.0f} columns", fontsize=9)


def plot_icl(ax, icl):
    """Integrated classification likelihood criterion against the number of components."""
    k = np.arange(1, len(icl) + 1)
    ax.plot(k, icl, "o-", color=BLUE, ms=3)
    ax.plot(k[np.argmin(icl)], np.min(icl), "s", color=ORANGE)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="number of components", ylabel="ICL")


def plot_column_series(ax, defocus, measured, gaussian, joint, title="", sd=None):
    """One column's mean intensity against defocus, with its standard deviation if given, and both fits."""
    ax.errorbar(defocus, measured, sd, fmt="x", ms=5, lw=1, color=BLUE, label="measured" if sd is None else "measured ± sd")
    ax.plot(defocus, gaussian, "--", color=ORANGE, label="Gaussian peak")
    ax.plot(defocus, joint, "-", color="black", lw=1, label="joint fit")
    ax.set(xlabel="defocus (Å)", ylabel="mean intensity (fraction of beam)", title=title)
    ax.legend(frameon=False, fontsize=8)


def plot_depth_map(ax, positions, depth, sd, limits, size=170.0):
    """Columns as discs coloured by depth; the number in each is its standard deviation in Å."""
    drawn = ax.scatter(*positions.T, c=depth, s=size, cmap="cividis", vmin=limits[0], vmax=limits[1], edgecolors=GREY, linewidths=0.5)
    if len(positions) <= 150:
        for (x, y), d, s in zip(positions, depth, sd, strict=True):
            light = (d - limits[0]) > 0.55 * (limits[1] - limits[0])
            ax.text(x, y, f"{s:.1f}", ha="center", va="center", fontsize=min(7, 0.5 * size**0.5), color="black" if light else "white")
    ax.margins(0.08)
    ax.set(xlabel="x (Å)", ylabel="y (Å)", aspect="equal")
    ax.invert_yaxis()
    return drawn


def plot_estimates(ax, depth, sd, gaussian, gaussian_sd, truth=None):
    """Both estimators column by column, sorted by the joint depth, with one standard deviation."""
    order = np.argsort(depth)
    k = np.arange(len(order))
    ax.errorbar(k - 0.15, gaussian[order], gaussian_sd[order], fmt="s", ms=3, color=ORANGE, lw=0.8, label="Gaussian peak")
    ax.errorbar(k + 0.15, depth[order], sd[order], fmt="o", ms=3, color=BLUE, lw=1, label="joint fit")
    if truth is not None:
        ax.plot(k, truth[order], "_", color="black", ms=9, label="truth")
    room = np.ptp(depth) / 4 + 2
    ax.set(xlabel="column, sorted by depth", ylabel="depth (Å)", ylim=(depth.max() + room, depth.min() - room))
    ax.legend(frameon=False, fontsize=8)


def plot_against_bound(ax, crlb, depth_sd, gaussian_sd, errors=None, gaussian_errors=None):
    """Estimators' standard deviations (and errors, when the truth is known) against the Cramér-Rao bound."""
    ax.plot(crlb, depth_sd, "o", color=BLUE, ms=4, label="joint fit, sd")
    ax.plot(crlb, gaussian_sd, "s", color=ORANGE, ms=3, label="Gaussian peak, sd")
    if errors is not None:
        ax.plot(crlb, abs(errors), "o", mfc="none", color=BLUE, ms=4, label="joint fit, |error|")
        ax.plot(crlb, abs(gaussian_errors), "s", mfc="none", color=ORANGE, ms=3, label="Gaussian peak, |error|")
    bound = np.linspace(0.9 * crlb.min(), 1.1 * crlb.max())
    ax.plot(bound, bound, "-", color="black", lw=0.8, label="bound")
    ax.set(xlabel="Cramér-Rao bound on depth (Å)", ylabel="sd or error (Å)", yscale="log", ylim=(None if errors is None else 0.02, None), xlim=bound[[0, -1]])
    ax.legend(frameon=False, fontsize=7)


def plot_particle(ax, atoms, atom_sd, angle=None, element=""):
    """Atoms seen along the beam (angle None), or from the side after turning the particle about the beam [degrees].

    From the side the beam runs down the page; bars show one standard deviation in depth.
    """
    ax.margins(0.1)
    if angle is None:
        ax.scatter(atoms[:, 0], atoms[:, 1], s=40, color="#E69F00", edgecolors="black", linewidths=0.4)
        ax.set(xlabel="x (Å)", ylabel="y (Å)", aspect="equal", title="along the beam")
        ax.invert_yaxis()
        return
    t = np.radians(angle)
    across = np.cos(t) * atoms[:, 0] + np.sin(t) * atoms[:, 1]
    toward = -np.sin(t) * atoms[:, 0] + np.cos(t) * atoms[:, 1]
    order = np.argsort(-toward)
    shade = (toward - toward.min()) / max(np.ptp(toward), 1e-9)
    ax.scatter(across[order], atoms[order, 2], s=16, c=1 - shade[order], cmap="YlOrBr", vmin=-0.4, vmax=1.4, edgecolors="black", linewidths=0.4)
    ax.errorbar(across, atoms[:, 2], atom_sd[:, 2], fmt="none", ecolor="black", elinewidth=0.6, zorder=3)
    ax.set(xlabel=f"across, turned {angle:.0f}° (Å)", ylabel="z (Å), beam downwards", aspect="equal", title=f"from the side, {angle:.0f}°")
    ax.invert_yaxis()


def plot_surfaces(ax, positions, ends):
    """Top and bottom surface on axes with projection "3d", coloured by standard deviation; bars of one standard deviation at each column.

    Triangles much longer than is usual among these columns are left out, so that gaps stay open. The beam runs down the page. Gives back what a
    colour bar needs, or None for columns that span no surface.
    """
    top = max(ends.top_sd.max(), ends.bottom_sd.max())
    drawn = None
    for z, sd, light in ((ends.top, ends.top_sd, 0.95), (ends.bottom, ends.bottom_sd, 0.6)):
        bars = [[(x, y, depth - s), (x, y, depth + s)] for (x, y), depth, s in zip(positions, z, sd, strict=True)]
        ax.add_collection3d(Line3DCollection(bars, colors="black", linewidths=0.8))
        ax.scatter(*positions.T, z, color="black", s=4, depthshade=False)
        try:
            corners = Triangulation(*positions.T).triangles
        except (RuntimeError, ValueError):  # fewer than three columns, or all in a row
            continue
        longest = np.linalg.norm(positions[corners] - positions[np.roll(corners, 1, axis=1)], axis=2).max(1)
        corners = corners[longest <= 1.5 * np.median(longest)]
        drawn = ax.plot_trisurf(*positions.T, z, triangles=corners, cmap="viridis", alpha=light, edgecolor="white", linewidth=0.3)
        drawn.set_array(sd[corners].mean(1))
        drawn.set_clim(0, top)
    ax.set(xlabel="x (Å)", ylabel="y (Å)", zlabel="z (Å)")
    ax.tick_params(axis="z", pad=8)
    ax.zaxis.labelpad = 14
    ax.set_zlim((ends.bottom + ends.bottom_sd).max(), (ends.top - ends.top_sd).min())
    ax.set_aspect("equal")
    ax.locator_params(nbins=4)
    return drawn


def plot_tomogram(ax, tomogram, voxel_size, level, tilt=0.0):
    """Projection of a tomogram (z, y, x) along the beam after a tilt about x [degrees], with the outline of what lies above `level`."""
    turned = rotate(tomogram, -tilt, axes=(0, 1), reshape=False, order=1)
    n_y, n_x = turned.shape[1:]
    origin = (-(n_x - 1) / 2 * voxel_size, -(n_y - 1) / 2 * voxel_size)
    plot_image(ax, turned.sum(0), voxel_size, origin=origin)
    x, y = origin[0] + np.arange(n_x) * voxel_size, origin[1] + np.arange(n_y) * voxel_size
    ax.contour(x, y, (turned > level).any(0), [0.5], colors=ORANGE, linewidths=1)


def plot_tilted_atoms(ax, atoms, atom_sd, tilt=0.0):
    """Atoms as the beam sees them after a tilt about x [degrees], the nearest to the source in front, with one standard deviation across the tilt axis; returns what a colour bar of their z needs."""
    c, s = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    x, y, z = atoms[:, 0], atoms[:, 1] * c - atoms[:, 2] * s, atoms[:, 1] * s + atoms[:, 2] * c
    order = np.argsort(-z)
    ax.errorbar(x, y, np.hypot(atom_sd[:, 1] * c, atom_sd[:, 2] * s), fmt="none", ecolor=GREY, elinewidth=0.7)
    drawn = ax.scatter(x[order], y[order], s=30, c=z[order], cmap="YlOrBr", vmin=-1.2 * abs(z).max(), vmax=1.4 * abs(z).max(), edgecolors="black", linewidths=0.3, zorder=3)
    ax.set(xlabel="x (Å)", ylabel="y (Å)", aspect="equal")
    return drawn


def plot_views(axes, tomogram, voxel_size, level, images, pixel_size, atoms, atom_sd, tilts=(0.0, 45.0)):
    """Tomogram, image and depth-sectioning model side by side (3 columns), a row for each tilt about x [degrees], as in the paper's figure 5.

    All are measured from one middle [Å]: of the volume, of each of the `images` (one a tilt), and the origin of `atoms`.
    """
    for row, tilt, image in zip(axes, tilts, images, strict=True):
        plot_tomogram(row[0], tomogram, voxel_size, level, tilt)
        middle = (np.array(image.shape[::-1]) - 1) / 2 * pixel_size
        plot_image(row[1], image, pixel_size, origin=-middle)
        drawn = plot_tilted_atoms(row[2], atoms, atom_sd, tilt)
        for ax in row:
            ax.set(xlim=(-middle[0], middle[0]), ylim=(middle[1], -middle[1]))
            ax.label_outer()
        row[0].set_ylabel(f"y (Å), {tilt:.0f}° about x")
        row[2].figure.colorbar(drawn, ax=row[2], shrink=0.8, label="z along the beam (Å)")
    for ax, name in zip(axes[0], ("tomogram", "image", "depth sectioning"), strict=True):
        ax.set_title(name)


def plot_ranks(ax, ranks, draws, title="", bins=10):
    """Histogram of the ranks of truths among so many posterior draws, over the band where 99 % of a right posterior's bars lie.

    Hollow in the middle: too sure; a hill: too cautious; a slope: biased. `draws` + 1 should be a multiple of `bins`.
    """
    ranks = np.ravel(ranks)
    low, high = binom.ppf([0.005, 0.995], len(ranks), 1 / bins)
    ax.hist(ranks, np.linspace(-0.5, draws + 0.5, bins + 1), color=BLUE, edgecolor="white")
    ax.axhspan(low, high, color="#E69F00", alpha=0.4, label="99 % of uniform")
    ax.set(xlabel=f"rank of the truth among {draws} draws", ylabel=f"of {len(ranks)}", title=title)


def plot_plan(ax, result):
    """Dose of each image of the given series and of the best, over what an image at that defocus is worth for the depth."""
    worth = result["landscape"]["information"]
    shared = ax.twinx()
    for name, color, style in (("given", GREY, "--"), ("best", BLUE, "-")):
        share = np.asarray(result[name]["dose_e_per_A2"]) / result["total_dose_e_per_A2"]
        ax.vlines(result[name]["defocus_A"], 0, 100 * share, color=color, lw=1.5 if name == "given" else 3, label=f"{name}: dose")
        shared.plot(worth["defocus_minus_depth_A"], np.asarray(worth["per_e_per_A2"][name]) * 1e3, style, color=ORANGE, label=f"{name}: information")
    ax.set(xlabel="defocus (Å)", ylabel="share of the dose (%)", ylim=(0, None))
    shared.set(ylabel="information (10⁻³ Å⁻² per e/Å²)", ylim=(0, None))
    lines = [*ax.get_legend_handles_labels(), *shared.get_legend_handles_labels()]
    ax.legend(lines[0] + lines[2], lines[1] + lines[3], fontsize=7, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def plot_design_angles(ax, result):
    """Bound against convergence angle, and against the innermost detector angle."""
    around = result["landscape"]
    if "convergence_angle" in around:
        found = around["convergence_angle"]
        ax.plot(found["angle_mrad"], found["depth_sd_of_given_foci_A"], "--", color=GREY, label="convergence angle, given foci and detector")
        ax.plot(found["angle_mrad"], found["depth_sd_of_best_foci_and_detector_A"], "-", color=BLUE, label="convergence angle, best foci and detector")
    if "detector" in around:
        ax.plot(around["detector"]["inner_mrad"], around["detector"]["depth_sd_A"], "-.", color=GREEN, label="innermost detector angle")
    for name, color, mark in (("given", GREY, "s"), ("best", BLUE, "o")):
        ax.plot(result[name]["convergence_angle_mrad"], result[name]["depth_sd_A"], mark, color=color, label=name)
    ax.set(xlabel="angle (mrad)", ylabel="bound on depth (Å)", ylim=(0, None))
    ax.legend(fontsize=7, frameon=False)


def plot_design_dose(ax, result):
    """Bound against total dose for both series, with the target."""
    dose = np.geomspace(0.01, 10, 100) * result["total_dose_e_per_A2"]
    for name, color, style in (("given", GREY, "--"), ("best", BLUE, "-")):
        ax.loglog(dose, result[name]["depth_sd_A"] * np.sqrt(result["total_dose_e_per_A2"] / dose), style, color=color, label=name)
    ax.axhline(result["target_depth_sd_A"], color=ORANGE, lw=0.8, label="target")
    ax.set(xlabel="total dose (e/Å²)", ylabel="bound on depth (Å)")
    ax.legend(fontsize=7, frameon=False)


def save_design(path, result):
    """The figure of the `design` command, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for ax, draw in zip(figure.subplots(1, 3), (plot_plan, plot_design_angles, plot_design_dose), strict=True):
        draw(ax, result)
    figure.savefig(path, dpi=150)
