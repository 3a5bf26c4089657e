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
from qcompiler.kernels.cuda_gemm_hopper import gemm_hopper
from qcompiler.kernels.cuda_hopper import MAP_BYTES
from qcompiler.kernels.cuda_matmul_8bit import TOKENS, Product8, choose_product, matmul_8bit
from qcompiler.kernels.cuda_skinny import FEW, choose, skinny
from qcompiler.kernels.cuda_tall import Tall, choose_tall
from qcompiler.kernels.cuda_units import sums_of
from qcompiler.kernels.cuda_weights import Bytes, Form, Nibbles, Weights, Widened
from qcompiler.kernels.expression import Access, Expression, Step

SIZES = (1, 4, 8, 16, 32, FEW)  # tokens of blocks for few
MOST = 2048  # tokens from which on a partition is the same for any more
MIDDLE = 1 << 21, 1 << 23  # likewise, as far as the second
LARGE = 8192 * 8192  # numbers of a weight from which on 33 tokens are many
# Multiplications up to which tiled products take longer than reading the weight again for each 64
# tokens. On an H200 those of warpgroups take 4 to 5 µs at least, the others 11 µs.
SMALL, SMALL_TALL = 300_000_000, 1 << 26
COUNTERS = 256  # more than there are pieces that blocks share; as in edge_cuda_ort.c
MOST_TENSORS = 8  # that an operator reads, or keeps of its steps
# What a kernel's argument is, in the order of edge_cuda_ort.h.
ROLES = (
    "x", "int8", "wide", "map", "weight", "scales", "sums", "bias", "token_scales", "token_zeros",
    "constants", "room", "counters", "out", *(f"input_{n}" for n in range(MOST_TENSORS)),
    *(f"kept_{n}" for n in range(MOST_TENSORS)), "tokens", "blocks_x", "blocks_y",
)  # fmt: skip
READS = "x", "int8", "wide", "map"  # what a product's kernel reads: the first of its arguments


