"use strict";
// Text from a run folder enters the page as text nodes only, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const settings = data.settings;
const $ = id => document.getElementById(id);
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined)
    .map(child => child instanceof Node ? child : String(child)));
  return node;
}
function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) node.style.setProperty(name, value); else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
const nameOf = metric => data.words[metric];
const scoreOf = setting => setting.scores[data.metric];

// --- what is sorted, filtered, selected and drawn
const COLOURS = 8, MOST_DRAWN = 16;  // each colour once as a line, once dashed
const state = { sort: "rank", down: false, text: "", pick: {}, every: false, setting: 0, slots: new Array(MOST_DRAWN).fill(null) };
let hot = null;
const slotOf = i => state.slots.indexOf(i);
const colourOf = slot => slot < 0 ? null : `var(--c${slot % COLOURS})`;
const isDashed = slot => slot >= COLOURS;
function dress(node, slot) {
  if (slot < 0) node.style.removeProperty("--slot"); else node.style.setProperty("--slot", colourOf(slot));
  node.classList.toggle("dashed", isDashed(slot));
}
function draw(i, wanted) {
  const slot = slotOf(i);
  if (wanted && slot < 0) { const free = state.slots.indexOf(null); if (free >= 0) state.slots[free] = i; }
  if (!wanted && slot >= 0) state.slots[slot] = null;
}
function drawThese(chosen) {
  state.slots.fill(null);
  chosen.slice(0, MOST_DRAWN).forEach((i, slot) => { state.slots[slot] = i; });
  showDrawn();
}
function showDrawn() {
  rows.forEach((row, i) => { const slot = slotOf(i); row.box.checked = slot >= 0; dress(row.tick, slot); dress(row.swatch, slot); });
  squares.forEach(square => { const slot = slotOf(Number(square.dataset.setting)); dress(square, slot); square.classList.toggle("drawn", slot >= 0); });
  drawCurves();
  remember();
}

// --- the table of settings
const severalDatasets = new Set(settings.map(s => s.dataset)).size > 1 && !data.axes.includes("dataset");
const wide = data.main.length > 5;  // too many axes for a column each: the setting's name has one instead
const columns = [{ id: "rank", name: "rank", get: s => s.rank === null ? null : settings.indexOf(s), text: s => s.rank ?? "–", num: true }];
columns.push({ id: "name", name: "configuration", get: s => s.name, text: s => s.name, kind: "name" });
if (severalDatasets) columns.push({ id: "dataset", name: "dataset", get: s => s.dataset, text: s => s.dataset });
const columnOf = i => ({ id: "axis:" + data.axes[i], name: data.short[i], axis: i, kind: "axis", follows: wide || !data.main.includes(i),
  get: s => data.values[i].indexOf(s.key[i]), text: s => s.key[i] });
columns.push(...data.main.map(columnOf));
columns.push({ id: data.metric, name: nameOf(data.metric), num: true, kind: "score", get: s => scoreOf(s) ? scoreOf(s).value : null, text: s => scoreOf(s) ? scoreOf(s).text : "–" });
const compared = settings.some(s => s.verdict && !s.chosen);
if (compared) columns.push({ id: "verdict", name: "compared with " + data.reference, kind: "verdict", get: s => s.rank, text: s => [s.verdict, s.detail].join(" ") });
if (data.metric !== "test_accuracy" && settings.filter(s => s.scores.test_accuracy).length > 1) {
  columns.push({ id: "test_accuracy", name: nameOf("test_accuracy"), num: true, get: s => s.scores.test_accuracy ? s.scores.test_accuracy.value : null, text: s => s.scores.test_accuracy ? s.scores.test_accuracy.text : "–" });
}
columns.push({ id: "n", name: "n", num: true, kind: "n", get: s => s.n, text: s => s.n === s.all ? s.n : `${s.n} of ${s.all}` });
columns.push(...data.axes.map((_, i) => i).filter(i => !data.main.includes(i)).map(columnOf));

