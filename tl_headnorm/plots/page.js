// Every page: light and dark, packed data, and plotly figures in the page's colours.
const page = (() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const darkness = matchMedia("(prefers-color-scheme: dark)");
  const listeners = [], known = new Map();
  const isDark = () => (root.dataset.theme ?? (darkness.matches ? "dark" : "light")) === "dark";

  function changed() {
    known.clear();
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-pressed", String(isDark()));
    listeners.forEach((redraw) => redraw());
  }
  // "dark", "light", or undefined: as the system has it.
  function setTheme(name) {
    if (name) root.dataset.theme = name; else delete root.dataset.theme;
    changed();
  }
  button.addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
  darkness.addEventListener("change", () => { if (!root.dataset.theme) changed(); });
  // Paper is light.
  let before;
  addEventListener("beforeprint", () => { before = root.dataset.theme; setTheme("light"); });
  addEventListener("afterprint", () => setTheme(before));

  // The colour that a variable of the stylesheet has now, as rgb(...).
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  function color(name) {
    if (!known.has(name)) {
      probe.style.color = `var(--${name})`;
      known.set(name, getComputedStyle(probe).color);
    }
    return known.get(name);
  }

  async function inflate(text) {
    const bytes = Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  }

  // plotly.js, for pages that hold it; a script element of its own defines window.Plotly.
  const plotly = (async () => {
    const held = document.getElementById("plotly");
    if (!held) return null;
    const script = document.createElement("script");
    script.textContent = new TextDecoder().decode(await inflate(held.textContent));
    document.head.append(script);
    held.remove();
    return window.Plotly;
  })();

  function template() {
    const line = { gridcolor: color("faint"), linecolor: color("rule"), zeroline: false };
    const space = { ...line, backgroundcolor: "rgba(0,0,0,0)", color: color("soft") };
    return { layout: {
      font: { family: getComputedStyle(button).fontFamily, color: color("ink") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      xaxis: { ...line, automargin: true }, yaxis: { ...line, automargin: true },
      scene: { xaxis: space, yaxis: space, zaxis: space },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("rule"), activecolor: color("ink") },
      hoverlabel: { align: "left" }, legend: { bgcolor: "rgba(0,0,0,0)" },
    } };
  }

  async function drawFigures() {
    const figures = [...document.querySelectorAll(".figure")];
    if (!figures.length || !await plotly) return;
    for (const element of figures) {
      const { data, layout } = JSON.parse(element.firstElementChild.textContent);
      // As wide as the page, but no narrower than its panels can be read; then it scrolls.
      const wide = layout.width ?? 0;
      if (wide > 800) element.style.minWidth = `${Math.round(wide * 0.62)}px`;
      else if (wide) element.style.maxWidth = `${wide}px`;
      delete layout.width;
      element.replaceChildren();
      await Plotly.newPlot(element, data, { ...layout, template: template(), autosize: true },
        { responsive: true, displaylogo: false });
    }
    listeners.push(() => figures.forEach((element) => Plotly.relayout(element, { template: template() })));
    root.dataset.drawn = "true";
  }
  changed();
  drawFigures();
  return { color, inflate, isDark, plotly, setTheme, onTheme: (redraw) => listeners.push(redraw) };
})();
