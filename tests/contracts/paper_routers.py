"""Routers as their papers write them, in plain loops over tokens and experts; nothing of the code they judge.

Float64 throughout. A formula says which experts each token has, best first, and differentiable gates of all of them.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from tests.contracts.paper_choices import Choices, Own, Paper, by_score, settled
from turnout.reference import best_experts, softmax


def device_limited(
    x_RD: Tensor, weight_ED: Tensor, *, k: int, groups: int, top_groups: int, scale: float, own: Own
) -> Paper:
    """The k best experts on the devices that hold the best ones. DeepSeek-AI 2024, arXiv:2405.04434, section 2.2."""
    logits_RE = x_RD @ weight_ED.T
    num_experts = len(weight_ED)
    size, limited_RE = num_experts // groups, logits_RE.detach().clone()
    for t, row in enumerate(logits_RE.tolist()):
        best = [max(row[g * size : (g + 1) * size]) for g in range(groups)]
        reached = sorted(range(groups), key=lambda g: (-best[g], g))[:top_groups]
        for e in range(num_experts):
            if e // size not in reached:
                limited_RE[t, e] = -math.inf
    scores_RE = softmax(logits_RE)
    choices = settled(best_experts(limited_RE, k).tolist(), own, limited_RE)
    return Paper(logits_RE=logits_RE, scores_RE=scores_RE, choices=choices, gate_RE=scale * scores_RE)


def cosine(
    projected_RP: Tensor,
    direction_EP: Tensor,
    log_scale: Tensor,
    *,
    k: int,
    renormalize: bool,
    own: Own,
) -> Paper:
    """Cosines over a temperature of at least 0.01. Hwang et al. 2022, arXiv:2206.03382; Chi et al. 2022."""
    length_R1, length_E1 = (length(rows) for rows in (projected_RP, direction_EP))
    temperature = torch.exp(-log_scale)
    temperature = torch.where(temperature < 0.01, 0.01, temperature)
    logits_RE = (projected_RP @ direction_EP.T) / (length_R1 * length_E1.T) / temperature
    scores_RE = softmax(logits_RE)
    choices = settled(best_experts(logits_RE, k).tolist(), own, logits_RE)
    gate_RE = among_chosen(scores_RE, choices) if renormalize else scores_RE
    return Paper(logits_RE=logits_RE, scores_RE=scores_RE, choices=choices, gate_RE=gate_RE)


def top_p(x_RD: Tensor, weight_ED: Tensor, *, p: float, most: int, own: Own) -> Paper:
    """The fewest experts whose probabilities sum to p. Huang et al. 2024, arXiv:2403.07652, section 2.2."""
    logits_RE = x_RD @ weight_ED.T
    scores_RE, num_experts = softmax(logits_RE), len(weight_ED)
    most = most or num_experts
    # a sum that is p but for rounding is p
    enough = p * (1 - most * 2.0**-52)
    choices: Choices = []
    for row, order in zip(scores_RE.tolist(), best_experts(logits_RE, most).tolist(), strict=True):
        taken, total = [], 0.0
        for e in order:
            if total >= enough:
                break
            taken.append(e)
            total += row[e]
        choices.append(taken)
    choices = settled(choices, own, logits_RE)
    return Paper(logits_RE=logits_RE, scores_RE=scores_RE, choices=choices, gate_RE=scores_RE, even=False)


def expert_choice(x_RD: Tensor, weight_ED: Tensor, *, k: int, own: Own) -> Paper:
    """Each expert's ceil(k R / E) tokens of highest probability. Zhou et al. 2022, arXiv:2202.09368, section 3.2."""
    logits_RE = x_RD @ weight_ED.T
    scores_RE = softmax(logits_RE)
    num_tokens, num_experts = logits_RE.shape
    each = math.ceil(k * num_tokens / num_experts)
    log_RE = log_softmax(logits_RE)
    takes = [sorted(range(num_tokens), key=lambda t: (-column[t], t))[:each] for column in log_RE.T.tolist()]
    theirs = [[t for t in range(num_tokens) if e in own.choices[t]] for e in range(num_experts)]
    takes = settled(takes, replace(own, choices=by_score(theirs, log_RE.T)), log_RE.T)
    chosen = [[e for e in range(num_experts) if t in takes[e]] for t in range(num_tokens)]
    choices = settled(by_score(chosen, scores_RE), own, scores_RE)
    return Paper(logits_RE=logits_RE, scores_RE=scores_RE, choices=choices, gate_RE=scores_RE, even=False)


