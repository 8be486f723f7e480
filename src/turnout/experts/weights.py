"""The parameters of the experts."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from turnout.errors import ConfigError
from turnout.experts.activations import Activation
from turnout.experts.called import CalledExperts
from turnout.experts.cut import Cut
from turnout.kernels.pages import on_large_pages
from turnout.placement import Placement
from turnout.strategy import nearest_divisor
from turnout.tensors import fill_normal


class FFNExperts(CalledExperts):
    """E feed-forward networks of one kind; each weight is ONE [E, ...] parameter, so checkpoints reshard.

    expert e: down_e(act(up_e x)). `up_EDG` holds gate and up side by side when the activation is gated.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        kind: str = "swiglu",
        bias: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.activation = Activation.TABLE[kind]
        self.dim, self.hidden, self.num_experts, self.kind, self.init_std = (
            dim,
            hidden,
            num_experts,
            kind,
            init_std,
        )
        width = 2 * hidden if self.activation.gated else hidden
        self.up_EDG = nn.Parameter(on_large_pages(torch.empty(num_experts, dim, width)))
        self.down_EFD = nn.Parameter(on_large_pages(torch.empty(num_experts, hidden, dim)))
        self.up_bias_EG = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.down_bias_ED = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill_normal(self.up_EDG, self.init_std)
        fill_normal(self.down_EFD, self.init_std)
        for bias in (self.up_bias_EG, self.down_bias_ED):
            if bias is not None:
                nn.init.zeros_(bias)

    @property
    def added_bias_ED(self) -> Tensor | None:
        """The bias of the down projection where this process adds it; None where another slice of the experts does."""
        bias_ED = self.down_bias_ED
        return bias_ED if bias_ED is not None and bias_ED.shape[1] == self.dim else None

    def cuts(self, placement: Placement, slices: int) -> dict[str, Cut]:
        """How each weight lies on ranks; `slices` of them share the hidden width of an expert.

        Raises: ConfigError if that width cannot be cut evenly.
        """
        if self.hidden % slices:
            near = nearest_divisor(slices, self.hidden)
            raise ConfigError(f"strategy.etp={slices} must divide moe.hidden={self.hidden}; nearest legal: {near}")
        axes = {"up_EDG": 2, "down_EFD": 1, "up_bias_EG": 1, "down_bias_ED": 0}
        return {
            name: Cut(
                shape=tuple(weight.shape),
                placement=placement,
                slices=slices,
                axis=axes[name],
                halves=2 if self.activation.gated and name.startswith("up_") else 1,
            )
            for name, weight in self.named_parameters(recurse=False)
        }

    def keep(self, cuts: Mapping[str, Cut], rank: int) -> None:
        """Keep a rank's parts of the weights alone."""
        for name, weight in list(self.named_parameters(recurse=False)):
            part = cuts[name].part(weight.detach(), rank).clone(memory_format=torch.contiguous_format)
            setattr(self, name, nn.Parameter(part, requires_grad=weight.requires_grad))
        self.num_experts, self.hidden = len(self.up_EDG), self.down_EFD.shape[1]


class ModuleExperts(nn.ModuleList):
    """E modules of a user's own, each mapping (rows, D) to (rows, D); computed by the loop backend."""

    def __init__(self, factory: Callable[[], nn.Module], num_experts: int) -> None:
        modules = [factory() for _ in range(num_experts)]
        for module in modules:
            if not isinstance(module, nn.Module):
                raise ConfigError(
                    f"the function given as expert made {module!r}; each expert must be a torch.nn.Module"
                )
        super().__init__(modules)
        self.num_experts = num_experts
