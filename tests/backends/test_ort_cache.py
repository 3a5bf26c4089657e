"""`qc::cached_attention` as ONNX Runtime runs it: the torch reference, prefill and continuation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from qcompiler import cached
from qcompiler.backends import ort
from qcompiler.program import Program, capture

HEADS, KV_HEADS, SIZE, CONTEXT = 4, 2, 32, 32
NAMES = ("q", "k", "v", "past_key", "past_value", "mask", "positions")


class Attention(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, pairs: int, interleaved: bool, window: int) -> None:
        super().__init__()
        self.pairs, self.interleaved, self.window = pairs, interleaved, window
        angles = torch.arange(CONTEXT)[:, None] * 0.7 ** torch.arange(max(pairs, 1))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor, mask: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        tables = (self.cos, self.sin, positions) if self.pairs else (None, None, None)
        done: tuple[Tensor, Tensor, Tensor] = cached.cached_attention(
            q, k, v, past_key, past_value, mask, *tables, HEADS, KV_HEADS, 0.3, self.window,
            self.interleaved,
        )  # fmt: skip
        return done


def inputs(batch: int, new: int, past: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(new)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "q": normal(batch, new, HEADS * SIZE),
        "k": normal(batch, new, KV_HEADS * SIZE),
        "v": normal(batch, new, KV_HEADS * SIZE),
        "past_key": normal(batch, KV_HEADS, past, SIZE),
        "past_value": normal(batch, KV_HEADS, past, SIZE),
        "mask": torch.ones(batch, past + new, dtype=torch.int64),
        "positions": torch.arange(past, past + new).repeat(batch, 1),
    }


def captured(pairs: int, interleaved: bool = False, window: int = -1) -> Program:
    shapes = {name: {0: "batch", 1: "new"} for name in NAMES}
    shapes |= {name: {0: "batch", 2: "past"} for name in ("past_key", "past_value")}
    shapes["mask"] = {0: "batch", 1: "total"}
    return capture(Attention(pairs, interleaved, window), inputs(2, 3, 5), shapes)


@pytest.mark.parametrize(
    ("pairs", "interleaved", "window"),
    [(16, False, -1), (16, True, -1), (8, False, -1), (0, False, -1), (16, False, 5)],
)
def test_it_is_the_reference(pairs: int, interleaved: bool, window: int, tmp_path: Path) -> None:
    program = captured(pairs, interleaved, window)
    ort.lower(program, tmp_path)
    run = ort.load(tmp_path, 1)
    for sizes in ((2, 7, 0), (1, 4, 6), (3, 1, 9)):  # prefill, a piece, a token
        batch = tuple(inputs(*sizes).values())
        for got, want in zip(run(*batch), program.run(batch), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_padding_behind_the_text_is_not_read(tmp_path: Path) -> None:
    program = captured(16)
    ort.lower(program, tmp_path)
    batch = inputs(2, 7, 0)
    batch["mask"][1, 4:] = 0
    got = ort.load(tmp_path, 1)(*batch.values())[0]
    want = program.run(tuple(batch.values()))[0]
    valid = batch["mask"].bool()
    torch.testing.assert_close(got[valid], want[valid], rtol=1e-4, atol=1e-5)


def test_the_cache_is_written_in_place(tmp_path: Path) -> None:
    """Past and present in one buffer: the tokens before stay, the new ones stand behind them."""
    import onnxruntime

    program = captured(16)
    ort.lower(program, tmp_path)
    session = ort.session(tmp_path / ort.MODEL, 1)
    assert ort.SHARED in session.get_modelmeta().custom_metadata_map
    batch = inputs(1, 2, 5)
    want = program.run(tuple(batch.values()))
    binding = session.io_binding()
    buffers = {}
    for name, value in batch.items():
        if name.startswith("past_"):
            room = np.full((1, KV_HEADS, 12, SIZE), np.nan, np.float32)
            room[:, :, :5] = value.numpy()
            buffers[name] = onnxruntime.OrtValue.ortvalue_from_numpy(room)
            binding.bind_ortvalue_input(name, buffers[name])
        else:
            binding.bind_cpu_input(name, value.numpy())
    outputs = [o.name for o in session.get_outputs()]
    binding.bind_output(outputs[0])
    for name, buffer in zip(outputs[1:], buffers.values(), strict=True):
        binding.bind_ortvalue_output(name, buffer)
    session.run_with_iobinding(binding)
    got = [binding.get_outputs()[0].numpy(), *(b.numpy()[:, :, :7] for b in buffers.values())]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-5)


class Stored(Attention):
    """The same over a cache of integers; keys with a scale for each channel."""

    key_scale: Tensor
    value_scale: Tensor

    def __init__(self, bits: int, channel: bool) -> None:
        super().__init__(16, False, -1)
        self.bits = bits
        half = (1 << (bits - 1)) - 1
        spread = torch.linspace(0.5, 1.5, KV_HEADS * SIZE).view(KV_HEADS, 1, SIZE)
        # A few values lie outside of the range and are clipped.
        key = 2.5 / half * (spread if channel else torch.ones(1))
        self.register_buffer("key_scale", key)
        self.register_buffer("value_scale", key.flip(-1) * 0.8)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor, mask: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        done: tuple[Tensor, Tensor, Tensor] = cached.stored_attention(
            q, k, v, past_key, past_value, mask, self.cos, self.sin, positions, HEADS, KV_HEADS,
            0.3, -1, False, self.key_scale, self.value_scale, self.bits,
        )  # fmt: skip
        return done


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("channel", [True, False])
def test_a_cache_of_integers_is_the_reference(bits: int, channel: bool, tmp_path: Path) -> None:

    shapes = {name: {0: "batch", 1: "new"} for name in NAMES}
    shapes |= {name: {0: "batch", 2: "past"} for name in ("past_key", "past_value")}
    shapes["mask"] = {0: "batch", 1: "total"}
    program = capture(Stored(bits, channel), inputs(2, 3, 5), shapes)
    ort.lower(program, tmp_path)
    graph = onnx.load(tmp_path / ort.MODEL).graph
    kind = onnx.TensorProto.INT8 if bits == 8 else onnx.TensorProto.UINT8
    caches = [t.type.tensor_type for t in (*graph.input[3:5], *graph.output[1:])]
    assert [t.elem_type for t in caches] == [kind] * 4
    assert [t.shape.dim[3].dim_value for t in caches] == [SIZE * bits // 8] * 4
    run = ort.load(tmp_path, 1)
    for sizes in ((2, 7, 0), (1, 4, 6), (3, 1, 9)):
        batch = tuple(inputs(*sizes).values())
        for got, want in zip(run(*batch), program.run(batch), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
