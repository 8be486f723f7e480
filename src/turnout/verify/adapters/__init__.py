"""One thin adapter a library: as much of its layer as it lets one see."""

from turnout.verify.adapters.any_module import from_factory
from turnout.verify.adapters.own import from_config, from_preset
from turnout.verify.adapters.transformers_blocks import BLOCKS, from_transformers

__all__ = ["BLOCKS", "from_config", "from_factory", "from_preset", "from_transformers"]
