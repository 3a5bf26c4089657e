"""What the inner loops of the matrix products are made of, on machines that are not here to time.

    .venv/bin/python tests/benchmarks/instructions.py

Each kernel is compiled for the target; of its innermost loops the one with most multiplications is
counted. The bound is that of a Cortex-A76, see `qcompiler.kernels.cores_arm`; it is no measurement.
"""

from __future__ import annotations

import torch
import tvm

from qcompiler.backends.edge_target import machine
from qcompiler.kernels import isa as isas
from qcompiler.kernels.assembly import inner_loop
from qcompiler.kernels.code import Argument, Kernel
from qcompiler.kernels.cores_arm import A76
from qcompiler.kernels.expression import Access, Expression, Step
from qcompiler.kernels.isa import Isa
from qcompiler.kernels.matmul_float import matmul_float
from qcompiler.kernels.matmul_int8 import matmul_int8, pack
from qcompiler.kernels.matmul_packed import matmul_packed
from qcompiler.kernels.packing import packing
from qcompiler.kernels.tiles import Product
from qcompiler.target import Target

CASES = (
    ("tvm:aarch64:i8mm", isas.I8MM, "int8"),
    ("tvm:aarch64:dotprod", isas.DOTPROD, "int8"),
    ("tvm:aarch64:i8mm", isas.I8MM, "4-bit × int8"),
    ("tvm:aarch64:i8mm", isas.I8MM, "3-bit × int8"),
    ("tvm:aarch64:i8mm", isas.I8MM, "2-bit × int8"),
    ("tvm:aarch64:dotprod", isas.DOTPROD, "4-bit × int8"),
    ("tvm:aarch64:dotprod", isas.DOTPROD, "2-bit × int8"),
    ("tvm:aarch64", isas.NEON, "int8"),
    ("tvm:aarch64:dotprod", isas.DOTPROD, "float32"),
    ("tvm:aarch64", isas.NEON, "float32"),
)
SHAPES = ((1, 384, 384), (128, 384, 384))


def assembly(target: str, isa: Isa, dtype: str, shape: tuple[int, int, int]) -> str:
    """The text of a product (M, N, K) compiled for a target."""
    m, n, k = shape
    product = Product(m, n, k, k)
    if "bit" in dtype:
        return _text(target, _packed(isa, int(dtype[0]), product))
    size = pack(torch.zeros(n, k, dtype=torch.int8), isa).numel()
    kind = "int32" if dtype == "int8" else "float32"
    arguments = [
        Argument("a", dtype, m * k),
        Argument("b", dtype, size),
        Argument("c", kind, m * n),
    ]
    expression = Expression(
        (m, n), (Step("anchor", kind),), ((0, Access(2, kind, 0, (n, 1))),)
    )  # fmt: skip
    if dtype == "int8":
        made = matmul_int8("product", arguments, product, True, expression, isa)
    else:
        made = matmul_float("product", arguments, product, expression, isa)
    return _text(target, made)


def _packed(isa: Isa, bits: int, product: Product) -> Kernel:
    """Weights of few bits in groups of 32 by int8 activations."""
    m, n, k = product.rows, product.columns, product.depth
    form = packing(bits, 32, 1 << (bits - 1), True, isa)
    arguments = [
        Argument("a", "int8", m * k), Argument("b", "uint8", n * k * bits // 8),
        Argument("s", "float32", n * k // 32), Argument("t", "int32", m * k // 32),
        Argument("c", "float32", m * n),
    ]  # fmt: skip
    store = Access(4, "float32", 0, (n, 1))
    expression = Expression((m, n), (Step("anchor", "float32"),), ((0, store),))
    return matmul_packed("product", arguments, product, form, expression, isa)


def _text(target: str, made: Kernel) -> str:
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        library = tvm.tirx.build(
            tvm.IRModule({"product": made.function}),
            target=tvm.target.Target(machine(Target.parse(target)).tvm),
        )
    return str(library.inspect_source("s"))


def main() -> None:
    print("| kernel | M | multiplies | loads | stores | all | loads per multiply | MAC per "
          "instruction | MAC per cycle, at most | of the peak |")  # fmt: skip
    print("|---|" + "---:|" * 9)
    for target, isa, dtype in CASES:
        for shape in SHAPES:
            loop = inner_loop(assembly(target, isa, dtype, shape), A76)
            count = len(loop.lines)
            widest = max(instruction.macs for instruction in loop.instructions)
            rate = loop.macs / loop.cycles
            print(
                f"| {target} {dtype} | {shape[0]} | {loop.multiplies} | {loop.loads} "
                f"| {loop.stores} | {count} | {loop.loads / max(1, loop.multiplies):.2f} "
                f"| {loop.macs / count:.1f} | {rate:.1f} | {rate / (2 * widest):.0%} |"
            )


if __name__ == "__main__":
    main()