function cellOf(column, setting) {
  const text = String(column.text(setting));
  if (column.kind === "verdict") {
    return el("td", { class: "wrap verdict" }, setting.verdict, setting.detail ? el("span", { class: "verdict-detail" }, setting.detail) : null);
  }
  if (column.kind === "score" && compared) {  // where the columns have no room, the verdict stands below the score
    return el("td", { class: "num score" }, text, el("div", { class: "verdict-below" }, setting.verdict, setting.detail ? el("span", { class: "verdict-detail" }, setting.detail) : null));
  }
  return el("td", { class: [column.num ? "num" : "", column.kind || ""].join(" ").trim() || null, title: text.length > 40 ? text : null,
    "data-follows": column.follows }, text);
}
const rows = settings.map((setting, i) => {
  const box = el("input", { type: "checkbox", "aria-label": "draw the curves of " + setting.name,
    onchange: event => { draw(i, event.target.checked); showDrawn(); }, onclick: event => event.stopPropagation() });
  const swatch = el("span", { class: "swatch" });
  const tick = el("label", { onclick: event => event.stopPropagation() }, box, swatch);
  const row = el("tr", { tabindex: 0, "data-setting": i, class: setting.chosen ? "chosen" : null, "aria-selected": "false",
    onclick: () => select(i), onpointerenter: () => heat(i), onpointerleave: () => heat(null), onfocus: () => heat(i), onblur: () => heat(null),
    onkeydown: event => {
      if (event.target !== row) return;
      if (event.key === "Enter") { event.preventDefault(); select(i); }
      if (event.key === " ") { event.preventDefault(); draw(i, slotOf(i) < 0); showDrawn(); }
      const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
      if (step) { event.preventDefault(); let next = row[step]; while (next && next.hidden) next = next[step]; if (next) next.focus(); }
    } }, el("td", { class: "tick" }, tick), ...columns.map(column => cellOf(column, setting)));
  return Object.assign(row, { box, swatch, tick });
});
const words = settings.map(s => [s.label, s.status, ...s.key, ...columns.map(c => c.text(s))].join(" ").toLowerCase());
const headers = columns.map(column => el("th", { scope: "col", class: [column.num ? "num" : "", column.kind === "name" ? "name" : ""].join(" ").trim() || null,
  "data-column": column.id, "data-axis": column.kind === "axis", "data-follows": column.follows, title: column.axis === undefined ? null : data.axes[column.axis] },
  el("button", { type: "button", onclick: () => sortBy(column.id) }, column.name)));
$("settings").tHead.append(el("tr", {}, el("th", { scope: "col", class: "plain" }, "draw"), ...headers));
$("settings").tBodies[0].append(...rows);

function compare(a, b) {
  if (a === null || b === null || a === undefined || b === undefined) return a === b ? 0 : (a ?? null) === null ? 1 : -1;
  const order = typeof a === "string" ? a.localeCompare(b) : a - b;
  return state.down ? -order : order;
}
function inOrder() {
  const column = columns.find(c => c.id === state.sort) || columns[0];
  return settings.map((_, i) => i).sort((a, b) => compare(column.get(settings[a]), column.get(settings[b])) || a - b);
}
function sortBy(id, down) {
  const better = id === data.metric && data.higher;  // the first click puts the best first
  state.down = down ?? (state.sort === id ? !state.down : better);
  state.sort = id;
  $("settings").tBodies[0].append(...inOrder().map(i => rows[i]));
  for (const header of headers) {
    if (header.dataset.column === id) header.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    else header.removeAttribute("aria-sort");
  }
  remember();
}
function visible(i) {
  return state.text.toLowerCase().split(/\s+/).every(word => words[i].includes(word))
    && Object.entries(state.pick).every(([axis, value]) => value === "" || settings[i].key[axis] === value);
}
function filter() {
  let count = 0;
  settings.forEach((_, i) => { const shown = visible(i); if (rows[i].hidden === shown) rows[i].hidden = !shown; count += shown; });
  $("shown").textContent = count === settings.length ? `${count} configurations` : `${count} of ${settings.length} configurations`;
  remember();
}
function fit() {
  const table = $("settings");
  table.classList.remove("tight");
  table.classList.toggle("tight", table.scrollWidth > table.parentNode.clientWidth);
}
function showColumns(every) {
  state.every = every;
  $("settings").classList.toggle("every", every);
  for (const node of document.querySelectorAll("#settings [data-follows]")) node.hidden = !every;
  fit();
}
data.axes.forEach((axis, i) => {
  if (data.values[i].length > 60 || !data.main.includes(i)) return;
  const choose = el("select", { "data-axis": axis, onchange: event => { state.pick[i] = event.target.value; filter(); } },
    el("option", { value: "" }, "all"), ...data.values[i].map(value => el("option", { value }, value)));
  $("filters").append(el("label", {}, axis, choose));
});
if (wide || data.main.length < data.axes.length) {
  $("filters").append(el("label", { class: "check" }, el("input", { type: "checkbox", id: "every", onchange: event => { showColumns(event.target.checked); remember(); } }),
    `a column for each of the ${data.axes.length} keys that differ`));
}
$("settings").classList.toggle("wide", wide);
$("filter").addEventListener("input", event => { state.text = event.target.value; filter(); });
document.addEventListener("keydown", event => {
  if (event.key === "/" && !/INPUT|SELECT|TEXTAREA/.test(document.activeElement.tagName)) { event.preventDefault(); $("filter").focus(); }
});

