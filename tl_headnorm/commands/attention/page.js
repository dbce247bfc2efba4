"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { layer: D.start[0], head: D.start[1], view: "head", query: D.labels.length - 1, scale: "sqrt", cells: "patterns", watched: 0 };
const n = D.labels.length, L = D.layers.length, H = D.n_heads;
let thumbs, patterns, profile, lastRows, written;

const { inflate } = page, dark = page.isDark;
const css = page.color;
const STOPS = {
  light: [[255, 255, 255], [198, 219, 239], [107, 174, 214], [33, 113, 181], [8, 48, 107]],
  dark: [[20, 24, 30], [24, 62, 105], [38, 118, 190], [128, 196, 250], [245, 251, 255]],
};
const CHANGE = {
  light: [[178, 24, 43], [244, 165, 130], [247, 247, 247], [146, 197, 222], [33, 102, 172]],
  dark: [[255, 120, 100], [150, 62, 52], [34, 40, 47], [40, 96, 150], [120, 190, 255]],
};
function colour(share, table = STOPS) {
  const stops = dark() ? table.dark : table.light;
  const x = Math.min(1, Math.max(0, share)) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(x));
  return stops[i].map((a, j) => a + (stops[i + 1][j] - a) * (x - i));
}
const tables = {};
function quick(share) {  // colour() from a table of 256: a picture has many pixels
  const name = dark() ? "dark" : "light";
  tables[name] ??= Array.from({ length: 256 }, (_, i) => colour(i / 255));
  return tables[name][Math.min(255, Math.round(share * 255))];
}
const rgb = (c) => `rgb(${c.map(Math.round).join(",")})`;
const shade = (w) => (state.scale === "sqrt" ? Math.sqrt(w) : w);
const fixed = (w) => (w === null || Number.isNaN(w) ? "–" : w.toFixed(4));
function visible(label) {
  return label.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍").replace(/^ +| +$/g, (s) => "·".repeat(s.length));
}
const named = (i, labels = D.labels) => `${i} “${visible(labels[i])}”`;

function canvasOf(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.font = "11px system-ui, 'Noto Sans CJK SC', sans-serif";
  pen.fillStyle = css("ink");
  return pen;
}
function picture(columns, rows, at) {
  const made = document.createElement("canvas");
  made.width = columns; made.height = rows;
  const pen = made.getContext("2d"), data = pen.createImageData(columns, rows);
  for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
    const c = at(x, y), i = 4 * (y * columns + x);
    if (c) { data.data[i] = c[0]; data.data[i + 1] = c[1]; data.data[i + 2] = c[2]; data.data[i + 3] = 255; }
  }
  pen.putImageData(data, 0, 0);
  return made;
}
const small = {};
function thumbnail(from) {
  const name = `${dark()} ${from}`, s = D.side;
  return small[name] ??= picture(s, s, (a, b) => quick(thumbs[from + b * s + a] / 255));
}
function tip(event, text) {
  const box = $("tip");
  box.style.display = text ? "block" : "none";
  if (!text) return;
  box.textContent = text;
  box.style.left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8) + "px";
  box.style.top = Math.min(event.clientY + 16, innerHeight - box.offsetHeight - 8) + "px";
}
function hover(canvas, locate, describe, click) {
  canvas.onmousemove = (e) => { const at = locate(e.offsetX, e.offsetY); tip(e, at && describe(at)); };
  canvas.onmouseleave = () => tip(null, "");
  if (click) canvas.onclick = (e) => { const at = locate(e.offsetX, e.offsetY); if (at) click(at); };
}

// Patterns: lower triangles, one after another, 65535 = 1.
const key = () => state.view === "head" ? `${state.layer}.${state.head}`
  : state.view === "over heads" ? `layer ${state.layer}` : state.view === "over layers" ? `head ${state.head}` : "all heads";
function weights() {
  const i = D.names.indexOf(key());
  if (i < 0) return null;
  const size = n * (n + 1) / 2, part = patterns.subarray(i * size, (i + 1) * size);
  return (q, k) => k > q ? 0 : part[q * (q + 1) / 2 + k] / 65535;
}
// The weights from one query, by key: of every head from the last token, else of whole patterns.
function rowOf(query) {
  const at = weights();
  if (at) return (k) => at(query, k);
  if (state.view !== "head" || query !== n - 1) return null;
  const from = (layerRow() * H + state.head) * n;
  return (k) => lastRows[from + k] / 65535;
}
const layerRow = () => D.layers.indexOf(state.layer);

