"""Run code for any size: TVM's virtual machine in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from qcompiler.backends.edge_model import MOST_ELEMENTS
from qcompiler.backends.edge_sizes import Formula
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.library import under_its_own_name

ALIGN = 64


def load(path: Path, described: Mapping[str, Any], threads: int | None = None) -> AnySize:
    """The artifact's model as a function of flat inputs, returning flat outputs.

    Args:
        path: of the library.
        described: the ports, as `edge_any_size` wrote them.
        threads: that compute; one per CPU when not given.

    Raises:
        UnsupportedError: if TVM is not installed, or the CPU lacks what the code needs.
    """
    try:
        import tvm
        import tvm_ffi
        from tvm import relax
    except ImportError as error:
        raise UnsupportedError(
            f"{path} is run by TVM, which is not installed ({error}): pip install 'qcompiler[tvm]'"
        ) from error
    from qcompiler.backends.edge_target import missing

    lacking = missing(tuple(described["features"]))
    if lacking:
        raise UnsupportedError(f"{path} needs a CPU with {', '.join(lacking)}; compile it here")
    configure = tvm.get_global_func("runtime.config_threadpool")
    configure(1, threads or tvm.runtime.num_threads())
    with under_its_own_name(path) as name:
        module = tvm_ffi.load_module(name)  # tvm.runtime's resolves the link
    return AnySize(relax.VirtualMachine(module, tvm.cpu()), described)


class AnySize:
    """A model for any size. Threads may share it: their calls wait for one another."""

    emulator: tuple[str, ...] = ()

    def __init__(self, machine: Any, described: Mapping[str, Any]) -> None:
        self._run, self._described = machine["main"], described
        self._inputs, self._outputs = described["dtypes"]
        names = tuple(described["sizes"])
        self._elements = [
            Formula(names, tuple((tuple(powers), factor) for powers, factor in terms))
            for terms in described["elements"]
        ]
        self._lock = Lock()  # the virtual machine's frames and registers serve one call at a time

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the model.

        Raises:
            InputError: for inputs that it does not take.
        """
        self._check(inputs)
        given = [_tensor(x) for x in inputs]
        with self._lock:
            found = [from_dlpack(y) for y in self._run(*given)]
        return tuple(
            y.view(torch.bool) if dtype == "bool" else y
            for y, dtype in zip(found, self._outputs, strict=True)
        )

    def _check(self, inputs: tuple[Tensor, ...]) -> None:
        shapes, names = self._described["inputs"], self._described["names"]
        if len(inputs) != len(shapes):
            raise InputError(f"{len(inputs)} inputs given, the model takes {', '.join(names)}")
        sizes: dict[str, int] = {}
        for x, shape, name, dtype, rows in zip(
            inputs, shapes, names, self._inputs, self._described["rows"], strict=True
        ):
            if str(x.dtype) != f"torch.{dtype}" or x.ndim != len(shape):
                raise InputError(
                    f"input '{name}' is {x.dtype} {tuple(x.shape)}, the model takes {dtype} {shape}"
                )
            for have, size in zip(x.shape, shape, strict=True):
                wanted = sizes.setdefault(size, have) if isinstance(size, str) else size
                most = self._described["limits"].get(size, have)
                if have != wanted or not 0 < have <= most:
                    limit = f", {size} at most {most}" if have > most else ""
                    raise InputError(
                        f"input '{name}' has the shape {tuple(x.shape)}, the model takes "
                        f"{shape}{limit}"
                    )
            if rows and x.numel() and not 0 <= int(x.min()) <= int(x.max()) < rows:
                raise InputError(f"input '{name}' has numbers outside 0 to {rows - 1}")
        largest = max((formula.at(sizes) for formula in self._elements), default=0)
        if largest > MOST_ELEMENTS:
            given = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise InputError(
                f"the model would need a buffer of {largest} elements for {given}, more than "
                f"{MOST_ELEMENTS}: give it smaller inputs"
            )


def _tensor(x: Tensor) -> Any:
    """The same memory for TVM, or a copy where it is not aligned as kernels expect it."""
    from tvm import runtime

    x = x.detach().contiguous()
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    return runtime.tensor(x.numpy()) if x.data_ptr() % ALIGN else runtime.from_dlpack(x)
