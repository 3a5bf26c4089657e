"""One run of an artifact on files: what `qcompiler run` does with any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler.artifact import Artifact
from qcompiler.errors import InputError, nearest


def run_once(
    folder: Path, given: Sequence[str], out: Path | None = None, threads: int | None = None
) -> dict[str, Any]:
    """Run an artifact once.

    Args:
        folder: of the artifact.
        given: inputs as NAME=FILE.npy. When none is given, those of the first batch that was kept
            for verification.
        out: a folder for the outputs as NAME.npy; made where it is missing.
        threads: that compute; the runtime's choice when not given.

    Returns:
        `target`; `emulator`, the command that ran it in place of this machine, or ""; `source` of
        the inputs; and for each output `name`, `dtype`, `shape`, `min`, `mean`, `max` (over finite
        numbers), `not_finite` and `file`.

    Raises:
        InputError: an input is missing, unknown, or not what the model takes.
    """
    artifact = Artifact.open(folder)
    inputs, source = _inputs(artifact, given)
    run = artifact.runner(threads)
    outputs = run(*inputs)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    names = [str(port["name"]) for port in artifact.manifest["outputs"]]
    return {
        "target": artifact.manifest["target"],
        "emulator": " ".join(getattr(run, "emulator", ())),
        "source": source,
        "outputs": [
            _described(name, value, out) for name, value in zip(names, outputs, strict=True)
        ],
    }


def _inputs(artifact: Artifact, given: Sequence[str]) -> tuple[list[Tensor], str]:
    ports = {str(port["name"]): port for port in artifact.manifest["inputs"]}
    if not given:
        for kind in ("held-out", "calibration"):
            batches = artifact.batches(kind)
            if batches:
                return [*batches[0]], f"the first {kind} batch kept with the artifact"
        raise InputError(f"{artifact.folder} keeps no data; give --input {next(iter(ports))}=FILE")
    files: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            raise InputError(f"--input {text}: give NAME=FILE.npy; known names: {', '.join(ports)}")
        if name not in ports:
            raise InputError(f"--input {text}: no input '{name}'; {nearest(name, [*ports])}")
        if name in files:
            raise InputError(f"--input {text}: '{name}' is given twice")
        files[name] = Path(path)
    lacking = [name for name in ports if name not in files]
    if lacking:
        raise InputError(f"no --input for {', '.join(lacking)}")
    tensors = [_read(files[name], port) for name, port in ports.items()]
    return tensors, "files"


def _read(path: Path, port: Mapping[str, Any]) -> Tensor:
    """An array for an input, of its dtype and shape."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no .npy file"
        raise InputError(f"{path}: {reason}") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: holds several arrays; save one with numpy.save")
    name, dtype, shape = port["name"], port["dtype"], port["shape"]
    if array.dtype.name != dtype:
        raise InputError(f"{path}: it holds {array.dtype.name}, and input '{name}' is {dtype}")
    fits = len(shape) == array.ndim and all(
        size == wanted if isinstance(wanted, int) else size > 0
        for size, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits:
        wanted = " × ".join(map(str, shape)) or "a scalar"
        raise InputError(f"{path}: its shape is {array.shape}, and input '{name}' is {wanted}")
    return torch.from_numpy(np.ascontiguousarray(array))


def _described(name: str, value: Tensor, out: Path | None) -> dict[str, Any]:
    file = ""
    if out is not None:
        path = out / f"{name.replace('/', '_')}.npy"
        np.save(path, value.numpy())
        file = str(path)
    numbers = value.double().flatten()
    finite = numbers[numbers.isfinite()]
    whole = len(finite) > 0
    return {
        "name": name,
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": [*value.shape],
        "min": finite.min().item() if whole else None,
        "mean": finite.mean().item() if whole else None,
        "max": finite.max().item() if whole else None,
        "not_finite": len(numbers) - len(finite),
        "file": file,
    }
