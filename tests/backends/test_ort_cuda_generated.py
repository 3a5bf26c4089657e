"""Custom operators for ONNX Runtime's CUDA provider: what is written, how it is launched, results.

Without a GPU, a driver made here stands for NVIDIA's: it says what it was asked to launch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

pytest.importorskip("tvm", reason="the extra tvm is not installed")
if shutil.which("cc") is None:
    pytest.skip("no C compiler is installed", allow_module_level=True)

from qcompiler.artifact import Artifact
from qcompiler.backends import (
    edge_cuda_build,
    edge_cuda_ort,
    edge_cuda_products,
    ort_cuda,
    ort_cuda_decode,
)
from qcompiler.backends.ort_generated import use_generated_on_gpu
from qcompiler.backends.ort_phases import PREFILL
from qcompiler.backends.ort_session import LIBRARY, MODEL
from qcompiler.errors import UnsupportedError
from qcompiler.generated import Library, Operator, Step
from qcompiler.kernels.cuda_code import GPUS, CudaKernel
from qcompiler.kernels.cuda_weights import Weights
from qcompiler.qtype import QType
from qcompiler.target import Target
from qcompiler.testing import random_linear

CLOSE = 1e-3  # ‖out − ref‖ / ‖ref‖ of one product with float16 outputs
HOPPER = "ort:cuda:sm_90+tvm"
nvcc = pytest.mark.skipif(not edge_cuda_build.installed(), reason="nvcc is not installed")


def operators() -> list[Operator]:
    torch.manual_seed(0)
    two = (
        random_linear(130, 264, "int8:channel", True),
        random_linear(48, 264, "int8:channel", False),
    )
    four = random_linear(200, 576, "int4:g32", True)
    norm = Step("rms_norm", (2,), (torch.rand(264) + 0.5,), 1e-5)
    gate = (Step("silu", (0,)), Step("mul", (2, 1)))
    shift = Step("layer_norm", (0,), (torch.rand(576), torch.rand(576)), 1e-5)
    return [
        Operator("two of one tensor", 264, "", two),
        Operator("4 bits", 576, "", (four,)),
        Operator("a sum's norm", 264, "uint8:token:affine", two, 2,
                 (Step("add", (0, 1)), norm), (2,)),
        Operator("4 by 8 bits", 576, "int8:token",
                 (four, random_linear(600, 576, "int4:g64", False))),
        Operator("float steps", 576, "", (four,), 2, gate),
        Operator("more steps", 576, "int8:token", (four,), 1,
                 (shift, Step("gelu", (1,)), Step("mul", (2,), (torch.tensor([3.0]),))), (1, 2)),
    ]  # fmt: skip


def expected(operator: Operator, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs in float64; what is kept is rounded to float16 on the way."""
    values = [x.float() for x in inputs]
    for step in operator.steps:
        given = [values[n] for n in step.operands]
        if step.kind in ("add", "mul"):
            a, b = (*given, *step.constants)
            made = a + b if step.kind == "add" else a * b
        elif step.kind == "silu":
            made = torch.nn.functional.silu(given[0])
        elif step.kind == "gelu":
            made = torch.nn.functional.gelu(given[0])
        elif step.kind == "rms_norm":
            made = torch.nn.functional.rms_norm(
                given[0], (operator.depth,), step.constants[0], step.epsilon
            )
        else:
            made = torch.nn.functional.layer_norm(
                given[0], (operator.depth,), *step.constants, step.epsilon
            )
        values.append(made.half().float() if len(values) in operator.kept else made)
    x = values[-1]
    if operator.activation:
        kind = QType.parse(operator.activation)
        scale, zero = kind.scale_for(*kind.ranges(x))
        x = (kind.quantize(x, scale, zero, -1).double() - zero.double()) * scale.double()
    found = []
    for part in operator.linears:
        steps = part.scale.reshape(len(part.q), -1)
        # Kernels store scales of groups in float16 where activations are float.
        steps = (steps.half() if part.group and not operator.activation else steps).double()
        wide = steps.repeat_interleave(operator.depth // steps.shape[1], 1)
        made = x.double() @ (part.q.double() * wide).T
        found.append(made if part.bias is None else made + part.bias.double())
    return found + [values[n].double() for n in operator.kept]


# Enough of the driver for one process that asks for kernels: each launch is a line on stdout.
DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
struct config {
  unsigned grid[3], block[3], shared;
  void *stream;
  int *attributes;
  unsigned count;
};
static int number(const char *name, int other) {
  char *text = getenv(name);
  return text ? atoi(text) : other;
}
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *v) { return *v = number("VERSION", 13000), 0; }
int cuDeviceGetCount(int *count) { return *count = number("DEVICES", 1), 0; }
int cuDeviceGet(int *device, int i) { return *device = i, 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  int capability = number("CAPABILITY", 90);
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : 132;
  return 0;
}
int cuDeviceGetName(char *name, int size, int device) { return strcpy(name, "a GPU"), 0; }
int cuCtxGetCurrent(void **context) { return *context = (void *)8, 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuStreamGetCtx(void *stream, void **context) { return *context = (void *)8, 0; }
int cuModuleLoadData(void **module, const void *image) {
  *module = number("LOAD", 0) ? 0 : (void *)8;
  return memcmp(image, "image", 5) ? 200 : number("LOAD", 0);
}
int cuModuleUnload(void *module) { return fclose(fopen("unloaded", "w")); }
int cuModuleGetFunction(void **f, void *module, const char *name) {
  return *f = strdup(name), number("FUNCTION", 0);
}
int cuFuncSetAttribute(void *f, int attribute, int value) { return 0; }
int cuMemsetD8Async(unsigned long long at, unsigned char v, size_t count, void *stream) {
  memset((void *)at, v, count);
  return printf("[\"clear\", %zu]\n", count), 0;
}
typedef unsigned long long wide;
int cuTensorMapEncodeTiled(void *map, int type, unsigned rank, void *at, const wide *sizes,
                           const wide *strides, const unsigned *tile, const unsigned *steps,
                           int interleave, int swizzle, int fetch, int fill) {
  printf("[\"map\", %llu, %llu, %llu, %u, %u]\n", sizes[0], sizes[1], strides[0], tile[0],
         tile[1]);
  return type != 6 || rank != 2 || swizzle != 3 || steps[0] != 1 || (wide)map % 64;
}
int cuLaunchKernelEx(const struct config *c, void *f, void **parameters, void **extra) {
  printf("[\"%s\", %u, %u, %u, %d]\n", (char *)f, c->grid[0], c->grid[1], c->grid[2],
         c->count ? c->attributes[0] : 0);
  fflush(stdout);
  return 0;
}
int cuGetErrorName(int code, const char **name) { return *name = "CUDA_ERROR_SO_AND_SO", 0; }
"""
RUN = """
import sys, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.register_custom_ops_library(sys.argv[1])
for model, rows, depth in zip(*[iter(sys.argv[2:])] * 3):
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = np.zeros((1, int(rows), int(depth)), np.float16)
    found = session.run(None, {i.name: x for i in session.get_inputs()})
    print([list(y.shape) for y in found], flush=True)
"""


def model_of(operator: Operator, made: Library, number: int) -> onnx.ModelProto:
    inputs = [f"x{i}" for i in range(operator.inputs)]
    outputs = [f"y{i}" for i in range(len(operator.columns))]
    node = helper.make_node(
        "QuantizedMatMul", ["w", *inputs], [*outputs, "scratch"], domain="qcompiler", number=number,
        library=made.number,
    )  # fmt: skip
    weights = made.weights[number]
    graph = helper.make_graph(
        [node], "one",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in outputs],
        [helper.make_tensor("w", TensorProto.UINT8, [len(weights)], weights, raw=True)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("qcompiler", 1)]
    made_model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    return made_model


def images(kernels: Sequence[CudaKernel], _: int) -> tuple[list[bytes], list[int]]:
    """Stands for `edge_cuda_build.build_images`."""
    for kernel in kernels:
        kernel.order = tuple(range(len(kernel.arguments)))
    return [b"image", b"image"], [i % 2 for i in range(len(kernels))]


class Pretended:
    """The library of `operators` with images that are none, for the CPU, and a driver for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "driver.c").write_text(DRIVER)
        subprocess.run(["cc", "-w", "-shared", "-fPIC", "driver.c", "-o", "libcuda.so.1"],
                       cwd=folder, check=True)  # fmt: skip

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(edge_cuda_ort, "build_images", images)
            patch.setattr(edge_cuda_products, "SMALL", 0)  # as all of these are
            options = (*edge_cuda_ort.OPTIONS, "-DPROVIDER=NULL")
            patch.setattr(edge_cuda_ort, "OPTIONS", options)
            made = edge_cuda_ort.build(operators(), Target.parse("ort:cuda+tvm"))
        (folder / LIBRARY).write_bytes(made.content)
        for number, operator in enumerate(operators()):
            onnx.save(model_of(operator, made, number), folder / f"{number}.onnx")

    def run(self, *given: tuple[int, int, int], **environment: str) -> Any:
        """Lines of what happened for each (operator, rows, depth), or the last line of an error."""
        words = [str(w) for n, rows, depth in given for w in (f"{n}.onnx", rows, depth)]
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(self.folder / LIBRARY), *words], cwd=self.folder,
            env=os.environ | {"LD_LIBRARY_PATH": str(self.folder)} | environment, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode:
            return done.stderr.strip().splitlines()[-1]
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def pretended(tmp_path_factory: pytest.TempPathFactory) -> Pretended:
    return Pretended(tmp_path_factory.mktemp("pretended"))


