"""The GPU kernels that `gpu.py` checks and times: what they compute, inputs and references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qcompiler import ops
from qcompiler.kernels.cuda_units import unit_bytes, units
from qcompiler.kernels.cuda_weights import (
    Bytes,
    Nibbles,
    Weights,
    Widened,
    pack,
    pack_nibbles,
    widened_columns,
)

EPSILON = 1e-5
BYTES = ("int8", "few8", "fp8", "fp8_few", "w4a8")
WIDENED = ("w4a8many", "w4a8gemm")
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """A kernel at one size.

    Attributes:
        kind: skinny (few tokens, 4- or 8-bit weights), gemm (many), hopper (many, warpgroup
            products), int8 (int8 × int8), few8 (few tokens of it), w4a8 (4-bit weights in groups,
            int8 activations), w4a8many (many tokens of it, warpgroup products), w4a8gemm (the
            same, as on GPUs before Hopper), fp8 (e4m3), fp8_few (few tokens of it), or rows
            (norms, quantization).
        tokens, rows, depth: M, N, K; of `rows` kernels M and K.
        bits, group: of the weight.
        timed: whether it is measured, or only checked.
        variant: of a rows kernel: residual, norm, and the output's form.
        how: of warpgroup products: (tokens, parts, readers, resident, splits, blocks) of
            `cuda_tall.Tall`; empty: what `choose_tall` says.
    """

    kind: str
    tokens: int
    rows: int
    depth: int
    bits: int = 4
    group: int = 128
    timed: bool = True
    variant: tuple[bool, bool, str] = (False, False, "int8")
    how: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Of the kernel."""
        tail = "_".join(str(v) for v in self.variant) if self.kind == "rows" else self.group
        tail = "_".join(str(v) for v in (tail, *self.how))
        return f"{self.kind}_{self.tokens}_{self.rows}_{self.depth}_{self.bits}_{tail}".lower()


