"""ONNX Runtime's CUDA provider: what is written, what is refused, and on a GPU what runs.

The CPU provider runs float16 graphs too, slowly: without a GPU it stands for the other one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import qcompiler
from qcompiler import benching, gpu, integer
from qcompiler.artifact import REFERENCE, Artifact
from qcompiler.backends import ort, ort_cuda, ort_cuda_decode
from qcompiler.backends.ort_phases import PREFILL
from qcompiler.backends.ort_session import MODEL
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.models import ZOO
from qcompiler.passes.normalize import normalize
from qcompiler.program import Program, capture
from qcompiler.qtype import QType
from qcompiler.target import Target

CLOSE = 5e-3  # ‖out − ref‖ / ‖ref‖ of float16 arithmetic in two layers


@pytest.fixture(scope="module")
def llama(compiled_llama: Callable[..., Artifact]) -> Artifact:
    return compiled_llama("ort:cuda")


@pytest.fixture(scope="module", params=["int8", "int4"])
def stored(compiled_llama: Callable[..., Artifact], request: pytest.FixtureRequest) -> Artifact:
    """With its cache in integers."""
    kind = f"{request.param}:channel"
    return compiled_llama("ort:cuda", keys=kind, values=kind)


def expected(artifact: Artifact) -> tuple[Any, tuple[Any, ...]]:
    """A batch and the quantized program's outputs by the reference executor."""
    batch = artifact.batches("held-out")[0]
    saved = torch.export.load(artifact.folder / REFERENCE / "quantized.pt2")
    return batch, integer.run(Program(saved), batch)


def text(artifact: Artifact, tokens: Any) -> torch.Tensor:
    """The quantized program's logits for a text without a past, by the reference executor."""
    program = Program(torch.export.load(artifact.folder / REFERENCE / "quantized.pt2"))
    ids = torch.from_numpy(tokens)[None]
    known = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(len(tokens))[None],
    }
    batch = artifact.batches("held-out")[0]
    given = zip(program.inputs, batch, strict=True)
    logits, *_ = integer.run(
        program, tuple(known[n] if n in known else x[:1, :, :0] for n, x in given)
    )
    return logits[0]


def error(got: Any, want: torch.Tensor) -> float:
    wide = torch.as_tensor(got).double()
    return float((wide - want.double()).norm() / want.double().norm())


def test_a_language_model_in_two_forms(llama: Artifact) -> None:
    decode, prefill = (onnx.load(llama.folder / name).graph for name in (MODEL, PREFILL))
    assert sum(n.op_type == "MatMulNBits" for n in decode.node) == 11  # q, k and v are one
    assert {n.op_type for n in prefill.node} & {"MatMulNBits", "MatMul"} == {"MatMul"}
    for graph in (decode, prefill):
        kinds = {t.data_type for t in graph.initializer}
        assert TensorProto.FLOAT not in kinds
        assert TensorProto.FLOAT16 in kinds
        caches = [v for v in (*graph.input, *graph.output) if v.name.startswith(("past", "pres"))]
        assert {v.type.tensor_type.elem_type for v in caches} == {TensorProto.FLOAT16}
        assert graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    batch, want = expected(llama)
    session = onnxruntime.InferenceSession(
        llama.folder / PREFILL, providers=["CPUExecutionProvider"]
    )
    feed = {
        i.name: (x.half() if "16" in i.type else x).numpy()
        for i, x in zip(session.get_inputs(), batch, strict=True)
    }
    for got, reference in zip(session.run(None, feed), want, strict=True):
        assert error(got, reference) < CLOSE
    assert llama.manifest["target"] == "ort:cuda"
    assert any("prefill.onnx" in note for note in llama.manifest["warnings"])
    assert llama.manifest["audit"]["broken"] == []