EARLY = 6  # launch attribute of the driver's: programmatic serialization


def test_what_is_launched_for_how_many_rows(pretended: Pretended) -> None:
    """130 + 48 outputs of 264 inputs: 9 tiles of 16 rows and 3; 3 stages of 128 columns."""
    found = pretended.run((0, 1, 264), (0, 5, 264), (0, 64, 264), (0, 65, 264), (0, 0, 264))
    assert found[:3] == [
        ["form0_few1_kernel", 9, 1, 1, EARLY], ["form1_few1_kernel", 3, 1, 1, EARLY],
        [[1, 1, 130], [1, 1, 48]],
    ]  # fmt: skip
    assert [line[0] for line in found[3:5]] == ["form0_few8_kernel", "form1_few8_kernel"]
    assert found[6:8] == [
        ["form0_few32_kernel", 9, 2, 1, EARLY], ["form1_few32_kernel", 3, 2, 1, EARLY]
    ]  # fmt: skip
    tile = ["map", 264, 65, 528, 64, 64]  # numbers of a row, rows, bytes from row to row; of a tile
    assert found[9:] == [
        tile, ["form0_many2048_1_kernel", 4, 1, 1, EARLY],
        tile, ["form1_many2048_1_kernel", 2, 1, 1, EARLY], [[1, 65, 130], [1, 65, 48]],
        [[1, 0, 130], [1, 0, 48]],
    ]  # fmt: skip


