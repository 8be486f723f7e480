"""Mutation check: break the numerics in one place at a time; the contract tests must notice.

Usage: python -m tests.mutations [--only NAME] [--jobs 2]. Prints one line a mutation and the share caught; exits 1
below 90 %, or if a test fails where nothing is broken. Works on copies: the working tree stays as it is.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYER = "tests/contracts/test_layer_equals_oracle.py"
ROUTERS = "tests/contracts/test_routers.py"
LOSSES = "tests/contracts/test_losses.py"
TOKEN = "tests/contracts/test_token_choice.py"
PADDING = "tests/contracts/test_padding.py"
CAPACITY = "tests/contracts/test_capacity.py"
DISPATCH = "tests/contracts/test_dispatch.py"
GSHARD = "tests/contracts/test_gshard.py"
BALANCED = "tests/contracts/test_balanced_routers.py"
LOCMOE = "tests/contracts/test_locmoe.py"
LOCALITY = "tests/distributed/test_locality.py"
OTHERS = "tests/contracts/test_other_routers.py"
GROUPED = "tests/contracts/test_grouped_mm.py"
LAYERS = "tests/contracts/test_other_layers.py"
GENERATE = "tests/paths/test_generate.py"
COEFFICIENT = "tests/paths/test_effective_coefficient.py"
RANKS = "tests/distributed/test_equal_one_process.py"
MOVES = "tests/distributed/test_moves.py"
BALANCE = "tests/plan/test_balance.py"
COPIES, COPIES_PLAN = "tests/distributed/test_copies.py", "tests/plan/test_copies.py"
MOVES_ROUTER = f"{ROUTERS}::test_the_main_loss_alone_moves_the_router"
SCORES_ALONE = f"{LOSSES}::test_the_balance_gradient_goes_through_the_scores_alone"
LEAST_CAUGHT = 0.9


@dataclass(frozen=True)
class Mutation:
    """One place of the source, written wrongly."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "padding mask ignored",
        "contracts.py",
        "x_TD = x_TD[token_R]",
        "x_TD = x_TD[token_R] * 1.0 + x_TD.mean()",
        (PADDING,),
    ),
    Mutation(
        "padding counted as tokens",
        "contracts.py",
        "return mask_T.nonzero().squeeze(1)",
        "return torch.arange(num_tokens)",
        (PADDING, ROUTERS),
    ),
    Mutation(
        "router in the model's dtype",
        "contracts.py",
        "x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))",
        "x_TD",
        (ROUTERS,),
    ),
    Mutation(
        "router under autocast",
        "contracts.py",
        "enabled=False):",
        "enabled=torch.is_autocast_enabled(x_TD.device.type)):",
        (ROUTERS,),
    ),
    Mutation(
        "ties to the higher index",
        "routers/pieces.py",
        "pick_R1 = left_RE.argmax(dim=1, keepdim=True)",
        "pick_R1 = left_RE.shape[1] - 1 - left_RE.flip(1).argmax(dim=1, keepdim=True)",
        (ROUTERS,),
    ),
    Mutation(
        "second choice may be the first",
        "routers/pieces.py",
        "left_RE.scatter_(1, pick_R1, -torch.inf)",
        "left_RE.scatter_(1, pick_R1, left_RE.min() - 1)",
        (ROUTERS, LAYER),
    ),
    Mutation(
        "no renormalisation",
        "routers/topk.py",
        "chosen_RK.softmax(dim=1) if self.config.renormalize else",
        "scores_RE.gather(1, expert_RK) if self.config.renormalize else",
        (LAYER, ROUTERS),
    ),
    Mutation("no route scale", "routers/topk.py", "weight_RK * self.config.scale", "weight_RK", (LAYER, ROUTERS)),
    Mutation(
        "bias in the weights",
        "routers/deepseek_v3.py",
        "sigmoid_shares(logits_RE.gather(1, expert_RK))",
        "sigmoid_shares((logits_RE + self.bias_E).gather(1, expert_RK))",
        (LAYER,),
    ),
    Mutation(
        "bias not in the selection",
        "routers/deepseek_v3.py",
        "logits_RE.detach().sigmoid() + self.bias_E",
        "logits_RE.detach().sigmoid()",
        (LAYER,),
    ),
    Mutation(
        "bias steps the wrong way",
        "routers/deepseek_v3.py",
        "mean - load_E",
        "load_E - mean",
        (ROUTERS, "tests/contracts"),
    ),
    # The detach of the bias. Most detachments of the routers have nothing to cut, and are left out here: DeepSeek-V3's,
    # quantile's and device_limited's logits, gshard's second weight, top_p's, base's, sinkhorn's and expert_choice's
    # scores, locmoe_plus's affinities and every priority end in integers or booleans, which have no gradient, and the
    # biases and prices are buffers changed under no_grad. What a gradient could reach:
    Mutation(
        "detach: the biases are parameters",
        "routers/deepseek_v3.py",
        'self.register_buffer("bias_E", torch.zeros(num_experts))',
        "self.bias_E = torch.nn.Parameter(torch.zeros(num_experts))",
        (MOVES_ROUTER,),
    ),
    Mutation(
        "detach: the prices are parameters",
        "routers/quantile.py",
        'self.register_buffer("price_E", torch.zeros(num_experts))',
        "self.price_E = torch.nn.Parameter(torch.zeros(num_experts))",
        (MOVES_ROUTER,),
    ),
    Mutation(
        "detach: prices in the weights",
        "routers/quantile.py",
        "weight_RK = (scores_RE if is_softmax",
        "weight_RK = ((logits_RE - price_E).softmax(dim=1) if is_softmax",
        (f"{BALANCED}::test_quantile_prices_choose_but_do_not_weigh",),
    ),
    Mutation(
        "detach: a bias's gradient in the weights, not its value",
        "routers/deepseek_v3.py",
        "sigmoid_shares(logits_RE.gather(1, expert_RK))",
        "sigmoid_shares((logits_RE + self.bias_E * (logits_RE - logits_RE.detach())).gather(1, expert_RK))",
        (f"{LAYER}::test_layer_equals_the_oracle",),
    ),
    Mutation(
        "detach: the predictor of depths moves what stands below",
        "layers/mixture_of_depths.py",
        "self.predictor(wide_BSD.detach())",
        "self.predictor(wide_BSD)",
        (f"{LAYERS}::test_the_predictor_learns_who_was_chosen_and_its_loss_moves_nothing_else",),
    ),
    Mutation(
        "detach: the weight of depths has no gradient",
        "layers/mixture_of_depths.py",
        "weight_BC1 = score_BS.flatten()",
        "weight_BC1 = score_BS.detach().flatten()",
        (f"{LAYERS}::test_padding_passes_by_takes_no_capacity_and_is_not_seen",),
    ),
    Mutation(
        "detach: balance has its gradient through the load too",
        "losses/load_balance.py",
        "load_E = counts_E.to(scores_RE.dtype) / counts_E.sum().clamp(min=1)",
        "load_E = counts_E.to(scores_RE.dtype) / counts_E.sum().clamp(min=1)\n"
        "    load_E = load_E + scores_RE.mean(dim=0) - scores_RE.mean(dim=0).detach()",
        (SCORES_ALONE,),
    ),
    Mutation(
        "detach: balance has no gradient",
        "losses/load_balance.py",
        "return num_experts * (load_E * scores_RE.sum(dim=0)).sum()",
        "return num_experts * (load_E * scores_RE.detach().sum(dim=0)).sum()",
        (SCORES_ALONE,),
    ),
    Mutation(
        "detach: remoe's balance has its gradient through the load too",
        "routers/remoe.py",
        "return (load_E * gate_sum_E).sum()",
        "return ((load_E + gate_sum_E - gate_sum_E.detach()) * gate_sum_E).sum()",
        (f"{BALANCED}::test_remoe_sends_tokens_to_the_experts_that_fire_and_returns_the_term_of_the_paper",),
    ),
    Mutation(
        "detach: remoe's strength has no gradient to pass on",
        "routers/remoe.py",
        "value = strength * gate_l1(gates_RE,",
        "value = strength * gate_l1(gates_RE.detach(),",
        (f"{BALANCED}::test_remoe_sends_tokens_to_the_experts_that_fire_and_returns_the_term_of_the_paper",),
    ),
    Mutation(
        "detach: a recording keeps the graph it was made with",
        "routers/replay.py",
        "getattr(recording, name).detach().to(",
        "getattr(recording, name).to(",
        (f"{OTHERS}::test_a_recording_may_give_tokens_any_number_of_experts",),
    ),
    Mutation(
        "detach: locmoe+'s gate has no gradient of the task",
        "routers/locmoe_plus.py",
        "self._by_tokens(affinity_RE.detach(), scores_RE, tokens",
        "self._by_tokens(affinity_RE.detach(), scores_RE.detach(), tokens",
        (f"{LOCMOE}::test_the_task_alone_moves_the_gate",),
    ),
    Mutation(
        "detach: the outer router of a tree has no gradient",
        "routers/hierarchical.py",
        "weight_N=(groups.weight_N[via_N] * inner_N)[order_N]",
        "weight_N=(groups.weight_N.detach()[via_N] * inner_N)[order_N]",
        (MOVES_ROUTER,),
    ),
    Mutation("group score is the maximum", "routers/pieces.py", "best: int = 2", "best: int = 1", (LAYER, ROUTERS)),
    Mutation(
        "gshard: second always sent", "routers/gshard.py", "return draw_R / 2", "return draw_R * 0", (GSHARD, LAYER)
    ),
    Mutation("gshard: g2 > r", "routers/gshard.py", "return draw_R / 2", "return draw_R", (GSHARD, LAYER)),
    Mutation(
        "gshard: a declined choice leaves the queue",
        "dispatch/queue.py",
        "queue_sorted_N, order_N = queue_N[arrival_N].sort(stable=True)",
        "arrival_N = arrival_N[assignment.declined_N[arrival_N].int().argsort(stable=True)]"
        " if assignment.declined_N is not None else arrival_N\n"
        "    queue_sorted_N, order_N = queue_N[arrival_N].sort(stable=True)",
        (GSHARD, LAYER),
    ),
    Mutation(
        "second choices before first",
        "dispatch/queue.py",
        "index_N.view(-1, assignment.top_k).t().reshape(-1)",
        "index_N",
        (GSHARD, DISPATCH, LAYER),
    ),
    Mutation(
        "the counter starts at one",
        "dispatch/queue.py",
        "place_N = torch.arange(len(queue_N), device=queue_N.device)",
        "place_N = 1 + torch.arange(len(queue_N), device=queue_N.device)",
        (GSHARD, DISPATCH),
    ),
    Mutation(
        "the capacity is rounded down",
        "dispatch/admission.py",
        "return math.ceil(min(factor",
        "return math.floor(min(factor",
        (LAYER, DISPATCH),
    ),
    Mutation(
        "one row too many",
        "dispatch/capacity.py",
        "num_experts, arrival_N) < capacity",
        "num_experts, arrival_N) <= capacity",
        (LAYER, DISPATCH),
    ),
    Mutation(
        "drops counted twice",
        "dispatch/admission.py",
        "~wanted_N if within_N is None else within_N & ~wanted_N",
        "~wanted_N",
        (DISPATCH, CAPACITY, LAYER),
    ),
    Mutation(
        "tutel: 0 falls back to the setting",
        "dispatch/tutel.py",
        "factor = self.factor if factor is None else factor_of_call(factor)",
        "factor = factor or self.factor",
        (CAPACITY,),
    ),
    Mutation(
        "scores from the worst",
        "dispatch/queue.py",
        "argsort(descending=True, stable=True)]",
        "argsort(descending=False, stable=True)]",
        (CAPACITY,),
    ),
    Mutation(
        "weights applied twice",
        "dispatch/combine.py",
        "weight_M = assignment.weight_N.index_select(0, plan.assignment_M)",
        "weight_M = assignment.weight_N.index_select(0, plan.assignment_M) ** 2",
        (LAYER,),
    ),
    Mutation(
        "no gradient to the weights",
        "segments.py",
        "grad_weight_M = torch.linalg.vecdot(grad_MD, rows_MD.to(wide))",
        "grad_weight_M = 0 * torch.linalg.vecdot(grad_MD, rows_MD.to(wide))",
        (LAYER, ROUTERS),
    ),
    Mutation(
        "weights of the wrong rows",
        "dispatch/combine.py",
        "index_select(0, plan.assignment_M)",
        "index_select(0, plan.assignment_M.sort().values)",
        (LAYER,),
    ),
    Mutation(
        "rows of the wrong tokens",
        "dispatch/permute.py",
        "token_M=token_in_order[order_M]",
        "token_M=token_in_order",
        (LAYER, DISPATCH),
    ),
    Mutation(
        "unstable order of rows",
        "dispatch/permute.py",
        "key_N.to(narrow).argsort(stable=True)",
        "key_N.to(narrow).flip(0).argsort(stable=True).sub(len(key_N) - 1).neg()",
        (DISPATCH, LAYER, "tests/contracts"),
    ),
    Mutation(
        "gather's gradient overwrites",
        "segments.py",
        "return _wide_sum(grads[0], ctx.segments), None",
        "zeros_TD = grads[0].new_zeros(len(ctx.segments.offset_T), grads[0].shape[1])\n"
        "        return zeros_TD.index_copy(0, ctx.segments.target_M, grads[0]), None",
        (LAYER,),
    ),
    Mutation(
        "balance without E",
        "losses/load_balance.py",
        "return num_experts * (load_E * scores_RE.sum(dim=0)).sum()",
        "return (load_E * scores_RE.sum(dim=0)).sum()",
        (LOSSES, LAYER),
    ),
    Mutation("balance without 1/T", "losses/load_balance.py", ".sum() / max(num_tokens, 1)", ".sum()", (LOSSES, LAYER)),
    Mutation(
        "balance counts first choices",
        "losses/load_balance.py",
        'assignment.counts_E if self.count == "all"',
        'assignment.first_choice_counts_E() if self.count == "all"',
        (LOSSES, LAYER),
    ),
    Mutation("z-loss without the square", "losses/router_z.py", ".square().sum()", ".sum()", (LOSSES, LAYER)),
    Mutation(
        "z-loss of the mean",
        "losses/router_z.py",
        "logits_RE.logsumexp(dim=1)",
        "logits_RE.mean(dim=1)",
        (LOSSES, LAYER),
    ),
    Mutation(
        "switch renormalises",
        "routers/switch.py",
        "scores_RE.gather(1, expert_R1)",
        "torch.ones_like(scores_RE.gather(1, expert_R1))",
        (LAYER, ROUTERS),
    ),
    Mutation(
        "jitter in evaluation",
        "routers/switch.py",
        "if not self.training or self.config.jitter == 0:",
        "if self.config.jitter == 0:",
        (ROUTERS,),
    ),
    Mutation(
        "offsets start late",
        "experts/grouped_mm.py",
        "counts_E.cumsum(0).to(torch.int32)",
        "counts_E.roll(1).cumsum(0).to(torch.int32)",
        (GROUPED, LAYER),
    ),
    Mutation(
        "weights not transposed in backward",
        "experts/grouped_mm.py",
        "_rows_by_rows(x_MD, grad_MG, end_E) if",
        "_rows_by_rows(x_MD, grad_MG, end_E) * 0.5 if",
        (GROUPED, LAYER),
    ),
    Mutation(
        "bias of the neighbour",
        "experts/grouped_mm.py",
        "bias_EG.to(y_MG.dtype).repeat_interleave",
        "bias_EG.roll(1, 0).to(y_MG.dtype).repeat_interleave",
        (LAYER, GROUPED),
    ),
    Mutation(
        "shared expert on padding",
        "layers/moe.py",
        "return y_TD.index_add(0, token_R, shared(x_TD[token_R]).to(y_TD.dtype))",
        "return y_TD + shared(x_TD)",
        (PADDING, LAYER),
    ),
    Mutation(
        "locality: the logarithms change places",
        "losses/locality.py",
        "current_E.clamp(min=least).log() - local_E.log()",
        "local_E.log() - current_E.clamp(min=least).log()",
        (LOCMOE,),
    ),
    Mutation(
        "locality: the share of other nodes on each of their experts",
        "losses/locality.py",
        "epsilon / (num_experts - num_local)",
        "epsilon",
        (LOCMOE,),
    ),
    Mutation(
        "locality: near are the experts of one rank",
        "placement.py",
        "range(first, first + self.node_size)",
        "range(first, first + 1)",
        (LOCMOE,),
    ),
    Mutation("locality: every rank on the first node", "parallel/sites.py", "rank=group.rank", "rank=0", (LOCALITY,)),
    Mutation(
        "locmoe: one row more than the floor",
        "ranking.py",
        "(place_N < floor)",
        "(place_N <= floor)",
        (LOCMOE,),
    ),
    Mutation(
        "locmoe: worst tokens kept",
        "ranking.py",
        "affinity_N.argsort(descending=True, stable=True)",
        "affinity_N.argsort(descending=False, stable=True)",
        (LOCMOE,),
    ),
    Mutation(
        "top-any ignored",
        "routers/topk.py",
        "self.config.k if tokens.top_k is None else tokens.top_k",
        "self.config.k",
        (TOKEN,),
    ),
    Mutation("hash: weights do not sum to scale", "routers/hash.py", "share * self.config.scale", "share", (LAYER,)),
    Mutation(
        "hash: one function twice",
        "routers/hash.py",
        "_universal(id_R, self.coefficients[1]",
        "_universal(id_R, self.coefficients[0]",
        (LAYER,),
    ),
    Mutation(
        "hash: a token alone is another token",
        "routers/hash.py",
        "self._experts(tokens.token_ids_R)",
        "self._experts(tokens.token_ids_R + (len(tokens.token_R) == 1))",
        (GENERATE,),
    ),
    Mutation(
        "hash: the first draw is kept",
        "routers/hash.py",
        "self.coefficients.copy_(best)",
        "pass",
        ("tests/paths/test_train_resume.py", "tests/contracts/test_other_routers.py"),
    ),
    Mutation(
        "balance: coefficient depends on accumulation",
        "train/parts.py",
        "aux=ranks * aux / all_tokens",
        "aux=1 / len(batches)",
        (COEFFICIENT,),
    ),
    Mutation(
        "balance: ranks count for themselves",
        "losses/load_balance.py",
        "dist.all_reduce(counts_E)",
        "pass",
        (COEFFICIENT,),
    ),
    Mutation(
        "balance: the step is not counted ahead",
        "train/parts.py",
        "if len(batches) == 1 or moe is None or not any(loss.spans_step for loss in moe.losses):",
        "if True:",
        (COEFFICIENT,),
    ),
    Mutation(
        "balance: counted with other noise than trained",
        "train/parts.py",
        'with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast:',
        "with autocast:",
        (COEFFICIENT,),
    ),
    Mutation(
        "a constant loss is accepted",
        "contracts.py",
        "if not router.scores_have_gradient:",
        "if False:",
        (LOSSES, "tests/contracts/test_errors.py"),
    ),
    Mutation(
        "locmoe: theorem 1 measured anew each step",
        "routers/locmoe.py",
        "torch.where(self.least_capacity == 0, rows, self.least_capacity)",
        "rows",
        (LOCMOE,),
    ),
    Mutation(
        "quantile: evaluation knows no price",
        "routers/quantile.py",
        "price_E = self.price_E.to(logits_RE.dtype)",
        "price_E = torch.zeros_like(self.price_E).to(logits_RE.dtype)",
        ("tests/contracts/test_balanced_routers.py",),
    ),
    Mutation(
        "a router's buffers follow the model's dtype",
        "contracts.py",
        "if now.dtype != value.dtype:",
        "if False:",
        (ROUTERS,),
    ),
    Mutation(
        "ranks: experts have a divisor of their own",
        "parallel/gradients.py",
        "_average(experts, groups.replicas, divisor)",
        "_average(experts, groups.replicas, divisor // parallel.strategy.ep)",
        (RANKS,),
    ),
    Mutation(
        "remoe: the balanced term forgets k",
        "routers/remoe.py",
        "(num_experts / (k * max(num_tokens, 1)))",
        "(num_experts / max(num_tokens, 1))",
        (BALANCED,),
    ),
    Mutation(
        "remoe: the strength shrinks where it should grow",
        "routers/remoe.py",
        "self.growths.add_(excess.sign())",
        "self.growths.sub_(excess.sign())",
        (BALANCED,),
    ),
    Mutation(
        "noisy top-k: noise in evaluation too",
        "routers/noisy_topk.py",
        "if self.training else torch.zeros_like(clean_RE)",
        "if True else torch.zeros_like(clean_RE)",
        (TOKEN,),
    ),
    Mutation(
        "noisy top-k: a chosen expert's rival is the k-th",
        "routers/noisy_topk.py",
        "torch.where(chosen_RE, next_R1, kth_R1)",
        "torch.where(chosen_RE, kth_R1, kth_R1)",
        (TOKEN,),
    ),
    Mutation(
        "sinkhorn: columns are not scaled",
        "routers/sinkhorn.py",
        "return scaled_RE + column_E",
        "return scaled_RE",
        (BALANCED,),
    ),
    Mutation(
        "sinkhorn: the plan chooses in evaluation too",
        "routers/sinkhorn.py",
        "if self.training:",
        "if True:",
        (BALANCED,),
    ),
    Mutation(
        "expert choice: a token less for each expert",
        "routers/expert_choice.py",
        "per_expert = -(-k * num_tokens // num_experts)",
        "per_expert = k * num_tokens // num_experts",
        (BALANCED,),
    ),
    Mutation(
        "expert choice: by logits, not scores",
        "routers/expert_choice.py",
        "logits_RE.detach().log_softmax(dim=1), self.config.k",
        "logits_RE.detach(), self.config.k",
        (BALANCED,),
    ),
    Mutation(
        "cosine: tokens keep their length",
        "routers/cosine.py",
        "tokens = F.normalize(self.projection(x_RD), dim=1, eps=LEAST_NORM)",
        "tokens = self.projection(x_RD)",
        (TOKEN,),
    ),
    Mutation(
        "cosine: times the temperature", "routers/cosine.py", "* log_scale.exp()", "* (-log_scale).exp()", (TOKEN,)
    ),
    Mutation(
        "top-p: the last expert is left out",
        "routers/top_p.py",
        "before_RK = F.pad(score_RK.cumsum(dim=1)[:, :-1], (1, 0))",
        "before_RK = score_RK.cumsum(dim=1)",
        (TOKEN,),
    ),
    Mutation(
        "device limited: a device counts its two best experts",
        "routers/device_limited.py",
        "self.config.top_groups, best=1)",
        "self.config.top_groups, best=2)",
        (TOKEN,),
    ),
    Mutation(
        "device limited: weights among the chosen alone",
        "routers/device_limited.py",
        "scores_RE.gather(1, expert_RK) * self",
        "logits_RE.gather(1, expert_RK).softmax(dim=1) * self",
        (TOKEN,),
    ),
    Mutation(
        "hierarchical: inner terms are not weighed",
        "routers/hierarchical.py",
        "value=share * term.value",
        "value=term.value",
        (OTHERS,),
    ),
    Mutation(
        "hierarchical: the group's weight is forgotten",
        "routers/hierarchical.py",
        "weight_N=(groups.weight_N[via_N] * inner_N)[order_N]",
        "weight_N=inner_N[order_N]",
        (OTHERS,),
    ),
    Mutation(
        "locmoe+: rows dropped at a full expert count as kept",
        "routers/locmoe_plus.py",
        "stats.assigned_E - stats.dropped_capacity_E - stats.dropped_policy_E",
        "stats.assigned_E - stats.dropped_policy_E",
        (LOCMOE,),
    ),
    Mutation(
        "importance: the standard deviation alone",
        "losses/cv_squared.py",
        "(load_E - mean).square().mean()",
        "(load_E - mean).square().mean().sqrt()",
        (LOSSES,),
    ),
    Mutation(
        "importance: scores where weights are asked for",
        "losses/importance.py",
        'if self.of == "scores":',
        "if True:",
        (LOSSES,),
    ),
    Mutation(
        "entropy: a sum over tokens",
        "losses/entropy.py",
        "(scores_RE * log_RE).sum() / max(scores_RE.shape[0], 1)",
        "(scores_RE * log_RE).sum()",
        (LOSSES,),
    ),
    Mutation("entropy: the wrong sign", "losses/entropy.py", "return -(scores_RE", "return (scores_RE", (LOSSES,)),
    Mutation(
        "device balance: the devices' scores are not summed",
        "losses/device_balance.py",
        "sum_by_device(routing.scores_RE, self.groups)",
        "sum_by_device(routing.scores_RE, self.groups) / self.groups",
        (LOSSES,),
    ),
    Mutation(
        "device balance: groups and size swapped",
        "losses/device_balance.py",
        "unflatten(-1, (groups, device_size(value_E.shape[-1], groups))).sum(dim=-1)",
        "unflatten(-1, (device_size(value_E.shape[-1], groups), groups)).sum(dim=-1)",
        (LOSSES,),
    ),
    Mutation(
        "device balance: experts are dealt to devices in turn",
        "losses/device_balance.py",
        "unflatten(-1, (groups, device_size(value_E.shape[-1], groups))).sum(dim=-1)",
        "unflatten(-1, (device_size(value_E.shape[-1], groups), groups)).sum(dim=-2)",
        (LOSSES,),
    ),
    Mutation(
        "device balance: summed over the devices",
        "losses/device_balance.py",
        "device_size(value_E.shape[-1], groups))).sum(dim=-1)",
        "device_size(value_E.shape[-1], groups))).sum(dim=-2)",
        (LOSSES,),
    ),
    Mutation(
        "communication balance: the devices of a token are not divided by",
        "losses/communication_balance.py",
        "self.groups / (self.top_groups * num_routed) * sent",
        "self.groups / num_routed * sent",
        (LOSSES,),
    ),
    Mutation(
        "communication balance: a token is sent for each expert",
        "losses/communication_balance.py",
        "torch.ones_like(device_N, dtype=torch.bool)).sum(dim=0)",
        "torch.ones_like(device_N, dtype=torch.bool)).sum(dim=0) * 0 + torch.bincount(device_N, minlength=groups)",
        (LOSSES,),
    ),
    Mutation(
        "ranks: replicas keep their own gradients",
        "parallel/gradients.py",
        "_average(experts, groups.replicas, divisor)",
        "_average(experts, None, divisor)",
        (RANKS,),
    ),
    Mutation(
        "ranks: the norm is that of one slice",
        "train/guards.py",
        "math.sqrt(over_ranks(math.fsum(squares)))",
        "math.sqrt(math.fsum(squares))",
        (RANKS,),
    ),
    Mutation(
        "ranks: a slice of gate and up is one of both side by side",
        "experts/weights.py",
        "halves=2 if self.activation.gated",
        "halves=1 if self.activation.gated",
        (RANKS,),
    ),
    Mutation(
        "ranks: slices add up what belongs to another's rows",
        "comm/slices.py",
        "send_rows(weighted_sum(y_ND, None, self._by_expert), self",
        "send_rows(y_ND, self",
        (RANKS,),
    ),
    Mutation(
        "ranks: sharded experts have a divisor of their own",
        "parallel/gradients.py",
        "own.div_(parallel.alike // averaged)",
        "own.div_(1)",
        (RANKS,),
    ),
    Mutation(
        "ranks: merged rows lose which row is whose",
        "comm/transport.py",
        "row_J=row_M - first_U[unit_M]",
        "row_J=(row_M - first_U[unit_M]) * 0",
        (RANKS,),
    ),
    Mutation(
        "ranks: no gradient to weights that travel",
        "comm/wire.py",
        "return None, grad_rows, grad_weight, None",
        "return None, grad_rows, grad_weight * 0, None",
        (RANKS,),
    ),
    Mutation(
        "ranks: the ledger forgets empty messages",
        "comm/wire.py",
        "if peer != route.rank}",
        "if peer != route.rank and sent}",
        (RANKS,),
    ),
    Mutation(
        "ranks: each takes its own capacity",
        "comm/sizes.py",
        "op=dist.ReduceOp.MAX, group=group.whole)",
        "op=dist.ReduceOp.MIN, group=group.whole)",
        (RANKS,),
    ),
    Mutation(
        "ranks: evaluation shares out no text",
        "train/evaluate.py",
        "(several[place] if place < len(several)",
        "(several[0] if place < len(several)",
        ("tests/paths/test_evaluate.py",),
    ),
    Mutation(
        "moves: an expert's moments stay",
        "parallel/kept.py",
        "                self.state[name] = new",
        "                self.state[name] = new * 0",
        (MOVES,),
    ),
    Mutation(
        "copies: their home keeps the sum of gradients",
        "parallel/copies.py",
        "        grad.index_copy_(0, _index(errand.away, grad), arrived)\n",
        "",
        (COPIES,),
    ),
    Mutation(
        "copies: their home leaves its own gradient out",
        "parallel/copies.py",
        "            total.index_add_(0, _index(rows, grad), part)\n",
        "            total.index_add_(0, _index(rows, grad), part if rank != self.rank else part * 0)\n",
        (RANKS,),
    ),
    Mutation(
        "copies: each counts in the norm",
        "parallel/layout.py",
        "tuple(self.alike // parts[weight] * number for number in holders)",
        "tuple(self.alike // parts[weight] for number in holders)",
        (RANKS,),
    ),
    Mutation(
        "copies: one that is full still takes rows",
        "balance/dealing.py",
        "            room[to] -= 1\n",
        "",
        (COPIES_PLAN,),
    ),
    Mutation(
        "copies: every rank begins with the same one",
        "balance/dealing.py",
        "round_ % len(those) if turned else 0",
        "0",
        (COPIES_PLAN, BALANCE),
    ),
    Mutation(
        "copies: gradients that they exchange are free",
        "balance/cost.py",
        "copies_s = experts_s(twins(where), prices.gradient_bytes)",
        "copies_s = 0.0",
        (COPIES_PLAN,),
    ),
    Mutation(
        "copies: a fused step rounds otherwise where they lie",
        "train/optimizer.py",
        "fused=not (has_copies and any(p[0].numel() % _WIDEST for p in model.parameters() if id(p) in experts))",
        "fused=True",
        ("tests/paths/test_optimizer.py",),
    ),
    Mutation(
        "moves: rows are put in the order they came",
        "parallel/moves.py",
        "[there.index(expert) for expert in self.after]",
        "range(len(self.after))",
        (MOVES,),
    ),
    Mutation(
        "moves: losses are not told",
        "parallel/moves.py",
        "        layer.stand(site_in(group, after))\n",
        "",
        (MOVES,),
    ),
    Mutation(
        "moves: what was counted before a stop is lost",
        "parallel/rebalancer.py",
        '        self._steps = state["steps"]\n',
        "        self._steps = 0\n",
        (MOVES,),
    ),
    Mutation(
        "moves: a part of the price",
        "balance/moving.py",
        "found[old * slices + at, new * slices + at] += size",
        "found[old * slices + at, new * slices + at] = size",
        (BALANCE,),
    ),
    Mutation(
        "balance: rows that leave are not those that come",
        "balance/search.py",
        "found[each, FAR_IN, rank_E] = loads - own",
        "found[each, FAR_IN, rank_E] = own",
        (BALANCE,),
    ),
    Mutation(
        "balance: a full rank takes one more",
        "balance/search.py",
        "(held_R < self._room) & (np",
        "(held_R <= self._room) & (np",
        (BALANCE,),
    ),
    Mutation(
        "balance: EPLB takes the lightest first",
        "balance/eplb.py",
        "(-loads[item], item)",
        "(loads[item], item)",
        (BALANCE,),
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutations whose name contains this")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if arguments.only in mutation.name]
    # a test that fails anyway would catch whatever is broken
    unbroken = _tests(tuple(sorted({name for mutation in chosen for name in mutation.tests})), ROOT / "src")
    if unbroken.returncode != 0:
        print(f"these tests fail where nothing is broken:\n{unbroken.stdout[-2000:]}")
        return 1
    with ThreadPoolExecutor(arguments.jobs) as pool:
        caught = list(pool.map(_is_caught, chosen))
    share = sum(caught) / max(len(caught), 1)
    print(f"{sum(caught)} of {len(caught)} caught: {share:.0%}")
    return 0 if share >= LEAST_CAUGHT else 1


def _is_caught(mutation: Mutation) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source)
        path = source / "turnout" / mutation.file
        text = path.read_text()
        if text.count(mutation.old) < 1:
            print(f"STALE   {mutation.name}: {mutation.file} has no {mutation.old!r}")
            return False
        path.write_text(text.replace(mutation.old, mutation.new, 1))
        # 1: a test failed; anything else (a mutant that cannot be imported, say) proves nothing
        is_caught = _tests(mutation.tests, source).returncode == 1
    print(f"{'caught ' if is_caught else 'MISSED '} {mutation.name}", flush=True)
    return is_caught


def _tests(files: tuple[str, ...], source: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return subprocess.run(
        [*command, *files],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    sys.exit(main())