// --- the heat map
const squares = [];
function heatMap(x, y) {
  squares.length = 0;
  const scores = settings.map(s => scoreOf(s) ? scoreOf(s).value : null), known = scores.filter(value => value !== null);
  let low = Infinity, high = -Infinity;
  for (const value of known) { low = Math.min(low, value); high = Math.max(high, value); }
  const share = value => { const t = high > low ? (value - low) / (high - low) : 0.5; return data.higher ? t : 1 - t; };
  const shown = value => data.fraction ? (100 * value).toFixed(2) : String(Number(value.toPrecision(4)));
  const others = data.main.filter(i => i !== x && i !== y);
  const panels = new Map();
  settings.forEach((setting, i) => {
    const name = others.map(a => `${data.axes[a]} = ${setting.key[a]}`).join(", ");
    if (!panels.has(name)) panels.set(name, { order: others.map(a => data.values[a].indexOf(setting.key[a])), there: new Map() });
    panels.get(name).there.set(setting.key[x] + "\n" + (y === null ? "" : setting.key[y]), i);
  });
  const byOrder = (a, b) => { for (let k = 0; k < a[1].order.length; k++) if (a[1].order[k] !== b[1].order[k]) return a[1].order[k] - b[1].order[k]; return 0; };
  const sorted = [...panels].sort(byOrder);
  $("heat").replaceChildren(...sorted.slice(0, 80).map(([name, { there }]) => {
    const found = [...there.values()];  // only the values that this panel has
    const there_x = data.values[x].filter(value => found.some(i => settings[i].key[x] === value));
    const there_y = y === null ? [""] : data.values[y].filter(value => found.some(i => settings[i].key[y] === value));
    const head = el("tr", {}, el("th", {}, y === null ? "" : `${data.axes[y]} \\ ${data.axes[x]}`), ...there_x.map(value => el("th", { scope: "col" }, value)));
    const body = there_y.map(row => el("tr", {}, el("th", { scope: "row" }, y === null ? data.axes[x] : row),
      ...there_x.map(column => {
        const i = there.get(column + "\n" + row);
        if (i === undefined) return el("td", {});
        const setting = settings[i], value = scores[i], t = value === null ? 0 : share(value);
        const square = el("button", { type: "button", "data-setting": i, "--t": t, "aria-pressed": String(state.setting === i),
          title: `${setting.label}: ${value === null ? setting.status : scoreOf(setting).text}`,
          class: ["square", value === null ? "none" : t > 0.6 ? "dark" : ""].join(" "),
          onclick: () => select(i), onpointerenter: () => heat(i), onpointerleave: () => heat(null), onfocus: () => heat(i), onblur: () => heat(null) },
          (value === null ? "–" : shown(value)) + (setting.chosen ? " ★" : ""));
        squares.push(square);
        return el("td", {}, square);
      })));
    return el("div", { class: "heat" }, el("h3", {}, name), el("table", {}, el("thead", {}, head), el("tbody", {}, ...body)));
  }));
  if (sorted.length > 80) $("heat").append(el("p", { class: "muted" }, `${sorted.length - 80} more panels are not shown; choose longer axes.`));
}
// A search draws numbers that occur once: their map would be empty squares between long numbers.
const searched = data.main.some(i => data.values[i].length > 8 && 2 * data.values[i].length > settings.length && data.values[i].every(v => !isNaN(v)));
if (data.main.length === 0 || searched) $("heat-section").hidden = true;
else {
  const byLength = [...data.main].sort((a, b) => data.values[b].length - data.values[a].length || a - b);
  const plane = byLength.slice(0, 2).sort((a, b) => data.values[a].every(v => !isNaN(v)) - data.values[b].every(v => !isNaN(v)));
  const menu = (chosen, name) => el("label", {}, name, el("select", { "data-heat": name, onchange: event => { redraw(event); showDrawn(); mark(); } },
    ...data.main.map(i => el("option", { value: i, selected: i === chosen }, data.axes[i]))));
  const one = data.main.length === 1;
  if (!one) $("heat-tools").append(menu(plane[1], "across"), menu(plane[0], "down"));
  $("heat-text").textContent = `Mean ${nameOf(data.metric)} of each configuration${data.fraction ? ", in per cent" : ""}. ★: the best. A coloured bar: its curves are drawn above.`;
  function redraw(event) {
    const [x, y] = [...$("heat-tools").querySelectorAll("select")];
    if (event && x.value === y.value) { const other = event.target === x ? y : x; other.value = data.main.find(i => String(i) !== event.target.value); }
    if (one) heatMap(data.main[0], null); else heatMap(Number(x.value), Number(y.value));
  }
  redraw();
}

