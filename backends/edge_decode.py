"""A language model of an edge artifact as it runs: new tokens in, logits out, the cache in C."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qcompiler.backends.edge_cuda_load import CudaModel
from qcompiler.backends.edge_load import Native, load
from qcompiler.errors import InputError, UnsupportedError


class Decoder:
    """One text being read and written.

    Attributes:
        length: tokens in the cache.
        vocabulary: size of the logits.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        model = load(folder, threads)
        if not isinstance(model, Native | CudaModel):
            raise UnsupportedError(
                f"{folder} holds code for another machine; it writes text there with "
                "model --generate ids.npy"
            )
        if not model.capacity:
            raise InputError(f"{folder} is no language model with a cache, so it writes no text")
        self._model = model
        self.vocabulary = model.vocabulary

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._model.position

    def reset(self, capacity: int) -> None:
        """Forget the text.

        Args:
            capacity: tokens that the next text will have at most.

        Raises:
            InputError: if the compiled cache is smaller than that.
        """
        if capacity > self._model.capacity:
            raise InputError(
                f"{capacity} tokens asked for, and the model was compiled for "
                f"{self._model.capacity}; compile with a larger capacity"
            )
        self._model.reset()

    def feed(self, tokens: NDArray[np.int64], last: bool = False) -> NDArray[np.float32]:
        """Read tokens after those in the cache.

        Args:
            tokens: int64 (new,), at least one.
            last: only the logits after the last token are wanted. All of them cost as much as
                reading token by token.

        Returns:
            Logits, float32 (new, vocabulary), or (1, vocabulary) for `last`.
        """
        pieces = [tokens] if last else [tokens[i : i + 1] for i in range(len(tokens))]
        rows = [self._model.read(torch.from_numpy(piece)).numpy() for piece in pieces]
        return np.stack(rows)
