"""The limit of a training step: its products with weights, and nothing else."""

from collections.abc import Callable

import torch

from turnout.models import Decoder, ModelConfig


def gemms(config: ModelConfig, num_tokens: int) -> Callable[[], None]:
    """Every product with a weight, forward and backward, one after another, in memory that is there already.

    No model of this shape can be faster. Attention's products of queries and keys are not among them.
    """
    operands = [
        (torch.randn(num_tokens, inner), torch.randn(inner, outer), torch.randn(num_tokens, outer))
        for inner, outer in products(config)
    ]
    results = [tuple(torch.empty_like(matrix) for matrix in matrices) for matrices in operands]

    def run() -> None:
        for (x, weight, y_grad), (x_grad, weight_grad, y) in zip(operands, results, strict=True):
            torch.mm(x, weight, out=y)
            torch.mm(y_grad, weight.t(), out=x_grad)
            torch.mm(x.t(), y_grad, out=weight_grad)

    return run


def products(config: ModelConfig) -> list[tuple[int, int]]:
    """(inner, outer) width of each product of a token with weights, read off a model that takes no memory.

    The experts a token chooses are one network as wide as all of them: one large product is faster than many.
    """
    with torch.device("meta"):
        model = Decoder(config)
    shapes = []
    for name, weight in model.named_parameters():
        only_looked_up = name == "position_SD" or (name == "embedding_VD" and model.head_VD is not None)
        if weight.ndim < 2 or "bias" in name or only_looked_up:
            continue
        if weight.ndim == 2:
            outer, inner = weight.shape
            shapes.append((inner, outer))
        else:
            assert config.moe is not None
            choices, (_, inner, outer) = config.moe.router.choices, weight.shape
            is_up = name.endswith("up_EDG")
            shapes.append((inner, choices * outer) if is_up else (choices * inner, outer))
    return shapes