// --- the curves
const KINDS = { val_accuracy: "validation accuracy", val_loss: "validation loss", train_accuracy: "training accuracy", train_loss: "training loss", val_balanced_accuracy: "validation balanced accuracy", val_macro_f1: "validation macro F1" };
const kinds = Object.keys(KINDS).filter(name => settings.some(s => s.curves[name]));
$("curve").append(...kinds.map(name => el("option", { value: name }, KINDS[name])));
const shortened = (text, most) => text.length > most ? text.slice(0, most - 1).trimEnd() + "…" : text;
function ticks(a, b, whole) {
  let size = 10 ** Math.floor(Math.log10((b - a) / 5));
  for (const m of [1, 2, 5, 10]) if ((b - a) / (size * m) <= 7) { size *= m; break; }
  if (whole) size = Math.max(1, Math.round(size));
  const found = [];
  for (let k = Math.ceil(a / size); k * size <= b + 1e-9; k++) found.push(k * size);
  return found;
}
/** Parts of the drawn settings that differ: the name at a line's end need not repeat the rest. */
function endNames(drawn) {
  let differ = data.main.filter(a => new Set(drawn.map(i => settings[i].key[a])).size > 1);
  const apart = axes => new Set(drawn.map(i => axes.map(a => settings[i].key[a]).join("\n"))).size === drawn.length;
  for (const a of [...differ].reverse()) {  // long names keep what tells them apart
    const fewer = differ.filter(other => other !== a);
    if (differ.length > 4 && apart(fewer)) differ = fewer;
  }
  return drawn.map(i => differ.length === 0 ? settings[i].name
    : differ.map(a => (data.axes[a].includes(".") ? data.axes[a].split(".").pop() + " " : "") + settings[i].key[a]).join(", "));
}
let curves = new Map();  // setting -> its group in the chart
function drawCurves() {
  const name = $("curve").value, chart = $("chart"), accuracy = name.endsWith("accuracy");
  const drawn = state.slots.filter(i => i !== null && settings[i].curves[name] && settings[i].curves[name][0].some(v => v !== null));
  curves = new Map();
  const width = Math.max($("chart-box").clientWidth, 280), narrow = width < 560;
  const height = narrow ? 300 : Math.min(460, Math.max(340, 80 + 17 * drawn.length));
  const names = endNames(drawn), longest = Math.max(0, ...names.map(n => n.length));
  const labels = narrow ? 30 : Math.min(7.4 * longest + 12, 0.36 * width);
  const box = { left: 52, right: width - labels - 14, top: 10, bottom: height - 42 };
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  chart.setAttribute("height", height);
  chart.setAttribute("aria-label", `${KINDS[name] || "no curve"} of ${drawn.length} configurations over the epochs`);
  chart.replaceChildren();
  $("legend").replaceChildren();
  $("legend").classList.toggle("on", narrow);
  const text = (content, attributes) => svg("text", attributes, String(content));
  if (!drawn.length) {
    chart.append(text(kinds.length ? "Tick configurations in the table to draw their curves." : "No run has finished an epoch yet.", { x: width / 2, y: height / 2, "text-anchor": "middle" }));
    return;
  }
  let low = Infinity, high = -Infinity, first = Infinity, last = -Infinity;
  const series = drawn.map(i => {
    const [mean, below, above] = settings[i].curves[name], epochs = settings[i].curves.epochs;
    const points = [];
    const step = epochs.length === 1 ? [-0.3, 0.3] : [0];  // one epoch is a step
    mean.forEach((v, k) => { if (v !== null) step.forEach(off => points.push({ e: epochs[k] + off, v, low: below ? below[k] : v, high: above ? above[k] : v })); });
    for (const p of points) { low = Math.min(low, p.low); high = Math.max(high, p.high); first = Math.min(first, p.e); last = Math.max(last, p.e); }
    return { i, points, many: Boolean(below) };
  });
  if (low === high) { low -= 0.05; high += 0.05; }
  if (first === last) { first -= 0.5; last += 0.5; }
  const x = e => box.left + (e - first) / (last - first) * (box.right - box.left);
  const y = v => box.bottom - (v - low) / (high - low) * (box.bottom - box.top);
  const shown = v => accuracy ? Number((100 * v).toPrecision(4)) + " %" : Number(v.toPrecision(4));
  for (const tick of ticks(low, high, false)) {
    chart.append(svg("line", { class: "gridline", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }));
    chart.append(text(shown(tick), { x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }));
  }
  for (const tick of ticks(Math.ceil(first), Math.max(Math.floor(last), Math.ceil(first) + 0.5), true)) chart.append(text(tick, { x: x(tick), y: box.bottom + 18, "text-anchor": "middle" }));
  chart.append(text("epoch", { x: (box.left + box.right) / 2, y: box.bottom + 36, "text-anchor": "middle" }));

  const ends = series.map((s, k) => ({ k, at: y(s.points[s.points.length - 1].v) })).sort((a, b) => a.at - b.at);
  const gap = 15;
  ends.forEach((end, k) => { end.y = Math.max(end.at, k ? ends[k - 1].y + gap : box.top + 4); });
  for (let k = ends.length - 1; k >= 0; k--) ends[k].y = Math.min(ends[k].y, k === ends.length - 1 ? box.bottom : ends[k + 1].y - gap);
  const place = new Map(ends.map(end => [end.k, end.y]));
  const layer = svg("g", {});
  series.forEach((s, k) => {
    const slot = slotOf(s.i), end = s.points[s.points.length - 1];
    const group = svg("g", { class: "curve", "data-setting": s.i, "--slot": colourOf(slot) });
    if (s.many && s.points.length > 1) {
      const up = s.points.map(p => `${x(p.e).toFixed(1)} ${y(p.high).toFixed(1)}`), down = [...s.points].reverse().map(p => `${x(p.e).toFixed(1)} ${y(p.low).toFixed(1)}`);
      group.append(svg("path", { class: "band", d: `M${up.join("L")}L${down.join("L")}Z` }));
    }
    const d = "M" + s.points.map(p => `${x(p.e).toFixed(1)} ${y(p.v).toFixed(1)}`).join("L");
    group.append(svg("path", { class: "line" + (isDashed(slot) ? " dashed" : ""), d }));
    group.append(svg("path", { class: "leader", d: `M${x(end.e) + 2} ${y(end.v)}L${box.right + 8} ${place.get(k) - 4}`, fill: "none" }));
    const rank = settings[s.i].rank ?? "–";
    const label = text(narrow ? rank : shortened(names[k], Math.floor(labels / 7.2)), { class: "end", x: box.right + 11, y: place.get(k) });
    label.append(svg("title", {}, `${settings[s.i].label}, n = ${settings[s.i].n}`));
    label.addEventListener("click", () => select(s.i));
    group.append(label);
    layer.append(group);
    curves.set(s.i, group);
    if (narrow) {
      const swatch = el("span", { class: "swatch" });
      dress(swatch, slot);
      $("legend").append(el("li", {}, swatch, `${rank}: ${names[k]}`));
    }
  });
  chart.append(layer);
  chart.onpointermove = event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    let nearest = null, distance = 24, point = null;
    for (const s of series) {
      const p = s.points.reduce((a, b) => Math.abs(x(b.e) - at.x) < Math.abs(x(a.e) - at.x) ? b : a);
      const away = Math.abs(y(p.v) - at.y);
      if (away < distance && at.x < box.right + 12) { distance = away; nearest = s; point = p; }
    }
    heat(nearest ? nearest.i : null);
    if (point) $("caption").textContent = `${settings[nearest.i].label}: ${KINDS[name]} ${shown(point.v)}`
      + (nearest.many ? ` (${shown(point.low)} to ${shown(point.high)})` : "") + ` in epoch ${Math.round(point.e)}`;
  };
  chart.onpointerleave = () => heat(null);
  chart.onclick = () => { if (hot !== null) select(hot); };
  mark();
}
$("curve").addEventListener("change", () => { drawCurves(); remember(); });
$("draw-best").addEventListener("click", () => drawThese(settings.map((_, i) => i).slice(0, COLOURS)));
$("draw-shown").addEventListener("click", () => drawThese(inOrder().filter(visible)));
$("draw-none").addEventListener("click", () => drawThese([]));
new ResizeObserver(() => { drawCurves(); fit(); }).observe($("chart-box"));

