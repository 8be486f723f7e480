"""A case computed by turnout.reference and the formulas of the papers: what the layer must equal.

Where none of them defines a row (a new router, policy, loss or expert kind, a user's modules), the row itself is asked,
on the oracle's own leaves; everything around it is still judged.
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from tests.contracts.cases import MODULES, Case, Inputs, Result, main_loss, own_selection
from tests.contracts.paper_rows import FORMULAS, Ask, by_paper, own_of
from tests.contracts.paper_rules import kept_by, loss_of_paper
from turnout import MoE, reference
from turnout.contracts import Loss
from turnout.dispatch import AffinityThreshold, Dropless, FixedCapacity, TutelCapacity
from turnout.experts.activations import Activation
from turnout.losses import (
    CommunicationBalance,
    DeviceBalance,
    Entropy,
    Importance,
    LoadBalance,
    LoadCV,
    Locality,
    RouterZ,
)
from turnout.routers import DeepSeekV3, GShardTop2, Hash, Switch, TopK
from turnout.tensors import Admission, Assignment, RouterOutput

KNOWN_ROUTERS = (TopK, Switch, GShardTop2, DeepSeekV3, Hash, *FORMULAS)
KNOWN_POLICIES = (Dropless, FixedCapacity, TutelCapacity, AffinityThreshold)
KNOWN_LOSSES = (
    LoadBalance,
    RouterZ,
    Entropy,
    Importance,
    DeviceBalance,
    CommunicationBalance,
    LoadCV,
    Locality,
)
SAME = 1e-9  # scores that differ by less are equal but for rounding
KNOWN_KINDS = ("relu", "gelu", "swiglu", "swiglu_clamped")
Leaves = Mapping[str, Tensor]


def run_dense(case: Case, inputs: Inputs, layer: MoE, *, selection: Assignment | None = None) -> Result:
    """The case in float64 by the oracle, forward and backward.

    `selection` is the layer's own choice of experts, for dtypes in which near-ties fall either way.
    """
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.parameters.items()}
    x = inputs.x.clone().requires_grad_()
    x_TD = x.reshape(-1, case.dim)
    routing = route(case, inputs, x_TD, leaves, layer, selection)
    keep_N = kept(case, inputs, layer, routing)
    assignment, token_R = routing.assignment, routing.token_R
    gate_TE = torch.zeros(len(x_TD), case.num_experts, dtype=torch.float64).index_put(
        (assignment.token_N, assignment.expert_N), assignment.weight_N.double() * keep_N, accumulate=True
    )
    y_RD = reference.moe(x_TD[token_R], gate_TE[token_R], experts(case, leaves, layer), _shared(case, leaves))
    y = torch.zeros_like(x_TD).index_put((token_R,), y_RD).view_as(x)
    values = [_loss(loss, case, routing, keep_N) for loss in case.losses]
    total = main_loss(y, inputs.y_grad)
    for loss, value in zip(case.losses, values, strict=True):
        total = total + loss.coefficient * value  # type: ignore[attr-defined]
    for term in routing.losses:
        total = total + term.coefficient * term.value
    names = ["x", *leaves]
    gates = [gate_TE] if gate_TE.requires_grad else []
    # a leaf without a path to the loss has gradient zero
    grads = torch.autograd.grad(total, [x, *leaves.values(), *gates], allow_unused=True, materialize_grads=True)
    return Result(
        y=y.detach(),
        losses={term.name: term.value.detach() for term in routing.losses}
        | {Loss.TABLE.name_of(type(lo)): v.detach() for lo, v in zip(case.losses, values, strict=True)},
        grads=dict(zip(names, grads[: len(names)], strict=True)),
        kept_E=torch.bincount(assignment.expert_N[keep_N], minlength=case.num_experts),
        gate_grad=max((float(grad.abs().max()) for grad in grads[len(names) :] if grad.numel()), default=0.0),
    )


def route(
    case: Case, inputs: Inputs, x_TD: Tensor, leaves: Leaves, layer: MoE, selection: Assignment | None = None
) -> RouterOutput:
    """Routing of the real tokens, from the papers where this file knows the router."""
    generator = torch.Generator().manual_seed(case.seed)
    if not isinstance(case.router, KNOWN_ROUTERS):
        # in the layer's dtype: in another one, near-ties would fall the other way
        router, dtype = deepcopy(layer.router), next(layer.parameters()).dtype
        own = {n.removeprefix("router."): v.to(dtype) for n, v in leaves.items() if n.startswith("router.")}
        flat = [None if v is None else v.reshape(-1) for v in (inputs.token_ids, inputs.mask)]
        return functional_call(router, own, (x_TD.to(dtype), *flat, generator))
    token_R = torch.arange(len(x_TD)) if inputs.mask is None else inputs.mask.reshape(-1).nonzero().squeeze(1)
    if type(case.router) in FORMULAS:
        theirs = own_selection(layer, inputs, case.seed) if selection is None else selection
        ask = Ask(
            config=case.router,
            x_RD=x_TD[token_R],
            leaves=leaves,
            buffers=dict(layer.router.named_buffers()),
            num_experts=case.num_experts,
            training=case.training,
            # in float32 whatever the dtype of the layer
            normal=lambda shape: torch.randn(shape, generator=generator, dtype=torch.float32).double(),
            own=own_of(theirs, token_R, SAME if selection is None else math.inf),
        )
        return by_paper(ask, token_R, len(x_TD))
    if isinstance(case.router, Hash):
        return _by_id(case.router, inputs.token_ids.reshape(-1), token_R, layer)
    uniform = _draws(generator, next(layer.parameters()).dtype)
    logits_RE = _logits(case, x_TD[token_R], leaves, uniform)
    expert_RK = _selected(case, logits_RE, layer, generator) if selection is None else selection.as_topk()[0]
    gate_RE = reference.topk_gates(logits_RE, expert_RK, **_gate_settings(case))
    weight_RK = gate_RE.gather(1, expert_RK)
    declined_N = None if selection is None else selection.declined_N
    if declined_N is None and _declines(case):
        sent_R = _sends_second(case.router, weight_RK[:, 1], uniform)
        declined_N = torch.stack([torch.zeros_like(sent_R), ~sent_R], dim=1).flatten()
    return RouterOutput(
        logits_RE=logits_RE,
        scores_RE=_scores(case, logits_RE),
        token_R=token_R,
        assignment=_assignment(gate_RE, expert_RK, token_R, num_tokens=len(x_TD), declined_N=declined_N),
    )


def kept(case: Case, inputs: Inputs, layer: MoE, routing: RouterOutput) -> Tensor:
    """Which assignments are sent: (N,) bool.

    By score, at random or by affinity it hangs on the last bits of weights, or on chance: the formula is then given the
    layer's own weights, which the outputs judge.
    """
    given, policy = routing.assignment, case.capacity
    generator = torch.Generator().manual_seed(case.seed)
    own = own_selection(layer, inputs, case.seed, generator)
    if not isinstance(policy, KNOWN_POLICIES):
        keep_N = policy.admit(own, training=case.training, generator=generator).keep_N
        keep = [True] * len(own.token_N) if keep_N is None else keep_N.tolist()
    else:
        by_place = isinstance(policy, Dropless) or getattr(policy, "priority", "") == "position"
        own = given if by_place else own
        keep = kept_by(policy, own, training=case.training, generator=generator)
    sent = dict(zip(zip(own.token_N.tolist(), own.expert_N.tolist(), strict=True), keep, strict=True))
    pairs = zip(given.token_N.tolist(), given.expert_N.tolist(), strict=True)
    return torch.tensor([sent.get(pair, False) for pair in pairs], dtype=torch.bool)


def experts(case: Case, leaves: Leaves, layer: MoE) -> list[Callable[[Tensor], Tensor]]:
    """Each expert as a function of rows, on the oracle's own leaves."""
    if case.expert == MODULES:
        return [_module(e, leaves, layer) for e in range(case.num_experts)]
    names = ("up_EDG", "down_EFD", "up_bias_EG", "down_bias_ED")
    columns = [leaves[f"experts.{n}"].unbind() if f"experts.{n}" in leaves else [0.0] * case.num_experts for n in names]
    return [_ffn(case.expert, *weights) for weights in zip(*columns, strict=True)]


