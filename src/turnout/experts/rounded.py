"""What experts with rounded weights have in common: they infer, and say which weights their codes stand for."""

import torch
from torch import Tensor

from turnout.errors import ConfigError
from turnout.experts.activations import Activation
from turnout.experts.called import CalledExperts


class RoundedExperts(CalledExperts):
    """E feed-forward networks whose weights are codes. Nothing in here learns."""

    up_bias_EG: Tensor | None
    down_bias_ED: Tensor | None

    def __init__(self, dim: int, hidden: int, num_experts: int, *, kind: str, bias: bool) -> None:
        super().__init__()
        self.activation = Activation.TABLE[kind]
        self.dim, self.hidden, self.num_experts, self.kind = dim, hidden, num_experts, kind
        self.register_buffer("up_bias_EG", torch.zeros(num_experts, self.parts * hidden) if bias else None)
        self.register_buffer("down_bias_ED", torch.zeros(num_experts, dim) if bias else None)

    @property
    def parts(self) -> int:
        """Matrices of the first product."""
        return 2 if self.activation.gated else 1

    def weights_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """up_DG and down_FD of one expert as the codes have them, in float32."""
        raise NotImplementedError

    def check_inference(self, *tensors: Tensor) -> None:
        """Raises: ConfigError if a gradient is to come back through the experts."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise ConfigError(
                "quantised experts are for inference alone: call the layer under torch.no_grad(), or train the model "
                "it was quantised from"
            )