@dataclass(frozen=True)
class Product:
    """A product with a weight, for any number of tokens.

    Attributes:
        weight: its form: `Weights` are multiplied by float16 activations; `Bytes`, and `Nibbles`,
            by integers with a scale for each token.
        biased: whether a bias (N float32) is added.
        shifted: whether tokens have zero points.
    """

    weight: Weights | Bytes | Nibbles
    biased: bool
    shifted: bool = False


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
    """

    most: int
    kernel: CudaKernel
    grid: tuple[Extent, Extent, Extent]
    each: int
    across: int
    splits: int
    room: int

    @property
    def reads(self) -> str:
        """In which form it is given the activations: one of `READS`."""
        return self.kernel.arguments[0].name


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


def choices(name: str, product: Product, gpu: Gpu) -> list[Choice]:
    """All kernels of a product: for few tokens first, and the last for any number.

    Args:
        name: that their names start with.
        product: what is computed.
        gpu: that runs them.
    """
    form = product.weight
    if not isinstance(form, Weights):
        return _of_integers(name, product, gpu)
    sizes, most = _few_tokens(form, gpu)
    found = [_few(f"{name}_few{n}", product, n, gpu) for n in sizes]
    found[-1] = replace(found[-1], most=most)
    if most < FEW:
        found.append(_many(f"{name}_few{FEW}", product, form, FEW, gpu, FEW))
    return [*found, *_tiled(name, product, form, 2 * FEW, gpu)]


def _of_integers(name: str, product: Product, gpu: Gpu) -> list[Choice]:
    """Likewise, of integers; see `edge_cuda_linear`."""
    form = product.weight
    found = [_few(f"{name}_few{n}", product, n, gpu) for n in SIZES]
    numbers = form.rows * form.depth
    if isinstance(form, Nibbles):
        found[-1] = replace(found[-1], most=max(FEW, small_product(gpu) // numbers))
        wide = Widened(form.rows, form.depth, form.group)
        return [*found, *_tiled(name, product, wide, 2 * FEW, gpu)]
    if gpu.capability != HOPPER.capability:
        found[-1] = replace(found[-1], most=0)
        return found
    if numbers >= LARGE:
        found = [choice for choice in found if choice.most < FEW]
    assert isinstance(form, Bytes)
    tokens = TOKENS
    while True:
        how = choose_product(tokens, form.rows, form.depth, form.kind)
        if how.columns == 256:  # the widest there are
            return [*found, _bytes(f"{name}_many256", product, how, 0)]
        more = tokens
        while choose_product(more, form.rows, form.depth, form.kind).columns == how.columns:
            more += TOKENS
        kernel = f"{name}_many{how.columns}"
        found.append(_bytes(kernel, product, how, more - TOKENS))
        tokens = more


def _tiled(
    name: str, product: Product, form: Weights | Widened, tokens: int, gpu: Gpu
) -> list[Choice]:
    """Products of about so many tokens and more."""
    found, how = list[Choice](), _partition(tokens, form, gpu)
    while True:
        more = _partition(2 * tokens, form, gpu)
        last = tokens >= MOST and how.splits == 1
        if last or more != how:
            most = 0 if last else tokens
            found.append(_many(f"{name}_many{tokens}", product, form, tokens, gpu, most))
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


def _partition(tokens: int, form: Weights | Widened, gpu: Gpu) -> Tall | Blocks:
    """How so many tokens are shared out."""
    if gpu.capability == HOPPER.capability:
        return choose_tall(tokens, form, mapped=isinstance(form, Weights))
    return choose_blocks(tokens, form, gpu)


def _tokens() -> Size:
    return Size("tokens", Var("tokens", "int32"))


def _few(name: str, product: Product, most: int, gpu: Gpu) -> Choice:
    form = product.weight
    how = choose(most, form, gpu)
    x = "x" if isinstance(form, Weights) else "int8"
    arguments, expression = _described(product, form, _activations(x, form.depth))
    made = skinny(name, arguments, most, form, how, expression)
    across = -(-form.tiles // how.tiles)
    grid = (Extent(across), Extent(1, most), Extent(1))
    return Choice(most, made, grid, most, across, 1, 0)


def _bytes(name: str, product: Product, how: Product8, most: int) -> Choice:
    """Integers of 8 bits by 8 bits, for many tokens."""
    arguments, expression = _described(product, product.weight, _activations("int8", how.depth))
    made = matmul_8bit(name, arguments, how, expression)
    across = -(-how.rows // how.columns)
    grid = (Extent(across, TOKENS), Extent(1), Extent(1))
    return Choice(most, made, grid, TOKENS, across, 1, 0)


def _many(
    name: str, product: Product, form: Weights | Widened, tokens: int, gpu: Gpu, most: int
) -> Choice:
    """For about that many tokens."""
    how = _partition(tokens, form, gpu)
    make: Any
    x = "x" if isinstance(form, Weights) else "wide"
    if isinstance(how, Tall):
        across = how.pieces(1, form)[1]
        x = "map" if how.mapped else x
        grid = (Extent(across, how.tokens), Extent(how.splits), Extent(1))
        make, room = gemm_hopper, 0
    else:
        across = how.grid(1, form)[0]
        grid = (Extent(across), Extent(1, how.tokens), Extent(how.splits))
        make, room = gemm, how.workspace(1, form) // (across * how.splits)
    arguments, expression = _described(product, form, _activations(x, form.depth), room > 0)
    made = make(f"{name}_{how.splits}", arguments, how.tokens, form, how, expression)
    if isinstance(how, Tall):  # none of its blocks is left without work
        grid = (grid[0], Extent(made.blocks[1]), grid[2])
    return Choice(most, made, grid, how.tokens, across, how.splits, room)


def _activations(name: str, depth: int) -> Argument:
    """The argument; `name`: one of `READS`."""
    if name == "x":
        return Argument(name, "float16", depth)
    return Argument(name, "uint8", MAP_BYTES if name == "map" else 1)


def _described(
    product: Product, form: Form, x: Argument, shared: bool = False
) -> tuple[list[Argument | Size], Expression]:
    """A product's arguments, and what follows its sums, in memory float16.

    Sums of integers: (sum − zero · Σ_k weight) · scale of the token · scale of the row.
    """
    given: list[Argument | Size] = [x, Argument("weight", "uint8", form.nbytes)]
    if form.scaled_after:
        given.append(Argument("scales", "float32", form.rows))
    if shared:
        given += [Argument("room", "float32", 1), Argument("counters", "int32", 1)]
    steps = [Step("anchor", sums_of(form.kind) if isinstance(form, Bytes) else "float32")]

    def read(name: str, dtype: str, strides: tuple[int, int]) -> int:
        held = Access(len(given), dtype, 0, strides)
        given.append(Argument(name, dtype, form.rows))
        steps.append(Step("load", dtype, (), held))
        return len(steps) - 1

    def then(op: str, dtype: str, *values: int) -> int:
        steps.append(Step(op, dtype, values))
        return len(steps) - 1

    token, output = (1, 0), (0, 1)
    last = 0
    if product.shifted:
        zeros = read("token_zeros", "int32", token)
        moved = then("mul", "int32", zeros, read("sums", "int32", output))
        last = then("sub", "int32", last, moved)
    if not isinstance(product.weight, Weights):
        factor = read("token_scales", "float32", token)
        if isinstance(form, Bytes):
            factor = then("mul", "float32", factor, read("scales", "float32", output))
            last = then("cast", "float32", last) if steps[0].dtype == "int32" else last
        last = then("mul", "float32", last, factor)
    if product.biased:
        last = then("add", "float32", last, read("bias", "float32", output))
    out = Access(len(given), "float16", 0, (form.rows, 1))
    given.append(Argument("out", "float16", form.rows))
    tokens = _tokens()
    given.append(tokens)
    return given, Expression((tokens.variable, form.rows), tuple(steps), ((last, out),))


def roles(kernel: CudaKernel) -> Sequence[str]:
    """What each parameter of the compiled kernel is: a name of `ROLES`."""
    return [kernel.arguments[i].name for i in kernel.order]
