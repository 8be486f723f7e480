"""Replay: tokens go where a recording says, while the weights may still be those of the live router."""

from dataclasses import fields, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.contracts import Router
from turnout.errors import ConfigError, ShapeError
from turnout.routers.deepseek_v3 import DeepSeekV3
from turnout.routers.gshard import GShardTop2
from turnout.routers.switch import Switch
from turnout.routers.topk import TopK
from turnout.tensors import Assignment, MoEStats, RouterInput, RouterOutput


class Replay(Router):
    """Routes one batch as recorded: `MoE(..., router=Replay(live, out.assignment))`; it has no row in the table.

    weights="live": the live router's weights at the recorded experts, with their gradient, as when a policy is
    trained on the experts its rollout used (R3); "recorded": the recording's own, without a gradient.
    Logits, scores and state are the live router's. Another batch needs another Replay, around the same live router.
    Source: Ma et al. 2025, arXiv:2510.11370, section 3 (rollout routing replay).
    """

    def __init__(self, live: Router, recording: Assignment, *, weights: Literal["live", "recorded"] = "live") -> None:
        """Raises: ConfigError if the two differ in experts, or nothing is known of how the live router weighs."""
        super().__init__(live.dim, live.num_experts)
        if recording.num_experts != live.num_experts:
            raise ConfigError(
                f"the recording has num_experts={recording.num_experts}; the live router has {live.num_experts}"
            )
        self.live = live
        self.recording = _moved(recording, recording.token_N.device, copy=True)
        self.convention = convention_of(live) if weights == "live" else None

    def route(self, tokens: RouterInput) -> RouterOutput:
        """Raises: ShapeError if the recording is of another number of tokens, or was made with another mask."""
        recording = _moved(self.recording, tokens.x_RD.device)
        row_N = _rows(recording, tokens)
        routing = self.live.route(tokens)
        if self.convention is None:
            weight_N = recording.weight_N.to(routing.scores_RE.dtype)
        else:
            weight_N = live_weights(routing.logits_RE, row_N, recording.expert_N, self.convention)
        return replace(routing, assignment=replace(recording, weight_N=weight_N))

    def before_training(self, token_counts_V: Tensor) -> None:
        self.live.before_training(token_counts_V)

    def after_step(self, stats: MoEStats) -> None:
        self.live.after_step(stats)


def recording_of(expert_TK: Tensor, weight_TK: Tensor | None = None, *, num_experts: int) -> Assignment:
    """A recording of plain tables, as inference engines give them; every token is a real one.

    Without weights it holds NaN, so that it serves live weights alone.
    Shapes: expert_TK (T, K), best first; weight_TK (T, K).
    Raises: ShapeError unless the experts are from 0 to E - 1, and those of a token differ.
    """
    num_tokens, top_k = expert_TK.shape
    expert_TK = expert_TK.long()
    if ((expert_TK < 0) | (expert_TK >= num_experts)).any() or (expert_TK.sort(dim=1).values.diff(dim=1) == 0).any():
        raise ShapeError(f"a recorded token needs {top_k} different experts from 0 to {num_experts - 1}")
    if weight_TK is None:
        weight_TK = torch.full(expert_TK.shape, torch.nan, device=expert_TK.device)
    return Assignment(
        token_N=torch.arange(num_tokens, device=expert_TK.device).repeat_interleave(top_k),
        expert_N=expert_TK.reshape(-1),
        weight_N=weight_TK.to(torch.promote_types(weight_TK.dtype, torch.float32)).reshape(-1),
        choice_N=torch.arange(top_k, device=expert_TK.device).repeat(num_tokens),
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=top_k,
    )


def convention_of(live: Router) -> TopK:
    """The settings of top-k under which a choice weighs what it does in this router.

    Raises: ConfigError if none do.
    """
    config = getattr(live, "config", None)
    match config:
        case TopK():
            return config
        case DeepSeekV3():
            return TopK(k=config.k, activation="sigmoid", scale=config.scale)
        case Switch():
            return TopK(k=1, renormalize=False)
        case GShardTop2():
            return TopK(k=2)
    raise ConfigError(
        f"nothing is known of the weights a {type(live).__name__} gives to recorded experts; live weights are for: "
        "topk, switch, gshard, deepseek_v3; set weights='recorded'"
    )


def live_weights(logits_RE: Tensor, row_N: Tensor, expert_N: Tensor, convention: TopK) -> Tensor:
    """Weights of the chosen (row, expert) pairs, which are renormalised over the pairs of their row.

    Shapes: logits_RE (R, E); row_N and expert_N (N,), no pair twice; returns (N,) with the gradient to the logits.
    """
    sigmoid = convention.activation == "sigmoid"
    if not convention.renormalize:
        shares_RE = logits_RE.sigmoid() if sigmoid else logits_RE.softmax(dim=1)
    else:
        chosen_RE = torch.zeros_like(logits_RE, dtype=torch.bool)
        chosen_RE[row_N, expert_N] = True
        # a row without a choice is not read, but all -inf would make its gradient NaN
        left_out_RE = ~chosen_RE & chosen_RE.any(dim=1, keepdim=True)
        log_RE = F.logsigmoid(logits_RE) if sigmoid else logits_RE
        shares_RE = log_RE.masked_fill(left_out_RE, -torch.inf).softmax(dim=1)
    return shares_RE[row_N, expert_N] * convention.scale


def _rows(recording: Assignment, tokens: RouterInput) -> Tensor:
    """Row of each recorded choice among the R tokens of this call: (N,)."""
    if recording.num_tokens != tokens.num_tokens:
        raise ShapeError(f"the recording has {recording.num_tokens} tokens; this call has {tokens.num_tokens}")
    num_routed = len(tokens.token_R)
    row_T = tokens.token_R.new_full((tokens.num_tokens,), -1)
    row_T[tokens.token_R] = torch.arange(num_routed, device=row_T.device)
    row_N = row_T[recording.token_N]
    recorded = num_routed if recording.top_k is None else len(row_N) // recording.top_k
    if recorded != num_routed or bool((row_N < 0).any()):
        raise ShapeError("the recording was made with another mask: it lacks tokens of this call, or has its padding")
    return row_N


def _moved(recording: Assignment, device: torch.device, *, copy: bool = False) -> Assignment:
    """On the device, without a graph; a copy also frees it of torch.inference_mode, under which rollouts run."""
    names = [f.name for f in fields(recording) if isinstance(getattr(recording, f.name), Tensor)]
    return replace(recording, **{name: getattr(recording, name).detach().to(device, copy=copy) for name in names})
