"""The loss of tensor-parallel ranks: each takes that of a share of the tokens, so that they share logits too.

The head stays whole and tokens are cut, where Megatron cuts the vocabulary: as much arithmetic and as few logits on a
rank, without a sum over ranks inside the softmax, which the loss computes together with its gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from turnout.layers.lm_loss import lm_loss
from turnout.models import Decoder
from turnout.models.decoder import DecoderLoss
from turnout.parallel.tokens import Tokens, cutting
from turnout.tensors import MoEStats


class OwnTargets:
    """`Decoder.loss` of a rank's share of the targets; weighed by their numbers, the ranks' mean is the batch's."""

    def __init__(self, model: Decoder, ranks: int, place: int, tokens: Tokens | None) -> None:
        """`tokens`: how a pass in sequence parallel cuts them; None: every rank has all of them to the end."""
        self._model, self._ranks, self._place, self._tokens = model, ranks, place, tokens

    def __call__(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        *,
        mask_BS: Tensor | None = None,
        generator: torch.Generator | None = None,
        step_stats: Sequence[MoEStats] | None = None,
    ) -> DecoderLoss:
        """Every rank gives the same tokens and targets."""
        cut = cutting(targets_BS.shape, self._ranks)
        with Tokens.kept_apart(self._tokens):
            out = self._model(tokens_BS, mask_BS=mask_BS, generator=generator, step_stats=step_stats)
        h_BSD = cut.share(out.h_BSD, self._place) if self._tokens is None else out.h_BSD
        targets_T = cut.share(targets_BS, self._place).flatten()
        main = lm_loss(h_BSD.flatten(0, 1), self._model.head, targets_T)
        return DecoderLoss(main=main, losses=out.losses, stats=out.stats)