def test_a_cache_of_integers(stored: Artifact) -> None:
    """Attention in float16, scales in float32, in the model for tokens and that for prompts."""
    assert any("before rounding" in warning for warning in stored.manifest["warnings"])
    for name in (MODEL, PREFILL):
        graph = onnx.load(stored.folder / name).graph
        constants = {t.name: t.data_type for t in graph.initializer}
        caches = [v for v in (*graph.input, *graph.output) if v.name.startswith(("past", "pres"))]
        (kind,) = {v.type.tensor_type.elem_type for v in caches}
        attentions = [n for n in graph.node if n.op_type == "GroupQueryAttention"]
        assert len(caches) == 4 * len(attentions)
        for node in attentions:
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert kind == {8: TensorProto.INT8, 4: TensorProto.UINT8}[values["kv_cache_bit_width"]]
            assert values["k_quant_type"] == values["v_quant_type"] == b"PER_CHANNEL"
            assert [constants[n] for n in node.input[12:14]] == [TensorProto.FLOAT] * 2


def test_an_encoder_falls_back_to_float_weights(tmp_path: Path, torchlib_once: None) -> None:
    spec = ZOO["tiny-attention-block"].build()
    artifact = qcompiler.compile(spec, target="ort:cuda", recipe="w8", out=tmp_path / "out")
    graph = onnx.load(artifact.folder / MODEL).graph
    assert "MatMulNBits" not in {n.op_type for n in graph.node}
    assert not (artifact.folder / PREFILL).exists()
    assert any("multiplied as float16" in note for note in artifact.manifest["warnings"])
    batch, want = expected(artifact)
    session = onnxruntime.InferenceSession(
        artifact.folder / MODEL, providers=["CPUExecutionProvider"]
    )
    feed = {
        i.name: (x.half() if "16" in i.type else x).numpy()
        for i, x in zip(session.get_inputs(), batch, strict=True)
    }
    assert error(session.run(None, feed)[0], want[0]) < CLOSE


def widened(path: Path) -> onnx.ModelProto:
    """A bfloat16 model as the CPU provider, which has no such kernels, can run it: its numbers in
    float32.
    """
    model = onnx.load(path)
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            elif attribute.t.data_type == TensorProto.BFLOAT16:
                values = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(values))
    return model


