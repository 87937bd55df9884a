"""The dense kernel of oneDNN over a weight packed ahead, as Inductor's freezing does it."""

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from sparsedm_compile.dtypes import dtype_name
from sparsedm_compile.kernels.reference.kernel import apply_epilogue
from sparsedm_compile.kernels.registry import Epilogue, Kernel, LayerSpec
from sparsedm_compile.masked_weight import mask_out


class OneDnnKernel(Kernel):
    """Takes layers on a CPU in the dtypes that oneDNN is fast in there, whatever their pattern: zeros are multiplied.

    It is here for the promise "never slower than dense": packing ahead makes dense up to a fifth faster than
    ``F.linear`` (Zen 4, two threads: 185 against 220 GFLOP/s at 1028 x 512 x 2048), so a layer that sparsity does not
    help still gets the best dense.

    Packed: the reordered weight (opaque, ``torch._mkldnn`` layout) and an empty index.
    """

    name = "onednn"
    version = "1"
    devices = ("cpu",)
    skips_zeros = False
    fuses = False  # Inductor's own fusion of what follows is as good

    def refusal(self, spec: LayerSpec) -> str | None:
        if spec.device != "cpu":
            return "runs on the CPU only"
        if not torch.backends.mkldnn.is_available():
            return "this torch was built without oneDNN"
        dtype = dtype_name(spec.dtype)
        if not _multiplies(spec.dtype):
            return f"oneDNN has no fast {dtype} on this processor"
        if spec.op != "linear" and spec.dtype != torch.float32:
            # torch 2.13, bfloat16: a crash at width 1 with stride and dilation; garbage at width 2 with a stride and in
            # three dimensions with groups. Packing ahead also gains less here than in float32: nothing in NHWC.
            return f"oneDNN's packed {dtype} convolutions read beyond narrow images"
        return None

    def pack(self, weight: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        if not spec.pattern.is_dense:
            weight = mask_out(weight, str(spec.pattern))
        index = weight.new_empty(0, dtype=torch.uint8)
        if spec.op == "linear":
            return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), index
        nn = torch._C._nn
        reorder = nn.mkldnn_reorder_conv3d_weight if spec.op == "conv3d" else nn.mkldnn_reorder_conv2d_weight
        packed = reorder(weight.to_mkldnn(), spec.padding, spec.stride, spec.dilation, spec.groups)
        return packed, index

    def empty_packed(self, spec: LayerSpec, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.pack(torch.empty(spec.weight_shape, dtype=spec.dtype, device=device), spec)

    def unpack(self, values: Tensor, index: Tensor, spec: LayerSpec) -> Tensor:
        return values.to_dense().reshape(spec.weight_shape)

    def linear(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        out = torch.ops.mkldnn._linear_pointwise(x, values, _dense(epilogue.bias), "none", [], "")
        return apply_epilogue(out, epilogue)

    def conv(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        out = torch.ops.mkldnn._convolution_pointwise(
            x, values, _dense(epilogue.bias), spec.padding, spec.stride, spec.dilation, spec.groups, "none", [], ""
        )
        # oneDNN answers in channels_last for any input; dense answers in the input's own format.
        out = out.contiguous(memory_format=suggest_memory_format(x))
        return apply_epilogue(out, epilogue)


def _dense(bias: Tensor | None) -> Tensor | None:
    """A bias without gaps: of a strided one these operators read what lies between, silently."""
    return None if bias is None else bias.contiguous()


def _multiplies(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32
