"""What follows the product, in registers: ``activation(product + bias)``, in fp32."""

import triton
import triton.language as tl


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """0 none, 1 GELU, 2 GELU by tanh, 3 SiLU; ``z`` in fp32."""
    if ACTIVATION == 1:
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == 2:
        # (1 + tanh(u)) / 2 = sigmoid(2 u); Triton has no tanh outside libdevice.
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == 3:
        z = z * tl.sigmoid(z)
    return z
