"""The planner's fitted numbers: at most 12, physical, in parameters.json with the report of their fit."""

import json
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from turnout.errors import ConfigError

# generations without calibration rows take the efficiency of the fitted one closest in design
STANDS_FOR = {"volta": "ampere", "cdna3": "hopper", "tpu": "hopper", "ascend": "ampere"}


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Shares are of a data-sheet peak. Fitted by benchmarks/fit_planner.py on calibration rows alone."""

    gemm_ampere: float  # share of the matrix peak that a large product reaches
    gemm_hopper: float
    gemm_blackwell: float
    gemm_passes: float  # times that the operands and result of a product cross memory, not overlapped with it
    grouped: float  # rate of the products of a rank's experts in one kernel, over that of one large product
    low_blackwell: float  # share of its own peak an fp8 or fp4 product reaches on Blackwell, over that of a bf16 one
    attention: float  # share of the bf16 matrix peak that a fused attention kernel reaches
    memory: float  # share of the memory bandwidth that element-wise kernels and the optimizer reach
    layer_call_s: float  # host time to launch one block forward and backward; the device waits for it when it is faster
    hidden_tp: float  # share of tensor-parallel communication behind products, where the framework overlaps it
    hidden_ep: float  # share of the experts' all-to-all behind computation, where the layout asks for overlap
    scale_nanotron: float  # step time of nanotron over that of the same work under the others

    def gemm(self, generation: str) -> float:
        """Share of its matrix peak that a device generation reaches.

        Raises: ConfigError naming the known generations.
        """
        shares = {"ampere": self.gemm_ampere, "hopper": self.gemm_hopper, "blackwell": self.gemm_blackwell}
        name = STANDS_FOR.get(generation, generation)
        if name not in shares:
            raise ConfigError(f"unknown device generation {generation!r}; known: {', '.join([*shares, *STANDS_FOR])}")
        return shares[name]

    def low(self, generation: str) -> float:
        """Share of its own peak that an fp8 or fp4 product reaches, over that of a bf16 one, on a generation.

        Others than Blackwell, whose bf16 products are held back by power, reach the same share in both.
        """
        return self.low_blackwell if generation == "blackwell" else 1.0

    def framework_scale(self, framework: str) -> float:
        """Step time of a framework over that of the others; 1 where no calibration row tells them apart."""
        return self.scale_nanotron if framework.startswith("nanotron") else 1.0


@lru_cache(maxsize=1)
def fitted() -> Parameters:
    """The parameters of parameters.json."""
    document: dict[str, Any] = json.loads(Path(__file__).with_name("parameters.json").read_text())
    return Parameters(**{field.name: float(document["parameters"][field.name]) for field in fields(Parameters)})
