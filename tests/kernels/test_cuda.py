"""GPU kernels: packing against the layout that PTX documents; compiled here, run on a GPU."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from qcompiler import gpu
from qcompiler.backends import edge_cuda_build, edge_cuda_driver
from qcompiler.errors import UnsupportedError
from qcompiler.kernels.code import Argument
from qcompiler.kernels.cuda_cache import Decode, Source, write_cache
from qcompiler.kernels.cuda_code import HOPPER, generate
from qcompiler.kernels.cuda_tall import choose_tall
from qcompiler.kernels.cuda_units import UNIT, unit_bytes, units
from qcompiler.kernels.cuda_weights import (
    Nibbles,
    Weights,
    Widened,
    pack,
    pack_nibbles,
    widened_columns,
)
from qcompiler.kernels.expression import Access

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cases() -> Iterator[ModuleType]:
    yield benchmark("gpu_cases")
    del sys.modules["gpu_cases"]


@pytest.fixture(scope="module")
def more(cases: ModuleType) -> Iterator[list[tuple[ModuleType, Any]]]:
    """Attention and quantization: each case with its module."""
    attention, quantize = benchmark("gpu_attention"), benchmark("gpu_quantize")
    encoder = benchmark("gpu_encoder")
    yield (
        [(attention, c) for c in attention.ATTENTIONS]
        + [(encoder, c) for c in encoder.ENCODERS]
        + [(quantize, c) for c in quantize.QUANTIZED]
    )
    for name in ("gpu_attention", "gpu_encoder", "gpu_quantize"):
        del sys.modules[name]


def fragment(form: Weights, packed: Tensor, tile: int, stage: int, step: int, lane: int) -> Tensor:
    """The eight integers that a lane holds of a 16 x 16 step, read as the kernels read them."""
    start = (tile * form.stages + stage) * form.stage_bytes
    words = packed[start : start + form.weight_bytes].view(torch.int32).long() & 0xFFFFFFFF
    per = form.bits // 4
    place = step * per
    mine = words[(place // 4) * 128 + lane * 4 + place % 4 :][:per].tolist()
    if form.bits == 4:
        nibbles = [mine[0] >> 4 * i & 15 for i in range(8)]
        return torch.tensor([nibbles[i // 2 + i % 2 * 4] - 8 for i in range(8)])
    return torch.tensor([(mine[i // 4] >> 8 * (i % 4) & 255) - 128 for i in range(8)])


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 128), (8, 0)])
def test_weights_lie_as_fragments_of_a(bits: int, group: int) -> None:
    """Register r of lane 4g + t: row g + 8 (r mod 2), columns 2t, 2t + 1, + 8 from r = 2 on."""
    form = Weights(40, 264, bits, group)
    low = 1 << bits - 1
    weight = torch.randint(-low, low, (40, 264), dtype=torch.int8)
    scale = torch.rand(40, -(-264 // group)) if group else None
    packed = pack(weight, scale, form)
    assert packed.numel() == form.nbytes
    whole = torch.zeros(form.tiles * 16, form.stages * form.stage, dtype=torch.int64)
    whole[:40, :264] = weight
    for tile, stage, step in ((0, 0, 0), (1, form.stages - 1, 1), (2, 1, form.stage // 16 - 1)):
        for lane in (0, 3, 13, 31):
            g, t = lane // 4, lane % 4
            rows = [tile * 16 + g + 8 * (i // 2 % 2) for i in range(8)]
            first = stage * form.stage + step * 16 + 2 * t
            columns = [first + i % 2 + 8 * (i // 4) for i in range(8)]
            wanted = whole[rows, columns]
            assert torch.equal(fragment(form, packed, tile, stage, step, lane), wanted)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_nibbles_lie_as_fragments_of_bytes(group: int) -> None:
    """Register r of lane 4g + t: row g + 8 (r mod 2), columns 4t … 4t + 3, + 16 from r = 2 on."""
    form = Nibbles(40, 320, group)
    weight = torch.randint(-8, 8, (40, 320), dtype=torch.int8)
    scale = torch.rand(40, -(-320 // group))
    packed = pack_nibbles(weight, scale, form)
    assert packed.numel() == form.nbytes
    whole = torch.zeros(48, form.stages * form.stage, dtype=torch.int8)
    whole[:40, :320] = weight
    for tile, stage, step in ((0, 0, 0), (1, 2, 1), (2, 1, 3)):
        start = form.start(tile, stage)
        for lane in (0, 3, 13, 31):
            at = start + step // 2 * 512 + lane * 16 + step % 2 * 8
            held = packed[at : at + 8].reshape(2, 4)
            found = torch.stack([held << 4, held & 0xF0], 1).view(torch.int8).flatten() // 16
            g, t = lane // 4, lane % 4
            for r in range(4):
                column = stage * 128 + step * 32 + 4 * t + r // 2 * 16
                wanted = whole[tile * 16 + g + 8 * (r % 2), column : column + 4]
                assert torch.equal(found[4 * r : 4 * r + 4], wanted)
    scales = packed[form.start(1, 0) + form.weight_bytes :][: 128 // group * 64].view(torch.float32)
    for place, g, half in ((0, 0, 0), (128 // group - 1, 7, 1)):
        assert scales[(place * 8 + g) * 2 + half] == scale[16 + g + 8 * half, place] / 16


def test_nibbles_are_fragments_of_float16_in_another_order() -> None:
    """As `test_weights_lie_as_fragments_of_a`, of x's columns in the order of `widened_columns`."""
    form = Widened(40, 320, 32)
    weight = torch.randint(-8, 8, (40, 320), dtype=torch.int8)
    packed = pack_nibbles(weight, torch.rand(40, 10), form)
    whole = torch.zeros(48, form.stages * form.stage, dtype=torch.int8)
    whole[:40, :320] = weight
    whole = whole[:, widened_columns(form.stages * form.stage)]
    for tile, stage, step in ((0, 0, 0), (1, 2, 1), (2, 1, 7)):
        for lane in (0, 3, 13, 31):
            at = form.start(tile, stage) + step // 4 * 512 + lane * 16 + step % 4 * 4
            held = packed[at : at + 4]
            # What `qc_unpack_signed` makes of it: low bits, high bits; two bytes, two bytes.
            numbers = torch.stack([held << 4, held & 0xF0]).view(torch.int8) // 16
            found = torch.stack([numbers[r % 2, r // 2 * 2 :][:2] for r in range(4)])
            g, t = lane // 4, lane % 4
            for r in range(4):
                column = stage * 128 + step * 16 + 2 * t + r // 2 * 8
                wanted = whole[tile * 16 + g + 8 * (r % 2), column : column + 2]
                assert torch.equal(found[r], wanted)


def test_scales_lie_by_row_pairs() -> None:
    form = Weights(32, 128, 4, 32)
    scale = torch.rand(32, 4)
    packed = pack(torch.zeros(32, 128, dtype=torch.int8), scale, form)
    tile = packed[form.stage_bytes :][form.weight_bytes : form.stage_bytes].view(torch.float16)
    for group, g, half in ((0, 0, 0), (3, 7, 1), (2, 4, 1)):
        assert tile[(group * 8 + g) * 2 + half] == scale[16 + g + 8 * half, group].half()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_units_are_swizzled_rows(dtype: torch.dtype) -> None:
    matrix = torch.randint(-100, 100, (70, 200)).to(dtype)
    size = matrix.element_size()
    stored = units(matrix)
    assert stored.numel() == unit_bytes(70, 200, size)
    across = -(-200 * size // 128)
    for row, column in ((0, 0), (5, 17), (69, 199), (64, 130), (13, 63)):
        byte = column * size
        piece = (byte % 128 // 16) ^ (row % 8)
        at = (row // 64 * across + byte // 128) * UNIT + row % 64 * 128 + piece * 16 + byte % 16
        assert stored[at : at + size].view(dtype)[0] == matrix[row, column]


def test_every_kernel_has_room(cases: ModuleType, more: list[tuple[ModuleType, Any]]) -> None:
    for module, case in [(cases, case) for case in cases.CASES] + more:
        made, _ = module.kernel(case)
        assert made.shared <= HOPPER.shared
        assert made.threads <= 1024


def test_source_is_made_without_a_gpu(cases: ModuleType) -> None:
    case = cases.Case("skinny", 3, 200, 576, 4, 32)
    made, _ = cases.kernel(case)
    source = generate([made], "sm_80")
    assert f"{case.name}_kernel(" in source
    assert "cp.async.cg.shared.global" in source
    assert sorted(made.order) == [0, 1, 2]


@pytest.mark.parametrize("bits", [4, 16])
def test_queries_with_the_scales_of_keys_stay_finite(bits: int) -> None:
    """Keys of 200 in 4 bits have steps of 28: 64 times that, a query of 50 is beyond float16."""
    sizes = Decode(2, 1, 20, 16, 32, 0.25, -1, bits)
    held = ("uint8", 32 * 16 // 2) if bits == 4 else ("float16", 32 * 16)
    given = [
        Argument("keys", *held), Argument("values", *held),
        Argument("position", "int64", 1), Argument("to", "float16", 20 * 2 * 16),
        *(Argument(name, "float32", 20 * 2 * 16) for name in "qkv"),
        *(Argument(name, "float32", 16) for name in ("key_steps", "value_steps") if bits == 4),
    ]  # fmt: skip
    q, k, v = (Access(4 + i, "float32", 0, (32, 16, 1)) for i in range(3))
    sources = [
        Source(x, Access(7 + i, "float32", 0, (16, 1)) if bits == 4 else None)
        for i, x in enumerate((k, v))
    ]
    source = generate([write_cache("w", given, sizes, q, *sources, None)], "sm_80")
    assert ("65504" in source.replace("6.550400e+04", "65504")) is (bits == 4)


nvcc = pytest.mark.skipif(not edge_cuda_build.installed(), reason="nvcc is not installed")


@nvcc
def test_kernels_compile(cases: ModuleType) -> None:
    """One of each kind, for the GPUs that it is for."""
    few, many = cases.Case("skinny", 3, 200, 576, 4, 32), cases.Case("gemm", 50, 130, 264)
    integers = [cases.Case(kind, 70, 40, 96, 4, 32) for kind in ("w4a8", "w4a8gemm")]
    made = [cases.kernel(c)[0] for c in (few, many, *integers)]
    image, launches = edge_cuda_build.build(made, [80, 89, 90])
    assert image[:4] == b"\x50\xed\x55\xba"  # a fat binary
    assert launches[few.name].threads == 256
    hopper = [
        cases.Case("hopper", 40, 1000, 264), cases.Case("w4a8many", 70, 300, 1088, 4, 32),
        cases.Case("int8", 70, 300, 200, 8, 0),
        cases.Case("rows", 5, 0, 576, variant=(True, True, "int8")),
    ]  # fmt: skip
    _, launches = edge_cuda_build.build([cases.kernel(c)[0] for c in hopper], [90])
    assert [*launches] == [c.name for c in hopper]


@nvcc
def test_attention_and_rotations_compile(more: list[tuple[ModuleType, Any]]) -> None:
    """Smallest of each kind; their inputs are what the kernels take."""
    chosen = {
        c.mask if hasattr(c, "mask") else c.kind if hasattr(c, "new") else (c.kind, c.core): (m, c)
        for m, c in more
    }
    made = []
    for module, case in chosen.values():
        found, extra = module.kernel(case)
        given = module.trial(case, extra, device="cpu").arguments
        assert [max(a.size, 1) for a in found.arguments] == [t.numel() for t in given]
        assert [a.dtype for a in found.arguments] == [str(t.dtype)[6:] for t in given]
        made.append(found)
    floats = [k for k in made if "e4m3" in k.name]
    edge_cuda_build.build([k for k in made if k not in floats], [80])
    edge_cuda_build.build(floats, [89])


@nvcc
def test_hopper_kernels_need_hopper(cases: ModuleType) -> None:
    made, _ = cases.kernel(cases.Case("int8", 70, 300, 200, 8, 0))
    with pytest.raises(UnsupportedError, match="nvcc refused"):
        edge_cuda_build.build([made], [80])


def test_blocks_of_a_piece_are_a_cluster(cases: ModuleType) -> None:
    made, _ = cases.kernel(cases.Case("hopper", 128, 4096, 4096))
    assert made.blocks[:2] == (64, 2)
    assert "__launch_bounds__(384, 2) __cluster_dims__(1, 2, 1)" in generate([made], "sm_90a")


def test_a_stage_is_given_back_once_all_lanes_have_read_it(cases: ModuleType) -> None:
    """By the warp, which meets first: one lane's arrival says nothing of the others' reads."""
    for case in (cases.Case("hopper", 128, 4096, 4096), cases.Case("hopper", 70, 300, 576)):
        made, _ = cases.kernel(case)
        source = generate([made], "sm_90a")
        assert "qc_barrier_init_warps(" in source.partition("__launch_bounds__")[2]
        assert "qc_barrier_arrive_warp(" in source.partition("__launch_bounds__")[2]
        assert "qc_barrier_arrive(" not in source


def test_pieces_are_as_many_as_run_at_once(cases: ModuleType) -> None:
    """Few tokens: small pieces that several blocks share; many: the largest alone."""
    form = Weights(4096, 4096)
    found = {m: choose_tall(m, form) for m in (128, 256, 512, 1024, 4096)}
    assert [(how.tokens, how.rows, how.splits) for how in found.values()] == [
        (64, 128, 2), (128, 128, 2), (128, 128, 1), (256, 128, 1), (256, 128, 1),
    ]  # fmt: skip


def test_pieces_that_do_not_divide_are_shared_out_evenly() -> None:
    """344 pieces for 132 processors: each takes 2.6 of them, through a workspace where it may."""
    form = Weights(11008, 4096)
    how = choose_tall(1024, form, stream=True)
    assert (how.blocks, how.splits) == (132, 1)
    assert how.workspace(1024, form) == 132 * how.tokens * how.rows
    assert choose_tall(1024, form).blocks == 0
    # Two whole ones for each and the 80 that are left: those are shared out.
    assert how.common(1024, form) == 80
    assert choose_tall(1024, Weights(4096, 4096), stream=True).blocks == 0


def test_the_context_is_current_in_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a driver that only counts: the context is opened once, and made current by thread."""
    calls: list[tuple[str, int]] = []

    class Driver:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: calls.append((name, threading.get_ident())) or 0

    monkeypatch.setattr(gpu, "driver", Driver)
    gpu._opened.cache_clear()
    try:
        other = threading.Thread(target=gpu.free_memory)
        gpu.device()
        other.start()
        other.join()
    finally:
        gpu._opened.cache_clear()
    assert [name for name, _ in calls].count("cuDevicePrimaryCtxRetain") == 1
    current = {thread for name, thread in calls if name == "cuCtxSetCurrent"}
    assert len(current) == 2
    names = [name for name, thread in calls if thread != threading.get_ident()]
    assert names == ["cuCtxSetCurrent", "cuMemGetInfo_v2"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line() -> None:
    with pytest.raises(UnsupportedError, match="no GPU: ") as raised:
        gpu.device()
    assert "\n" not in str(raised.value)


@pytest.mark.gpu
def test_kernels_agree_with_float64(cases: ModuleType, more: list[tuple[ModuleType, Any]]) -> None:
    """The tails of every kind on the GPU; `tests/benchmarks/gpu.py` goes through all sizes."""
    every = [(cases, case) for case in cases.CASES] + more
    checked = [(source, case) for source, case in every if not case.timed]
    made = [source.kernel(case) for source, case in checked]
    images, places = edge_cuda_build.build_images([k for k, _ in made], 90)
    modules = [edge_cuda_driver.Module(image) for image in images]
    for (source, case), (kernel, extra), place in zip(checked, made, places, strict=True):
        launch = edge_cuda_build.launch(kernel)
        trial = source.trial(case, extra)
        modules[place].run(launch, [a.data_ptr() for a in trial.arguments])
        torch.cuda.synchronize()
        assert trial.error() < 1e-3, case
