"""Custom operators for ONNX Runtime: generated linears and rotations inside its graph."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

pytest.importorskip("tvm", reason="the extra tvm is not installed")
if shutil.which("cc") is None:
    pytest.skip("no C compiler is installed", allow_module_level=True)

from qcompiler import ops
from qcompiler.artifact import Artifact
from qcompiler.backends import edge_folder, edge_ort, edge_target, ort, ort_surgery
from qcompiler.backends.ort_generated import use_generated_on_gpu
from qcompiler.backends.ort_session import LIBRARY, MODEL
from qcompiler.compiler import compile
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.generated import Generate, Library, Operator, Step
from qcompiler.hadamard import sylvester
from qcompiler.models import ZOO, find
from qcompiler.models.tiny_blocks import VOCABULARY, WIDTH
from qcompiler.program import load_pt2
from qcompiler.qtype import QType
from qcompiler.recipe import load_recipe
from qcompiler.target import Target
from qcompiler.testing import random_linear

SIZES = (1, 4, 16)  # rows that there is code for; the calls below have others
SHAPES = [(1,), (3, 7), (1, 37)]


def operators() -> dict[str, Operator]:
    torch.manual_seed(0)
    factors = (torch.linalg.qr(torch.randn(3, 3))[0].contiguous(), sylvester(16).float())
    turn = (Step("rotate", (0,), factors),)
    two = (random_linear(48, 64, "int4:g32", True), random_linear(33, 64, "int4:g32", False))
    return {
        "4 bits, two linears of one tensor": Operator("a", 64, "int8:token", two),
        "8 bits, affine activations, odd sizes": Operator(
            "b", 60, "uint8:token:affine", (random_linear(33, 60, "int8:channel", True),)
        ),
        "rotated before": Operator(
            "c", 48, "int8:token", (random_linear(20, 48, "int8:channel", False),), 1, turn
        ),
        "a rotation alone": Operator("d", 48, "", (), 1, turn),
        "the norm of a sum, both kept": Operator(
            "e", 40, "int8:token", (random_linear(24, 40, "int8:channel", False),), 2,
            (Step("add", (0, 1)), Step("rms_norm", (2,), (torch.rand(40) + 0.5,), 1e-5)), (2, 3),
        ),
        "a gated product, rotated, then scaled": Operator(
            "f", 48, "int8:token", (random_linear(20, 48, "int8:channel", True),), 2,
            (Step("silu", (1,)), Step("mul", (0, 2)), Step("rotate", (3,), factors),
             Step("mul", (4,), (torch.rand(48) + 0.5,))),
        ),
        "a norm, a shift and GELU": Operator(
            "g", 40, "int8:token", (random_linear(24, 40, "int8:channel", False),), 1,
            (Step("layer_norm", (0,), (torch.rand(40) + 0.5, torch.randn(40)), 1e-12),
             Step("add", (1,), (torch.randn(1),)), Step("gelu", (2,)), Step("gelu_tanh", (2,)),
             Step("add", (3, 4))), (1, 5),
        ),
        "a norm without a shift": Operator(
            "h", 40, "int8:token", (random_linear(24, 40, "int8:channel", False),), 1,
            (Step("layer_norm", (0,), (torch.rand(40) + 0.5,), 0.1),), (1,),
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Library, Path]:
    made = edge_ort.build(list(operators().values()), Target.parse("ort:cpu+tvm"), SIZES)
    path = tmp_path_factory.mktemp("library") / LIBRARY
    path.write_bytes(made.content)
    return made, path


def opened(library: tuple[Library, Path], number: int, threads: int = 1) -> Any:
    """A session of a model that is this one operator."""
    operator, (made, path) = [*operators().values()][number], library
    outputs = [f"y{i}" for i in range(len(operator.columns))]
    inputs = [f"x{i}" for i in range(operator.inputs)]
    node = helper.make_node(
        "QuantizedMatMul" if operator.linears else "Rotate", ["w", *inputs], outputs,
        domain="qcompiler", number=number, library=made.number,
    )  # fmt: skip
    weights = made.weights[number]
    graph = helper.make_graph(
        [node], "one",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [helper.make_tensor("w", TensorProto.UINT8, [len(weights)], weights, raw=True)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("qcompiler", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(path))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def stepped(step: Step, values: list[Tensor]) -> Tensor:
    a, *rest = [*(values[n] for n in step.operands), *(c.double() for c in step.constants)]
    if step.kind in ("add", "mul"):
        return a + rest[0] if step.kind == "add" else a * rest[0]
    if step.kind == "rotate":
        return a @ torch.kron(*rest)
    if step.kind == "silu":
        return a * torch.sigmoid(a)
    if step.kind in ("gelu", "gelu_tanh"):
        approximate = "tanh" if step.kind == "gelu_tanh" else "none"
        return torch.nn.functional.gelu(a, approximate=approximate)
    if step.kind == "rms_norm":
        return a / (a.square().mean(-1, keepdim=True) + step.epsilon).sqrt() * rest[0]
    centred = a - a.mean(-1, keepdim=True)
    power = centred.square().mean(-1, keepdim=True)
    return centred / (power + step.epsilon).sqrt() * rest[0] + (rest[1] if rest[1:] else 0)


def expected(operator: Operator, *xs: Tensor) -> list[Tensor]:
    """In float64, from the integers that quantizing float32 numbers gives."""
    values = [x.double() for x in xs]
    for step in operator.steps:
        values.append(stepped(step, values))
    x = values[-1 if operator.steps else 0].float()
    kept = [values[n] for n in operator.kept]
    if not operator.linears:
        return [x]
    q, scale, zero = ops.dynamic_quantize(x, operator.activation)
    quantized = (q.double() - zero.double()) * scale.double()
    found = []
    for part in operator.linears:
        steps = part.scale.reshape(len(part.q), -1).double()
        weight = part.q.double() * steps.repeat_interleave(part.q.shape[1] // steps.shape[1], 1)
        found.append(quantized @ weight.T + (0 if part.bias is None else part.bias.double()))
    return [*found, *kept]


@pytest.mark.parametrize("number", range(len(operators())), ids=operators())
def test_against_float64(library: tuple[Library, Path], number: int) -> None:
    operator = [*operators().values()][number]
    one, two = (opened(library, number, threads) for threads in (1, 2))
    for shape in SHAPES:
        xs = [torch.randn(*shape, operator.depth) * 3 for _ in range(operator.inputs)]
        fed = {f"x{i}": x.numpy() for i, x in enumerate(xs)}
        # A value that two roundings of a step put on both sides of a tie moves its row.
        bound = 1e-6 if not operator.steps or not operator.linears else 2e-2
        got = one.run(None, fed)
        for y, reference in zip(got, expected(operator, *xs), strict=True):
            assert y.shape == tuple(reference.shape)
            error = (torch.from_numpy(y).double() - reference).norm() / reference.norm()
            assert error < bound
        first = len(got) - len(operator.kept)
        for y, reference in zip(got[first:], expected(operator, *xs)[first:], strict=True):
            np.testing.assert_allclose(y, reference, rtol=1e-5, atol=1e-5)
        shared = two.run(None, fed)
        assert all(np.array_equal(a, b) for a, b in zip(got, shared, strict=True))


def test_rows_of_another_length_and_foreign_libraries_are_refused(
    library: tuple[Library, Path],
) -> None:
    pair = opened(library, 4)
    with pytest.raises(Exception, match="reads tensors of one shape, not 40 numbers beside 80"):
        pair.run(None, {"x0": np.zeros((2, 40), np.float32), "x1": np.zeros((1, 40), np.float32)})
    session = opened(library, 0)
    with pytest.raises(Exception, match="reads rows of 64 numbers, not of 63"):
        session.run(None, {"x0": np.zeros((2, 63), np.float32)})
    assert session.run(None, {"x0": np.zeros((0, 64), np.float32)})[0].shape == (0, 48)
    made, path = library
    other = replace(made, number=made.number + 1)
    with pytest.raises(Exception, match="not the one that this model was compiled with"):
        opened((other, path), 0)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, torchlib_once: None) -> Artifact:
    """Rotated, so that its graph has rotations at run time too."""
    settings = {"rotation": "hadamard", "rounding": "rtn", "min_sqnr": 0.0, "seed": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edge_ort, "ROWS", (1, 8))
        return compile(
            ZOO["tiny-gqa-decoder"].build(), target="ort:cpu+tvm",
            recipe=load_recipe("w4a8", settings),
            out=tmp_path_factory.mktemp("decoder") / "out",
        )  # fmt: skip


def test_a_decoder_on_its_own_operators(decoder: Artifact) -> None:
    graph = onnx.load(decoder.folder / MODEL).graph
    found = {node.op_type for node in graph.node if node.domain == "qcompiler"}
    assert "QuantizedMatMul" in found
    assert not [n for n in graph.node if n.op_type in ("MatMulNBits", "DynamicQuantizeLinear")]
    # Sums, norms and gates on the way to a product belong to its operator.
    assert not {"RMSNormalization", "Sigmoid"} & {node.op_type for node in graph.node}
    assert len([n for n in graph.node if n.op_type == "Add"]) == 2  # of the rotary embedding
    layers = decoder.manifest["audit"]["layers"]
    kept = [layer for layer in layers if layer["op"] == "qcompiler.QuantizedMatMul"]
    assert len(kept) == 8
    assert {layer["kernel"] for layer in kept} == {"integer"}
    assert decoder.manifest["audit"]["broken"] == []
    assert decoder.manifest["target"] == "ort:cpu+tvm"
    # The same integers as in torch: what is left is float rounding.
    assert min(row["sqnr_db"] for row in decoder.manifest["errors"]["lowering"]) > 60
    batch = decoder.batches("held-out")[0]
    one = decoder.runner(1)(*batch)
    assert all(torch.equal(a, b) for a, b in zip(one, decoder.runner(2)(*batch), strict=True))


def test_a_graph_for_a_gpu_computes_the_same(
    decoder: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operators as for a GPU, on this machine's kernels, which give the same bits."""

    def use(graph: gs.Graph, generate: Generate) -> bytes:
        def made(given: Sequence[Operator]) -> Library:
            library = generate(given)
            return replace(library, tables=(False,) * len(given))

        content = use_generated_on_gpu(graph, made)
        for node in graph.nodes:
            if node.op == "QuantizedMatMul":
                scratch = node.outputs.pop()  # a GPU's
                assert not scratch.outputs
        return content

    monkeypatch.setattr(ort_surgery, "use_generated", use)
    program = load_pt2(decoder.folder / "reference" / "quantized.pt2")
    generate = partial(edge_ort.build, target=Target.parse("ort:cpu+tvm"), sizes=(1, 8))
    ort.lower(program, tmp_path, generate=generate)
    batch = decoder.batches("held-out")[0]
    for want, got in zip(decoder.runner(1)(*batch), ort.load(tmp_path, 1)(*batch), strict=True):
        assert torch.equal(want, got)