function drawGrid() {
  const canvas = $("grid"), left = 30, top = 20;
  const width = canvas.parentElement.clientWidth;
  const cell = Math.max(8, Math.min(96, (width - left) / H)), height = top + cell * L;
  const pen = canvasOf(canvas, left + cell * H, height);
  const gap = cell > 16 ? 2 : 1, grid = state.cells === "patterns" ? null : D.maps[state.cells];
  pen.imageSmoothingEnabled = cell < D.side;
  const range = grid && limits(grid);
  for (let l = 0; l < L; l++) for (let h = 0; h < H; h++) {
    const x = left + h * cell, y = top + l * cell;
    if (grid) {
      pen.fillStyle = rgb(tone(grid, range, grid.values[l][h]));
      pen.fillRect(x, y, cell - gap, cell - gap);
    } else {
      const s = D.side, from = (l * H + h) * s * s;
      pen.drawImage(thumbnail(from), x, y, cell - gap, cell - gap);
      if (!dark()) { pen.strokeStyle = css("rule"); pen.lineWidth = .5; pen.strokeRect(x, y, cell - gap, cell - gap); }
    }
  }
  pen.fillStyle = css("soft"); pen.textBaseline = "middle"; pen.textAlign = "center";
  const every = Math.ceil(18 / cell), down = Math.ceil(13 / cell);
  for (let h = 0; h < H; h += every) pen.fillText(h, left + h * cell + cell / 2, 9);
  pen.textAlign = "right";
  for (let l = 0; l < L; l += down) pen.fillText(D.layers[l], left - 5, top + l * cell + cell / 2);
  pen.strokeStyle = css("cursor"); pen.lineWidth = 2.5;
  pen.strokeRect(left + state.head * cell - 1, top + layerRow() * cell - 1, cell - gap + 2, cell - gap + 2);
  const locate = (x, y) => {
    const h = Math.floor((x - left) / cell), l = Math.floor((y - top) / cell);
    return h >= 0 && h < H && l >= 0 && l < L ? [l, h] : null;
  };
  hover(canvas, locate, ([l, h]) => `head ${D.layers[l]}.${h}` + (grid ? `: ${grid.label} ${fixed(grid.values[l][h])}` : "")
    + (D.names.includes(`${D.layers[l]}.${h}`) ? "" : "\n(thumbnail only)"), ([l, h]) => choose(D.layers[l], h));
}

function drawLarge() {
  const canvas = $("large"), at = weights(), width = Math.min(canvas.parentElement.clientWidth, 780);
  const left = 96, top = 8, bottom = 84, size = Math.max(120, width - left - 6), cell = size / n;
  const pen = canvasOf(canvas, width, size + bottom + top);
  let made;
  if (at) {
    made = picture(n, n, (x, y) => (x <= y ? quick(shade(at(y, x))) : null));
    pen.imageSmoothingEnabled = cell < 1;
  } else {
    const s = D.side, from = (layerRow() * H + state.head) * s * s;
    made = thumbnail(from);
    pen.imageSmoothingEnabled = false;
  }
  const used = at ? n : Math.ceil(n / D.step), span = at ? n : used * D.step;
  pen.drawImage(made, 0, 0, used, used, left, top, size * span / n, size * span / n);
  pen.strokeStyle = css("rule"); pen.strokeRect(left, top, size, size);
  labelAxes(pen, D.labels, D.labels, left, top, size, size, cell, cell);
  pen.fillStyle = css("key");
  for (const word of D.keywords) for (const k of word.positions) pen.fillRect(left + k * cell, top + size, Math.max(cell, 1.5), 4);
  pen.strokeStyle = css("cursor"); pen.lineWidth = 1;
  pen.strokeRect(left, top + state.query * cell, size, Math.max(cell, 1));
  const locate = (x, y) => {
    const k = Math.floor((x - left) / cell), q = Math.floor((y - top) / cell);
    return k >= 0 && k < n && q >= 0 && q < n ? [q, k] : null;
  };
  hover(canvas, locate, ([q, k]) => `query ${named(q)}\nkey ${named(k)}\n` + (k > q ? "later than the query: not seen"
    : at ? `weight ${fixed(at(q, k))} (uniform ${fixed(1 / (q + 1))})` : "kept as a thumbnail only"), ([q]) => { state.query = q; drawLarge(); drawText(); });
  const what = { "head": `head ${state.layer}.${state.head}`, "over heads": `mean over the heads of layer ${state.layer}`,
    "over layers": `mean over the layers of head ${state.head}`, "all": "mean over all heads" }[state.view];
  $("what").textContent = what + (at ? "" : ` – kept as a thumbnail of ${used} × ${used} blocks only; ask for it with --heads ${state.layer}.${state.head}`);
}
function labelAxes(pen, across, down, left, top, width, height, cellX, cellY) {
  const short = (t) => { const v = visible(t); return v.length > 12 ? v.slice(0, 11) + "…" : v; };
  const everyY = Math.ceil(12 / cellY), everyX = Math.ceil(12 / cellX);
  const number = (i, every) => (every > 1 ? ` ${i}` : "");
  pen.fillStyle = css("ink"); pen.textBaseline = "middle"; pen.textAlign = "right";
  for (let i = 0; i < down.length; i += everyY) pen.fillText(short(down[i]) + number(i, everyY), left - 6, top + (i + .5) * cellY);
  for (let i = 0; i < across.length; i += everyX) {
    pen.save(); pen.translate(left + (i + .5) * cellX, top + height + 8); pen.rotate(-Math.PI / 3);
    pen.fillText(short(across[i]) + number(i, everyX), 0, 0); pen.restore();
  }
}

