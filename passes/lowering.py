"""What the passes share: the graph being lowered, its layers, and the tensors it will take beside Dynamo's inputs."""

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from sparsedm_compile.derived import Request, derived_weights
from sparsedm_compile.kernels.choice import Verdict
from sparsedm_compile.kernels.registry import LayerSpec
from sparsedm_compile.options import Options


@dataclass
class LayerNode:
    """One linear or convolution in the graph.

    Attributes:
        name: of the layer in the module that was compiled, or of the placeholder where it has no name.
        node: the ``linear`` or convolution call, or its sparse replacement.
        weight: the placeholder of the dense weight.
        mask: the ``masked_weight`` call between the two, if the layer is masked.
        spec: constants of the layer; its pattern is dense as long as there is no mask.
        unusual: why no kernel can take this call, whatever its shapes (autocast, an odd padding).
        dense_reason: why the plan of ``insert_masks`` left it dense.
        verdict: which kernel runs it and why; set by ``swap_kernels``.
    """

    name: str
    node: fx.Node
    weight: fx.Node
    mask: fx.Node | None
    spec: LayerSpec
    unusual: str = ""
    dense_reason: str = ""
    verdict: Verdict | None = None

    @property
    def fused(self) -> tuple[str, ...]:
        """What the kernel does behind the product, beside the bias: an activation's name, ``"residual"``."""
        activation, residual = (self.node.kwargs.get(name) for name in ("activation", "residual"))
        return (*([activation] if activation else []), *(["residual"] if residual is not None else []))

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of the example that the graph was compiled for; empty where a size is unknown until it runs."""
        value = self.node.meta.get("example_value")
        if not isinstance(value, Tensor) or not all(isinstance(s, int) or s.node.has_hint() for s in value.shape):
            return ()
        return tuple(size if isinstance(size, int) else int(size.node.hint) for size in value.shape)


@dataclass(frozen=True)
class DerivedInput:
    """A group of extra inputs: tensors derived at each call from the weight at position ``weight_position``."""

    weight_position: int
    key: Hashable
    build: Callable[[Tensor], tuple[Tensor, ...]]


@dataclass
class Lowering:
    """A graph on its way to Inductor.

    Attributes:
        gm: a private copy of Dynamo's graph module.
        example_inputs: one a placeholder; grows with ``derived``.
        inference: no gradient will be asked for.
        layers: every linear and convolution of the graph, in execution order.
        derived: extra inputs, in the order of their placeholders.
        number: counts the graphs that this process lowered; names graph dumps.
    """

    gm: fx.GraphModule
    example_inputs: list
    options: Options
    inference: bool
    layers: list[LayerNode] = field(default_factory=list)
    derived: list[DerivedInput] = field(default_factory=list)
    number: int = field(default_factory=itertools.count().__next__)
    _placeholders: dict = field(default_factory=dict)

    def add_derived(
        self, weight: fx.Node, key: Hashable, build: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> tuple[fx.Node, ...]:
        """Placeholders for the tensors that ``build`` derives from ``weight``; the same ones for the same key."""
        known = self._placeholders.get((weight, key))
        if known is not None:
            return known
        graph = self.gm.graph
        inputs = graph.find_nodes(op="placeholder", sort=True)
        position = inputs.index(weight)
        (tensors,) = derived_weights.get([Request(self.example_inputs[position], key, build)])
        nodes = []
        with graph.inserting_after(inputs[-1]):
            for i, tensor in reversed(list(enumerate(tensors))):
                node = graph.placeholder(f"{weight.name}_derived{i}_{len(self.derived)}")
                node.meta["example_value"] = _static_fake(tensor)
                node._dynamo_source = None  # AOTAutograd looks for the attribute on every placeholder
                torch._dynamo.mark_static_address(tensor, guard=False)
                nodes.insert(0, node)
        self.example_inputs.extend(tensors)
        self.derived.append(DerivedInput(position, key, build))
        self._placeholders[weight, key] = tuple(nodes)
        return tuple(nodes)


def _static_fake(tensor: Tensor) -> Tensor:
    """The fake tensor of the compilation under way for ``tensor``, with sizes that are numbers.

    AOTAutograd would give symbolic sizes to an input that Dynamo did not announce; a guard on one of them has no source
    to read it from, and compiling fails. It takes this fake instead, for as long as somebody holds it.
    """
    fake_mode = torch._guards.detect_fake_mode()
    return tensor if fake_mode is None else fake_mode.from_tensor(tensor, static_shapes=True)
