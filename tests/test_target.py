"""Targets, and the proof that weights keep to 7 bits where the CPU has no VNNI."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from qcompiler.artifact import Artifact
from qcompiler.devices import CPU_FEATURES, cpu_feature
from qcompiler.errors import UnsupportedError
from qcompiler.qtype import QType
from qcompiler.target import Target, known_targets


@pytest.mark.parametrize("text", known_targets())
def test_parse_and_str_are_inverses(text: str) -> None:
    target = Target.parse(text)
    assert str(target) == text
    assert Target.parse(str(target)) == target
    assert Target.parse(f" {text} ") == target


def test_known_targets() -> None:
    assert {"ort:cpu", "ort:cpu:vnni", "ort:cpu:avx2", "ort:cpu:arm64"} <= {*known_targets()}
    edge = "x86-64-v3 x86-64:avx512vnni aarch64 aarch64:dotprod aarch64:i8mm armv7 riscv64 native"
    assert {f"tvm:{name}" for name in edge.split()} <= {*known_targets()}
    assert all(Target.parse(text).meaning for text in known_targets())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("otr:cpu", "no runtime 'otr'; did you mean 'ort'"),
        ("", "no runtime ''"),
        ("ort", "no device ''.*ort:cpu"),
        ("ort:cpi", "no device 'cpi'; did you mean 'ort:cpu'"),
        ("ort:cpu:vnn", "no feature 'vnn'; did you mean 'vnni'"),
        ("ort:cpu:avx2:more", "no feature 'avx2:more'"),
        ("tvm", "no device ''.*tvm:aarch64"),
        ("tvm:aarch46", "no device 'aarch46'; did you mean 'tvm:aarch64'"),
        ("tvm:aarch64:dotpord", "no feature 'dotpord'; did you mean 'dotprod'.*i8mm"),
        ("tvm:armv7:dotprod", "no feature 'dotprod'; 'tvm:armv7' has none"),
    ],
)
def test_unknown_names(text: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        Target.parse(text)


def test_a_gpu_generation_is_of_generated_kernels() -> None:
    bare = Target.parse("ort:cuda:sm_90")
    assert "use --target ort:cuda, or add --kernels tvm" in str(bare.refusal(None, None))
    assert bare.with_kernels("tvm").refusal(None, None) is None
    assert str(bare) not in known_targets()
    assert f"{bare}+tvm" in known_targets()


def test_a_cache_that_nothing_keeps_is_sent_elsewhere() -> None:
    kinds = (QType.parse("float8_e4m3:channel"),) * 2
    assert "can be measured on torch:cpu" in str(Target.parse("ort:cpu").refusal(None, None, kinds))
    reason = str(Target.parse("torch:cpu").refusal(None, None, kinds))
    assert "float8_e4m3:token" in reason
    assert "torch:cpu" not in reason


def test_saturation_is_said() -> None:
    assert Target.parse("ort:cpu:avx2").saturates
    assert not Target.parse("ort:cpu:vnni").saturates
    assert not Target.parse("ort:cpu:arm64").saturates
    assert not Target.parse("tvm:x86-64-v3").saturates  # our own kernels widen before they add
    here = Target.parse("ort:cpu")
    assert here.effective_feature == cpu_feature()
    assert here.saturates == CPU_FEATURES[cpu_feature()]


def vpmaddubsw(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The x86 instruction: u8 × s8 products, neighbours added, the sum saturated to int16."""
    products = a.astype(np.int32) * w.astype(np.int32)
    return np.clip(products[..., 0::2] + products[..., 1::2], -32768, 32767).astype(np.int16)


