"""Run an artifact for a GPU: weights and state on the device, each entry one CUDA graph."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler.backends.edge_cuda_driver import Launch, Memory, Module, Stream
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.gpu import device, free_memory

LAUNCH = 128  # a run takes about as long, whatever its size, as so many tokens more
KERNELS, WEIGHTS, PROGRAM = "kernels.fatbin", "weights.bin", "program.json"


@dataclass(frozen=True)
class _Port:
    name: str
    dtype: str
    shape: tuple[int | str, ...]
    limit: int  # of int64: numbers are rows of a table of that many; 0 for the rest

    def size(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape at an entry's sizes."""
        return tuple(sizes[s] if isinstance(s, str) else s for s in self.shape)

    def bytes(self, sizes: Mapping[str, int]) -> int:
        """Of the port at an entry's sizes."""
        count = int(np.prod(self.size(sizes), dtype=np.int64))
        return max(1, count) * torch.empty((), dtype=getattr(torch, self.dtype)).element_size()


class CudaModel:
    """The model on this machine's GPU. Attributes and methods are those of `edge_load.Native`."""

    def __init__(self, folder: Path) -> None:
        for name in (KERNELS, WEIGHTS, PROGRAM):
            if not (folder / name).is_file():
                raise InputError(f"{folder / name} is missing; compile the model again")
        self._program = program = json.loads((folder / PROGRAM).read_text())
        found = device()
        wanted = program["capability"]
        if found.capability != wanted:
            raise UnsupportedError(
                f"{folder} is compiled for GPUs of compute capability {wanted / 10}, and "
                f"{found.name} has {found.capability / 10}; compile it with --target "
                f"tvm:cuda:sm_{found.capability}"
            )
        if any(launch.get("together") for launch in program["launches"].values()):
            raise UnsupportedError(
                f"{folder} was compiled by an earlier qcompiler: blocks of its kernels wait for "
                "one another, and nothing here sees to it that all of them run; compile it again"
            )
        self.inputs = tuple(_port(p) for p in program["inputs"])
        self._outputs = tuple(_port(p) for p in program["outputs"])
        self._entries: list[dict[str, Any]] = program["entries"]
        needed = self._needed()
        free = free_memory()
        if needed > free:
            raise UnsupportedError(
                f"{folder} needs {needed >> 20} MiB on the GPU, and {free >> 20} MiB are free"
            )
        if (folder / WEIGHTS).stat().st_size != program["weights"]:
            raise InputError(f"{folder / WEIGHTS} is not the file that was compiled; compile again")
        self._module = Module((folder / KERNELS).read_bytes())
        self._stream = Stream()
        self._weights = Memory(program["weights"])
        self._weights.write((folder / WEIGHTS).read_bytes(), self._stream)
        self._state = Memory(max(1, program["state"]))
        self._arena = Memory(max(1, *(e["arena"] for e in self._entries)))
        self._ports = {
            "input": [Memory(max(p.bytes(e["sizes"]) for e in self._entries)) for p in self.inputs],
            "output": [
                Memory(max(p.bytes(e["sizes"]) for e in self._entries)) for p in self._outputs
            ],
        }
        self._graphs: dict[int, Any] = {}
        self._lock = threading.Lock()
        self.position = 0
        self.reset()

    def _needed(self) -> int:
        program = self._program
        ports = [*self.inputs, *self._outputs]
        held = sum(max(p.bytes(e["sizes"]) for e in self._entries) for p in ports)
        arena = max(int(e["arena"]) for e in self._entries)
        return int(program["weights"]) + int(program["state"]) + arena + held

    @property
    def capacity(self) -> int:
        """Tokens that a language model remembers at most; 0 for other models."""
        decoder = self._program["decoder"]
        return int(decoder["capacity"]) if decoder else 0

    @property
    def vocabulary(self) -> int:
        """How many different tokens a language model knows; 0 for other models."""
        return int(self._outputs[0].shape[-1]) if self.capacity else 0

    def reset(self) -> None:
        """Forget what earlier runs left in the model's state."""
        device()  # current in this thread, whichever it is
        self._state.clear(self._stream)
        self.position = 0

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One run. Inputs of the ports' dtypes and shapes; outputs are copies."""
        if len(inputs) != len(self.inputs):
            names = [port.name for port in self.inputs]
            raise InputError(f"{len(inputs)} inputs given, the model takes {len(names)}: {names}")
        sizes = self._sizes(inputs)
        number = self._fitting(sizes)
        entry = self._entries[number]
        with self._lock:
            given = [
                _filled(value, port.size(entry["sizes"]))
                for value, port in zip(inputs, self.inputs, strict=True)
            ]
            found = self._run(number, given)
        return tuple(
            value[tuple(slice(0, sizes[s] if isinstance(s, str) else s) for s in port.shape)]
            for value, port in zip(found, self._outputs, strict=True)
        )

    def read(self, tokens: Tensor) -> Tensor:
        """Language models: read further tokens (int64, any shape), in order.

        Returns:
            The scores of what comes next: float32, of the vocabulary's size.

        Raises:
            InputError: if there are more tokens than the capacity, or one is not in the vocabulary.
        """
        flat = tokens.reshape(-1).to(torch.int64)
        if len(flat) == 0 or int(flat.min()) < 0 or int(flat.max()) >= self.vocabulary:
            raise InputError(
                f"tokens must be numbers from 0 to {self.vocabulary - 1}, at least one"
            )
        decoder = self._program["decoder"]
        scores = torch.empty(0)
        numbers = {e["sizes"]["tokens"]: i for i, e in enumerate(self._entries)}
        with self._lock:
            total = self.position + len(flat)
            if total > self.capacity:
                raise InputError(
                    f"{total} tokens, and the cache holds {self.capacity}; compile with a larger "
                    "capacity (--bucket capacity=…)"
                )
            for first, chunk in runs(len(flat), [*numbers]):
                place = torch.tensor([self.position + first], dtype=torch.int64)
                part = flat[None, first : first + chunk].contiguous()
                given = [part if p.name == decoder["tokens"] else place for p in self.inputs]
                scores = self._run(numbers[chunk], given)[0]
            self.position = total
        return scores[0, -1].clone()

    def _sizes(self, inputs: Sequence[Tensor]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for value, port in zip(inputs, self.inputs, strict=True):
            dtype = getattr(torch, port.dtype)
            fits = value.dtype == dtype and value.ndim == len(port.shape)
            for have, want in zip(value.shape, port.shape, strict=False):
                same = sizes.setdefault(want, have) if isinstance(want, str) else want
                fits = fits and have == same
            if not fits:
                raise InputError(
                    f"input '{port.name}' is {value.dtype} {tuple(value.shape)}; the model takes "
                    f"{dtype} {port.shape}"
                )
            if port.limit and bool(((value < 0) | (value >= port.limit)).any()):
                raise InputError(f"input '{port.name}' has numbers outside 0 … {port.limit - 1}")
        return sizes

    def _fitting(self, sizes: Mapping[str, int]) -> int:
        padded = set(self._program["padded"])
        for number, entry in enumerate(self._entries):
            have = entry["sizes"]
            if all(n == have[k] or (k in padded and n < have[k]) for k, n in sizes.items()):
                return number
        known = [entry["sizes"] for entry in self._entries]
        raise InputError(f"there is no code for the sizes {dict(sizes)}, only for {known}")

    def _run(self, number: int, given: Sequence[Tensor]) -> list[Tensor]:
        device()  # as above
        for memory, value in zip(self._ports["input"], given, strict=True):
            memory.write_from(value.data_ptr(), value.nbytes, self._stream)
        if number not in self._graphs:
            self._launch(number)  # once as it is: what goes wrong is said by name
            self._stream.wait()
            for memory, value in zip(self._ports["input"], given, strict=True):
                memory.write_from(value.data_ptr(), value.nbytes, self._stream)
            self._graphs[number] = self._stream.capture(lambda: self._launch(number))
        self._stream.replay(self._graphs[number])
        found = []
        for memory, port in zip(self._ports["output"], self._outputs, strict=True):
            shape = port.size(self._entries[number]["sizes"])
            value = torch.empty(shape, dtype=getattr(torch, port.dtype))
            memory.read_into(value.data_ptr(), value.nbytes, self._stream)
            found.append(value)
        self._stream.wait()
        return found

    def _launch(self, number: int) -> None:
        entry, launches = self._entries[number], self._program["launches"]
        for at, step in enumerate(entry["steps"]):
            raw = launches[step["symbol"]]
            launch = Launch(
                raw["name"], tuple(raw["blocks"]), raw["threads"], raw["shared"],
                tuple(raw["order"]),
            )  # fmt: skip
            self._module.run(launch, self._addresses(entry, at), self._stream.handle)

    def _addresses(self, entry: Mapping[str, Any], number: int) -> list[int]:
        """Where the tensors of a step lie."""
        spaces = {"weights": self._weights, "arena": self._arena, "state": self._state}
        found = []
        for tensor in entry["steps"][number]["tensors"]:
            space, at = entry["tensors"][tensor]["space"], entry["tensors"][tensor]["at"]
            if space in self._ports:
                found.append(self._ports[space][at].address)
            else:
                found.append(spaces[space].address + at)
        return found


def runs(count: int, chunks: Sequence[int]) -> list[tuple[int, int]]:
    """The runs in which a text is read.

    Args:
        count: tokens.
        chunks: sizes that there is code for; one of them is 1 at most.

    Returns:
        First token and number of tokens of each run. The last one may begin at tokens that were
        read before, and so write the same keys and values again, where that takes less time than
        small runs for what is left.
    """

    def small(left: int) -> list[int]:
        sizes: list[int] = []
        while left:
            sizes.append(max(size for size in chunks if size <= left))
            left -= sizes[-1]
        return sizes

    found: list[tuple[int, int]] = []
    done = 0
    while done < count:
        rest = small(count - done)
        again = min((size for size in chunks if count - done < size <= count), default=0)
        if again and LAUNCH + again < sum(LAUNCH + size for size in rest):
            return [*found, (count - again, again)]
        found.append((done, rest[0]))
        done += rest[0]
    return found


def _port(raw: Mapping[str, Any]) -> _Port:
    return _Port(raw["name"], raw["dtype"], tuple(raw["shape"]), raw["limit"])


def _filled(value: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor with zeros at its ends up to a shape."""
    value = value.detach().cpu()
    if tuple(value.shape) == tuple(shape):
        return value.contiguous()
    made = value.new_zeros(shape)
    made[tuple(slice(0, n) for n in value.shape)] = value
    return made
