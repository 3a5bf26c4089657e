"""Generated linears for ONNX Runtime's CUDA provider, as custom operators (`edge_cuda_ort.c`).

The library holds kernels for one GPU generation or several, and takes any number of rows. Its
constants, packed as the kernels read them, are returned for the graph to hold.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from qcompiler.backends.edge_cuda_build import build as build_kernels
from qcompiler.backends.edge_cuda_linear import packed_weight, row_scales, weights_form
from qcompiler.backends.edge_cuda_products import (
    ROLES,
    Choice,
    Extent,
    choices,
    roles,
)
from qcompiler.backends.edge_folder import OPTIONS, SOURCES, Tools
from qcompiler.backends.edge_ops import Weight
from qcompiler.backends.edge_program import array, quoted
from qcompiler.backends.edge_target import MACHINES, host_family
from qcompiler.errors import UnsupportedError
from qcompiler.generated import Library, Linear, Operator
from qcompiler.kernels.cuda_code import GPUS, CudaKernel, Gpu
from qcompiler.kernels.cuda_weights import Weights
from qcompiler.target import Target

ALL = (80, 86, 90)  # generations that code is made for where none is named; 8.9 runs that of 8.6
ALIGN = 256
MOST = 16  # products of an operator: edge_cuda_ort.c
COMPILED = ("edge_cuda_ort.c",)
INCLUDED = ("edge_cuda_ort.h", "edge_ort_api.h", "edge_ort_call.h")
# What `.incbin` reads is next to the source; nothing outside the library sees the name.
IMAGE = """\
__asm__(".section .rodata\\n.balign 64\\n.globl image_{0}\\n.hidden image_{0}\\n"
        "image_{0}:\\n.incbin \\"image_{0}\\"\\n.previous");
extern const unsigned char image_{0}[] __attribute__((visibility("hidden")));"""

Form = tuple[Weights, bool]  # of a product: its weight's, and whether a bias is added


def build(operators: Sequence[Operator], target: Target) -> Library:
    """Compile the operators: linears that read float16 tensors.

    Args:
        operators: at least one.
        target: ONNX Runtime's CUDA provider; its feature names one GPU generation.

    Raises:
        UnsupportedError: for weights that no kernel reads, or without nvcc or a C compiler.
    """
    tools = _tools()
    forms: dict[Form, int] = {}
    packed = [_pack(operator, forms) for operator in operators]
    named = [int(target.feature.removeprefix("sm_"))] if target.feature else ALL
    lines, rows, images = [], [], []
    for number, capability in enumerate(named):
        tables = _Kernels(f"gpu_{number}", forms, GPUS[capability])
        image, _ = build_kernels(tables.kernels, [capability])
        images.append(image)
        lines += [IMAGE.format(number), *tables.lines()]
        rows.append(
            f"{{{capability}, image_{number}, {len(tables.kernels)}, kernels_gpu_{number}, "
            f"choices_gpu_{number}}}"
        )
    lines.append(array("struct gpu", "gpus", rows))
    lines += [line for number, (_, row) in enumerate(packed) for line in _products(number, row)]
    table = [
        f"{{{quoted(operator.name)}, {len(blob)}u, {operator.depth}, {len(operator.linears)}, "
        f"products_{number}}}"
        for number, (operator, (blob, _)) in enumerate(zip(operators, packed, strict=True))
    ]
    lines.append(array("struct operator_of", "list", table))
    digest = hashlib.sha256("\n".join(lines).encode())
    for content in (*images, *(blob for blob, _ in packed)):
        digest.update(hashlib.sha256(content).digest())
    number = int.from_bytes(digest.digest()[:7], "little")
    lines.append(
        f"const struct operators compiled_operators = {{{number}, {len(images)}, {len(table)}, "
        "gpus, list};"
    )
    source = "\n".join(['#include "edge_cuda_ort.h"', "", *lines, ""])
    weights = tuple(blob for blob, _ in packed)
    return Library(_link(tools, source, images), number, weights, (False,) * len(weights))


def _tools() -> Tools:
    """What links for this machine; the plainest of its kind, as nothing is computed there."""
    here = [known for known in MACHINES.values() if known.family == host_family()]
    if not here:
        raise UnsupportedError(f"no library is linked on this machine ({host_family()})")
    return Tools(here[0])


def _pack(
    operator: Operator, forms: dict[Form, int]
) -> tuple[bytes, list[tuple[int, int, list[int]]]]:
    """An operator's constants, and of each product its form, its columns, and where they lie."""
    if operator.activation or operator.steps or len(operator.linears) > MOST:
        raise UnsupportedError(
            f"{operator.name}: GPU kernels for ONNX Runtime compute up to {MOST} linears of one "
            "float tensor"
        )
    parts, size, products = list[bytes](), 0, []
    for linear in operator.linears:
        weight = _weight(linear)
        form = weights_form(weight, linear.name)
        held: list[Tensor | None] = [
            packed_weight(weight, form),
            row_scales(weight, form) if form.scaled_after else None,
            None if linear.bias is None else linear.bias.float().contiguous(),
        ]
        places = []
        for tensor in held:
            places.append(size)
            content = b"" if tensor is None else tensor.cpu().numpy().tobytes()
            parts.append(content + b"\0" * (-len(content) % ALIGN))
            size += len(parts[-1])
        key = form, linear.bias is not None
        number = forms.setdefault(key, len(forms))
        products.append((number, form.rows, places))
    return b"".join(parts), products