// --- what the pointer is on, and what is selected
let marked = { hot: null, setting: null };
function heat(i) { hot = i; mark(); }
function mark() {
  for (const [i, on] of [[marked.hot, false], [hot, true]]) {
    if (i === null) continue;
    rows[i].classList.toggle("hot", on);
    squares.filter(square => square.dataset.setting === String(i)).forEach(square => square.classList.toggle("hot", on));
  }
  for (const [i, on] of [[marked.setting, "false"], [state.setting, "true"]]) {
    if (i === null || !rows[i]) continue;
    rows[i].setAttribute("aria-selected", on);
    squares.filter(square => square.dataset.setting === String(i)).forEach(square => square.setAttribute("aria-pressed", on));
  }
  marked = { hot, setting: state.setting };
  for (const [i, group] of curves) group.classList.toggle("hot", i === hot);
  if (curves.size) curves.values().next().value.parentNode.classList.toggle("busy", curves.has(hot));
  const n = state.slots.filter(i => i !== null).length, without = n - curves.size;
  $("caption").textContent = hot !== null ? `${settings[hot].label}: ${scoreOf(settings[hot]) ? scoreOf(settings[hot]).text : settings[hot].status}`
    : n ? "Lines: mean over the runs of a configuration. Bands: lowest to highest run. At most 16 are drawn at once."
      + (without ? ` Ticked ones without a ${KINDS[$("curve").value] || "curve"} in each epoch: ${without}.` : "") : "";
}
function select(i) { state.setting = i; mark(); showSetting(settings[i]); remember(); }

