"""find_regions: who writes, who reads, and what is in the way; channels followed through moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler.passes.normalize import normalize
from qcompiler.program import capture
from qcompiler.regions import Region, channel_axis, find_regions
from qcompiler.rewrite import Draft
from qcompiler.scaling import merge_obstacle, scale_writer

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Formula(nn.Module):
    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Found:
    """The regions of a module, by the module path of their writers."""

    def __init__(self, module: nn.Module, x: Tensor = X) -> None:
        torch.manual_seed(0)
        self.draft = Draft(normalize(capture(module, (x,))))
        self.regions = find_regions(self.draft)

    def of(self, *paths: str) -> Region:
        """The region whose writers come from exactly these modules."""
        for region in self.regions:
            if {path(w) for w in region.writers} == set(paths):
                return region
        written = [[path(w) for w in r.writers] for r in self.regions]
        raise AssertionError(f"no region is written by {paths}; there are {written}")


def path(node: Any) -> str:
    return [p for p, _ in node.meta["nn_module_stack"].values()][-1]


def readers(region: Region) -> dict[str, list[int]]:
    return {path(r.node): r.channels.tolist() for r in region.readers}


def reasons(region: Region) -> list[str]:
    return [b.reason for b in region.blockers]


def test_one_linear_reads_another() -> None:
    found = Found(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)))
    region = found.of("0")
    assert region.size == 6
    assert readers(region) == {"1": [0, 1, 2, 3, 4, 5]}
    assert region.blockers == []
    assert not region.only_scale
    assert merge_obstacle(found.draft, region) is None
    last = found.of("1")
    assert last.readers == []
    assert reasons(last) == ["it is an output of the model"]
    assert merge_obstacle(found.draft, last) == "it is an output of the model"


def attention(kv_heads: int, repeat: str) -> Formula:
    """4 query heads of 2 channels."""

    def function(m: Any, x: Tensor) -> Tensor:
        q = m.q(x).view(2, 5, 4, 2).transpose(1, 2)
        k, v = (f(x).view(2, 5, kv_heads, 2).transpose(1, 2) for f in (m.k, m.v))
        count = 4 // kv_heads
        if repeat == "expand":
            k, v = (
                t[:, :, None].expand(2, kv_heads, count, 5, 2).reshape(2, 4, 5, 2) for t in (k, v)
            )
        elif repeat == "interleave":
            k, v = (t.repeat_interleave(count, dim=1) for t in (k, v))
        if repeat == "eager":
            weights = torch.softmax(q @ k.transpose(2, 3) / 2**0.5, dim=-1)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=repeat == "torch")
        return m.o(y.transpose(1, 2).reshape(2, 5, 8))

    narrow = 2 * kv_heads
    return Formula(
        function,
        q=nn.Linear(8, 8),
        k=nn.Linear(8, narrow),
        v=nn.Linear(8, narrow),
        o=nn.Linear(8, 8),
    )


@pytest.mark.parametrize("repeat", ["torch", "expand", "interleave"])
def test_values_reach_the_output_projection_through_grouped_heads(repeat: str) -> None:
    """Input channel j of O is channel (j mod size) of value head j // (size · repetitions)."""
    found = Found(attention(2, repeat))
    region = found.of("v")
    assert region.size == 4
    assert readers(region) == {"o": [0, 1, 0, 1, 2, 3, 2, 3]}
    assert region.blockers == []
    assert not region.only_scale
    for name in ("q", "k"):
        assert found.of(name).readers == []
        assert reasons(found.of(name)) == ["scaled_dot_product_attention takes it as query or key"]


@pytest.mark.parametrize("repeat", ["torch", "eager"])
def test_values_of_full_heads(repeat: str) -> None:
    region = Found(attention(4, repeat)).of("v")
    assert readers(region) == {"o": list(range(8))}
    assert region.blockers == []
    assert not region.only_scale  # softmax sums to one: a shift passes


def test_the_channel_map_is_what_the_numbers_do() -> None:
    """Scale V's rows by s, O's columns by 1/s[channels]: the module computes the same."""
    module = attention(2, "expand")
    region = Found(module).of("v")
    scale = torch.tensor([0.5, 2.0, 3.0, 0.1], dtype=torch.float64)
    wide = module.double()
    with torch.no_grad():
        expected = wide(X.double())
        wide.v.weight /= scale[:, None]
        wide.v.bias /= scale
        wide.o.weight *= scale[region.readers[0].channels]
        np.testing.assert_allclose(wide(X.double()), expected, rtol=1e-12)


def test_attention_without_a_head_axis_is_in_the_way() -> None:
    module = Formula(
        lambda m, x: m.o(F.scaled_dot_product_attention(x, x, m.v(x))),
        v=nn.Linear(8, 8),
        o=nn.Linear(8, 8),
    )
    region = Found(module).of("v")
    assert region.readers == []
    assert "does not take it as (batch, heads, sequence, size)" in reasons(region)[0]


