"""Products of any number of tokens with one weight, for a GPU: kernels, and when each is taken.

Kernels are told the number of tokens by the call. Up to 64 tokens, blocks are made for a few
numbers and leave what is beyond the call's alone; more go piece by piece, and where those are few,
the weight's columns are shared out among blocks as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm.tirx import Var

from qcompiler.kernels.code import Argument, Size
from qcompiler.kernels.cuda_code import HOPPER, CudaKernel, Gpu
from qcompiler.kernels.cuda_gemm import Blocks, choose_blocks, gemm
from qcompiler.kernels.cuda_gemm_hopper import Tall, choose_tall, gemm_hopper
from qcompiler.kernels.cuda_hopper import MAP_BYTES
from qcompiler.kernels.cuda_skinny import FEW, choose, skinny
from qcompiler.kernels.cuda_weights import Weights
from qcompiler.kernels.expression import Access, Expression, Step

SIZES = (1, 4, 8, 16, 32, FEW)  # tokens of blocks for few
MOST = 2048  # tokens from which on a partition is the same for any more
MIDDLE = 1 << 21, 1 << 23  # likewise, as far as the second
LARGE = 8192 * 8192  # numbers of a weight from which on 33 tokens are many
# Multiplications up to which tiled products take longer than reading the weight again for each 64
# tokens. On an H200 those of warpgroups take 4 to 5 µs at least, the others 11 µs.
SMALL, SMALL_TALL = 300_000_000, 1 << 26
COUNTERS = 256  # more than there are pieces that blocks share; as in edge_cuda_ort.c
# What a kernel's argument is, in the order of edge_cuda_ort.h.
ROLES = (
    "x", "map", "weight", "scales", "bias", "room", "counters", "out", "tokens", "blocks_x",
    "blocks_y",
)  # fmt: skip


@dataclass(frozen=True)
class Extent:
    """Blocks along one dimension: fixed · ⌈tokens / each⌉, or fixed where `each` is 0."""

    fixed: int
    each: int = 0


@dataclass(frozen=True, eq=False)
class Choice:
    """What computes a product.

    Attributes:
        most: tokens that it is for at most; 0: any number.
        kernel: of the product.
        grid: its blocks.
        each, across: tokens of a piece of the output; pieces along the outputs.
        splits: blocks that share a piece.
        room: float32 numbers that such a block leaves in the workspace; 0: it needs none.
        mapped: whether it is given x by a tensor map.
    """

    most: int
    kernel: CudaKernel
    grid: tuple[Extent, Extent, Extent]
    each: int
    across: int
    splits: int
    room: int
    mapped: bool


def is_tall(tokens: int, numbers: int, gpu: Gpu) -> bool:
    """Whether Hopper's warpgroup products, which read units, take so many tokens.

    Args:
        tokens: of the activations.
        numbers: of the weight.
        gpu: that runs them.
    """
    many = tokens > FEW or (tokens > FEW // 2 and numbers >= LARGE)
    return many and gpu.capability == HOPPER.capability


def small_product(gpu: Gpu) -> int:
    """Multiplications up to which the kernel for few tokens takes any number of them."""
    return SMALL_TALL if gpu.capability == HOPPER.capability else SMALL


def choices(name: str, form: Weights, biased: bool, gpu: Gpu) -> list[Choice]:
    """All kernels of a product: for few tokens first, and the last for any number.

    Args:
        name: that their names start with.
        form: of the weight.
        biased: whether a bias (N float32) is added.
        gpu: that runs them.
    """
    sizes, most = _few_tokens(form, gpu)
    found = [_few(f"{name}_few{n}", form, biased, n, gpu) for n in sizes]
    found[-1] = replace(found[-1], most=most)
    if most < FEW:
        found.append(_many(f"{name}_few{FEW}", form, biased, FEW, gpu, FEW))
    tokens, how = 2 * FEW, _partition(2 * FEW, form, gpu)
    while True:
        more = _partition(2 * tokens, form, gpu)
        last = tokens >= MOST and how.splits == 1
        if last or more != how:
            most = 0 if last else tokens
            found.append(_many(f"{name}_many{tokens}", form, biased, tokens, gpu, most))
        if last:
            return found
        tokens, how = 2 * tokens, more


def _few_tokens(form: Weights, gpu: Gpu) -> tuple[Sequence[int], int]:
    """Tokens of a block of each kernel for few, and how many the last takes.

    As measured: on an H200 warpgroup products take 5 to 7 µs at least, and a block of 64 tokens up
    to 8.
    """
    numbers, short = form.rows * form.depth, SIZES[:-1]
    if gpu.capability != HOPPER.capability:
        return SIZES, max(FEW, SMALL // numbers)
    if numbers < MIDDLE[0]:
        return short, FEW
    return (SIZES, FEW) if MIDDLE[1] <= numbers < LARGE else (short, FEW // 2)


def _partition(tokens: int, form: Weights, gpu: Gpu) -> Tall | Blocks:
    """How so many tokens are shared out."""
    if gpu.capability == HOPPER.capability:
        return replace(choose_tall(tokens, form), mapped=True)
    return choose_blocks(tokens, form, gpu)


def _tokens() -> Size:
    return Size("tokens", Var("tokens", "int32"))


def _few(name: str, form: Weights, biased: bool, most: int, gpu: Gpu) -> Choice:
    how = choose(most, form, gpu)
    arguments, expression = _described(form, biased, Argument("x", "float16", form.depth))
    made = skinny(name, arguments, most, form, how, expression)
    across = -(-form.tiles // how.tiles)
    grid = (Extent(across), Extent(1, most), Extent(1))
    return Choice(most, made, grid, most, across, 1, 0, False)


def _many(name: str, form: Weights, biased: bool, tokens: int, gpu: Gpu, most: int) -> Choice:
    """For about that many tokens."""
    how = _partition(tokens, form, gpu)
    make: Any
    if isinstance(how, Tall):
        across = how.pieces(1, form)[1]
        x = Argument("map", "uint8", MAP_BYTES)
        grid = (Extent(across, how.tokens), Extent(how.splits), Extent(1))
        make, room = gemm_hopper, 0
    else:
        across = how.grid(1, form)[0]
        x = Argument("x", "float16", form.depth)
        grid = (Extent(across), Extent(1, how.tokens), Extent(how.splits))
        make, room = gemm, how.workspace(1, form) // (across * how.splits)
    arguments, expression = _described(form, biased, x, room > 0)
    made = make(f"{name}_{how.splits}", arguments, how.tokens, form, how, expression)
    if isinstance(how, Tall):  # none of its blocks is left without work
        grid = (grid[0], Extent(made.blocks[1]), grid[2])
    return Choice(most, made, grid, how.tokens, across, how.splits, room, isinstance(how, Tall))


def _described(
    form: Weights, biased: bool, x: Argument, shared: bool = False
) -> tuple[list[Argument | Size], Expression]:
    """A product's arguments, and what follows its sums: the bias, and float16 in memory."""
    given: list[Argument | Size] = [x, Argument("weight", "uint8", form.nbytes)]
    if form.scaled_after:
        given.append(Argument("scales", "float32", form.rows))
    if shared:
        given += [Argument("room", "float32", 1), Argument("counters", "int32", 1)]
    steps, last = [Step("anchor", "float32")], 0
    if biased:
        held = Access(len(given), "float32", 0, (0, 1))
        given.append(Argument("bias", "float32", form.rows))
        steps += [Step("load", "float32", (), held), Step("add", "float32", (0, 1))]
        last = 2
    out = Access(len(given), "float16", 0, (form.rows, 1))
    given.append(Argument("out", "float16", form.rows))
    tokens = _tokens()
    given.append(tokens)
    return given, Expression((tokens.variable, form.rows), tuple(steps), ((last, out),))


def roles(kernel: CudaKernel) -> Sequence[str]:
    """What each parameter of the compiled kernel is: a name of `ROLES`."""
    return [kernel.arguments[i].name for i in kernel.order]