def test_what_is_computed_before_products(pretended: Pretended) -> None:
    """One kernel for the rows, then the products; which one, by what those read."""
    found = pretended.run((2, 5, 264), (2, 70, 264), (3, 64, 576), (3, 400, 576), (4, 3, 576))
    assert found[:4] == [
        ["before0_2_kernel", 5, 1, 1, EARLY], ["form3_few8_kernel", 9, 1, 1, EARLY],
        ["form4_few8_kernel", 3, 1, 1, EARLY], [[1, 5, 130], [1, 5, 48], [1, 5, 264]],
    ]  # fmt: skip
    assert [line[0] for line in found[4:7]] == [
        "before0_2_kernel", "form3_many64_kernel", "form4_many64_kernel"
    ]  # fmt: skip
    assert found[5][1:4] == [3, 1, 1]  # one block of tokens, 64 outputs each
    assert [line[0] for line in found[8:11]] == [
        "before1_2_kernel", "form5_few64_kernel", "form6_few64_kernel"
    ]  # fmt: skip
    # Of the smaller weight so many tokens are still few; the other is multiplied in float16.
    before, few, many = (line[0] for line in found[12:15])
    assert (before, few) == ("before1_6_kernel", "form5_few64_kernel")
    assert many.startswith("form6_many")
    assert [line[0] for line in found[16:18]] == ["before2_1_kernel", "form2_few4_kernel"]


