"""The report: readable without JavaScript, and in a real browser every column can be chosen and nothing fails."""

import base64
import dataclasses
import html
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from depthprob.reconstruction.counting import count_by_hybrid, gaussian_mixture_counts
from depthprob.reconstruction.lattice import unit_cell
from depthprob.reconstruction.pipeline import Reconstruction
from depthprob.reconstruction.surface import column_ends, find_surface
from depthprob.report import page_data, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
NASTY = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"


def made_up(n_columns=16, **changes) -> Reconstruction:
    """A square slab of as many columns or a few more, every number made up; the series are the Gaussians they are said to be."""
    rng = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(n_columns)))
    positions = 3.0 + 2.04 * np.stack([a.ravel() for a in np.mgrid[:side, :side]], 1)
    count = len(positions)
    n = rng.integers(2, 8, count)
    depth, sd = rng.normal(0, 5, count).round(3), rng.uniform(0.3, 0.6, count).round(3)
    defocus = np.arange(-100.0, 101.0, 25.0)
    series = 0.03 + 0.01 * n[:, None] * np.exp(-((defocus - depth[:, None]) ** 2) / (2 * 40**2))
    column, chance, cross = np.repeat(np.arange(count), n), np.eye(8)[n - 1], 0.02 * np.arange(1, 9)
    place = np.concatenate([np.arange(m) - (m - 1) / 2 for m in n])
    shape = (round((positions.max() + 3) / 0.4),) * 2
    atoms = np.column_stack([positions[column], depth[column] + 4.08 * place])
    ends = column_ends(depth, sd, n, chance, 4.08)
    values = dict(
        stack=rng.poisson(20, (len(defocus), *shape)), images=np.arange(len(defocus)), defocus=defocus, pixel_size=0.4, dose=np.full(len(defocus), 1e4), element="Au", spacing=4.08,
        drift_px=np.zeros((len(defocus), 2)), drift_sd_px=np.full(len(defocus), 0.1), drift_start_px=np.zeros((len(defocus), 2)), average_image=rng.random(shape),
        positions=positions, cross_section=0.02 * n, cross_section_sd=np.full(count, 1e-3), n_atoms=n, n_probability=chance, library_cross_section=cross, column_fit=None,
        mixture=gaussian_mixture_counts(cross, 3), hybrid=count_by_hybrid(0.02 * n, cross), ends=ends,
        surface=find_surface(atoms, column, ends, 0.1 * n, positions, unit_cell("fcc", 4.08), (0, 0, 1)), gaussian_depth=depth + 0.5, gaussian_depth_sd=2 * sd, depth=depth, depth_sd=sd, depth_q05=depth - sd, depth_q95=depth + sd, crlb=sd,
        superposition_shift=np.zeros(count), goodness_of_fit=np.zeros(count), lattice_depth=depth, lattice_probability=np.ones(count), atoms=atoms,
        atom_sd=np.repeat(sd, n)[:, None] * np.ones(3), site_probability=np.ones(len(column)), column_of_atom=column, column_series=series, gaussian_fit_series=series,
        joint_fit_series=series, diagnostics={"dispersion": 1.0}, warnings=[], provenance={}, gauge="absolute", fixed=[],
    )  # fmt: skip
    return Reconstruction(**values | changes)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report on columns of which one has no Gaussian depth, from files with hostile names."""
    found = made_up(warnings=[NASTY], provenance={"file": NASTY}, diagnostics={NASTY: NASTY}, gauge=NASTY, element=NASTY)
    found.gaussian_depth[3] = np.nan
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, found)
    return path, found


def browse(page, *more):
    """Chromium on a page, its console on stderr; killed after two minutes."""
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = ["timeout", "-k", "1", "120", BROWSER, "--headless", "--no-sandbox", "--disable-gpu", profile, "--enable-logging=stderr", "--window-size=1200,1000", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def opened(page, fragment=""):
    """DOM of a page once it is loaded, and what its console said."""
    dom, log = browse(page, "--dump-dom", page.as_uri() + fragment).communicate()
    return dom, re.findall('CONSOLE.*?"(.*)", source', log)


def visited(page, script, folder):
    """What the console of a page says while an async script acts on it, to the script's end; a copy of the page, without the policy that keeps scripts out."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", page.read_text(encoding="utf-8"))
    visitor = f"addEventListener('load', async () => {{ try {{ {script} }} finally {{ console.log('done'); }} }});"
    copy = folder / "visited.html"
    copy.write_text(text.replace("</body>", f"<script>{visitor}</script></body>"), encoding="utf-8")
    said = []
    with browse(copy, "--remote-debugging-port=0", copy.as_uri()) as browser:
        for line in browser.stderr:
            said += re.findall('CONSOLE.*?"(.*)", source', line)
            if said[-1:] == ["done"]:
                break
        browser.terminate()
    return said


def test_without_javascript_figures_and_numbers_stand_and_nothing_is_fetched(page):
    path, found = page
    tags = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    text = path.read_text(encoding="utf-8")
    reader.feed(text)
    images = [a for tag, a in tags if tag == "img"]
    assert len(images) >= 6 and all(a["alt"] and a["src"].startswith("data:") for a in images)
    assert not [a for _, a in tags if "href" in a or ("src" in a and not a["src"].startswith("data:"))]
    assert [a.get("type") for tag, a in tags if tag == "script"] == ["application/json", None]  # none of them from a name
    assert "onerror" not in [name for _, a in tags for name in a]
    assert all("hidden" in a for _, a in tags if "data-interactive" in a) and not [a for _, a in tags if "data-static" in a and "hidden" in a]
    for c in range(len(found.depth)):
        assert f"<td>{found.depth[c]:.2f} ± {found.depth_sd[c]:.2f}</td>" in text
    assert text.index(html.escape(NASTY)) < text.index("standard deviation of") < text.index("Provenance")  # warnings first, provenance last


