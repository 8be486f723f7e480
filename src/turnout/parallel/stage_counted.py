"""torch's pipeline stage and schedule, with a ledger of what is sent and errors that say what happened."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp
from torch.distributed.pipelining import PipelineStage

from turnout.comm import Ledger
from turnout.comm.ledger import Phase
from turnout.errors import TransportError
from turnout.parallel.stage_schedules import Schedule


class CountedStage(PipelineStage):
    """torch's stage; what it hands over to be sent is noted, and when it computes."""

    def __init__(self, *args: Any, ledger: Ledger, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ledger = ledger

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self._ledger.computing():
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        with self._ledger.computing():
            super().backward_one_chunk(*args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        with self._ledger.computing():
            super().backward_weight_one_chunk(*args, **kwargs)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[P2POp]:
        return self._noted(super().get_fwd_send_ops(fwd_chunk_id), "forward")

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[P2POp]:
        return self._noted(super().get_bwd_send_ops(bwd_chunk_id), "backward")

    def _noted(self, ops: list[P2POp], phase: Phase) -> list[P2POp]:
        assert self.group is not None
        for op in ops:
            sent = {dist.get_group_rank(self.group, op.peer): op.tensor.numel() * op.tensor.element_size()}
            self._ledger.note(f"stage {self.stage_index}", phase, "stages", sent)
        return ops


def given(output: Tensor, number: Tensor) -> Tensor:
    """The loss of a micro-batch, which the last stage has taken already."""
    return output.sum()


def stepped(schedule: Schedule, args: Sequence[Tensor], ledger: Ledger, *, target: Tensor | None) -> None:
    """Raises: what a stage raised, and TransportError where a rank could not be reached."""
    try:
        schedule.step(*args, target=target)
    except RuntimeError as error:
        # torch wraps what a stage raises
        if error.__cause__ is not None:
            raise error.__cause__ from error
        if not ledger.where.is_inside:
            # it computed: nobody was waited for
            raise
        raise TransportError(
            f"rank {dist.get_rank()}: the pipeline of stages failed, because a rank of it ended or took too long: "
            f"{error}"
        ) from error
