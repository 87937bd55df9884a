"""One layer a benchmark, to hold one commit against another; bench/kernels_cpu.py holds sparse against dense.

pytest bench --benchmark-json now.json
"""

import math

import pytest
import torch
import torch.nn.functional as F

from sparsedm_compile.kernels import get_kernel
from sparsedm_compile.kernels.registry import Epilogue, LayerSpec
from sparsedm_compile.pattern import Pattern

# U-ViT-S/2 at batch 4; a convolution of the DDPM UNet and of SD 1.5's.
SHAPES = {
    "qkv": ((1536, 512), (1028, 512)),
    "fc2": ((512, 2048), (1028, 2048)),
    "conv3x3-128": ((128, 128, 3, 3), (4, 128, 32, 32)),
    "conv1x1-320": ((320, 320, 1, 1), (1, 320, 64, 64)),
}


@pytest.mark.parametrize("pattern", ["dense", "2:4", "2:4v4", "1:4v4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer(benchmark, shape, pattern):
    weight_shape, input_shape = SHAPES[shape]
    torch.manual_seed(0)
    x, weight = torch.randn(input_shape), torch.randn(weight_shape) / math.sqrt(math.prod(weight_shape[1:]))
    is_conv, padding = len(weight_shape) == 4, (weight_shape[-1] // 2,) * 2
    with torch.inference_mode():
        if pattern == "dense":
            benchmark(*((F.conv2d, x, weight, None, 1, padding) if is_conv else (F.linear, x, weight)))
            return
        op = "conv2d" if is_conv else "linear"
        spec = LayerSpec(op, weight_shape, Pattern.parse(pattern), padding=padding if is_conv else (0, 0))
        kernel = get_kernel("cpu")
        if (refusal := kernel.refusal(spec)) is not None:
            pytest.skip(refusal)
        benchmark(getattr(kernel, op), x, *kernel.pack(weight, spec), spec, Epilogue())
