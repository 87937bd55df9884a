"""Each operator's rule: all the freedom it grants leaves the function as it was, and it grants what it should."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sparsedm_compile.permutation.layout import runs


class Net(nn.Module):
    """Layers by name, and a function of them."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            if isinstance(layer, nn.Parameter) or not isinstance(layer, torch.Tensor):
                setattr(self, name, layer)
            else:
                self.register_buffer(name, layer)

    def forward(self, *inputs):
        return self.run(self, *inputs)


def lin(inputs, outputs, **options):
    return nn.Linear(inputs, outputs, **options)


def conv(inputs, outputs, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def vector(*shape):
    return nn.Parameter(torch.randn(shape))


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def by_hand(query, key, value):
    return (query @ key.transpose(-1, -2) / 2).softmax(-1) @ value


def attend(net, x, attention=F.scaled_dot_product_attention):
    query, key, value = (heads(layer(x), 2) for layer in (net.q, net.k, net.v))
    return net.out(attention(query, key, value).transpose(1, 2).flatten(2))


def qkv(net, x):
    query, key, value = net.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return net.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def geglu(net, x):
    value, gate = net.up(x).chunk(2, dim=-1)
    return net.down(value * F.gelu(gate))


def modulated(net, x):
    shift, scale = net.ada(F.silu(net.embed(x[:, 0]))).unsqueeze(1).chunk(2, -1)
    return net.down(net.norm(net.up(x)) * (1 + scale) + shift)


def table(net, x):
    rows = (net.table[None] + net.ada(x[:, 0]).reshape(2, 2, 8)).unbind(1)
    return net.down(net.up(x) * rows[0].unsqueeze(1) + rows[1].unsqueeze(1))


def mix(net, x, **options):
    """Attention among the channels: they are its positions."""
    x = net.a(x.mT).mT
    return net.b(F.scaled_dot_product_attention(x, x, x, **options).mT)


TOKENS, IMAGE = (2, 5, 4), (2, 3, 6, 6)
ATTENTION = {"q": lin(4, 8), "k": lin(4, 8), "v": lin(4, 8), "out": lin(8, 4)}

# name: net, shape of the input, axis, (channels, free)
FREE = {
    "mlp": (Net(lambda n, x: n.b(F.gelu(n.a(x))), a=lin(4, 8), b=lin(8, 4)), TOKENS, "b.weight[1]", (8, 8)),
    "residual": (
        Net(lambda n, x: n.c((h := n.a(x)) + n.b(h)), a=lin(4, 8), b=lin(8, 8), c=lin(8, 4)),
        TOKENS, "b.weight[1]", (8, 8),
    ),
    "layer norm": (
        Net(lambda n, x: n.b(n.norm(n.a(x))), a=lin(4, 8), norm=nn.LayerNorm(8), b=lin(8, 4)),
        TOKENS, "norm.weight[0]", (8, 8),
    ),
    "rms norm": (
        Net(lambda n, x: n.b(n.norm(n.a(x))), a=lin(4, 8), norm=nn.RMSNorm(8), b=lin(8, 4)),
        TOKENS, "norm.weight[0]", (8, 8),
    ),
    "norm by hand": (
        Net(
            lambda n, x: n.b((h := n.a(x)) * torch.rsqrt(h.pow(2).mean(-1, keepdim=True)) * n.scale),
            a=lin(4, 8), b=lin(8, 4), scale=vector(8),
        ),
        TOKENS, "scale[0]", (8, 8),
    ),
    "in place": (
        Net(lambda n, x: n.b(F.relu(n.a(x), inplace=True).mul_(n.scale)), a=lin(4, 8), b=lin(8, 4), scale=vector(8)),
        TOKENS, "b.weight[1]", (8, 8),
    ),
    "position table": (
        Net(lambda n, x: n.b(n.a(x) + n.table), a=lin(4, 8), b=lin(8, 4), table=vector(1, 5, 8)),
        TOKENS, "table[2]", (8, 8),
    ),
    "token beside tokens": (
        Net(
            lambda n, x: n.b(torch.cat([n.token.expand(2, 1, 8), n.a(x)], 1)),
            a=lin(4, 8), b=lin(8, 4), token=vector(1, 1, 8),
        ),
        TOKENS, "token[2]", (8, 8),
    ),
    "long skip": (
        Net(lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], -1)), a=lin(4, 8), b=lin(4, 4), c=lin(12, 4)),
        TOKENS, "c.weight[1]", (12, 12),
    ),
    "cat with itself": (
        Net(lambda n, x: n.c(torch.cat([h := n.a(x), h], -1)), a=lin(4, 8), c=lin(16, 4)),
        TOKENS, "c.weight[1]", (8, 8),
    ),
    "cat of coupled streams": (
        Net(lambda n, x: n.c(torch.cat([(h := n.a(x)), h + n.b(h)], -1)), a=lin(4, 8), b=lin(8, 8), c=lin(16, 4)),
        TOKENS, "c.weight[1]", (8, 8),
    ),
    "cat beside an input": (
        Net(lambda n, x: n.b(torch.cat([n.a(x), x], -1)), a=lin(4, 8), b=lin(12, 4)), TOKENS, "b.weight[1]", (12, 8),
    ),
    "slices": (
        Net(lambda n, x: n.b((h := n.a(x))[..., :4]) + n.c(h[..., 4:]), a=lin(4, 8), b=lin(4, 4), c=lin(4, 4)),
        TOKENS, "a.weight[0]", (8, 8),
    ),
    "slice across tokens": (
        Net(lambda n, x: n.b(n.a(x).flatten(1)[:, 4:12]), a=lin(4, 8), b=lin(8, 4)), TOKENS, "a.weight[0]", (8, 8),
    ),
    "transposed across tokens": (
        Net(
            lambda n, x: n.b(n.a(x).flatten(1).unflatten(1, (3, 10)).transpose(1, 2).flatten(1)),
            a=lin(4, 6), b=lin(30, 4),
        ),
        TOKENS, "a.weight[0]", (6, 6),
    ),
    "slice across a cat with itself": (
        Net(
            lambda n, x: n.b((torch.cat([h := n.a(x), h], -1) * n.scale)[..., 4:12]),
            a=lin(4, 8), b=lin(8, 4), scale=vector(16),
        ),
        TOKENS, "a.weight[0]", (8, 8),
    ),
    "one channel picked": (
        Net(lambda n, x: n.b(h := n.a(x)) * h[..., 3].unsqueeze(-1), a=lin(4, 8), b=lin(8, 4)),
        TOKENS, "b.weight[1]", (8, 7),
    ),
    "gated": (Net(geglu, up=lin(4, 16), down=lin(8, 4)), TOKENS, "down.weight[1]", (8, 8)),
    "glu": (Net(lambda n, x: n.b(F.glu(n.a(x), -1)), a=lin(4, 16), b=lin(8, 4)), TOKENS, "b.weight[1]", (8, 8)),
    "adaptive norm": (
        Net(
            modulated,
            up=lin(4, 8), embed=lin(4, 4), ada=lin(4, 16), down=lin(8, 4),
            norm=nn.LayerNorm(8, elementwise_affine=False),
        ),
        TOKENS, "down.weight[1]", (8, 8),
    ),
    "adaptive table": (
        Net(table, up=lin(4, 8), ada=lin(4, 16), down=lin(8, 4), table=vector(2, 8)),
        TOKENS, "down.weight[1]", (8, 8),
    ),
    "attention values": (Net(attend, **ATTENTION), TOKENS, "out.weight[1]", (8, 8)),
    "attention queries": (Net(attend, **ATTENTION), TOKENS, "q.weight[0]", (8, 8)),
    "attention among channels": (Net(mix, a=lin(5, 8), b=lin(8, 4)), TOKENS, "b.weight[1]", (8, 8)),
    "masked attention among channels": (
        Net(lambda n, x: mix(n, x, attn_mask=n.mask), a=lin(5, 8), b=lin(8, 4), mask=vector(8, 8)),
        TOKENS, "mask[1]", (8, 8),
    ),
    "attention by hand": (Net(lambda n, x: attend(n, x, by_hand), **ATTENTION), TOKENS, "out.weight[1]", (8, 8)),
    "attention from one product": (Net(qkv, qkv=lin(4, 24), out=lin(8, 4)), TOKENS, "qkv.weight[0]", (16, 16)),
    "normed heads": (
        Net(
            lambda n, x: n.out(n.norm(heads(n.a(x), 2)).transpose(1, 2).flatten(2)),
            a=lin(4, 8), norm=nn.LayerNorm(4), out=lin(8, 4),
        ),
        TOKENS, "a.weight[0]", (4, 4),
    ),
    "softmax over channels": (
        Net(lambda n, x: n.b(n.a(x).softmax(-1)), a=lin(4, 8), b=lin(8, 4)), TOKENS, "b.weight[1]", (8, 8),
    ),
    "mean over tokens": (
        Net(lambda n, x: n.b(n.a(x).mean(1)), a=lin(4, 8), b=lin(8, 4)), TOKENS, "b.weight[1]", (8, 8),
    ),
    "mixer": (
        Net(
            lambda n, x: n.b(F.gelu(n.a(x.transpose(1, 2)))).transpose(1, 2), a=lin(5, 8), b=lin(8, 5),
        ),
        TOKENS, "b.weight[1]", (8, 8),
    ),
    "tied layers": (
        Net(lambda n, x: n.b(n.a(n.a(n.up(x)))), up=lin(4, 8), a=lin(8, 8), b=lin(8, 4)), TOKENS, "a.weight[1]", (8, 8),
    ),
    "conv": (Net(lambda n, x: n.b(F.silu(n.a(x))), a=conv(3, 8), b=conv(8, 3)), IMAGE, "b.weight[1]", (8, 8)),
    "pool, upsample, pad": (
        Net(
            lambda n, x: n.b(F.pad(F.interpolate(F.avg_pool2d(n.a(x), 2), scale_factor=2.0), (1, 1))),
            a=conv(3, 8), b=conv(8, 3),
        ),
        IMAGE, "b.weight[1]", (8, 8),
    ),
    "batch norm": (
        Net(lambda n, x: n.b(n.norm(n.a(x))), a=conv(3, 8), norm=nn.BatchNorm2d(8), b=conv(8, 3)),
        IMAGE, "norm.running_var[0]", (8, 8),
    ),
    "group norm": (
        Net(lambda n, x: n.b(n.norm(n.a(x))), a=conv(3, 8), norm=nn.GroupNorm(2, 8), b=conv(8, 3)),
        IMAGE, "b.weight[1]", (8, 8),
    ),
    "group norm over a skip": (
        Net(
            lambda n, x: n.c(n.norm(torch.cat([n.a(x), n.b(x)], 1))),
            a=conv(3, 6), b=conv(3, 2), norm=nn.GroupNorm(2, 8), c=conv(8, 3),
        ),
        IMAGE, "c.weight[1]", (8, 8),
    ),
    "depthwise conv": (
        Net(lambda n, x: n.c(n.b(n.a(x))), a=conv(3, 8), b=conv(8, 8, groups=8), c=conv(8, 3)),
        IMAGE, "b.weight[0]", (8, 8),
    ),
    "grouped conv's outputs": (
        Net(lambda n, x: n.c(n.b(n.a(x))), a=conv(3, 8), b=conv(8, 8, groups=2), c=conv(8, 3)),
        IMAGE, "c.weight[1]", (8, 8),
    ),
    "conv into linear": (
        Net(lambda n, x: n.b(F.relu(n.a(x)).flatten(1)), a=conv(3, 8), b=lin(8 * 36, 4)), IMAGE, "b.weight[1]", (8, 8),
    ),
    "image to tokens": (
        Net(lambda n, x: n.b(n.a(x).flatten(2).transpose(1, 2)), a=conv(3, 8), b=lin(8, 4)),
        IMAGE, "b.weight[1]", (8, 8),
    ),
}  # fmt: skip

