"""One language model in a process of its own, which runs when it is told to: see smollm2.py.

    python language_turns.py ours|genai FOLDER
    python language_turns.py llama FILE.gguf

Every line read is one turn, `prefill N` or `decode PAST N`; the answer is the seconds that N tokens
took and the CPU seconds of that time. One thread. This file also runs where only onnxruntime-genai
or llama-cpp-python is installed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 1
ONE_THREAD = '{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}'


def tokens(count: int) -> Any:
    return np.random.default_rng(0).integers(100, 40000, count)


def ours(folder: str) -> tuple[Callable[[int], Any], Callable[[int, int], Any]]:
    from qcompiler.generation import runtime

    path = Path(folder)
    # A float model beside an artifact has no manifest of its own; it is always ONNX Runtime's.
    target = "ort:cpu" if (path / "model.onnx").is_file() else "tvm:native"
    decoder = runtime(path, target, THREADS)

    def prefill(count: int) -> Any:
        decoder.reset(count)
        return lambda: decoder.feed(tokens(count), last=True)

    def decode(past: int, count: int) -> Any:
        decoder.reset(past + count)
        first = int(decoder.feed(tokens(past), last=True)[-1].argmax())

        def run() -> None:
            token = first
            for _ in range(count):
                token = int(decoder.feed(np.array([token]), last=True)[-1].argmax())

        return run

    return prefill, decode


def genai(folder: str) -> tuple[Callable[[int], Any], Callable[[int, int], Any]]:
    import onnxruntime_genai

    config = onnxruntime_genai.Config(folder)
    config.overlay(ONE_THREAD)
    model = onnxruntime_genai.Model(config)

    def begin(length: int) -> Any:
        options = onnxruntime_genai.GeneratorParams(model)
        options.set_search_options(max_length=length, min_length=length, do_sample=False)
        return onnxruntime_genai.Generator(model, options)

    def prefill(count: int) -> Any:
        generator = begin(count + 1)
        return lambda: generator.append_tokens(tokens(count).astype(np.int32))

    def decode(past: int, count: int) -> Any:
        generator = begin(past + count + 2)
        generator.append_tokens(tokens(past).astype(np.int32))
        generator.generate_next_token()  # of the prompt's logits: the model does not run

        def run() -> None:
            for _ in range(count):
                generator.generate_next_token()

        return run

    return prefill, decode


def llama(path: str) -> tuple[Callable[[int], Any], Callable[[int, int], Any]]:
    import llama_cpp

    model = llama_cpp.Llama(
        path, n_ctx=1024, n_batch=512, n_ubatch=512, n_threads=THREADS, n_threads_batch=THREADS,
        verbose=False,
    )  # fmt: skip

    def likeliest() -> int:
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())

    def prefill(count: int) -> Any:
        model.reset()
        return lambda: (model.eval(tokens(count).tolist()), likeliest())

    def decode(past: int, count: int) -> Any:
        model.reset()
        model.eval(tokens(past).tolist())
        first = likeliest()

        def run() -> None:
            token = first
            for _ in range(count):
                model.eval([token])
                token = likeliest()

        return run

    return prefill, decode


def main() -> None:
    kind, folder = sys.argv[1:]
    prefill, decode = {"ours": ours, "genai": genai, "llama": llama}[kind](folder)
    for line in sys.stdin:
        what, *sizes = line.split()
        run = (prefill if what == "prefill" else decode)(*map(int, sizes))
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(wall, cpu, flush=True)


if __name__ == "__main__":
    main()
