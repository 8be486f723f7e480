"""What a layer reports about one call."""

import torch

from turnout.tensors import Admission, MoEStats, RouterOutput


@torch.no_grad()
def collect_stats(routing: RouterOutput, admission: Admission) -> MoEStats:
    """Counts, drops, entropy and margin of one call; small tensors on the layer's device, no host copy."""
    scores_RE = routing.scores_RE
    best = scores_RE.topk(min(2, scores_RE.shape[1]), dim=1).values
    margin_R = best[:, 0] - best[:, -1] if scores_RE.shape[1] > 1 else best[:, 0]
    num_routed = len(routing.token_R)
    return MoEStats(
        assigned_E=routing.assignment.counts_E,
        dropped_capacity_E=admission.dropped_E["capacity"],
        dropped_policy_E=admission.dropped_E["policy"],
        num_routed=_count(num_routed, scores_RE.device),
        num_padding=_count(routing.assignment.num_tokens - num_routed, scores_RE.device),
        entropy_sum=torch.special.entr(scores_RE).sum(),
        margin_sum=margin_R.sum(),
    )


def _count(value: int, device: torch.device) -> torch.Tensor:
    # filled on the device: torch.tensor would copy from the host
    return torch.full((), value, dtype=torch.int64, device=device)