def dot(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """A dot product as a CPU without VNNI computes it: vpmaddubsw, then sums in int32."""
    return vpmaddubsw(a, w).astype(np.int32).sum(-1)


def exact(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    return (a.astype(np.int32) * w.astype(np.int32)).sum(-1)


def pairs(low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of activations and weights that are extreme, or beside an extreme value or zero."""
    activations = [0, 1, 127, 128, 254, 255]
    weights = [low, low + 1, -1, 0, 1, high - 1, high]
    rows = itertools.product(activations, activations, weights, weights)
    table = np.array([*rows])
    return table[:, :2].astype(np.uint8), table[:, 2:].astype(np.int8)


def test_full_range_weights_saturate() -> None:
    kind = QType("int8", "channel")
    a = np.full((1, 2), 255, np.uint8)
    w = np.full((1, 2), kind.qmax, np.int8)
    assert exact(a, w) == 64770
    assert dot(a, w) == 32767

    activations, weights = pairs(kind.qmin, kind.qmax)
    wrong = dot(activations, weights) != exact(activations, weights)
    assert wrong.any()
    # Not only in the corner: a pair of 65s overflows already.
    assert dot(a, np.full((1, 2), 65, np.int8)) == 32767 != exact(a, np.full((1, 2), 65, np.int8))


def test_reduced_weights_never_saturate() -> None:
    kind = QType("int8", "channel", reduced=True)
    activations, weights = pairs(kind.qmin, kind.qmax)
    np.testing.assert_array_equal(dot(activations, weights), exact(activations, weights))

    # A sum of two products is extreme where each product is: all products, exhaustively.
    products = np.arange(256)[:, None] * np.arange(kind.qmin, kind.qmax + 1)
    assert 2 * products.max() <= 32767
    assert 2 * products.min() >= -32768


def test_a_matmul() -> None:
    """Weights quantized in full and reduced range, multiplied as a CPU without VNNI does."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    activation = np.random.default_rng(0).integers(128, 256, (32, 64)).astype(np.uint8)
    agrees = {}
    for reduced in (False, True):
        kind = QType("int8", "channel", reduced=reduced)
        scale, zero = kind.scale_for(*kind.ranges(weight, 0))
        q = kind.quantize(weight, scale, zero, 0).numpy()
        a, w = activation[:, None, :], q[None]
        a, w = np.broadcast_arrays(a, w)
        agrees[reduced] = bool((dot(a, w) == exact(a, w)).all())
    assert agrees == {False: False, True: True}


FLOAT8 = ("float8_e4m3:channel", "float8_e4m3:token")


@pytest.mark.parametrize(
    ("target", "weight", "activation", "reason"),
    [
        ("ort:cpu", "int8:channel", "uint8:tensor:affine", None),
        ("ort:cpu", "int8:channel", None, None),
        ("ort:cpu", "int4:g32", None, None),
        ("ort:cpu", "int3:g32", None, None),
        ("ort:cpu", "int32:channel", None, "int32"),
        ("torch:cpu", "int3:g32", "int4:token", None),
        ("ort:cpu", "int8:channel", "int8:token", None),  # in blocks, by the kernel itself
        ("ort:cpu", "int8:channel", "uint8:token:affine", None),
        ("ort:cpu", "int4:channel", "int8:token", "one scale per tensor"),
        ("ort:cpu", "int4:g32", "uint8:tensor:affine", "no kernel for int4:g32"),
        ("ort:cpu", None, "uint8:tensor:affine", "no kernel"),
        ("tvm:aarch64", None, None, None),
        ("tvm:aarch64", "int8:channel", "uint8:tensor:affine", None),
        ("tvm:aarch64", "int8:channel", "int8:tensor:dynamic", None),
        ("tvm:aarch64", "int8:channel", "int8:token", None),
        ("tvm:aarch64", "int4:g32", "int8:token", None),
        ("tvm:aarch64", "int3:g32", "uint8:token:affine", None),
        ("tvm:aarch64", "int2:g32", None, None),
        ("tvm:aarch64", "int32:channel", None, "8, 4, 3 or 2 bits"),
        ("tvm:aarch64", "int8:token", None, "one scale for the tensor"),
        ("tvm:aarch64", "int8:channel", "int4:token", "8 bits"),
        ("tvm:aarch64", "int8:channel", "int8:channel", "per tensor or token"),
        ("tvm:aarch64", None, "uint8:tensor", "give weights a format"),
        ("torch:cpu", "float8_e4m3:g32", "float8_e4m3:tensor", None),
        ("tvm:cuda:sm_89", *FLOAT8, None),
        ("tvm:cuda:sm_90", *FLOAT8, None),
        ("tvm:cuda:sm_90", "float8_e4m3:channel", None, "not float8_e4m3:channel with float ones"),
        ("tvm:cuda:sm_90", "float8_e4m3:g32", "float8_e4m3:token", "not float8_e4m3:g32"),
        ("tvm:cuda:sm_90", "int8:channel", "float8_e4m3:token", "not int8:channel"),
        ("tvm:cuda:sm_86", *FLOAT8, "tvm:cuda:sm_89 and tvm:cuda:sm_90"),
        ("tvm:aarch64", *FLOAT8, "no products of 8-bit floats"),
        ("ort:cpu", *FLOAT8, "no products of 8-bit floats"),
        ("ort:cuda", "float8_e4m3:channel", None, "no products of 8-bit floats"),
        ("ort:cuda:sm_90+tvm", *FLOAT8, "no products of 8-bit floats"),
    ],
)
def test_refusals(
    target: str, weight: str | None, activation: str | None, reason: str | None
) -> None:
    kinds = [QType.parse(text) if text else None for text in (weight, activation)]
    refusal = Target.parse(target).refusal(*kinds)
    if reason is None:
        assert refusal is None
    else:
        assert refusal is not None
        assert reason in refusal


def test_tables_of_8_bit_floats() -> None:
    kind = QType.parse("float8_e4m3:channel")
    assert Target.parse("tvm:cuda:sm_90").table_refusal(kind) is None
    for name in ("ort:cpu", "tvm:aarch64", "tvm:cuda:sm_80", "ort:cuda"):
        assert "float8_e4m3" in str(Target.parse(name).table_refusal(kind))


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("ort:cpu", "ONNX Runtime's CPU kernels have no bfloat16"),
        ("tvm:x86-64-v3", "tvm:x86-64:avx512bf16 or tvm:aarch64:bf16"),
        ("tvm:aarch64:i8mm", "no bfloat16"),
        ("tvm:aarch64:bf16", None),
        ("tvm:x86-64:avx512bf16", None),
        ("torch:cpu", None),
    ],
)
def test_bfloat16_products(target: str, reason: str | None) -> None:
    refusal = Target.parse(target).refusal(None, None, products="bfloat16")
    assert refusal is None if reason is None else reason in str(refusal)
    assert Target.parse(target).refusal(None, None) is None


@pytest.mark.parametrize(("flags", "able"), [({"avx512_bf16"}, True), ({"avx512f"}, False)])
def test_bfloat16_of_this_machine(
    flags: set[str], able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompiler.target.cpu_flags", lambda: frozenset(flags))
    assert Target.parse("tvm:native").multiplies_bfloat16 is able
    any_size = Target.parse("tvm:native:dynamic")  # has no kernel for them
    assert not any_size.multiplies_bfloat16
    assert any_size.refusal(None, None, products="bfloat16") is not None


def test_an_artifact_warns_on_a_cpu_where_it_would_saturate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full-range weights on a CPU without VNNI; reduced ones are safe everywhere."""

    def artifact(weights: str) -> Artifact:
        plan = [{"qtype": weights}, {"qtype": "uint8:tensor:affine"}]
        return Artifact(tmp_path, {"target": "ort:cpu", "plan": plan})

    monkeypatch.setattr("qcompiler.target.cpu_feature", lambda: "avx2")
    assert "ort:cpu:avx2" in artifact("int8:channel").hazard()
    assert artifact("int8:channel:reduced").hazard() == ""
    monkeypatch.setattr("qcompiler.target.cpu_feature", lambda: "vnni")
    assert artifact("int8:channel").hazard() == ""