SQUARES = ((4096, 4096), (8192, 8192))
CASES = (
    *(Case("skinny", m, n, k) for n, k in (*SQUARES, (28672, 8192)) for m in (1, 4, 8, 16, 32)),
    Case("skinny", 1, 11008, 4096), Case("skinny", 1, 4096, 11008),
    Case("skinny", 1, 49152, 576, 8, 0),
    Case("skinny", 64, 4096, 4096),
    *(Case("hopper", m, n, k) for n, k in SQUARES for m in (64, 128, 256, 512, 1024, 2048, 4096)),
    *(Case("hopper", m, n, k) for n, k in ((11008, 4096), (4096, 11008))
      for m in (128, 256, 512, 1024, 2048)),
    *(Case("hopper", m, 2048, 2048, 4, 32) for m in (128, 256, 512)),
    *(Case("int8", m, 8192, 8192, 8, 0) for m in (512, 2048, 8192)),
    *(Case("few8", m, 8192, 8192, 8, 0) for m in (1, 16, 64)),
    *(Case("w4a8", m, n, k, 4, 32) for n, k in SQUARES for m in (1, 8, 16, 64)),
    Case("w4a8", 1, 8192, 8192),
    *(Case("w4a8many", m, n, k, 4, 32) for n, k in SQUARES for m in (128, 256, 512, 1024, 2048)),
    Case("w4a8many", 1024, 8192, 8192),
    *(Case("fp8", m, 8192, 8192, 8, 0) for m in (512, 8192)),
    *(Case("fp8_few", m, 8192, 8192, 8, 0) for m in (1, 16, 64)),
    *(Case("gemm", m, 4096, 4096) for m in (64, 1024)),
    *(
        Case("rows", 16384, 0, width, variant=variant)
        for width, variant in (
            (8192, (False, False, "int8")), (8192, (False, True, "int8")),
            (8192, (False, True, "float16")), (4096, (True, True, "int8")),
            (4096, (True, True, "float16")), (4096, (False, False, "units")),
        )
    ),
    # Tails of every kind.
    *(
        Case(kind, m, n, k, bits, group, timed=False)
        for kind, m, n, k, bits, group in (
            ("skinny", 1, 1000, 576, 4, 32), ("skinny", 3, 200, 1536, 4, 64),
            ("skinny", 5, 130, 264, 4, 128), ("skinny", 2, 300, 576, 8, 0),
            ("skinny", 30, 576, 576, 4, 32), ("skinny", 7, 72, 200, 8, 0),
            ("skinny", 150, 200, 576, 4, 32),
            ("gemm", 33, 1000, 576, 4, 32), ("gemm", 100, 200, 1536, 4, 64),
            ("gemm", 50, 130, 264, 4, 128), ("gemm", 70, 300, 576, 8, 0),
            ("hopper", 40, 1000, 264, 4, 128), ("hopper", 100, 300, 576, 4, 32),
            ("hopper", 200, 520, 1536, 4, 64), ("hopper", 90, 300, 576, 8, 0),
            ("int8", 70, 300, 200, 8, 0), ("int8", 200, 130, 576, 8, 0),
            ("fp8", 70, 300, 200, 8, 0), ("fp8_few", 5, 130, 200, 8, 0),
            ("fp8_few", 70, 72, 1536, 8, 0),
            ("w4a8", 1, 300, 576, 4, 32), ("w4a8", 5, 130, 192, 4, 64),
            ("w4a8", 64, 72, 1536, 4, 128), ("w4a8", 30, 40, 96, 4, 32),
            ("w4a8", 100, 300, 2048, 4, 32), ("w4a8many", 200, 72, 576, 4, 64),
            ("w4a8many", 70, 300, 1088, 4, 32), ("w4a8many", 300, 520, 1536, 4, 128),
            ("w4a8gemm", 200, 72, 576, 4, 64), ("w4a8gemm", 70, 300, 1088, 4, 32),
            ("hopper", 70, 100, 4096, 4, 128), ("hopper", 70, 100, 1536, 4, 64),
            ("few8", 1, 300, 576, 8, 0), ("few8", 5, 130, 200, 8, 0), ("few8", 70, 72, 1536, 8, 0),
            ("fp8", 200, 130, 328, 8, 0),
            # More stages than a ring holds.
            ("skinny", 3, 40, 4096, 4, 128), ("w4a8", 5, 40, 8192, 4, 32),
            ("few8", 5, 40, 8192, 8, 0), ("int8", 70, 130, 1544, 8, 0),
            ("fp8", 70, 130, 1544, 8, 0),
        )
    ),
    # Every way of sharing a product out.
    *(
        Case(kind, m, n, k, 4, group, timed=False, how=how)
        for kind, m, n, k, group in (
            ("hopper", 200, 520, 1536, 128), ("w4a8many", 300, 520, 1088, 64),
        )
        for how in (
            (256, 1, 2, 1, 1, 0), (128, 2, 2, 1, 2, 0), (128, 1, 3, 1, 1, 0), (64, 1, 2, 2, 1, 0),
            (64, 1, 2, 2, 4, 0), (128, 2, 2, 1, 1, 5), (128, 2, 2, 1, 1, 132),
            (256, 1, 2, 1, 1, 5), (128, 1, 2, 1, 1, 7),
        )
    ),
    *(
        Case("rows", rows, 0, width, timed=False, variant=variant)
        for rows, width, variant in (
            (70, 576, (True, True, "int8")), (3, 200, (False, True, "units")),
            (5, 1544, (True, True, "float16")), (130, 264, (False, False, "int8")),
        )
    ),
)  # fmt: skip


