"""The ONNX backend: names, sizes, kernels and numbers, on ONNX Runtime itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler import ops
from qcompiler.backends import ort, ort_audit
from qcompiler.compiler import quantize
from qcompiler.data import Data
from qcompiler.errors import UnsupportedError
from qcompiler.hadamard import randomized
from qcompiler.lowering import integer_layers
from qcompiler.manifest import Compiled
from qcompiler.models import ZOO
from qcompiler.passes.fuse_attention import fuse_attention
from qcompiler.passes.normalize import normalize
from qcompiler.program import Program, capture, load_pt2
from qcompiler.recipe import load_recipe
from qcompiler.target import Target
from qcompiler.verify import Sqnr

DATA = f"{ort.MODEL}.data"

pytestmark = pytest.mark.usefixtures("torchlib_once")

TINY = [name for name in ZOO if name.startswith("tiny-")]
SOME = ["tiny-mlp", "tiny-attention-block", "tiny-gqa-decoder", "tiny-conv-block"]
COMBINATIONS = [
    *((name, "w8a8") for name in TINY),
    *((name, recipe) for recipe in ("w8a8-dynamic", "w8", "w4a16") for name in SOME),
]
# Lowest SQNR in dB of any output against the module in float64, on held-out data. Six decibels are
# one bit; the tiny models are random and amplify their outliers.
QUALITY = {"w8a8": 20.0, "w8a8-dynamic": 25.0, "w8": 25.0, "w4a16": 5.0, "w2a16": 0.0}
# The same against the quantized program. Where ONNX Runtime rounds no activations of its own accord
# only float rounding is left; a value at the middle of a step may still fall on the other side.
LOWERING = {"w8a8": 60.0, "w8a8-dynamic": 60.0, "w8": 25.0, "w4a16": 25.0, "w2a16": 25.0}


@dataclass(frozen=True)
class Lowered:
    folder: Path
    compiled: Compiled
    audit: ort_audit.Audit
    run: Callable[..., tuple[Tensor, ...]]

    @property
    def graph(self) -> onnx.GraphProto:
        return onnx.load(self.folder / ort.MODEL).graph

    @property
    def planned(self) -> dict[str, str]:
        return {s.node: s.path for s in self.compiled.plan if s.operand == 1}

    def optimised(self, folder: Path) -> onnx.GraphProto:
        """The graph that ONNX Runtime really runs."""
        ort.session(self.folder / ort.MODEL, 1, folder / "optimised.onnx")
        return onnx.load(folder / "optimised.onnx").graph


@pytest.fixture(scope="module")
def lowered(
    tiny: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Lowered]:
    """`lowered(name, recipe, **settings)`: quantized and written once for all tests."""
    done: dict[Any, Lowered] = {}

    def build(name: str, text: str, **settings: Any) -> Lowered:
        key = (name, text, *settings.items())
        if key not in done:
            model = tiny(name)
            recipe = load_recipe(text, settings)
            data = Data(model.captured, model.spec, recipe)
            compiled = quantize(
                model.captured, data, recipe, Target.parse("ort:cpu"), lambda step: None
            )
            folder = tmp_path_factory.mktemp(name)
            ort.lower(
                compiled.quantized,
                folder,
                output_names=model.spec.output_names,
                dynamic_shapes=model.spec.dynamic_shapes,
                fused=recipe.fused,
            )
            planned = {s.node: s.path for s in compiled.plan if s.operand == 1}
            integer = integer_layers(compiled.quantized, planned)
            audit = ort_audit.audit(folder, planned, integer)
            done[key] = Lowered(folder, compiled, audit, ort.load(folder, 1))
        return done[key]

    return build


def lowest(expected: Any, got: Any) -> float:
    """The lowest SQNR in dB of any output."""
    found = []
    for r, g in zip(expected, got, strict=True):
        assert r.shape == g.shape
        total = Sqnr()
        total.update(r, g)
        found.append(total.db)
    return min(found)


@pytest.mark.parametrize(("name", "recipe"), COMBINATIONS)
def test_numbers(
    name: str, recipe: str, lowered: Callable[..., Lowered], tiny: Callable[[str], Any]
) -> None:
    model, made = tiny(name), lowered(name, recipe)
    for batch in model.held_out:
        got = made.run(*batch)
        assert lowest(model.eager(batch), got) > QUALITY[recipe]
        assert lowest(made.compiled.quantized.run(batch), got) > LOWERING[recipe]
        assert [g.dtype for g in got] == [torch.float32] * len(got)


@pytest.mark.parametrize(("name", "recipe"), COMBINATIONS)
def test_sizes_are_dynamic(
    name: str, recipe: str, lowered: Callable[..., Lowered], tiny: Callable[[str], Any]
) -> None:
    """Batches of 1 and 3, and sequences of 2 and 23, which calibration never saw."""
    model, made = tiny(name), lowered(name, recipe)
    inputs = model.captured.inputs
    for batch, length in ((1, 2), (3, 23), (3, 2)):
        resized = []
        for tensor, key in zip(model.held_out[0], inputs, strict=True):
            for dim, kind in model.spec.dynamic_shapes[key].items():
                size = batch if kind == "batch" else length
                tensor = tensor.index_select(dim, torch.arange(size) % tensor.shape[dim])
            resized.append(tensor)
        got, expected = made.run(*resized), made.compiled.quantized.run(tuple(resized))
        assert lowest(expected, got) > LOWERING[recipe]


@pytest.mark.parametrize(("name", "recipe"), COMBINATIONS)
def test_the_file_is_a_model_with_the_names_of_the_module(
    name: str, recipe: str, lowered: Callable[..., Lowered], tiny: Callable[[str], Any]
) -> None:
    spec, made = tiny(name).spec, lowered(name, recipe)
    path = made.folder / ort.MODEL
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    opsets = {o.domain: o.version for o in model.opset_import}
    assert opsets.pop("") >= 21
    assert set(opsets) <= {"com.microsoft"}
    assert {n.domain for n in model.graph.node} <= {"", "com.microsoft"}
    assert [i.name for i in model.graph.input] == list(spec.example_inputs)
    assert [o.name for o in model.graph.output] == list(spec.output_names)
    for value in model.graph.input:
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        expected = [*spec.example_inputs[value.name].shape]
        for dim, size in spec.dynamic_shapes[value.name].items():
            expected[dim] = size
        assert dims == expected
    first = model.graph.output[0].type.tensor_type.shape.dim[0]
    assert first.dim_param == "batch"
    assert model.producer_name == "qcompiler"


@pytest.mark.parametrize(("name", "recipe"), COMBINATIONS)
def test_every_planned_layer_runs_on_its_kernel(
    name: str, recipe: str, lowered: Callable[..., Lowered]
) -> None:
    made = lowered(name, recipe)
    integer = recipe.startswith("w8a8")
    kernels = {layer.name: layer.kernel for layer in made.audit.layers}
    assert made.planned
    for node in made.planned:
        if "conv2d" in node and not integer:
            # There is no such convolution; the weights are stored small all the same.
            assert kernels[node] == "float"
        else:
            assert kernels[node] == ("integer" if integer else "weights only"), node
    if integer:
        assert made.audit.broken == ()
        assert made.audit.stray == 0


@pytest.mark.parametrize("name", ["tiny-conv-block", "tiny-depthwise"])
def test_convolutions_are_integer_from_end_to_end(
    name: str, lowered: Callable[..., Lowered], tmp_path: Path
) -> None:
    """One QuantizeLinear at the input; QLinearConv and QLinearAdd up to the pool."""
    made = lowered(name, "w8a8")
    convolutions = [node for node in made.planned if "conv2d" in node]
    operators = [n.op_type for n in made.optimised(tmp_path).node]
    assert operators.count("QLinearConv") == len(convolutions) == (3 if "block" in name else 4)
    assert operators.count("QLinearAdd") == 1
    assert not {"Conv", "FusedConv", "Clip", "Relu", "Add", "Cast"} & set(operators)


def test_convolution_biases_are_the_integers_of_the_program(
    lowered: Callable[..., Lowered], tmp_path: Path
) -> None:
    made = lowered("tiny-conv-block", "w8a8")
    kept = {k: v for k, v in made.compiled.quantized.constants().items() if v.dtype == torch.int32}
    stored = {
        i.name: onnx.numpy_helper.to_array(i)
        for i in made.optimised(tmp_path).initializer
        if i.data_type == onnx.TensorProto.INT32
    }
    biases = [v.numpy() for v in kept.values() if v.ndim == 1 and bool((v != 0).any())]
    assert len(biases) == 3
    for bias in biases:
        assert any(v.shape == bias.shape and (v == bias).all() for v in stored.values())


@pytest.mark.parametrize("name", ["tiny-attention-block", "tiny-mlp"])
def test_without_fusions_only_standard_operators(
    name: str, lowered: Callable[..., Lowered], tiny: Callable[[str], Any]
) -> None:
    plain, fused = lowered(name, "w8a8", fused=False), lowered(name, "w8a8")
    model = onnx.load(plain.folder / ort.MODEL)
    assert {n.domain for n in model.graph.node} == {""}
    assert {o.domain for o in model.opset_import} == {""}
    assert any(n.domain for n in fused.graph.node)
    for batch in tiny(name).held_out:
        assert lowest(fused.run(*batch), plain.run(*batch)) > LOWERING["w8a8"]


def test_large_weights_go_to_a_file_beside_the_model(
    lowered: Callable[..., Lowered], tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    made, model = lowered("tiny-attention-block", "w8a8"), tiny("tiny-attention-block")
    assert not (made.folder / DATA).exists()
    first = tmp_path / "first"
    first.mkdir()
    ort.lower(made.compiled.quantized, first, external_above=1000)
    assert (first / DATA).stat().st_size > 4096
    assert (first / ort.MODEL).stat().st_size < (made.folder / ort.MODEL).stat().st_size
    second = tmp_path / "moved"
    shutil.move(first, second)
    onnx.checker.check_model(second / ort.MODEL, full_check=True)
    for batch in model.held_out:
        for one, other in zip(made.run(*batch), ort.load(second, 1)(*batch), strict=True):
            assert torch.equal(one, other)


def test_four_bits_are_stored_as_four_bits_along_the_first_axis(
    lowered: Callable[..., Lowered], tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    made, module = (
        lowered("tiny-gqa-decoder", "w4a16", rounding="rtn", clip=False, fused=False),
        tiny("tiny-gqa-decoder").spec.module,
    )
    constants = {i.name: i for i in made.graph.initializer}
    blocked = [
        n
        for n in made.graph.node
        if n.op_type == "DequantizeLinear"
        and constants[n.input[0]].data_type == onnx.TensorProto.INT4
    ]
    assert len(blocked) == len(made.planned)
    for node in blocked:
        attributes = {a.name: a.i for a in node.attribute}
        assert attributes["axis"] == 0
        assert attributes["block_size"] == 32
        (reader,) = [n for n in made.graph.node if node.output[0] in n.input]
        assert reader.op_type == "MatMul"
    # down: (64 → 32), no norm before it: round to nearest of the module's own weight.
    weight = module.down.weight.detach().double().numpy().reshape(32, 2, 32)
    scale = np.abs(weight).max(-1, keepdims=True) / 7
    expected = np.rint(weight / scale).reshape(32, 64).T
    stored = [
        onnx.numpy_helper.to_array(constants[n.input[0]]).astype(np.int8)
        for n in blocked
        if list(constants[n.input[0]].dims) == [64, 32]
    ]
    assert len(stored) == 1
    assert (stored[0] != expected).mean() < 0.002  # a tie may fall on either side
    fused = [n for n in made.optimised(tmp_path).node if n.op_type == "MatMulNBits"]
    assert len(fused) == len(blocked)
    for node in fused:
        attributes = {a.name: a.i for a in node.attribute}
        assert (attributes["bits"], attributes["block_size"]) == (4, 32)


@pytest.mark.parametrize(
    "weights", ["int4:g32", "uint4:g16:affine", "int8:channel", "uint8:channel:affine", "int2:g16"]
)
def test_blocked_weights_are_those_of_the_program(
    weights: str, lowered: Callable[..., Lowered]
) -> None:
    """MatMulNBits' bytes, unpacked as its documentation says, are the program's weights."""
    made = lowered("tiny-gqa-decoder", "w4a16", rounding="rtn", weights=weights)
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in made.graph.initializer}
    nodes = [n for n in made.graph.node if n.op_type == "MatMulNBits"]
    assert len(nodes) == len(made.planned)
    program = made.compiled.quantized
    exact: dict[str, np.ndarray] = {}

    def remember(node: Any, value: Any) -> None:
        if str(node.target) == "qc.dequantize.default":
            exact[next(iter(node.users)).name] = value.numpy()

    program.run(tuple(torch.zeros(1, 4, dtype=torch.int64) for _ in program.inputs), remember)
    for node in nodes:
        attributes = {a.name: a.i for a in node.attribute}
        packed, scale = (constants[name] for name in node.input[1:3])
        bits, block = attributes["bits"], attributes["block_size"]
        assert packed.shape == (attributes["N"], attributes["K"] // block, block * bits // 8)

        def unpack(values: np.ndarray, bits: int = bits) -> np.ndarray:
            shifts = np.arange(8 // bits) * bits
            return (values[..., None] >> shifts & (2**bits - 1)).reshape(*values.shape[:-1], -1)

        zero = np.full(scale.shape, 2 ** (bits - 1))
        if len(node.input) > 3:
            zero = unpack(constants[node.input[3]])[:, : scale.shape[1]]
        got = (unpack(packed) - zero[..., None]) * scale[..., None]
        np.testing.assert_allclose(
            got.reshape(attributes["N"], -1), exact[node.name], rtol=1e-6, atol=0
        )


def test_a_tied_head_and_its_embedding_share_their_bytes(
    lowered: Callable[..., Lowered], tiny: Callable[[str], Any]
) -> None:
    made, module = lowered("tiny-tied-weights", "w4a16"), tiny("tiny-tied-weights").spec.module
    (head,) = [n for n in made.graph.node if n.op_type == "MatMulNBits" and n.name == "linear_1"]
    (lookup,) = [
        n for n in made.graph.node if n.op_type == "Gather" and n.input[0] == head.input[1]
    ]
    assert lookup.input[1] == "input_ids"
    table = module.embedding.weight
    large = [i for i in made.graph.initializer if int(np.prod(i.dims)) >= table.numel()]
    assert [i.name for i in large] == [head.input[1]]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["tiny-tied-weights", "tiny-attention-block"])
def test_rows_of_a_4_bit_table(
    lowered: Callable[..., Lowered], name: str, fused: bool, tiny: Callable[[str], Any]
) -> None:
    """GatherBlockQuantized reads the bytes that a tied head multiplies; else Gather reads int8."""
    made = lowered(name, "w4a16", fused=fused, embeddings="int4:g16", weights="int4:g16")
    kinds = {n.op_type for n in made.graph.node}
    assert ("GatherBlockQuantized" in kinds) == fused
    if fused and name == "tiny-tied-weights":
        heads = [n for n in made.graph.node if n.op_type == "MatMulNBits"]
        (lookup,) = [n for n in made.graph.node if n.op_type == "GatherBlockQuantized"]
        (flat,) = [n for n in made.graph.node if n.output[0] == lookup.input[0]]
        assert flat.input[0] in {n.input[1] for n in heads}
    for batch in tiny(name).batches[:2]:
        expected = made.compiled.quantized.run(batch)
        assert lowest(expected, made.run(*batch)) > 25  # products quantize what they read in blocks


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("w4a16", {"weights": "uint4:g16:affine"}),
        ("w4a16", {"weights": "int8:g32"}),
        ("w4a16", {"rounding": "awq"}),
        ("w4a16", {"clip": True, "keep_moment": True, "rotation": "hadamard"}),
        ("w4a16", {"weights": "int3:g16:affine"}),
        ("w4a16", {"weights": "uint3:g16"}),
        ("w2a16", {}),
        ("w8", {"weights": "int8:tensor", "embeddings": "uint8:channel"}),
        ("w8", {"weights": "uint8:channel:affine", "embeddings": None}),
        ("w8a8", {"weights": "int8:tensor"}),
        ("w8a8", {"weights": "int8:channel:affine"}),
        ("w8a8", {"weights": "int8:channel:reduced"}),
        ("w8a8", {"activations": "int8:tensor"}),
        ("w8a8", {"activations": "uint8:tensor", "smooth": False, "merge_linears": False}),
        ("w8a8", {"calibration": "mse", "correct_bias": False, "insert_scale": False}),
        ("w8a8-dynamic", {"weights": "int8:channel:affine"}),
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else v,
)
def test_other_formats_compute_what_the_program_says(
    recipe: str,
    settings: dict[str, Any],
    lowered: Callable[..., Lowered],
    tiny: Callable[[str], Any],
) -> None:
    name = "tiny-post-norm-block"
    made = lowered(name, recipe, **settings)
    for batch in tiny(name).held_out:
        got = made.run(*batch)
        assert lowest(made.compiled.quantized.run(batch), got) > LOWERING[recipe]
        assert lowest(tiny(name).eager(batch), got) > QUALITY[recipe]


def written(program: Program, folder: Path) -> Callable[..., tuple[Tensor, ...]]:
    folder.mkdir(exist_ok=True)
    ort.lower(program, folder)
    return ort.load(folder, 1)


class Attention(nn.Module):
    """4 query heads of 8; what is given to `scaled_dot_product_attention` is up to the test."""

    def __init__(self, kv_heads: int, mask: Any, options: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kv_heads, self.mask, self.options = kv_heads, mask, options
        self.q, self.k, self.v = (nn.Linear(32, 8 * heads) for heads in (4, kv_heads, kv_heads))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 4, 8).transpose(1, 2)
        k, v = (
            f(x).view(batch, length, self.kv_heads, 8).transpose(1, 2) for f in (self.k, self.v)
        )
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            self.mask(keep) if self.mask else None,
            enable_gqa=self.kv_heads != 4,
            **self.options,
        )
        return y.transpose(1, 2).reshape(batch, length, 32) * keep[..., None]


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "key padding": lambda keep: keep[:, None, None].bool(),
    "float padding": lambda keep: (1.0 - keep[:, None, None].float()) * -1e9,
    "square": lambda keep: (keep[:, None, :, None] * keep[:, None, None, :]).bool() | torch.eye(
        keep.shape[1], dtype=torch.bool
    ),
    "two axes": lambda keep: torch.ones(keep.shape[1], keep.shape[1], dtype=torch.bool).tril(),
    "each head": lambda keep: keep[:, None, None].bool().expand(-1, 4, keep.shape[1], -1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "kv_heads"),
    [
        ("key padding", 2),
        ("key padding", 4),
        ("float padding", 4),
        ("square", 2),
        ("two axes", 4),
        ("each head", 4),
        ("none", 2),
        ("causal", 2),
        ("scale", 4),
    ],
)
def test_attention(mask: str, kv_heads: int, tmp_path: Path) -> None:
    options = {"causal": {"is_causal": True}, "scale": {"scale": 0.5}}.get(mask, {})
    module = Attention(kv_heads, MASKS.get(mask), options)
    x = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(1))
    keep = (torch.arange(6)[None] < torch.tensor([[6], [4], [1]])).long()
    sizes = {0: "batch", 1: "sequence"}
    program = normalize(capture(module, (x, keep), {"x": sizes, "keep": sizes}))
    fused = fuse_attention(program)
    assert fused.exported is not program.exported, fused.history[-1].refusals
    forms = [(fused, "fused")]
    if kv_heads == 2 or "padding" in mask:  # where the two forms are written differently
        forms.append((program, "plain"))
    for candidate, folder in forms:
        run = written(candidate, tmp_path / folder)
        for inputs in ((x, keep), (x[:1, :4], keep[:1, :4])):
            with torch.no_grad():
                expected = module(*inputs)
            torch.testing.assert_close(run(*inputs)[0], expected, rtol=1e-4, atol=1e-5)


class SingleHead(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, torch.ones(5, 5).tril().bool())


def test_attention_without_a_head_axis(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    program = normalize(capture(SingleHead(), (x,)))
    run = written(program, tmp_path)
    torch.testing.assert_close(run(x)[0], SingleHead()(x), rtol=1e-4, atol=1e-5)


class Padded(nn.Module):
    """Asymmetric padding before a strided convolution, as in EfficientNet-Lite."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.depth = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(F.pad(x, (0, 1, 0, 1))))
        x = F.relu(self.depth(F.pad(x, (1, 2, 1, 1))))
        return self.last(x).mean((2, 3))