def test_a_matrix_that_is_no_softmax_lets_a_scale_pass_alone() -> None:
    module = Formula(
        lambda m, x: m.o(torch.tanh(x[:, :, :5]) @ m.v(x)), v=nn.Linear(8, 6), o=nn.Linear(6, 2)
    )
    region = Found(module).of("v")
    assert readers(region) == {"o": [0, 1, 2, 3, 4, 5]}
    assert region.only_scale


def test_gated_layers() -> None:
    module = Formula(
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
        gate=nn.Linear(8, 6),
        up=nn.Linear(8, 6),
        down=nn.Linear(6, 8),
    )
    found = Found(module)
    assert readers(found.of("up")) == {"down": [0, 1, 2, 3, 4, 5]}
    assert found.of("up").only_scale
    assert found.of("up").blockers == []
    assert found.of("gate").readers == []
    assert "silu" in reasons(found.of("gate"))[0]


def squared(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(h * h)


def squared_later(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(torch.relu(h) * h.view(2, 5, 6))


@pytest.mark.parametrize("function", [squared, squared_later])
def test_a_product_with_itself_is_not_linear(function: Any) -> None:
    found = Found(Formula(function, a=nn.Linear(8, 6), b=nn.Linear(6, 2)))
    region = found.of("a")
    assert region.blockers
    assert merge_obstacle(found.draft, region) == region.blockers[0].reason


def test_division_by_it_is_in_the_way_and_division_of_it_is_not() -> None:
    module = Formula(lambda m, x: m.b(2.0 / m.a(x)), a=nn.Linear(8, 6), b=nn.Linear(6, 2))
    assert Found(module).of("a").blockers
    module = Formula(lambda m, x: m.b(m.a(x) / 2.0), a=nn.Linear(8, 6), b=nn.Linear(6, 2))
    region = Found(module).of("a")
    assert readers(region) == {"b": [0, 1, 2, 3, 4, 5]}
    assert region.blockers == []


class Block(nn.Module):
    """Embedding of tokens and of positions, and a residual branch."""

    def __init__(self, post: nn.Module) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(5, 8)
        self.inner, self.outer = nn.Linear(8, 6), nn.Linear(6, 8)
        self.post = post

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(5))
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.post(x)


IDS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))


def test_a_residual_stream_has_all_its_writers() -> None:
    found = Found(Block(nn.Linear(8, 3)), IDS)
    region = found.of("tokens", "places", "outer")
    assert readers(region) == {"inner": list(range(8)), "post": list(range(8))}
    assert region.blockers == []
    assert not region.only_scale
    assert merge_obstacle(found.draft, region) is None
    inner = found.of("inner")
    assert readers(inner) == {"outer": [0, 1, 2, 3, 4, 5]}
    assert inner.only_scale


def test_the_order_of_the_embeddings_does_not_matter() -> None:
    """A position embedding that is computed first broadcasts over the batch."""

    class Swapped(Block):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.places(torch.arange(5)) + self.tokens(ids)
            return self.post(x)

    region = Found(Swapped(nn.Linear(8, 3)), IDS).of("places", "tokens")
    assert readers(region) == {"post": list(range(8))}
    assert region.blockers == []


def test_the_numbers_of_a_whole_stream() -> None:
    """Every writer of the stream scaled, every reader unscaled: the same function."""
    module = Block(nn.Linear(8, 3))
    program = normalize(capture(module, (IDS,)))
    expected = program.run((IDS,), double=True)[0]
    draft = Draft(program)
    (region,) = [r for r in find_regions(draft) if len(r.writers) == 3]
    scale = torch.linspace(0.5, 3.0, 8, dtype=torch.float64)
    for writer in region.writers:
        scale_writer(draft, writer, scale, torch.zeros(8, dtype=torch.float64))
    for reader in region.readers:
        weight = draft.constant(reader.node.args[1])
        draft.set_constant(reader.node.args[1], (weight * scale[reader.channels]).float())
    after = type(program)(draft.finish())
    torch.testing.assert_close(after.run((IDS,), double=True)[0], expected, rtol=1e-6, atol=1e-6)


def test_a_norm_closes_the_stream() -> None:
    found = Found(Block(nn.LayerNorm(8)), IDS)
    region = found.of("tokens", "places", "outer")
    assert "layer_norm" in reasons(region)[0]
    norm = found.of("post")
    assert reasons(norm) == ["it is an output of the model"]


def test_a_summand_without_weights_is_in_the_way() -> None:
    module = Formula(lambda m, x: m.b(m.a(x) + x), a=nn.Linear(8, 8), b=nn.Linear(8, 2))
    found = Found(module)
    region = found.of("a")
    assert "adds x, which cannot be scaled" in reasons(region)[0]
    assert merge_obstacle(found.draft, region) is not None
    module = Formula(lambda m, x: m.b(m.a(x) + 1.0), a=nn.Linear(8, 8), b=nn.Linear(8, 2))
    assert "adds something that cannot be scaled" in reasons(Found(module).of("a"))[0]