function drawText() {
  const box = $("text"), at = rowOf(state.query), keys = new Set(D.keywords.flatMap((w) => w.positions));
  let most = 0, where = 0;
  if (at) for (let k = 0; k <= state.query; k++) if (at(k) > most) { most = at(k); where = k; }
  box.replaceChildren(...D.labels.map((label, k) => {
    const span = document.createElement("span");
    span.textContent = D.pieces[k];
    if (keys.has(k)) span.classList.add("key");
    if (k === state.query) span.classList.add("on");
    if (at && k <= state.query && most) {
      const c = colour(shade(at(k) / most) * .85);
      span.style.background = rgb(c);
      span.style.color = .3 * c[0] + .59 * c[1] + .11 * c[2] > 140 ? "#111" : "#fff";
    } else if (k > state.query) span.style.opacity = .45;
    span.onmousemove = (e) => tip(e, `key ${named(k)}` + (at && k <= state.query ? `\nweight ${fixed(at(k))} from query ${named(state.query)}` : ""));
    span.onmouseleave = () => tip(null, "");
    span.onclick = () => { state.query = k; drawLarge(); drawText(); };
    return span;
  }));
  $("asked").textContent = at
    ? `What ${named(state.query)} attends to (most: ${fixed(most)}, to ${named(where)}). Click a token to ask for another one.`
    : `The weights from ${named(state.query)} were not kept for this head; those from the last token were: click it.`;
}

function drawFacts() {
  const l = layerRow(), rows = Object.entries(D.maps).filter(([, m]) => !m.signed);
  $("facts").replaceChildren(tableOf(["score", `head ${state.layer}.${state.head}`, "uniform head"],
    rows.map(([, m]) => [m.label, fixed(m.values[l][state.head]), m.uniform === null ? "" : fixed(m.uniform)])));
  const canvas = $("profile"), width = Math.min(canvas.parentElement.clientWidth, 560), height = 190;
  const pen = canvasOf(canvas, width, height), reach = D.reach, from = (l * H + state.head) * reach;
  const left = 44, bottom = 34, w = width - left - 8, h = height - bottom - 8;
  const own = Array.from({ length: reach }, (_, d) => profile[from + d] / 65535);
  const top = Math.max(...own, ...D.uniform_profile) || 1;
  const x = (d) => left + (reach > 1 ? Math.log1p(d) / Math.log1p(reach - 1) : 0) * w, y = (v) => 8 + h * (1 - v / top);
  pen.strokeStyle = css("rule"); pen.strokeRect(left, 8, w, h);
  for (const [line, name, dash] of [[D.uniform_profile, "soft", [4, 3]], [own, "cursor", []]]) {
    pen.beginPath(); pen.setLineDash(dash); pen.strokeStyle = css(name); pen.lineWidth = 1.6;
    line.forEach((v, d) => (d ? pen.lineTo(x(d), y(v)) : pen.moveTo(x(d), y(v)))); pen.stroke();
  }
  pen.setLineDash([]); pen.fillStyle = css("soft"); pen.textAlign = "center"; pen.textBaseline = "top";
  for (const d of [0, 1, 2, 4, 8, 16, 32, 64, 127].filter((d) => d < reach)) pen.fillText(d, x(d), height - bottom + 3);
  pen.fillText("tokens back from the query; dashed: a uniform head", left + w / 2, height - 14);
  pen.textAlign = "right"; pen.textBaseline = "middle";
  for (const v of [0, top / 2, top]) pen.fillText(v.toFixed(2), left - 5, y(v));
}
function tableOf(head, rows, heads) {
  const table = document.createElement("table"), cells = (tag, values) => {
    const row = document.createElement("tr");
    for (const v of values) { const cell = document.createElement(tag); cell.textContent = v; row.append(cell); }
    return row;
  };
  const top = document.createElement("thead"), body = document.createElement("tbody");
  top.append(cells("th", head));
  rows.forEach((values, i) => {
    const row = cells("td", values);
    if (heads) { row.dataset.head = heads[i].join("."); row.onclick = () => choose(...heads[i]); }
    body.append(row);
  });
  table.append(top, body);
  return table;
}

