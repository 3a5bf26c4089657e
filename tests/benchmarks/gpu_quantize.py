"""The kernels that rotate rows and quantize them, which `gpu.py` checks; as `gpu_cases`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gpu_cases import EPSILON, Trial, differing, rows_of, strange
from torch import Tensor

from qcompiler.kernels.cuda_units import unit_bytes
from qcompiler.kernels.cuda_weights import widened_columns
from qcompiler.qtype import QType


@dataclass(frozen=True)
class Quantized:
    """Rows quantized by token, or rotated, at one size.

    Attributes:
        rows, width: of the matrix.
        kind: int8:token, float8_e4m3:token or uint8:token:affine; float32: only rotated.
        norm: RMSNorm before it.
        core: they are rotated by a random orthogonal matrix of that order (1: none) ⊗ the
            Walsh–Hadamard matrix of what is left of the width; 0: not rotated.
        widened: integers are stored as float16, for `Widened` weights, and as integers too.
        timed: whether it is measured, or only checked.
    """

    rows: int
    width: int
    kind: str = "int8:token"
    norm: bool = False
    core: int = 0
    widened: bool = False
    timed: bool = False

    @property
    def name(self) -> str:
        """Of the kernel."""
        tail = "_norm" if self.norm else f"_core{self.core}" if self.core else ""
        tail += "_widened" if self.widened else ""
        return f"quantize_{self.rows}_{self.width}_{self.kind.replace(':', '_')}{tail}"


QUANTIZED = (
    Quantized(16384, 4096, timed=True), Quantized(16384, 4096, norm=True, timed=True),
    *(
        Quantized(rows, width, kind, core=core, timed=True)
        for kind in ("int8:token", "float32") for width, core in ((4096, 1), (11008, 172))
        for rows in (1, 4096)
    ),
    Quantized(4096, 14336, core=28, timed=True),
    Quantized(5, 576, core=36), Quantized(3, 1536, "uint8:token:affine", core=12),
    Quantized(4, 8192, core=1), Quantized(3, 1536, "float32", core=12),
    Quantized(2, 80, "float32", core=5), Quantized(70, 64, "float32", core=1),
    Quantized(5, 576), Quantized(70, 576, widened=True), Quantized(3, 208, core=13, widened=True),
    Quantized(70, 200, "uint8:token:affine"), Quantized(70, 264, "float8_e4m3:token"),
    Quantized(3, 1544, norm=True),
)  # fmt: skip


def kernel(case: Quantized) -> tuple[Any, dict[str, int]]:
    """The kernel; needs TVM, no GPU."""
    from qcompiler.kernels.code import Argument
    from qcompiler.kernels.cuda_hadamard import rotate_rows
    from qcompiler.kernels.cuda_quantize import Norm, quantize_units
    from qcompiler.kernels.expression import Access, Expression, Step

    shape = case.rows, case.width
    if case.kind == "float32":
        given = [Argument("x", "float32", case.rows * case.width),
                 Argument("core", "float32", case.core * case.core),
                 Argument("out", "float32", case.rows * case.width)]  # fmt: skip
        steps = (Step("load", "float32", access=Access(0, "float32", 0, (case.width, 1))),)
        write = Expression(shape, (Step("anchor", "float32"),),
                           ((0, Access(2, "float32", 0, (case.width, 1))),))  # fmt: skip
        rotation = _rotation(case, 1)
        return rotate_rows(
            case.name, given, Expression(shape, steps, ()), rotation.factors, rotation.scale, write
        ), {}
    kind = QType.parse(case.kind)
    given = [Argument("out", "uint8", unit_bytes(*shape, 1))]
    given += [Argument("wide", "uint8", unit_bytes(*shape, 2))] if case.widened else []
    given.append(Argument("scale", "float32", case.rows))
    given += [] if kind.symmetric else [Argument("zero", "int32", case.rows)]
    given.append(Argument("x", "float32", case.rows * case.width))
    read = Access(len(given) - 1, "float32", 0, (case.width, 1))
    source = Expression(shape, (Step("load", "float32", access=read),), ())
    before: Any = None
    if case.norm:
        before = Norm(False, EPSILON, Expression(shape, (Step("anchor", "float32"),), ()))
    if case.core:
        given.append(Argument("core", "float32", case.core * case.core))
        before = _rotation(case, len(given) - 1)
    kinds = (False, True) if case.widened else (False,)
    return quantize_units(case.name, given, source, kind, before, kinds), {}


def _rotation(case: Quantized, matrix: int) -> Any:
    from qcompiler.kernels.cuda_hadamard import Rotation
    from qcompiler.kernels.hadamard import Factor

    order = case.width // case.core
    factors = [Factor(order, 1)] if order > 1 else []
    factors += [Factor(case.core, order, matrix)] if case.core > 1 else []
    return Rotation(case.width, tuple(factors), order**-0.5)


def _rotated(x: Tensor, core: Tensor) -> Tensor:
    """(rows, width) by core ⊗ Walsh–Hadamard."""
    rows, order = len(x), x.shape[1] // len(core)
    whole = torch.einsum("rio,ij->rjo", x.reshape(rows, len(core), order), core)
    step = 1
    while step < order:
        pairs = whole.reshape(rows, -1, 2, step)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        whole = torch.stack([a + b, a - b], 2)
        step *= 2
    return whole.reshape(rows, -1) * order**-0.5


def trial(case: Quantized, extra: dict[str, int], device: str = "cuda") -> Trial:
    """Fresh random inputs; one row of several is all zeros."""
    affine = case.kind.endswith("affine")
    x = torch.randn(case.rows, case.width, device=device)
    x[1:2] = 0
    plain = case.kind != "float32" and not (case.norm or case.core)
    if plain:
        strange(x)
    size = unit_bytes(case.rows, case.width, 1)
    out = torch.full((size,), 255, device=device, dtype=torch.uint8)
    scale = torch.full((case.rows,), float("nan"), device=device)
    zero = torch.full((case.rows,), -99, device=device, dtype=torch.int32)
    core = torch.ones(1, 1, device=device)
    if case.core > 1:
        core = torch.linalg.qr(torch.randn(case.core, case.core, device=device))[0].contiguous()
    if case.kind == "float32":
        result = torch.full_like(x, float("nan"))

        def off() -> float:
            want = _rotated(x.double(), core.double())
            return float((result.double() - want).norm() / want.norm())

        return Trial([x, core, result], -1, (2,), off, case.rows * case.width * 8)
    wide = torch.full((unit_bytes(case.rows, case.width, 2),), 255, device=device,
                      dtype=torch.uint8)  # fmt: skip
    given = [out, *([wide] if case.widened else []), scale, *([zero] if affine else [])]
    given += [x, *([core] if case.core else [])]

    def error() -> float:
        """How far numbers are from half a step around, beyond a hair; steps too large as well."""
        y = x.double()
        if case.norm:
            y = y * (y.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
        if case.core:
            y = _rotated(y, core.double())
        found = rows_of(out, case.rows, case.width, QType.parse(case.kind).dtype).double()
        point = zero.double()[:, None] if affine else 0.0
        if case.widened:
            halves = rows_of(wide, case.rows, case.width, torch.float16)
            if not torch.equal(halves.double(), found[:, widened_columns(case.width).to(device)]):
                return float("nan")
        if plain:
            zeros = zero if affine else None
            return float("nan") if differing(x, case.kind, found, scale, zeros) else 0.0
        low, high = y.amin(-1).clamp(max=0), y.amax(-1).clamp(min=0)
        want = (high - low) / 255 if affine else torch.maximum(high, -low) / 127
        want = torch.where(want == 0, 1.0, want)
        off = ((found - point) * scale.double()[:, None] - y).abs() / want[:, None]
        # The zero point of affine formats is rounded too: at the ends they saturate by half a step.
        bound = 1.0 if affine else 0.5
        over = float((off - bound).max())
        return max(float((scale.double() / want - 1).abs().max()), over, 0.0)

    moved = case.rows * case.width * 5
    outputs = (0, 1, 2) if affine or case.widened else (0, 1)
    return Trial(given, -1, outputs, error, moved)
