"""A `tvm:` artifact in Python: what it holds and how it is run; needs no TVM."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.backends import edge_cuda_load, edge_folder, edge_load
from qcompiler.errors import InputError
from qcompiler.target import Target

SIZES = "sizes.json"
CODE = "model.so"  # code for any size, for TVM's virtual machine


def load(folder: Path, threads: int | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """The artifact's model as a function of flat inputs, returning flat outputs.

    Inputs whose leading size (a batch) has no code of its own are run one after another. Arguments
    and
    errors: see `edge_load.load`.
    """
    if (folder / CODE).is_file():
        from qcompiler.backends.edge_any_size_load import load as load_any_size

        return load_any_size(folder / CODE, limits(folder), threads)
    run = edge_load.load(folder, threads)
    path = folder / SIZES
    if not path.is_file():
        return run
    described = json.loads(path.read_text())
    if "capacity" in described:
        return _Language(run, described)
    size = described.get("batch")  # artifacts of earlier versions do not say: not in pieces
    if size is None:
        return run
    compiled = {int(entry[size]) for entry in described["entries"]}
    inside = [shape[:1] == [size] for shape in described["inputs"]]
    split = _Split(run, inside, compiled)
    for name in ("emulator", "inputs"):
        if hasattr(run, name):
            setattr(split, name, getattr(run, name))
    return split


def files(target: Target) -> tuple[str, ...]:
    """The files that make up a model: its weights and its code."""
    if target.device == "cuda":
        return edge_cuda_load.WEIGHTS, edge_cuda_load.KERNELS
    if target.any_size:
        return (CODE,)
    return edge_folder.WEIGHTS, edge_folder.RUNNER


def limits(folder: Path) -> dict[str, Any]:
    """The shapes of the ports (`inputs`, `outputs`, with names of sizes) and the `entries`."""
    found: dict[str, Any] = json.loads((folder / SIZES).read_text())
    return found


class _Language:
    """A language model on the flat inputs of the program: one text, read from its beginning.

    Returns the logits after the last token, (1, 1, vocabulary). What is asked of the cache beyond
    that is in `edge_decode.Decoder`.
    """

    def __init__(self, run: Any, described: Mapping[str, Any]) -> None:
        self.run, self.index = run, int(described["tokens"])
        self.emulator = getattr(run, "emulator", ())

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        tokens = inputs[self.index]
        if tokens.ndim != 2 or tokens.shape[0] != 1:
            raise InputError(f"one text at a time: (1, tokens), not {tuple(tokens.shape)}")
        if self.emulator:
            found: tuple[Tensor, ...] = self.run(tokens, torch.zeros(1, dtype=torch.int64))
            return (found[0][:, -1:],)
        self.run.reset()
        return (self.run.read(tokens[0]).reshape(1, 1, -1),)


class _Split:
    """Runs a batch piece by piece."""

    def __init__(
        self, run: Callable[..., tuple[Tensor, ...]], inside: list[bool], compiled: set[int]
    ) -> None:
        self.run, self.inside, self.compiled = run, inside, compiled

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        rows = [x.shape[0] for x, mine in zip(inputs, self.inside, strict=False) if mine]
        if not rows or rows[0] in self.compiled or rows[0] == 0:
            return self.run(*inputs)
        fitting = [size for size in self.compiled if rows[0] % size == 0]
        if not fitting:
            return self.run(*inputs)  # says which sizes there are
        step = max(fitting)
        parts = [
            self.run(*(
                x[first : first + step] if mine else x
                for x, mine in zip(inputs, self.inside, strict=True)
            ))
            for first in range(0, rows[0], step)
        ]  # fmt: skip
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
