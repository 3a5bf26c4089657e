"""Run an edge artifact from Python: its library, or its runner under qemu for other machines."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler.backends.edge_cuda_load import PROGRAM, CudaModel
from qcompiler.backends.edge_folder import RUNNER, SHARED, WEIGHTS
from qcompiler.backends.edge_target import MACHINES, host_family, missing
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.library import under_its_own_name

VERSION = 1  # of model.h
MAX_RANK = 8
# In the order of model_dtype.
DTYPES = ("float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16",
          "uint32", "uint64", "bool")  # fmt: skip
_TORCH = tuple(getattr(torch, name) for name in DTYPES)
_NUMBERS = {dtype: number for number, dtype in enumerate(_TORCH)}
# ELF's numbers of machines.
_FAMILIES = {62: "x86-64", 183: "aarch64", 40: "armv7", 243: "riscv64"}


class _Port(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("shape", ctypes.c_int64 * MAX_RANK),
        ("sizes", ctypes.c_char_p * MAX_RANK),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("shape", ctypes.c_int64 * MAX_RANK),
        ("data", ctypes.c_void_p),
    )


def load(folder: Path, threads: int | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """The artifact's model as a function of flat inputs, returning flat outputs.

    Args:
        folder: of the artifact.
        threads: that compute; one per CPU when not given.

    Raises:
        InputError: if a file is missing or not the one that was compiled.
        UnsupportedError: if neither this machine nor an emulator on it runs the code.
    """
    if (folder / PROGRAM).is_file():
        return CudaModel(folder)
    for name in (SHARED, RUNNER, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing; compile the model again")
    emulator = emulator_for(folder)
    if emulator:
        return Emulated(folder, emulator, threads or 0)
    return Native(folder, threads or 0)


def emulator_for(folder: Path) -> tuple[str, ...]:
    """The emulator's command by which this machine runs the artifact; empty where it needs none.

    Raises:
        UnsupportedError: if the emulator is not installed, or has not the CPU features either.
    """
    family = family_of(folder / SHARED)
    if family == host_family():
        with under_its_own_name(folder / SHARED) as name:
            library = ctypes.CDLL(str(name))
        library.model_features.restype = ctypes.c_char_p
        features = library.model_features().decode().split()
        if not missing(tuple(features)):
            return ()
    command = next((m.qemu for m in MACHINES.values() if m.family == family and m.qemu), ())
    if not command:
        raise UnsupportedError(f"{folder}: no emulator is known for {family} code")
    if shutil.which(command[0]) is None:
        raise UnsupportedError(
            f"{folder} holds code for another machine ({family}), and '{command[0]}' was not found "
            "to run it here; on Debian and Ubuntu: apt-get install qemu-user"
        )
    return command


def family_of(library: Path) -> str:
    """The instruction set of a shared library, from its ELF header.

    Raises:
        InputError: if it is none, or of a machine that no code is generated for.
    """
    with library.open("rb") as file:
        header = file.read(20)
    number = int.from_bytes(header[18:20], "little")
    if header[:4] != b"\x7fELF" or number not in _FAMILIES:
        raise InputError(f"{library} is no library of a machine that code is generated for")
    return _FAMILIES[number]


@dataclass(frozen=True)
class _Info:
    name: str
    dtype: str


class Native:
    """The library in this process."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._library = _open(folder / SHARED)
        self._model = self._library.model_create(str(folder / WEIGHTS).encode(), threads)
        if not self._model:
            raise InputError(f"{folder}: {self._library.model_error(None).decode()}")
        self._lock = threading.Lock()  # outputs lie in the model's memory until the next run
        self._end = weakref.finalize(self, self._library.model_destroy, self._model)
        count = self._library.model_input_count()
        ports = [self._library.model_input(i).contents for i in range(count)]
        self.inputs = tuple(_Info(p.name.decode(), DTYPES[p.dtype]) for p in ports)
        self._given = (_Tensor * count)()
        self._found = (_Tensor * self._library.model_output_count())()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One run. Inputs of the ports' dtypes and shapes; outputs are copies."""
        _check_count(inputs, self.inputs)
        with self._lock:
            kept = []  # until the run is over: a copy may be all that holds an input's memory
            for slot, value in zip(self._given, inputs, strict=True):
                value = value.detach().cpu().contiguous()
                if value.dtype not in _NUMBERS or value.ndim > MAX_RANK:
                    raise InputError(f"no model takes {value.dtype} of rank {value.ndim}")
                slot.dtype, slot.rank = _NUMBERS[value.dtype], value.ndim
                slot.shape[: value.ndim] = value.shape
                # A tensor without numbers has no address; its shape is what is refused.
                slot.data = value.data_ptr() or ctypes.addressof(slot)
                kept.append(value)
            if self._library.model_run(self._model, self._given, self._found):
                raise InputError(self._library.model_error(self._model).decode())
            return tuple(_copied(slot) for slot in self._found)

    def reset(self) -> None:
        """Forget what earlier runs left in the model's state."""
        with self._lock:
            self._library.model_reset(self._model)

    @property
    def capacity(self) -> int:
        """Tokens that a language model remembers at most; 0 for other models."""
        return int(self._library.model_capacity())

    @property
    def position(self) -> int:
        """Tokens that a language model has read since it was loaded or reset."""
        return int(self._library.model_position(self._model))

    @property
    def vocabulary(self) -> int:
        """How many different tokens a language model knows; 0 for other models."""
        return int(self._library.model_vocabulary())

    def read(self, tokens: Tensor) -> Tensor:
        """Language models: read further tokens (int64, any shape), in order.

        Returns:
            The scores of what comes next: float32, of the vocabulary's size.

        Raises:
            InputError: if there are more tokens than the capacity, or one is not in the vocabulary.
        """
        array = np.ascontiguousarray(tokens.numpy().reshape(-1), np.int64)
        scores = ctypes.POINTER(ctypes.c_float)()
        given = array.ctypes.data_as(ctypes.POINTER(ctypes.c_int64))
        with self._lock:
            if self._library.model_read(self._model, given, len(array), ctypes.byref(scores)):
                raise InputError(self._library.model_error(self._model).decode())
            return torch.from_numpy(np.ctypeslib.as_array(scores, (self.vocabulary,)).copy())


