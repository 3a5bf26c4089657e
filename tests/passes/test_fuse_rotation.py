"""Rotations: where they go, that they keep the function, that they spread, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler.hadamard import randomized
from qcompiler.passes.fold_norm import fold_norm
from qcompiler.passes.fuse_rotation import fuse_rotation
from qcompiler.passes.normalize import normalize
from qcompiler.passes.untie_weights import untie_weights
from qcompiler.program import Program, capture
from qcompiler.testing import check_contract
from qcompiler.verify import relative

WIDTH, HEADS = 24, 2
IDS = torch.arange(20).view(2, 10)


class Block(nn.Module):
    """Embedding, norm, attention, norm, feed-forward, norm, head; what differs is an argument."""

    def __init__(
        self,
        norm: Callable[[], nn.Module] = lambda: nn.RMSNorm(WIDTH),
        bias: bool = False,
        kv_heads: int = HEADS,
        fused: bool = False,
        parallel: bool = False,
        tied: bool = False,
    ) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.kv_heads, self.size, self.parallel = kv_heads, size, parallel
        self.embed, self.position = nn.Embedding(32, WIDTH), nn.Embedding(16, WIDTH)
        self.sizes = [WIDTH, kv_heads * size, kv_heads * size]
        self.qkv = nn.ModuleList(
            [nn.Linear(WIDTH, sum(self.sizes), bias=bias)]
            if fused
            else [nn.Linear(WIDTH, width, bias=bias) for width in self.sizes]
        )
        self.out = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.up, self.down = nn.Linear(WIDTH, 40, bias=bias), nn.Linear(40, WIDTH, bias=bias)
        self.norms = nn.ModuleList([norm() for _ in range(3)])
        self.head = nn.Linear(WIDTH, 32, bias=bias)
        if tied:
            self.head.weight = self.embed.weight
        with torch.no_grad():
            for parameter in self.norms.parameters():
                parameter.add_(0.4 * torch.rand_like(parameter))

    def attend(self, x: Tensor) -> Tensor:
        parts = [layer(x) for layer in self.qkv]
        q, k, v = parts if len(parts) == 3 else parts[0].split(self.sizes, -1)
        q, k, v = (t.unflatten(-1, (-1, self.size)).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.kv_heads != HEADS
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        if self.parallel:
            normed = self.norms[0](x)
            x = x + self.attend(normed) + self.down(F.gelu(self.up(normed)))
        else:
            x = x + self.attend(self.norms[0](x))
            x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x))


def prepared(module: nn.Module) -> tuple[Program, Program]:
    """A module as captured, and as `fuse_rotation` wants it."""
    captured = capture(module.eval(), (IDS,))
    return captured, fold_norm(untie_weights(normalize(captured)), center=True)


def notes(program: Program) -> list[str]:
    return list(program.history[-1].notes)


def float64(module: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = module.double()(IDS)
    module.float()
    return result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"norm": lambda: nn.LayerNorm(WIDTH), "bias": True},
        {"kv_heads": 1},
        {"fused": True, "bias": True},
        {"fused": True, "kv_heads": 1},
        {"parallel": True, "norm": lambda: nn.LayerNorm(WIDTH), "bias": True},
        {"tied": True},
    ],
    ids=["rms", "bias", "layernorm", "mqa", "fused-qkv", "fused-mqa", "parallel", "tied"],
)
def test_rotations_keep_the_function(options: dict[str, Any]) -> None:
    module = Block(**options)
    _, program = prepared(module)
    after = check_contract(
        fuse_rotation, program, [(IDS,)], idempotent=False, seed=3, inputs=True, keys=True
    )
    assert not after.history[-1].refusals
    norms = 2 if options.get("parallel") else 3
    assert notes(after)[0] == f"R1: Hadamard 12 ⊗ 2 over 4 writers, {norms} norms"
    assert [n.partition(":")[0] for n in notes(after)] == ["R1", "R2", "R2", "R4", "R3"]
    assert relative([float64(module)], [after.run((IDS,))[0]]) < 1e-5


def test_the_weights_are_rotated_as_the_formula_says() -> None:
    module = Block(bias=True)
    _, program = prepared(module)
    after = fuse_rotation(program, seed=3)
    matrix = randomized(WIDTH, 3).matrix()
    heads = torch.block_diag(*[randomized(WIDTH // HEADS, 4).matrix()] * HEADS)

    def weight(owner: Program, path: str, index: int = 1) -> Tensor:
        for node in owner.exported.graph.nodes:
            stack = node.meta.get("nn_module_stack") or {}
            if len(node.args) > 1 and [p for p, _ in stack.values()][-1:] == [path]:
                value: Tensor = owner.constants()[node.args[index].name]
                return value.double()
        raise AssertionError(path)

    torch.testing.assert_close(
        weight(after, "embed", 0), weight(program, "embed", 0) @ matrix, rtol=1e-5, atol=1e-6
    )
    expected = {
        "qkv.0": weight(program, "qkv.0") @ matrix,
        "qkv.2": heads.T @ weight(program, "qkv.2") @ matrix,
        "out": matrix.T @ weight(program, "out") @ heads,
        "up": weight(program, "up") @ matrix,
        "down": matrix.T @ weight(program, "down"),
        "head": weight(program, "head") @ matrix,
    }
    for path, value in expected.items():
        torch.testing.assert_close(weight(after, path), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        weight(after, "down", 2), weight(program, "down", 2) @ matrix, rtol=1e-5, atol=1e-6
    )


def test_outliers_are_spread() -> None:
    module = Block()
    with torch.no_grad():
        module.embed.weight[:, 5] *= 40
    _, program = prepared(module)
    after = fuse_rotation(program)
    peaks = []
    for owner in (program, after):
        seen: list[Tensor] = []
        owner.run(
            (IDS,),
            lambda n, v, seen=seen: seen.append(v) if "rms_norm" in str(n.target) else None,
        )
        peaks.append(float(seen[0].abs().amax() / seen[0].square().mean().sqrt()))
    assert peaks[0] > 4.5
    assert peaks[1] < 3.0


def test_tiny_decoder_as_text(
    tiny: Callable[[str], Any], golden_pair: Callable[[str, Program, Program], None]
) -> None:
    program = fold_norm(tiny("tiny-gqa-decoder").normalized, center=True)
    golden_pair("fuse_rotation", program, fuse_rotation(program, inputs=True, keys=True))


def test_post_norm_blocks_are_refused(
    tiny: Callable[[str], Any], reasons: Callable[[Program], list[str]]
) -> None:
    program = fold_norm(tiny("tiny-post-norm-block").normalized, center=True)
    after = fuse_rotation(program)
    assert any("R1: " in reason and "a scale of its own" in reason for reason in reasons(after))
    assert notes(after)[-1] == "R2: 1 attentions"


def test_a_stream_that_is_an_output_is_refused(
    tiny: Callable[[str], Any], reasons: Callable[[Program], list[str]]
) -> None:
    program = fold_norm(tiny("tiny-attention-block").normalized, center=True)
    assert any(
        "R1: it is an output of the model" in reason for reason in reasons(fuse_rotation(program))
    )


def test_values_that_are_gated_are_refused(reasons: Callable[[Program], list[str]]) -> None:
    class Gated(Block):
        def attend(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in self.qkv)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.out(mixed * torch.sigmoid(x))

    after = fuse_rotation(prepared(Gated())[1])
    assert any("R2: an op between the values" in reason for reason in reasons(after))


def test_an_unfolded_scale_is_refused(reasons: Callable[[Program], list[str]]) -> None:
    program = normalize(capture(Block().eval(), (IDS,)))
    after = fuse_rotation(program)
    assert any("R1: the scale of" in reason for reason in reasons(after))


def test_a_shared_weight_is_refused(reasons: Callable[[Program], list[str]]) -> None:
    program = fold_norm(normalize(capture(Block(tied=True).eval(), (IDS,))), center=True)
    assert any("has another reader" in reason for reason in reasons(fuse_rotation(program)))


def test_untying_notes_its_cost() -> None:
    program = normalize(capture(Block(tied=True).eval(), (IDS,)))
    after = check_contract(untie_weights, program, [(IDS,)])
    assert "untied from its embedding: 0.0 MB more in float" in notes(after)[0]
    assert untie_weights(normalize(capture(Block().eval(), (IDS,)))).history[-1].changed is False


def test_a_stream_scaled_by_one_number_is_rotated() -> None:
    class Scaled(Block):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids) * 4.5
            x = x + 0.3 * self.attend(self.norms[0](x))
            return self.head(self.norms[2](x))

    module = Scaled(norm=lambda: nn.LayerNorm(WIDTH))
    after = check_contract(fuse_rotation, prepared(module)[1], [(IDS,)], idempotent=False)
    assert notes(after)[0] == "R1: Hadamard 12 ⊗ 2 over 2 writers, 2 norms"


def test_values_that_join_a_cache_are_refused(reasons: Callable[[Program], list[str]]) -> None:
    class Cached(Block):
        def attend(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in self.qkv)
            k, v = (torch.cat([t.new_zeros(2, HEADS, 3, 12), t], 2) for t in (k, v))
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.out(mixed)

    after = fuse_rotation(prepared(Cached())[1])
    assert any("R2: cat" in r and "gives the values, not a linear" in r for r in reasons(after))
    assert notes(after)[0].startswith("R1: Hadamard")
