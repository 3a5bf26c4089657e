"""A float program in torch float16 on a GPU: what artifacts for GPUs are timed beside.

Weights are float16, which cuBLAS and torch's attention multiply. Where an operator reads float16
and float32 (tables of angles, masks), float32 becomes float16, of constants once for all. Shapes
that come again run as a CUDA graph.

A language model's step has fixed shapes too: its tokens read all of a cache's places, of which a
mask hides those that nothing was written to yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from qcompiler.cached import CACHED
from qcompiler.errors import InputError
from qcompiler.explaining import FLOATING
from qcompiler.op_families import LINEAR
from qcompiler.program import Program, load_pt2

MASK, TOKENS, PLACES = "attention_mask", "input_ids", "position_ids"
KEPT = 2  # texts of different lengths whose caches and graphs are kept
CHECKS = frozenset({torch.ops.aten._assert_tensor_metadata.default})  # that types are float32
Values = tuple[Tensor, ...]


class _Narrow:
    """The program's nodes, one after another, on a device."""

    def __init__(self, program: Program, device: str, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._limits = torch.finfo(dtype)
        graph = program.exported.graph
        self._nodes = [*graph.nodes]
        self._module = program.exported.graph_module
        parameters = program.exported.graph_signature.inputs_to_parameters
        self._constants = {
            name: self.narrowed(value.to(device)) if name in parameters else value.to(device)
            for name, value in program.constants().items()
        }
        self._narrowed: dict[Node, Tensor] = {}
        last = {source: node for node in self._nodes for source in node.all_input_nodes}
        self._dying: dict[Node, list[Node]] = {}
        for source, reader in last.items():
            self._dying.setdefault(reader, []).append(source)
        first = self._nodes[-1].args[0][0]  # type: ignore[index,union-attr]
        self._head = first if isinstance(first, Node) and first.target is LINEAR else None

    def narrowed(self, value: Tensor) -> Tensor:
        """Floats in the narrow type, what is beyond it as its largest."""
        if value.dtype != torch.float32:
            return value
        return value.clamp(self._limits.min, self._limits.max).to(self._dtype)

    @torch.no_grad()
    def run(self, given: Sequence[Tensor], last: bool = False) -> Values:
        """The outputs; `last`: the first, which a linear made, for the last position alone."""
        values: dict[Node, Any] = {}
        rest = iter(given)
        for node in self._nodes:
            if node.op == "placeholder":
                known = self._constants.get(node.name)
                values[node] = next(rest) if known is None else known
            elif node.op == "get_attr":
                values[node] = getattr(self._module, str(node.target))
            elif node.op == "output":
                return tuple(values[n] for n in node.args[0])  # type: ignore[union-attr,index]
            elif node.target not in CHECKS:
                values[node] = self._call(node, values, last)
            for source in self._dying.get(node, ()):
                values.pop(source, None)
        raise AssertionError("a graph without an output node")

    def _call(self, node: Node, values: Mapping[Node, Any], last: bool) -> Any:
        found = (values[n] for n in node.all_input_nodes)
        narrow = any(isinstance(v, Tensor) and v.dtype == self._dtype for v in found)

        def value(source: Node) -> Any:
            held = values[source]
            if not (narrow and isinstance(held, Tensor) and held.dtype == torch.float32):
                return held
            if source.name not in self._constants:
                return self.narrowed(held)
            if source not in self._narrowed:
                self._narrowed[source] = self.narrowed(held)
            return self._narrowed[source]

        args = torch.fx.node.map_arg(node.args, value)
        kwargs = dict(torch.fx.node.map_arg(node.kwargs, value))
        if kwargs.get("device") is not None:
            kwargs["device"] = self._device
        if last and node is self._head:
            args = (args[0][:, -1:], *args[1:])
        return node.target(*args, **kwargs)  # type: ignore[operator]


class _Captured:
    """A function of tensors of fixed shapes on the GPU: run once, from then on as a graph."""

    def __init__(self, compute: Callable[[], Values]) -> None:
        self._compute = compute
        self._graph: Any = None
        self._made: Values = ()
        self._runs = 0

    def __call__(self) -> Values:
        self._runs += 1
        if self._runs == 1 or self._graph is False:
            return self._compute()
        if self._graph is None:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self._made = self._compute()
            except RuntimeError:  # it reads a number on the host, which no graph can
                self._graph = False
                torch.cuda.synchronize()
                return self._compute()
            self._graph = graph
        self._graph.replay()
        return self._made


def load(folder: Path) -> Callable[..., Values]:
    """The float program kept in a folder; see `load_program`."""
    return load_program(load_pt2(folder / FLOATING))


def load_program(
    program: Program, device: str = "cuda", dtype: torch.dtype = torch.float16
) -> Callable[..., Values]:
    """The program as a function of flat inputs on the CPU, returning flat float32 outputs there."""
    narrow = _Narrow(program, device, dtype)
    known: dict[Any, tuple[list[Tensor], Callable[[], Values]]] = {}

    def run(*inputs: Tensor) -> Values:
        shapes = tuple((tuple(x.shape), x.dtype) for x in inputs)
        if shapes not in known:
            held = [torch.empty_like(x, device=device) for x in inputs]
            known[shapes] = held, _captured(lambda: narrow.run(held), device)
        held, compute = known[shapes]
        for memory, x in zip(held, inputs, strict=True):
            memory.copy_(x)
        return tuple(_plain(y) for y in compute())

    return run


def _captured(compute: Callable[[], Values], device: str) -> Callable[[], Values]:
    return _Captured(compute) if device == "cuda" else compute


def _plain(value: Tensor) -> Tensor:
    value = value.cpu()
    return value.float() if value.is_floating_point() else value


class Decoder:
    """One text being read and written; as `ort_decode.Decoder`.

    Attributes:
        length: tokens in the cache.
        vocabulary: size of the logits.
    """

    def __init__(
        self,
        folder: Path,
        threads: int | None = None,
        device: str = "cuda",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        """The float program in the folder, with the inputs of `hf_decoder`; `threads` has no use.

        Raises:
            InputError: it takes no caches.
        """
        program = load_pt2(folder / FLOATING)
        nodes = {n.name: n for n in program.exported.graph.nodes if n.op == "placeholder"}
        self._inputs = program.inputs
        own = {TOKENS, MASK, PLACES}
        self._caches = [nodes[name].meta["val"].shape for name in self._inputs if name not in own]
        if not self._caches or not {TOKENS, MASK} <= {*self._inputs}:
            raise InputError("the program takes no key-value caches, so it cannot write text")
        readers = {
            reader for name in self._inputs if name not in (TOKENS, PLACES)
            for reader in nodes[name].users
        }  # fmt: skip
        # Windows count places, and other attention may too: those read a cache without gaps.
        self._fixed = all(n.target in CACHED and n.args[12] <= 0 for n in readers)  # type: ignore[operator]
        logits = program.exported.graph.output_node().args[0][0]  # type: ignore[index,union-attr]
        self.vocabulary = int(logits.meta["val"].shape[-1])  # type: ignore[union-attr]
        self._program = _Narrow(program, device, dtype)
        self._device, self._dtype = device, dtype
        self._texts: dict[int, _Text] = {}
        self.reset(1)

    def reset(self, capacity: int) -> None:
        """Forget the text; `capacity` tokens at most will follow."""
        self.length = 0
        text = self._texts.pop(capacity, None) or _Text(self, capacity)
        while len(self._texts) >= KEPT:
            del self._texts[next(iter(self._texts))]
        self._texts[capacity] = self._text = text

    def feed(self, tokens: NDArray[np.int64], last: bool = False) -> NDArray[np.float32]:
        """Read tokens, int64 (new,); logits, float32 (new, vocabulary), or of the last alone."""
        given = torch.from_numpy(np.ascontiguousarray(tokens))[None].to(self._device)
        read = self._text.read if self._fixed else self._text.read_exactly
        logits = read(given, self.length, last)
        self.length += len(tokens)
        found: NDArray[np.float32] = logits[0].float().cpu().numpy()
        return found[-1:] if last else found

    def _step(self, ids: Tensor, mask: Tensor, places: Tensor, past: Values, last: bool) -> Values:
        """Logits, and the caches with the tokens."""
        known = {TOKENS: ids, MASK: mask, PLACES: places}
        rest = iter(past)
        given = [known[name] if name in known else next(rest) for name in self._inputs]
        return self._program.run(given, last)

    def _memory(self, tokens: int) -> Values:
        """Caches for so many tokens."""
        return tuple(
            torch.zeros(1, s[1], tokens, s[3], dtype=self._dtype, device=self._device)
            for s in self._caches
        )


class _Text:
    """The caches of a text of so many tokens at most, and the graphs that read and write them."""

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        self._decoder, self._capacity = decoder, capacity
        self._none = decoder._memory(0)
        self._past: Values = decoder._memory(capacity) if decoder._fixed else self._none
        self._steps: dict[tuple[int, bool, bool], tuple[Values, Callable[[], Values]]] = {}

    def read(self, ids: Tensor, length: int, last: bool) -> Tensor:
        """Logits of tokens (1, new) behind `length` others."""
        new, first = ids.shape[1], length == 0
        key = (new, first, last)
        if key not in self._steps:
            self._steps[key] = self._step(new, first, last)
        (held, mask, places), compute = self._steps[key]
        held.copy_(ids)
        places.copy_(torch.arange(length, length + new)[None])
        if not first:
            mask[:, : self._capacity] = torch.arange(self._capacity) < length
        return compute()[0]

    def _step(self, new: int, first: bool, last: bool) -> tuple[Values, Callable[[], Values]]:
        """Tokens, mask and places on the device, and what computes the logits from them."""
        decoder, before = self._decoder, 0 if first else self._capacity
        ids, places = (
            torch.zeros(1, new, dtype=torch.int64, device=decoder._device) for _ in range(2)
        )
        mask = torch.ones(1, before + new, dtype=torch.int64, device=decoder._device)
        past = self._none if first else self._past

        def compute() -> Values:
            logits, *present = decoder._step(ids, mask, places, past, last)
            for memory, made in zip(self._past, present, strict=True):
                memory.index_copy_(2, places[0], made[:, :, before:].to(memory.dtype))
            return (logits,)

        return (ids, mask, places), _captured(compute, decoder._device)

    def read_exactly(self, ids: Tensor, length: int, last: bool) -> Tensor:
        """As `read`, with a past of `length` tokens and no place more."""
        total = length + ids.shape[1]
        mask = torch.ones(1, total, dtype=torch.int64, device=ids.device)
        places = torch.arange(length, total, device=ids.device)[None]
        past = self._past if length else self._none
        logits, *present = self._decoder._step(ids, mask, places, past, last)
        self._past = tuple(present)
        return logits
