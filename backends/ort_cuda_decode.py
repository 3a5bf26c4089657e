"""A language model on ONNX Runtime's CUDA provider: the cache on the GPU, a token as a CUDA graph.

Attention writes into the cache that it reads (GroupQueryAttention), which is bound once. A token's
step has fixed shapes, with a mask as long as the cache, so that one captured graph serves every
position. Longer pieces are read by the model whose weights are float16, where the artifact has one
(`ort_phases`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.backends.ort_cuda import BFLOAT16, ELEMENT, session
from qcompiler.backends.ort_decode import TYPES
from qcompiler.backends.ort_phases import PREFILL, TOKENS
from qcompiler.backends.ort_session import FIRST, MODEL, SHARED
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.gpu import free_memory

PLAIN = -1  # the number of the graph for runs that are none


class Decoder:
    """One text being read and written.

    Attributes:
        length: tokens in the cache.
        vocabulary: size of the logits.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self._step = session(folder / MODEL, graphs=True)
        prefill = folder / PREFILL
        self._piece = session(prefill) if prefill.is_file() else self._step
        inputs = {i.name: i for i in self._step.get_inputs()}
        self._past = [n for n in inputs if n.startswith("past_key_values.")]
        if not self._past:
            raise InputError(f"{folder} takes no past_key_values, so it cannot write text")
        if SHARED not in self._step.get_modelmeta().custom_metadata_map:
            raise UnsupportedError(
                f"{folder}: its attention is not GroupQueryAttention, so its cache cannot stay on "
                "the GPU; compile it for ort:cpu, or without --set fused=false if that was given"
            )
        self._kinds = [(inputs[n].shape, np.dtype(TYPES[inputs[n].type])) for n in self._past]
        self._narrow = {n for n in self._past if inputs[n].type == BFLOAT16}
        self._positions = "position_ids" in inputs
        optional = {i.name for i in self._step.get_overridable_initializers()}
        self._prunes = FIRST in optional
        logits = next(o for o in self._step.get_outputs() if o.name == "logits")
        self.vocabulary = int(logits.shape[-1])
        self._capacity = self._graph = 0
        self._held = 0  # tokens of the longest cache there was
        self.reset(1)

    def reset(self, capacity: int) -> None:
        """Forget the text.

        Args:
            capacity: tokens that the next text will have at most. Ask for the longest text first:
                a longer one needs another cache and another captured graph, and ONNX Runtime keeps
                the graphs before until the session ends.

        Raises:
            UnsupportedError: where the GPU's memory does not hold so long a cache.
        """
        self.length = 0
        if capacity <= self._capacity:
            return  # what lies in the cache is never read again: the mask hides it
        self._caches: list[Any] = []  # their memory is free before more is asked for
        self._binding: Any = None
        token = sum(int(shape[1]) * int(shape[3]) * kind.itemsize for shape, kind in self._kinds)
        # The old cache is free, but not to the driver: ONNX Runtime's arena keeps its memory.
        needed, free = token * capacity, free_memory() + token * self._held
        refusal = (
            f"a cache for {capacity} tokens needs {needed >> 20} MiB on the GPU, and "
            f"{free >> 20} MiB are free; ask for a shorter text"
        )
        if needed > free:
            self._capacity = 0
            raise UnsupportedError(refusal)
        self._capacity = capacity  # no longer: rotary tables end with the model's context
        self._graph += 1
        try:
            for shape, kind in self._kinds:
                zeros = np.zeros((1, int(shape[1]), capacity, int(shape[3])), kind)
                self._caches.append(_value(zeros))
        except Exception as error:  # of a class that onnxruntime does not export
            self._capacity, self._caches = 0, []
            reason = str(error).partition("\n")[0]
            raise UnsupportedError(f"{refusal} ({reason})") from error
        self._held = capacity
        self._mask = np.zeros((1, self._capacity), np.int64)
        self._token, self._place = (_value(np.zeros((1, 1), np.int64)) for _ in range(2))
        self._seen = _value(self._mask)
        self._logits = _value(np.zeros((1, 1, self.vocabulary), np.float32))
        first = _value(np.zeros(1, np.int64), "cpu")
        self._inputs = [self._token, self._seen, self._place, first]
        self._binding = self._bind(self._step, self._inputs, self._logits)

    def feed(self, tokens: NDArray[np.int64], last: bool = False) -> NDArray[np.float32]:
        """Read tokens (int64) after those in the cache; as `ort_decode.Decoder.feed`."""
        new, total = len(tokens), self.length + len(tokens)
        if total > self._capacity:
            raise ValueError(f"{total} tokens in a cache for {self._capacity}")
        if new == 1 and self.length:
            found = self._one(tokens)
        else:
            found = self._several(tokens, new - 1 if last and self._prunes else 0)
        self.length = total
        return found[-1:] if last else found

    def _one(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        self._mask[:, : self.length + 1] = 1
        self._mask[:, self.length + 1 :] = 0
        self._seen.update_inplace(self._mask)
        self._token.update_inplace(tokens[None].astype(np.int64))
        self._place.update_inplace(np.array([[self.length]], np.int64))
        self._step.run_with_iobinding(self._binding, _options(self._graph))
        result: NDArray[np.float32] = self._logits.numpy()[0].copy()
        return result

    def _several(self, tokens: NDArray[np.int64], first: int) -> NDArray[np.float32]:
        new, total = len(tokens), self.length + len(tokens)
        running = self._piece if new >= TOKENS else self._step
        inputs = [
            _value(tokens[None].astype(np.int64)),
            _value(np.ones((1, total), np.int64)),
            _value(np.arange(self.length, total, dtype=np.int64)[None]),
            _value(np.array([first], np.int64), "cpu"),
        ]
        logits = _value(np.zeros((1, new - first, self.vocabulary), np.float32))
        binding = self._bind(running, inputs, logits)
        running.run_with_iobinding(binding, _options(PLAIN))
        result: NDArray[np.float32] = logits.numpy()[0].copy()
        return result

    def _bind(self, running: Any, inputs: Sequence[Any], logits: Any) -> Any:
        """Inputs and outputs of a run, which the caller keeps alive.

        The inputs are tokens, mask, positions and, on the CPU, the first token with logits.
        """
        tokens, mask, places, first = inputs
        binding = running.io_binding()
        binding.bind_ortvalue_input("input_ids", tokens)
        binding.bind_ortvalue_input("attention_mask", mask)
        if self._positions:
            binding.bind_ortvalue_input("position_ids", places)
        if self._prunes:
            binding.bind_ortvalue_input(FIRST, first)
        for name, value in zip(self._past, self._caches, strict=True):
            present = name.replace("past_key_values", "present")
            if name in self._narrow:  # numpy knows no bfloat16: the memory is that of integers
                where = ("cuda", 0, ELEMENT, value.shape(), value.data_ptr())
                binding.bind_input(name, *where)
                binding.bind_output(present, *where)
                continue
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(present, value)
        binding.bind_ortvalue_output("logits", logits)
        return binding


def _options(graph: int) -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def _value(array: NDArray[Any], where: str = "cuda") -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array, where, 0)