def test_a_language_model_in_bfloat16(compiled_llama: Callable[..., Artifact]) -> None:
    """The same graphs as in float16; weights keep 8 bits of their products with scales."""
    artifact = compiled_llama("ort:cuda", products="bfloat16")
    for name in (MODEL, PREFILL):
        graph = onnx.load(artifact.folder / name).graph
        kinds = {t.data_type for t in graph.initializer}
        assert TensorProto.BFLOAT16 in kinds
        assert not {TensorProto.FLOAT, TensorProto.FLOAT16} & kinds
        caches = [v for v in (*graph.input, *graph.output) if v.name.startswith(("past", "pres"))]
        assert {v.type.tensor_type.elem_type for v in caches} == {TensorProto.BFLOAT16}
    session = onnxruntime.InferenceSession(
        widened(artifact.folder / PREFILL).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    batch, want = expected(artifact)
    names = [i.name for i in session.get_inputs()]
    feed = {n: x.numpy() for n, x in zip(names, batch, strict=True)}
    for got, reference in zip(session.run(None, feed), want, strict=True):
        assert error(got, reference) < 8 * CLOSE  # three bits fewer


class Rounded(torch.nn.Module):
    """Operators without a kernel for bfloat16, side by side, between two that have one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.round(self.linear(x) * 16).clamp(-20.0, 1e6)) * 1e9


def test_bfloat16_leaves_what_has_no_kernel(tmp_path: Path, torchlib_once: None) -> None:
    module = Rounded().eval()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    ort.lower(normalize(capture(module, (x,))), tmp_path, half="bfloat16")
    graph = onnx.load(tmp_path / MODEL).graph
    order = [n.op_type for n in graph.node if n.op_type in ("Cast", "Round", "Clip")]
    order = order[order.index("Round") - 1 :]
    assert order == ["Cast", "Round", "Clip", "Cast", "Cast"]  # the last for the output
    session = onnxruntime.InferenceSession(
        widened(tmp_path / MODEL).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (got,) = session.run(None, {graph.input[0].name: x.numpy()})
    with torch.no_grad():
        assert error(got, module(x)) < 4 * CLOSE


def test_a_tensor_of_bfloat16_for_onnx_runtime() -> None:
    x = torch.tensor([[1.0, -3e38], [0.1, 0]]).bfloat16()
    for given in (x, x[:0], x.float()):
        assert torch.equal(torch.from_dlpack(ort_cuda.given_value(given)), given)


def test_results_of_a_bfloat16_model(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = [2, 3]
    x, y, positive = (
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind in (
            ("x", TensorProto.BFLOAT16), ("y", TensorProto.BFLOAT16), ("positive", TensorProto.BOOL)
        )
    )  # fmt: skip
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Greater", ["wide", "zero"], ["positive"]),
        helper.make_node("Cast", ["wide"], ["y"], to=TensorProto.BFLOAT16),
    ]
    zero = [helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])]
    graph = helper.make_graph(nodes, "g", [x], [y, positive], zero)
    opsets = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    monkeypatch.setattr(ort_cuda, "session", lambda path: session)
    given = torch.tensor([[-1.0, 0, 2.5], [3e38, -2, 1]]).bfloat16().float()
    out, found = ort_cuda.load_model(Path())(given)
    assert out.dtype == torch.float32
    assert found.dtype == torch.bool
    assert torch.equal(out, given)
    assert torch.equal(found, given > 0)


class Turned(torch.nn.Module):
    """Rotary angles in the graph, a constant that they share with data, a guarded division."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", 10000.0 ** -torch.arange(0, 1, 1 / 8))
        self.register_buffer("gains", torch.linspace(0.3, 1, 8))

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rates = self.rates[None, :, None].expand(places.shape[0], -1, 1)
        angles = (rates @ places[:, None].to(rates.dtype)).transpose(1, 2) * self.gains
        turned = x * angles.cos() + x.flip(-1) * angles.sin() + torch.sin(x) * self.gains
        return turned, torch.nn.functional.normalize(x, dim=-1, eps=1e-12)


def test_float16_keeps_angles_and_guards(tmp_path: Path, torchlib_once: None) -> None:
    module = Turned()
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    x[0, 1] = 0
    places = torch.tensor([[2047, 2049, 4097, 9001, 30001]]).expand(2, -1).contiguous()
    sizes = {0: "batch", 1: "sequence"}
    program = normalize(capture(module, (x, places), {"x": sizes, "places": sizes}))
    ort.lower(program, tmp_path, input_names=("x", "places"), half="float16")
    model = tmp_path / MODEL
    running = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        # The positions are exact; the rates are those of float32.
        exact = module.double()(x.double(), places)
    feed = {"x": x.half().numpy(), "places": places.numpy()}
    for got, want in zip(running.run(None, feed), exact, strict=True):
        assert np.isfinite(got).all()
        assert error(got, want) < CLOSE
    graph = onnx.load(model).graph
    shared = [t.data_type for t in graph.initializer if list(t.dims) == [8]]
    assert sorted(shared) == [TensorProto.FLOAT, TensorProto.FLOAT16]  # the gains in both