// Maps of layers by heads: from 0, or signed around 0.
function limits(map) {
  const all = map.values.flat().filter((v) => v !== null);
  const most = Math.max(...all.map(Math.abs), 1e-9);
  return map.signed ? [-most, most] : [0, most];
}
function tone(map, [low, high], v) {
  return v === null ? [128, 128, 128] : colour((v - low) / (high - low || 1), map.signed ? CHANGE : STOPS);
}
function drawMap(canvas, map) {
  const range = limits(map), width = canvas.parentElement.clientWidth, left = 26, top = 4, bar = 46;
  const cellX = (width - left - bar - 8) / H, cellY = Math.max(4, Math.min(18, 260 / L));
  const pen = canvasOf(canvas, width, top + L * cellY + 20);
  map.values.forEach((row, l) => row.forEach((v, h) => {
    pen.fillStyle = rgb(tone(map, range, v));
    pen.fillRect(left + h * cellX, top + l * cellY, cellX - .6, cellY - .6);
  }));
  pen.strokeStyle = css("cursor"); pen.lineWidth = 1.5;
  pen.strokeRect(left + state.head * cellX - .5, top + layerRow() * cellY - .5, cellX, cellY);
  pen.fillStyle = css("soft"); pen.textAlign = "center"; pen.textBaseline = "top";
  for (let h = 0; h < H; h += Math.ceil(18 / cellX)) pen.fillText(h, left + (h + .5) * cellX, top + L * cellY + 4);
  pen.textAlign = "right"; pen.textBaseline = "middle";
  for (let l = 0; l < L; l += Math.ceil(12 / cellY)) pen.fillText(D.layers[l], left - 4, top + (l + .5) * cellY);
  const tall = L * cellY, x = width - bar;
  for (let i = 0; i < tall; i++) {
    pen.fillStyle = rgb(tone(map, [0, 1], 1 - i / tall)); pen.fillRect(x, top + i, 9, 1.5);
  }
  pen.fillStyle = css("ink"); pen.textAlign = "left";
  const mark = (v) => top + 5 + (tall - 10) * (1 - (v - range[0]) / (range[1] - range[0] || 1));
  pen.fillText(range[1].toPrecision(2), x + 12, mark(range[1])); pen.fillText(range[0].toPrecision(2), x + 12, mark(range[0]));
  if (map.uniform !== null && map.uniform > range[0] && map.uniform < range[1]) {
    pen.fillStyle = css("cursor"); pen.fillRect(x - 2, top + tall * (1 - (map.uniform - range[0]) / (range[1] - range[0])), 13, 1.5);
  }
  hover(canvas, (px, py) => {
    const h = Math.floor((px - left) / cellX), l = Math.floor((py - top) / cellY);
    return h >= 0 && h < H && l >= 0 && l < L ? [l, h] : null;
  }, ([l, h]) => `head ${D.layers[l]}.${h}: ${fixed(map.values[l][h])}` + (map.uniform === null ? "" : ` (uniform ${fixed(map.uniform)})`),
  ([l, h]) => choose(D.layers[l], h));
}
function mapsInto(box, maps) {
  if (!box.children.length) for (const map of maps) {
    const part = document.createElement("div"), name = document.createElement("h3");
    name.textContent = map.label; part.append(name, document.createElement("canvas")); box.append(part);
  }
  maps.forEach((map, i) => drawMap(box.children[i].lastElementChild, map));
}

