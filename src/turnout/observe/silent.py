"""The record of a rank that writes nothing: the first rank's is the run's."""

from collections.abc import Sequence
from typing import Any

from turnout.observe.trace import TraceHeader


class SilentRecorder:
    """Takes what a `Recorder` takes."""

    def __init__(self, layers: Sequence[str], num_experts: Sequence[int]) -> None:
        self.header = TraceHeader(layers=tuple(layers), num_experts=tuple(num_experts))

    def step(self, step: int, **values: Any) -> dict[str, Any] | None:
        """Nothing to return: the line is the first rank's."""
        del step, values

    def eval(self, step: int, **values: Any) -> None:
        """Nothing."""

    def event(self, step: int, text: str) -> None:
        """Nothing."""

    def sources(self, *values: Any) -> None:
        """Nothing."""

    def token_view(self, *values: Any) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
