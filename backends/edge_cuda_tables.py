"""Kernels of custom operators on one GPU generation, as the tables of edge_cuda_ort.h."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tvm.tirx import Var

from qcompiler.backends.edge_cuda_products import (
    READS,
    ROLES,
    Choice,
    Extent,
    Product,
    choices,
    roles,
)
from qcompiler.backends.edge_program import array, quoted
from qcompiler.kernels.code import Size
from qcompiler.kernels.cuda_code import CudaKernel, Gpu
from qcompiler.kernels.cuda_steps import Steps, steps

FORMS = {"x": "float16", "int8": "int8", "wide": "wide", "map": "float16"}  # outputs of `Steps`
SETS = 8  # of forms: edge_cuda_ort.h


class Kernels:
    """The kernels of one GPU generation, and the C tables that describe them.

    Args:
        name: of the tables.
        products: each with its number, in that order.
        befores: likewise, what is computed before products, without `outputs`.
        operators: for each that has steps or a quantization their number, and its products'.
        gpu: that runs them.
    """

    def __init__(
        self, name: str, products: Mapping[Product, int], befores: Mapping[Steps, int],
        operators: Sequence[tuple[int, Sequence[int]]], gpu: Gpu,
    ) -> None:  # fmt: skip
        self.name = name
        self.kernels: list[CudaKernel] = []
        self.grids: list[tuple[Extent, ...]] = []
        self.found = [choices(f"form{n}", product, gpu) for product, n in products.items()]
        self.numbers = {
            choice: self._add(choice.kernel, choice.grid)
            for found in self.found
            for choice in found
        }
        self.befores = [[-1] * SETS for _ in befores]
        for number, given in operators:
            for forms in self._read([self.found[n] for n in given]):
                self._before([*befores][number], self.befores[number], number, forms)

    def _add(self, kernel: CudaKernel, grid: tuple[Extent, ...]) -> int:
        self.kernels.append(kernel)
        self.grids.append(grid)
        return len(self.kernels) - 1

    def _read(self, products: Sequence[Sequence[Choice]]) -> set[frozenset[str]]:
        """Forms of the activations that products read, for one number of tokens or another."""
        ends = [choice.most for found in products for choice in found]
        found = set()
        for tokens in {*ends, *(end + 1 for end in ends)}:
            taken = [next(c for c in given if not c.most or tokens <= c.most) for given in products]
            found.add(frozenset(FORMS[choice.reads] for choice in taken))
        return found

    def _before(self, what: Steps, row: list[int], number: int, forms: frozenset[str]) -> None:
        """Add the kernel that gives these forms, where it is not there yet."""
        order = [FORMS[read] for read in READS[:3]]
        outputs = tuple(form for form in order if form in forms)
        place = sum(1 << order.index(form) for form in outputs)
        if row[place] >= 0:
            return
        what, size = replace(what, outputs=outputs), Size("tokens", Var("tokens", "int32"))
        made = steps(f"before{number}_{place}", [*what.arguments(), size], what, 0)
        row[place] = self._add(made, (Extent(1, 1), Extent(1), Extent(1)))

    def lines(self, images: Sequence[int]) -> list[str]:
        """The tables; the kernels must have been compiled, each into one of the `images`."""
        lines, rows = [], []
        for number, kernel in enumerate(self.kernels):
            given = [str(ROLES.index(role)) for role in roles(kernel)]
            name = f"parameters_{self.name}_{number}"
            lines.append(array("uint8_t", name, given))
            grid = ", ".join(f"{{{e.fixed}u, {e.each}u}}" for e in self.grids[number])
            rows.append(
                f"{{{quoted(kernel.name + '_kernel')}, {images[number]}, {kernel.threads}u, "
                f"{kernel.shared}u, {{{grid}}}, {len(given)}, {name}}}"
            )
        lines.append(array("struct gpu_kernel", f"kernels_{self.name}", rows))
        lists = []
        for number, found in enumerate(self.found):
            name = f"list_{self.name}_{number}"
            chosen = [self._row(choice) for choice in found]
            lines.append(array("struct choice", name, chosen))
            lists.append(f"{{{len(found)}, {name}}}")
        lines.append(array("struct choices", f"choices_{self.name}", lists))
        befores = [f"{{{{{', '.join(map(str, row))}}}}}" for row in self.befores]
        lines.append(array("struct before", f"befores_{self.name}", befores))
        return lines

    def _row(self, choice: Choice) -> str:
        fields = (
            choice.most, self.numbers[choice], READS.index(choice.reads), choice.each,
            choice.across, choice.splits, choice.room,
        )  # fmt: skip
        return f"{{{', '.join(map(str, fields))}}}"