def test_another_generation_has_its_own_code(pretended: Pretended) -> None:
    found = pretended.run((1, 300, 576), CAPABILITY="89")  # runs what is made for 8.6
    # Two blocks share a piece; the first launch follows no kernel, but the clearing of counters.
    assert found == [
        ["clear", 4 * 256], ["form2_many1024_2_kernel", 2, 5, 2, 0], [[1, 300, 200]]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("outputs", "inputs", "capability", "names", "most"),
    [
        (576, 1536, 90, ["p_few16", "p_few32", "p_many"], 64),
        (2048, 2048, 90, ["p_few16", "p_few32", "p_few64_"], 32),
        (4096, 4096, 90, ["p_few32", "p_few64", "p_many"], 64),
        (192, 576, 80, ["p_few32", "p_few64", "p_many"], edge_cuda_products.SMALL // (192 * 576)),
    ],
)  # fmt: skip
def test_what_takes_up_to_64_tokens(
    outputs: int, inputs: int, capability: int, names: list[str], most: int
) -> None:
    product = edge_cuda_products.Product(Weights(outputs, inputs, 4, 32), False)
    found = edge_cuda_products.choices("p", product, GPUS[capability])
    last = next(i for i, choice in enumerate(found) if choice.most == most)
    for choice, name in zip(found[last - 1 : last + 2], names, strict=True):
        assert choice.kernel.name.startswith(name)
    assert found[last + 1].reads == ("map" if capability == 90 else "x")


def test_what_a_machine_lacks_is_said(pretended: Pretended) -> None:
    def said(**environment: str) -> str:
        text = pretended.run((0, 1, 264), **environment)
        assert isinstance(text, str)
        return text

    assert "made for CUDA 11.8; 12.0 or later is needed" in said(VERSION="11080")
    assert "finds no device that it can use" in said(DEVICES="0")
    wanted = "holds code for compute capability 8.0, 8.6, 9.0, and a GPU has 10.0; compile the"
    assert wanted in said(CAPABILITY="100")
    assert "loading the kernels: the GPU's driver answered CUDA_ERROR_SO_AND_SO" in said(LOAD="1")
    assert not (pretended.folder / "unloaded").exists()
    assert "the GPU's driver answered CUDA_ERROR_SO_AND_SO" in said(FUNCTION="1")
    assert (pretended.folder / "unloaded").exists()  # what was loaded is not left behind
    assert "reads rows of 264 numbers, not of 263" in pretended.run((0, 2, 263))


@pytest.mark.parametrize("bias", [True, False])
def test_queries_with_something_computed_added_are_no_packed_ones(bias: bool) -> None:
    """As an adapter adds it to a product."""
    x, more = (gs.Variable(name, np.float32, (1, 3, 64)) for name in ("x", "more"))
    graph = gs.Graph(inputs=[x, more], opset=23)
    made = []
    for name in "qkv":
        held = (np.ones((64, 64), np.int8), np.ones(64, np.float32))
        constants = [gs.Constant(f"{name}{i}", value) for i, value in enumerate(held)]
        pair, turned, y = (gs.Variable(f"{name}_{role}", np.float32) for role in "dty")
        graph.nodes += [
            gs.Node("DequantizeLinear", "", {"axis": 0}, constants, [pair]),
            gs.Node("Transpose", "", {"perm": [1, 0]}, [pair], [turned]),
            gs.Node("MatMul", name, {}, [x, turned], [y]),
        ]
        added = gs.Constant(f"{name}_bias", np.ones(64, np.float32)) if bias else more
        if bias or name == "q":
            y = gs.Variable(f"{name}_sum", np.float32)
            graph.nodes.append(gs.Node("Add", "", {}, [*graph.nodes[-1].outputs, added], [y]))
        made.append(y)
    graph.outputs = [gs.Variable("out", np.float32)]
    graph.nodes.append(gs.Node("GroupQueryAttention", "attention", {}, made, graph.outputs))
    use_generated_on_gpu(graph, lambda given: Library(b"x", 1, (b"w",) * len(given), (False,)))
    attention = next(node for node in graph.nodes if node.op == "GroupQueryAttention")
    assert [t.name for t in attention.inputs] == (
        ["q_sum_packed_qkv", "", ""] if bias else ["q_sum", "k_y", "v_y"]
    )


def test_what_the_target_refuses() -> None:
    target = Target.parse("ort:cuda+tvm")
    assert target.refusal(QType.parse("int4:g64"), None) is None
    assert target.refusal(QType.parse("int8:channel"), None) is None
    tokens, rows = QType.parse("uint8:token:affine"), QType.parse("int8:channel")
    assert target.refusal(rows, tokens) is None
    assert target.refusal(QType.parse("int4:g32"), QType.parse("int8:token")) is None
    assert "int8:token activations, not uint8" in str(
        target.refusal(QType.parse("int4:g32"), tokens)
    )
    assert "8 bits by token" in str(target.refusal(rows, QType.parse("uint8:tensor:affine")))
    assert "two to six times" in str(Target.parse("ort:cuda").refusal(rows, tokens))
    assert "symmetric weights of 4 or 8 bits" in str(target.refusal(QType.parse("int3:g32"), None))
    thin = Operator("thin", 12, "", (random_linear(8, 12, "int8:channel", False),))
    with pytest.raises(UnsupportedError, match="not a multiple of 8"):
        edge_cuda_ort.build([thin], target)


@pytest.fixture(scope="module")
def llama(compiled_llama: Callable[[str], Artifact]) -> Artifact:
    """A language model of its own operators, with few kernels: nvcc takes a second for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edge_cuda_products, "SIZES", (1, 64))
        return compiled_llama(HOPPER)


def test_a_language_model_by_token(compiled_llama: Callable[..., Artifact]) -> None:
    """Sums, norms and gates belong to the operators; nothing is left of quantization."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edge_cuda_products, "SIZES", (64,))
        patch.setattr(edge_cuda_ort, "build_images", images)
        made = compiled_llama(HOPPER, weights="int8:channel", activations="uint8:token:affine")
    graph = onnx.load(made.folder / MODEL).graph
    own = [node for node in graph.node if node.domain == "qcompiler"]
    layer = [(1, 1), (2, 3), (2, 1)]  # after attention; the sum is kept for the next one
    sizes = [(len(node.input) - 1, len(node.output) - 1) for node in own]
    assert sizes == [(1, 1), *layer, (2, 2), *layer, (2, 1)]
    assert not {"MatMul", "RMSNormalization", "Sigmoid"} & {n.op_type for n in graph.node}
    layers = made.manifest["audit"]["layers"]
    assert {(x["op"], x["kernel"]) for x in layers} == {("qcompiler.QuantizedMatMul", "integer")}
    assert len(layers) == 15
    assert made.manifest["audit"]["broken"] == []


@nvcc
def test_a_language_model_on_its_own_operators(llama: Artifact) -> None:
    graph = onnx.load(llama.folder / MODEL).graph
    own = [node for node in graph.node if node.domain == "qcompiler"]
    # Queries, keys and values are one linear; gate and up share an operator. It keeps the sum.
    assert [len(node.output) - 1 for node in own] == [1, 1, 3, 1, 2, 1, 3, 1, 1]
    assert not {"MatMul", "MatMulNBits"} & {node.op_type for node in graph.node}
    kept = {name for node in graph.node for name in node.input}
    assert all(node.output[-1] not in kept for node in own)  # scratch
    assert not (llama.folder / PREFILL).exists()
    assert (llama.folder / LIBRARY).is_file()
    layers = llama.manifest["audit"]["layers"]
    assert {(x["op"], x["kernel"]) for x in layers} == {
        ("qcompiler.QuantizedMatMul", "weights only")
    }
    assert len(layers) == 15
    assert llama.manifest["audit"]["broken"] == []
    assert llama.manifest["target"] == HOPPER
    options = onnxruntime.SessionOptions()
    if not torch.cuda.is_available():
        with pytest.raises(Exception, match="no GPU"):
            options.register_custom_ops_library(str(llama.folder / LIBRARY))


@pytest.mark.gpu
@nvcc
def test_products_on_the_gpu(tmp_path: Path) -> None:
    """Against float64, for numbers of rows at and between those of the kernels' blocks."""
    made = edge_cuda_ort.build(operators(), Target.parse(HOPPER))
    (tmp_path / LIBRARY).write_bytes(made.content)
    for number, operator in enumerate(operators()):
        onnx.save(model_of(operator, made, number), tmp_path / MODEL)
        session = ort_cuda.session(tmp_path / MODEL)
        for rows in (1, 2, 5, 8, 31, 64, 65, 200, 1000):
            given = [torch.randn(rows, operator.depth).half() for _ in range(operator.inputs)]
            found = session.run(None, {f"x{i}": x.numpy() for i, x in enumerate(given)})
            for want, got in zip(expected(operator, given), found, strict=True):
                assert np.isfinite(got).all()
                error = (torch.from_numpy(got).double() - want).norm() / want.norm()
                assert error < CLOSE


@pytest.mark.gpu
@nvcc
def test_a_token_as_a_graph(llama: Artifact) -> None:
    tokens = np.arange(3, 43, dtype=np.int64)
    decoder = ort_cuda_decode.Decoder(llama.folder)
    decoder.reset(44)
    whole = torch.from_numpy(decoder.feed(tokens)).double()
    for first in (20, 5):
        decoder.reset(44)
        parts = [decoder.feed(tokens[:first])]
        parts += [decoder.feed(tokens[i : i + 1]) for i in range(first, len(tokens))]
        got = torch.from_numpy(np.concatenate(parts)).double()
        assert (got - whole).norm() / whole.norm() < 1e-2
    assert llama.generate("Hello wor", 6).tokens
