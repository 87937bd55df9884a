"""The oracle of the CPU kernel: linear and conv2d from their definitions, in float64, with no trick at all."""

import torch
from torch import Tensor

from sparsedm_compile.kernels.registry import Epilogue, LayerSpec
from sparsedm_compile.masks import magnitude_mask_naive


def linear_naive(x: Tensor, weight: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
    """``act(x @ masked(weight).T + bias) + residual`` for the dense ``weight`` (out, in); float64."""
    masked = (weight * magnitude_mask_naive(weight, spec.pattern)).double()
    z = (x.double().unsqueeze(-2) * masked).sum(-1)
    return epilogue_naive(z, epilogue, channel_dim=-1)


def conv2d_naive(x: Tensor, weight: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
    """The same for a convolution of one group: a sum over taps and input channels of shifted, strided images."""
    masked = (weight * magnitude_mask_naive(weight, spec.pattern)).double()
    (_, _, kernel_h, kernel_w), (pad_h, pad_w) = weight.shape, spec.padding
    batch, channels, height, width = x.shape
    padded = torch.zeros(batch, channels, height + 2 * pad_h, width + 2 * pad_w, dtype=torch.float64)
    padded[:, :, pad_h : pad_h + height, pad_w : pad_w + width] = x
    out_h = (padded.shape[2] - spec.dilation[0] * (kernel_h - 1) - 1) // spec.stride[0] + 1
    out_w = (padded.shape[3] - spec.dilation[1] * (kernel_w - 1) - 1) // spec.stride[1] + 1
    z = torch.zeros(batch, weight.shape[0], out_h, out_w, dtype=torch.float64)
    for i in range(out_h):
        for j in range(out_w):
            for ky in range(kernel_h):
                for kx in range(kernel_w):
                    pixel = padded[
                        :, :, i * spec.stride[0] + ky * spec.dilation[0], j * spec.stride[1] + kx * spec.dilation[1]
                    ]
                    z[:, :, i, j] += (pixel.unsqueeze(1) * masked[:, :, ky, kx]).sum(-1)
    return epilogue_naive(z, epilogue, channel_dim=1)


def epilogue_naive(z: Tensor, epilogue: Epilogue, channel_dim: int) -> Tensor:
    """``act(z + bias) + residual`` for a float64 ``z`` whose output channels lie along ``channel_dim``."""
    if epilogue.bias is not None:
        shape = [1] * z.dim()
        shape[channel_dim] = -1
        z = z + epilogue.bias.double().reshape(shape)
    if epilogue.activation == "gelu":
        z = z * 0.5 * (1 + torch.erf(z / 2**0.5))
    elif epilogue.activation == "gelu_tanh":
        z = z * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    elif epilogue.activation == "silu":
        z = z / (1 + torch.exp(-z))
    elif epilogue.activation == "geglu":
        value, gate = z.tensor_split(2, dim=-1)
        z = value * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    return z if epilogue.residual is None else z + epilogue.residual.double()
