"""Layers that hold a packed weight and no dense one: for deployment, made by :func:`sparsedm_compile.pack`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsedm_compile.kernels.ops  # noqa: F401  (registers the operators)
from sparsedm_compile.kernels import get_kernel, kernel_names
from sparsedm_compile.kernels.reference.kernel import ReferenceKernel
from sparsedm_compile.kernels.registry import LayerSpec, with_height
from sparsedm_compile.layers import layer_pattern
from sparsedm_compile.masked_weight import mask_out
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.planning import named_modules

_PORTABLE = ReferenceKernel()
_DENSE = "dense"  # the masked weight as it is, for torch's own operator
_KEYS = ("weight_values", "weight_index", "weight_pattern")


def spec_of(layer: nn.Module, weight: Tensor) -> LayerSpec:
    """The constants of a layer, packed or not, whose weight is in the dtype and on the device of ``weight``."""
    pattern = layer_pattern(layer)
    shape = tuple(layer.weight_shape if hasattr(layer, "weight_shape") else layer.weight.shape)
    if len(shape) == 2:
        return LayerSpec("linear", shape, pattern, weight.dtype, weight.device.type)
    shape, *window = with_height(shape, layer.stride, _padding(layer), layer.dilation)
    op = f"conv{len(shape) - 2}d"
    return LayerSpec(op, shape, pattern, weight.dtype, weight.device.type, *window, layer.groups)


def _pads_first(layer: nn.Module) -> bool:
    """Whether the padding is more than zeros, the same on both sides, which is all that kernels know."""
    return layer.padding_mode != "zeros" or isinstance(layer.padding, str)


def _padding(layer: nn.Module) -> tuple[int, ...]:
    """What the kernel is to pad."""
    return (0,) * len(layer.stride) if _pads_first(layer) else layer.padding


class _Packed(nn.Module):
    """A packed layer.

    In memory the weight lies in the layout of its kernel. ``state_dict`` holds the portable form whatever the kernel,
    so it loads on another machine: ``weight_values`` (kept weights in order), ``weight_index`` (uint8, position in the
    group) and ``weight_pattern`` (int64: n, m, v).

    Attributes:
        pattern: its spelling.
        kernel: the kernel whose layout ``packed_values`` and ``packed_index`` are in; ``"dense"`` where dense won.
        weight_shape: of the weight that was packed.
        preferred: the kernel that ``pack`` chose; moved to a dtype or device that it does not take, the layer is
            ``"dense"`` until it moves back.
        reason: why this kernel.
    """

    kind: str
    pattern: str
    kernel: str
    weight_shape: tuple[int, ...]
    preferred: str
    reason: str
    packed_values: Tensor
    packed_index: Tensor

    def spec(self) -> LayerSpec:
        """The constants of this layer."""
        return spec_of(self, self.packed_values)

    def adopt(self, weight: Tensor, kernel: str) -> None:
        """Mask and pack ``weight`` for ``kernel``; the dense weight is not kept."""
        spec = spec_of(self, weight)
        if kernel == _DENSE:
            values, index = mask_out(weight, self.pattern), weight.new_empty(0, dtype=torch.uint8)
        else:
            values, index = get_kernel(kernel).pack(weight.reshape(spec.weight_shape), spec)
        self.kernel = kernel
        self.register_buffer("packed_values", values, persistent=False)
        self.register_buffer("packed_index", index, persistent=False)

    def _adopt_preferred(self, weight: Tensor) -> None:
        kernel = self.preferred
        able = kernel in kernel_names() and get_kernel(kernel).refusal(spec_of(self, weight)) is None
        self.adopt(weight, kernel if able else _DENSE)

    def unpack(self) -> Tensor:
        """The masked dense weight, as it was packed."""
        if self.kernel == _DENSE:
            return self.packed_values
        weight = get_kernel(self.kernel).unpack(self.packed_values, self.packed_index, self.spec())
        return weight.reshape(self.weight_shape)

    def _portable(self) -> tuple[Tensor, Tensor]:
        spec = self.spec()
        return _PORTABLE.pack(self.unpack().reshape(spec.weight_shape), spec)

    def _check_use(self, input: Tensor) -> Tensor:
        """Refuse training; under autocast, bring the input to the dtype that the weight was packed in."""
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "a packed model cannot be trained: call model.eval() to use it; to train, take the sparsified model, "
                "then pack it again"
            )
        autocast = self.kernel != _DENSE and torch.is_autocast_enabled(input.device.type)
        return input.to(self.packed_values.dtype) if autocast else input

    def extra_repr(self) -> str:
        return f"{self.kind}, weight={tuple(self.weight_shape)}, pattern={self.pattern!r}, kernel={self.kernel!r}"

    def _apply(self, fn, recurse: bool = True):
        held = self.packed_values
        probe = fn(torch.empty(0, dtype=held.dtype, device=held.device))
        if (probe.dtype, probe.device) == (held.dtype, held.device):
            return super()._apply(fn, recurse)
        # A layout belongs to one dtype and device: unpack, move, pack for the new place.
        weight = fn(self.unpack())
        del self.packed_values, self.packed_index
        super()._apply(fn, recurse)
        self._adopt_preferred(weight)
        return self

    def __getstate__(self) -> dict:
        # A layout belongs to one machine as well: a pickle carries the portable form.
        buffers = {k: v for k, v in self._buffers.items() if k not in ("packed_values", "packed_index")}
        return {**self.__dict__, "_buffers": buffers, "_packed": self._portable()}

    def __setstate__(self, state: dict) -> None:
        values, index = state.pop("_packed")
        super().__setstate__(state)
        weight = _PORTABLE.unpack(values, index, spec_of(self, values))
        self._adopt_preferred(weight.reshape(self.weight_shape))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        p = Pattern.parse(self.pattern)
        values, index = self._portable()
        for key, tensor in zip(_KEYS, (values, index, torch.tensor([p.n, p.m, p.v])), strict=True):
            destination[prefix + key] = tensor

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        values, index, pattern = (state_dict.get(prefix + key) for key in _KEYS)
        if prefix + "weight" in state_dict:
            error_msgs.append(
                f"{prefix}weight is dense, but this layer is packed: load the checkpoint into the sparsified model and "
                "pack that"
            )
            return
        if values is None or index is None or pattern is None:
            missing_keys.extend(prefix + key for key in _KEYS if prefix + key not in state_dict)
            return
        stored = str(Pattern(*pattern.tolist()))
        expected = _PORTABLE.empty_packed(self.spec(), torch.device("meta"))
        if stored != self.pattern or values.shape != expected[0].shape or index.shape != expected[1].shape:
            error_msgs.append(
                f"{prefix}weight_values: {stored} of shape {tuple(values.shape)} in the checkpoint, this layer is "
                f"{self.pattern} of shape {tuple(expected[0].shape)}: pack the model with the checkpoint's plan"
            )
            return
        rest = {key: value for key, value in state_dict.items() if key not in {prefix + k for k in _KEYS}}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        weight = _PORTABLE.unpack(values, index, self.spec()).reshape(self.weight_shape)
        self.adopt(weight.to(self.packed_values.device, self.packed_values.dtype), self.kernel)


class PackedLinear(_Packed):
    """A linear layer run from its packed weight: ``(..., in_features) -> (..., out_features)``."""

    kind = "linear"

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features) -> (..., out_features)``."""
        input = self._check_use(input)
        if self.kernel == _DENSE:
            return F.linear(input, self.packed_values, self.bias)
        return torch.ops.sparsedm.linear(
            input, self.packed_values, self.packed_index, self.kernel, self.pattern, self.weight_shape, self.bias
        )


