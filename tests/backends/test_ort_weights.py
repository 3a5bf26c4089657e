"""Writing weights past protobuf gives the file that protobuf would write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from qcompiler.backends import ort_weights
from qcompiler.errors import UnsupportedError
from qcompiler.qtype import pack

RNG = np.random.default_rng(0)
TURNED = RNG.standard_normal((300, 40)).astype(np.float32).T  # not contiguous
SMALL = np.arange(40, dtype=np.float32)
NIBBLES = RNG.integers(-8, 8, (30, 50)).astype(np.int8)


def graph() -> gs.Graph:
    x = gs.Variable("x", np.float32, ("rows", 300))
    y, z = gs.Variable("y", np.float32), gs.Variable("z", np.float32, ("rows", 40))
    integers = gs.Constant("integers", NIBBLES)
    integers.element = "int4"
    scale = gs.Constant("scale", np.ones(30, np.float32))
    wide, attrs = gs.Variable("wide", np.float32, (30, 50)), {"axis": 0}
    return gs.Graph(
        [
            gs.Node("MatMul", inputs=[x, gs.Constant("weight", TURNED.T)], outputs=[y]),
            gs.Node("Add", inputs=[y, gs.Constant("bias", SMALL)], outputs=[z]),
            gs.Node("DequantizeLinear", attrs=attrs, inputs=[integers, scale], outputs=[wide]),
        ],
        inputs=[x],
        outputs=[z, wide],
        opset=21,
        ir_version=10,
    )  # fmt: skip


def expected() -> onnx.ModelProto:
    whole = graph()
    for node in whole.nodes:  # onnx-graphsurgeon writes the bytes of the int8
        for tensor in node.inputs:
            vars(tensor).pop("element", None)
    model = gs.export_onnx(whole)
    for tensor in model.graph.initializer:
        if tensor.name == "integers":
            tensor.raw_data = pack(torch.from_numpy(NIBBLES), "int4").numpy().tobytes()
            tensor.data_type = onnx.TensorProto.INT4
    return model


@pytest.mark.parametrize("piece", [1 << 24, 100])
def test_the_file_is_what_protobuf_writes(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_weights, "PIECE", piece)
    model, held = ort_weights.export(graph())
    assert set(held) == {"weight", "integers"}
    assert len(model.SerializeToString()) < 2000
    ort_weights.save(model, held, tmp_path / "model.onnx", external=False)
    assert (tmp_path / "model.onnx").read_bytes() == expected().SerializeToString()
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_external_files_hold_the_same(tmp_path: Path) -> None:
    model, held = ort_weights.export(graph())
    ort_weights.save(model, held, tmp_path / "model.onnx", external=True)
    loaded = onnx.load(tmp_path / "model.onnx")
    for got, want in zip(loaded.graph.initializer, expected().graph.initializer, strict=True):
        assert (got.name, got.data_type, got.dims) == (want.name, want.data_type, want.dims)
        assert got.raw_data == want.raw_data
    assert (tmp_path / "model.onnx.data").stat().st_size == TURNED.nbytes + NIBBLES.size // 2


def test_a_broken_model_leaves_no_second_file(tmp_path: Path) -> None:
    model, held = ort_weights.export(graph())
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(UnsupportedError, match=r"no ONNX form: .*NoSuchOperator"):
        ort_weights.save(model, held, tmp_path / "model.onnx", external=False)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_the_exporters_values_share_the_modules_memory() -> None:
    linear = torch.nn.Linear(64, 64)
    exported = torch.onnx.export(
        torch.export.export(linear, (torch.ones(1, 64),)), (), dynamo=True, optimize=False,
        verbose=False,
    )  # fmt: skip
    taken = ort_weights.take(exported.model)
    (name,) = taken
    assert np.shares_memory(taken[name], linear.weight.detach().numpy())
    imported = gs.import_onnx(exported.model_proto)
    ort_weights.give(imported, taken)
    assert imported.tensors()[name].values is taken[name]
    with pytest.raises(ValueError, match="read-only"):
        taken[name][0, 0] = 1
