"""SmolLM2 as text is written: tokens per second of ours, of the float model and of a peer.

    python tests/benchmarks/smollm2.py build/smollm2-w4 [build/other …]
        [--genai-python PYTHON --genai FOLDER] [--llama-python PYTHON --llama FILE.gguf]

Decoding 32 tokens after 128 and reading a prompt of 512, one thread. Each model has a process of
its own; they take turns in rounds, and what is printed are medians over the rounds and of the ratio
to the reference within a round, which other load on the machine disturbs least. The first
artifact's float model is the reference, or with --genai the folder that onnxruntime-genai's own
builder made of the same weights:

    python -m onnxruntime_genai.models.builder -i HF_FOLDER -o FOLDER -p int4 -e cpu

llama.cpp takes part through llama-cpp-python (compiled from its source package, without BLAS) with
the file that gguf_q4.py writes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

TURNS = Path(__file__).with_name("language_turns.py")
WORK = {"decode": ("decode 128 32", 32), "prefill": ("prefill 512", 512)}


class Peer:
    """A process with one model."""

    def __init__(self, name: str, python: str, kind: str, folder: Path) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, str(TURNS), kind, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.seconds: dict[str, list[float]] = {work: [] for work in WORK}
        self.cores: list[float] = []

    def turn(self, work: str, keep: bool) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(WORK[work][0] + "\n")
        self.process.stdin.flush()
        wall, cpu = map(float, self.process.stdout.readline().split())
        if keep:
            self.seconds[work].append(wall)
            self.cores.append(cpu / wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--genai", type=Path, action="append", default=[])
    parser.add_argument("--genai-python", default=sys.executable)
    parser.add_argument("--llama", type=Path, action="append", default=[])
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    peers = [Peer(f"genai {f.name}", options.genai_python, "genai", f) for f in options.genai]
    peers += [Peer(f"llama.cpp {f.stem}", options.llama_python, "llama", f) for f in options.llama]
    float_model = options.artifacts[0] / "reference"
    if float_model.is_dir():
        peers.append(Peer("our float ONNX", sys.executable, "ours", float_model))
    peers += [Peer(f.name, sys.executable, "ours", f) for f in options.artifacts]
    for number in range(options.rounds + 1):  # the first round warms up
        for work in WORK:
            for peer in peers:
                peer.turn(work, keep=number > 0)
    base = peers[0]
    print(f"ratios to {base.name}: above 1 is faster; quartiles in brackets")
    for peer in peers:
        cells = [f"{peer.name:24}"]
        for work, (_, count) in WORK.items():
            times = peer.seconds[work]
            ratios = [b / t for b, t in zip(base.seconds[work], times, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            rate = count / statistics.median(times)
            cells.append(f"{work} {rate:6.1f} tokens/s, {middle:.2f} [{low:.2f}, {high:.2f}]")
        cells.append(f"CPU / wall {statistics.median(peer.cores):.2f}")
        print("   ".join(cells))
    for peer in peers:
        peer.process.terminate()


if __name__ == "__main__":
    main()