def _open(path: Path) -> Any:
    """The library with the types of its functions; see model.h."""
    with under_its_own_name(path) as name:
        library = ctypes.CDLL(str(name))
    version = library.model_version()
    if version != VERSION:
        raise InputError(
            f"{path} has version {version} of model.h, this qcompiler reads {VERSION}; compile "
            "the model again"
        )
    pointer = ctypes.c_void_p
    library.model_create.restype = pointer
    library.model_create.argtypes = (ctypes.c_char_p, ctypes.c_int)
    library.model_destroy.argtypes = library.model_reset.argtypes = (pointer,)
    library.model_error.restype = ctypes.c_char_p
    library.model_error.argtypes = (pointer,)
    library.model_input.restype = library.model_output.restype = ctypes.POINTER(_Port)
    library.model_capacity.restype = library.model_vocabulary.restype = ctypes.c_int64
    library.model_position.restype = ctypes.c_int64
    library.model_position.argtypes = (pointer,)
    library.model_read.argtypes = (
        pointer, ctypes.POINTER(ctypes.c_int64), ctypes.c_int64,
        ctypes.POINTER(ctypes.POINTER(ctypes.c_float)),
    )  # fmt: skip
    library.model_run.argtypes = (pointer, ctypes.POINTER(_Tensor), ctypes.POINTER(_Tensor))
    return library


def _check_count(inputs: Sequence[Tensor], ports: Sequence[_Info]) -> None:
    if len(inputs) != len(ports):
        names = [port.name for port in ports]
        raise InputError(f"{len(inputs)} inputs given, the model takes {len(names)}: {names}")


def _copied(slot: _Tensor) -> Tensor:
    result = torch.empty(slot.shape[: slot.rank], dtype=_TORCH[slot.dtype])
    ctypes.memmove(result.data_ptr(), slot.data, result.nbytes)
    return result


class Emulated:
    """The runner under an emulator, one process a run: the state starts at zero each time."""

    def __init__(self, folder: Path, emulator: Sequence[str], threads: int) -> None:
        self.emulator = tuple(emulator)
        self._command = [*emulator, str(folder / RUNNER)]
        self._threads = threads
        info = json.loads(self._run("--info"))
        self.inputs = tuple(_Info(p["name"], p["dtype"]) for p in info["inputs"])
        self._outputs = [p["name"] for p in info["outputs"]]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One run. Inputs of the ports' dtypes and shapes."""
        _check_count(inputs, self.inputs)
        with tempfile.TemporaryDirectory() as folder:
            words = []
            for index, (port, value) in enumerate(zip(self.inputs, inputs, strict=True)):
                path = Path(folder) / f"input-{index}.npy"
                np.save(path, value.detach().cpu().contiguous().numpy())
                words += ["--input", f"{port.name}={path}"]
            out = Path(folder) / "out"
            out.mkdir()
            self._run(*words, "--threads", str(self._threads), "--out", str(out))
            names = [name.replace("/", "_") for name in self._outputs]
            return tuple(torch.from_numpy(np.load(out / f"{name}.npy")) for name in names)

    def _run(self, *words: str) -> str:
        done = subprocess.run([*self._command, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            raise InputError(f"{' '.join(self._command)}: {said[-1].removeprefix('error: ')}")
        return done.stdout
