"""One thin adapter a library: as much of its layer as it lets one see."""

from turnout.verify.adapters.any_module import from_factory
from turnout.verify.adapters.deepspeed_moe import DEEPSPEED_LAYERS, from_deepspeed
from turnout.verify.adapters.own import from_config, from_preset
from turnout.verify.adapters.st_moe import ST_MOE_LAYERS, from_st_moe_pytorch
from turnout.verify.adapters.torchtitan_moe import TORCHTITAN_LAYERS, from_torchtitan
from turnout.verify.adapters.transformers_blocks import BLOCKS, from_transformers

__all__ = [
    "BLOCKS",
    "DEEPSPEED_LAYERS",
    "ST_MOE_LAYERS",
    "TORCHTITAN_LAYERS",
    "from_config",
    "from_deepspeed",
    "from_factory",
    "from_preset",
    "from_st_moe_pytorch",
    "from_torchtitan",
    "from_transformers",
]
