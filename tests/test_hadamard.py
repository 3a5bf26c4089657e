"""Hadamard matrices of every order that the constructions reach, and rotations of any size."""

from __future__ import annotations

import pytest
import torch

from qcompiler.hadamard import paley, randomized, rotate, sylvester


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 36, 44, 52, 60, 76, 84, 100, 108, 140])
def test_paley_matrices_are_hadamard(order: int) -> None:
    matrix = paley(order)
    assert matrix is not None
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [92, 116, 156])
def test_orders_that_paley_does_not_give(order: int) -> None:
    assert paley(order) is None


def test_sylvester_is_the_walsh_hadamard_matrix() -> None:
    bits = torch.tensor(
        [[bin(i & j).count("1") for j in range(16)] for i in range(16)], dtype=torch.float64
    )
    assert torch.equal(sylvester(16), (-1.0) ** bits / 4)


@pytest.mark.parametrize("size", [1, 2, 12, 40, 64, 576, 1536, 96, 80, 172, 92, 3, 33, 46])
def test_rotations_are_orthogonal(size: int) -> None:
    rotation = randomized(size, 7)
    matrix = rotation.matrix()
    assert rotation.size == size
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-12)
    even = bool(((matrix.abs() - size**-0.5).abs() < 1e-12).all())
    assert even == rotation.hadamard
    x = torch.randn(2, 3, size, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(x), x @ matrix)


@pytest.mark.parametrize("size", [12, 20, 28, 36, 40, 60, 576, 1536, 4096, 11008, 14336])
def test_sizes_of_language_models_have_hadamard_matrices(size: int) -> None:
    assert randomized(size, 0).hadamard


def test_sizes_without_one_say_so() -> None:
    assert not randomized(92, 0).hadamard
    assert str(randomized(92, 0)) == "random orthogonal × Hadamard 23 ⊗ 4"


def test_seeds_decide_the_signs() -> None:
    first, again, other = (randomized(64, seed).matrix() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert bool((randomized(64, None).signs == 1).all())


def test_an_outlier_is_spread_evenly() -> None:
    x = torch.zeros(576, dtype=torch.float64)
    x[17] = 24.0
    spread = randomized(576, 0).apply(x)
    torch.testing.assert_close(spread.abs(), torch.ones(576, dtype=torch.float64))


def test_rotate_is_the_product_with_the_kronecker_matrix() -> None:
    left, right = torch.randn(3, 3), torch.randn(5, 5)
    x = torch.randn(2, 4, 15)
    torch.testing.assert_close(rotate(x, left, right), x @ torch.kron(left, right))