class Stepped(torch.nn.Module):
    """A step from number to number, counted in floats: ONNX has no Range in float16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.linspace(0, 0.5, 5)


def test_float16_keeps_what_onnx_has_not_in_it(tmp_path: Path, torchlib_once: None) -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).half().float()
    ort.lower(normalize(capture(Stepped(), (x,))), tmp_path, half="float16")
    session = onnxruntime.InferenceSession(tmp_path / MODEL, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    (got,) = session.run(None, {name: x.half().numpy()})
    assert error(got, Stepped()(x)) < CLOSE
    assert "Range" in [node.op_type for node in onnx.load(tmp_path / MODEL).graph.node]


def test_what_the_target_refuses() -> None:
    target = Target.parse("ort:cuda")
    four = QType.parse("int4:g32")
    assert target.refusal(four, None) is None
    assert "two to six times" in str(target.refusal(four, QType.parse("int8:token")))
    assert target.refusal(four, None, (QType.parse("int8:channel"),) * 2) is None
    assert "kept as int8" in str(target.refusal(four, None, (QType.parse("int8:token"),) * 2))
    assert "all of a model" in str(target.refusal(four, None, products="bfloat16"))
    own = target.with_kernels("tvm")
    assert "read float16" in str(own.refusal(four, None, products="bfloat16"))
    assert target.share_of_float(4, 1) < 1 < target.share_of_float(4, 300)
    assert target.share_of_float(8, 1) < 1 < target.share_of_float(8, 1, 2048)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a GPU of one mebibyte of free memory."""
    monkeypatch.setattr(ort_cuda, "device", lambda: gpu.Device(0, "a GPU", 90, 1 << 30))
    monkeypatch.setattr(ort_cuda, "free_memory", lambda: 1 << 20)
    return monkeypatch


