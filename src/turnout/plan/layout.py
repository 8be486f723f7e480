"""A layout as a user types it, "tp=8,pp=16,ep=64", and back."""

from dataclasses import fields
from typing import Any

from turnout.alltoall import PROGRAMS
from turnout.config import from_dict, override
from turnout.errors import ConfigError
from turnout.registry import nearest
from turnout.strategy import Strategy
from turnout.topology import Device

# the short names of papers and other programs
SHORT = {"sp": "sequence_parallel", "vp": "virtual_stages", "mbs": "micro_batch"}
_SHORT_OF = {long: short for short, long in SHORT.items()}
_ALWAYS = ("tp", "pp", "ep")  # said in any layout that is written
_FIRST = ("tp", "cp", "pp", "dp", "ep", "etp")


def layout_of(text: str, device: Device | None = None) -> Strategy:
    """The layout that `text` says: fields of Strategy as name=value, with commas between; `sp`, `vp`, `mbs` are short.

    What it leaves out is Strategy's default, but for the schedule, for several virtual stages are interleaved, and for
    the precision on a `device` without bf16.
    Raises: ConfigError for what is not name=value, an unknown or repeated field, or a value that is not legal.
    """
    usual = {} if device is None else {"precision": device.usual_precision}
    strategy = from_dict(Strategy, usual | said_of(text), "strategy")
    if strategy.alltoall not in PROGRAMS:
        names = PROGRAMS.names()
        raise ConfigError(
            f"strategy.alltoall={strategy.alltoall!r} must be one of: {', '.join(names)}"
            f"{nearest(strategy.alltoall, names)}"
        )
    return strategy


def said_of(text: str) -> dict[str, Any]:
    """The fields that a layout names, with their values as they are written, legal or not.

    Raises: ConfigError for what is not name=value, or is said twice.
    """
    data: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, found, value = map(str.strip, part.partition("="))
        if not found or not name:
            raise ConfigError(f"layout {part!r} must look like name=value, such as tp=8; between them commas")
        field = SHORT.get(name, name)
        if field in data:
            raise ConfigError(f"layout says {field} twice: {text!r}")
        data[field] = override({}, [f"value={value}"])["value"]
    if data.get("virtual_stages", 1) != 1:
        data.setdefault("schedule", "interleaved")
    return data


def layout_text(strategy: Strategy) -> str:
    """What `layout_of` reads as this layout: all that differs from the default, and tp, pp and ep always."""
    usual = Strategy()
    said = {
        field.name: getattr(strategy, field.name)
        for field in fields(Strategy)
        if field.name in _ALWAYS or getattr(strategy, field.name) != getattr(usual, field.name)
    }
    if strategy.virtual_stages > 1 and strategy.schedule == "interleaved":
        # as `layout_of` has it where nothing is said
        del said["schedule"]
    names = [*(name for name in _FIRST if name in said), *(name for name in said if name not in _FIRST)]
    return ",".join(f"{_SHORT_OF.get(name, name)}={_text(said[name])}" for name in names)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