def kernel(case: Case) -> tuple[Any, dict[str, int]]:
    """The kernel and the elements of its workspace and counters; needs TVM, no GPU."""
    from qcompiler.kernels import (
        cuda_gemm,
        cuda_gemm_hopper,
        cuda_matmul_8bit,
        cuda_steps,
        cuda_tall,
    )
    from qcompiler.kernels import cuda_skinny as few
    from qcompiler.kernels.code import Argument

    m, n, k = case.tokens, case.rows, case.depth
    if case.kind == "rows":
        what = _row_steps(case)
        return cuda_steps.steps(case.name, what.arguments(m), what, m), {}
    out = Argument("out", "float16", m * n)
    if case.kind in BYTES:
        given = [Argument("x", "uint8", unit_bytes(m, k, 1)),
                 Argument("weight", "uint8", unit_bytes(n, k, 1)), out,
                 Argument("token_scales", "float32", m),
                 Argument("scales", "float32", n)]  # fmt: skip
        if case.kind == "w4a8":
            packed = Nibbles(n, k, case.group)
            given = [given[0], Argument("weight", "uint8", packed.nbytes), *given[2:4]]
            write = _stored(m, n, 2, "float32", outputs=False)
            return few.skinny(case.name, given, m, packed, few.choose(m, packed), write), {}
        kind: Any = "e4m3" if case.kind.startswith("fp8") else "s8"
        write = _stored(m, n, 2, "float32" if kind == "e4m3" else "int32")
        if case.kind in ("few8", "fp8_few"):
            whole = Bytes(n, k, kind)
            return few.skinny(case.name, given, m, whole, few.choose(m, whole), write), {}
        product = cuda_matmul_8bit.choose_product(m, n, k, kind)
        return cuda_matmul_8bit.matmul_8bit(case.name, given, product, write), {}
    form: Any = Weights(n, k, case.bits, case.group)
    if case.kind in WIDENED:
        form = Widened(n, k, case.group)
    x = ("float16", m * k)
    if case.kind == "hopper" or case.kind in WIDENED:
        x = ("uint8", unit_bytes(m, k, 2))
    given = [Argument("x", *x), Argument("weight", "uint8", form.nbytes)]
    given += [] if case.group else [Argument("scales", "float32", n)]
    if case.kind == "skinny":
        write = _stored(m, n, len(given))
        return few.skinny(case.name, [*given, out], m, form, few.choose(m, form), write), {}
    extra: dict[str, int] = {}
    how: Any
    make: Any
    if case.kind in ("hopper", "w4a8many"):
        how = cuda_tall.choose_tall(m, form, stream=True)
        if case.how:
            names = "tokens", "parts", "readers", "resident", "splits", "blocks"
            how = cuda_tall.deepest(cuda_tall.Tall(**dict(zip(names, case.how, strict=True))), form)
        make = cuda_gemm_hopper.gemm_hopper
    else:
        how, make = cuda_gemm.choose_blocks(m, form), cuda_gemm.gemm
    if room := how.workspace(m, form):
        extra = {"workspace": room, "counters": how.counters(m, form)}
    given += _shared(extra)
    write = _stored(m, n, len(given))
    if case.kind in WIDENED:
        write = _stored(m, n, len(given), "float32", outputs=False)
        tokens = Argument("token_scales", "float32", m)
        return make(case.name, [*given, out, tokens], m, form, how, write), extra
    return make(case.name, [*given, out], m, form, how, write), extra


def _shared(extra: dict[str, int]) -> list[Any]:
    from qcompiler.kernels.code import Argument

    kinds = {"workspace": "float32", "counters": "int32"}
    return [Argument(name, kinds[name], size) for name, size in extra.items()]


def _stored(m: int, n: int, out: int, sums: str = "", outputs: bool = True) -> Any:
    """The sums as float16, (M, N); with their dtype, scaled by tokens' and outputs' scales too."""
    from qcompiler.kernels.expression import Access, Expression, Step

    steps = [Step("anchor", sums or "float32")]
    if sums:
        steps += [
            Step("cast", "float32", (0,)),
            Step("load", "float32", access=Access(out + 1, "float32", 0, (1, 0))),
            Step("load", "float32", access=Access(out + 2, "float32", 0, (0, 1))),
            Step("mul", "float32", (2, 3)), Step("mul", "float32", (1, 4)),
        ]  # fmt: skip
        if not outputs:
            steps = [*steps[:3], Step("mul", "float32", (1, 2))]
    return Expression((m, n), tuple(steps),
                      ((len(steps) - 1, Access(out, "float16", 0, (n, 1))),))  # fmt: skip


