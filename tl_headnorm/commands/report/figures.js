// The figures, by plotly, in the page's own type and colours.
const CONFIG = { displayModeBar: false };
const FONT = getComputedStyle($("theme")).fontFamily;
// Viridis, sampled: readable by colour-blind eyes, and in grey.
const SEQUENTIAL = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779",
  "#6ece58", "#b5de2b", "#fde725"].map((c, i, all) => [i / (all.length - 1), c]);
const diverging = (low, high) => [[0, color(low)], [0.5, color("mid")], [1, color(high)]];

function step(count, most) {
  let by = 1;
  while (count / by > most) by *= 2;
  return by;
}

function axis(more = {}) {
  return {
    fixedrange: true, showgrid: false, zeroline: false, ticks: "", color: color("soft"),
    linecolor: color("rule"), tickfont: { size: 12 }, automargin: false, ...more,
    ...(more.title ? { title: { standoff: 8, font: { size: 12.5 }, text: more.title } } : {}),
  };
}

function layout(more = {}) {
  return {
    font: { family: FONT, size: 12.5, color: color("soft") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    margin: { l: 46, r: 10, t: 8, b: 38 }, dragmode: false, bargap: 0,
    hoverlabel: {
      bgcolor: color("paper"), bordercolor: color("rule"), align: "left",
      font: { family: FONT, size: 13, color: color("ink") },
    },
    ...more,
  };
}

// Size of a layers-by-heads picture in its column: cells neither slivers nor slabs.
function gridSize(width) {
  const margin = { l: 46, r: 74, t: 6, b: 38 };
  const across = Math.min(width - margin.l - margin.r, H * 96);
  const tall = Math.max(280, Math.min(560, innerHeight - 520)); // in the first screen on a desk
  const cell = Math.max(5, Math.min(46, (across / H) * 0.92, tall / L));
  return {
    margin, width: across + margin.l + margin.r,
    height: Math.max(cell * L, Math.min(70, 30 * L)) + margin.t + margin.b,
  };
}

function grid(element, z, text, colors) {
  const width = element.clientWidth || 700;
  const size = gridSize(width);
  const rows = Array.from({ length: L }, (_, l) => z.slice(l * H, (l + 1) * H));
  const words = Array.from({ length: L }, (_, l) => text.slice(l * H, (l + 1) * H));
  const gap = Math.max(0, Math.min(1.5, (size.width / H) * 0.06, (size.height / L) * 0.06));
  const trace = {
    type: "heatmap", z: rows, text: words, hoverinfo: "text", hoverongaps: true, xgap: gap,
    ygap: gap, colorbar: {
      thickness: 9, outlinewidth: 0, len: 1, x: 1.012, xpad: 0, ypad: 0, ticks: "", nticks: 5,
      tickfont: { size: 11.5, color: color("soft") }, tickformat: ".3~g",
    }, ...colors,
  };
  const hasNone = z.some((x) => x === null);
  const shape = layout({
    ...size, plot_bgcolor: hasNone ? color("none") : "rgba(0,0,0,0)",
    xaxis: axis({ title: "head", tickmode: "linear", tick0: 0,
      dtick: step(H, Math.min(20, (size.width - 120) / 21)), range: [-0.5, H - 0.5] }),
    yaxis: axis({ title: "layer", tickmode: "linear", tick0: 0,
      dtick: step(L, Math.min(20, (size.height - 44) / 13)), range: [L - 0.5, -0.5] }),
    annotations: hasNone ? [{ text: "grey: no data", xref: "paper", yref: "paper", x: 1, y: 0,
      xanchor: "right", yanchor: "top", yshift: -20, showarrow: false }] : [],
  });
  return [trace, shape];
}

const places = [];
for (let l = 0; l < L; l++) for (let h = 0; h < H; h++) places.push([l, h]);

// What the cells are coloured by: the mean itself, its rank (a few large heads leave the rest
// dark otherwise), or the mean over that of the layer's mean head; with what the caption says of it.
function shades(number) {
  const m = measures[number], by = $("shade").value, unit = m.unit || "no unit";
  if (by === "rank") {
    return [ranks[number].of, { colorscale: SEQUENTIAL, reversescale: true }, "rank of the mean, 1 is the largest"];
  }
  const real = m.mean.filter((x) => x !== null);
  if (real.some((x) => x < 0)) {
    const most = real.reduce((a, x) => Math.max(a, Math.abs(x)), 0);
    return [m.mean, { colorscale: diverging("less", "more"), zmin: -most, zmax: most },
      `mean over questions, ${unit}; purple is below 0, green above`];
  }
  if (by === "mean") return [m.mean, { colorscale: SEQUENTIAL }, `mean over questions, ${unit}`];
  const means = layerMeans(m);
  const z = m.mean.map((x, i) => x === null ? null : x / (means[places[i][0]] || 1));
  const clipped = z.filter((x) => x > 2).length;
  return [z, { colorscale: diverging("less", "more"), zmin: 0, zmid: 1, zmax: 2 },
    "mean ÷ the layer's mean head, 1 is the middle" + (clipped ? `; scale ends at 2, ${clipped} beyond` : "")];
}

function layerMeans(m) {
  return Array.from({ length: L }, (_, l) => {
    const real = m.mean.slice(l * H, (l + 1) * H).filter((x) => x !== null);
    return real.length ? real.reduce((a, b) => a + b, 0) / real.length : null;
  });
}

function drawMap(element) {
  const number = Number(element.dataset.measure), m = measures[number];
  const { of, count } = ranks[number];
  const text = places.map(([l, h], i) => m.mean[i] === null ? `<b>${nameOf(l, h)}</b>  no data`
    : `<b>${nameOf(l, h)}</b>  ${show(m.mean[i])}` + (m.std ? ` ± ${show(m.std[i], 3)}` : "")
      + `<br>rank ${of[i]} of ${count}`);
  const [z, colors, caption] = shades(number);
  document.querySelector(`[data-mode="${number}"]`).textContent = caption;
  const [trace, shape] = grid(element, z, text, colors);
  return Plotly.react(element, [trace], shape, CONFIG);
}

// Behind "more measures": drawn when that is opened.
const isFolded = (element) => element.closest("details:not([open])") !== null;

// Right answers minus wrong ones: blue where right is larger, orange where wrong is. The scale is
// never narrower than the bound of shuffled answers, so that noise stays pale.
function drawDifference(element) {
  if (isFolded(element)) return;
  const m = measures.find((x) => x.name === element.dataset.difference), d = m.difference;
  const text = places.map(([l, h], i) => d.t[i] === null ? `<b>${nameOf(l, h)}</b>  no data`
    : `<b>${nameOf(l, h)}</b>  ${show(d.difference[i], 3)} ± ${show(d.stderr[i], 2)}`
      + `<br>${show(d.t[i], 3)} standard errors`);
  const most = d.t.reduce((a, x) => Math.max(a, Math.abs(x ?? 0)), d.threshold ?? 0) || 1;
  const [trace, shape] = grid(element, d.t, text,
    { colorscale: diverging("wrong", "right"), zmin: -most, zmax: most });
  const far = places.filter((_, i) => d.threshold !== null && Math.abs(d.t[i] ?? 0) > d.threshold);
  const dots = { type: "scatter", mode: "markers", x: far.map((p) => p[1]), y: far.map((p) => p[0]),
    hoverinfo: "skip", marker: { size: 4.5, color: color("ink") } };
  return Plotly.react(element, [trace, dots], shape, CONFIG);
}

// Values of one head over the questions: right and wrong answers stacked.
function drawSpread() {
  const element = $("spread"), all = values(state.measure, state.layer, state.head);
  if (!element || !all) return;
  const real = all.filter((x) => !Number.isNaN(x));
  const low = real.reduce((a, x) => Math.min(a, x), Infinity);
  const high = real.reduce((a, x) => Math.max(a, x), -Infinity);
  const bins = Math.max(8, Math.min(36, Math.round(2 * Math.cbrt(real.length))));
  const width = (high - low) / bins || Math.max(Math.abs(low) * 0.02, 1e-6);
  const start = high > low ? low : low - (bins / 2) * width;
  const kinds = data.scored ? [["right", 1], ["wrong", 0]] : [["accent", null]];
  const counts = kinds.map(() => new Array(bins).fill(0));
  for (let i = 0; i < N; i++) {
    if (Number.isNaN(all[i])) continue;
    const bin = Math.min(bins - 1, Math.floor((all[i] - start) / width));
    counts[data.scored && samples.correct[i] !== 1 ? 1 : 0][bin] += 1;
  }
  const x = Array.from({ length: bins }, (_, i) => start + (i + 0.5) * width);
  const traces = real.length ? counts.map((y, k) => ({
    type: "bar", x, y, width, marker: { color: color(kinds[k][0]), line: { width: 0 } },
    hovertemplate: `%{y} questions${data.scored ? ` answered ${kinds[k][0]}` : ""}<br>around %{x:.4g}<extra></extra>`,
  })) : [];
  const mean = measures[state.measure].mean[row(state.layer, state.head)];
  Plotly.react(element, traces, layout({
    height: 178, width: element.clientWidth, barmode: "stack", margin: { l: 38, r: 6, t: 6, b: 30 },
    xaxis: axis({ nticks: 5, ticks: "outside", ticklen: 4, showline: true }),
    yaxis: axis({ nticks: 4, showgrid: true, gridcolor: color("faint"), rangemode: "tozero" }),
    shapes: mean === null ? [] : [{ type: "line", x0: mean, x1: mean, yref: "paper", y0: 0, y1: 1,
      line: { color: color("ink"), width: 1.2, dash: "2px,2px" } }],
  }), CONFIG);
}

function drawLayers(element) {
  if (isFolded(element)) return;
  const m = measures.find((x) => x.name === element.dataset.layers);
  const real = places.map((_, i) => i).filter((i) => m.mean[i] !== null), means = layerMeans(m);
  const x = real.map((i) => places[i][0]), y = real.map((i) => m.mean[i]);
  const dots = { type: "scatter", mode: "markers", x, y, hoverinfo: "skip",
    marker: { size: 4.5, color: color("soft"), opacity: 0.38 } };
  const line = { type: "scatter", mode: "lines+markers", x: means.map((_, l) => l), y: means,
    line: { color: color("accent"), width: 2 }, marker: { size: 5 },
    hovertemplate: "layer %{x}: mean %{y:.4g}<extra></extra>" };
  return Plotly.react(element, [dots, line], layout({
    height: 250, width: element.clientWidth, xaxis: axis({ title: "layer", tickmode: "linear", tick0: 0,
      dtick: step(L, Math.min(16, element.clientWidth / 26)), showline: true, range: [-0.6, L - 0.4] }),
    yaxis: axis({ showgrid: true, gridcolor: color("faint"), nticks: 6, rangemode: "tozero" }),
  }), CONFIG);
}

// Spearman's correlation, ties shared.
function spearman(a, b) {
  const ranked = (v) => {
    const order = [...v.keys()].sort((i, j) => v[i] - v[j]), found = new Array(v.length);
    for (let i = 0; i < order.length;) {
      let j = i;
      while (j < order.length && v[order[j]] === v[order[i]]) j++;
      for (let k = i; k < j; k++) found[order[k]] = (i + j - 1) / 2;
      i = j;
    }
    return found;
  };
  const x = ranked(a), y = ranked(b), middle = (x.length - 1) / 2;
  let xy = 0, xx = 0, yy = 0;
  x.forEach((value, i) => {
    xy += (value - middle) * (y[i] - middle);
    xx += (value - middle) ** 2;
    yy += (y[i] - middle) ** 2;
  });
  return xx && yy ? xy / Math.sqrt(xx * yy) : NaN;
}

function drawRelation() {
  const element = $("relation-figure");
  if (!element) return;
  const a = measures[Number($("relation-x").value)], b = measures[Number($("relation-y").value)];
  const both = places.map((_, i) => i).filter((i) => a.mean[i] !== null && b.mean[i] !== null);
  const x = both.map((i) => a.mean[i]), y = both.map((i) => b.mean[i]);
  const wide = (v) => v.length > 1 && v.every((value) => value > 0)
    && v.reduce((s, q) => Math.max(s, q), 0) > 30 * v.reduce((s, q) => Math.min(s, q), Infinity);
  const scale = (v) => wide(v) ? { type: "log", dtick: "D2" } : { nticks: 7 };
  Plotly.react(element, [{
    type: "scatter", mode: "markers", x, y, customdata: both,
    text: both.map((i) => `<b>${nameOf(...places[i])}</b><br>${show(a.mean[i])} and ${show(b.mean[i])}`),
    hoverinfo: "text", marker: { size: 8, opacity: 0.85, color: both.map((i) => places[i][0]),
      colorscale: SEQUENTIAL, cmin: 0, cmax: Math.max(1, L - 1), line: { width: 0.7, color: color("paper") },
      colorbar: L > 1 ? { title: { text: "layer", side: "top", font: { size: 12 } }, thickness: 9, outlinewidth: 0,
        x: 1.012, xpad: 0, ypad: 0, dtick: step(L, 8), tickfont: { size: 11.5 } } : undefined,
      showscale: L > 1 },
  }], layout({
    height: 430, width: element.clientWidth, margin: { l: 64, r: 74, t: 8, b: 46 },
    xaxis: axis({ title: `mean ${formulaOf(a)}, ${escaped(a.unit)}`, showgrid: true,
      gridcolor: color("faint"), ...scale(x) }),
    yaxis: axis({ title: `mean ${formulaOf(b)}, ${escaped(b.unit)}`, showgrid: true,
      gridcolor: color("faint"), ...scale(y) }),
  }), CONFIG);
  const rho = spearman(x, y);
  const note = $("relation-note");
  note.textContent = "Each dot is a head: mean ";
  formulaInto(note, a.formula).append(" across, mean ");
  formulaInto(note, b.formula).append(" up." + (Number.isNaN(rho) ? "" : ` Rank correlation over ${both.length} heads: ${rho.toFixed(3)} (Spearman).`));
}

function drawAll() {
  document.querySelectorAll(".map").forEach(drawMap);
  document.querySelectorAll("[data-difference]").forEach(drawDifference);
  document.querySelectorAll("[data-layers]").forEach(drawLayers);
  drawRelation();
  drawSpread();
}