def test_a_language_model_prunes_what_its_head_reads(
    language_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its head reads several tensors of rows: the last sum's operands."""
    monkeypatch.setattr(edge_ort, "ROWS", (1, 8))
    spec = find(f"hf:{language_folder}")
    assert not isinstance(spec, Path)
    recipe = load_recipe("w8a8-token", {"rounding": "rtn"})
    made = compile(spec, target="ort:cpu+tvm", recipe=recipe, out=tmp_path / "out")
    runtime = made.generator(1).runtime
    tokens = np.arange(3, 33)
    runtime.reset(30)
    whole = runtime.feed(tokens)
    runtime.reset(30)
    np.testing.assert_allclose(runtime.feed(tokens, last=True), whole[-1:], rtol=1e-5, atol=1e-5)
    graph = onnx.load(made.folder / MODEL).graph
    assert not {"RMSNormalization", "Add", "Sigmoid"} & {node.op_type for node in graph.node}


def test_a_tied_embedding_reads_the_packed_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_ort, "ROWS", (1, 8))
    recipe = load_recipe("w8a8-token", {"rounding": "rtn"})
    spec = ZOO["tiny-tied-weights"].build()
    made = compile(spec, target="ort:cpu+tvm", recipe=recipe, out=tmp_path / "out")
    graph = onnx.load(made.folder / MODEL).graph
    (lookup,) = (node for node in graph.node if node.op_type == "LookUp")
    (head,) = (node for node in graph.node if lookup.input[0] in node.input and node != lookup)
    assert head.op_type == "QuantizedMatMul"
    sizes = [len(i.raw_data) for i in graph.initializer]
    assert sum(size >= VOCABULARY * WIDTH for size in sizes) == 1  # no second copy of the table
    assert min(row["sqnr_db"] for row in made.manifest["errors"]["lowering"]) > 60
    run = made.runner(1)
    (ids,) = made.batches("held-out")[0]
    with pytest.raises(Exception, match=f"id {VOCABULARY} is outside a table of {VOCABULARY} rows"):
        run(torch.full_like(ids, VOCABULARY))


