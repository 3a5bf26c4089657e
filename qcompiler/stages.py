"""Run a program over many batches in stages, so that its layers can be changed on the way.

Between two stages only the values that later nodes read are held, for all batches; inside a stage
as many batches run side by side as torch has threads, each on one thread, which wastes less of them
than sharing each small op out. Beyond a budget the held values go to files. So the memory is

    budget  +  threads × what one batch needs between two stages

above the weights, whatever the number of batches; nothing is computed twice.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.memory import release
from qcompiler.program import Batch, Program, Watch
from qcompiler.rewrite import operand

BUDGET = 1 << 28  # bytes of held values in memory
Function = Callable[..., Any]


class Stages:
    """A program that stands still at one node, for all batches.

    Attributes:
        replaced: linear or convolution → what gives the weight that it uses instead of its own. It
            is asked once for each stage that the node runs in, and dropped with the stage.
        functions: call → what is computed in place of its op, from the same operands.
    """

    def __init__(
        self,
        program: Program,
        batches: Iterable[Batch],
        budget: int = BUDGET,
        outputs: int | None = None,
    ) -> None:
        """Read the batches once; nothing runs before `advance`.

        Args:
            program: what runs.
            batches: its inputs.
            budget: bytes of held values in memory; more go to files.
            outputs: how many of the program's outputs are held for `outputs`; all when not given.
                A decoder returns the keys and values of all its layers beside the logits.
        """
        self.replaced: dict[Node, Callable[[], Tensor]] = {}
        self.functions: dict[Node, Function] = {}
        self._nodes = list(program.exported.graph.nodes)
        self._index = {node: i for i, node in enumerate(self._nodes)}
        self._outputs = operand(self._nodes[-1], 0)[:outputs]
        self._last = {s: self._index[n] for n in self._nodes[:-1] for s in n.all_input_nodes}
        self._last |= {n: len(self._nodes) - 1 for n in self._outputs if isinstance(n, Node)}
        known = program.constants()
        self._shared: dict[Node, Any] = {}
        inputs = []
        for node in self._nodes:
            if node.op == "get_attr":
                self._shared[node] = getattr(program.exported.graph_module, str(node.target))
            elif node.op == "placeholder" and node.name in known:
                self._shared[node] = known[node.name]
            elif node.op == "placeholder":
                inputs.append(node)
        self._budget = budget
        self._position = 0
        self._spilled: tempfile.TemporaryDirectory[str] | None = None
        self._making = threading.Lock()
        self._held: list[dict[Node, Any] | Path] = [
            dict(zip(inputs, batch, strict=True)) for batch in batches
        ]

    def __len__(self) -> int:
        return len(self._held)

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        if self._spilled is not None:
            self._spilled.cleanup()

    def advance(self, stop: Node) -> None:
        """Run every batch up to `stop`, which itself does not run yet.

        Raises:
            ValueError: `stop` was passed already.
        """
        end = self._index[stop]
        if end < self._position:
            raise ValueError(f"'{stop.name}' was passed already")
        weights = self._weights(end)
        held, lock = 0, threading.Lock()

        @torch.no_grad()  # of each thread alone
        def run(number: int) -> None:
            nonlocal held
            values = self._load(number)
            for index in range(self._position, end):
                self._step(index, values, self.functions, weights)
            kept = {n: _compact(v) for n, v in values.items() if self._last.get(n, -1) >= end}
            with lock:
                held += sum(v.nbytes for v in kept.values() if isinstance(v, Tensor))
                spills = held > self._budget
            self._held[number] = self._spill(number, kept) if spills else kept

        _side_by_side(run, len(self._held))
        release()
        self._position = end

    def values(self, node: Node) -> Iterator[Any]:
        """A node's value for each batch; it must be read by a node that has not run yet."""
        if node in self._shared:
            return iter([self._shared[node]] * len(self))
        return (self._load(number)[node] for number in range(len(self)))

    @torch.no_grad()
    def outputs(
        self,
        functions: Mapping[Node, Function] | None = None,
        watch: Watch | None = None,
        first: int = 0,
    ) -> Iterator[tuple[Any, ...]]:
        """Run each batch on to the end, as a trial: the program stays where it stands.

        Args:
            functions: call → what is computed in place of its op, beside `self.functions`.
            watch: called with every computed node and its value.
            first: batches before this one are left out.

        Yields:
            The flat outputs of a batch, as many as are held.
        """
        trial = self.functions | dict(functions or {})
        end = len(self._nodes) - 1  # the output node
        weights = self._weights(end)
        for number in range(first, len(self._held)):
            values = self._load(number)
            for index in range(self._position, end):
                self._step(index, values, trial, weights, watch)
            yield tuple(self._value(values, n) if isinstance(n, Node) else n for n in self._outputs)

    def constant(self, node: Node) -> Any:
        """A parameter's or buffer's value."""
        return self._shared[node]

    def _weights(self, end: int) -> dict[Node, Tensor]:
        """The replaced weights of the nodes that run before `end`."""
        nodes = self._nodes[self._position : end]
        return {node: self.replaced[node]() for node in nodes if node in self.replaced}

    def _value(self, values: dict[Node, Any], source: Node) -> Any:
        return values[source] if source in values else self._shared[source]

    def _step(
        self,
        index: int,
        values: dict[Node, Any],
        functions: Mapping[Node, Function],
        weights: Mapping[Node, Tensor],
        watch: Watch | None = None,
    ) -> None:
        node = self._nodes[index]
        if node.op != "call_function":
            return

        def value(source: Node) -> Any:
            return self._value(values, source)

        args = list(torch.fx.node.map_arg(node.args, value))
        if node in weights:
            args[1] = weights[node]
        function: Any = functions.get(node, node.target)
        values[node] = function(*args, **torch.fx.node.map_arg(node.kwargs, value))
        if watch is not None:
            watch(node, values[node])
        for source in node.all_input_nodes:
            if self._last[source] == index:
                values.pop(source, None)
        if node not in self._last:  # nothing reads it
            del values[node]

    def _load(self, number: int) -> dict[Node, Any]:
        held = self._held[number]
        if isinstance(held, Path):
            named = torch.load(held, weights_only=False)
            return {self._nodes[index]: value for index, value in named.items()}
        return dict(held)

    def _spill(self, number: int, values: dict[Node, Any]) -> Path:
        with self._making:
            if self._spilled is None:
                self._spilled = tempfile.TemporaryDirectory(prefix="qcompiler-")
            path = Path(self._spilled.name) / f"{number}.pt"
        torch.save({self._index[node]: value for node, value in values.items()}, path)
        return path


def _side_by_side(run: Callable[[int], None], count: int) -> None:
    """Call `run` with 0 … count − 1, on as many threads as torch has, each using one."""
    threads = torch.get_num_threads()
    if threads == 1 or count == 1:
        for number in range(count):
            run(number)
        return
    # In a thread this sets its own number, and what threads made later begin with.
    pool = ThreadPoolExecutor(min(threads, count), initializer=torch.set_num_threads, initargs=(1,))
    try:
        for _ in pool.map(run, range(count)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _compact(value: Any) -> Any:
    """A tensor without the rest of the storage that it is a view of."""
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() > 2 * value.nbytes:
        return value.clone()
    return value
