// The head's panel; pointer, pins and keys; redrawing for themes, sizes and paper.
function cursor(element) {
  let box = element.querySelector(":scope > .cursor");
  if (!box) {
    box = make("div", null, { class: "cursor", "aria-hidden": "true" });
    element.append(box);
  }
  // The drawn plot's own frame: margins that plotly widened are in it.
  const frame = element.querySelector(".nsewdrag");
  if (!frame) return;
  const [left, top, width, height] = ["x", "y", "width", "height"].map((k) => Number(frame.getAttribute(k)));
  box.style.left = `${left + (state.head * width) / H - 1}px`;
  box.style.top = `${top + (state.layer * height) / L - 1}px`;
  box.style.width = `${width / H + 2}px`;
  box.style.height = `${height / L + 2}px`;
  box.classList.toggle("pinned", state.pinned);
}

const NEAR_CONSTANT = 0.02; // std over |mean|

function drawNumbers() {
  const at = row(state.layer, state.head);
  $("head-name").textContent = `Layer ${state.layer}, head ${state.head}`;
  $("head-numbers").tBodies[0].replaceChildren(...measures.map((m, k) => {
    const line = make("tr", null, { class: k === state.measure ? "active" : "" });
    line.append(formulaInto(make("td", null, { title: m.name }), m.formula), make("td", show(m.mean[at])),
      make("td", show(m.std && m.std[at], 3)),
      make("td", ranks[k].of[at] === null ? "no data" : `${ranks[k].of[at]} / ${ranks[k].count}`));
    return line;
  }));
  const m = measures[state.measure], share = m.std && m.mean[at] ? Math.abs(m.std[at] / m.mean[at]) : null;
  $("head-spread").textContent = share === null || m.std[at] === null ? ""
    : `${share < NEAR_CONSTANT ? "near-constant: " : ""}std is ${show(100 * share, 2)} % of the mean`;
  if ($("spread-title")) {
    const title = $("spread-title"), m = measures[state.measure];
    title.textContent = "";
    formulaInto(title, m.formula).append(` over ${questions(N)}`);
    if (data.scored) for (const kind of ["right", "wrong"]) {
      const mark = make("i");
      mark.style.background = color(kind);
      title.append(mark, kind);
    }
  }
  const active = $("head-numbers").querySelector("tr.active"), box = $("head-numbers").parentElement;
  box.scrollTop = Math.max(0, active.offsetTop - box.clientHeight / 2);
  const scores = data.scores.filter((s) => s.values[at] !== null);
  const list = make("table", null, { class: "numbers" });
  for (const s of scores) {
    const line = make("tr");
    line.append(make("td", s.name, { title: s.study }),
      make("td", show(s.values[at], 3) + (s.stderr && s.stderr[at] !== null ? ` ± ${show(s.stderr[at], 2)}` : "")));
    list.append(line);
  }
  $("head-scores").replaceChildren(...(scores.length
    ? [make("p", "Without it, and what it is worth", { class: "chart-title" }), list] : []));
}

function drawState() {
  const line = $("state");
  document.body.classList.toggle("pinned", state.pinned);
  if (!state.pinned) { line.textContent = hasValues ? "Under the pointer. Click to pin." : "Under the pointer."; return; }
  const button = make("button", "let go", { type: "button" });
  button.addEventListener("click", unpin);
  line.replaceChildren("Pinned. ", button);
}

function announce() {
  const at = row(state.layer, state.head), m = measures[state.measure];
  $("announcement").textContent = `Layer ${state.layer}, head ${state.head}: ${m.formula} `
    + (m.mean[at] === null ? "no data" : `${show(m.mean[at])}, rank ${ranks[state.measure].of[at]} of ${ranks[state.measure].count}`)
    + (state.pinned ? ", pinned" : "");
}

let asked = null;
function showHead(layer, head, measure = state.measure) {
  Object.assign(state, { layer, head, measure });
  document.querySelectorAll(".map").forEach(cursor);
  // Pointers move faster than screens: one redraw a frame.
  if (asked === null) asked = requestAnimationFrame(() => {
    asked = null;
    drawNumbers();
    drawSpread();
    announce();
  });
}

function pin(layer, head, measure = state.measure) {
  state.pinned = true;
  showHead(layer, head, measure);
  history.replaceState(null, "", `#h=${nameOf(layer, head)}&m=${measures[measure].name}`);
  drawState();
  drawSamples();
}

function unpin() {
  state.pinned = false;
  history.replaceState(null, "", location.pathname);
  showHead(state.layer, state.head);
  drawState();
  drawSamples();
}

const MOVES = {
  ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
  PageUp: [-4, 0], PageDown: [4, 0], Home: [0, -H], End: [0, H],
};

function onKey(event) {
  const measure = Number(event.currentTarget.dataset.measure);
  const move = MOVES[event.key], clamp = (x, n) => Math.max(0, Math.min(n - 1, x));
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (move) {
    const layer = clamp(state.layer + move[0], L), head = clamp(state.head + move[1], H);
    if (state.pinned) pin(layer, head, measure); else showHead(layer, head, measure);
  } else if (event.key === "Enter" || event.key === " ") {
    pin(state.layer, state.head, measure);
  } else if (event.key !== "Escape") return;
  else unpin();
  event.preventDefault();
}

