// What the page holds, and how a number of it is read and written.
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("payload").textContent);
const { layers: L, heads: H, measures, samples } = data;
const N = samples ? samples.index.length : 0;
const hasValues = measures.some((m) => m.stride); // per sample

// The head shown, and whether a click has pinned it.
const state = { layer: 0, head: 0, measure: 0, pinned: false };
const row = (layer, head) => layer * H + head;

const blobs = new Map(); // a measure's base64 text, asked of the DOM once
const decoded = new Map(); // the heads shown last
const REMEMBERED = 64;

// One head's values over the samples, Float64Array; NaN where there is none.
function values(measure, layer, head) {
  const m = measures[measure];
  if (!m.stride) return null;
  const key = `${measure}:${layer}:${head}`;
  if (decoded.has(key)) return decoded.get(key);
  if (!blobs.has(measure)) blobs.set(measure, $(`values-${measure}`).textContent);
  const at = row(layer, head);
  const bytes = atob(blobs.get(measure).slice(at * m.stride, (at + 1) * m.stride));
  const low = m.low[at], span = m.high[at] - m.low[at];
  const found = new Float64Array(N);
  for (let i = 0; i < N; i++) {
    const code = bytes.charCodeAt(2 * i) | (bytes.charCodeAt(2 * i + 1) << 8);
    found[i] = code === 65535 || low === null ? NaN : low + (code / 65534) * span;
  }
  if (decoded.size >= REMEMBERED) decoded.delete(decoded.keys().next().value);
  decoded.set(key, found);
  return found;
}

// So many digits that count, with a real minus sign.
function show(x, digits = 4) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size >= 1e7 || size < 1e-4 ? x.toExponential(digits - 1)
    : size >= 10 ** digits ? x.toFixed(0) : x.toPrecision(digits);
  return text.replace(/-/g, "−");
}

// 1 for the largest mean; null where there is none.
const ranks = measures.map((m) => {
  const order = [...m.mean.keys()].filter((i) => m.mean[i] !== null);
  order.sort((a, b) => m.mean[b] - m.mean[a] || a - b);
  const found = new Array(L * H).fill(null);
  order.forEach((i, place) => { found[i] = place + 1; });
  return { of: found, count: order.length };
});

// Text of others goes into the page through textContent only.
function make(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// z_h and W_O^h as they are printed: into an element, and for plotly's labels.
const SCRIPT = /([_^])(\w+)/g;
function formulaInto(element, formula) {
  let from = 0;
  for (const found of formula.matchAll(SCRIPT)) {
    element.append(formula.slice(from, found.index), make(found[1] === "_" ? "sub" : "sup", found[2]));
    from = found.index + found[0].length;
  }
  element.append(formula.slice(from));
  return element;
}
const escaped = (text) => text.replace(/[&<>]/g, (c) => `&#${c.charCodeAt(0)};`);
const formulaOf = (m) => escaped(m.formula).replace(SCRIPT, (_, sign, word) =>
  sign === "_" ? `<sub>${word}</sub>` : `<sup>${word}</sup>`);

const questions = (n) => `${n.toLocaleString("en")} question${n === 1 ? "" : "s"}`;
const nameOf = (layer, head) => `${layer}.${head}`;
const { color } = page;
