// The questions of a pinned head: strongest, weakest, and a table drawn only where it is seen.
const ROW = 34, AROUND = 8;
const table = { order: [], sort: null, down: true, filter: "", drawn: "" };

const textOf = (i) => (samples.text && samples.text[i] !== null ? samples.text[i] : samples.id[i]);

function columns() {
  const kinds = [
    { name: "#", key: "index", get: (i) => samples.index[i], width: "74px", number: true },
    { name: samples.text ? "question" : "id", key: "text", get: textOf, wide: true },
    { name: "tokens", key: "tokens", get: (i) => samples.tokens[i], width: "84px", number: true },
    { name: "answer", key: "answer", get: (i) => samples.answer[i], width: "88px" },
  ];
  if (data.scored) {
    kinds.push({ name: "model", key: "predicted", get: (i) => samples.predicted[i], width: "84px" });
    kinds.push({ name: "correct", key: "correct", get: (i) => samples.correct[i], width: "94px" });
  }
  measures.forEach((m, k) => {
    if (!m.stride) return;
    const found = values(k, state.layer, state.head);
    kinds.push({ name: m.formula, key: `m${k}`, get: (i) => found[i], number: true, value: true,
      width: "112px", title: m.name });
  });
  return kinds;
}

// Missing values last, whichever way; ties in the order of the data set.
function sorted(column, down, rows) {
  const none = (v) => v === null || v === undefined || Number.isNaN(v);
  const keys = rows.map(column.get), order = [...rows.keys()];
  const collator = typeof keys.find((k) => !none(k)) === "string" ? new Intl.Collator("en", { numeric: true }) : null;
  order.sort((a, b) => {
    const x = keys[a], y = keys[b];
    if (none(x) || none(y)) return none(x) - none(y) || a - b;
    const by = collator ? collator.compare(x, y) : x - y;
    return (down ? -by : by) || a - b;
  });
  return order.map((k) => rows[k]);
}

function matching() {
  const all = [...Array(N).keys()], want = table.filter.trim().toLowerCase();
  if (!want) return all;
  return all.filter((i) => textOf(i).toLowerCase().includes(want)
    || samples.id[i].toLowerCase().includes(want));
}

function arrange() {
  const kinds = columns();
  const by = kinds.find((c) => c.key === table.sort) || kinds[0];
  table.order = sorted(by, table.down, matching());
  const count = table.order.length;
  $("found").textContent = table.filter.trim() ? `${count.toLocaleString("en")} of ${N.toLocaleString("en")}`
    : questions(N);
  const head = make("tr");
  for (const c of kinds) {
    const cell = make("th", null, { scope: "col", class: c.number ? "number" : "", title: c.title || "" });
    if (c.width) cell.style.width = c.width;
    if (c.key === by.key) cell.setAttribute("aria-sort", table.down ? "descending" : "ascending");
    const button = formulaInto(make("button", null, { type: "button", "data-key": c.key }), c.name);
    button.addEventListener("click", () => sortBy(c.key, c.number));
    cell.append(button);
    head.append(cell);
  }
  const asked = document.activeElement?.dataset?.key;
  $("table").tHead.replaceChildren(head);
  $("table").style.minWidth = `${900 + 112 * kinds.filter((c) => c.value).length}px`;
  if (asked) head.querySelector(`[data-key="${asked}"]`)?.focus();
  $("table").setAttribute("aria-rowcount", count + 1);
  table.drawn = "";
  drawRows();
}

function sortBy(key, number) {
  table.down = table.sort === key ? !table.down : Boolean(number);
  table.sort = key;
  $("scroller").scrollTop = 0;
  arrange();
}

function cellOf(column, i) {
  const cell = make("td", null, { class: column.number ? "number" : "" });
  const value = column.get(i);
  if (column.key === "text") {
    const button = make("button", value, { type: "button" });
    button.addEventListener("click", () => detail(i));
    cell.append(button);
  } else if (column.key === "correct") {
    cell.textContent = value === 1 ? "right" : "wrong";
    cell.className = value === 1 ? "yes" : "no";
  } else {
    cell.textContent = column.value ? show(value) : value ?? "–";
  }
  return cell;
}

