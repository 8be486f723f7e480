"""Dashboards that a run can also report to: one class and one row each, at most a dozen scalars."""

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from turnout.errors import ConfigError
from turnout.registry import Table

# one series per layer and expert would be thousands: detail is in the trace and the report
SINK_SCALARS = (
    "loss",
    "total_loss",
    "val_loss",
    "lr",
    "grad_norm",
    "tokens_per_s",
    "max_violation",
    "cv",
    "entropy",
    "dead_experts",
    "dropped_share",
    "margin",
)


class Sink(ABC):
    """Where scalars go besides the run folder."""

    module: ClassVar[str]  # what must be importable
    pip: ClassVar[str]  # how to get it

    @abstractmethod
    def __init__(self, run: Path) -> None: ...

    @abstractmethod
    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show these values at this step."""

    @abstractmethod
    def close(self) -> None:
        """Send what is left."""


SINKS: Table[type[Sink]] = Table("sink")


@SINKS.register("tensorboard")
class TensorBoard(Sink):
    """Event files in `RUN/tensorboard`; look with `tensorboard --logdir RUN`."""

    module = "tensorboard"
    pip = "pip install tensorboard"

    def __init__(self, run: Path) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(log_dir=str(run / "tensorboard"))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


@SINKS.register("wandb")
class WeightsAndBiases(Sink):
    """A run of the project `turnout` on Weights & Biases; obeys WANDB_MODE and the other variables."""

    module = "wandb"
    pip = "pip install wandb"

    def __init__(self, run: Path) -> None:
        wandb = importlib.import_module(self.module)
        self._run = wandb.init(project="turnout", name=run.resolve().name, dir=str(run))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


@SINKS.register("trackio")
class Trackio(Sink):
    """A run of the project `turnout` in the local trackio database; look with `trackio show`."""

    module = "trackio"
    pip = "pip install trackio"

    def __init__(self, run: Path) -> None:
        self._trackio = importlib.import_module(self.module)
        self._trackio.init(project="turnout", name=run.resolve().name)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._trackio.log(dict(scalars), step=step)

    def close(self) -> None:
        self._trackio.finish()


def is_available(name: str) -> bool:
    """Whether the sink's package is installed.

    Raises: ConfigError for a name that is no sink.
    """
    return importlib.util.find_spec(SINKS[name].module) is not None


def require_sinks(names: Sequence[str]) -> None:
    """Refuses what cannot be opened, before anything is made for it.

    Raises: ConfigError if a name is unknown or its package is not installed.
    """
    for name in names:
        if not is_available(name):
            raise ConfigError(
                f"sink {name!r} needs the package {SINKS[name].module}: {SINKS[name].pip}, or leave {name} out"
            )


def open_sinks(names: Sequence[str], run: Path) -> tuple[Sink, ...]:
    """The sinks asked for by name; none is opened on its own.

    Raises: ConfigError if a name is unknown or its package is not installed, or does not start.
    """
    require_sinks(names)
    return tuple(_open(name, run) for name in names)


def _open(name: str, run: Path) -> Sink:
    try:
        return SINKS[name](run)
    except Exception as error:  # a dashboard's own errors are of any class
        raise ConfigError(f"sink {name!r} does not start: {error}; mend that, or leave {name} out") from error
