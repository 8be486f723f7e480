"use strict";
// Expert load: the film of layers x experts, one layer over time, and the spread of every layer.

const load = data.load && decodeLoad(data.load);

// thin.py writes these codes: 0 no assignment, 65535 no tokens, else log2(u) in steps of 1/2700 from -12
function decodeLoad(packed) {
  const bytes = Uint8Array.from(atob(packed.codes), (c) => c.charCodeAt(0));
  const codes = new DataView(bytes.buffer);
  const starts = [];
  let columns = 0;
  for (const experts of packed.experts) { starts.push(columns); columns += experts; }
  const value = (frame, layer, expert) => {
    const code = codes.getUint16(2 * (frame * columns + starts[layer] + expert), true);
    return code === 65535 ? NaN : code === 0 ? 0 : 2 ** ((code - 1) / 2700 - 12);
  };
  return { ...packed, frames: packed.to.length, value };
}

const DEAD = 0.001;

function levelNumber(u) {
  return Math.max(0, Math.min(14, 7 + Math.round((Math.log2(u) * 7) / 3)));
}

function levelOf(u) {
  return Number.isNaN(u) ? "none" : `q${u < DEAD ? 0 : levelNumber(u)}`;
}

function times(u) {
  if (Number.isNaN(u)) return "no tokens";
  if (u < DEAD) return "dead";
  return `${u >= 10 ? u.toFixed(1) : u.toFixed(2)}\u00a0\u00d7`;
}

function clipped(text, most) {
  return text.length > most ? `${text.slice(0, most - 1)}\u2026` : text;
}

function gutterFor(names, width) {
  const letters = Math.min(Math.max(...names.map((name) => name.length)), width < 560 ? 9 : 22);
  return { letters, gutter: 14 + 6.5 * letters };
}

// state shared by the film and the layer chart
const view = { frame: 0, layer: 0, listeners: [] };

function setView(change) {
  Object.assign(view, change);
  for (const listener of view.listeners) listener();
}

function heatMap(host) {
  const chart = el("div", { class: "chart" });
  host.append(chart);
  const most = Math.max(...load.experts);
  let width = 0;
  const draw = () => {
    const { letters, gutter } = gutterFor(load.layers, width);
    const wide = Math.min(120, (width - gutter - 4) / most);
    const high = Math.max(13, Math.min(30, wide, 560 / load.layers.length));
    const box = { left: gutter, top: 4, wide, high };
    const bottom = box.top + high * load.layers.length;
    const root = svg("svg", { viewBox: `0 0 ${width} ${bottom + 38}`, role: "img", "aria-label": "Load of every expert in every layer" });
    const u = (row, column) => load.value(view.frame, row, column);
    cells(root, load.layers.length, (row) => load.experts[row], box, (row, column) => levelOf(u(row, column)));
    load.layers.forEach((name, row) => {
      root.append(svg("text", { class: "name", x: gutter - 10, y: box.top + (row + 0.5) * high + 4, "text-anchor": "end" }, clipped(name, letters)));
      for (let column = 0; column < load.experts[row]; column++) cellMark(root, box, row, column, u(row, column));
    });
    const every = ticks(0, most, Math.max(1, (wide * most) / 46)).filter((n) => Number.isInteger(n) && n < most);
    for (const n of every) root.append(svg("text", { x: gutter + (n + 0.5) * wide, y: bottom + 15, "text-anchor": "middle" }, n));
    root.append(svg("text", { x: gutter + wide * most, y: bottom + 33, "text-anchor": "end" }, "expert"));
    root.append(svg("rect", { class: "pick", x: gutter - 2, y: box.top + view.layer * high - 2, width: wide * load.experts[view.layer] + 2.5, height: high + 2.5, rx: 3 }));
    cellHover(root, box, bottom, most);
    chart.replaceChildren(root);
  };
  responsive(chart, (next) => { width = next; draw(); }, false);
  view.listeners.push(() => { if (width) draw(); });
}

function cellMark(root, box, row, column, u) {
  const x = box.left + (column + 0.5) * box.wide - 0.75, y = box.top + (row + 0.5) * box.high - 0.75;
  if (u < DEAD && box.wide > 5) {
    const arm = Math.min(4, box.wide / 4, box.high / 4);
    root.append(svg("path", { class: "x", d: `M${x - arm} ${y - arm}l${2 * arm} ${2 * arm}m0 ${-2 * arm}l${-2 * arm} ${2 * arm}` }));
  } else if (box.wide >= 46 && !Number.isNaN(u)) {
    const level = levelNumber(u);
    root.append(svg("text", { class: level <= 2 || level >= 12 ? "end" : level === 3 || level === 11 ? "half" : "mid", x, y: y + 4.5, "text-anchor": "middle" }, u >= 10 ? u.toFixed(0) : u.toFixed(2)));
  }
}

