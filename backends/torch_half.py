"""A float program in torch float16 on a GPU: what artifacts for GPUs are timed beside.

Weights are float16, which cuBLAS and torch's attention multiply. Where an operator reads float16
and float32 (tables of angles, masks), float32 becomes float16, of constants once for all. Shapes
that come again run as a CUDA graph.

A language model's step has fixed shapes too: keys and values are written into a cache in place, and
its tokens read all of it, with a mask over what comes later. What layers share, such as that mask
and the angles of the positions, is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from qcompiler.cached import CACHED, cached_attention, turn
from qcompiler.errors import InputError
from qcompiler.explaining import FLOATING
from qcompiler.op_families import LINEAR
from qcompiler.program import Program, load_pt2

MASK, TOKENS, PLACES = "attention_mask", "input_ids", "position_ids"
KEPT = 2  # texts of different lengths whose caches and graphs are kept
CHECKS = frozenset({torch.ops.aten._assert_tensor_metadata.default})  # that types are float32
Values = tuple[Tensor, ...]
Attend = Callable[..., Values]  # computes an attention over a cache: its node and its arguments


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
        first = self._nodes[-1].args[0][0]
        self._head = first if isinstance(first, Node) and first.target is LINEAR else None

    def narrowed(self, value: Tensor) -> Tensor:
        """Floats in the narrow type, what is beyond it as its largest."""
        if value.dtype != torch.float32 or self._dtype == torch.float32:
            return value
        return value.clamp(self._limits.min, self._limits.max).to(self._dtype)

    @torch.no_grad()
    def run(
        self, given: Sequence[Tensor], last: bool = False, attend: Attend | None = None
    ) -> Values:
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
                return tuple(values[n] for n in node.args[0])
            elif node.target not in CHECKS:
                values[node] = self._call(node, values, last, attend)
            for source in self._dying.get(node, ()):
                values.pop(source, None)
        raise AssertionError("a graph without an output node")

    def _call(
        self, node: Node, values: Mapping[Node, Any], last: bool, attend: Attend | None
    ) -> Any:
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

        args: Any = torch.fx.node.map_arg(node.args, value)
        args = tuple(self._device if isinstance(a, torch.device) else a for a in args)
        kwargs = dict(torch.fx.node.map_arg(node.kwargs, value))
        known = getattr(getattr(node.target, "_schema", None), "arguments", ())
        made = any(a.name == "device" for a in known) and not any(
            isinstance(v, Tensor) for v in args
        )
        if made or kwargs.get("device") is not None:
            kwargs["device"] = self._device
        if last and node is self._head:
            args = (args[0][:, -1:], *args[1:])
        if attend is not None and node.target in CACHED:
            return attend(node, *args)
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
        self._fixed = all(n.target is cached_attention and n.args[12] <= 0 for n in readers)
        logits = program.exported.graph.output_node().args[0][0]
        self.vocabulary = int(logits.meta["val"].shape[-1])
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

    def _step(
        self, ids: Tensor, mask: Tensor, places: Tensor, past: Values, last: bool,
        attend: Attend | None = None,
    ) -> Values:  # fmt: skip
        """Logits, and the caches with the tokens."""
        known = {TOKENS: ids, MASK: mask, PLACES: places}
        rest = iter(past)
        given = [known[name] if name in known else next(rest) for name in self._inputs]
        return self._program.run(given, last, attend)

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
        (held, places), compute = self._steps[key]
        held.copy_(ids)
        places.copy_(torch.arange(length, length + new)[None])
        return compute()[0]

    def _step(self, new: int, first: bool, last: bool) -> tuple[Values, Callable[[], Values]]:
        """Tokens and places on the device, and what computes the logits from them."""
        decoder = self._decoder
        ids, places = (
            torch.zeros(1, new, dtype=torch.int64, device=decoder._device) for _ in range(2)
        )

        def compute() -> Values:
            attend = partial(_attention, {}, places[0], first)
            return decoder._step(ids, ids, places, self._past, last, attend)[:1]

        return (ids, places), _captured(compute, decoder._device)

    def read_exactly(self, ids: Tensor, length: int, last: bool) -> Tensor:
        """As `read`, with a past of `length` tokens and no place more."""
        total = length + ids.shape[1]
        mask = torch.ones(1, total, dtype=torch.int64, device=ids.device)
        places = torch.arange(length, total, device=ids.device)[None]
        past = self._past if length else self._none
        logits, *present = self._decoder._step(ids, mask, places, past, last)
        self._past = tuple(present)
        return logits


def _attention(
    shared: dict[Any, Values], places: Tensor, first: bool, node: Node, q: Tensor, k: Tensor,
    v: Tensor, keys: Tensor, values: Tensor, mask: Tensor, cos: Tensor | None, sin: Tensor | None,
    positions: Tensor | None, heads: int, kv_heads: int, scale: float, window: int,
    interleaved: bool,
) -> Values:  # fmt: skip
    """`qc::cached_attention` of one text without padding, over a cache with places for all of it.

    Args:
        shared: of all attentions of a run; empty at its start.
        places: (new,) where the tokens stand in the text and the cache.
        first: nothing stands before them.
        node: the attention.
        keys, values: (1, kv_heads, capacity, size), written at those places.
        mask, window: not looked at: all before a token is text, and it reads all of that.
        q, k, v, cos, sin, positions, heads, kv_heads, scale, interleaved: as the op's.
    """
    query, key, value = (
        x.unflatten(-1, (count, x.shape[-1] // count)).transpose(1, 2)
        for x, count in ((q, heads), (k, kv_heads), (v, kv_heads))
    )
    if cos is not None and sin is not None and positions is not None:
        tables = node.args[6:9]
        if tables not in shared:
            shared[tables] = tuple(table[positions][:, None] for table in (cos, sin))
        c, s = shared[tables]
        both = turn(torch.cat([query, key], 1), c, s, interleaved)
        query, key = both.split([heads, kv_heads], 1)
    keys.index_copy_(2, places, key)
    values.index_copy_(2, places, value)
    product = partial(torch.nn.functional.scaled_dot_product_attention, scale=scale)
    grouped = heads != kv_heads
    if first:
        out = product(query, key, value, is_causal=True, enable_gqa=grouped)
    else:
        if "seen" not in shared:
            seen = torch.arange(keys.shape[2], device=places.device) <= places[:, None]
            shared["seen"] = (seen,)
        (seen,) = shared["seen"]
        if len(places) == 1:  # the heads that share a key are read as if they were tokens
            query, grouped = query.reshape(1, kv_heads, -1, query.shape[-1]), False
        out = product(query, keys, values, seen, enable_gqa=grouped)
        out = out.reshape(1, heads, len(places), -1)
    return out.transpose(1, 2).flatten(2), keys, values