function facts(pairs) {
  return el("table", { class: "facts" },
    el("tbody", {}, ...pairs.map(([name, ...values]) => el("tr", {}, el("th", { scope: "row" }, name), ...values.map(value => el("td", {}, value))))));
}
function showRuns(runs) {
  return [el("h3", {}, "Runs"), el("table", { class: "facts runs" }, el("tbody", {}, ...runs.map(run => el("tr", {},
    el("td", {}, run.run), el("td", { class: run.status === "failed" ? "bad" : null }, run.status),
    el("td", {}, el("div", {}, run.folder), el("div", { class: "links" }, ...run.links.map(([name, href]) => el("a", { href }, name))),
      el("div", { class: "muted" }, [run.seconds, run.status === "finished" ? "" : `epochs: ${run.epochs}`].filter(Boolean).join(", "), " ", copier("copy the command", run.command)),
      run.error ? el("div", { class: "bad" }, run.error) : null)))))];
}
function showSetting(setting) {
  const parts = [el("h3", { class: "name" }, (setting.rank ? `${setting.rank}. ` : "") + setting.label)];
  const pairs = Object.entries(setting.scores).map(([name, found]) => [nameOf(name), found.text]);
  pairs.push(["runs", `n = ${setting.n} (${setting.status})`]);
  if (setting.verdict) pairs.push(["compared with " + data.reference, setting.detail ? `${setting.verdict} (${setting.detail})` : setting.verdict]);
  parts.push(facts(pairs));
  if (setting.warnings.length) parts.push(el("h3", {}, "Warnings"), ...setting.warnings.map(text => el("p", { class: "muted small" }, text)));
  parts.push(...showRuns(setting.runs));
  $("detail").replaceChildren(...parts);
  $("detail").scrollTop = 0;
}