def ffn(x_TD: Tensor, up_DG: Tensor, down_FD: Tensor, kind: str, up_bias: Any, down_bias: Any) -> Tensor:
    """An expert by the oracle; of a kind it does not know only the activation is the table's own."""
    if kind in KNOWN_KINDS:
        return reference.ffn(x_TD, up_DG, down_FD, kind=kind, up_bias_G=up_bias, down_bias_D=down_bias)
    return Activation.TABLE[kind](x_TD @ up_DG + up_bias) @ down_FD + down_bias


def _module(e: int, leaves: Leaves, layer: MoE) -> Callable[[Tensor], Tensor]:
    module, prefix = layer.experts.get_submodule(str(e)), f"experts.{e}."
    own = {name.removeprefix(prefix): value for name, value in leaves.items() if name.startswith(prefix)}
    return lambda x_TD: functional_call(module, own, (x_TD,))


def _ffn(kind: str, up_DG: Tensor, down_FD: Tensor, up_bias: Any, down_bias: Any) -> Callable[[Tensor], Tensor]:
    return lambda x_TD: ffn(x_TD, up_DG, down_FD, kind, up_bias, down_bias)


def _shared(case: Case, leaves: Leaves) -> Callable[[Tensor], Tensor] | None:
    if not case.shared_hidden:
        return None
    kind = "swiglu" if case.expert == MODULES else case.expert
    biases = (leaves.get("shared.up_bias_G", 0.0), leaves.get("shared.down_bias_D", 0.0))
    return lambda x_TD: ffn(x_TD, leaves["shared.up_GD"].T, leaves["shared.down_DF"].T, kind, *biases)