function drawWriting() {
  if (!D.writing) return;
  const W = D.writing, canvas = $("writing"), total = W.labels.length, steps = W.steps;
  const width = canvas.parentElement.clientWidth, left = 96, bottom = 84, w = width - left - 6, cellX = w / total;
  const cellY = Math.max(7, Math.min(20, 460 / steps)), h = cellY * steps;
  const from = state.watched * steps * total, at = (t, k) => written[from + t * total + k] / 65535;
  const pen = canvasOf(canvas, width, h + bottom);
  const made = picture(total, steps, (k, t) => (k < W.n_prompt + t ? quick(shade(at(t, k))) : null));
  pen.imageSmoothingEnabled = cellX < 1;
  pen.drawImage(made, left, 0, w, h);
  pen.strokeStyle = css("cursor"); pen.lineWidth = 1;
  pen.beginPath(); pen.moveTo(left + W.n_prompt * cellX, 0); pen.lineTo(left + W.n_prompt * cellX, h); pen.stroke();
  labelAxes(pen, W.labels, W.labels.slice(W.n_prompt), left, 0, w, h, cellX, cellY);
  hover(canvas, (x, y) => {
    const k = Math.floor((x - left) / cellX), t = Math.floor(y / cellY);
    return k >= 0 && k < total && t >= 0 && t < steps ? [t, k] : null;
  }, ([t, k]) => `writing ${named(W.n_prompt + t, W.labels)}\nlooking at ${named(k, W.labels)}\n`
    + (k < W.n_prompt + t ? `weight ${fixed(at(t, k))}` : "not there yet"));
}

function choose(layer, head) {
  state.layer = layer; state.head = head;
  tip(null, "");
  if (state.view === "all") state.view = $("view").value = "head";
  drawAll();
}
function drawAll() {
  drawGrid(); drawLarge(); drawText(); drawFacts();
  mapsInto($("scores"), Object.values(D.maps).filter((m) => m.group === "scores"));
  if (D.keywords.length) mapsInto($("focus"), Object.values(D.maps).filter((m) => m.group === "focus"));
  if (D.distraction) mapsInto($("distraction"), D.distraction);
  drawWriting();
}
async function start() {
  thumbs = new Uint8Array(await inflate(D.thumbs));
  patterns = new Uint16Array(await inflate(D.patterns));
  profile = new Uint16Array(await inflate(D.profile));
  lastRows = new Uint16Array(await inflate(D.last_rows));
  if (D.writing) written = new Uint16Array(await inflate(D.writing.weights));
  for (const [name, map] of Object.entries(D.maps)) $("cells").append(new Option(map.label, name));
  $("cells").onchange = (e) => { state.cells = e.target.value; drawGrid(); };
  $("view").onchange = (e) => { state.view = e.target.value; drawLarge(); drawText(); };
  $("scale").onchange = (e) => { state.scale = e.target.value; drawAll(); };
  for (const word of D.keywords) {
    const part = document.createElement("div"), name = document.createElement("h3");
    name.textContent = `“${visible(word.text)}”: heads by weight`;
    part.append(name, tableOf(["head", "weight", "uniform"], word.ranked.map(([l, h, w]) => [`${l}.${h}`, fixed(w), fixed(word.uniform)]), word.ranked.map(([l, h]) => [l, h])));
    $("ranked").append(part);
  }
  if (D.writing) {
    D.writing.heads.forEach(([l, h], i) => $("watched").append(new Option(`${l}.${h}`, i)));
    $("watched").onchange = (e) => { state.watched = +e.target.value; drawWriting(); };
  }
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  $("grid").onkeydown = (e) => {
    const move = moves[e.key];
    if (!move) return;
    e.preventDefault();
    const l = Math.min(L - 1, Math.max(0, layerRow() + move[0])), h = Math.min(H - 1, Math.max(0, state.head + move[1]));
    choose(D.layers[l], h);
  };
  $("large").onkeydown = (e) => {
    const by = { ArrowUp: -1, ArrowDown: 1 }[e.key];
    if (!by) return;
    e.preventDefault();
    state.query = Math.min(n - 1, Math.max(0, state.query + by)); drawLarge(); drawText();
  };
  page.onTheme(drawAll);
  let wait; addEventListener("resize", () => { clearTimeout(wait); wait = setTimeout(drawAll, 120); });
  drawAll();
}
start().catch((error) => { $("what").textContent = `This page needs a browser with DecompressionStream: ${error}`; });
