"""What a trained router does on validation text: how its experts differ, and what a placement would have to move."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.data.sampler import Batch
from turnout.models import Decoder
from turnout.tensors import Assignment


@dataclass(frozen=True, kw_only=True)
class RoutingFacts:
    """Means over the MoE layers of one model, but for what is of the worst."""

    experts_per_token: float  # choices sent
    specialisation: float  # share of an expert's identity that the token's id tells: I(id; expert) / H(expert); 0 to 1
    sent_bytes_per_token: float  # rows to other ranks and back, each once per rank, float32
    max_violation: float  # greatest load over the fair share, minus 1, over all of the text; 0 is even
    max_violation_worst: float  # of the worst layer


@torch.inference_mode()
def routing_facts(model: Decoder, batches: Iterable[Batch], *, num_ranks: int = 8) -> RoutingFacts | None:
    """Facts of the model as it is, in evaluation; None without experts.

    The placement is the plain one: expert e on rank e * num_ranks // E, tokens in equal runs over the ranks.
    """
    names = [name for name, _ in model.moe_blocks()]
    if not names:
        return None
    was_training = model.training
    model.eval()
    found = [_facts(model, batch, num_ranks) for batch in batches]
    model.train(was_training)
    tables = [sum(tables) for tables in zip(*(tables for tables, _, _ in found), strict=True)]
    rows, tokens = sum(r for _, r, _ in found), sum(batch_tokens for _, _, batch_tokens in found)
    loads = [torch.as_tensor(table).sum(dim=0) for table in tables]
    choices = sum(float(load_E.sum()) for load_E in loads)
    violations = [float(load_E.max() * len(load_E) / load_E.sum().clamp(min=1)) - 1 for load_E in loads]
    layers = len(names)
    return RoutingFacts(
        experts_per_token=choices / (tokens * layers),
        specialisation=sum(_told_by_id(torch.as_tensor(table)) for table in tables) / layers,
        # there and back, four bytes a number
        sent_bytes_per_token=2 * 4 * model.config.dim * rows / (tokens * layers),
        max_violation=sum(violations) / layers,
        max_violation_worst=max(violations),
    )


def _facts(model: Decoder, batch: Batch, num_ranks: int) -> tuple[list[Tensor], int, int]:
    """For each layer how often each id meets each expert (V, E); rows sent over all layers; tokens."""
    out = model(batch.tokens_BS)
    ids_T = batch.tokens_BS.reshape(-1)
    sent = list(zip(out.assignments, out.keeps, strict=True))
    tables = [_meetings(a, keep_N, ids_T, model.config.vocab_size) for a, keep_N in sent]
    return tables, sum(_rows_sent(a, keep_N, num_ranks) for a, keep_N in sent), len(ids_T)


def _meetings(assignment: Assignment, keep_N: Tensor | None, ids_T: Tensor, vocab_size: int) -> Tensor:
    size = assignment.num_experts
    token_N, expert_N = _sent(assignment, keep_N)
    return torch.bincount(ids_T[token_N] * size + expert_N, minlength=vocab_size * size).view(vocab_size, size).double()


def _sent(assignment: Assignment, keep_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token and expert of each assignment that was sent."""
    kept = slice(None) if keep_N is None else keep_N
    return assignment.token_N[kept], assignment.expert_N[kept]


def _rows_sent(assignment: Assignment, keep_N: Tensor | None, num_ranks: int) -> int:
    """Pairs (token, other rank): a token that two experts of one rank want is sent there once."""
    token_N, expert_N = _sent(assignment, keep_N)
    here_N = token_N * num_ranks // max(assignment.num_tokens, 1)
    there_N = expert_N * num_ranks // assignment.num_experts
    pairs_N = (token_N * num_ranks + there_N)[here_N != there_N]
    return len(pairs_N.unique())


def _told_by_id(table_VE: Tensor) -> float:
    """Mutual information of id and expert over the entropy of the expert; 0 for a single expert."""
    joint_VE = table_VE / table_VE.sum().clamp(min=1)
    expert_E, id_V = joint_VE.sum(dim=0), joint_VE.sum(dim=1)
    entropy = float(torch.special.entr(expert_E).sum())
    both = float(torch.special.entr(joint_VE).sum())
    told = entropy + float(torch.special.entr(id_V).sum()) - both
    return 0.0 if entropy < 1e-12 or math.isnan(told) else told / entropy