// --- copies and downloads
function copier(name, text) { return el("button", { type: "button", class: "small", title: text, onclick: event => copy(text, event.target) }, name); }
async function copy(text, button) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else {  // a page of another machine, without https
    const area = el("textarea", {}, text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const name = button.textContent;
  button.textContent = "copied";
  setTimeout(() => { button.textContent = name; }, 1200);
}
for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button.dataset.copy, button));
const shownTable = () => [columns.map(c => c.axis === undefined ? c.name : data.axes[c.axis]), ...inOrder().filter(visible).map(i => columns.map(c => String(c.text(settings[i]))))];
/** A cell for CSV: quoted, and none that a spreadsheet takes for a formula. */
const csvCell = text => `"${(/^[=+@\t-]/.test(text) && isNaN(text) ? "'" : "") + text.replaceAll('"', '""')}"`;
$("copy-table").addEventListener("click", event => copy(shownTable().map(row => row.join("\t")).join("\n"), event.target));
$("download-table").addEventListener("click", () => {
  const text = shownTable().map(row => row.map(csvCell).join(",")).join("\n") + "\n";
  el("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: "configurations.csv" }).click();
});

// --- the rest of the page
// The address keeps sort, filter, selection and curves, so that a link to the page shows the same.
let ready = false;
function remember() {
  if (!ready) return;
  const found = new URLSearchParams({ sort: state.sort, down: state.down ? 1 : 0, filter: state.text, curve: $("curve").value });
  const name = i => settings[i] ? settings[i].label : "";  // ranks change when more runs have ended
  found.set("setting", name(state.setting));
  for (const i of state.slots.slice(0, Math.max(1, state.slots.findLastIndex(i => i !== null) + 1))) found.append("draw", name(i));
  if (state.every) found.set("every", 1);
  for (const [axis, value] of Object.entries(state.pick)) if (value) found.set("axis:" + data.axes[axis], value);
  try { history.replaceState(null, "", "#" + found); } catch (error) { console.warn("the address is not kept:", error.message); }
}
function recall() {
  const found = new URLSearchParams(location.hash.slice(1)), places = new Map(settings.map((s, i) => [s.label, i])), place = name => places.get(name) ?? null;
  state.text = found.get("filter") || "";
  $("filter").value = state.text;
  data.axes.forEach((axis, i) => {
    const value = found.get("axis:" + axis), menu = [...document.querySelectorAll("select[data-axis]")].find(m => m.dataset.axis === axis);
    if (value && menu && data.values[i].includes(value)) { state.pick[i] = value; menu.value = value; }
  });
  showColumns(found.get("every") === "1");
  if ($("every")) $("every").checked = state.every;
  if (settings.length) { state.setting = place(found.get("setting")) ?? 0; showSetting(settings[state.setting]); }
  sortBy(columns.some(c => c.id === found.get("sort")) ? found.get("sort") : "rank", found.get("down") === "1");
  if (kinds.includes(found.get("curve"))) $("curve").value = found.get("curve");
  const drawn = found.has("draw") ? found.getAll("draw").map(place) : settings.map((_, i) => i).slice(0, COLOURS);
  drawn.slice(0, MOST_DRAWN).forEach((i, slot) => { state.slots[slot] = i; });
  showDrawn();
  filter();
  ready = true;
}
recall();
