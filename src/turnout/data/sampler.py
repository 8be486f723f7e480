"""Token shard -> batches: a seeded permutation of windows an epoch, and a state that resumes it exactly."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy.typing import NDArray
from torch import Tensor

from turnout.data.shards import TokenShard
from turnout.errors import CheckpointError, ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B windows of S tokens; `targets_BS` is `tokens_BS` one token later, -100 where none is to be predicted."""

    tokens_BS: Int64[Tensor, "B S"]
    targets_BS: Int64[Tensor, "B S"]
    mask_BS: Bool[Tensor, "B S"] | None = None  # False: padding; None: no padding, which is how the sampler packs

    def to(self, device: torch.device) -> "Batch":
        """The same windows on a device."""
        mask_BS = None if self.mask_BS is None else self.mask_BS.to(device)
        return Batch(tokens_BS=self.tokens_BS.to(device), targets_BS=self.targets_BS.to(device), mask_BS=mask_BS)


class Sampler:
    """Endless batches. Each epoch visits every window once, in an order drawn from (seed, epoch).

    Window i covers tokens i*S to (i+1)*S, both ends included, so every token but the first is a target once. The
    tail that fills no window, and the windows that fill no batch, wait for another epoch's order.

    Ranks take turns in one global order: rank r of P has every P-th window from the r-th on. So together they see
    what one rank with a P times larger batch would see, and a run may resume on another number of ranks.
    """

    def __init__(
        self, shard: TokenShard, batch_size: int, seq_len: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> None:
        """`batch_size` is this rank's.

        Raises: ConfigError for a size, seed or rank out of range; DataError if the shard does not fill one batch.
        """
        _check_sizes(batch_size, seq_len)
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} must be at least 0 and below world_size={world_size}")
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed={seed} must be at least 0 and below 2**32")
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.rank, self.world_size = rank, world_size
        self.global_batch_size = batch_size * world_size
        self.num_windows = count_windows(shard, seq_len)
        if self.num_windows < self.global_batch_size:
            raise DataError(
                f"{shard.num_tokens} tokens make {self.num_windows} windows of seq_len={seq_len}: too few for "
                f"one batch of {self.global_batch_size} (batch_size={batch_size} on {world_size} ranks); "
                "use a smaller batch_size or seq_len, or more text"
            )
        self._shard = shard
        self.epoch = 0
        self._position = 0  # windows that all ranks together have had in this epoch
        self._order = self._permutation()

    @property
    def batches_per_epoch(self) -> int:
        return self.num_windows // self.global_batch_size

    def next_batch(self) -> Batch:
        """This rank's next batch.

        Shapes: tokens_BS and targets_BS (batch_size, seq_len).
        """
        if self._position == self.batches_per_epoch * self.global_batch_size:
            self.epoch, self._position = self.epoch + 1, 0
            self._order = self._permutation()
        step = self._order[self._position : self._position + self.global_batch_size]
        self._position += self.global_batch_size
        return gather(self._shard, step[self.rank :: self.world_size], self.seq_len)

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler stands, as JSON-able values; the same on all ranks."""
        return {"epoch": self.epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken.

        Raises: CheckpointError if it was taken with another seed, batch, window length or text, or is damaged.
        """
        for key, here in self._identity().items():
            if state.get(key) != here:
                raise CheckpointError(
                    f"the sampler state was saved with {key}={state.get(key)!r}, here it is {here!r}: the batches "
                    "would not be the ones the run would have seen; resume with the run's own recipe and data"
                )
        epoch, position = state.get("epoch"), state.get("position")
        last = self.batches_per_epoch * self.global_batch_size
        if not isinstance(epoch, int) or not isinstance(position, int) or epoch < 0 or not 0 <= position <= last:
            raise CheckpointError(f"the sampler state is damaged: epoch={epoch!r}, position={position!r} of {last}")
        if position % self.global_batch_size:
            raise CheckpointError(f"the sampler state is damaged: position={position} is inside a batch")
        self.epoch, self._position = epoch, position
        self._order = self._permutation()

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "seq_len": self.seq_len,
            "shard": self._shard.fingerprint,
        }

    def _permutation(self) -> NDArray[np.int64]:
        # RandomState, not Generator: NumPy promises that its streams never change (NEP 19), so a resumed run
        # sees the same order after an upgrade
        return np.random.RandomState([self.seed, self.epoch]).permutation(self.num_windows)


def validation_batches(shard: TokenShard, batch_size: int, seq_len: int, max_tokens: int) -> Iterator[Batch]:
    """The first windows of the shard, in order, at most `max_tokens` targets: the same for every model and run.

    The last batch may be smaller, so what is measured does not depend on `batch_size`.
    Shapes: tokens_BS and targets_BS (at most batch_size, seq_len).
    Raises: ConfigError if `max_tokens` is less than one window; DataError if the shard is.
    """
    _check_sizes(batch_size, seq_len)
    if max_tokens < seq_len:
        raise ConfigError(f"max_tokens={max_tokens} must be at least one window of seq_len={seq_len}")
    window_N = np.arange(min(count_windows(shard, seq_len), max_tokens // seq_len))
    starts = range(0, len(window_N), batch_size)
    return (gather(shard, window_N[start : start + batch_size], seq_len) for start in starts)


def count_windows(shard: TokenShard, seq_len: int) -> int:
    """How many windows of `seq_len` targets a shard holds.

    Raises: DataError if there is not one.
    """
    num_windows = (shard.num_tokens - 1) // seq_len
    if num_windows < 1:
        raise DataError(
            f"the text has {shard.num_tokens} tokens; one window of seq_len={seq_len} needs {seq_len + 1}; "
            "use a smaller seq_len, a larger data.val_fraction if this is validation text, or more text"
        )
    return num_windows


def _check_sizes(batch_size: int, seq_len: int) -> None:
    if batch_size < 1 or seq_len < 1:
        raise ConfigError(f"batch_size={batch_size} and seq_len={seq_len} must be at least 1")


def gather(shard: TokenShard, windows: NDArray[np.int64], seq_len: int) -> Batch:
    """The windows of these numbers, as a batch. Shapes: windows (B,); returns tokens and targets (B, seq_len)."""
    place = windows[:, None] * seq_len + np.arange(seq_len + 1)
    tokens = torch.from_numpy(shard.tokens[place].astype(np.int64))
    return Batch(tokens_BS=tokens[:, :-1].contiguous(), targets_BS=tokens[:, 1:].contiguous())
