"""Custom operators for ONNX Runtime: generated linears and rotations inside its graph."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
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
from qcompiler.backends import edge_folder, edge_ort
from qcompiler.backends.ort_session import LIBRARY, MODEL
from qcompiler.compiler import compile
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.generated import Library, Linear, Operator
from qcompiler.hadamard import sylvester
from qcompiler.models import ZOO
from qcompiler.qtype import QType
from qcompiler.recipe import load_recipe
from qcompiler.target import Target

SIZES = (1, 4, 16)  # rows that there is code for; the calls below have others
SHAPES = [(1,), (3, 7), (1, 37)]


def linear(outputs: int, inputs: int, text: str, biased: bool) -> Linear:
    weight, kind = torch.randn(outputs, inputs), QType.parse(text)
    axis = 1 if kind.group else 0
    scale, zero = kind.scale_for(*kind.ranges(weight, axis))
    q = kind.quantize(weight, scale, zero, axis)
    bias = torch.randn(outputs) if biased else None
    return Linear(f"l{outputs}", q, scale, zero, axis, kind.group or 0, bias)


def operators() -> dict[str, Operator]:
    torch.manual_seed(0)
    turn = (torch.linalg.qr(torch.randn(3, 3))[0].contiguous(), sylvester(16).float())
    two = (linear(48, 64, "int4:g32", True), linear(33, 64, "int4:g32", False))
    return {
        "4 bits, two linears of one tensor": Operator("a", 64, None, "int8:token", two),
        "8 bits, affine activations, odd sizes": Operator(
            "b", 60, None, "uint8:token:affine", (linear(33, 60, "int8:channel", True),)
        ),
        "rotated before": Operator(
            "c", 48, turn, "int8:token", (linear(20, 48, "int8:channel", False),)
        ),
        "a rotation alone": Operator("d", 48, turn, "", ()),
    }


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
    node = helper.make_node(
        "QuantizedMatMul" if operator.linears else "Rotate", ["x", "w"], outputs,
        domain="qcompiler", number=number, library=made.number,
    )  # fmt: skip
    weights = made.weights[number]
    graph = helper.make_graph(
        [node], "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
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


def expected(operator: Operator, x: Tensor) -> list[Tensor]:
    """In float64, from the integers that quantizing float32 numbers gives."""
    if operator.rotation is not None:
        x = (x.double() @ torch.kron(*(f.double() for f in operator.rotation))).float()
    if not operator.linears:
        return [x]
    q, scale, zero = ops.dynamic_quantize(x, operator.activation)
    values = (q.double() - zero.double()) * scale.double()
    found = []
    for part in operator.linears:
        steps = part.scale.reshape(len(part.q), -1).double()
        weight = part.q.double() * steps.repeat_interleave(part.q.shape[1] // steps.shape[1], 1)
        found.append(values @ weight.T + (0 if part.bias is None else part.bias.double()))
    return found


@pytest.mark.parametrize("number", range(4), ids=operators())
def test_against_float64(library: tuple[Library, Path], number: int) -> None:
    operator = [*operators().values()][number]
    one, two = (opened(library, number, threads) for threads in (1, 2))
    for shape in SHAPES:
        x = torch.randn(*shape, operator.depth) * 3
        # A value that two roundings of a rotation put on both sides of a step moves its row.
        bound = 2e-2 if operator.rotation is not None and operator.linears else 1e-6
        got = one.run(None, {"x": x.numpy()})
        for y, reference in zip(got, expected(operator, x), strict=True):
            assert y.shape == tuple(reference.shape)
            error = (torch.from_numpy(y).double() - reference).norm() / reference.norm()
            assert error < bound
        shared = two.run(None, {"x": x.numpy()})
        assert all(np.array_equal(a, b) for a, b in zip(got, shared, strict=True))


def test_rows_of_another_length_and_foreign_libraries_are_refused(
    library: tuple[Library, Path],
) -> None:
    session = opened(library, 0)
    with pytest.raises(Exception, match="reads rows of 64 numbers, not of 63"):
        session.run(None, {"x": np.zeros((2, 63), np.float32)})
    assert session.run(None, {"x": np.zeros((0, 64), np.float32)})[0].shape == (0, 48)
    made, path = library
    other = Library(made.content, made.number + 1, made.weights)
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


def test_a_missing_library_is_named(decoder: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(decoder.folder, folder)
    (folder / LIBRARY).unlink()
    with pytest.raises(InputError, match=f"{LIBRARY} is missing"):
        Artifact.open(folder).load()
    (folder / LIBRARY).write_bytes(b"no library")
    with pytest.raises(UnsupportedError, match=LIBRARY):
        Artifact.open(folder).load()


def test_what_the_target_refuses() -> None:
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
    with pytest.raises(UnsupportedError, match="made on the machine that runs them"):
        edge_ort.build([operators()["a rotation alone"]], foreign)


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
    assert len(names) == 14
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