def test_a_row_that_a_float_layer_reads_too(tmp_path: Path) -> None:
    """What is quantized by the row is kept besides: the sum after a float projection is a residual.

    It was taken for something that quantizing writes, and never stored.
    """
    formats = {"*": "int8:channel/int8:token", "out": "float"}
    recipe = load_recipe("w8a8-token", {"rounding": "rtn", "formats": formats})
    spec = ZOO["tiny-post-norm-block"].build()
    made = compile(spec, target="ort:cpu+tvm", recipe=recipe, out=tmp_path / "a")
    assert made.manifest["audit"]["kernels"]["QuantizedMatMul"] == 3
    assert min(row["sqnr_db"] for row in made.manifest["errors"]["lowering"]) > 100


def test_a_missing_library_is_named(decoder: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(decoder.folder, folder)
    (folder / LIBRARY).unlink()
    with pytest.raises(InputError, match=f"{LIBRARY} is missing"):
        Artifact.open(folder).load()
    (folder / LIBRARY).write_bytes(b"no library")
    with pytest.raises(UnsupportedError, match=LIBRARY):
        Artifact.open(folder).load()


def test_what_the_target_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target.parse("ort:cpu+tvm")
    four, eight = QType.parse("int4:g32"), QType.parse("int8:channel")
    assert target.refusal(four, QType.parse("int8:token")) is None
    assert target.refusal(eight, QType.parse("uint8:token:affine")) is None
    assert "each token" in str(target.refusal(four, None))
    assert "each token" in str(target.refusal(eight, QType.parse("uint8:tensor:affine")))
    for text in ("tvm:x86-64+tvm", "ort:cpu+tmv"):
        with pytest.raises(UnsupportedError, match="no kernels"):
            Target.parse(text)
    foreign = Target.parse("ort:cpu:arm64+tvm")
    with pytest.raises(UnsupportedError, match="are generated for the feature 'arm64'"):
        edge_ort.build([operators()["a rotation alone"]], foreign)
    monkeypatch.setattr(edge_target, "host_family", lambda: "riscv64")
    with pytest.raises(UnsupportedError, match="made on the machine that runs them"):
        edge_ort.build([operators()["a rotation alone"]], Target.parse("ort:cpu:avx2+tvm"))


def test_places_are_those_of_the_official_header(tmp_path: Path) -> None:
    """Where ONNX Runtime's header is installed (on the compiler's path), the layouts are equal."""
    probe = subprocess.run(
        ["cc", "-E", "-x", "c", "-"], input="#include <onnxruntime_c_api.h>\n", text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    if probe.returncode:
        pytest.skip("onnxruntime_c_api.h is not installed (set CPATH to its folder)")
    ours = (edge_folder.SOURCES / "edge_ort_api.h").read_text()
    names = re.findall(r"\n  ORT_([A-Z0-9_]+) = (\d+)", ours.partition("Places in OrtApi")[2])
    assert len(names) == 15
    by_name = {re.sub("[_]", "", name).lower(): place for name, place in names}
    table = probe.stdout.partition("struct OrtApi {")[2].partition("\n};")[0]
    functions = re.findall(r"\(\s*\*\s*(\w+)\)\s*\(", table)
    lines = [
        f'_Static_assert(offsetof(OrtApi, {name}) == {by_name[key]} * sizeof(void *), "");'
        for name in functions
        if (key := name.replace("_", "").lower()) in by_name
    ]
    assert len(lines) == len(names)
    fields = {"version": "version", "CreateKernelV2": "create_kernel",
              "KernelComputeV2": "compute", "GetName": "name", "KernelDestroy": "destroy",
              "GetVariadicOutputMinArity": "variadic_outputs", "GetStartVersion": "first_version",
              "GetEndVersion": "last_version", "GetInputMemoryType": "input_memory",
              "ReleaseAliasMap": "release_aliases"}  # fmt: skip
    lines += [
        f'_Static_assert(offsetof(OrtCustomOp, {theirs}) == offsetof(ort_custom_op, {mine}), "");'
        for theirs, mine in fields.items()
    ]
    lines += ['_Static_assert(sizeof(OrtCustomOp) >= sizeof(ort_custom_op), "");']
    renamed = ours
    for name in ("ORT_FAIL", "ORT_INVALID_ARGUMENT", "ORT_NOT_IMPLEMENTED"):
        renamed = re.sub(rf"\b{name}\b", f"MY_{name}", renamed)
        lines.append(f'_Static_assert((int){name} == (int)MY_{name}, "");')
    source = "\n".join(["#include <onnxruntime_c_api.h>", renamed, *lines, ""])
    (tmp_path / "check.c").write_text(source)
    done = subprocess.run(
        ["cc", "-std=gnu11", "-c", "check.c", "-o", "check.o"], cwd=tmp_path, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
