"""How the tokens of a pass are cut over tensor-parallel ranks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How the tokens of a pass are cut over ranks."""

    dim: int  # 0: whole sequences; 1: pieces of each
    lengths: tuple[int, ...]  # of each rank's share along it

    def share(self, value: Tensor, rank: int) -> Tensor:
        """A rank's tokens; nothing is sent. Shapes: value (B, S, ...)."""
        return value.narrow(self.dim, sum(self.lengths[:rank]), self.lengths[rank])


def cutting(shape: tuple[int, ...], ranks: int) -> Cutting:
    """Shares of tokens of shape (B, S), equal but for one sequence piece's rest."""
    batch, length = shape[:2]
    if batch % ranks == 0:
        return Cutting(dim=0, lengths=(batch // ranks,) * ranks)
    return Cutting(dim=1, lengths=tuple((length + ranks - 1 - rank) // ranks for rank in range(ranks)))


class Tokens:
    """How the pass that runs cuts its tokens: blocks are told nothing that says so."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self.now = cutting((0, 0), ranks)
        self.stay_apart = False  # what comes out of the model is a rank's own share

    @staticmethod
    @contextmanager
    def kept_apart(tokens: "Tokens | None") -> Iterator[None]:
        """For a pass whose end needs a rank's own tokens alone."""
        if tokens is None:
            yield
            return
        tokens.stay_apart = True
        try:
            yield
        finally:
            tokens.stay_apart = False

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the model: it is given all tokens."""
        self.now = cutting((args[0] if args else kwargs["tokens_BS"]).shape, self._ranks)