def remoe(x_RD: Tensor, weight_ED: Tensor, *, k: int, balanced: bool, strength: float, own: Own) -> Paper:
    """ReLU gates and their L1, an expert's weighed by its load. Wang et al. 2024, arXiv:2412.14711, eq. 4-9.

    The shares, ours, are of gates to which a thousandth is added over all experts.
    """
    logits_RE = x_RD @ weight_ED.T
    num_tokens, num_experts = logits_RE.shape
    gate_RE = logits_RE * (logits_RE > 0)
    chosen = [[e for e, value in enumerate(row) if value > 0] for row in logits_RE.tolist()]
    choices = settled(by_score(chosen, gate_RE), own, gate_RE)
    loss = logits_RE.sum() * 0
    for e in range(num_experts):
        load = num_experts / (k * max(num_tokens, 1)) * sum(e in experts for experts in choices)
        loss = loss + (load if balanced else 1.0) * gate_RE[:, e].sum() / max(num_tokens, 1)
    return Paper(
        logits_RE=logits_RE,
        scores_RE=(gate_RE + 0.001 / num_experts) / (gate_RE.sum(dim=1, keepdim=True) + 0.001),
        choices=choices,
        gate_RE=gate_RE,
        even=False,
        loss=strength * loss,
    )


def sinkhorn(
    x_RD: Tensor,
    weight_ED: Tensor,
    *,
    k: int,
    tolerance: float,
    max_rounds: int,
    training: bool,
    own: Own,
) -> Paper:
    """Rows and columns of exp(logits) scaled in turn: d0 = 1 / (R K d1), d1 = 1 / (E K' d0). Clark et al. 2022."""
    logits_RE = x_RD @ weight_ED.T
    num_tokens, num_experts = logits_RE.shape
    plan_RE = logits_RE.detach()
    if training and num_tokens:
        # what a row's logits have in common its factor takes up
        kernel_RE = torch.exp(plan_RE - plan_RE.amax(dim=1, keepdim=True))
        d1_E = torch.ones(num_experts, dtype=torch.float64)
        for _ in range(max_rounds):
            d0_R, before_E = 1 / (num_tokens * (kernel_RE @ d1_E)), d1_E
            d1_E = 1 / (num_experts * (kernel_RE.T @ d0_R))
            if (d1_E / before_E).log().abs().mean() <= tolerance:
                break
        plan_RE = d0_R[:, None] * kernel_RE * d1_E
        # in the logarithm no entry underflows into a tie
        plan_RE = plan_RE.log()
    choices = settled(best_experts(plan_RE, k).tolist(), own, plan_RE)
    if k > 1:
        scores_RE = gate_RE = softmax(logits_RE)
    else:
        gate_RE, scores_RE = sigmoid(logits_RE), sigmoid_shares(logits_RE)
    return Paper(logits_RE=logits_RE, scores_RE=scores_RE, choices=choices, gate_RE=gate_RE)


