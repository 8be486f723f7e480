"use strict";
// The page from top to bottom.

const page = document.getElementById("page");
const series = data.series;
const hasSteps = data.x.step.length > 0;
const learns = data.routing.learns;

function lastOf(values) {
  for (let i = values.length - 1; i >= 0; i--) if (isNumber(values[i])) return values[i];
  return null;
}

function key(...entries) {
  return el("div", { class: "key" }, ...entries.map(([name, colour, look]) => {
    const mark = el("i", { class: look || "" });
    mark.style.setProperty("--c", colour);
    return el("span", {}, mark, name);
  }));
}

function empty(text) {
  return el("p", { class: "empty" }, text);
}

function header() {
  page.append(
    el("p", { class: "over" }, "Turnout run report"),
    el("h1", {}, data.name),
    el("p", { class: "lead" }, data.sentence));
  if (data.tiles.length) {
    page.append(el("div", { class: "tiles" }, ...data.tiles.map((tile) => el("div", { class: "tile" },
      el("div", { class: "label" }, tile.label), el("div", { class: "value" }, tile.value), el("div", { class: "detail" }, tile.detail)))));
  }
}

const KINDS = {
  error: ["Problem", "M6 0L12 6L6 12L0 6Z"],
  warn: ["Warning", "M6 0.5L12 11.5H0Z"],
  note: ["Note", "M6 0a6 6 0 1 0 .01 0z"],
  good: ["Good", "M0.5 6.5L4.5 10.5L11.5 1.5L10 0.5L4.3 8L1.8 5.2Z"],
};

function findings() {
  if (!data.findings.length) return;
  page.append(el("h2", {}, "What this run shows"));
  page.append(el("div", { class: "findings" }, ...data.findings.map((one) => {
    const [word, shape] = KINDS[one.severity];
    const icon = svg("svg", { viewBox: "0 0 12 12", "aria-hidden": "true" }, svg("path", { d: shape, fill: "currentColor" }));
    return el("div", { class: `finding ${one.severity}` },
      el("span", { class: "kind" }, icon, word), el("h3", {}, one.title),
      el("p", {}, one.text),
      one.try_ ? el("p", { class: "try" }, el("b", {}, "Try: "), one.try_) : null);
  })));
}

function axisControl() {
  const known = [["seconds", "Time"], ["tokens", "Tokens"], ["step", "Steps"]].filter(([name]) => data.x[name].some(isNumber));
  const buttons = known.map(([name, text]) => el("button", {
    type: "button", "aria-pressed": axis.key === name, onclick: (event) => {
      axis.key = name;
      for (const button of buttons) button.setAttribute("aria-pressed", button === event.currentTarget);
      for (const listener of axis.listeners) listener();
    } }, text));
  return el("div", { class: "controls" }, "All charts by", el("div", { class: "segments" }, ...buttons));
}

function lossPanel() {
  const panel = el("div", { class: "panel" },
    el("div", { class: "head" }, el("h3", {}, "Main loss"), axisControl()));
  const raw = series.loss;
  if (!raw) {
    panel.append(empty("No finite loss was recorded."));
    return panel;
  }
  const isBinned = Boolean(raw.lo);
  const lines = [
    { name: isBinned ? "training, mean here" : "training, this step", colour: "var(--blue)", look: "thin", y: raw.mean, lo: raw.lo, hi: raw.hi },
    { name: "training, smoothed", colour: "var(--blue)", y: series.loss_smooth.mean },
  ];
  const legend = [["training, smoothed", "var(--blue)"], [isBinned ? "training, range of the steps" : "training, each step", "var(--blue)", isBinned ? "band" : "faint"]];
  if (data.evals.length) {
    const column = (k) => data.evals.map((row) => row[k]);
    lines.push({ name: "validation", colour: "var(--orange)", dots: true, y: column(3), rows: { step: column(0), seconds: column(1), tokens: column(2) } });
    legend.push(["validation", "var(--orange)", "dot"]);
  }
  panel.append(key(...legend));
  lineChart(panel, { height: 330, label: "Loss over training", yLabel: "nats per token", format: (v) => plain(v, 4), tickText: (v) => plain(v), lines, domain: lossDomain(lines) });
  if (!data.evals.length) panel.append(el("p", { class: "hint" }, "No evaluation yet: there is no validation loss to draw."));
  return panel;
}