class _PackedConv(_Packed):
    """A convolution run from its packed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """``(B, C_in, *size) -> (B, C_out, *size')``."""
        input = self._check_use(input)
        if _pads_first(self):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
        padding = _padding(self)
        if self.kernel == _DENSE:
            dense = (F.conv1d, F.conv2d, F.conv3d)[len(self.stride) - 1]
            return dense(input, self.packed_values, self.bias, self.stride, padding, self.dilation, self.groups)
        return torch.ops.sparsedm.conv(
            input,
            self.packed_values,
            self.packed_index,
            self.kernel,
            self.pattern,
            *with_height(self.weight_shape, self.stride, padding, self.dilation),
            self.groups,
            self.bias,
        )


class PackedConv1d(_PackedConv):
    """``(B, C_in, L) -> (B, C_out, L')``."""

    kind = "conv1d"


class PackedConv2d(_PackedConv):
    """``(B, C_in, H, W) -> (B, C_out, H', W')``."""

    kind = "conv2d"


class PackedConv3d(_PackedConv):
    """``(B, C_in, D, H, W) -> (B, C_out, D', H', W')``."""

    kind = "conv3d"


PackedLayer = PackedLinear | PackedConv1d | PackedConv2d | PackedConv3d
PACKED_TYPES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: PackedLinear,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
    nn.Conv3d: PackedConv3d,
}


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Name -> layer, for every packed layer of ``model``."""
    return {name: module for name, module in named_modules(model) if isinstance(module, _Packed)}
