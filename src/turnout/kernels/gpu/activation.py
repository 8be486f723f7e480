"""Activations on the tile of a product, and their derivatives, in float32; numbers as in turnout.kernels.KINDS."""

import triton
import triton.language as tl


@triton.jit
def activated(up, value, KIND: tl.constexpr):
    """h of a tile before the activation; `value` is the second half of a gated kind, else whatever.

    A NaN stays one, as with torch: no maximum or minimum, which would drop it.
    """
    if KIND == 0:
        return tl.where(up <= 0.0, 0.0, up)
    elif KIND == 1:
        return up * 0.5 * (1.0 + tl.erf(up * 0.7071067811865476))
    elif KIND == 2:
        return up * tl.sigmoid(up) * value
    else:
        gate = tl.where(up > 7.0, 7.0, up)
        linear = tl.where(value > 7.0, 7.0, tl.where(value < -7.0, -7.0, value))
        return gate * tl.sigmoid(1.702 * gate) * (linear + 1.0)


@triton.jit
def up_gradient(up, value, h_grad, KIND: tl.constexpr):
    """Gradient of the first half, or of all of a kind without a gate."""
    if KIND == 0:
        return tl.where(up <= 0.0, 0.0, h_grad)
    elif KIND == 1:
        share = 0.5 * (1.0 + tl.erf(up * 0.7071067811865476))
        return h_grad * (share + up * 0.3989422804014327 * tl.exp(-0.5 * up * up))
    elif KIND == 2:
        share = tl.sigmoid(up)
        return h_grad * value * share * (1.0 + up * (1.0 - share))
    else:
        gate = tl.where(up > 7.0, 7.0, up)
        linear = tl.where(value > 7.0, 7.0, tl.where(value < -7.0, -7.0, value))
        share = tl.sigmoid(1.702 * gate)
        slope = share * (1.0 + 1.702 * gate * (1.0 - share))
        return tl.where(up > 7.0, 0.0, h_grad * (linear + 1.0) * slope)


@triton.jit
def value_gradient(up, value, h_grad, KIND: tl.constexpr):
    """Gradient of the second half of a gated kind."""
    if KIND == 2:
        return h_grad * up * tl.sigmoid(up)
    else:
        gate = tl.where(up > 7.0, 7.0, up)
        inside = (value <= 7.0) & (value >= -7.0)
        return tl.where(inside, h_grad * gate * tl.sigmoid(1.702 * gate), 0.0)
