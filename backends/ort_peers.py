"""ONNX Runtime's own quantizers, applied to the same float model.

They are what `qcompiler bench` compares an artifact with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qcompiler.errors import InputError, nearest
from qcompiler.program import Batch

PEERS = ("ort-dynamic", "ort-static", "ort-int4")
GROUP = 32  # weights that share a scale in `ort-int4`


def build(
    name: str, model: Path, folder: Path, batches: Callable[[], Iterable[Batch]], inputs: list[str]
) -> Path:
    """Quantize `model` with ONNX Runtime's tools as their documentation recommends for the CPU.

    Args:
        name: `ort-dynamic` (quantize_dynamic, per channel), `ort-static` (QDQ, S8S8 min-max,
            per channel) or `ort-int4` (MatMulNBits: 4-bit weights to nearest in groups of 32,
            activations in 8 bits within its kernel).
        model: the float ONNX model.
        folder: where to write the result.
        batches: calibration batches for `ort-static`.
        inputs: names of the inputs.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if name not in PEERS:
        raise InputError(f"bench: nothing known as '{name}'; {nearest(name, ['float', *PEERS])}")
    result = folder / f"{name}.onnx"
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        if name == "ort-dynamic":
            # The tool takes the standard Attention for its own and writes an invalid model.
            graph = onnx.load(model, load_external_data=False).graph
            standard = [n.name for n in graph.node if n.op_type == "Attention" and not n.domain]
            quantize_dynamic(
                model,
                result,
                per_channel=True,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=standard,
            )
            return result
        if name == "ort-int4":
            from onnxruntime.quantization import matmul_nbits_quantizer as tools

            logging.getLogger(tools.__name__).setLevel(logging.ERROR)  # it tells of every node
            tool = tools.MatMulNBitsQuantizer(
                onnx.load(model), block_size=GROUP, is_symmetric=True, accuracy_level=4
            )
            tool.process()
            tool.model.save_model_to_file(str(result), use_external_data_format=False)
            return result
        prepared = folder / "prepared.onnx"
        try:
            quant_pre_process(model, prepared, skip_symbolic_shape=True)
        except Exception:  # it fails on some graphs; its documentation calls this step optional
            prepared = model

        class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
            def __init__(self) -> None:
                self.rest = iter(batches())

            def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
                batch = next(self.rest, None)
                if batch is None:
                    return None
                return {n: t.numpy() for n, t in zip(inputs, batch, strict=True)}

        quantize_static(
            prepared, result, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )  # fmt: skip
    finally:
        logger.setLevel(level)
    return result