def quantile(
    x_RD: Tensor,
    weight_ED: Tensor,
    price_E: Tensor,
    *,
    k: int,
    rounds: int,
    training: bool,
    activation: str,
    scale: float,
    own: Own,
) -> Paper:
    """The k best of score less price; prices by coordinate descent of the dual (specs: Megatron's quantile update)."""
    logits_RE = x_RD @ weight_ED.T
    num_tokens, num_experts = logits_RE.shape
    price = [float(p) for p in price_E]
    fair = k * num_tokens // num_experts
    if training and (fair == 0 or k == num_experts):
        price = [0.0] * num_experts
    elif training:
        rows = logits_RE.tolist()
        for _ in range(rounds):
            alpha = [sorted((row[e] - price[e] for e in range(num_experts)), reverse=True)[k] for row in rows]
            price = [
                sorted((row[e] - a for row, a in zip(rows, alpha, strict=True)), reverse=True)[fair]
                for e in range(num_experts)
            ]
    worth_RE = logits_RE.detach() - torch.tensor(price, dtype=torch.float64)
    choices = settled(best_experts(worth_RE, k).tolist(), own, worth_RE)
    if activation == "softmax":
        scores_RE = value_RE = softmax(logits_RE)
    else:
        value_RE, scores_RE = sigmoid(logits_RE), sigmoid_shares(logits_RE)
    return Paper(logits_RE=logits_RE, scores_RE=scores_RE, choices=choices, gate_RE=scale * value_RE)


def noisy_topk(x_RD: Tensor, weight_ED: Tensor, noise_ED: Tensor, draw_RE: Tensor | None, *, k: int, own: Own) -> Paper:
    """H = x W_g + draw * (softplus(x W_n) + 0.01), and P(x, i). Shazeer et al. 2017, arXiv:1701.06538, eq. 3-10.

    draw_RE: standard normal numbers; None: no noise, and the load is the count.
    """
    clean_RE = x_RD @ weight_ED.T
    spread_RE = torch.log1p(torch.exp(x_RD @ noise_ED.T)) + 0.01
    h_RE = clean_RE + (torch.zeros_like(clean_RE) if draw_RE is None else draw_RE) * spread_RE
    choices = settled(best_experts(h_RE, k).tolist(), own, h_RE)
    num_experts = len(weight_ED)
    load = [clean_RE.new_zeros(()) for _ in range(num_experts)]
    for t, chosen in enumerate(choices):
        order = [*chosen, *sorted(set(range(num_experts)) - set(chosen), key=lambda e: -float(h_RE[t, e].detach()))]
        for e in range(num_experts):
            if draw_RE is None or k == num_experts:
                load[e] = load[e] + float(e in chosen)
                continue
            kth_of_others = [other for other in order if other != e][k - 1]
            z = (clean_RE[t, e] - h_RE[t, kth_of_others]) / spread_RE[t, e]
            load[e] = load[e] + (1 + torch.erf(z / math.sqrt(2))) / 2
    scores_RE = softmax(h_RE)
    return Paper(
        logits_RE=h_RE,
        scores_RE=scores_RE,
        choices=choices,
        gate_RE=among_chosen(scores_RE, choices),
        smooth_load_E=torch.stack(load),
    )


def length(rows: Tensor) -> Tensor:
    """Of each row as a column, at least 1e-4, as in Tutel's code: a zero vector has no direction."""
    square = rows.square().sum(dim=1, keepdim=True)
    return torch.where(square < 1e-8, 1e-8, square).sqrt()


def among_chosen(scores_RE: Tensor, choices: Choices) -> Tensor:
    """The scores of a token's experts, over their sum."""
    mask_RE = torch.zeros_like(scores_RE)
    for t, experts in enumerate(choices):
        mask_RE[t, experts] = 1.0
    return scores_RE * mask_RE / (scores_RE * mask_RE).sum(dim=1, keepdim=True)


def sigmoid(logits_RE: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-logits_RE))


def sigmoid_shares(logits_RE: Tensor) -> Tensor:
    """Each sigmoid over the sum of its row's."""
    value_RE = sigmoid(logits_RE)
    return value_RE / value_RE.sum(dim=1, keepdim=True)


def log_softmax(logits_RE: Tensor) -> Tensor:
    """Without a gradient."""
    logits_RE = logits_RE.detach()
    top_R1 = logits_RE.amax(dim=1, keepdim=True) if len(logits_RE) else logits_RE[:, :1]
    return logits_RE - top_R1 - torch.exp(logits_RE - top_R1).sum(dim=1, keepdim=True).log()
