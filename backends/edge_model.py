"""EdgeModel: a model compiled to machine code, as data; `edge_folder` links it and writes its C.

The code is a list of kernels with TVM's packed C ABI, one call after another on static shapes:

    int __tvm_ffi_<symbol>(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *res)

Every argument is a DLTensor (compact, `strides` NULL, `byte_offset` 0) whose data lie 64-byte
aligned. A model holds one `Entry` for each combination of sizes that it was compiled for; all share
the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Space = Literal["weights", "arena", "input", "output", "state"]
MOST_ELEMENTS = 2**31 - 1  # of a tensor: kernels count in int32


@dataclass(frozen=True)
class Tensor:
    """A tensor that kernels read or write.

    Attributes:
        space: which memory it lies in. `weights` is the mapped file, `arena` the planned scratch
            memory of a run, `state` what lives from run to run (zero at first), `input` and
            `output` are the ports.
        at: byte offset in that memory; for ports the port's number.
        dtype: numpy's name: float32, int8, uint8, int32, int64, bool, uint16 (bfloat16's bits) ...
        shape: sizes of this entry, all known.
    """

    space: Space
    at: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One kernel call: the symbol, what it is for people (such as a layer's name), its arguments.

    `tensors` are indices into the entry's tensors, in the kernel's order.
    """

    symbol: str
    label: str
    tensors: tuple[int, ...]


@dataclass(frozen=True)
class Port:
    """An input or an output. A size that is a string is dynamic: it takes the entry's value.

    Attributes:
        name: as in the captured model.
        dtype: numpy's name.
        shape: sizes, or names of sizes; one name is one size.
        limit: of an int64 input: its numbers are rows of a table of that many; 0 for the rest.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    limit: int = 0


@dataclass(frozen=True)
class Entry:
    """The code for one combination of sizes, such as {"batch": 1, "sequence": 128}.

    An input smaller than the entry is padded with zeros at the end of its dynamic dimensions, and
    outputs are cut to the sizes given.
    """

    sizes: Mapping[str, int]
    arena: int
    tensors: tuple[Tensor, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Decoder:
    """Which ports make the model a language model with a cache held in `state`.

    Attributes:
        tokens: input of token numbers, int64, (1, sequence).
        position: input with the number of tokens already in the cache, int64, shape (1,).
        logits: output, float32, (1, sequence, vocabulary) or (1, 1, vocabulary).
        capacity: tokens that the cache holds.
    """

    tokens: str
    position: str
    logits: str
    capacity: int


@dataclass(frozen=True)
class EdgeModel:
    """A compiled model.

    Attributes:
        target: the target's string, such as "tvm:aarch64:dotprod".
        features: CPU features that the code needs, by the names of `edge_target`.
        inputs, outputs: the ports.
        entries: smallest first; a run takes the first whose sizes suffice.
        padded: names of sizes that may be padded up to an entry's (a mask input hides the padding);
            others must match an entry exactly.
        state: bytes of the memory that lives from run to run.
        objects: object files (name, contents) with the kernels.
        weights: contents of weights.bin.
        decoder: set for language models.
    """

    target: str
    features: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    entries: tuple[Entry, ...]
    padded: frozenset[str]
    state: int
    objects: tuple[tuple[str, bytes], ...]
    weights: bytes
    decoder: Decoder | None = None
    notes: tuple[str, ...] = field(default=())