@dataclass
class Trial:
    """Inputs of a case on the GPU, and what is to come out.

    Attributes:
        arguments: in the kernel's order; the outputs are poisoned.
        weight: which of them is the weight, read from other places when it is timed; −1: none.
        outputs: which are outputs.
        error: how far the outputs are off: ‖out − ref‖ / ‖ref‖ in float64 (NaN where something was
            not written).
        moved: bytes that must be read and written once.
        operations: multiplications and additions; 0: none to speak of.
        peer: the same by torch, in float16; None: its product of matrices (`gpu.cublas`), or none.
    """

    arguments: list[Tensor]
    weight: int
    outputs: tuple[int, ...]
    error: Callable[[], float]
    moved: int
    operations: int = 0
    peer: Callable[[], Any] | None = None


def _row_steps(case: Case) -> Any:
    """A residual sum, RMSNorm and what comes out, as a case of "rows" says."""
    from qcompiler.kernels.cuda_steps import RowStep, Steps
    from qcompiler.qtype import QType

    residual, norm, output = case.variant
    steps = [RowStep("add", (0, 1))] if residual else []
    if norm:
        steps.append(RowStep("rms_norm", (2 if residual else 0,), (case.depth,), EPSILON))
    kind = QType.parse("int8:token") if output == "int8" else None
    kept = (2,) if residual else ()
    return Steps(case.depth, 1 + bool(residual), tuple(steps), kept, (str(output),), kind)