# name: net, shape of the input, axis, words of the reason
PINNED = {
    "input": (Net(lambda n, x: n.a(x), a=lin(4, 4)), TOKENS, "a.weight[1]", "is an input of the model"),
    "output": (Net(lambda n, x: n.a(x), a=lin(4, 4)), TOKENS, "a.weight[0]", "leaves the model as output"),
    "computed constant": (
        Net(lambda n, x: n.b(n.a(x) + torch.arange(8.0)), a=lin(4, 8), b=lin(8, 4)),
        TOKENS, "b.weight[1]", "computed by arange",
    ),
    "unknown operator": (
        Net(lambda n, x: n.b(n.a(x).roll(1, -1)), a=lin(4, 8), b=lin(8, 4)),
        TOKENS, "a.weight[0]", "roll is not understood",
    ),
    "what an unknown operator made": (
        Net(lambda n, x: n.b(n.a(x).roll(1, -1)), a=lin(4, 8), b=lin(8, 4)),
        TOKENS, "b.weight[1]", "computed by roll",
    ),
    "cumulative sum": (
        Net(lambda n, x: n.b(n.a(x).cumsum(-1)), a=lin(4, 8), b=lin(8, 4)),
        TOKENS, "b.weight[1]", "computed by cumsum",
    ),
    "added to its flip": (
        Net(lambda n, x: n.b((h := n.a(x)) + h.flip(-1)), a=lin(4, 8), b=lin(8, 4)),
        TOKENS, "a.weight[0]", "flip is not understood",
    ),
    "copied into": (
        Net(lambda n, x: n.b(torch.zeros(2, 5, 8, dtype=x.dtype).copy_(n.a(x))), a=lin(4, 8), b=lin(8, 4)),
        TOKENS, "a.weight[0]", "copy_ is not understood",
    ),
    "rows of an embedding": (
        Net(lambda n, x: n.b(n.e((x[..., 0] > 0).long())), e=nn.Embedding(2, 8), b=lin(8, 4)),
        TOKENS, "e.weight[0]", "chosen by an index",
    ),
    "grouped conv's inputs": (
        Net(lambda n, x: n.b(n.a(x)), a=conv(3, 8), b=conv(8, 4, groups=2)),
        IMAGE, "a.weight[0]", "grouped convolution",
    ),
    "conv over a batch of channels": (
        Net(
            lambda n, x: n.b(n.conv(n.a(x[:, 0]).reshape(16, 1, 1)).reshape(2, 8)),
            a=lin(4, 8), b=lin(8, 4), conv=nn.Conv1d(1, 1, 1),
        ),
        TOKENS, "a.weight[0]", "conv1d is not understood",
    ),
    "causal attention among channels": (
        Net(lambda n, x: mix(n, x, is_causal=True), a=lin(5, 8), b=lin(8, 4)), TOKENS, "b.weight[1]", "causal mask",
    ),
    "group norm over a batch of channels": (
        Net(
            lambda n, x: n.b(n.norm(n.a(x[:, 0]).reshape(4, 1, 4)).reshape(2, 8)),
            a=lin(4, 8), b=lin(8, 4), norm=nn.GroupNorm(1, 1),
        ),
        TOKENS, "b.weight[1]", "computed by group_norm",
    ),
    "statistics of a batch": (
        Net(
            lambda n, x: n.b(n.norm(n.a(x[:, 0]).reshape(2, 4, 2)).reshape(2, 8)),
            a=lin(4, 8), b=lin(8, 4), norm=nn.BatchNorm1d(4, track_running_stats=False),
        ),
        TOKENS, "b.weight[1]", "computed by batch_norm",
    ),
    "rows of a table of merged channels": (
        Net(
            lambda n, x: n.b(F.embedding((x[..., 0] > 0).long(), n.rows.reshape(4, 4))),
            b=lin(4, 4), rows=vector(16),
        ),
        TOKENS, "rows[0]", "embedding is not understood",
    ),
    "two results": (
        Net(lambda n, x: n.b(torch.frexp(n.a(x)).mantissa), a=lin(4, 8), b=lin(8, 4)),
        TOKENS, "b.weight[1]", "computed by frexp",
    ),
    "bytes": (
        Net(lambda n, x: n.b(n.a(x).view(torch.int32).to(x.dtype) / 2**31), a=lin(4, 8), b=lin(16, 4)),
        TOKENS, "a.weight[0]", "view is not understood",
    ),
    "kernel": (Net(lambda n, x: n.a(x), a=conv(3, 4)), IMAGE, "a.weight[2]", "kernel positions"),
    "tokens of a position table": (
        Net(lambda n, x: n.b(n.a(x) + n.table), a=lin(4, 8), b=lin(8, 4), table=vector(1, 5, 8)),
        TOKENS, "table[1]", "cannot be permuted",
    ),
    "einsum": (
        Net(lambda n, x: n.b(torch.einsum("blc,blc->blc", n.a(x), n.a(x))), a=lin(4, 8), b=lin(8, 4)),
        TOKENS, "b.weight[1]", "computed by einsum",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", FREE)
def test_what_an_operator_leaves_free_changes_nothing(shuffled, freedom, case):
    net, shape, axis, expected = FREE[case]
    solution, moved, difference = shuffled(net, inputs_of(shape))
    assert freedom(solution, axis)[:2] == expected
    assert moved > 0 or expected[1] == 0
    assert difference < 1e-12


@pytest.mark.parametrize("case", PINNED)
def test_what_an_operator_pins_stays_and_says_why(shuffled, freedom, case):
    net, shape, axis, words = PINNED[case]
    solution, _moved, difference = shuffled(net, inputs_of(shape))
    _channels, free, reasons = freedom(solution, axis)
    assert free == 0
    assert words in reasons
    assert difference < 1e-12


def test_heads_do_not_mix(shuffled):
    solution, _moved, _difference = shuffled(FREE["attention values"][0], inputs_of(TOKENS))
    assert sorted(len(family) for family in solution.families) == [4, 4, 4, 4]  # q with k and v, of two heads each


def test_whole_normalisation_groups_trade_places(shuffled):
    solution, _moved, _difference = shuffled(FREE["group norm"][0], inputs_of(IMAGE))
    assert sorted(family.shape[:2] for family in solution.families) == [(2, 4), (4, 1), (4, 1)]


@given(st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=4), st.integers(0, 3), st.data())
def test_runs_map_equal_sizes_in_order(sizes, cuts, data):
    flat = [factor for size in sizes for factor in (size, 1)]
    merged = flat.copy()
    for _ in range(min(cuts, len(merged) - 1)):
        at = data.draw(st.integers(0, len(merged) - 2))
        merged[at : at + 2] = [merged[at] * merged[at + 1]]
    for old, new in ((flat, merged), (merged, flat)):
        pairs = list(runs(old, new))
        assert [i for first, _ in pairs for i in first] == list(range(len(old)))
        assert [i for _, second in pairs for i in second] == list(range(len(new)))
        for first, second in pairs:
            assert torch.Size(old[i] for i in first).numel() == torch.Size(new[i] for i in second).numel()


class Random(nn.Module):
    """A stack of random parts on a stream of width 12, of tokens or of an image."""

    PARTS = ("mlp", "plain", "gated", "attention", "norm", "skip", "slice", "scale", "conv")

    def __init__(self, parts):
        super().__init__()
        self.parts = parts
        self.first, self.last = conv(3, 12), conv(12, 3)
        self.layers = nn.ModuleList()
        for part in parts:
            layers = {
                "mlp": lambda: [lin(12, 8), lin(8, 12)],
                "plain": lambda: [lin(12, 12)],
                "gated": lambda: [lin(12, 16), lin(8, 12)],
                "attention": lambda: [lin(12, 36), lin(12, 12)],
                "norm": lambda: [nn.GroupNorm(3, 12)],
                "skip": lambda: [lin(24, 12)],
                "slice": lambda: [lin(6, 12)],
                "scale": lambda: [nn.LayerNorm(12)],
                "conv": lambda: [conv(12, 8), conv(8, 12)],
            }[part]()
            self.layers.append(nn.ModuleList(layers))

    def forward(self, x):
        x = self.first(x)
        early = x
        for part, layers in zip(self.parts, self.layers, strict=True):
            if part in ("norm", "conv"):
                x = layers[0](x) if part == "norm" else x + layers[1](F.silu(layers[0](x)))
                continue
            tokens = x.flatten(2).transpose(1, 2)
            if part == "mlp":
                tokens = tokens + layers[1](F.gelu(layers[0](tokens)))
            elif part == "gated":
                tokens = tokens + layers[1](F.glu(layers[0](tokens), -1))
            elif part == "attention":
                query, key, value = layers[0](tokens).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
                tokens = layers[1](F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
            elif part == "skip":
                tokens = layers[0](torch.cat([tokens, early.flatten(2).transpose(1, 2)], -1))
            elif part == "slice":
                tokens = tokens + layers[0](tokens[..., 3:9])
            else:
                tokens = layers[0](tokens)
            x = tokens.transpose(1, 2).unflatten(2, (4, 4))
        return self.last(x)


@given(st.lists(st.sampled_from(Random.PARTS), max_size=5), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_random_nets_keep_their_function(shuffled, parts, seed):
    torch.manual_seed(seed)
    _solution, moved, difference = shuffled(Random(parts), torch.randn(2, 3, 4, 4), seed=seed)
    assert moved > 0
    assert difference < 1e-12