// From the pointer, not from plotly's events: those pass over cells without values.
function cellAt(element, event) {
  const frame = element.querySelector(".nsewdrag")?.getBoundingClientRect();
  if (!frame) return null;
  const layer = Math.floor(((event.clientY - frame.top) / frame.height) * L);
  const head = Math.floor(((event.clientX - frame.left) / frame.width) * H);
  return layer >= 0 && layer < L && head >= 0 && head < H ? [layer, head] : null;
}

function listen(element) {
  const measure = Number(element.dataset.measure);
  const onCell = (act) => (event) => {
    const cell = cellAt(element, event);
    if (cell) act(...cell, measure);
  };
  element.addEventListener("mousemove", onCell((layer, head) => {
    if (!state.pinned && !(layer === state.layer && head === state.head && measure === state.measure)) {
      showHead(layer, head, measure);
    }
  }));
  element.addEventListener("click", onCell(pin));
  element.addEventListener("keydown", onKey);
  element.addEventListener("focus", () => { if (!state.pinned) showHead(state.layer, state.head, measure); });
}

function redraw() {
  drawAll();
  drawNumbers();
  document.querySelectorAll(".map").forEach(cursor);
}

// Start where there is most to see: at the largest head of the first measure.
const largest = Math.max(0, ranks[0].of.indexOf(1));
[state.layer, state.head] = places[largest];
redraw();
drawState();
document.querySelectorAll(".map").forEach(listen);

page.onTheme(redraw);
document.querySelectorAll("button.head").forEach((button) => button.addEventListener("click", () => {
  pin(Number(button.dataset.layer), Number(button.dataset.head));
  $("explorer").scrollIntoView();
}));
$("shade").addEventListener("change", () => document.querySelectorAll(".map").forEach((element) => {
  drawMap(element);
  cursor(element);
}));
document.querySelectorAll("details.more").forEach((more) => more.addEventListener("toggle", () => {
  more.querySelectorAll("[data-difference]").forEach(drawDifference);
  more.querySelectorAll("[data-layers]").forEach(drawLayers);
}));
["relation-x", "relation-y"].forEach((id) => $(id)?.addEventListener("change", drawRelation));
$("relation-figure")?.on("plotly_click", ({ points: [p] }) => pin(...places[p.customdata]));
$("scroller")?.addEventListener("scroll", drawRows, { passive: true });
$("find")?.addEventListener("input", (event) => {
  table.filter = event.target.value;
  $("scroller").scrollTop = 0;
  arrange();
});
let resized;
addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(redraw, 120); });

// Paper is one column wide; page.js makes it light, which draws all again.
addEventListener("beforeprint", () => {
  document.querySelectorAll(".map, .chart").forEach((element) => {
    element.style.width = element.closest(".pair") ? "318px" : "660px";
  });
  redraw();
});
addEventListener("afterprint", () => {
  document.querySelectorAll(".map, .chart").forEach((element) => { element.style.width = ""; });
  redraw();
});

// A head by its name, "24.7": from the field, or from the address with the measure's name.
function goTo(name, measure = state.measure) {
  const [layer, head] = (/^\s*(\d+)\.(\d+)\s*$/.exec(name) ?? []).slice(1).map(Number);
  const there = layer < L && head < H;
  if (there) pin(layer, head, measure);
  return there;
}
function goToAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  if (asked.has("h")) goTo(asked.get("h"), Math.max(0, measures.findIndex((m) => m.name === asked.get("m"))));
}
$("go").addEventListener("input", (event) => event.target.setCustomValidity(""));
$("go").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.target.setCustomValidity(goTo(event.target.value) ? "" : `expected layer.head up to ${nameOf(L - 1, H - 1)}`);
  event.target.reportValidity();
});
addEventListener("keydown", (event) => {
  if (event.key !== "/" || /INPUT|SELECT/.test(event.target.tagName)) return;
  event.preventDefault();
  $("go").focus();
});
addEventListener("hashchange", goToAddress);

function save(name, text, type) {
  const link = make("a", null, { download: name, href: URL.createObjectURL(new Blob([text], { type })) });
  link.click();
  URL.revokeObjectURL(link.href);
}
$("csv").addEventListener("click", () => {
  const columns = measures.flatMap((m) => [`${m.name}_mean`, `${m.name}_std`, `${m.name}_rank`]);
  const lines = places.map(([l, h], i) => [l, h, ...measures.flatMap((m, k) =>
    [m.mean[i], m.std && m.std[i], ranks[k].of[i]])].map((x) => x ?? "").join(","));
  save("heads.csv", [["layer", "head", ...columns].join(","), ...lines, ""].join("\n"), "text/csv");
});
document.querySelectorAll("[data-picture]").forEach((button) => button.addEventListener("click", () =>
  Plotly.downloadImage($(`map-${state.measure}`), { format: button.dataset.picture, scale: 2,
    filename: measures[state.measure].name })));
$("link").addEventListener("click", async () => {
  history.replaceState(null, "", `#h=${nameOf(state.layer, state.head)}&m=${measures[state.measure].name}`);
  await navigator.clipboard?.writeText(location.href);
  $("link").textContent = "Copied";
  setTimeout(() => { $("link").textContent = "Copy link"; }, 1500);
});
goToAddress();

// For the console: headReport.values(0, layer, head) are one head's numbers.
window.headReport = { data, values, pin, unpin, state, table };