// the first steps fall from far above; they may leave the frame so that the rest can be read
function lossDomain(lines) {
  const settled = (values) => values.slice(Math.floor(values.length * 0.03)).filter(isNumber);
  const trimmed = settled(lines[0].y).sort((a, b) => a - b);
  const inner = [trimmed[Math.floor(trimmed.length * 0.01)], trimmed[Math.floor((trimmed.length - 1) * 0.99)]];
  const values = [...inner, ...settled(lines[1].y), ...(lines[2] ? settled(lines[2].y) : [])].filter(isNumber);
  const low = Math.min(...values), high = Math.max(...values);
  const room = (high - low) * 0.07 || 0.1;
  return [Math.max(low - room, Math.min(0, low)), high + room];
}

// one quantity: a small chart with its name, its last value and what it means
function small(title, hint, lines, format, options = {}) {
  const present = lines.filter((line) => line.y && line.y.some(isNumber));
  if (!present.length) return null;
  const box = el("div", { class: "small" },
    el("div", { class: "head" }, el("h3", {}, title), el("span", { class: "now" }, format(lastOf(present[0].y)))),
    hint ? el("p", { class: "hint" }, hint) : null);
  const top = Math.max(...present.flatMap((line) => line.y.filter(isNumber)));
  const domain = options.top ? [0, Math.max(options.top, top * 1.06)] : null;
  // the first line is the strong one: it is drawn last, on top
  lineChart(box, { height: 128, bare: true, label: title, format, lines: [...present].reverse(), domain, marks: options.marks });
  return box;
}

function line(name, from, colour, look) {
  return { name, colour, look, y: from && from.mean, lo: from && look === undefined && from.lo, hi: from && from.hi };
}

function learning() {
  page.append(el("h2", {}, "Learning"));
  if (!hasSteps) {
    page.append(empty("No steps recorded yet. The curves appear once training has begun."));
    return;
  }
  page.append(lossPanel());
  const charts = [
    small("Tokens per second", "Throughput of the whole run.", [line("tokens/s", series.tokens_per_s, "var(--green)")], (v) => plain(v), { top: 1 }),
    small("Gradient norm", "Before clipping.", [line("norm", series.grad_norm, "var(--blue)")], (v) => plain(v)),
    small("Learning rate", "As scheduled.", [line("rate", series.lr, "var(--soft)")], (v) => plain(v)),
  ].filter(Boolean);
  page.append(el("div", { class: "smalls few" }, ...charts));
  const aux = Object.entries(data.aux).map(([name, values]) =>
    small(name, "Auxiliary loss, before its coefficient.", [line(name, values, "var(--pink)")], (v) => plain(v))).filter(Boolean);
  if (aux.length) {
    const meaning = learns
      ? "A load-balance loss of 1 means even routing; a router z-loss that climbs means router logits are growing."
      : "They cannot move the load: this router does not learn.";
    page.append(
      el("h2", {}, "Auxiliary losses"),
      el("p", { class: "about" }, `Kept apart from the main loss. ${meaning}`),
      el("div", { class: "smalls few" }, ...aux));
  }
}

function experts() {
  page.append(el("h2", {}, "Experts"));
  if (!load) {
    page.append(empty("No MoE layers were recorded: the model is dense, or the run has no trace."));
    return;
  }
  if (!learns) page.append(el("p", { class: "about" }, `This router does not learn. ${data.routing.rule}`));
  page.append(el("p", { class: "about" }, "Load is an expert's share of assignments over its fair share: 1 when all experts of the layer get the same, 0 when it gets none."));
  view.layer = layersByUnevenness()[0];
  view.frame = load.frames - 1;
  const map = el("div", { class: "panel" }, el("div", { class: "head" }, el("h3", {}, "Load of every expert"), colourKey()));
  heatMap(map);
  frameSlider(map);
  const pick = el("select", { "aria-label": "layer", onchange: () => setView({ layer: Number(pick.value) }) },
    ...load.layers.map((name, layer) => el("option", { value: layer }, name)));
  const name = el("h3", {});
  view.listeners.push(() => { pick.value = view.layer; name.textContent = `${load.layers[view.layer]} over time`; });
  const one = el("div", { class: "panel" }, el("div", { class: "head" }, name, el("div", { class: "controls" }, "Layer", pick)));
  layerOverTime(one);
  page.append(map, one);
  setView({});
  spreads();
}