def _weight(linear: Linear) -> Weight:
    return Weight(linear.q, linear.scale, linear.zero_point, linear.axis, linear.group)


def _products(number: int, products: list[tuple[int, int, list[int]]]) -> list[str]:
    rows = [f"{{{form}, {columns}, {', '.join(map(str, at))}}}" for form, columns, at in products]
    return [array("struct product", f"products_{number}", rows)]


class _Kernels:
    """The kernels of one GPU generation, and the C tables that describe them."""

    def __init__(self, name: str, forms: dict[Form, int], gpu: Gpu) -> None:
        self.name = name
        self.kernels: list[CudaKernel] = []
        self.grids: list[tuple[Extent, ...]] = []
        self.found = [choices(f"form{n}", *form, gpu) for form, n in forms.items()]
        self.numbers = {
            id(choice): self._add(choice.kernel, choice.grid)
            for found in self.found
            for choice in found
        }

    def _add(self, kernel: CudaKernel, grid: tuple[Extent, ...]) -> int:
        self.kernels.append(kernel)
        self.grids.append(grid)
        return len(self.kernels) - 1

    def lines(self) -> list[str]:
        """The tables; the kernels must have been compiled."""
        lines, rows = [], []
        for number, kernel in enumerate(self.kernels):
            given = [str(ROLES.index(role)) for role in roles(kernel)]
            name = f"parameters_{self.name}_{number}"
            lines.append(array("uint8_t", name, given))
            grid = ", ".join(f"{{{e.fixed}u, {e.each}u}}" for e in self.grids[number])
            rows.append(
                f"{{{quoted(kernel.name + '_kernel')}, {kernel.threads}u, {kernel.shared}u, "
                f"{{{grid}}}, {len(given)}, {name}}}"
            )
        lines.append(array("struct gpu_kernel", f"kernels_{self.name}", rows))
        lists = []
        for number, found in enumerate(self.found):
            name = f"list_{self.name}_{number}"
            chosen = [self._row(choice) for choice in found]
            lines.append(array("struct choice", name, chosen))
            lists.append(f"{{{len(found)}, {name}}}")
        lines.append(array("struct choices", f"choices_{self.name}", lists))
        return lines

    def _row(self, choice: Choice) -> str:
        fields = (
            choice.most, self.numbers[id(choice)], int(choice.mapped), choice.each, choice.across,
            choice.splits, choice.room,
        )  # fmt: skip
        return f"{{{', '.join(map(str, fields))}}}"


def _link(tools: Tools, source: str, images: Sequence[bytes]) -> bytes:
    """The shared library, of which only `RegisterCustomOps` is seen from outside."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for file in (*COMPILED, *INCLUDED):
            shutil.copyfile(SOURCES / file, work / file)
        for number, image in enumerate(images):
            (work / f"image_{number}").write_bytes(image)
        (work / "products.c").write_text(source)
        (work / "exports").write_text("{ global: RegisterCustomOps; local: *; };\n")
        tools.cc(
            work, *OPTIONS, "-shared", "-Wl,--version-script=exports", "-Wl,-z,nodelete",
            "-Wl,-soname,libqcompiler_ort.so", "-s", *COMPILED, "products.c", "-lpthread", "-ldl",
            "-o", "library.so",
        )  # fmt: skip
        return (work / "library.so").read_bytes()