def test_long_arrays_reach_the_page_in_single_precision():
    found = made_up()
    data = page_data(found, None)
    atoms = np.frombuffer(base64.b64decode(data["atoms"]), "<f4").reshape(6, -1)
    np.testing.assert_array_equal(atoms[:3].T, found.atoms.astype("f4"))
    np.testing.assert_array_equal(atoms[5], found.column_of_atom)
    joint = np.frombuffer(base64.b64decode(data["series"]["joint"]), "<f4").reshape(found.joint_fit_series.shape)
    np.testing.assert_array_equal(joint, found.joint_fit_series.astype("f4"))


@needs_browser
def test_a_browser_shows_the_column_in_the_address_and_logs_nothing(page):
    path, found = page
    dom, console = opened(path, "#column=3")
    assert console == [] and 'id="script-error"' not in dom
    assert "<title>depthprob report</title>" in dom
    assert f"Column 3: depth {found.depth[3]:.2f} ± {found.depth_sd[3]:.2f} Å, {found.n_atoms[3]} atoms" in dom
    numbers = dict(re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td></tr>', dom))
    assert numbers["depth, Gaussian peak"].startswith("– ±")
    assert numbers["scattering cross-section"] == f"{0.02 * found.n_atoms[3]:.4f} ± 0.0010 Å²"
    series = dom[dom.index('<svg id="series"') : dom.index("</svg>")]
    assert series.count("<circle") == len(found.defocus) + 1 and series.count("<polyline") == 2  # one point in the legend


@needs_browser
def test_a_failing_script_is_said_on_the_page(page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(page[0].read_text(encoding="utf-8").replace('id="data">{', 'id="data">'), encoding="utf-8")
    dom, console = opened(broken)
    assert 'id="script-error"' in dom and len(console) == 1


@needs_browser
def test_columns_are_clicked_dragged_zoomed_and_sorted(page, tmp_path):
    """A visitor in JavaScript: hovers until the tip names a column, clicks there, and says what the page then shows."""
    visitor = """
    const $ = (id) => document.getElementById(id), frame = () => new Promise(requestAnimationFrame);
    const pause = async () => { await new Promise((done) => setTimeout(done, 50)); await frame(); await frame(); };
    await pause();
    for (const [id, column] of [["map", 5], ["model", 12]]) {
      const box = $(id).getBoundingClientRect();
      const send = (kind, x, y) => $(id).dispatchEvent(new PointerEvent(kind, { clientX: x, clientY: y, bubbles: true }));
      search: for (let y = box.top; y < box.bottom; y += 7) for (let x = box.left; x < box.right; x += 7) {
        send("pointermove", x, y);
        if ($("tip").hidden || !$("tip").textContent.startsWith(`column ${column}:`)) continue;
        send("pointerdown", x, y);
        send("pointerup", x, y);
        break search;
      }
      await pause();
      console.log(`${id} ${location.hash} ${$("column-title").textContent.split(":")[0]}`);
      const before = $(id).toDataURL();
      send("pointerdown", box.left + 50, box.top + 50);
      send("pointermove", box.left + 90, box.top + 80);
      send("pointerup", box.left + 90, box.top + 80);
      await pause();
      const dragged = $(id).toDataURL();
      $(id).dispatchEvent(new WheelEvent("wheel", { deltaY: -300, clientX: box.left + 200, clientY: box.top + 200, cancelable: true }));
      await pause();
      const zoomed = $(id).toDataURL();
      $(id).dispatchEvent(new KeyboardEvent("keydown", { key: "0", cancelable: true }));
      await pause();
      console.log(`${id} dragged ${dragged !== before} zoomed ${zoomed !== dragged} whole ${$(id).toDataURL() === before}`);
    }
    const heading = () => [...document.querySelectorAll("#rows th button")].find((b) => b.textContent.startsWith("depth, joint fit"));
    for (const order of ["least", "largest"]) {
      heading().click();
      console.log(`${order} ${document.querySelector("#rows tbody tr td").textContent}`);
    }
    document.querySelector("#rows tbody tr").click();
    await pause();
    console.log(location.hash);
    """
    path, found = page
    largest = found.depth.argmax()
    assert visited(path, visitor, tmp_path) == [
        "map #column=5 Column 5", "map dragged true zoomed true whole true",
        "model #column=12 Column 12", "model dragged true zoomed true whole true",
        f"least {found.depth.argmin()}", f"largest {largest}", f"#column={largest}", "done",
    ]  # fmt: skip


def test_distortions_of_the_scan_are_drawn_where_they_were_fitted():
    from matplotlib.figure import Figure

    from depthprob.plotting import plot_distortion
    from depthprob.report import _figures

    plain = made_up()
    scan = np.random.default_rng(0).normal(0, 0.01, (len(plain.defocus), 2, 2))
    fitted = dataclasses.replace(plain, distortion=scan, distortion_sd=np.full(scan.shape, 1e-3))
    titles = [[title for title, _, _ in _figures(r, None)] for r in (plain, fitted)]
    assert set(titles[1]) - set(titles[0]) == {"Distortion of the scan"}
    ax = Figure().subplots()
    plot_distortion(ax, fitted.defocus, scan, fitted.distortion_sd)
    np.testing.assert_allclose([line.get_ydata() for line in ax.lines], 100 * scan.reshape(-1, 4).T)
    assert ax.get_xlabel() == "defocus (Å)" and ax.get_ylabel() == "distortion (%)"
