"use strict";
// The page: sliders on one side, what they do on the other. All text becomes text nodes.

const data = JSON.parse(document.getElementById("data").textContent);
const facts = data.facts;
const dial = { ...data.start };
const page = document.getElementById("page");
const NS = "http://www.w3.org/2000/svg";
const PARTS = [
  ["tp", "tensor parallel"], ["ep", "experts' all-to-all"], ["etp", "gathers of shared tokens"], ["pp", "pipeline"],
  ["dp", "gradients"], ["edp", "experts' gradients"],
];

function make(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "colour") node.style.setProperty("--c", `var(--${value})`);
    else if (name === "width") node.style.width = value;
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function el(tag, attributes, ...children) {
  return make(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS(NS, tag);
  const { colour, ...rest } = attributes;
  if (colour) node.style.setProperty("--c", `var(--${colour})`);
  for (const [name, value] of Object.entries(rest)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// ---- numbers

function short(value, digits = 3) {
  if (!Number.isFinite(value)) return "\u221e";
  if (value >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

function ratioText(value) {
  if (!Number.isFinite(value)) return "\u221e";
  return value < 0.1 ? value.toFixed(3) : value < 10 ? value.toFixed(2) : short(value);
}

function bytesText(value) {
  for (const [size, unit] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (value >= size) return `${short(value / size)} ${unit}`;
  }
  return `${short(value)} B`;
}

function secondsText(value) {
  if (value >= 1 || value === 0) return `${short(value)} s`;
  return value >= 1e-3 ? `${short(value * 1e3)} ms` : `${short(value * 1e6)} \u00b5s`;
}

// ---- sliders

const ordered = (values) => [...new Set(values)].sort((a, b) => a - b);
const start = data.start;
const SLIDERS = [
  { key: "top_k", name: "Experts a token meets (k)", options: () => ordered([1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, start.top_k]), text: (v) => `top-${Math.min(v, dial.num_experts)}` },
  { key: "num_experts", name: "Experts of a layer", options: () => ordered([2, 4, 8, 16, 32, 64, 128, 256, start.num_experts]), text: String },
  { key: "experts_per_node", name: "Experts on a node", options: () => placements(facts, dial.num_experts, dial.tp).map((way) => way.perNode), text: () => String(placed(facts, dial).perNode) },
  { key: "tp", name: "Tensor parallel ranks", options: () => [1, 2, 4, 8].filter((size) => size <= facts.per_node), text: String },
  { key: "capacity_factor", name: "Capacity factor", options: () => Array.from({ length: 21 }, (_, i) => 1 + i * 0.05), text: (v) => v.toFixed(2) },
  { key: "moe_every", name: "Layers with experts", options: () => ordered([1, 2, 3, 4, start.moe_every]), text: (v) => (v === 1 ? "all" : `every ${v === 2 ? "second" : v === 3 ? "third" : `${v}th`}`) },
  { key: "batch_tokens", name: "Tokens of a step", options: () => ordered([1e6, 2e6, 4e6, 8e6, 16e6, 32e6, 60e6, 120e6, start.batch_tokens]), text: (v) => `${short(v / 1e6)} M` },
  { key: "nic_bytes_per_s", name: "Network card of a device", options: () => ordered([1e9, 3e9, 6e9, 12e9, 23.5e9, 48.5e9, 97e9, 200e9, 400e9, start.nic_bytes_per_s]), text: (v) => `${short(v / 1e9)} GB/s` },
];

function nearestIndex(options, value) {
  const far = (option) => Math.abs(Math.log(option / value));
  return options.reduce((best, option, i) => (far(option) < far(options[best]) ? i : best), 0);
}

function slider(spec) {
  const value = el("b", {});
  const input = el("input", { type: "range", min: 0, step: 1, "aria-label": spec.name,
    oninput: () => { dial[spec.key] = spec.options()[Number(input.value)]; show(); } });
  spec.refresh = () => {
    const options = spec.options();
    input.max = options.length - 1;
    input.value = nearestIndex(options, dial[spec.key]);
    value.textContent = spec.text(options[Number(input.value)]);
    input.setAttribute("aria-valuetext", value.textContent);
  };
  return el("label", { class: "slider" }, el("span", {}, spec.name, value), input);
}

const shareButtons = [["whole tokens", false], ["a share each", true]].map(([text, shared]) =>
  el("button", { type: "button", onclick: () => { dial.shared = shared; show(); } }, text));
const gatherBox = el("input", { type: "checkbox", onchange: () => { dial.gathers = gatherBox.checked; show(); } });
const gatherTick = el("label", { class: "tick" }, gatherBox, "also count the gathers that sharing needs inside the node");

function preset(name, change) {
  return el("button", { type: "button", onclick: () => { Object.assign(dial, start, change); show(); } }, name);
}

function controls() {
  const choice = el("fieldset", { class: "choice" },
    el("legend", {}, "Every tensor-parallel rank sends its experts"), el("div", { class: "segments" }, ...shareButtons), gatherTick);
  return el("section", { class: "panel controls", "aria-label": "Settings" },
    el("h3", {}, "Settings"),
    el("div", { class: "presets" }, preset("as it starts", {}), preset("tokens shared", { shared: true }),
      preset("256 experts, top-8", { num_experts: 256, top_k: 8, experts_per_node: 32, shared: true })),
    ...SLIDERS.map(slider), choice);
}

// ---- answers

const big = el("span", {});
const verdict = el("p", { class: "verdict", "aria-live": "polite" });
const sideFacts = el("div", { class: "facts" });
const byteBars = el("div", { class: "bars" });
const secondBars = el("div", { class: "bars" });
const keyHost = el("div", { class: "key" });
const chartHost = el("div", {});
const tableHost = el("div", {});

function verdictText(mixed, plain) {
  const between = secondsText(mixed.interSeconds), inside = secondsText(mixed.intraSeconds);
  const before = `without experts ${secondsText(plain.interSeconds)} against ${secondsText(plain.intraSeconds)}`;
  if (mixed.interSeconds > 1.1 * mixed.intraSeconds) {
    return plain.interSeconds > plain.intraSeconds
      ? `The network cards are the bottleneck: ${between} between nodes against ${inside} inside them; they were one before (${before}).`
      : `Experts move the bottleneck to the network cards: ${between} between nodes against ${inside} inside them; ${before}.`;
  }
  if (mixed.interSeconds > 0.9 * mixed.intraSeconds) return `Both tiers take about as long: ${between} between nodes, ${inside} inside them; ${before}.`;
  return `The links inside nodes stay the bottleneck: ${inside} inside against ${between} between them; ${before}.`;
}

function bars(host, rows, most, text) {
  host.replaceChildren(...rows.flatMap(([head, name, parts, total]) => [
    head ? el("div", { class: "head" }, head) : null,
    el("div", {}, name),
    el("div", { class: "track", role: "img", "aria-label": `${name}: ${text(total)}` }, ...PARTS.filter(([key]) => parts[key] > 0).map(([key]) =>
      el("i", { colour: key, width: `${(100 * parts[key]) / most}%` }))),
    el("div", { class: "value" }, text(total)),
  ].filter((node) => node)));
}

function tierRows(mixedParts, plainParts, mixed, plain, perByte) {
  const of = (parts, tier) => Object.fromEntries(Object.entries(parts).map(([key, part]) => [key, part[tier] * perByte[tier]]));
  return [
    ["Without experts", "inside nodes", of(plainParts, "intra"), plain.intra * perByte.intra],
    ["", "between nodes", of(plainParts, "inter"), plain.inter * perByte.inter],
    ["With experts", "inside nodes", of(mixedParts, "intra"), mixed.intra * perByte.intra],
    ["", "between nodes", of(mixedParts, "inter"), mixed.inter * perByte.inter],
  ];
}

// the all-to-all alone over tensor parallelism, against k, for both ways to send
function chart() {
  // as wide as the screen, so that words stay as large as the page's
  const narrow = (globalThis.innerWidth || 720) <= 560;
  const wide = narrow ? 350 : 720, high = 250, left = narrow ? 24 : 44, right = narrow ? 88 : 128, top = 14, bottom = 34;
  const most = Math.min(dial.num_experts, Math.max(8, 2 * dial.top_k)), ks = Array.from({ length: most }, (_, i) => i + 1);
  const at = (k, shared) => {
    const setting = { ...dial, top_k: k, shared };
    return aloneRatio(traffic(facts, setting, false));
  };
  if (dial.tp === 1) return el("p", { class: "hint" }, "With one tensor-parallel rank nothing is summed inside nodes: there is nothing to compare with.");
  const highest = Math.max(1.2, at(most, false), at(Math.min(dial.top_k, most), dial.shared));
  const x = (k) => left + ((k - 1) / Math.max(1, most - 1)) * (wide - left - right);
  const y = (ratio) => high - bottom - (ratio / highest) * (high - top - bottom);
  const step = [0.2, 0.5, 1, 2, 5, 10, 20].find((size) => highest / size <= 5.5) || highest / 5;
  const marks = Array.from({ length: Math.floor(highest / step) + 1 }, (_, i) => i * step);
  const line = (shared) => svg("path", { class: shared === dial.shared ? "line" : "line dim", colour: shared ? "tp" : "ep",
    d: ks.map((k, i) => `${i ? "L" : "M"}${x(k)} ${y(at(k, shared))}`).join("") });
  const apart = Math.abs(y(at(most, false)) - y(at(most, true))) > 15 ? 0 : 14;
  const end = (shared, text) => svg("text", { class: "name", x: x(most) + 8, y: y(at(most, shared)) + 4 - (shared ? 0 : apart) }, text);
  const here = Math.min(dial.top_k, most), ratio = at(here, dial.shared);
  return svg("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": `Ratio against k; now ${ratioText(ratio)} at top-${here}` },
    ...marks.map((mark) => svg("line", { class: "grid", x1: left, x2: wide - right, y1: y(mark), y2: y(mark) })),
    ...marks.map((mark) => svg("text", { x: left - 8, y: y(mark) + 4, "text-anchor": "end" }, short(mark))),
    svg("line", { class: "one", x1: left, x2: wide - right, y1: y(1), y2: y(1) }),
    ...ks.filter((k) => !narrow || most <= 10 || k === 1 || k % Math.ceil(most / 8) === 0).map((k) => svg("text", { x: x(k), y: high - bottom + 18, "text-anchor": "middle" }, String(k))),
    svg("text", { x: (left + wide - right) / 2, y: high - 2, "text-anchor": "middle" }, "experts a token meets"),
    line(false), line(true), end(false, "whole tokens"), end(true, "a share each"),
    svg("circle", { class: "dot", colour: dial.shared ? "tp" : "ep", r: 6, cx: x(here), cy: y(ratio) }),
    svg("text", { class: "name", x: x(here), y: y(ratio) - 12, "text-anchor": "middle" }, ratioText(ratio)));
}

function table(mixedParts, mixed) {
  const cell = (value, text) => el("td", {}, value > 0 ? text(value) : "\u2013");
  const rows = PARTS.filter(([key]) => mixedParts[key]).map(([key, name]) => {
    const { intra, inter } = mixedParts[key];
    return el("tr", {}, el("th", { scope: "row" }, name), cell(intra, bytesText), cell(inter, bytesText),
      cell(intra / facts.intra_bytes_per_s, secondsText), cell(inter / dial.nic_bytes_per_s, secondsText));
  });
  const heads = ["with experts", "sent inside", "sent between", "time inside", "time between"].map((name) => el("th", { scope: "col" }, name));
  const sums = [bytesText(mixed.intra), bytesText(mixed.inter), secondsText(mixed.intraSeconds), secondsText(mixed.interSeconds)];
  return el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows),
    el("tfoot", {}, el("tr", {}, el("th", { scope: "row" }, "all"), ...sums.map((text) => el("td", {}, text)))));
}

function show() {
  for (const spec of SLIDERS) spec.refresh();
  shareButtons.forEach((button, i) => button.setAttribute("aria-pressed", dial.shared === Boolean(i)));
  gatherTick.hidden = !dial.shared || dial.tp === 1;
  gatherBox.checked = dial.gathers;
  const mixedParts = traffic(facts, dial, false), plainParts = traffic(facts, dial, true);
  const mixed = totals(facts, dial, mixedParts), plain = totals(facts, dial, plainParts);
  big.textContent = ratioText(mixed.ratio);
  verdict.textContent = verdictText(mixed, plain);
  const fact = (value, name) => el("span", {}, el("b", {}, value), name);
  sideFacts.replaceChildren(
    fact(ratioText(plain.ratio), "without experts"), fact(ratioText(aloneRatio(mixedParts)), "the all-to-all over tensor parallelism"),
    fact(`${short(facts.intra_bytes_per_s / dial.nic_bytes_per_s)} : 1`, "link inside : network card"));
  const one = { intra: 1, inter: 1 }, perSecond = { intra: 1 / facts.intra_bytes_per_s, inter: 1 / dial.nic_bytes_per_s };
  bars(byteBars, tierRows(mixedParts, plainParts, mixed, plain, one), Math.max(mixed.intra, mixed.inter, plain.intra, plain.inter), bytesText);
  bars(secondBars, tierRows(mixedParts, plainParts, mixed, plain, perSecond),
    Math.max(mixed.intraSeconds, mixed.interSeconds, plain.intraSeconds, plain.interSeconds), secondsText);
  keyHost.replaceChildren(...key((name) => mixedParts[name] && mixedParts[name].intra + mixedParts[name].inter > 0));
  chartHost.replaceChildren(chart());
  tableHost.replaceChildren(table(mixedParts, mixed));
}

function key(used) {
  return PARTS.filter(([name]) => used(name)).map(([name, text]) => el("span", {}, el("i", { colour: name }), text));
}

function notes() {
  const paragraph = (text) => el("p", { class: "about" }, text);
  return [
    el("h2", {}, "Why"),
    paragraph("Of each layer and token, tensor parallelism over t ranks sends 8 (t\u22121)/t widths inside the node: two sums forward, two backward. Experts send 4 k (E\u2212m)/E widths between nodes, m of the E experts being on the sender's node: out and back, forward and backward. With s = 1 where every tensor-parallel rank sends whole tokens, and 1/t where they share them:"),
    el("p", { class: "formula" }, "between / inside = 4 k (E\u2212m)/E \u00b7 s  \u00f7  8 (t\u22121)/t"),
    paragraph("Width, layers and batch cancel, and the number of experts hardly matters: k and s do. Gradients and the pipeline add a little; they weigh more when the batch is small."),
    el("h2", {}, "What is assumed"),
    paragraph(`${data.model} on ${data.cluster} (${data.device}): ${facts.stages} pipeline stages, about ${facts.replicas} data-parallel replicas (a multiple of the expert ranks), tensor parallelism inside a node of ${facts.per_node}, experts cut by it too, bf16 on the wire, routing in balance, a linear all-to-all, no copies merged. Bytes are what one device sends in a step; seconds are those bytes over the bandwidth, messages and overlap left out. \u201cWithout experts\u201d is the same model with one expert that every token meets.`),
    el("footer", {}, "Written by turnout plan explain --html. When it opens, the page compares its formulas with bytes that the planner counted."),
  ];
}

const wrong = firstWrong(facts, data.checks);
if (wrong) page.append(el("p", { class: "alarm", role: "alert" }, "The formulas of this page do not give what the planner counted: do not rely on its numbers."));
page.append(
  el("p", { class: "over" }, "Turnout planner"),
  el("h1", {}, "What experts do to the network"),
  el("p", { class: "lead" }, `Without experts, hardly anything leaves a node; with them, whole activations do. How much, for ${data.model} on ${data.cluster}, is up to the settings on this page.`),
  el("div", { class: "desk" }, controls(), el("div", { class: "answers" },
    el("section", { class: "panel top" },
      el("div", { class: "big" }, big, el("small", {}, "bytes between nodes for each byte inside them")),
      el("div", {}, verdict, sideFacts)),
    el("section", { class: "panel" }, el("h3", {}, "Bytes one device sends in a step"), byteBars, keyHost),
    el("section", { class: "panel" }, el("h3", {}, "Seconds at the bandwidth"), secondBars),
    el("section", { class: "panel" }, el("h3", {}, "The all-to-all alone over tensor parallelism, by experts a token meets"), chartHost),
    el("section", { class: "panel" }, el("h3", {}, "By cause"), tableHost))),
  ...notes());
show();