function drawRows() {
  const box = $("scroller"), total = table.order.length;
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - AROUND);
  const last = Math.min(total, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + AROUND);
  const key = `${first}:${last}`;
  if (key === table.drawn) return;
  table.drawn = key;
  const kinds = columns(), body = [], space = (rows) => {
    const line = make("tr", null, { class: "space", "aria-hidden": "true" });
    const cell = make("td", null, { colspan: kinds.length });
    cell.style.height = `${rows * ROW}px`;
    line.append(cell);
    return line;
  };
  if (first > 0) body.push(space(first));
  for (let k = first; k < last; k++) {
    const line = make("tr", null, { "aria-rowindex": k + 2, "data-sample": table.order[k] });
    for (const column of kinds) line.append(cellOf(column, table.order[k]));
    body.push(line);
  }
  if (last < total) body.push(space(total - last));
  $("table").tBodies[0].replaceChildren(...body);
}

function extremes() {
  const found = values(state.measure, state.layer, state.head);
  const order = sorted({ get: (i) => found[i] }, true, [...Array(N).keys()])
    .filter((i) => !Number.isNaN(found[i]));
  const few = Math.min(5, Math.ceil(order.length / 2));
  const fill = (id, rows) => $(id).replaceChildren(...rows.map((i) => {
    const item = make("li");
    item.append(make("b", show(found[i])), make("span", textOf(i)));
    if (data.scored) item.lastChild.append(" ", make("small", samples.correct[i] === 1 ? "right" : "wrong",
      { class: samples.correct[i] === 1 ? "yes" : "no" }));
    return item;
  }));
  fill("strongest", order.slice(0, few));
  fill("weakest", order.slice(few).slice(-5).reverse());
  for (const word of ["strongest", "weakest"]) {
    const title = $(`${word}-title`);
    title.textContent = `Head ${nameOf(state.layer, state.head)} is ${word} on `;
    formulaInto(title.appendChild(make("small", "by ")), measures[state.measure].formula);
  }
}

function detail(i) {
  const box = $("detail");
  const top = make("p");
  top.append(make("small", `${samples.id[i]} · ${samples.tokens[i]} tokens`));
  const parts = [top, make("p", textOf(i))];
  const options = samples.options && samples.options[i];
  if (options) {
    const list = make("ul");
    options.forEach((text, k) => {
      const letter = String.fromCharCode(65 + k);
      const item = make("li", `${letter}. ${text}`);
      if (letter === samples.answer[i]) item.className = "answer";
      const marks = [letter === samples.answer[i] ? "right answer" : "",
        letter === samples.predicted[i] ? "the model's" : ""].filter(Boolean);
      if (marks.length) item.append(" ", make("small", `← ${marks.join(", ")}`));
      list.append(item);
    });
    parts.push(list);
  }
  const said = make("p", `Head ${nameOf(state.layer, state.head)} here: `);
  columns().filter((c) => c.value).forEach((c, k) => {
    formulaInto(said, k ? `, ${c.name}` : c.name).append(` = ${show(c.get(i), 5)}`);
  });
  parts.push(said);
  box.replaceChildren(...parts);
  box.hidden = false;
}

function drawSamples() {
  if (!$("samples-body")) return;
  $("samples-body").hidden = !state.pinned;
  $("samples-hint").hidden = state.pinned;
  $("detail").hidden = true;
  if (!state.pinned) return;
  if (table.sort === null || table.sort.startsWith("m")) {
    table.sort = `m${state.measure}`;
    table.down = true;
  }
  $("scroller").scrollTop = 0;
  $("scroller").style.height = `${Math.min(442, (N + 1) * ROW + 6)}px`;
  extremes();
  arrange();
}
