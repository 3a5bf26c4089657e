"""Caches that a model keeps as integers: their scales, and the floats that they stand for.

The model takes and gives int8, or bytes of two 4-bit integers each (the first in the low bits,
plus 8). Who wants floats, as the captured model had them, finds the scales in the model's metadata.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # who runs a model may have no tools that write one
    import onnx_graphsurgeon as gs

KEY = "qcompiler.stored_caches"  # of the metadata
Array = NDArray[Any]


@dataclass(frozen=True)
class Store:
    """How one cache is kept.

    Attributes:
        bits: 8 or 4.
        scale: float32, (1,) or (kv_heads, 1, size).
    """

    bits: int
    scale: NDArray[np.float32]

    def write(self, cache: Array) -> Array:
        """Floats (batch, kv_heads, tokens, size) as what the model takes."""
        half = 1 << (self.bits - 1)
        integers = np.clip(np.rint(cache / self.scale), -half, half - 1).astype(np.int8)
        if self.bits == 8:
            return integers
        low, high = (integers[..., i::2].astype(np.int16) + half for i in (0, 1))
        return (low | high << 4).astype(np.uint8)

    def read(self, kept: Array) -> Array:
        """What the model gives, as floats."""
        if self.bits == 8:
            return kept.astype(np.float32) * self.scale
        pairs = np.stack([kept & 15, kept >> 4], -1).astype(np.int16) - 8
        floats: Array = pairs.reshape(*kept.shape[:-1], -1).astype(np.float32) * self.scale
        return floats


def narrow(tensor: gs.Variable, bits: int) -> None:
    """Give an input or output that is a cache its integer type."""
    tensor.dtype = np.int8 if bits == 8 else np.uint8
    if bits == 4 and tensor.shape is not None:
        tensor.shape = [*tensor.shape[:-1], int(tensor.shape[-1]) // 2]


def write_metadata(stores: Mapping[str, Store]) -> str:
    """The stores by the name of the input or output, as text."""
    return json.dumps(
        {
            name: [
                store.bits,
                list(store.scale.shape),
                base64.b64encode(store.scale.astype("<f4").tobytes()).decode(),
            ]
            for name, store in stores.items()
        }
    )


def read_metadata(metadata: Mapping[str, str]) -> dict[str, Store]:
    """The inverse of `write_metadata`, from a session's custom metadata; may be empty."""
    found = {}
    for name, (bits, shape, text) in json.loads(metadata.get(KEY, "{}")).items():
        scale = np.frombuffer(base64.b64decode(text), "<f4").reshape(shape)
        found[name] = Store(int(bits), scale)
    return found