def _assignment(
    gate_RE: Tensor, expert_RK: Tensor, token_R: Tensor, *, num_tokens: int, declined_N: Tensor | None = None
) -> Assignment:
    num_choices = expert_RK.shape[1]
    return Assignment(
        token_N=token_R.repeat_interleave(num_choices),
        expert_N=expert_RK.flatten(),
        weight_N=gate_RE.gather(1, expert_RK).flatten(),
        choice_N=torch.arange(num_choices).repeat(len(token_R)),
        num_tokens=num_tokens,
        num_experts=gate_RE.shape[1],
        declined_N=declined_N,
        top_k=num_choices,
    )


def _by_id(router: Hash, id_T: Tensor, token_R: Tensor, layer: MoE) -> RouterOutput:
    """Of the layer only the four numbers it drew; a table, too, holds what the functions say until a text comes."""
    functions = [(a, b) for a, b in layer.router.get_buffer("coefficients").tolist()]
    num_experts = layer.config.num_experts
    expert_RK = reference.hash_experts(id_T[token_R].tolist(), functions, num_experts, router.k)
    score_RE = reference.even_gates(expert_RK, num_experts)
    gate_RE = reference.even_gates(expert_RK, num_experts, scale=router.scale)
    return RouterOutput(
        logits_RE=score_RE.log(),
        scores_RE=score_RE,
        token_R=token_R,
        assignment=_assignment(gate_RE, expert_RK, token_R, num_tokens=len(id_T)),
    )


def _draws(generator: torch.Generator, dtype: torch.dtype) -> Callable[[tuple[int, ...]], Tensor]:
    """Uniform draws as the layer makes them: in its dtype, from its generator."""
    return lambda shape: torch.rand(shape, generator=generator, dtype=dtype).double()


def _logits(case: Case, x_RD: Tensor, leaves: Leaves, uniform: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    if isinstance(case.router, Switch) and case.training and case.router.jitter:
        jitter = case.router.jitter
        x_RD = x_RD * (1 - jitter + 2 * jitter * uniform(tuple(x_RD.shape)))
    return x_RD @ leaves["router.score.weight_ED"].T + leaves.get("router.score.bias_E", 0.0)


def _selected(case: Case, logits_RE: Tensor, layer: MoE, generator: torch.Generator) -> Tensor:
    score_RE = logits_RE.detach()
    if isinstance(case.router, DeepSeekV3):
        biased_RE = 1 / (1 + torch.exp(-score_RE)) + layer.router.get_buffer("bias_E").double()
        score_RE = reference.within_groups(biased_RE, case.router.groups, case.router.top_groups)
    if isinstance(case.router, GShardTop2) and case.router.second_expert == "sampled" and case.training:
        return _best_and_first_to_arrive(score_RE, generator)
    return reference.best_experts(score_RE, case.router.choices)


def _best_and_first_to_arrive(score_RE: Tensor, generator: torch.Generator) -> Tensor:
    """Second comes who arrives first of the others, at exponential times over their probabilities."""
    # drawn in float32 whatever the dtype of the layer
    time_RE = -torch.log1p(-torch.rand(score_RE.shape, generator=generator, dtype=torch.float32).double())
    best_R1 = reference.best_experts(score_RE, 1)
    late_RE = (-time_RE / reference.softmax(score_RE)).scatter(1, best_R1, -torch.inf)
    return torch.cat([best_R1, reference.best_experts(late_RE, 1)], dim=1)


def _gate_settings(case: Case) -> dict[str, Any]:
    if isinstance(case.router, TopK):
        router = case.router
        return {"activation": router.activation, "renormalize": router.renormalize, "scale": router.scale}
    if isinstance(case.router, DeepSeekV3):
        return {"activation": "sigmoid", "renormalize": True, "scale": case.router.scale}
    return {"renormalize": isinstance(case.router, GShardTop2)}


def _declines(case: Case) -> bool:
    policy = case.router.second_expert if isinstance(case.router, GShardTop2) else "all"
    return policy in ("none", "threshold") or (policy == "random" and case.training)


def _sends_second(router: Any, weight_R: Tensor, uniform: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    if router.second_expert == "none":
        return torch.zeros_like(weight_R, dtype=torch.bool)
    if router.second_expert == "threshold":
        return weight_R > router.threshold
    return 2 * weight_R > uniform(tuple(weight_R.shape))


def _scores(case: Case, logits_RE: Tensor) -> Tensor:
    if getattr(case.router, "activation", "") == "sigmoid" or isinstance(case.router, DeepSeekV3):
        affinity_RE = 1 / (1 + torch.exp(-logits_RE))
        return affinity_RE / affinity_RE.sum(dim=1, keepdim=True)
    return reference.softmax(logits_RE)


def _loss(loss: Loss, case: Case, routing: RouterOutput, keep_N: Tensor) -> Tensor:
    length = case.shape[-1] if len(case.shape) > 1 else max(case.num_tokens, 1)
    if isinstance(loss, KNOWN_LOSSES):
        return loss_of_paper(loss, routing, length)
    admission = Admission(keep_N=keep_N, capacity=None, dropped_E={})
    return loss.term(routing, admission, sequence_length=length).value
