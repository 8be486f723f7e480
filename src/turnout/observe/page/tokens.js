"use strict";
// A text whose tokens are coloured by the expert they went to first. Colour, line style and number tell experts apart.

const tokens = { view: 0, layer: 0, focus: null };

function expertLook(expert) {
  return `h${expert % 8} p${Math.floor(expert / 8) % 4}`;
}

function tokenPanel() {
  const shown = el("div", { class: "text" });
  const chips = el("div", { class: "chips" });
  const note = el("p", { class: "hint" });
  const layers = el("select", { "aria-label": "layer", onchange: () => { tokens.layer = Number(layers.value); tokens.focus = null; draw(); } });
  const steps = el("select", { "aria-label": "step", onchange: () => { tokens.view = Number(steps.value); tokens.focus = null; draw(); } },
    ...data.tokens.map((one, i) => el("option", { value: i }, `step ${one.step.toLocaleString("en")}`)));
  tokens.view = data.tokens.length - 1;
  steps.value = tokens.view;
  const draw = () => {
    const one = data.tokens[tokens.view];
    tokens.layer = Math.min(tokens.layer, one.layers.length - 1);
    layers.replaceChildren(...one.layers.map((name, i) => el("option", { value: i }, name)));
    layers.value = tokens.layer;
    shown.classList.toggle("focus", tokens.focus !== null);
    shown.replaceChildren(...one.tokens.map((piece, i) => tokenNode(one, piece, i)));
    chips.replaceChildren(...expertChips(one, draw));
    note.textContent = one.tokens.length < one.total ? `The first ${one.tokens.length.toLocaleString("en")} of ${one.total.toLocaleString("en")} tokens.` : "";
  };
  draw();
  return el("div", { class: "panel" },
    el("div", { class: "head" },
      el("h3", {}, "Tokens and their experts"),
      el("div", { class: "controls" }, data.tokens.length > 1 ? steps : null, layers)),
    el("p", { class: "hint" }, howToRead()),
    chips, shown, note);
}

function howToRead() {
  return data.routing.learns
    ? "Each token has the colour and line of its first expert. Point at a token for its experts, weights and path through the layers; press an expert to see its tokens alone, pale where it is not the first choice."
    : `This router does not learn: the same in every step. ${data.routing.rule} Each token has the colour and line of its first expert. Point at a token for its experts and path through the layers; press an expert to see its tokens alone, pale where another stands first.`;
}

function tokenNode(one, piece, index) {
  const experts = one.experts[tokens.layer][index];
  const first = experts.length ? experts[0] : null;
  const isOn = tokens.focus !== null && experts.includes(tokens.focus);
  const look = first === null ? "lost" : expertLook(isOn ? tokens.focus : first);
  const node = el("span", { class: `tok ${look}${isOn ? " on" : ""}${isOn && first !== tokens.focus ? " later" : ""}` });
  for (const [i, part] of piece.split("\n").entries()) {
    if (i > 0) node.append(el("span", { class: "nl" }, "\u21b5"), "\n");
    node.append(part);
  }
  if (!piece) node.append(el("span", { class: "nl" }, "\u2205"));
  node.addEventListener("pointermove", (event) => tokenTip(event, one, piece, index));
  node.addEventListener("pointerleave", hideTip);
  return node;
}

function tokenTip(event, one, piece, index) {
  const experts = one.experts[tokens.layer][index], weights = one.weights[tokens.layer][index];
  const weight = (k) => (!data.routing.learns ? "" : isNumber(weights[k]) ? weights[k].toFixed(3) : "n/a");
  const rows = experts.map((expert, k) => [`expert ${expert}`, weight(k), `var(--h${expert % 8})`]);
  const path = one.experts.map((layer) => (layer[index].length ? layer[index][0] : "\u2013")).slice(0, 24).join(" \u2192 ");
  showTip(event, JSON.stringify(piece), rows.length ? rows : [["no expert took it", ""]],
    one.layers.length > 1 ? el("div", { class: "path" }, `first expert by layer: ${path}`) : null);
}

function expertChips(one, draw) {
  const layer = one.experts[tokens.layer];
  const counts = new Map();
  for (const experts of layer) if (experts.length) counts.set(experts[0], (counts.get(experts[0]) || 0) + 1);
  const used = [...counts.keys()].sort((a, b) => a - b);
  return used.map((expert) => el("button", {
    class: `chip ${expertLook(expert)}`, type: "button", "aria-pressed": tokens.focus === expert,
    title: `first expert of ${counts.get(expert)} of ${one.tokens.length} tokens`,
    onclick: () => { tokens.focus = tokens.focus === expert ? null : expert; draw(); },
  }, el("b", {}, expert), percent(counts.get(expert) / one.tokens.length)));
}
