"""Operators of ONNX Runtime's CUDA provider on generated kernels: shapes, random weights, what they
compute. `ort_cuda_kernels.py` measures them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from ort_cuda import BLOCK, EPSILON, SIZES, SMOLLM2

from qcompiler import ops
from qcompiler.backends.ort_session import LIBRARY
from qcompiler.kernels.cuda_units import units
from qcompiler.kernels.cuda_weights import Bytes, Nibbles, Weights, pack, pack_nibbles

TABLE = "kernels.json"
ALIGN = 256  # of what an operator's constants consist of
TOKENS = (1, 16, 64, 128, 256, 512, 2048)


@dataclass(frozen=True)
class Layer:
    """A linear: outputs, inputs, bits of a weight, columns that share a scale (0: a row's one)."""

    outputs: int
    inputs: int
    bits: int = 4
    group: int = 128


@dataclass(frozen=True)
class Operation:
    """An operator: linears of what is computed of rows.

    Attributes:
        layers: which all read the same.
        activation: to which that is quantized by token; empty: float16.
        before: as `ort_cuda.Writer.linears` has it.
        inputs: tensors that it reads.
        kept: whether their sum is an output.
    """

    layers: tuple[Layer, ...]
    activation: str = ""
    before: str = ""
    inputs: int = 1
    kept: bool = False

    @property
    def depth(self) -> int:
        """Numbers of a row."""
        return self.layers[0].inputs

    def form(self, layer: Layer) -> Any:
        """How a layer's weight is packed."""
        size = layer.outputs, layer.inputs
        if not self.activation:
            return Weights(*size, layer.bits, layer.group)
        if layer.group:
            return Nibbles(*size, layer.group)
        return Bytes(*size, "u8" if self.activation.startswith("u") else "s8")

    def steps(self) -> tuple[Any, ...]:
        """For the compiler."""
        from qcompiler.generated import Step

        if self.before == "gate":
            return Step("silu", (0,)), Step("mul", (2, 1))
        if not self.before:
            return ()
        norm = Step("rms_norm", (self.inputs - 1 + (self.inputs > 1),),
                    (torch.ones(self.depth),), EPSILON)  # fmt: skip
        return (norm,) if self.inputs == 1 else (Step("add", (0, 1)), norm)


W8A8, W4A8 = "uint8:token:affine", "int8:token"
CHAINS = (
    *(Operation((layer,)) for layer in (Layer(4096, 4096), Layer(8192, 8192),
                                        Layer(8192, 8192, 8, 0))),
    *(Operation((Layer(n, n, 8, 0),), W8A8) for n in (4096, 8192)),
    *(Operation((Layer(n, n),), W4A8) for n in (4096, 8192)),
)  # fmt: skip
# Kind → bits and group of a decoder's weights, what they are multiplied with, and whether sums,
# norms and gates belong to the operators.
DECODERS = {
    "own": (4, BLOCK, "", True), "own w8a8": (8, 0, W8A8, True), "own w4a8": (4, BLOCK, W4A8, True),
    "own, products alone": (4, BLOCK, "", False),
}  # fmt: skip


def decoder_operators(
    kind: str, width: int, inner: int, vocabulary: int, size: int = 128, shared: int = 2, **_: int
) -> tuple[Operation, ...]:
    """The operators of a decoder of `ort_cuda`."""
    bits, group, activation, fused = DECODERS[kind]
    heads = width // size

    def linears(count: int, outputs: int, inputs: int, *how: Any) -> Operation:
        layers = (Layer(outputs, inputs, bits, group),) * count
        return Operation(layers, activation, *(how if fused else ()))

    qkv = (heads + 2 * (heads // shared)) * size
    return (
        linears(1, qkv, width, "norm"), linears(1, qkv, width, "norm", 2, True),
        linears(1, width, width), linears(2, inner, width, "norm", 2, True),
        linears(1, width, inner, "gate", 2), linears(1, vocabulary, width, "norm", 2),
    )  # fmt: skip


def operators() -> list[Operation]:
    """All that the library has."""
    own = (op for sizes in (SIZES, SMOLLM2) for kind in DECODERS
           for op in decoder_operators(kind, **sizes))  # fmt: skip
    return list(dict.fromkeys((*CHAINS, *own)))


def build(folder: Path) -> None:
    """Compile the library."""
    from qcompiler.backends import edge_cuda_ort, edge_cuda_products
    from qcompiler.generated import Linear, Operator
    from qcompiler.target import Target

    edge_cuda_ort.packed_weight = lambda weight, form: torch.zeros(form.nbytes, dtype=torch.uint8)
    edge_cuda_products.SIZES = tuple(n for n in edge_cuda_products.SIZES if n in TOKENS)
    folder.mkdir(parents=True, exist_ok=True)

    def linear(layer: Layer) -> Linear:
        q = torch.zeros(1, 1, dtype=torch.int8).expand(layer.outputs, layer.inputs)
        if layer.bits == 8:
            q = q + 127
        count = layer.inputs // layer.group if layer.group else 1
        scale = torch.ones(layer.outputs, count)
        axis = 1 if layer.group else 0
        scale = scale if layer.group else scale[:, 0]
        zero = torch.zeros_like(scale, dtype=torch.int8)
        return Linear(str(layer), q, scale, zero, axis, layer.group, None)

    made = edge_cuda_ort.build(
        [Operator(str(n), op.depth, op.activation, tuple(map(linear, op.layers)), op.inputs,
                  op.steps(), (2,) if op.kept else ())
         for n, op in enumerate(operators())],
        Target.parse("ort:cuda:sm_90+tvm"),
    )  # fmt: skip
    (folder / LIBRARY).write_bytes(made.content)
    sizes = [len(blob) for blob in made.weights]
    (folder / TABLE).write_text(json.dumps({"number": made.number, "sizes": sizes}))


class Own:
    """The library's operators with random weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = json.loads((folder / TABLE).read_text())
        self.known = operators()

    def weights(self, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers (N, K) and scales (N, groups), on the GPU; products keep their input's size."""
        low = 1 << layer.bits - 1
        shape = (layer.outputs, layer.inputs)
        # A mean other than zero would grow from product to product.
        q = torch.randint(1 - low, low, shape, dtype=torch.int8, device="cuda")
        count = layer.inputs // layer.group if layer.group else 1
        spread = torch.rand(layer.outputs, count, device="cuda") * 0.4 + 0.8
        return q, (spread * layer.inputs**-0.5 / low * 1.73).half().float()

    def constants(
        self, op: Operation, given: list[tuple[Layer, torch.Tensor, torch.Tensor]]
    ) -> bytes:
        """The operator's constants, as its kernels read them."""
        parts = [constant.numpy() for step in op.steps() for constant in step.constants]
        for layer, q, scale in given:
            form = op.form(layer)
            if isinstance(form, Bytes):
                packed, after = units(q), [scale[:, 0]]
                if op.activation == W8A8:
                    after.append(q.sum(1, dtype=torch.int32))
            elif isinstance(form, Nibbles):
                packed, after = pack_nibbles(q, scale, form), []
            else:
                packed = pack(q, scale if layer.group else None, form)
                after = [] if layer.group else [scale[:, 0]]
            parts += [part.cpu().numpy() for part in (packed, *after)]
        held = (np.ascontiguousarray(part).tobytes() for part in parts)
        return b"".join(part + b"\0" * (-len(part) % ALIGN) for part in held)

    def node(
        self, op: Operation, inputs: list[str], outputs: list[str]
    ) -> tuple[onnx.NodeProto, onnx.TensorProto, list[tuple[torch.Tensor, torch.Tensor]]]:
        """An operator's node with new weights, its initializer, and the weights."""
        number = self.known.index(op)
        made = [self.weights(layer) for layer in op.layers]
        blob = self.constants(op, [(a, *b) for a, b in zip(op.layers, made, strict=True)])
        assert len(blob) == self.table["sizes"][number]
        name = f"{outputs[0]}_weights"
        held = helper.make_tensor(name, TensorProto.UINT8, [len(blob)], blob, raw=True)
        node = helper.make_node(
            "QuantizedMatMul", [name, *inputs], [*outputs, f"{outputs[0]}_scratch"],
            domain="qcompiler", number=number, library=self.table["number"],
        )  # fmt: skip
        return node, held, made


class OwnDecoder:
    """What `ort_cuda.decoder` takes to multiply with."""

    def __init__(self, own: Own, kind: str, sizes: dict[str, int]) -> None:
        self.own, self.known, self.fused = own, decoder_operators(kind, **sizes), DECODERS[kind][3]

    def linears(
        self, before: str, given: list[str], size: tuple[int, int], names: list[str], total: str
    ) -> tuple[onnx.NodeProto, onnx.TensorProto]:
        """A node and its initializer; see `ort_cuda.Writer.linears`."""
        kept = bool(total) and len(given) > 1
        op = next(
            op for op in self.known
            if (op.before, op.inputs, op.kept, len(op.layers)) ==
            (before, len(given), kept, len(names))
            and (op.layers[0].outputs, op.layers[0].inputs) == size
        )  # fmt: skip
        node, held, _ = self.own.node(op, given, [*names, *([total] if kept else [])])
        return node, held


def expected(op: Operation, given: list[torch.Tensor]) -> torch.Tensor:
    """What the first of the operator's linears is given, in float64."""
    x = given[0].float()
    if op.before == "gate":
        x = torch.nn.functional.silu(x) * given[1].float()
    elif op.before == "norm":
        if len(given) > 1:
            x = x + given[1].float()
            x = x.half().float() if op.kept else x
        x = torch.nn.functional.rms_norm(x, (op.depth,), None, EPSILON)
    if op.activation:
        q, scale, zero = ops.dynamic_quantize(x.cpu(), op.activation)
        x = ((q.double() - zero.double()) * scale.double()).to(x.device)
    return x.double()


def described(op: Operation) -> dict[str, Any]:
    """For the file of results."""
    kept = {name: value for name, value in vars(op).items() if name != "layers"}
    return {"layer": vars(op.layers[0]), "layers": len(op.layers), **kept}
