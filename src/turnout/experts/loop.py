"""One expert after another: any dtype, any device, any module; the twin of the dense oracle."""

import torch
from torch import Tensor, nn

from turnout.contracts import ExpertBackend, Refusal
from turnout.errors import ShapeError
from turnout.experts.rounded import RoundedExperts
from turnout.experts.weights import FFNExperts
from turnout.tensors import Ragged, Rows


class Loop(ExpertBackend):
    """Plain autograd over the experts; one host copy of the counts on a GPU."""

    layout = "ragged"

    def refusal(self, experts: nn.Module, *, dtype: torch.dtype, device: torch.device) -> Refusal | None:
        return None

    def run(self, experts: nn.Module, rows: Rows) -> Rows:
        assert isinstance(rows, Ragged)
        parts = rows.x_MD.split(rows.counts_L.tolist())
        if isinstance(experts, FFNExperts):
            outputs = _ffn(experts, parts)
        elif isinstance(experts, RoundedExperts):
            outputs = _quantized(experts, parts)
        else:
            assert isinstance(experts, nn.ModuleList)
            outputs = _modules(experts, parts)
        return Ragged(x_MD=torch.cat(outputs) if outputs else rows.x_MD, counts_L=rows.counts_L)


def _ffn(experts: FFNExperts, parts: tuple[Tensor, ...]) -> list[Tensor]:
    # unbind: indexing would zero-fill a whole [E, ...] gradient for each expert
    ups, downs = experts.up_EDG.unbind(), experts.down_EFD.unbind()
    up_biases = _unbind(experts.up_bias_EG, len(parts))
    down_biases = _unbind(experts.added_bias_ED, len(parts))
    outputs = []
    for x_MD, up, down, up_bias, down_bias in zip(parts, ups, downs, up_biases, down_biases, strict=True):
        h_MF = experts.activation(_linear(x_MD, up, up_bias))
        outputs.append(_linear(h_MF, down, down_bias))
    return outputs


def _quantized(experts: RoundedExperts, parts: tuple[Tensor, ...]) -> list[Tensor]:
    """The weights of one expert at a time are widened; rows stay what they are, however a kernel rounds them."""
    experts.check_inference(*parts)
    up_biases, down_biases = (_unbind(bias, len(parts)) for bias in (experts.up_bias_EG, experts.down_bias_ED))
    outputs = []
    for e, x_MD in enumerate(parts):
        if not len(x_MD):
            outputs.append(x_MD)
            continue
        up_DG, down_FD = experts.weights_of(e)
        outputs.append(_linear(experts.activation(_linear(x_MD, up_DG, up_biases[e])), down_FD, down_biases[e]))
    return outputs


def _modules(experts: nn.ModuleList, parts: tuple[Tensor, ...]) -> list[Tensor]:
    # an idle expert also runs, on no rows, so that its gradients are zeros and never None
    outputs = [expert(x_MD) for expert, x_MD in zip(experts, parts, strict=True)]
    for expert, x_MD, y_MD in zip(experts, parts, outputs, strict=True):
        if not isinstance(y_MD, Tensor) or y_MD.shape != x_MD.shape:
            got = f"shape {tuple(y_MD.shape)}" if isinstance(y_MD, Tensor) else type(y_MD).__name__
            raise ShapeError(
                f"expert {type(expert).__name__} made {got} of rows of shape {tuple(x_MD.shape)}; legal: the same"
            )
    return outputs


def _linear(x_MD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x_MD @ weight.to(x_MD.dtype)
    return y if bias is None else y + bias.to(x_MD.dtype)


def _unbind(bias: Tensor | None, num_experts: int) -> tuple[Tensor | None, ...]:
    return (None,) * num_experts if bias is None else bias.unbind()


ExpertBackend.TABLE.register("loop")(Loop())
