"""The float model in torch float16 that artifacts for GPUs are timed beside.

Without a GPU the same code runs on the CPU, in float32 where its structure is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcompiler import benching
from qcompiler.backends import torch_half
from qcompiler.cached import CACHED
from qcompiler.errors import InputError
from qcompiler.explaining import FLOATING
from qcompiler.generation import float_target
from qcompiler.models import find
from qcompiler.passes.fuse_cache import fuse_cache
from qcompiler.passes.normalize import normalize
from qcompiler.program import Program, capture
from qcompiler.target import Target

CLOSE = 5e-3  # ‖out − ref‖ / ‖ref‖ of float16 arithmetic in two layers


@pytest.fixture(scope="module")
def plain(language_folder: Path) -> Program:
    """A random Llama with its cache outside, attention spelled out."""
    spec = find(f"hf:{language_folder}")
    assert not isinstance(spec, Path)
    return normalize(capture(spec.module, spec.example_inputs, spec.dynamic_shapes))


@pytest.fixture(params=["fused", "spelled out"])
def program(plain: Program, request: pytest.FixtureRequest) -> Program:
    return fuse_cache(plain, 48) if request.param == "fused" else plain


def kept(program: Program, folder: Path) -> Path:
    torch.export.save(program.exported, folder / FLOATING)
    return folder


def logits(program: Program, tokens: Any) -> torch.Tensor:
    """Of a text without a past, by the program itself."""
    ids = torch.from_numpy(tokens)[None]
    known = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(len(tokens))[None],
    }  # fmt: skip
    nodes = {n.name: n for n in program.exported.graph.nodes}
    batch = [
        known[name] if name in known
        else torch.zeros(1, nodes[name].meta["val"].shape[1], 0, nodes[name].meta["val"].shape[3])
        for name in program.inputs
    ]  # fmt: skip
    return program.run(batch)[0][0]


def error(got: Any, want: torch.Tensor) -> float:
    wide = torch.as_tensor(got).double()
    return float((wide - want.double()).norm() / want.double().norm())


def test_a_text_in_pieces(program: Program, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 90, 14)
    want = logits(program, tokens)
    decoder = torch_half.Decoder(kept(program, tmp_path), device="cpu", dtype=torch.float32)
    assert decoder.vocabulary == want.shape[-1]
    fused = any(node.target in CACHED for node in program.exported.graph.nodes)
    assert decoder._fixed == fused  # it reads all places of its cache
    for capacity in (14, 20, 31, 14):  # a later text, also one whose caches were given up
        decoder.reset(capacity)
        pieces = [decoder.feed(tokens[a:b]) for a, b in ((0, 5), (5, 6), (6, 7), (7, 14))]
        assert decoder.length == 14
        assert error(np.concatenate(pieces), want) < 1e-5
    decoder.reset(14)
    decoder.feed(tokens[:9], last=True)
    last = [decoder.feed(tokens[i : i + 1], last=True) for i in range(9, 14)]
    assert [x.shape for x in last] == [(1, want.shape[-1])] * 5
    assert error(np.concatenate(last), want[9:]) < 1e-5


def test_a_text_in_float16(plain: Program, tmp_path: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, 90, 9)
    fused = fuse_cache(plain, 48)
    decoder = torch_half.Decoder(kept(fused, tmp_path), device="cpu")
    decoder.reset(9)
    assert error(decoder.feed(tokens), logits(fused, tokens)) < CLOSE


@pytest.mark.parametrize("name", ["tiny-attention-block", "tiny-gqa-decoder", "tiny-conv-block"])
def test_flat_inputs(tiny: Callable[[str], Any], name: str) -> None:
    model = tiny(name)
    run = torch_half.load_program(model.normalized, "cpu")
    for batch in model.held_out[:2]:
        for got, want in zip(run(*batch), model.normalized.run(batch), strict=True):
            assert got.dtype == want.dtype
            assert error(got, want) < CLOSE


def test_a_program_without_caches_is_refused(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    folder = kept(tiny("tiny-attention-block").normalized, tmp_path)
    with pytest.raises(InputError, match="caches"):
        torch_half.Decoder(folder, device="cpu")


def test_what_runs_the_float_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu, ours in ((True, "torch:cuda"), (False, "ort:cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert float_target("tvm:cuda:sm_90") == ours
        assert float_target("ort:cuda") == "ort:cuda"
        assert float_target("tvm:native") == "ort:cpu"
    said = [
        benching._where(Target.parse(target), float_target(target))
        for target in ("tvm:cuda:sm_90", "ort:cuda:sm_90+tvm", "tvm:native", "ort:cpu")
    ]
    assert said == ["ONNX Runtime on the CPU", "ONNX Runtime on this GPU", "", ""]


@pytest.mark.gpu
def test_graphs_on_a_gpu(program: Program, tmp_path: Path) -> None:
    """Read twice: the second time by captured graphs."""
    tokens = np.random.default_rng(2).integers(0, 90, 14)
    want = logits(program, tokens)
    decoder = torch_half.Decoder(kept(program, tmp_path))
    for _ in range(3):
        decoder.reset(20)
        pieces = [decoder.feed(tokens[a:b]) for a, b in ((0, 5), (5, 6), (6, 7), (7, 14))]
        assert error(np.concatenate(pieces), want) < CLOSE
    steps = decoder._text._steps.values()
    assert all(isinstance(run._graph, torch.cuda.CUDAGraph) for _, run in steps)
    assert bool(steps) == decoder._fixed