function cellHover(root, box, bottom, most) {
  const hit = svg("rect", { class: "hit", x: 0, y: box.top, width: box.left + box.wide * most, height: bottom - box.top });
  hit.style.cursor = "pointer";
  const place = (event) => {
    const frame = root.getBoundingClientRect(), scale = root.viewBox.baseVal.width / frame.width;
    const row = Math.floor(((event.clientY - frame.top) * scale - box.top) / box.high);
    const column = Math.floor(((event.clientX - frame.left) * scale - box.left) / box.wide);
    return { row: Math.max(0, Math.min(load.layers.length - 1, row)), column };
  };
  hit.addEventListener("pointermove", (event) => {
    const { row, column } = place(event);
    if (column < 0 || column >= load.experts[row]) return hideTip();
    const u = load.value(view.frame, row, column);
    showTip(event, `${load.layers[row]}, expert ${column}`, [["load over fair share", times(u)], ["share of assignments", percent(u / load.experts[row])]]);
  });
  hit.addEventListener("pointerleave", hideTip);
  hit.addEventListener("click", (event) => setView({ layer: place(event).row }));
  root.append(hit);
}

function colourKey() {
  const width = 300, cell = width / 15;
  const root = svg("svg", { viewBox: `0 0 ${width + 70} 32`, role: "img", "aria-label": "Colours: blue under, grey at, orange over the fair share" });
  for (let level = 0; level < 15; level++) root.append(svg("rect", { class: `q${level}`, x: level * cell, y: 0, width: cell + 0.4, height: 12 }));
  for (const [octave, text] of [[-3, "\u215b"], [-2, "\u00bc"], [-1, "\u00bd"], [0, "fair"], [1, "2\u00d7"], [2, "4\u00d7"], [3, "8\u00d7"]]) {
    root.append(svg("text", { x: (7.5 + (octave * 7) / 3) * cell, y: 28, "text-anchor": "middle" }, text));
  }
  const x = width + 22;
  root.append(svg("rect", { class: "q0", x: x - 7, y: 0, width: 14, height: 12 }), svg("path", { class: "x", d: `M${x - 3} 3l6 6m0 -6l-6 6` }), svg("text", { x: x + 13, y: 10 }, "dead"));
  const holder = el("div", { class: "chart colours" }, root);
  return holder;
}

function frameSlider(host) {
  const label = el("span", { class: "when" });
  const input = el("input", { type: "range", min: 0, max: load.frames - 1, value: load.frames - 1, "aria-label": "time" });
  const text = () => {
    const from = load.from[view.frame], to = load.to[view.frame];
    const range = from === to ? "" : `steps ${from.toLocaleString("en")} to ${to.toLocaleString("en")} \u00b7 `;
    label.textContent = range ? range + whenText(to).split(" \u00b7 ").slice(1).join("") : whenText(to);
    label.textContent = label.textContent.replace(/ \u00b7 $/, "");
  };
  input.addEventListener("input", () => setView({ frame: Number(input.value) }));
  view.listeners.push(() => { input.value = view.frame; text(); });
  axis.listeners.push(text);
  host.append(el("div", { class: "slider controls" }, playButton(), input), el("div", { class: "when-row" }, label));
}

function playButton() {
  let timer = 0;
  const stop = () => { clearInterval(timer); timer = 0; button.textContent = "\u25b6 Play"; };
  const button = el("button", { class: "play", type: "button", onclick: () => {
    if (timer) return stop();
    if (view.frame >= load.frames - 1) setView({ frame: 0 });
    button.textContent = "\u23f8 Pause";
    timer = setInterval(() => {
      if (view.frame >= load.frames - 1) return stop();
      setView({ frame: view.frame + 1 });
    }, Math.max(40, 6000 / load.frames));
  } }, "\u25b6 Play");
  return button;
}

// experts x time for the picked layer
function layerOverTime(host) {
  const chart = el("div", { class: "chart" });
  host.append(chart);
  let width = 0;
  const draw = () => {
    const experts = load.experts[view.layer];
    const high = Math.max(3, Math.min(18, 340 / experts));
    const box = { left: 34, top: 22, wide: (width - 46) / load.frames, high, joined: true };
    const bottom = box.top + high * experts;
    const root = svg("svg", { viewBox: `0 0 ${width} ${bottom + 40}`, role: "img", "aria-label": `Load of the experts of ${load.layers[view.layer]} over time` });
    cells(root, experts, () => load.frames, box, (row, column) => levelOf(load.value(column, view.layer, row)));
    for (const n of ticks(0, experts, Math.min(experts, Math.max(1, (high * experts) / 26))).filter((n) => Number.isInteger(n) && n < experts)) {
      root.append(svg("text", { x: 24, y: box.top + (n + 0.5) * high + 4, "text-anchor": "end" }, n));
    }
    root.append(svg("text", { x: 0, y: 11 }, "expert"));
    timeTicks(root, box, bottom, width);
    const at = box.left + (view.frame + 0.5) * box.wide;
    root.append(svg("line", { class: "now-line", x1: at, x2: at, y1: box.top - 3, y2: bottom + 3 }));
    frameHover(root, box, bottom, experts);
    chart.replaceChildren(root);
  };
  responsive(chart, (next) => { width = next; draw(); });
  view.listeners.push(() => { if (width) draw(); });
}

