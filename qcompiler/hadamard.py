"""Orthogonal matrices that spread outliers: Hadamard matrices, as Kronecker products.

A Hadamard matrix of order n has entries ±1 and HHᵀ = nI; divided by √n it is orthogonal, and each
output is a sum of all inputs with equal weight, so one large channel becomes n small ones (QuaRot,
Ashkboos 2024, section 3). Orders: powers of two by Sylvester's construction; q + 1 for a prime
power q ≡ 3 (mod 4) by Paley's first construction, 2(q + 1) for q ≡ 1 (mod 4) by his second (Paley
1933, "On orthogonal matrices"); products of these. The Paley matrices are computed, not tabulated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

LARGEST_CORE = 1024  # order above which no Paley matrix is looked for


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix R = diag(signs) · (left ⊗ right), kept as its factors.

    Attributes:
        left: (m, m) float64, orthogonal.
        right: (k, k) float64, orthogonal; n = m · k.
        signs: (n,) float64 of ±1.
        hadamard: whether all entries have the same size, so that R spreads best; otherwise `left`
            is a random orthogonal block, because no Hadamard matrix of that order is known here.
    """

    left: Tensor
    right: Tensor
    signs: Tensor
    hadamard: bool

    def __str__(self) -> str:
        kind = "Hadamard" if self.hadamard else "random orthogonal × Hadamard"
        return f"{kind} {len(self.left)} ⊗ {len(self.right)}"

    @property
    def size(self) -> int:
        """The order n."""
        return len(self.signs)

    def matrix(self) -> Tensor:
        """R itself, (n, n) float64."""
        return self.signs[:, None] * torch.kron(self.left, self.right)

    def apply(self, x: Tensor) -> Tensor:
        """X · R along the last axis, in float64; x is (…, n)."""
        return rotate(x.double() * self.signs, self.left, self.right)


def rotate(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """X · (left ⊗ right) along the last axis, through the factors.

    With X's last axis seen as an (m, k) matrix this is leftᵀ · X · right: m + k products for each
    element in place of m · k.

    Args:
        x: (…, m · k) of the factors' dtype.
        left: (m, m).
        right: (k, k).
    """
    blocks: Tensor = x.unflatten(-1, (len(left), len(right))) @ right
    if len(left) > 1:
        blocks = left.T @ blocks
    return blocks.flatten(-2)


def randomized(size: int, seed: int | None) -> Rotation:
    """A randomized Hadamard rotation of order `size`, the same for the same seed.

    Args:
        size: any positive order. Without a Hadamard matrix of that order, the largest odd factor
            gets a random orthogonal block, and the rest a Hadamard matrix.
        seed: of the signs, and of the random block; None: all signs are +1.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    core, hadamard = _core(size)
    if core is None:
        odd = size >> _twos(size)
        normal = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
        core = torch.linalg.qr(normal).Q.contiguous()
    rest = size // len(core)
    # Balanced factors cost the least when the model runs.
    moved = 1
    while rest // moved > 2 * len(core) * moved:
        moved *= 2
    left, right = torch.kron(core, sylvester(moved)), sylvester(rest // moved)
    signs = torch.ones(size, dtype=torch.float64)
    if seed is not None:
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return Rotation(left, right, signs, hadamard)


def _twos(size: int) -> int:
    """How often 2 divides `size`."""
    return (size & -size).bit_length() - 1


def _core(size: int) -> tuple[Tensor | None, bool]:
    """The smallest normalized Paley matrix that leaves a power of two, or None."""
    odd = size >> _twos(size)
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64), True
    order = 4 * odd
    while size % order == 0 and order <= LARGEST_CORE:
        found = paley(order)
        if found is not None:
            return found / math.sqrt(order), True
        order *= 2
    return None, False


def sylvester(size: int) -> Tensor:
    """The orthogonal Walsh–Hadamard matrix of a power of two, (size, size) float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(matrix, pair)
    return matrix / math.sqrt(size)


@cache
def paley(order: int) -> Tensor | None:
    """A Hadamard matrix of that order, entries ±1, (order, order) float64.

    Returns:
        None where neither of Paley's constructions gives one.
    """
    eye = torch.eye
    first = _prime_power(order - 1)
    if first is not None and (order - 1) % 4 == 3:
        conference = _bordered(_jacobsthal(*first), -1.0)
        return eye(order, dtype=torch.float64) + conference
    second = _prime_power(order // 2 - 1)
    if order % 2 == 0 and second is not None and (order // 2 - 1) % 4 == 1:
        conference = _bordered(_jacobsthal(*second), 1.0)
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, pair) + torch.kron(
            eye(order // 2, dtype=torch.float64), other
        )
    return None


def _bordered(inner: Tensor, sign: float) -> Tensor:
    """[[0, 1ᵀ], [±1, inner]]."""
    size = len(inner) + 1
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1.0, sign, inner
    return matrix


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = pᵏ, p prime; or None."""
    if q < 2:
        return None
    prime = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q)
    power = 0
    while q % prime == 0:
        q, power = q // prime, power + 1
    return (prime, power) if q == 1 else None


def _jacobsthal(prime: int, power: int) -> Tensor:
    """Q with Q_ab = χ(a − b), χ the quadratic character of the field of primeᵖᵒʷᵉʳ elements.

    Elements are polynomials over the prime field, as tuples of coefficients. The squares are the
    even powers of a generator of the multiplicative group.
    """
    size = prime**power
    elements = [
        tuple(number // prime**digit % prime for digit in range(power)) for number in range(size)
    ]
    generated = next(
        powers for modulus in elements if len(powers := _powers(modulus, prime)) == size - 1
    )
    character = {element: 1.0 if i % 2 == 0 else -1.0 for i, element in enumerate(generated)}
    zero = (0,) * power
    character[zero] = 0.0
    return torch.tensor(
        [
            [character[tuple((x - y) % prime for x, y in zip(a, b, strict=True))] for b in elements]
            for a in elements
        ],
        dtype=torch.float64,
    )


def _powers(modulus: tuple[int, ...], prime: int) -> list[tuple[int, ...]]:
    """1, x, x², … modulo xᵏ = Σ modulus_i xⁱ, until one comes again.

    All of the field but zero where the polynomial is primitive; for k = 1, x is the number
    `modulus` itself.
    """
    power = len(modulus)
    one = (1,) + (0,) * (power - 1)
    found: list[tuple[int, ...]] = []
    current = one
    while current not in found[:1] and len(found) < prime**power and any(current):
        found.append(current)
        carry, shifted = current[-1], (0, *current[:-1])
        current = tuple((s + carry * m) % prime for s, m in zip(shifted, modulus, strict=True))
    return found