def test_what_a_machine_lacks_is_one_line(
    llama: Artifact, pretended: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no such file"):
        ort_cuda.session(tmp_path / MODEL)
    kinds = [ort_cuda.PROVIDER, "CPUExecutionProvider"]
    pretended.setattr(onnxruntime, "get_available_providers", lambda: kinds)
    with pytest.raises(UnsupportedError, match=r"needs about \d+ MiB on the GPU, and 1 MiB of a"):
        llama.runner()
    pretended.setattr(ort_cuda, "free_memory", lambda: 1 << 40)
    pretended.setattr(onnxruntime, "preload_dlls", lambda: None)
    capi = tmp_path / "capi"
    capi.mkdir()
    for name in ("libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"):
        (capi / name).write_bytes(b"no library")
    pretended.setattr(onnxruntime, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UnsupportedError, match=r"CUDA provider needs .*which was not found"):
        llama.runner()
    pretended.setattr(onnxruntime, "get_available_providers", lambda: kinds[1:])
    with pytest.raises(UnsupportedError, match="has no CUDA provider"):
        llama.runner()


def test_a_model_that_is_no_graph_is_one_line(
    llama: Artifact, pretended: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("This session cannot use the graph capture feature as requested")

    pretended.setattr(onnxruntime, "get_available_providers", lambda: [ort_cuda.PROVIDER])
    pretended.setattr(ort_cuda, "free_memory", lambda: 1 << 40)
    pretended.setattr(onnxruntime, "preload_dlls", lambda: None)
    pretended.setattr(ort_cuda, "_check_libraries", lambda folder: None)
    pretended.setattr(ort_cuda, "open_session", refuse)
    with pytest.raises(UnsupportedError, match="not all of its operators run on the GPU"):
        llama.generate("Hello", 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(llama: Artifact) -> None:
    with pytest.raises(UnsupportedError, match="no GPU"):
        llama.runner()
    with pytest.raises(UnsupportedError, match="no GPU"):
        llama.generate("Hello", 2)


def test_bench_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "device", lambda: gpu.Device(0, "a GPU", 90, 1 << 30))
    assert benching._machine("ort:cuda:sm_90+tvm")["gpu"] == "a GPU"
    assert "gpu" not in benching._machine("ort:cpu")


def test_steps_with_a_fixed_mask(
    language_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder's own logic, with the CPU in the place of the GPU and float32 caches."""

    def session(path: Path, graphs: bool = False) -> Any:
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def value(array: Any, where: str = "") -> Any:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def refused(array: Any, where: str = "") -> Any:
        raise RuntimeError("no room\nat line 1")

    monkeypatch.setattr(ort_cuda_decode, "session", session)
    monkeypatch.setattr(ort_cuda_decode, "_value", value)
    monkeypatch.setattr(ort_cuda_decode, "_options", lambda graph: onnxruntime.RunOptions())
    monkeypatch.setattr(ort_cuda_decode, "free_memory", lambda: 64 << 10)
    tokens = np.arange(3, 43, dtype=np.int64)
    decoder = ort_cuda_decode.Decoder(language_artifact.folder)
    decoder.reset(44)
    whole = decoder.feed(tokens)
    for capacity in (44, 48, 40):
        decoder.reset(capacity)
        parts = [decoder.feed(tokens[:20])]
        parts += [decoder.feed(tokens[i : i + 1]) for i in range(20, len(tokens))]
        assert error(np.concatenate(parts), torch.from_numpy(whole)) < 1e-5
    decoder.reset(44)
    assert np.array_equal(decoder.feed(tokens, last=True), whole[-1:])
    # Two layers of two heads of 16 numbers, keys and values: 512 bytes a token.
    with pytest.raises(UnsupportedError, match="a cache for 2048 tokens needs 1 MiB"):
        decoder.reset(2048)
    # 48 tokens' memory is ONNX Runtime's own and free: 152 tokens are 4096 bytes above the 64 KiB.
    decoder.reset(152)
    monkeypatch.setattr(ort_cuda_decode, "free_memory", lambda: 1 << 30)
    monkeypatch.setattr(ort_cuda_decode, "_value", refused)
    with pytest.raises(UnsupportedError, match=r"are free; .*\(no room\)"):
        decoder.reset(4096)


@pytest.mark.gpu
def test_on_the_gpu(llama: Artifact) -> None:
    batch, want = expected(llama)
    for got, reference in zip(llama.runner()(*batch), want, strict=True):
        assert error(got, reference) < CLOSE
    rows = [r for r in llama.manifest["errors"]["lowering"] if r["data"] == "held-out"]
    assert min(row["sqnr_db"] for row in rows) > 40


@pytest.mark.gpu
def test_integer_caches_on_the_gpu(stored: Artifact, llama: Artifact) -> None:
    """Later tokens read what is kept; those of a prompt read each other's as they were before."""
    tokens = np.arange(3, 43, dtype=np.int64)
    rounded, exact = (text(artifact, tokens) for artifact in (stored, llama))
    decoder = ort_cuda_decode.Decoder(stored.folder)
    decoder.reset(44)
    assert error(decoder.feed(tokens), exact) < 2 * CLOSE
    decoder.reset(44)
    one_by_one = np.concatenate([decoder.feed(tokens[i : i + 1]) for i in range(len(tokens))])
    assert error(one_by_one, rounded) < error(exact, rounded) / 4


@pytest.mark.gpu
def test_a_token_as_a_graph(llama: Artifact) -> None:
    """Token by token from a captured graph, and in pieces: the logits of the whole text."""
    tokens = np.arange(3, 43, dtype=np.int64)
    decoder = ort_cuda_decode.Decoder(llama.folder)
    decoder.reset(44)
    whole = decoder.feed(tokens)
    for first in (20, 5):  # both forms of the model read the first piece
        decoder.reset(44)
        parts = [decoder.feed(tokens[:first])]
        parts += [decoder.feed(tokens[i : i + 1]) for i in range(first, len(tokens))]
        # Both are float16 arithmetic, each that far from the exact result.
        assert error(np.concatenate(parts), torch.from_numpy(whole)) < 2 * CLOSE
    decoder.reset(48)  # another cache, another graph
    decoder.feed(tokens[:20])
    last = [decoder.feed(tokens[i : i + 1]) for i in range(20, len(tokens))][-1]
    assert error(last, torch.from_numpy(whole[-1:])) < 2 * CLOSE
    assert llama.generate("Hello wor", 6).tokens