function spreads() {
  const order = layersByUnevenness();
  const first = order.length > 12 ? order.slice(0, 8) : load.layers.map((_, layer) => layer);
  page.append(
    el("div", { class: "head spreads" }, el("h3", {}, order.length > 12 ? "The eight most uneven layers" : "Spread of load in each layer"),
      key(["busiest expert", "var(--orange)"], ["median", "var(--soft)", "dash"], ["least used", "var(--blue)"])),
    el("div", { class: "smalls" }, ...first.map(spreadChart)));
  if (first.length < order.length) {
    const rest = el("div", { class: "smalls" });
    const more = el("details", { ontoggle: () => { if (!rest.childElementCount) rest.append(...order.slice(8).map(spreadChart)); } },
      el("summary", {}, `The other ${order.length - 8} layers`), rest);
    page.append(more);
  }
}

function balance() {
  if (!series.max_violation && !series.cv) return;
  page.append(
    el("h2", {}, learns ? "Balance and router health" : "Balance"),
    el("p", { class: "about" }, "Counted over the whole step, all its micro-batches together." + (learns ? "" : " Margin and entropy of the router's scores are left out: they are fixed.")),
    key(["mean of layers", "var(--blue)"], ["worst layer", "var(--faint)", "worst"]));
  const pair = (name, colour) => [line("mean of layers", series[name], colour), line("worst layer", series[`${name}_worst`], "var(--faint)", "worst")];
  const declines = Boolean(series.declined_share) && series.declined_share.mean.some((share) => share > 0);
  const charts = [
    small("Max violation", "Busiest expert over its fair share, minus 1. Even is 0.", pair("max_violation", "var(--blue)"), (v) => plain(v), { top: 1 }),
    small("Load variation (CV)", "Standard deviation of load over its mean. Even is 0.", pair("cv", "var(--blue)"), (v) => plain(v), { top: 0.5 }),
    small("Load entropy", "Of the greatest possible. Even is 100\u00a0%, under 60\u00a0% is collapse.", pair("entropy", "var(--green)"), percent, { top: 1, marks: [{ y: 0.6, text: "60\u00a0%" }] }),
    small("Dead experts", "Under 0.1\u00a0% of their fair share in the step.", [line("all layers", series.dead_experts, "var(--orange)"), line("worst layer", series.dead_experts_worst, "var(--faint)", "worst")], (v) => plain(v), { top: 4 }),
    small("Dropped", "Share of all assignments not sent for want of room.", [line("all layers", series.dropped_share, "var(--orange)"), line("worst layer", series.dropped_share_worst, "var(--faint)", "worst")], percent, { top: 0.02 }),
    declines && small("Left out", "Share of all choices that the router itself does not send, by design.", [line("all layers", series.declined_share, "var(--soft)"), line("worst layer", series.declined_share_worst, "var(--faint)", "worst")], percent, { top: 0.02 }),
    learns && small("Router margin", "Best minus second best score. Near 0 is undecided.", pair("margin", "var(--pink)"), (v) => plain(v), { top: 0.1 }),
    learns && small("Router entropy", "Of the router's probabilities. 100\u00a0% is undecided.", [line("mean of layers", series.router_entropy, "var(--pink)")], percent, { top: 1 }),
  ].filter(Boolean);
  page.append(el("div", { class: "smalls" }, ...charts));
}

function tokenView() {
  page.append(el("h2", {}, "Tokens"));
  page.append(data.tokens.length && data.tokens[0].layers.length ? tokenPanel() : empty("No token view was recorded in this run."));
}

function runLog() {
  page.append(el("h2", {}, "The run"));
  const panel = el("div", { class: "panel" }, el("h3", {}, "Events"));
  panel.append(data.events.length
    ? el("ol", { class: "events" }, ...data.events.map(([step, text]) => el("li", {}, el("span", { class: "at" }, `step ${step.toLocaleString("en")}`), el("span", {}, text))))
    : el("p", { class: "hint" }, "None recorded."));
  if (data.recipe) panel.append(el("details", {}, el("summary", {}, "Recipe"), el("pre", {}, data.recipe)));
  page.append(panel);
  for (const note of data.notes) page.append(el("p", { class: "hint" }, `Note: ${note}.`));
  page.append(el("footer", {}, "Written by Turnout. This file is complete: it needs no network and no other file."));
}

header();
findings();
learning();
experts();
balance();
tokenView();
runLog();
