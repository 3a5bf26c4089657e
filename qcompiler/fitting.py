"""Kept batches as an artifact takes them: cut to the sizes that there is code for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompiler.program import Batch

TEXTS = 4  # texts of a batch with which a language model is verified


def texts(batches: Sequence[Batch], limits: Mapping[str, Any]) -> list[Batch]:
    """Batches of a language model as single texts without padding, read from their beginning.

    Args:
        batches: of the program; its inputs of float numbers are the cache.
        limits: the artifact's; each text is cut to the longest chunk that there is code for.
    """
    first = int(limits["tokens"])
    chunks = sorted(int(entry["tokens"]) for entry in limits["entries"])
    found = []
    for batch in batches:
        tokens = batch[first]
        masks = [x for x in batch if x.dtype == torch.int64 and x.ndim == 2 and x is not tokens]
        mask = masks[0][:, -tokens.shape[1] :] if masks else torch.ones_like(tokens)
        for row, seen in list(zip(tokens, mask, strict=True))[:TEXTS]:
            text = row[seen != 0]
            length = max(n for n in chunks if n <= max(1, len(text)))
            text = text[:length][None]
            made: list[Tensor] = []
            for value in batch:
                if value is tokens:
                    made.append(text)
                elif value.is_floating_point():
                    made.append(value.new_zeros(1, value.shape[1], 0, value.shape[3]))
                elif masks and value is masks[0]:
                    made.append(torch.ones_like(text))
                else:
                    made.append(torch.arange(text.shape[1])[None])
            found.append(tuple(made))
    return found


def fitted(batches: Sequence[Batch], limits: Mapping[str, Any], most: int | None) -> list[Batch]:
    """Batches split along their leading size and cut, so that an edge artifact takes them.

    Args:
        batches: of any size.
        limits: the artifact's input shapes and the sizes that it has code for.
        most: samples to keep of each batch; all when not given.
    """
    shapes, entries = limits["inputs"], limits["entries"]
    lead = {shape[0] for shape in shapes if shape and isinstance(shape[0], str)}
    lead -= set(limits["padded"])
    for name in lead & limits.get("exact", {}).keys():  # its parts may be no inputs of the model
        met = {int(entry[name]) for entry in entries}
        batches = [b for b in batches if _lead(b, shapes, name) in met] or batches
    found = []
    for batch in batches:
        pieces = [batch]
        for name in lead:
            sizes = {int(entry[name]) for entry in entries}
            pieces = [piece for whole in pieces for piece in _pieces(whole, shapes, name, sizes)]
        for piece in pieces[:most]:
            cut = piece
            for name in {d for shape in shapes for d in shape if isinstance(d, str)} - lead:
                largest = max(int(entry[name]) for entry in entries)
                cut = _cut(cut, shapes, name, largest)
            found.append(cut)
    return found


def within(batches: Sequence[Batch], limits: Mapping[str, Any]) -> list[Batch]:
    """Batches split along their leading size and cut, as an artifact for any size takes them.

    Args:
        batches: of any size.
        limits: the artifact's input shapes and the largest value of each size that has one.
    """
    shapes, found = limits["inputs"], [*batches]
    for name, largest in limits["limits"].items():
        if any(shape[:1] == [name] for shape in shapes):
            pieces = (_pieces(b, shapes, name, {min(largest, _lead(b, shapes, name))})
                      for b in found)  # fmt: skip
            found = [piece for several in pieces for piece in several]
        else:
            found = [_cut(batch, shapes, name, largest) for batch in found]
    return found


def _pieces(batch: Batch, shapes: Sequence[Any], name: str, sizes: set[int]) -> list[Batch]:
    """The batch in pieces of the largest size that it fills."""
    count = _lead(batch, shapes, name)
    largest = max((size for size in sizes if size <= count), default=min(sizes))
    return [
        tuple(
            x[first : first + largest] if shape[:1] == [name] else x
            for x, shape in zip(batch, shapes, strict=True)
        )
        for first in range(0, count - count % largest, largest)
    ]


def _lead(batch: Batch, shapes: Sequence[Any], name: str) -> int:
    """How many samples a batch has."""
    return max(x.shape[0] for x, shape in zip(batch, shapes, strict=True) if shape[:1] == [name])


def _cut(batch: Batch, shapes: Sequence[Any], name: str, largest: int) -> Batch:
    return tuple(
        x.narrow(shape.index(name), 0, min(largest, x.shape[shape.index(name)])).contiguous()
        if name in shape
        else x
        for x, shape in zip(batch, shapes, strict=True)
    )
