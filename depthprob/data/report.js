// The interactive part of report.html: a map and a turnable model of the particle, a sortable table, and the chosen column's series.
// Reads the JSON in #data (see page_data in report.py) and unhides #interactive. The chosen column is the one in the address, #column=3.
"use strict";

window.addEventListener("error", (event) => {
  const note = document.createElement("div");
  note.className = "warning";
  note.id = "script-error";
  note.textContent = `The interactive part failed (${event.message}); figures and table below do not need it.`;
  document.body.prepend(note);
});

(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const palette = data.palette;
  const rgb = palette.map((c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)));
  const CHOSEN = "#d55e00";

  const floats = (text) => new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const shown = (value, digits) => (value === null || Number.isNaN(value) ? "–" : value.toFixed(digits));
  const name = (quantity) => (quantity.unit ? `${quantity.label} (${quantity.unit})` : quantity.label);
  const find = (key) => data.quantities.find((q) => q.key === key);
  const [x, y, atoms, depth] = ["x", "y", "n_atoms", "depth"].map(find);

  function withError(q, c) {
    const value = shown(q.values[c], q.digits);
    return (q.sd ? `${value} ± ${shown(q.sd[c], q.digits)}` : value) + (q.unit ? ` ${q.unit}` : "");
  }

  const caption = (c) => `column ${c}: depth ${withError(depth, c)}, ${atoms.values[c]} ${atoms.values[c] === 1 ? "atom" : "atoms"}`;

  const extent = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);

  function element(tag, text = "", attributes = {}) {
    const made = document.createElement(tag);
    made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function ticks(low, high, most) {
    const rough = (high - low) / most || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push([i * step, (i * step).toFixed(digits)]);
    return found;
  }

  // Colours span 1 to 99 % of the values, so that one outlier does not hide all others; the scale says where they are cut.
  function colouring(values, digits, label, scale) {
    const sorted = Float64Array.from(values.filter((v) => v !== null && !Number.isNaN(v))).sort();
    const quantile = (p) => sorted[Math.round(p * (sorted.length - 1))] ?? 0;
    const [low, high] = sorted.length > 200 ? [quantile(0.01), quantile(0.99)] : [quantile(0), quantile(1)];
    const bar = element("i");
    bar.style.background = `linear-gradient(to right, ${palette.filter((_, i) => i % 15 === 0).join()})`;
    $(scale).replaceChildren(
      element("span", (low > sorted[0] ? "≤ " : "") + shown(low, digits)), bar,
      element("span", (high < sorted.at(-1) ? "≥ " : "") + shown(high, digits)), element("em", label),
    );
    return (value) => (value === null || Number.isNaN(value) ? -1 : Math.max(0, Math.min(255, Math.round((255 * (value - low)) / (high - low || 1)))));
  }

  // A canvas that is dragged, zoomed and clicked, by mouse, touch or keys. `on` holds draw, drag, zoom, reset and pick (column or -1).
  function surface(canvas, on) {
    let frame = 0, last = null, way = 0;
    const redraw = () => { frame ||= requestAnimationFrame(() => { frame = 0; on.draw(); }); };
    const place = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    const middle = () => [canvas.clientWidth / 2, canvas.clientHeight / 2];
    const act = (what) => { what(); redraw(); };
    canvas.addEventListener("pointerdown", (event) => { last = place(event); way = 0; });
    window.addEventListener("pointermove", (event) => {
      if (!last) return;
      const [px, py] = place(event), moved = [px - last[0], py - last[1]];
      way += Math.hypot(...moved);
      last = [px, py];
      if (way > 3) act(() => on.drag(moved, event.shiftKey));
    });
    window.addEventListener("pointerup", (event) => {
      const clicked = last && way <= 3 ? on.pick(place(event)) : -1;
      last = null;
      if (clicked >= 0) choose(clicked);
    });
    window.addEventListener("pointercancel", () => { last = null; });
    canvas.addEventListener("pointermove", (event) => tip(last ? -1 : on.pick(place(event)), event));
    canvas.addEventListener("pointerleave", () => tip(-1));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      act(() => on.zoom(Math.exp(-0.0015 * event.deltaY * (event.deltaMode ? 20 : 1)), place(event)));
    }, { passive: false });
    const keys = {
      ArrowLeft: () => on.drag([25, 0]), ArrowRight: () => on.drag([-25, 0]), ArrowUp: () => on.drag([0, 25]), ArrowDown: () => on.drag([0, -25]),
      "+": () => on.zoom(1.25, middle()), "-": () => on.zoom(0.8, middle()), 0: () => on.reset(),
    };
    canvas.addEventListener("keydown", (event) => {
      if (!keys[event.key] || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      act(keys[event.key]);
    });
    for (const button of document.querySelectorAll(`button[data-for="${canvas.id}"]`)) button.addEventListener("click", () => act(keys[button.dataset.key] ?? (() => on[button.dataset.key]())));
    new ResizeObserver(redraw).observe(canvas);
    return redraw;
  }

  function tip(column, event) {
    $("tip").hidden = column < 0;
    if (column < 0) return;
    $("tip").textContent = caption(column);
    $("tip").style.left = `${Math.min(event.clientX + 14, Math.max(0, innerWidth - $("tip").offsetWidth - 8))}px`;
    $("tip").style.top = `${event.clientY + 14}px`;
  }

  // The map: discs at the columns over the average image ------------------------------------------------------------------------

  function depthMap(canvas) {
    const ctx = canvas.getContext("2d");
    const edge = { left: 46, bottom: 34 };
    const [ny, nx] = data.image.shape, pixel = data.image.pixel_A;
    const picture = new Image();
    const [acrossX, acrossY] = [x, y].map((q) => extent(q.values));
    let colour, values, scale, origin; // screen = origin + scale * Å

    function reset() {
      const width = canvas.clientWidth - edge.left, height = canvas.clientHeight - edge.bottom, rim = 4 * data.disc_A;
      scale = Math.min(width / (acrossX[1] - acrossX[0] + rim), height / (acrossY[1] - acrossY[0] + rim));
      origin = [edge.left + width / 2 - ((acrossX[0] + acrossX[1]) / 2) * scale, height / 2 - ((acrossY[0] + acrossY[1]) / 2) * scale];
    }

    function axes(width, height) {
      ctx.fillStyle = "#fff";
      ctx.fillRect(0, 0, edge.left, height);
      ctx.fillRect(0, height - edge.bottom, width, edge.bottom);
      ctx.fillStyle = ctx.strokeStyle = "#222";
      ctx.font = "12px system-ui, sans-serif";
      ctx.textAlign = "center";
      ctx.strokeRect(edge.left, -1, width - edge.left + 1, height - edge.bottom + 1);
      for (const [value, text] of ticks((edge.left - origin[0]) / scale, (width - origin[0]) / scale, 6)) {
        const at = origin[0] + value * scale;
        ctx.fillRect(at, height - edge.bottom, 1, 5);
        if (at < width - 12) ctx.fillText(text, at, height - edge.bottom + 16);
      }
      ctx.fillText("x (Å)", (edge.left + width) / 2, height - 5);
      ctx.textAlign = "right";
      for (const [value, text] of ticks(-origin[1] / scale, (height - edge.bottom - origin[1]) / scale, 6)) {
        const at = origin[1] + value * scale;
        ctx.fillRect(edge.left - 5, at, 5, 1);
        if (at > 8) ctx.fillText(text, edge.left - 8, at + 4);
      }
      ctx.save();
      ctx.translate(11, (height - edge.bottom) / 2);
      ctx.rotate(-Math.PI / 2);
      ctx.textAlign = "center";
      ctx.fillText("y (Å)", 0, 0);
      ctx.restore();
    }

    function draw() {
      const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
      if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
        canvas.width = Math.round(width * ratio);
        canvas.height = Math.round(height * ratio);
        reset();
      }
      ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
      ctx.fillStyle = "#fff";
      ctx.fillRect(0, 0, width, height);
      ctx.imageSmoothingEnabled = false;
      if (picture.complete) ctx.drawImage(picture, origin[0] - (pixel * scale) / 2, origin[1] - (pixel * scale) / 2, nx * pixel * scale, ny * pixel * scale);
      const radius = Math.max(1.5, data.disc_A * scale), numbers = radius > 9, type = Math.min(15, Math.round(radius));
      ctx.font = `${type}px system-ui, sans-serif`;
      ctx.textAlign = "center";
      ctx.lineWidth = 0.7;
      ctx.strokeStyle = "#666";
      for (let c = 0; c < data.count; c++) {
        const [sx, sy] = screen(c), level = colour(values[c]);
        if (sx < -radius || sx > width + radius || sy < -radius || sy > height + radius) continue;
        ctx.fillStyle = level < 0 ? "#fff" : palette[level];
        ctx.beginPath();
        ctx.arc(sx, sy, radius, 0, 2 * Math.PI);
        ctx.fill();
        if (radius > 4) ctx.stroke();
        if (numbers) {
          ctx.fillStyle = level < 140 && level >= 0 ? "#fff" : "#000";
          ctx.fillText(atoms.values[c], sx, sy + type * 0.36);
        }
      }
      if (chosen >= 0) {
        ctx.strokeStyle = CHOSEN;
        ctx.lineWidth = 3;
        ctx.beginPath();
        ctx.arc(...screen(chosen), radius + 3, 0, 2 * Math.PI);
        ctx.stroke();
      }
      ctx.lineWidth = 1;
      axes(width, height);
    }

    const screen = (c) => [origin[0] + x.values[c] * scale, origin[1] + y.values[c] * scale];

    function pick([px, py]) {
      let best = -1, least = Math.max(6, 1.2 * data.disc_A * scale);
      if (px < edge.left || py > canvas.clientHeight - edge.bottom) return best;
      for (let c = 0; c < data.count; c++) {
        const [sx, sy] = screen(c), away = Math.hypot(sx - px, sy - py);
        if (away < least) [best, least] = [c, away];
      }
      return best;
    }

    const redraw = surface(canvas, {
      draw, pick, reset,
      drag([dx, dy]) { origin = [origin[0] + dx, origin[1] + dy]; },
      zoom(factor, [px, py]) {
        scale *= factor;
        origin = [px + (origin[0] - px) * factor, py + (origin[1] - py) * factor];
      },
    });
    picture.onload = redraw;
    picture.src = data.image.src;
    const choices = data.quantities.filter((q) => q.colour).flatMap((q) => [q, ...(q.sd ? [{ ...q, label: `sd of ${q.label}`, values: q.sd }] : [])]);
    choices.forEach((q, i) => $("map-colour").append(element("option", name(q), { value: i })));
    const recolour = () => {
      const q = choices[$("map-colour").value];
      values = q.values;
      colour = colouring(values, q.digits, name(q), "map-scale");
      redraw();
    };
    $("map-colour").value = choices.indexOf(depth);
    $("map-colour").addEventListener("change", recolour);
    recolour();
    return redraw;
  }

  // The model: every atom a shaded ball, drawn into a depth buffer by ourselves, which takes 10^5 of them without a graphics card ----

  function particle(canvas) {
    const ctx = canvas.getContext("2d");
    const all = floats(data.atoms), n = all.length / 6;
    const [ax, ay, az, sd, probability, of] = [0, 1, 2, 3, 4, 5].map((i) => all.subarray(i * n, (i + 1) * n));
    const colours = { depth: [az, 2, "depth of an atom (Å)"], sd: [sd, 2, "sd of an atom's depth, on its plane (Å)"], probability: [probability, 3, "probability of an atom's site"] };
    const bounds = [ax, ay, az].map(extent);
    const centre = bounds.map(([low, high]) => (low + high) / 2), half = bounds.map(([low, high]) => (high - low) / 2 + 2 * data.atom_A);
    let turn, zoom, pan, levels; // zoom: screen pixels per Å
    let image = null, pixels, near, ids;

    // rows: right, down, into the page. Along the beam that is x, y, z, as in the images.
    const views = { beam: [[1, 0, 0], [0, 1, 0], [0, 0, 1]], side: [[1, 0, 0], [0, 0, 1], [0, -1, 0]] };
    const multiply = (a, b) => a.map((row) => [0, 1, 2].map((j) => row[0] * b[0][j] + row[1] * b[1][j] + row[2] * b[2][j]));
    const about = (i, j, angle) => {
      const m = [[1, 0, 0], [0, 1, 0], [0, 0, 1]], c = Math.cos(angle), s = Math.sin(angle);
      m[i][i] = m[j][j] = c;
      m[i][j] = -s;
      m[j][i] = s;
      return m;
    };
    const look = (rows) => {
      const reach = rows.map((row) => row.reduce((sum, v, i) => sum + Math.abs(v) * half[i], 0));
      [turn, zoom, pan] = [rows, Math.min(canvas.clientWidth / reach[0], canvas.clientHeight / reach[1]) / 2, [0, 0]];
    };
    const reset = () => look(multiply(about(1, 2, -0.3), multiply(about(0, 2, 0.5), views.side)));

    // Pixels of a ball: offsets, height towards the eye, and brightness, dark at the rim.
    function ball(radius) {
      const spots = [], round = radius + 0.4;
      for (let dy = -radius; dy <= radius; dy++)
        for (let dx = -radius; dx <= radius; dx++) {
          const square = round ** 2 - dx * dx - dy * dy;
          if (square < 0) continue;
          const up = Math.sqrt(square), lit = (0.75 * up - 0.35 * dx - 0.55 * dy) / round;
          spots.push([dx, dy, up, radius > 2 && up / round < 0.3 ? 0.35 : Math.min(1, 0.72 + 0.33 * lit)]);
        }
      return [0, 1, 2, 3].map((i) => Float32Array.from(spots, (spot) => spot[i]));
    }

    function draw() {
      // twice as fine as the screen where there is time for it: the balls have no soft edges
      const ratio = n > 50000 ? 1 : 2, w = Math.round(canvas.clientWidth * ratio), h = Math.round(canvas.clientHeight * ratio);
      if (!w || !h) return;
      if (!image || canvas.width !== w || canvas.height !== h) {
        [canvas.width, canvas.height] = [w, h];
        image = ctx.createImageData(w, h);
        pixels = new Uint32Array(image.data.buffer);
        near = new Float32Array(w * h);
        ids = new Int32Array(w * h);
      }
      pixels.fill(0xffffffff);
      near.fill(Infinity);
      ids.fill(-1);
      const k = zoom * ratio, radius = Math.max(1, Math.min(150, Math.round(data.atom_A * k)));
      const [dx, dy, up, shade] = ball(radius);
      const [right, down, into] = turn.map((row) => row.map((v) => v * k));
      const [cx, cy] = [w / 2 + pan[0] * ratio, h / 2 + pan[1] * ratio];
      for (let a = 0; a < n; a++) {
        const X = ax[a] - centre[0], Y = ay[a] - centre[1], Z = az[a] - centre[2];
        const sx = Math.round(cx + right[0] * X + right[1] * Y + right[2] * Z), sy = Math.round(cy + down[0] * X + down[1] * Y + down[2] * Z);
        if (sx < -radius || sx >= w + radius || sy < -radius || sy >= h + radius) continue;
        const far = into[0] * X + into[1] * Y + into[2] * Z;
        const [red, green, blue] = levels[a] < 0 ? [255, 255, 255] : rgb[levels[a]];
        for (let s = 0; s < dx.length; s++) {
          const ix = sx + dx[s], iy = sy + dy[s], i = iy * w + ix;
          if (ix < 0 || ix >= w || iy < 0 || iy >= h || far - up[s] >= near[i]) continue;
          near[i] = far - up[s];
          ids[i] = of[a];
          pixels[i] = 0xff000000 | ((blue * shade[s]) << 16) | ((green * shade[s]) << 8) | (red * shade[s]);
        }
      }
      ctx.putImageData(image, 0, 0);
      ctx.strokeStyle = CHOSEN; // seen through the others
      ctx.lineWidth = 1.5 * ratio;
      for (let a = 0; a < n; a++) {
        if (of[a] !== chosen) continue;
        const [px, py] = [right, down].map((row) => row[0] * (ax[a] - centre[0]) + row[1] * (ay[a] - centre[1]) + row[2] * (az[a] - centre[2]));
        ctx.beginPath();
        ctx.arc(cx + px, cy + py, radius, 0, 2 * Math.PI);
        ctx.stroke();
      }
      compass(w, h, ratio);
    }

    // The beam's direction and the image's axes, in the corner, turning with the particle.
    function compass(w, h, ratio) {
      const length = 38 * ratio, at = [62 * ratio, h - 62 * ratio];
      ctx.fillStyle = "rgba(255, 255, 255, 0.8)";
      ctx.fillRect(at[0] - 60 * ratio, at[1] - 60 * ratio, 120 * ratio, 120 * ratio);
      ctx.lineWidth = 2 * ratio;
      ctx.font = `${13 * ratio}px system-ui, sans-serif`;
      ctx.textAlign = "center";
      for (const [axis, label, colour] of [[0, "x", "#666"], [1, "y", "#666"], [2, "beam, +z", "#0072b2"]]) {
        const [dx, dy] = [turn[0][axis] * length, turn[1][axis] * length], angle = Math.atan2(dy, dx), reach = Math.hypot(dx, dy);
        ctx.strokeStyle = ctx.fillStyle = colour;
        ctx.beginPath();
        ctx.moveTo(...at);
        ctx.lineTo(at[0] + dx, at[1] + dy);
        for (const side of reach > 6 * ratio ? [2.6, -2.6] : []) {
          ctx.moveTo(at[0] + dx, at[1] + dy);
          ctx.lineTo(at[0] + dx + 7 * ratio * Math.cos(angle + side), at[1] + dy + 7 * ratio * Math.sin(angle + side));
        }
        if (reach <= 6 * ratio) ctx.arc(...at, 5 * ratio, 0, 2 * Math.PI); // seen end on
        ctx.stroke();
        const [tx, ty] = reach > 6 * ratio ? [dx / reach, dy / reach] : [-0.3, -1];
        ctx.fillText(label, at[0] + dx + 12 * ratio * tx, at[1] + dy + 13 * ratio * ty + 5 * ratio);
      }
    }

    const redraw = surface(canvas, {
      draw, reset,
      beam() { look(views.beam); },
      side() { look(views.side); },
      pick([px, py]) {
        if (!image) return -1;
        const ratio = canvas.width / canvas.clientWidth, ix = Math.floor(px * ratio), iy = Math.floor(py * ratio);
        return ix < 0 || iy < 0 || ix >= canvas.width || iy >= canvas.height ? -1 : ids[iy * canvas.width + ix];
      },
      drag([dx, dy], shift) {
        if (shift) pan = [pan[0] + dx, pan[1] + dy];
        else turn = multiply(about(1, 2, dy / 130), multiply(about(0, 2, -dx / 130), turn));
      },
      zoom(factor, [px, py]) {
        const away = [px - canvas.clientWidth / 2, py - canvas.clientHeight / 2];
        zoom *= factor;
        pan = pan.map((p, i) => away[i] + (p - away[i]) * factor);
      },
    });
    const recolour = () => {
      const [values, digits, label] = colours[$("model-colour").value];
      levels = Array.from(values).map(colouring(values, digits, label, "model-scale"));
      redraw();
    };
    $("model-colour").addEventListener("change", recolour);
    reset();
    recolour();
    return redraw;
  }

  // One column: its series with both fits, and its numbers ----------------------------------------------------------------------

  const foci = data.defocus.length;
  const series = Object.fromEntries(Object.entries(data.series).map(([key, text]) => [key, floats(text)]));

  function drawSeries(c) {
    const [width, height, left, bottom, top] = [640, 380, 66, 46, 28];
    const own = (key) => Array.from(series[key].subarray(c * foci, (c + 1) * foci));
    const [measured, gaussian, joint] = ["measured", "gaussian", "joint"].map(own);
    const sd = measured.map((v, f) => Math.sqrt(Math.max(v, 0) * data.variance_per_fraction[f]));
    const every = [...measured.map((v, f) => v + sd[f]), ...measured.map((v, f) => v - sd[f]), ...gaussian, ...joint].filter(Number.isFinite);
    const [low, high] = extent(every), room = 0.04 * (high - low) || 1;
    const [first, last] = extent(data.defocus), margin = 0.02 * (last - first) || 1;
    const sx = (v) => left + ((v - first + margin) / (last - first + 2 * margin)) * (width - left - 8);
    const sy = (v) => height - bottom - ((v - low + room) / (high - low + 2 * room)) * (height - bottom - top);
    const svg = $("series");
    const draw = (tag, attributes, text = "") => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
      made.textContent = text;
      svg.append(made);
    };
    const label = (px, py, text, more = {}) => draw("text", { x: px, y: py, "text-anchor": "middle", fill: "#222", ...more }, text);
    const line = (x1, y1, x2, y2, stroke, more = {}) => draw("line", { x1, y1, x2, y2, stroke, ...more });
    const curve = (values, more) => {
      const points = values.map((v, f) => (Number.isFinite(v) ? `${sx(data.defocus[f]).toFixed(1)},${sy(v).toFixed(1)}` : "")).join(" ");
      draw("polyline", { points, fill: "none", ...more });
    };
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    draw("title", {}, `Intensity of column ${c} against defocus with both fits`);
    draw("rect", { x: left, y: top, width: width - left - 8, height: height - top - bottom, fill: "none", stroke: "#999" });
    for (const [v, text] of ticks(first, last, 8)) { line(sx(v), height - bottom, sx(v), height - bottom + 5, "#222"); label(sx(v), height - bottom + 19, text); }
    for (const [v, text] of ticks(low, high, 5)) { line(left - 5, sy(v), left, sy(v), "#222"); label(left - 8, sy(v) + 4, text, { "text-anchor": "end" }); }
    label((left + width) / 2, height - 6, "defocus (Å), positive is underfocus");
    label(14, height / 2 - 10, "mean intensity (fraction of the beam)", { transform: `rotate(-90 14 ${height / 2 - 10})` });
    const gaussianLook = { stroke: CHOSEN, "stroke-width": 2, "stroke-dasharray": "7 4" }, jointLook = { stroke: "#000", "stroke-width": 1.5 };
    curve(gaussian, gaussianLook);
    curve(joint, jointLook);
    measured.forEach((v, f) => {
      const at = sx(data.defocus[f]);
      line(at, sy(v - sd[f]), at, sy(v + sd[f]), "#0072b2");
      draw("circle", { cx: at, cy: sy(v), r: 3, fill: "#0072b2" });
    });
    const legend = [[left + 12, "measured ± sd"], [left + 170, "Gaussian peak"], [left + 330, "joint fit"]];
    draw("circle", { cx: legend[0][0], cy: 13, r: 3, fill: "#0072b2" });
    line(legend[1][0] - 14, 13, legend[1][0] + 14, 13, CHOSEN, gaussianLook);
    line(legend[2][0] - 14, 13, legend[2][0] + 14, 13, "#000", jointLook);
    for (const [px, text] of legend) label(px + 20, 17, text, { "text-anchor": "start" });
  }

  function showColumn(c) {
    $("column-title").textContent = caption(c)[0].toUpperCase() + caption(c).slice(1);
    drawSeries(c);
    const likely = data.probability[c].map(([n, p]) => `${n}: ${p.toFixed(3)}`).join(", ");
    const rows = data.quantities.map((q) => [q.label, withError(q, c)]);
    rows.splice(data.quantities.indexOf(atoms) + 1, 0, ["their probability", likely]);
    $("numbers").replaceChildren(...rows.map(([label, text]) => {
      const row = element("tr");
      row.append(element("th", label, { scope: "row" }), element("td", text));
      return row;
    }));
  }

  // The table -------------------------------------------------------------------------------------------------------------------

  const PAGE = 100;
  let order = Array.from({ length: data.count }, (_, c) => c), by = null, falling = false, page = 0;

  function fillTable() {
    const head = element("tr"), body = element("tbody"), headed = element("thead");
    for (const q of [null, ...data.quantities]) {
      const cell = element("th", "", { scope: "col", "aria-sort": q === by ? (falling ? "descending" : "ascending") : "none" });
      const button = element("button", (q ? name(q) : "column") + (q === by ? (falling ? " ▼" : " ▲") : ""), { type: "button" });
      button.addEventListener("click", () => {
        falling = q === by && !falling;
        by = q;
        page = 0;
        const missing = (v) => v === null, sign = falling ? -1 : 1;
        order.sort((a, b) => (q ? missing(q.values[a]) - missing(q.values[b]) || sign * (q.values[a] - q.values[b]) : sign * (a - b)) || a - b);
        fillTable();
      });
      cell.append(button);
      head.append(cell);
    }
    headed.append(head);
    for (const c of order.slice(page * PAGE, (page + 1) * PAGE)) {
      const row = element("tr", "", c === chosen ? { class: "chosen" } : {}), first = element("td");
      first.append(element("button", String(c), { type: "button", "aria-label": `show column ${c}` }));
      row.append(first, ...data.quantities.map((q) => element("td", shown(q.values[c], q.digits) + (q.sd ? ` ± ${shown(q.sd[c], q.digits)}` : ""))));
      row.addEventListener("click", () => choose(c));
      body.append(row);
    }
    $("rows").replaceChildren(headed, body);
    $("pages").textContent = `rows ${page * PAGE + 1} to ${Math.min(data.count, (page + 1) * PAGE)} of ${data.count}`;
    $("earlier").disabled = page === 0;
    $("later").disabled = (page + 1) * PAGE >= data.count;
  }
  for (const [id, step] of [["earlier", -1], ["later", 1]]) $(id).addEventListener("click", () => { page += step; fillTable(); });

  // The chosen column, kept in the address ---------------------------------------------------------------------------------------

  let chosen = -1, views = [];
  const choose = (c) => { location.hash = `column=${c}`; };
  function follow() {
    const wanted = Number(location.hash.match(/^#column=(\d+)$/)?.[1] ?? data.first), known = wanted < data.count ? wanted : data.first;
    if (known === chosen) return;
    chosen = known;
    showColumn(chosen);
    for (const redraw of views) redraw();
    fillTable();
  }
  for (const [id, step] of [["previous", -1], ["next", 1]]) $(id).addEventListener("click", () => choose((chosen + step + data.count) % data.count));
  window.addEventListener("hashchange", follow);

  for (const part of document.querySelectorAll("[data-interactive]")) part.hidden = false;
  for (const part of document.querySelectorAll("[data-static]")) part.hidden = true;
  views = [depthMap($("map")), particle($("model"))];
  follow();
})();
