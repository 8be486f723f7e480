"""The dense oracle of a whole MoE layer: every expert on every token, gates as a dense (T, E) matrix.

Written from the papers, loops included, and shares no code with the layer it judges; slow on purpose. Nothing is
cast: float64 in, float64 out. Everything is differentiable but the choices themselves.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Expert = Callable[[Tensor], Tensor]


def moe(x_TD: Tensor, gate_TE: Tensor, experts: Sequence[Expert], shared: Expert | None = None) -> Tensor:
    """The layer: y_t = sum_e gate[t, e] * expert_e(x_t), plus the shared expert.

    Shapes: x_TD (T, D); gate_TE (T, E), zero where a token does not go; experts E maps of rows; returns (T, D).
    Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 1; shared expert: Dai et al. 2024, arXiv:2401.06066, section 3.2.
    """
    y_TD = torch.zeros_like(x_TD)
    for gate_T1, expert in zip(gate_TE.split(1, dim=1), experts, strict=True):
        y_TD = y_TD + gate_T1 * expert(x_TD)
    return y_TD if shared is None else y_TD + shared(x_TD)


def ffn(
    x_TD: Tensor,
    up_DG: Tensor,
    down_FD: Tensor,
    *,
    kind: str,
    up_bias_G: Tensor | float = 0.0,
    down_bias_D: Tensor | float = 0.0,
) -> Tensor:
    """One expert: activation(x up + bias) down + bias; `kind` is relu, gelu, swiglu or swiglu_clamped.

    Shapes: x_TD (T, D); up_DG (D, F), or (D, 2F) with gate then up for a gated kind; down_FD (F, D); returns (T, D).
    Source: swiglu: Shazeer 2020, arXiv:2002.05202, eq. 6; swiglu_clamped: GPT-OSS model card, arXiv:2508.10925.
    """
    up_TG = x_TD @ up_DG + up_bias_G
    if kind == "relu":
        h_TF = up_TG * (up_TG > 0)
    elif kind == "gelu":
        h_TF = up_TG * 0.5 * (1 + torch.erf(up_TG / math.sqrt(2)))
    else:
        gate_TF, value_TF = up_TG.tensor_split(2, dim=1)
        if kind == "swiglu":
            h_TF = gate_TF / (1 + torch.exp(-gate_TF)) * value_TF
        elif kind == "swiglu_clamped":
            gate_TF = torch.where(gate_TF > 7, 7.0, gate_TF)
            value_TF = torch.where(value_TF > 7, 7.0, torch.where(value_TF < -7, -7.0, value_TF))
            h_TF = gate_TF / (1 + torch.exp(-1.702 * gate_TF)) * (value_TF + 1)
        else:
            raise KeyError(f"the oracle has no expert kind {kind!r}")
    return h_TF @ down_FD + down_bias_D


def best_experts(score_TE: Tensor, k: int) -> Tensor:
    """The k experts of highest score, best first; of equal scores the lower index first.

    Shapes: score_TE (T, E); returns (T, k) int64.
    """
    order = [sorted(range(len(row)), key=lambda e: (-row[e], e))[:k] for row in score_TE.tolist()]
    return torch.tensor(order, dtype=torch.int64).reshape(len(order), k)


def within_groups(score_TE: Tensor, groups: int, top_groups: int) -> Tensor:
    """The scores, -inf outside each token's `top_groups` best groups of neighbouring experts.

    A group's worth is the sum of its two highest scores (of its one score where it has one).
    Shapes: score_TE (T, E); returns (T, E).
    Source: DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2.
    """
    size = score_TE.shape[1] // groups
    limited_TE = score_TE.clone()
    for t, row in enumerate(score_TE.tolist()):
        worth = [sum(sorted(row[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        reached = sorted(range(groups), key=[-w for w in worth].__getitem__)[:top_groups]
        for g in set(range(groups)) - set(reached):
            limited_TE[t, g * size : (g + 1) * size] = -math.inf
    return limited_TE


def topk_gates(
    logits_TE: Tensor,
    expert_TK: Tensor,
    *,
    activation: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """Gates of the chosen experts: their softmax or sigmoid scores, renormalised or not, times `scale`.

    Shapes: logits_TE (T, E); expert_TK (T, K) from `best_experts`; returns (T, E).
    Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5 (softmax, renormalised); Muennighoff et al. 2024,
        arXiv:2409.02060 (not renormalised); DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2 (sigmoid).
    """
    score_TE = softmax(logits_TE) if activation == "softmax" else 1 / (1 + torch.exp(-logits_TE))
    gate_TE = score_TE * torch.zeros_like(score_TE).scatter(1, expert_TK, 1.0)
    if renormalize:
        gate_TE = gate_TE / gate_TE.sum(dim=1, keepdim=True)
    return gate_TE * scale


def switch_gates(logits_TE: Tensor) -> Tensor:
    """Top-1 gates: the probability of the best expert, 0 elsewhere.

    Shapes: logits_TE (T, E); returns (T, E).
    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 1-2.
    """
    return topk_gates(logits_TE, best_experts(logits_TE, 1), renormalize=False)


@dataclass(frozen=True, kw_only=True)
class GShardGating:
    """What algorithm 1 computes for one group; columns of the (S, 2) tensors are the first and second choice."""

    gate_SE: Tensor
    expert_S2: Tensor
    position_S2: Tensor  # the counter of the chosen expert when the token came
    kept_S2: Tensor
    loss: Tensor  # l_aux as printed: 1 / E^2 when balanced


def gshard_gating(logits_SE: Tensor, draw_S: Tensor, capacity: int) -> GShardGating:
    """Group-level top-2 gating, loop by loop, with r_s given.

    Shapes: logits_SE (S, E), one group; draw_S (S,) uniform in [0, 1).
    Source: Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1.
    """
    num_tokens, num_experts = logits_SE.shape
    g_SE = softmax(logits_SE)
    expert_S2 = best_experts(logits_SE, 2)
    pair_S2 = g_SE.gather(1, expert_S2)
    g_S2 = pair_S2 / pair_S2.sum(dim=1, keepdim=True)
    position_S2, kept_S2 = torch.zeros_like(expert_S2), torch.zeros_like(expert_S2, dtype=torch.bool)
    c = [0] * num_experts
    for s in range(num_tokens):
        e1 = int(expert_S2[s, 0])
        position_S2[s, 0], kept_S2[s, 0] = c[e1], c[e1] < capacity
        c[e1] += 1
    first_E = torch.tensor(c, dtype=g_SE.dtype)
    mean_E = g_SE.sum(dim=0) / max(num_tokens, 1)
    loss = (first_E / max(num_tokens, 1) * mean_E).sum() / num_experts
    for s in range(num_tokens):
        e2, g2, r = int(expert_S2[s, 1]), float(g_S2[s, 1]), float(draw_S[s])
        position_S2[s, 1], kept_S2[s, 1] = c[e2], c[e2] < capacity and 2 * g2 > r
        c[e2] += 1
    gate_SE = torch.zeros_like(g_SE).scatter(1, expert_S2, g_S2 * kept_S2)
    return GShardGating(gate_SE=gate_SE, expert_S2=expert_S2, position_S2=position_S2, kept_S2=kept_S2, loss=loss)


def hash_experts(ids: Sequence[int], functions: Sequence[tuple[int, int]], num_experts: int, k: int) -> Tensor:
    """The k experts of each token id by double hashing: h1, h1 + s, h1 + 2 s, ... modulo E.

    h1(id) = ((a1 id + b1) mod p) mod E with p = 2^31 - 1; of the n strides from 1 to E that share no factor with E,
    s is number ((a2 id + b2) mod p) mod n, counting from 0, so the k experts differ.
    Shapes: `functions` holds (a1, b1) and (a2, b2); returns (T, k) int64.
    Source: Roller et al. 2021, arXiv:2106.04426, section 3.1 (random hash); Carter & Wegman 1979 (the functions);
        Knuth, The Art of Computer Programming 3, section 6.4, algorithm D (double hashing).
    """
    (a1, b1), (a2, b2) = functions
    p = 2**31 - 1
    strides = [s for s in range(1, num_experts + 1) if math.gcd(s, num_experts) == 1]
    expert_TK = torch.zeros(len(ids), k, dtype=torch.int64)
    for t, token_id in enumerate(ids):
        expert = (a1 * token_id + b1) % p % num_experts
        stride = strides[(a2 * token_id + b2) % p % len(strides)]
        for choice in range(k):
            expert_TK[t, choice] = (expert + choice * stride) % num_experts
    return expert_TK


def even_gates(expert_TK: Tensor, num_experts: int, *, scale: float = 1.0) -> Tensor:
    """Gates of experts that are not weighed against each other: scale / K for each of a token's K.

    Shapes: expert_TK (T, K); returns (T, E) float64.
    """
    gate_TE = torch.zeros(len(expert_TK), num_experts, dtype=torch.float64)
    for t, chosen in enumerate(expert_TK.tolist()):
        for expert in chosen:
            gate_TE[t, expert] = scale / len(chosen)
    return gate_TE


def places(expert_TK: Tensor, num_experts: int) -> Tensor:
    """Place of each choice in its expert's queue, from 0: first choices of all tokens, then second choices, ...

    With a capacity C, choices at a place below C are kept.
    Shapes: expert_TK (T, K); returns (T, K) int64.
    Source: Lepikhin et al. 2020, arXiv:2006.16668, section 2.2, for any K.
    """
    taken = [0] * num_experts
    place_TK = torch.zeros_like(expert_TK)
    for k in range(expert_TK.shape[1]):
        for t, expert in enumerate(expert_TK[:, k].tolist()):
            place_TK[t, k] = taken[expert]
            taken[expert] += 1
    return place_TK


def load_balance(score_TE: Tensor, expert_TK: Tensor) -> Tensor:
    """E * sum_e f_e P_e: f_e the share of choices that go to e, P_e the mean score of e; 1 when balanced.

    Shapes: score_TE (T, E), rows sum to 1; expert_TK (T, K), the choices that count as load; returns ().
    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 4-6 (without alpha), for any K.
    """
    num_tokens, num_experts = score_TE.shape
    choices = expert_TK.flatten().tolist()
    total = score_TE.new_zeros(())
    for e, score_T in enumerate(score_TE.unbind(dim=1)):
        f = choices.count(e) / max(len(choices), 1)
        total = total + f * score_T.sum() / max(num_tokens, 1)
    return num_experts * total


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of the squared log of the sum of exponentials.

    Shapes: logits_TE (T, E); returns ().
    Source: Zoph et al. 2022, arXiv:2202.08906, eq. 5.
    """
    return torch.exp(logits_TE).sum(dim=1).log().square().sum() / max(len(logits_TE), 1)


def softmax(logits_TE: Tensor) -> Tensor:
    """exp(l) / sum exp(l) over experts.

    Shapes: logits_TE (T, E); returns (T, E).
    """
    exp_TE = torch.exp(logits_TE - logits_TE.detach().amax(dim=1, keepdim=True))
    return exp_TE / exp_TE.sum(dim=1, keepdim=True)
