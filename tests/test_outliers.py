"""Single weights beside the grid: which are kept, what GPTQ makes of them, the op itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompiler import ops
from qcompiler.errors import InputError
from qcompiler.format import Format
from qcompiler.outliers import bytes_beside, importance, outlier_weights, round_weight
from qcompiler.qtype import QType
from qcompiler.rounding import Factor

KINDS = ["int4:g16", "int3:g16:affine", "int2:g16:affine", "int8:channel"]


def spread(outputs: int = 24, inputs: int = 64) -> tuple[Tensor, Tensor]:
    """A weight with single large elements, and the Hessian of correlated inputs."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=g)
    weight.view(-1)[torch.randperm(weight.numel(), generator=g)[:40]] *= 12
    x = torch.randn(200, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g)
    return weight, 2 * (x.T @ x).double()


def lost(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """tr(δ H δᵀ), float64: what the output loses."""
    delta = (weight - rounded).double()
    return float(((delta @ hessian) * delta).sum())


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("by", ["gptq", "clipped", "nearest"])
def test_what_is_kept_is_exact_and_the_rest_loses_less(text: str, by: str) -> None:
    weight, hessian = spread()
    kind = QType.parse(text)
    factor = Factor.of(hessian) if by == "gptq" else None
    found = [
        round_weight(weight, kind, hessian, factor, by != "nearest", count) for count in (0, 1, 4)
    ]
    losses = [lost(weight, r.whole, hessian) for r in found]
    assert losses[0] > losses[1] > losses[2]
    kept = found[2]
    assert kept.columns is not None
    assert kept.values is not None
    assert kept.columns.shape == kept.values.shape == (24, 4)
    assert (kept.columns.dtype, kept.values.dtype) == (torch.int16, torch.float16)
    places = kept.columns.long()
    assert bool((kept.weight.gather(1, places) == 0).all())
    assert bool((places.diff(dim=1) > 0).all())
    if by != "gptq":  # GPTQ's also take up what others lost
        assert torch.equal(kept.whole.gather(1, places), weight.gather(1, places).half().float())
    # The scales are those of the others alone.
    rest = weight.scatter(1, places, 0.0)
    alone = round_weight(rest, kind, hessian, None, by != "nearest")
    assert torch.equal(alone.scale, kept.scale)


def test_a_single_weight_is_chosen_by_exhaustive_search() -> None:
    """One weight of each row: none other would lower Σ s of its row more."""
    weight, hessian = spread(6, 32)
    kind = QType.parse("int3:g16")
    power = importance(32, hessian, Factor.of(hessian))
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32).double())
    assert torch.allclose(power, 1 / (2 * inverse.diagonal()), rtol=1e-6)
    columns = outlier_weights(weight, power, kind, 1)

    def loss(value: Tensor) -> Tensor:
        return ((value - kind.round_trip(value, 1)).double().square() * power).sum(1)

    trials = torch.stack([loss(weight.index_fill(1, torch.tensor(j), 0.0)) for j in range(32)], 1)
    assert torch.equal(trials.gather(1, columns.long()).flatten(), trials.amin(1))


@pytest.mark.parametrize(("inputs", "number"), [(32768, 2), (32800, 4)])
def test_numbers_of_columns_take_two_bytes_or_four(inputs: int, number: int) -> None:
    weight, power = torch.randn(3, inputs), torch.ones(inputs, dtype=torch.float64)
    weight[:, -1] = 100.0
    columns = outlier_weights(weight, power, QType.parse("int4:g32"), 2)
    assert bytes_beside(columns, torch.zeros(3, 2), 4) == 3 * 2 * (number + 4)
    assert (columns[:, -1] == inputs - 1).all()  # the last one is in reach


def test_the_op_is_a_sparse_product() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 40, generator=g)
    values = torch.randn(7, 5, generator=g).half()
    columns = torch.stack([torch.randperm(40, generator=g)[:5] for _ in range(7)])
    dense = torch.zeros(7, 40, dtype=torch.float64).scatter_add(1, columns, values.double())
    want = x.double() @ dense.T
    got = ops.sparse_linear(x, values, columns.to(torch.int16))
    assert torch.allclose(got.double(), want, atol=1e-5)


def test_more_than_a_row_has() -> None:
    weight, hessian = spread(4, 16)
    with pytest.raises(InputError, match="16 single weights of each row"):
        round_weight(weight, QType.parse("int4:g16"), hessian, None, False, 16)


def test_formats_with_single_weights_print_and_parse() -> None:
    for text in ("int4:g32~4", "int8:channel~2/int8:token"):
        assert str(Format.parse(text)) == text
    assert Format.parse("int4:g32~4").outliers == 4
    with pytest.raises(InputError, match="write int4:g32~4"):
        Format.parse("int4:g32~0")
    with pytest.raises(InputError, match="not both"):
        Format.parse("int4:g32+2~4")
    with pytest.raises(InputError, match="beside a quantized weight alone"):
        Format.parse("float~3")


def test_float16_is_no_format() -> None:
    with pytest.raises(InputError, match="no kernel multiplies float16 on CPUs"):
        Format.parse("float16")