// frames are even in records: ticks stand under the frame that holds their value
function timeTicks(root, box, bottom, width) {
  const unit = axisUnit();
  const values = load.to.map((step) => (data.x.step.length ? axisAtStep(step) : step));
  const last = values[values.length - 1];
  for (const value of ticks(0, last, Math.max(2, (width - 46) / 120))) {
    const frame = values.findIndex((v) => v >= value - 1e-9);
    if (frame >= 0) root.append(svg("text", { x: box.left + (value <= 0 ? 0 : frame + 0.5) * box.wide, y: bottom + 17, "text-anchor": "middle" }, unit.text(value)));
  }
  root.append(svg("text", { x: box.left + box.wide * load.frames, y: bottom + 35, "text-anchor": "end" }, unit.label));
}

function frameHover(root, box, bottom, experts) {
  const hit = svg("rect", { class: "hit", x: box.left, y: box.top, width: box.wide * load.frames, height: bottom - box.top });
  hit.style.cursor = "crosshair";
  const place = (event) => {
    const frame = root.getBoundingClientRect(), scale = root.viewBox.baseVal.width / frame.width;
    const column = Math.floor(((event.clientX - frame.left) * scale - box.left) / box.wide);
    const row = Math.floor(((event.clientY - frame.top) * scale - box.top) / box.high);
    return { column: Math.max(0, Math.min(load.frames - 1, column)), row: Math.max(0, Math.min(experts - 1, row)) };
  };
  hit.addEventListener("pointermove", (event) => {
    const { column, row } = place(event);
    showTip(event, `expert ${row}, ${whenText(load.to[column])}`, [["load over fair share", times(load.value(column, view.layer, row))]]);
  });
  hit.addEventListener("pointerleave", hideTip);
  hit.addEventListener("click", (event) => setView({ frame: place(event).column }));
  root.append(hit);
}

// busiest, median and least used expert of one layer
function spread(layer) {
  const lines = { hi: [], mid: [], lo: [] };
  for (let frame = 0; frame < load.frames; frame++) {
    const u = Array.from({ length: load.experts[layer] }, (_, expert) => load.value(frame, layer, expert)).sort((a, b) => a - b);
    const floor = (value) => (Number.isNaN(value) ? null : Math.log2(Math.max(value, 1 / 32)));
    lines.hi.push(floor(u[u.length - 1]));
    lines.mid.push(floor((u[(u.length - 1) >> 1] + u[u.length >> 1]) / 2));
    lines.lo.push(floor(u[0]));
  }
  return lines;
}

function spreadChart(layer) {
  const { hi, mid, lo } = spread(layer);
  const steps = load.to;
  const at = (key) => steps.map((step) => interpolate(data.x[key], step));
  const rows = { step: steps, seconds: at("seconds"), tokens: at("tokens") };
  const box = el("div", { class: "small" },
    el("div", { class: "head" }, el("h3", { title: load.layers[layer] }, load.layers[layer]), el("span", { class: "now" }, times(2 ** hi[hi.length - 1]))));
  lineChart(box, {
    height: 128, bare: true, label: `Spread of load in ${load.layers[layer]}`,
    format: (v) => (v <= -4.99 ? "under 0.03\u00a0\u00d7" : times(2 ** v)), domain: [-5, Math.max(2, Math.log2(Math.max(...load.experts)))],
    yTicks: [-4, -2, 0, 2, 4, 6], tickText: (v) => ({ "-4": "1/16", "-2": "1/4", 0: "1", 2: "4", 4: "16", 6: "64" })[v],
    lines: [
      { name: "busiest", colour: "var(--orange)", y: hi, lo, hi, rows },
      { name: "median", colour: "var(--soft)", look: "dash", y: mid, rows },
      { name: "least used", colour: "var(--blue)", y: lo, rows },
    ],
  });
  return box;
}

function interpolate(values, step) {
  const steps = data.x.step;
  if (!steps.length) return null;
  let after = steps.findIndex((value) => value >= step);
  if (after < 0) after = steps.length - 1;
  const before = Math.max(0, after - 1), span = steps[after] - steps[before];
  const part = span > 0 ? Math.min(1, Math.max(0, (step - steps[before]) / span)) : 1;
  return isNumber(values[before]) && isNumber(values[after]) ? values[before] + (values[after] - values[before]) * part : null;
}

// layers in order of how uneven they end
function layersByUnevenness() {
  const worst = load.layers.map((_, layer) => {
    const u = Array.from({ length: load.experts[layer] }, (_, expert) => load.value(load.frames - 1, layer, expert));
    return Math.max(...u.map((value) => (Number.isNaN(value) ? 0 : value)));
  });
  return load.layers.map((_, layer) => layer).sort((a, b) => worst[b] - worst[a]);
}
