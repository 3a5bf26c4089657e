"""Decoding with a Llama-2-7B-shaped model on a GPU, beside the same model in torch float16.

    python tests/benchmarks/decoder.py build FOLDER               # TVM and nvcc; no GPU
    python tests/benchmarks/decoder.py run FOLDER --out FILE.json # a GPU; neither TVM nor nvcc

32 layers, 4096 wide, 11008 inside, 32 heads; weights of 4 bits in groups of 128, random. All layers
share one layer's weights when they are compiled; `build` leaves the numbers themselves out, `run`
makes random ones and gives each layer a copy of its own in GPU memory, so that every step reads all
of them from there. The context is 1,024 tokens, batch 1; both sides are one CUDA graph a token.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LAYERS, WIDTH, INNER, HEADS, WORDS = 32, 4096, 11008, 32, 32000
SIZE, GROUP, CONTEXT, CAPACITY = WIDTH // HEADS, 128, 1024, 1088
OWN = 1 << 20  # bytes from which on a weight is copied for each layer
RUNS, STEPS = 9, 20
WEIGHTS, ROWS = "weights.bin", 16


class Packed(nn.Module):
    """A linear with random 4-bit weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        q = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8)
        self.register_buffer("q", q)
        self.register_buffer("scale", torch.rand(outputs, inputs // GROUP) * 0.01)
        self.register_buffer("zero", torch.zeros(outputs, inputs // GROUP, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) → (…, outputs)."""
        weight = torch.ops.qc.dequantize(self.q, self.scale, self.zero, 1, GROUP)
        return nn.functional.linear(x, weight)


class Model(nn.Module):
    """The decoder with its cache as flat inputs and outputs, as `hf_decoder` has it."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = layers
        self.qkv, self.o = Packed(WIDTH, 3 * WIDTH), Packed(WIDTH, WIDTH)
        self.up, self.down = Packed(WIDTH, 2 * INNER), Packed(INNER, WIDTH)
        self.head = Packed(WIDTH, WORDS)
        self.norms = nn.ParameterList(nn.Parameter(torch.rand(WIDTH)) for _ in range(3))
        self.register_buffer("table", torch.randint(-127, 128, (WORDS, WIDTH), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(WORDS, 1) * 0.01)
        self.register_buffer("zero", torch.zeros((), dtype=torch.int8))
        angles = torch.arange(2 * CONTEXT)[:, None] * 1e4 ** -(torch.arange(0, SIZE, 2) / SIZE)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        past = [f"past_{n}_{kind}" for n in range(layers) for kind in ("key", "value")]
        self.names = ["input_ids", "attention_mask", "position_ids", *past]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(n, kind) for n in self.names])

        def forward(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
            return self.step(*signature.bind(*args, **kwargs).arguments.values())

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward

    def step(self, ids: Tensor, mask: Tensor, positions: Tensor, *past: Tensor) -> tuple[Any, ...]:
        """The tokens' logits, and the cache with them."""
        from qcompiler.cached import cached_attention

        rows = nn.functional.embedding(ids, self.table)
        scales = nn.functional.embedding(ids, self.scales)
        x = torch.ops.qc.dequantize(rows, scales, self.zero, 0, 0)
        present = []
        for n in range(self.layers):
            q, k, v = self.qkv(self.norm(x, 0)).chunk(3, -1)
            made, *caches = cached_attention(
                q, k, v, *past[2 * n : 2 * n + 2], mask, self.cos, self.sin, positions, HEADS,
                HEADS, SIZE**-0.5, -1, False,
            )  # fmt: skip
            present += caches
            x = x + self.o(made)
            gate, up = self.up(self.norm(x, 1)).chunk(2, -1)
            x = x + self.down(nn.functional.silu(gate) * up)
        return self.head(self.norm(x, 2)), *present

    def norm(self, x: Tensor, which: int) -> Tensor:
        """RMSNorm."""
        return nn.functional.rms_norm(x, (WIDTH,), self.norms[which], 1e-5)


def build(folder: Path) -> None:
    """Compile one token's step."""
    from qcompiler.backends.edge import lower
    from qcompiler.program import capture
    from qcompiler.target import Target

    torch.manual_seed(0)
    model = Model().eval()
    new, past = 3, 5
    example = {
        "input_ids": torch.ones(2, new, dtype=torch.int64),
        "attention_mask": torch.ones(2, past + new, dtype=torch.int64),
        "position_ids": torch.ones(2, new, dtype=torch.int64),
    }
    shapes: dict[str, dict[int, str]] = {
        "input_ids": {0: "batch", 1: "new"}, "attention_mask": {0: "batch", 1: "total"},
        "position_ids": {0: "batch", 1: "new"},
    }  # fmt: skip
    for name in model.names[3:]:
        example[name] = torch.zeros(2, HEADS, past, SIZE)
        shapes[name] = {0: "batch", 2: "past"}
    folder.mkdir(parents=True, exist_ok=True)
    program = capture(model, example, shapes)
    buckets = {"tokens": (1,), "capacity": (CAPACITY,)}
    made = lower(program, Target.parse("tvm:cuda:sm_90"), folder, buckets=buckets, say=print)
    print(made.kernels)
    (folder / WEIGHTS).unlink()


def made_up(folder: Path) -> None:
    """Write random weights: packed ones with scales of 0.01, floats of 0.5."""
    from qcompiler.kernels.cuda_weights import Weights

    program = json.loads((folder / "program.json").read_text())
    data = torch.randint(0, 256, (program["weights"],), dtype=torch.uint8)
    stage = Weights(16, GROUP, 4, GROUP)
    (entry,) = program["entries"]
    for tensor in entry["tensors"]:
        count = tensor["shape"][0]
        if tensor["space"] != "weights":
            continue
        if tensor["dtype"] == "float32":
            part = data[tensor["at"] : tensor["at"] + 4 * count]
            part.copy_(torch.full((count,), 0.5).view(torch.uint8))
        elif tensor["dtype"] == "uint8":
            part = data[tensor["at"] : tensor["at"] + count].view(-1, stage.stage_bytes)
            scales = torch.full((ROWS,), 0.01, dtype=torch.float16)
            part[:, stage.weight_bytes :] = scales.view(torch.uint8)
    (folder / WEIGHTS).write_bytes(data.numpy().tobytes())


def run(folder: Path) -> dict[str, Any]:
    """Time a step of both, interleaved."""
    from gpu_timing import copy_bandwidth

    from qcompiler.backends import edge_cuda_load
    from qcompiler.backends.edge_cuda_driver import Memory

    class Own(edge_cuda_load.CudaModel):
        """Each step with weights of its own."""

        copies: dict[tuple[int, int], Memory]
        read = 0  # bytes of weights in a step

        def spread(self) -> None:
            """Copy what several steps share."""
            self.copies = {}
            (entry,) = self._entries
            sizes = {"uint8": 1, "int8": 1, "float16": 2, "float32": 4, "int32": 4, "int64": 8}
            host = torch.empty(self._program["weights"], dtype=torch.uint8)
            self._weights.read_into(host.data_ptr(), host.numel(), self._stream)
            self._stream.wait()
            for number, step in enumerate(entry["steps"]):
                for t in step["tensors"]:
                    held = entry["tensors"][t]
                    size = sizes[held["dtype"]] * held["shape"][0]
                    if (held["space"], held["dtype"]) != ("weights", "uint8"):
                        continue
                    self.read += size
                    if size >= OWN:
                        part = host[held["at"] : held["at"] + size].contiguous()
                        made = self.copies[number, t] = Memory(size)
                        made.write_from(part.data_ptr(), size, self._stream)
                        self._stream.wait()

        def _addresses(self, entry: Any, number: int) -> list[int]:
            found = super()._addresses(entry, number)
            step = entry["steps"][number]
            held = [(i, self.copies.get((number, t))) for i, t in enumerate(step["tensors"])]
            for i, made in held:
                if made is not None:
                    found[i] = made.address
            return found

    copy = copy_bandwidth()
    made_up(folder)
    model = Own(folder)
    model.spread()
    model.position = CONTEXT
    given = [torch.ones(1, 1, dtype=torch.int64), torch.tensor([CONTEXT])]
    assert all(bool(x.isfinite().all()) for x in model._run(0, given))
    ours, stream = model._graphs[0], torch.cuda.ExternalStream(model._stream.handle)
    theirs = peer()
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(RUNS):
        with torch.cuda.stream(stream):
            times["ours"].append(_timed(lambda: model._stream.replay(ours)))
        times["torch"].append(_timed(theirs.replay))
    cache = 2 * LAYERS * CONTEXT * WIDTH * 2
    mine, other = (statistics.median(times[name]) for name in ("ours", "torch"))
    limit = (model.read + cache) / copy / 1e3
    summary = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "context": CONTEXT,
        "copy_gb_per_s": round(copy, 1), "weights_bytes": model.read, "cache_bytes": cache,
        "us": round(mine, 1), "limit_us": round(limit, 1), "of_limit": round(limit / mine, 3),
        "torch_fp16_us": round(other, 1), "torch_over_ours": round(other / mine, 2),
        "kernels": len(model._entries[0]["steps"]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }  # fmt: skip
    print(json.dumps(summary, indent=1))
    return summary


def _timed(step: Any) -> float:
    """Microseconds of a step, STEPS of them one after another."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()
    torch.cuda.synchronize()
    start.record()
    for _ in range(STEPS):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / STEPS


@torch.no_grad()
def peer() -> torch.cuda.CUDAGraph:
    """The same step in torch, float16, with cuBLAS and torch's fused attention."""

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.float16) * 0.01

    layers = [
        (weight(3 * WIDTH, WIDTH), weight(WIDTH, WIDTH), weight(2 * INNER, WIDTH),
         weight(WIDTH, INNER), weight(WIDTH), weight(WIDTH),
         weight(1, HEADS, CAPACITY, SIZE), weight(1, HEADS, CAPACITY, SIZE))
        for _ in range(LAYERS)
    ]  # fmt: skip
    table, head, last = weight(WORDS, WIDTH), weight(WORDS, WIDTH), weight(WIDTH)
    token = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    cos, sin = (torch.rand(SIZE // 2, device="cuda").half() for _ in range(2))
    linear, norm = nn.functional.linear, nn.functional.rms_norm

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def step() -> Tensor:
        x = nn.functional.embedding(token, table)
        for qkv, o, up, down, first, second, keys, values in layers:
            parts = linear(norm(x, (WIDTH,), first), qkv).view(1, 3, HEADS, 1, SIZE)
            q, k, v = parts.unbind(1)
            keys[:, :, CONTEXT : CONTEXT + 1] = turn(k)
            values[:, :, CONTEXT : CONTEXT + 1] = v
            seen = slice(0, CONTEXT + 1)
            made = nn.functional.scaled_dot_product_attention(
                turn(q), keys[:, :, seen], values[:, :, seen]
            )
            x = x + linear(made.transpose(1, 2).reshape(1, 1, WIDTH), o)
            gate, inner = linear(norm(x, (WIDTH,), second), up).chunk(2, -1)
            x = x + linear(nn.functional.silu(gate) * inner, down)
        return linear(norm(x, (WIDTH,), last), head)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.what == "build":
        build(given.folder)
    else:
        summary = run(given.folder)
        if given.out is not None:
            given.out.write_text(json.dumps(summary, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
