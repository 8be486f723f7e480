"use strict";
// What one device sends in a training step, in closed form: specs of the planner, "per-step formulas".
// turnout.plan.explain_page has the same settings counted by the planner's own programs, and a test holds both equal.

// ranks 0, stride, 2 stride ... on nodes that are filled rank by rank
function group(facts, size, stride) {
  let local = Math.min(size, Math.max(1, Math.floor(facts.per_node / stride)));
  while (size % local) local -= 1;
  return { size, local, nodes: size / local };
}

// a ring visits node by node: of the ranks on a node one sends out
function ring(mesh, steps, pieceBytes) {
  if (mesh.size === 1) return { intra: 0, inter: 0 };
  const leaving = mesh.nodes > 1 ? 1 / mesh.local : 0;
  return { intra: steps * pieceBytes * (1 - leaving), inter: steps * pieceBytes * leaving };
}

function allReduce(mesh, bytes) {
  return ring(mesh, 2 * (mesh.size - 1), bytes / mesh.size);
}

function scaled(traffic, factor) {
  return { intra: factor * traffic.intra, inter: factor * traffic.inter };
}

// the ways to spread the experts over ranks, by how many of them a node then has
function placements(facts, experts, tp) {
  const found = new Map();
  for (let held = 1; held <= experts; held++) {
    if (experts % held) continue;
    const mesh = group(facts, experts / held, tp);
    const perNode = held * mesh.local;
    if (!found.has(perNode)) found.set(perNode, { perNode, held, mesh });
  }
  return [...found.values()].sort((a, b) => a.perNode - b.perNode);
}

// the way whose experts a node are closest to those wanted, in proportion; the fewer of two as close
function placed(facts, dial) {
  const distance = (way) => Math.abs(Math.log(way.perNode / dial.experts_per_node));
  return placements(facts, dial.num_experts, dial.tp).reduce((a, b) => (distance(b) < distance(a) - 1e-12 ? b : a));
}

function sparseLayers(facts, every) {
  return facts.stacks.reduce((sum, length) => sum + Math.floor(Math.max(0, length - facts.dense_first) / every), 0);
}

// bytes by cause, each { intra, inter }; `dense` is the same model with one expert that every token meets
function traffic(facts, dial, dense) {
  const way = placed(facts, dial);
  const layers = facts.stacks.reduce((sum, length) => sum + length, 0);
  const sparse = dense ? 0 : sparseLayers(facts, dial.moe_every);
  const ranks = way.mesh.size;
  const replicas = ranks * Math.max(1, Math.floor(facts.replicas / ranks));
  const tokens = dial.batch_tokens / replicas;
  const buffer = tokens * facts.dim * facts.element_bytes;
  const stages = facts.stages;
  const tensor = group(facts, dial.tp, 1);
  // two sums a layer forward, two backward
  const parts = { tp: scaled(allReduce(tensor, buffer), (4 * layers) / stages) };
  const sends = stages === 1 ? 0 : stages === 2 ? 1 : 2;
  const chain = group(facts, stages, replicas * dial.tp);
  const crossing = stages > 1 ? (chain.nodes - 1) / (chain.size - 1) : 0;
  parts.pp = { intra: sends * buffer * (1 - crossing), inter: sends * buffer * crossing };
  const ffn = dense ? layers * facts.twin_ffn_params : (layers - sparse) * facts.ffn_params;
  const routers = sparse * (facts.shared_params + dial.num_experts * facts.router_params);
  const params = (facts.always_params + ffn + routers) / stages / dial.tp;
  parts.dp = allReduce(group(facts, replicas, dial.tp), params * facts.grad_bytes);
  if (dense) return parts;
  // four exchanges a layer: dispatch and combine, forward and backward; of k copies m / E stay on the node
  const topK = Math.min(dial.top_k, dial.num_experts);
  const rows = topK * dial.capacity_factor * (tokens / (dial.shared ? dial.tp : 1)) * facts.width * facts.element_bytes;
  const exchanges = (4 * sparse) / stages;
  const near = (way.mesh.local - 1) / ranks, far = (ranks - way.mesh.local) / ranks;
  parts.ep = { intra: exchanges * rows * near, inter: exchanges * rows * far };
  const copies = replicas / ranks;
  const held = (way.held * sparse * facts.expert_params) / stages / dial.tp;
  parts.edp = allReduce(group(facts, copies, ranks * dial.tp), held * facts.grad_bytes);
  if (dial.gathers && dial.shared) {
    // each rank of an expert gathers the rows its peers received, and scatters the sums
    parts.etp = scaled(ring(tensor, dial.tp - 1, rows), exchanges);
  }
  return parts;
}

// all causes together, with seconds at the bandwidths, messages left out
function totals(facts, dial, parts) {
  const sum = (tier) => Object.values(parts).reduce((all, part) => all + part[tier], 0);
  const intra = sum("intra"), inter = sum("inter");
  return {
    intra, inter, ratio: intra > 0 ? inter / intra : Infinity,
    intraSeconds: intra / facts.intra_bytes_per_s, interSeconds: inter / dial.nic_bytes_per_s,
  };
}

// the experts' bytes between nodes over tensor parallelism's inside them
function aloneRatio(parts) {
  return parts.tp.intra > 0 ? parts.ep.inter / parts.tp.intra : Infinity;
}

// checks: settings with the planner's own bytes; the first that this page gets wrong, or null
function firstWrong(facts, checks) {
  const differ = (a, b) => Math.abs(a - b) > 1e-9 * Math.max(1, Math.abs(a), Math.abs(b));
  return checks.find((check) => {
    const mixed = totals(facts, check.dial, traffic(facts, check.dial, false));
    const plain = totals(facts, check.dial, traffic(facts, check.dial, true));
    return differ(mixed.intra, check.intra_bytes) || differ(mixed.inter, check.inter_bytes)
      || differ(plain.intra, check.dense_intra_bytes) || differ(plain.inter, check.dense_inter_bytes);
  }) || null;
}
