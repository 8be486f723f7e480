"""Triton's kernels are trusted once they have computed, on this very device, what the dense oracle computes."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from turnout.kernels.arguments import Weights
from turnout.kernels.gpu import launch
from turnout.kernels.gpu.configs import Config, Tile
from turnout.kernels.gpu.trust import doubt
from turnout.kernels.proof import assignment_of, by_oracle, drawn, largest_error

# of the largest value; beside float32's, that of three roundings to the dtype (before and after the activation, and of
# each expert's row) and of their sums
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# more assignments than are counted at once, and very few; widths that no tile divides
SIZES = ((140, 40, 24, 3, 2), (3, 40, 24, 3, 2))
TILE = Tile(32, 32, 4, 2)
CONFIG = Config(
    rows=64, up=TILE, down=TILE, hidden_grad=TILE, x_grad=TILE, matrix_grad=Tile(64, 32, 4, 2), matrix_rows=64
)
# and what else a config may ask for; where the device has no such accelerator the blocks are loaded as before
FETCHED = replace(CONFIG, boxed=True, persistent=True)


def prove(kind: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why not to trust the kernels there, or nothing."""
    off = f"off the oracle by {{:.1e}} in {dtype} on this device"
    return doubt("Triton's kernels", partial(worst_error, kind, dtype, device), TOLERANCE[dtype], off)


def worst_error(kind: str, dtype: torch.dtype, device: torch.device) -> float:
    """Largest difference from the oracle in float64, given the same rounded numbers, relative to the largest or 1."""
    # whatever the caller is in the middle of
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        cases = [(sizes, bias, CONFIG) for sizes in SIZES for bias in (False, True)] + [(SIZES[0], True, FETCHED)]
        errors = [_error(kind, sizes, dtype, device, config, bias=bias) for sizes, bias, config in cases]
        # torch's max keeps NaN, Python's would drop it
        return float(torch.stack(errors).max())


def _error(
    kind: str, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, config: Config, *, bias: bool
) -> Tensor:
    leaves, expert_TK, y_grad_TD = drawn(kind, sizes, bias=bias)
    # the weights of assignments stay float32
    leaves = [leaf if index == 1 else leaf.to(dtype) for index, leaf in enumerate(leaves)]
    y_grad_TD = y_grad_TD.to(dtype)
    want = by_oracle(kind, leaves, expert_TK, y_grad_TD)
    compute = partial(_by_kernels, kind, leaves, expert_TK, y_grad_TD, device, config)
    # choices as they lie, and looked up token by token
    return largest_error([*compute(top_k=sizes[-1]), *compute(top_k=0)], [*want, *want])


def _by_kernels(
    kind: str,
    leaves: list[Tensor],
    expert_TK: Tensor,
    y_grad_TD: Tensor,
    device: torch.device,
    config: Config,
    *,
    top_k: int,
) -> list[Tensor]:
    """Output, and the gradients of all leaves."""
    x_TD, weight_N, up_EDG, down_EFD, *biases = (leaf.to(device) for leaf in leaves)
    up_bias, down_bias = biases or (None, None)
    weights = Weights(up_EDG=up_EDG, down_EFD=down_EFD, up_bias_EG=up_bias, down_bias_ED=down_bias, kind=kind)
    assignment = assignment_of(leaves[1], expert_TK, len(up_EDG))
    token_N, expert_N = assignment.token_N.to(device), assignment.expert_N.to(device)
    y_TD, up_MG, routes = launch.forward(
        x_TD, weight_N, token_N, expert_N, None, weights, config, top_k=top_k, keep=True
    )
    wanted = (True,) * len(leaves) + (False,) * (6 - len(leaves))
    grads = launch.backward(
        y_grad_TD.to(device), x_TD, weight_N, token_N, weights, routes, up_MG, config, top_k=top_k, wanted=wanted
    )
    return [y_TD.cpu(), *(grad.cpu() for grad in grads if grad is not None)]