def trial(case: Case, extra: dict[str, int], device: str = "cuda") -> Trial:
    """Fresh random inputs."""
    if case.kind == "rows":
        return _rows(case, device)
    m, n, k, group = case.tokens, case.rows, case.depth, case.group
    low = 1 << (case.bits - 1)
    w = torch.randint(-low, low, (n, k), device=device, dtype=torch.int8)
    scale = torch.rand(n, -(-k // group) if group else 1, device=device) * 0.02 + 0.001
    out = torch.full((m, n), float("nan"), device=device, dtype=torch.float16)
    factors: Any = 1.0
    if case.kind in (*BYTES, *WIDENED):
        if case.kind.startswith("fp8"):
            x, w = (torch.randn(*shape, device=device).to(FP8) for shape in ((m, k), (n, k)))
        else:
            x = torch.randint(-127, 128, (m, k), device=device, dtype=torch.int8)
        token = torch.rand(m, device=device) * 0.01 + 0.001
        stored = [units(t.view(torch.int8)) for t in (x, w)]
        given, at = [*stored, out, token, scale.reshape(-1)], 2
        if case.kind.startswith("w4a8"):
            shared = _room(extra, device)
            packed = pack_nibbles(w, scale, Nibbles(n, k, group))
            if case.kind in WIDENED:
                whole = torch.nn.functional.pad(x, (0, -k % 16)).half()
                stored[0] = units(whole[:, widened_columns(whole.shape[1]).to(device)])
            given, at = [stored[0], packed, *shared, out, token], 2 + len(shared)
        factors = token.double()[:, None]
    else:
        x = torch.randn(m, k, device=device).half()
        scale = scale.half() if group else scale
        packed = pack(w, scale if group else None, Weights(n, k, case.bits, group))
        given = [units(x) if case.kind == "hopper" else x, packed]
        given += [] if group else [scale.reshape(-1)]
        given += _room(extra, device)
        at = len(given)
        given.append(out)

    def error() -> float:
        if bool(out.isnan().any()):
            return float("nan")
        some = torch.arange(m, device=device)
        if m * n * k > 2e10:  # float64 takes long: some of the tokens
            some = torch.randperm(m, device=device)[:64]
        wide = scale.double().repeat_interleave(group, 1)[:, :k] if group else scale.double()
        reference = x[some].double() @ (w.double() * wide).T
        reference *= factors if isinstance(factors, float) else factors[some]
        return float((out[some].double() - reference).norm() / reference.norm())

    moved = given[1].numel() + x.numel() * x.element_size() + out.numel() * 2
    return Trial(given, 1, (at,), error, moved, 2 * m * n * k)


def _room(extra: dict[str, int], device: str) -> list[Tensor]:
    """The workspace, poisoned, and counters, where a kernel has them."""
    if not extra:
        return []
    return [torch.full((extra["workspace"],), float("nan"), device=device),
            torch.zeros(extra["counters"], device=device, dtype=torch.int32)]  # fmt: skip


def _rows(case: Case, device: str) -> Trial:
    residual, norm, output = case.variant
    m, k = case.tokens, case.depth
    x, r = (torch.randn(m, k, device=device).half() for _ in range(2))
    plain = output == "int8" and not (residual or norm)
    if plain:
        strange(x)
    total = torch.full_like(x, float("nan"))
    gain = torch.rand(k, device=device) + 0.5
    size = 1 if output == "int8" else 2
    scales = torch.full((m,), float("nan"), device=device)
    if output == "float16":
        out = torch.full((m, k), float("nan"), device=device, dtype=torch.float16)
    else:
        out = torch.full((unit_bytes(m, k, size),), 255, device=device, dtype=torch.uint8)
    given = [x, *([r] if residual else []), *([gain] if norm else [])]
    outputs = [len(given)] if residual else []
    given += [*([total] if residual else []), out]
    outputs.append(len(given) - 1)
    if output == "int8":
        outputs.append(len(given))
        given.append(scales)

    def error() -> float:
        y = (x.float() + r.float()).half() if residual else x
        if residual and not torch.equal(total, y):
            return float("nan")
        wide = y.double()
        if norm:
            wide = wide * (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * gain.double()
        if output == "int8":
            integers = rows_of(out, m, k, torch.int8)
            if plain:
                return float("nan" if differing(x.float(), "int8:token", integers, scales) else 0)
            found = integers.double() * scales.double()[:, None]
            # Rounded to the nearest of 255 steps: at most half a step off, and a hair.
            off = ((found - wide).abs() / scales.double()[:, None]).max()
            return float(off - 0.5) if off > 0.5 else 0.0
        found = (out if output == "float16" else rows_of(out, m, k, torch.float16)).double()
        return float((found - wide).norm() / wide.norm())

    moved = m * k * (2 + size + (4 if residual else 0))
    return Trial(given, -1, tuple(outputs), error, moved)


def strange(x: Tensor) -> None:
    """Replace rows after the first by such as are hard to quantize."""
    columns = torch.arange(x.shape[1], device=x.device)
    x[1:2] = 0
    x[2:3] = (columns % 509 - 254).to(x.dtype) / 2  # ties
    x[3:4] *= 2.0**-20
    x[4:5, 5] = float("inf")
    x[5:6, 7] = float("nan")
    x[6:7, 0] = -x[6:7].amax(-1)


def differing(x: Tensor, kind: str, q: Tensor, scales: Tensor, zeros: Tensor | None = None) -> int:
    """Elements of some rows, or their ranges, that are not those of the reference executor."""
    some = torch.cat([torch.arange(8), torch.randperm(len(x))[:120]])[: len(x)]
    some = some[some < len(x)].to(x.device)
    # On the CPU: on GPUs torch multiplies by 1/127 in place of the division.
    want, scale, zero = ops.dynamic_quantize(x[some].cpu(), kind)
    pairs = [(q[some].cpu().float(), want.float()), (scales[some].cpu(), scale[:, 0])]
    pairs += [] if zeros is None else [(zeros[some].cpu().float(), zero[:, 0].float())]
    return sum(int((~torch.isclose(a, b, 0, 0, equal_nan=True)).sum()) for a, b in pairs)


def rows_of(stored: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `units`."""
    size = torch.empty((), dtype=dtype).element_size()
    down, across = -(-rows // 64), -(-width * size // 128)
    pieces = stored.reshape(down, across, 64, 8, 16)
    order = torch.arange(8, device=stored.device)[None] ^ (
        torch.arange(64, device=stored.device)[:, None] % 8
    )
    pieces = pieces.gather(3, order.reshape(1, 1, 64, 8, 1).expand_as(pieces))
    whole = pieces.transpose(1, 2).reshape(down * 64, across * 128).contiguous().view(dtype)
    return whole[:rows, :width]


def described(case: Case) -> dict[str, Any]:
    """The case as data."""
    return asdict(case)