def test_paddings_join_their_convolutions(tmp_path: Path) -> None:
    x = torch.rand(2, 3, 11, 11, generator=torch.Generator().manual_seed(0)) - 0.3
    module = Padded()
    program = normalize(capture(module, (x,)))
    run = written(program, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(run(x)[0], module(x), rtol=1e-5, atol=1e-5)
    nodes = {n.op_type for n in onnx.load(tmp_path / ort.MODEL).graph.node}
    assert "Pad" not in nodes


class Parted(nn.Module):
    """Equal parts, a smaller one at the end, parts of given sizes, one of which is left."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b, c = x.chunk(3, -1)
        d, _, e = x.split([3, 4, 5], 2)
        f, g, h = x.split(5, -1)
        u, v, w = (2 * x).split(4, -1)
        return a * b + c, d.sum(-1) - e.sum(-1), f, g * 2 + h.mean(), u - v * w


def test_splits_are_no_sequences(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    run = written(normalize(capture(Parted(), (x,), {"x": {0: "batch", 1: "rows"}})), tmp_path)
    y = torch.cat([x, x], 1)
    for got, expected in zip(run(y), Parted()(y), strict=True):
        torch.testing.assert_close(got, expected)
    nodes = [n.op_type for n in onnx.load(tmp_path / ort.MODEL).graph.node]
    assert nodes.count("Split") == 4
    assert not any("Sequence" in name for name in nodes)


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.topk(2, -1).values


def test_an_output_that_an_operator_must_have(tmp_path: Path) -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    run = written(normalize(capture(Largest(), (x,))), tmp_path)
    assert torch.equal(run(x)[0], x.topk(2, -1).values)


class Clipped(nn.Module):
    def __init__(self, low: float | None, high: float | None) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return x.clamp(self.low, self.high), ids.clamp(1, 3)


@pytest.mark.parametrize(("low", "high"), [(-0.5, 0.5), (None, 1.0), (0.0, None)])
def test_clamp_of_floats_and_integers(low: Any, high: Any, tmp_path: Path) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([-(2**40), 0, 2, 3, 2**40])
    module = Clipped(low, high)
    run = written(normalize(capture(module, (x, ids))), tmp_path)
    for got, expected in zip(run(x, ids), module(x, ids), strict=True):
        assert torch.equal(got, expected)


class Extremes(nn.Module):
    """Functions whose simple formulas overflow, and means by numbers of the user's own."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        image = x.reshape(1, 1, 4, 4)
        pooled = F.avg_pool2d(image, 3, 2, 1, divisor_override=2)
        return F.logsigmoid(x), torch.logaddexp(x, x.flip(0)), torch.logaddexp(x, x), pooled


def test_functions_far_from_zero(tmp_path: Path) -> None:
    x = torch.linspace(-100, 100, 16)
    ort.lower(normalize(capture(Extremes(), (x,))), tmp_path)
    for got, want in zip(ort.load(tmp_path)(x), Extremes()(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


class Volumes(nn.Module):
    """What torch's exporter writes wrongly: batch statistics, volumes and their divisors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 3, (1, 2, 3), padding="same", bias=False)
        self.norm = nn.BatchNorm3d(3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.conv(x)
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert variance is not None
        normal = F.batch_norm(y, mean.clone(), variance.clone(), training=True, eps=0.1)
        # The op itself keeps the statistics of the batch.
        kept = torch.native_batch_norm(
            y, None, None, mean.clone(), variance.clone(), True, 0.5, 0.1
        )
        pooled = F.avg_pool3d(x, (2, 3, 2), 2, (1, 1, 0), divisor_override=5)
        return y, normal, F.batch_norm(y, None, None, training=True), *kept, pooled, self.norm(y)


def test_what_the_exporter_writes_wrongly(tmp_path: Path) -> None:
    x = torch.randn(2, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1
    module = Volumes().eval()
    ort.lower(normalize(capture(module, (x,))), tmp_path)
    for got, want in zip(ort.load(tmp_path)(x), module(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


class Angles(nn.Module):
    def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        return torch.atan2(x[:, None], x), torch.atan2(n[:, None], n)


def test_angles_all_round(tmp_path: Path) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 3.0, -7.0, inf, -inf, nan, 1e-30, -1e30])
    n = torch.tensor([0, 1, -1, 3, -7])
    ort.lower(normalize(capture(Angles(), (x, n))), tmp_path)
    for got, want in zip(ort.load(tmp_path)(x, n), Angles()(x, n), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=2), "divisor_override"),
        (torch.special.log_ndtr, "inaccurate far from zero"),
        (torch.special.erfcx, "inaccurate far from zero"),
        (lambda x: F.pad(x, (-8, 9, 0, 0), "replicate"), "cuts off all"),
        (
            lambda x: F.interpolate(x, (5, 5), mode="bilinear", antialias=True, align_corners=True),
            "antialias and align_corners",
        ),
        (
            lambda x: x.scatter_reduce(3, (x > 0).long(), x, "mean"),
            "the mean in each place",
        ),
    ],
)
def test_what_onnx_has_not_is_refused(function: Any, reason: str, tmp_path: Path) -> None:
    class Applied(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return function(x)

    program = normalize(capture(Applied(), (torch.randn(1, 3, 8, 8),)))
    with pytest.raises(UnsupportedError, match=reason):
        ort.lower(program, tmp_path)


def test_an_output_named_like_an_input_is_refused(tmp_path: Path) -> None:
    program = capture(nn.Linear(3, 3), (torch.randn(2, 3),))
    with pytest.raises(UnsupportedError, match=r"output name 'input' is the name of an input"):
        ort.lower(program, tmp_path, output_names=("input",))


def test_what_is_returned_twice_or_as_it_was_given(tmp_path: Path) -> None:
    class Repeated(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            z = x + y
            return y, z, x, z, y

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    ort.lower(capture(Repeated(), (x, y)), tmp_path)
    for got, expected in zip(ort.load(tmp_path)(x, y), Repeated()(x, y), strict=True):
        assert torch.equal(got, expected)


class Exotic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x).real


def test_an_op_without_onnx_form_is_named(tmp_path: Path) -> None:
    program = capture(Exotic(), (torch.eye(3),))
    with pytest.raises(UnsupportedError, match=r"^no ONNX form: .*linalg_eig'") as caught:
        ort.lower(program, tmp_path)
    assert "\n" not in str(caught.value)


def test_inputs_that_are_not_contiguous(lowered: Callable[..., Lowered], tiny: Any) -> None:
    made, (x,) = lowered("tiny-mlp", "w8a8"), tiny("tiny-mlp").held_out[0]
    turned = x.t().contiguous().t()
    assert not turned.is_contiguous()
    assert torch.equal(made.run(turned)[0], made.run(x)[0])


def test_rotations_run_as_products_with_kronecker_factors(tmp_path: Path) -> None:
    rotation = randomized(48, None)

    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("left", rotation.left.float())
            self.register_buffer("right", rotation.right.float())

        def forward(self, x: Tensor) -> Any:
            return ops.rotate(x, self.left, self.right)

    x = torch.randn(2, 5, 48)
    program = capture(Rotated(), (x,), {"x": {0: "batch", 1: "sequence"}})
    ort.lower(program, tmp_path)
    for value in (x, torch.randn(1, 1, 48)):
        (got,) = ort.load(tmp_path)(value)
        torch.testing.assert_close(got.double(), rotation.apply(value), rtol=1e-5, atol=1e-5)


def test_a_saved_program_whose_example_was_part_of_a_tensor(tmp_path: Path) -> None:
    """Of such an input torch saves strides as symbols, without their ranges."""
    sizes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    part = torch.arange(24).reshape(3, 8)[:, :5]
    module = nn.Embedding(24, 4)
    exported = torch.export.export(module, (part,), dynamic_shapes=sizes, strict=False)
    torch.export.save(exported, tmp_path / "model.pt2")
    ort.lower(load_pt2(tmp_path / "model.pt2"), tmp_path)
    x = torch.arange(8).reshape(2, 4)
    assert torch.equal(ort.load(tmp_path)(x)[0], module(x))
    captured = capture(module, (part,), {"input": {0: "batch", 1: "sequence"}})
    assert not [guard for guard in captured.exported._guards_code if "stride" in guard]
