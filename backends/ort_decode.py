"""A language model of `ort.lower` as it runs: new tokens in, logits out, the cache kept in place.

Inputs and outputs are bound once. Where the model's attention can write into the cache that it
reads (GroupQueryAttention), past and present are one buffer and a token costs no copy of it; where
it cannot, the present of a step becomes the past of the next without a copy by us.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.backends.ort_session import FIRST, MODEL, SHARED, session
from qcompiler.errors import InputError

ROUND = 64  # capacities are multiples of this
# What caches are kept in; 4-bit integers two to a byte, bfloat16 as its bits.
TYPES: dict[str, type] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bfloat16)": np.uint16,
    "tensor(int8)": np.int8, "tensor(uint8)": np.uint8,
}  # fmt: skip


class Decoder:
    """One text being read and written.

    Attributes:
        length: tokens in the cache.
        vocabulary: size of the logits.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        path = folder / MODEL
        if not path.is_file():
            raise InputError(f"{path}: no such file; compile the model again")
        self._session = session(path, threads)
        inputs = {i.name: i for i in self._session.get_inputs()}
        self._past = [n for n in inputs if n.startswith("past_key_values.")]
        if not self._past:
            raise InputError(f"{path} takes no past_key_values, so it cannot write text")
        self._present = [n.replace("past_key_values", "present") for n in self._past]
        self._kinds = {n: (inputs[n].shape, TYPES[inputs[n].type]) for n in self._past}
        self._positions = "position_ids" in inputs
        optional = {i.name for i in self._session.get_overridable_initializers()}
        self._prunes = FIRST in optional
        self._shared = SHARED in self._session.get_modelmeta().custom_metadata_map
        logits = next(o for o in self._session.get_outputs() if o.name == "logits")
        self.vocabulary = int(logits.shape[-1])
        self._bound: tuple[int, bool] | None = None  # the step that logits and ids are bound for
        self.reset(0)

    def reset(self, capacity: int) -> None:
        """Forget the text.

        Args:
            capacity: tokens that the next text will have at most.
        """
        self.length = 0
        self._capacity = -(-max(capacity, 1) // ROUND) * ROUND
        self._make_room(self._capacity)
        held = self._capacity if self._shared else 0
        caches = [
            _value(np.zeros((1, int(shape[1]), held, int(shape[3])), kind))
            for shape, kind in self._kinds.values()
        ]
        self._logits: dict[int, Any] = {}
        self._bind(caches)

    def feed(self, tokens: NDArray[np.int64], last: bool = False) -> NDArray[np.float32]:
        """Read tokens after those in the cache.

        Args:
            tokens: int64 (new,), at least one.
            last: only the logits after the last token are wanted.

        Returns:
            Logits, float32 (new, vocabulary), or (1, vocabulary) for `last`.
        """
        total = self.length + len(tokens)
        if self._shared and total > self._capacity:
            raise ValueError(f"{total} tokens in a cache for {self._capacity}")
        if total > len(self._ones):
            self._make_room(2 * total)
        binding = self._binding
        self._ids[: len(tokens)] = tokens
        self._place("attention_mask", self._ones[:total])
        if self._bound != (len(tokens), last):
            self._place("input_ids", self._ids[: len(tokens)])
            rows = 1 if last and self._prunes else len(tokens)
            if self._prunes:
                self._first[0] = len(tokens) - rows
                self._binding.bind_ortvalue_input(FIRST, _value(self._first))
            if rows not in self._logits:
                self._logits = {rows: _empty((1, rows, self.vocabulary))}
            binding.bind_ortvalue_output("logits", self._logits[rows])
            self._bound = (len(tokens), last) if self._shared else None
        if self._positions:
            self._place("position_ids", self._places[self.length : total])
        self._session.run_with_iobinding(binding)
        if not self._shared:
            self._bind(list(binding.get_outputs())[1:])  # in the order of binding: logits first
        self.length = total
        (logits,) = self._logits.values()
        result: NDArray[np.float32] = logits.numpy()[0]
        return result[-1:].copy() if last else result.copy()

    def _make_room(self, tokens: int) -> None:
        """Memory for a text's inputs, bound where it lies, so that a token allocates nothing."""
        self._ids = np.zeros(tokens, np.int64)
        self._ones = np.ones(tokens, np.int64)
        self._places = np.arange(tokens, dtype=np.int64)
        self._first = np.zeros(1, np.int64)
        self._bound = None

    def _place(self, name: str, row: NDArray[np.int64]) -> None:
        """Bind one row of an input, (1, len(row)), without copying it."""
        self._binding.bind_input(name, "cpu", 0, np.int64, (1, len(row)), row.ctypes.data)

    def _bind(self, caches: list[Any]) -> None:
        """Bind the caches, which for a shared buffer is done once for a text."""
        binding = self._binding = self._session.io_binding()
        self._bound = None
        binding.bind_output("logits")
        for name, present, value in zip(self._past, self._present, caches, strict=True):
            binding.bind_ortvalue_input(name, value)
            if self._shared:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present)


def _empty(shape: tuple[int, ...]) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)


def _value(array: NDArray[Any]) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
