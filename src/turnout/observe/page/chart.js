"use strict";
// What every chart is drawn with. Text from the run only ever becomes text nodes.

const NS = "http://www.w3.org/2000/svg";
const data = JSON.parse(document.getElementById("data").textContent);

function el(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(NS, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// ---- numbers

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function plain(value, digits = 3) {
  if (!isNumber(value)) return "n/a";
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(Math.max(0, digits - 2)).replace("e-", "e\u2212");
  if (size >= 1e4) return compact(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

function compact(value) {
  const size = Math.abs(value);
  for (const [unit, name] of [[1e12, " T"], [1e9, " B"], [1e6, " M"], [1e3, " k"]]) {
    if (size >= unit) return Number((value / unit).toPrecision(3)) + name;
  }
  return String(Number(value.toPrecision(3)));
}

function percent(value) {
  if (!isNumber(value)) return "n/a";
  const shown = 100 * value;
  const isNearAnEnd = Math.abs(shown) < 9.95 || (shown > 99 && shown < 100);
  return (isNearAnEnd ? Number(shown.toFixed(1)) : Math.round(shown)) + "\u00a0%";
}

function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  if (!(raw > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw * 0.999) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// ---- the horizontal axis that all charts share

const axis = { key: ["seconds", "tokens", "step"].find((key) => data.x[key].some(isNumber)) || "step", listeners: [] };

function axisUnit() {
  if (axis.key === "tokens") return { label: "tokens trained on", word: "tokens", scale: 1, text: compact };
  if (axis.key === "step") return { label: "step", word: "step", scale: 1, text: (value) => Math.round(value).toLocaleString("en") };
  const longest = Math.max(0, ...data.x.seconds.filter(isNumber));
  if (longest < 180) return { label: "seconds of training", word: "s", scale: 1, text: (value) => plain(value) };
  if (longest < 3 * 3600) return { label: "minutes of training", word: "min", scale: 1 / 60, text: (value) => plain(value) };
  return { label: "hours of training", word: "h", scale: 1 / 3600, text: (value) => plain(value) };
}

function axisValues() {
  const { scale } = axisUnit();
  return data.x[axis.key].map((value) => (isNumber(value) ? value * scale : null));
}

// where a step lies on the shared axis, between the rows that were kept
function axisAtStep(step) {
  const steps = data.x.step, values = axisValues();
  let after = steps.findIndex((value) => value >= step);
  if (after < 0) after = steps.length - 1;
  const before = Math.max(0, after - 1);
  const span = steps[after] - steps[before];
  const part = span > 0 ? Math.min(1, Math.max(0, (step - steps[before]) / span)) : 1;
  return values[before] + (values[after] - values[before]) * part;
}

function whenText(step) {
  const unit = axisUnit();
  const at = data.x.step.length && axis.key !== "step" ? axisAtStep(step) : null;
  const place = isNumber(at) ? ` \u00b7 ${unit.text(at)} ${unit.word}` : "";
  return `step ${step.toLocaleString("en")}${place}`;
}

// ---- tooltip

const tip = document.getElementById("tip");

function showTip(event, title, rows, ...more) {
  tip.replaceChildren(
    el("div", { class: "t" }, title),
    ...rows.map(([name, value, colour]) =>
      el("div", { class: "r" }, el("span", {}, colour ? swatch(colour) : null, name), el("b", {}, value))),
    ...more,
  );
  tip.hidden = false;
  const gap = 14, wide = tip.offsetWidth, high = tip.offsetHeight;
  const page = document.documentElement;
  let left = event.clientX + gap;
  if (left + wide > page.clientWidth - 6) left = Math.max(6, event.clientX - gap - wide);
  let top = event.clientY + gap;
  if (top + high > page.clientHeight - 6) top = Math.max(6, event.clientY - gap - high);
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${top + window.scrollY}px`;
}

function swatch(colour) {
  const mark = el("i", {});
  mark.style.setProperty("--c", colour);
  return mark;
}

function hideTip() {
  tip.hidden = true;
}

// ---- drawing

// calls draw(width) now, when the width changes and, if asked, when the shared axis changes
function responsive(host, draw, followsAxis = true) {
  let width = 0;
  const redraw = () => draw(Math.max(220, width));
  new ResizeObserver((entries) => {
    const next = Math.round(entries[0].contentRect.width);
    if (next > 0 && next !== width) { width = next; requestAnimationFrame(redraw); }
  }).observe(host);
  if (followsAxis) axis.listeners.push(() => { if (width) redraw(); });
}

function path(xs, ys, x, y) {
  let d = "", pen = false;
  for (let i = 0; i < xs.length; i++) {
    if (!isNumber(xs[i]) || !isNumber(ys[i])) { pen = false; continue; }
    d += `${pen ? "L" : "M"}${x(xs[i]).toFixed(1)} ${y(ys[i]).toFixed(1)}`;
    pen = true;
  }
  return d;
}

function bandPath(xs, lo, hi, x, y) {
  const rows = xs.map((_, i) => i).filter((i) => isNumber(xs[i]) && isNumber(lo[i]) && isNumber(hi[i]));
  if (rows.length < 2) return "";
  const edge = (values, order) => order.map((i) => `${x(xs[i]).toFixed(1)} ${y(values[i]).toFixed(1)}`).join("L");
  return `M${edge(hi, rows)}L${edge(lo, [...rows].reverse())}Z`;
}

// spec: lines [{name, colour, look, y, x?, lo?, hi?, dots?}], format, yLabel, height, domain, tickText, yTicks, marks
function lineChart(host, spec) {
  const chart = el("div", { class: "chart" });
  host.append(chart);
  let clip = 0;
  responsive(chart, (width) => {
    clip = clip || lineChart.count++;
    chart.replaceChildren(drawLines(spec, width, `clip${clip}`));
  });
  return chart;
}
lineChart.count = 1;

function drawLines(spec, width, clip) {
  const shared = axisValues();
  const unit = axisUnit();
  const lines = spec.lines.map((line) => ({ ...line, xs: line.rows ? line.rows[axis.key].map((v) => (isNumber(v) ? v * unit.scale : null)) : shared }));
  const [low, high] = spec.domain || domainOf(lines);
  const rows = spec.yTicks || ticks(low, high, Math.max(2, Math.round(spec.height / (spec.bare ? 40 : 58))));
  const rowText = (value) => (spec.tickText || spec.format)(value);
  const left = Math.max(30, 12 + 6.6 * Math.max(...rows.map((value) => rowText(value).length)));
  const top = spec.yLabel ? 24 : 10, bottom = spec.height - (spec.bare ? 22 : 40), right = width - 12;
  const xs = lines.flatMap((line) => line.xs).filter(isNumber);
  const first = Math.min(...xs, Infinity), last = Math.max(...xs, -Infinity);
  const from = Math.min(0, first);
  const x = (value) => left + ((value - from) / (last - from || 1)) * (right - left);
  const y = (value) => bottom - ((value - low) / (high - low || 1)) * (bottom - top);
  const root = svg("svg", { viewBox: `0 0 ${width} ${spec.height}`, role: "img", "aria-label": spec.label });
  root.append(svg("clipPath", { id: clip }, svg("rect", { x: left - 3, y: top - 5, width: right - left + 9, height: bottom - top + 8 })));
  for (const value of rows) {
    if (value < low - 1e-12 || value > high + 1e-12) continue;
    root.append(
      svg("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }),
      svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, rowText(value)));
  }
  const columns = ticks(from, last, Math.max(2, Math.round((right - left) / (spec.bare ? 90 : 110))));
  const room = spec.bare ? 16 + 6.6 * unit.word.length : 0;
  for (const value of columns) {
    if (x(value) <= right - room) root.append(svg("text", { x: x(value), y: bottom + 17, "text-anchor": "middle" }, unit.text(value)));
  }
  root.append(svg("text", { x: right, y: bottom + (spec.bare ? 17 : 35), "text-anchor": "end" }, spec.bare ? unit.word : unit.label));
  if (spec.yLabel) root.append(svg("text", { x: 0, y: 11 }, spec.yLabel));
  root.append(svg("line", { class: "base", x1: left, x2: right, y1: bottom, y2: bottom }));
  for (const mark of spec.marks || []) {
    if (mark.y < low || mark.y > high) continue;
    root.append(
      svg("line", { class: "mark", x1: left, x2: right, y1: y(mark.y), y2: y(mark.y) }),
      svg("text", { x: right, y: y(mark.y) - 4, "text-anchor": "end" }, mark.text));
  }
  const body = svg("g", { "clip-path": `url(#${clip})` });
  for (const line of lines) body.append(drawLine(line, x, y));
  root.append(body);
  hover(root, spec, lines, { x, y, left, right, top, bottom, low, high, unit });
  return root;
}

function drawLine(line, x, y) {
  const group = svg("g", {});
  group.style.setProperty("--c", line.colour);
  if (line.lo) group.append(svg("path", { class: "area", d: bandPath(line.xs, line.lo, line.hi, x, y) }));
  if (line.y) group.append(svg("path", { class: `plot ${line.look || ""}`, d: path(line.xs, line.y, x, y) }));
  if (line.dots) {
    line.y.forEach((value, i) => {
      if (isNumber(value) && isNumber(line.xs[i])) group.append(svg("circle", { class: "point", r: line.y.length > 60 ? 2 : 3.4, cx: x(line.xs[i]), cy: y(value) }));
    });
  }
  return group;
}

// the range of what is drawn, without the few extremes that would flatten the rest
function domainOf(lines) {
  const values = lines.flatMap((line) => {
    const own = (line.y || []).filter(isNumber);
    if (line.look !== "thin" || own.length < 50) return own;
    own.sort((a, b) => a - b);
    return [own[Math.floor(own.length * 0.02)], own[Math.floor(own.length * 0.98)]];
  });
  if (!values.length) return [0, 1];
  const low = Math.min(...values), high = Math.max(...values);
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low < 0.35 * high ? 0 : low - room, high + room];
}

function hover(root, spec, lines, box) {
  const cross = svg("line", { class: "cross", y1: box.top, y2: box.bottom, visibility: "hidden" });
  const dots = lines.map((line) => {
    const dot = svg("circle", { r: 3.6, visibility: "hidden" });
    dot.style.fill = line.colour;
    return dot;
  });
  const hit = svg("rect", { class: "hit", x: box.left, y: box.top, width: Math.max(0, box.right - box.left), height: box.bottom - box.top });
  const leave = () => { hideTip(); for (const node of [cross, ...dots]) node.setAttribute("visibility", "hidden"); };
  hit.addEventListener("pointerleave", leave);
  hit.addEventListener("pointermove", (event) => {
    const frame = root.getBoundingClientRect();
    const at = ((event.clientX - frame.left) / frame.width) * root.viewBox.baseVal.width;
    const rows = [];
    let where = null;
    lines.forEach((line, k) => {
      const i = nearest(line.xs, line.y, (value) => Math.abs(box.x(value) - at));
      const near = i >= 0 && (!line.dots || Math.abs(box.x(line.xs[i]) - at) < 24);
      dots[k].setAttribute("visibility", near && line.look !== "thin" ? "visible" : "hidden");
      if (!near) return;
      dots[k].setAttribute("cx", box.x(line.xs[i]));
      dots[k].setAttribute("cy", Math.min(box.bottom, Math.max(box.top, box.y(line.y[i]))));
      if (where === null || !line.dots) where = line.xs[i];
      rows.push([line.name, spec.format(line.y[i]), line.colour]);
    });
    if (where === null) return leave();
    cross.setAttribute("visibility", "visible");
    cross.setAttribute("x1", box.x(where));
    cross.setAttribute("x2", box.x(where));
    showTip(event, axis.key === "step" ? `step ${box.unit.text(where)}` : `${box.unit.text(where)} ${box.unit.word}`, rows);
  });
  root.append(cross, ...dots, hit);
}

function nearest(xs, ys, distance) {
  let best = -1, least = Infinity;
  for (let i = 0; i < xs.length; i++) {
    if (!isNumber(xs[i]) || !isNumber(ys[i])) continue;
    const d = distance(xs[i]);
    if (d < least) { least = d; best = i; }
  }
  return best;
}

// cells of one colour are one path: thousands of cells stay a few nodes, in the page's colours, also on paper
function cells(root, rows, columnsOf, box, levelOf) {
  const paths = new Map();
  const gap = (box.joined || box.wide > 6) && box.high > 6 ? 1.5 : 0, between = box.joined ? 0 : gap;
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columnsOf(row); column++) {
      const level = levelOf(row, column);
      const x = box.left + column * box.wide, y = box.top + row * box.high;
      const wide = (box.wide - between).toFixed(2), high = (box.high - gap).toFixed(2);
      const cell = `M${x.toFixed(2)} ${y.toFixed(2)}h${wide}v${high}h-${wide}z`;
      paths.set(level, (paths.get(level) || "") + cell);
    }
  }
  for (const [level, d] of paths) root.append(svg("path", { class: level, d, "shape-rendering": between ? "auto" : "crispEdges" }));
}