def test_heads_of_another_size_do_not_confuse_a_sum() -> None:
    """A sum after the split into heads: its last axis is not the writer's."""
    module = Formula(
        lambda m, x: m.b((m.a(x).view(2, 5, 2, 4) + x.view(2, 5, 2, 4)).reshape(2, 5, 8)),
        a=nn.Linear(8, 8),
        b=nn.Linear(8, 2),
    )
    assert "adds something that cannot be scaled" in reasons(Found(module).of("a"))[0]


def test_convolutions() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, groups=6)
    )
    found = Found(module, torch.randn(1, 3, 9, 9))
    assert readers(found.of("0")) == {"2": [0, 1, 2, 3]}
    assert found.of("0").only_scale
    assert channel_axis(found.of("0").writers[0]) == 1
    assert "grouped convolution" in reasons(found.of("2"))[0]


def test_convolutions_without_a_batch() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1))
    region = Found(module, torch.randn(3, 9, 9)).of("0")
    assert channel_axis(region.writers[0]) == 0
    assert region.size == 4
    assert readers(region) == {"1": [0, 1, 2, 3]}


def test_flattened_images_reach_a_linear_with_repeated_channels() -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(1), nn.Linear(2 * 4, 5))
    region = Found(module, torch.randn(1, 3, 4, 4)).of("0")
    assert readers(region) == {"2": [0, 0, 0, 0, 1, 1, 1, 1]}


def test_channels_that_mix_are_in_the_way() -> None:
    """The sequence becomes the features: one input of the reader sees every channel."""
    module = Formula(lambda m, x: m.b(m.a(x).transpose(1, 2)), a=nn.Linear(8, 6), b=nn.Linear(5, 2))
    assert "mixes channels in one input feature" in reasons(Found(module).of("a"))[0]


def test_slices_and_permutations_are_followed() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        left, right = m.a(x).chunk(2, -1)
        return m.b(left) + m.c(right.view(2, 5, 2, 2).transpose(2, 3).reshape(2, 5, 4))

    module = Formula(function, a=nn.Linear(8, 8), b=nn.Linear(4, 3), c=nn.Linear(4, 3))
    assert readers(Found(module).of("a")) == {"b": [0, 1, 2, 3], "c": [4, 6, 5, 7]}


def test_shared_weights_are_an_obstacle() -> None:
    module = Formula(lambda m, x: m.b(m.a(x)) + m.b(x).sum(), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    found = Found(module)
    assert merge_obstacle(found.draft, found.of("a")) == (
        "the weight of linear_1 (b) has another reader"
    )
    module = Formula(lambda m, x: m.b(m.a(x)) + m.a(x).tanh(), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    found = Found(module)
    region = next(r for r in found.regions if readers(r) == {"b": list(range(8))})
    assert merge_obstacle(found.draft, region) == "the weight of linear (a) has another reader"


@pytest.mark.parametrize("writer", [nn.Linear(8, 6), nn.Linear(8, 6, bias=False), nn.LayerNorm(8)])
def test_a_writer_takes_scale_and_shift(writer: nn.Module) -> None:
    """Y ↦ (y − z)/s, in numpy, on a writer that has or has not a bias."""
    size = 8 if isinstance(writer, nn.LayerNorm) else 6
    program = normalize(capture(nn.Sequential(writer, nn.Linear(size, 2)), (X,)))
    draft = Draft(program)
    region = find_regions(draft)[0]
    scale = torch.linspace(0.5, 2.0, size, dtype=torch.float64)
    shift = torch.linspace(-1.0, 1.0, size, dtype=torch.float64)
    name = region.writers[0].name
    values: dict[str, Tensor] = {}
    program.run((X,), lambda node, value: values.__setitem__(node.name, value), double=True)
    before = values[name].numpy()
    scale_writer(draft, region.writers[0], scale, shift)
    after = type(program)(draft.finish())
    after.run((X,), lambda node, value: values.__setitem__(node.name, value), double=True)
    expected = (before - shift.numpy()) / scale.numpy()
    np.testing.assert_allclose(values[name].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_regions_of_the_tiny_models(
    tiny: Callable[[str], Any], golden: Callable[[str, str], None]
) -> None:
    lines = []
    for name in ("attention-block", "gqa-decoder", "conv-block", "tied-weights"):
        lines.append(name)
        for region in find_regions(Draft(tiny(f"tiny-{name}").normalized)):
            write = ", ".join(w.name for w in region.writers)
            read = ", ".join(r.node.name for r in region.readers)
            kind = ", only scale" if region.only_scale else ""
            lines.append(f"  {write} → {read or 'nothing'} ({region.size} channels{kind})")
            lines += [f"    blocked: {reason}" for reason in reasons(region)]
    golden("regions", "\n".join(lines))
