"""A device with the fitted efficiencies applied: seconds of products, of attention and of bytes moved.

Roofline with few efficiencies: a product costs its operations at a share of the peak plus its operands' way through
memory; everything else costs its bytes. Source: Williams et al. 2009 (roofline).
"""

from dataclasses import dataclass
from functools import cached_property

from turnout.plan.parameters import Parameters
from turnout.strategy import ELEMENT_BYTES
from turnout.topology import Device


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A device with the fitted efficiencies applied."""

    device: Device
    parameters: Parameters

    def product_s(self, m: float, n: float, k: float, precision: str, *, grouped: bool = False) -> float:
        """Seconds of an (m, k) by (k, n) product; `grouped` with those of other experts in one kernel."""
        moved = ELEMENT_BYTES[precision] * (m * k + k * n) + 2 * m * n
        share = self.parameters.grouped if grouped else 1.0
        return 2 * m * n * k / (share * self._rate(precision)) + self.parameters.gemm_passes * self.bytes_s(moved)

    def bytes_s(self, moved_bytes: float) -> float:
        """Seconds to read or write so much device memory."""
        return moved_bytes / (self.device.memory_bytes_per_s * self.parameters.memory)

    def _rate(self, precision: str) -> float:
        """FLOP/s that a large product reaches."""
        if precision not in self._rates:
            generation = self.device.generation
            rate = self.device.flops_per_s(precision) * self.parameters.gemm(generation)
            self._rates[precision] = rate * (self.parameters.low(generation) if ELEMENT_BYTES[precision] < 2 else 1.0)
        return self._rates[precision]

    @cached_property
    def _rates(self) -> dict[str, float]:
        return {}

    def attention_s(self, flops: float) -> float:
        """Seconds of a fused attention kernel."""
        precision = "bf16" if self.device.peak_flops_per_s.bf16 else "fp16"
        return flops / (self.device.flops_per_s(precision) * self.parameters.attention)
