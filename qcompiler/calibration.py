"""Calibration data from files, folders and functions, read batch by batch.

A source is read anew each time its factory is called and gives the same batches; nothing is kept
between readings, though a file of tensors is held as a whole while it is read. The first batch is
read at once, so that a wrong file is reported before any work is done.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.source import explain, load_function, names_function
from qcompiler.spec import Batches, Inputs, ModelSpec

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
TEXTS = (".txt", ".jsonl")
TENSORS = (".npz", ".safetensors", ".pt")
KINDS = (
    f"{', '.join(TEXTS + TENSORS)}, a folder of images or of .npz/.safetensors, or file.py:function"
)


def load_calibration(text: str, spec: ModelSpec, batch_size: int | None = None) -> Batches:
    """The batches that a `--calibration` argument means.

    Args:
        text: one of
            a `.txt` file, one text a line, or `.jsonl`, one `{"text": …}` a line, batched
            by length;
            `.npz`, `.safetensors` or `.pt` with one tensor for each input, samples first (a `.pt`
            may also hold a list of batches);
            a folder of images, or of `.npz`/`.safetensors` files that are one batch each, in
            natural order;
            `file.py:function` or `module:function`, giving batches or a factory of batches.
        spec: the model; texts and images go through its `encode`.
        batch_size: samples in a batch, where the source does not say and the model leaves the batch
            dynamic; 8 where not given, 2 of language models, whose activations are large. The last
            batch may be smaller; with a static batch dimension an incomplete one is left out.

    Returns:
        A factory of batches, each with the names and dtypes of `spec.example_inputs`. Shapes are
        not checked.

    Raises:
        InputError: nothing there, nothing in it, wrong names or dtypes; at once for the first
            batch, for later ones when they are read.
    """
    if batch_size is None:
        batch_size = 8 if spec.generation is None else 2
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: must be at least 1")
    source = _source(text, spec, _samples(spec, batch_size))

    def read() -> Iterator[Inputs]:
        for index, batch in enumerate(source()):
            yield _conform(batch, spec, f"{text}, batch {index}")

    if next(iter(read()), None) is None:
        raise InputError(
            f"{text}: holds no complete batch; give at least {_samples(spec, 1)} sample(s)"
        )
    return read


def check_finite(batch: Inputs, where: str) -> None:
    """Raise an `InputError` if an input of `batch` has a NaN or an infinity.

    Args:
        batch: tensors by name or by position; integers and booleans pass.
        where: names the batch in the message, such as "calibration batch 3".
    """
    for name, value in batch.items() if isinstance(batch, Mapping) else enumerate(batch):
        if value.is_floating_point() and not bool(value.isfinite().all()):
            count = int((~value.isfinite()).sum())
            raise InputError(
                f"{where}: input '{name}' has {count} NaN or infinite values of {value.numel()}; "
                "repair or remove this sample"
            )


def split_held_out(batches: Batches) -> tuple[Batches, Batches]:
    """Every fourth batch is held out, of two or three the last; a single one is for calibration.

    Returns:
        The factories of the calibration batches and of the held-out batches; both read lazily.
    """

    def calibration() -> Iterator[Inputs]:
        return (batch for batch, held in _marked(batches) if not held)

    def held_out() -> Iterator[Inputs]:
        return (batch for batch, held in _marked(batches) if held)

    return calibration, held_out


def _marked(batches: Batches) -> Iterator[tuple[Inputs, bool]]:
    """Each batch and whether it is held out; one batch of look-ahead finds the last."""
    waiting: Inputs | None = None
    index = -1
    for index, batch in enumerate(batches()):
        if waiting is not None:
            yield waiting, (index - 1) % 4 == 3
        waiting = batch
    if waiting is not None:
        yield waiting, index % 4 == 3 or index in (1, 2)


def _samples(spec: ModelSpec, batch_size: int) -> int:
    """The batch size: the wish where the first dimension is dynamic, else that of the example."""
    for name, value in _named(spec.example_inputs, spec).items():
        if value.ndim and 0 not in spec.dynamic_shapes.get(name, {}):
            return value.shape[0]
    return batch_size


def _static(spec: ModelSpec) -> bool:
    return any(
        value.ndim and 0 not in spec.dynamic_shapes.get(name, {})
        for name, value in _named(spec.example_inputs, spec).items()
    )


def _source(text: str, spec: ModelSpec, size: int) -> Batches:
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path, spec, size)
    if path.is_file():
        match path.suffix.lower():
            case ".txt" | ".jsonl":
                return _encoded(_texts(path), spec, size, str(path))
            case ".npz" | ".safetensors" | ".pt":
                return _tensors(path, spec, size)
            case suffix:
                raise InputError(
                    f"{path}: calibration data cannot be read from '{suffix}'; give {KINDS}"
                )
    if names_function(text):
        return _function(text)
    raise InputError(f"{text}: no such file or folder; calibration data is {KINDS}")


def _texts(path: Path) -> list[str]:
    try:
        # Not splitlines: it also splits at separators that may stand inside a JSON string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    texts: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix.lower() == ".txt":
            texts.append(line.strip())
            continue
        try:
            texts.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'{path}:{number}: not an object with a "text": {line[:60]}'
            ) from error
        if not isinstance(texts[-1], str):
            raise InputError(f'{path}:{number}: "text" is not a string')
    if not texts:
        raise InputError(f"{path}: holds no text; give one a line")
    # Texts of similar length share a batch, so that little of it is padding.
    return sorted(texts, key=len)


def _encoded(items: list[str], spec: ModelSpec, size: int, where: str) -> Batches:
    encode = spec.encode
    if encode is None:
        raise InputError(
            f"{where}: the model '{spec.name}' brings no `encode` for texts or images; "
            "set ModelSpec.encode, or give encoded tensors (.npz, .safetensors)"
        )

    def read() -> Iterator[Inputs]:
        for start in range(0, len(items), size):
            group = items[start : start + size]
            if len(group) < size and _static(spec):
                return
            try:
                yield encode(group)
            except InputError:
                raise
            except Exception as error:
                raise InputError(
                    f"{where}: encoding '{group[0][:60]}' … raised {explain(error)}"
                ) from error

    return read


def _folder(path: Path, spec: ModelSpec, size: int) -> Batches:
    files = sorted((p for p in path.iterdir() if p.is_file()), key=_natural)
    images = [str(p) for p in files if p.suffix.lower() in IMAGES]
    tensors = [p for p in files if p.suffix.lower() in (".npz", ".safetensors")]
    if images and tensors:
        raise InputError(f"{path}: holds images and tensor files; keep one kind in the folder")
    if images:
        # An encoder of texts would take the file names for texts.
        if not any(v.is_floating_point() for v in _named(spec.example_inputs, spec).values()):
            raise InputError(f"{path}: images, but '{spec.name}' takes integers only; give texts")
        return _encoded(images, spec, size, str(path))
    if not tensors:
        raise InputError(
            f"{path}: no image ({', '.join(IMAGES)}) and no .npz or .safetensors in this folder; "
            "subfolders are not searched"
        )
    return lambda: (_conform(_read(file), spec, str(file)) for file in tensors)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key: digits by value, so that image10 comes after image9."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def _tensors(path: Path, spec: ModelSpec, size: int) -> Batches:
    def read() -> Iterator[Inputs]:
        content = _read(path)
        if isinstance(content, list):
            yield from content
            return
        inputs = _conform(content, spec, str(path))
        named = _named(inputs, spec)
        counts = {name: value.shape[0] if value.ndim else 0 for name, value in named.items()}
        if len(set(counts.values())) > 1:
            raise InputError(f"{path}: the inputs have different numbers of samples: {counts}")
        for start, stop in itertools.pairwise(_cuts(min(counts.values()), size, _static(spec))):
            part = {name: value[start:stop] for name, value in named.items()}
            yield part if isinstance(inputs, Mapping) else tuple(part.values())

    return read


def _cuts(samples: int, size: int, complete: bool) -> list[int]:
    cuts = list(range(0, samples + 1, size))
    return cuts if complete or cuts[-1] == samples else [*cuts, samples]


def _read(path: Path) -> Any:
    """A dict of tensors, or a list of batches from a `.pt`."""
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as stored:
                return {name: torch.from_numpy(stored[name]) for name in stored.files}
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}: {first}); it must hold plain tensors"
        ) from error
    if isinstance(content, tuple):
        content = list(content)
    if not isinstance(content, dict | list):
        raise InputError(
            f"{path}: holds a {type(content).__name__}; save a dict of input name → tensor, or a "
            "list of batches"
        )
    return content


def _function(text: str) -> Batches:
    function = load_function(text)
    given = function()
    if callable(given):
        return _guarded(given, text)
    if not isinstance(given, Iterable) or isinstance(given, Mapping | str | Tensor):
        raise InputError(
            f"{text}: the function returned a {type(given).__name__}; "
            "return a list of batches, a generator of them, or a function that gives one"
        )
    # A generator is spent after one reading: then the function is called again for each.
    return _guarded(function if isinstance(given, Iterator) else lambda: given, text)


def _guarded(factory: Callable[[], Iterable[Inputs]], text: str) -> Batches:
    def read() -> Iterator[Inputs]:
        try:
            yield from factory()
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{text}: giving batches raised {explain(error)}") from error

    return read


def _named(inputs: Inputs, spec: ModelSpec) -> dict[str, Tensor]:
    """Inputs by name; positional ones by the parameters of `forward`."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    names = list(inspect.signature(spec.module.forward).parameters)
    names.extend(f"input_{index}" for index in range(len(names), len(inputs)))
    return dict(zip(names, inputs, strict=False))


def _conform(batch: Any, spec: ModelSpec, where: str) -> Inputs:
    """`batch` in the form and order of the example inputs, its names and dtypes checked."""
    expected = _named(spec.example_inputs, spec)
    if isinstance(batch, Tensor):
        batch = (batch,)
    if isinstance(batch, Mapping):
        found = dict(batch)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        if len(batch) != len(expected):
            raise InputError(
                f"{where}: {len(batch)} tensors given, the model takes {len(expected)}: "
                f"{', '.join(expected)}"
            )
        found = dict(zip(expected, batch, strict=True))
    else:
        raise InputError(
            f"{where}: a {type(batch).__name__}; a batch is a dict of input name → tensor, or a "
            "tuple of tensors"
        )
    if set(found) != set(expected):
        raise InputError(
            f"{where}: has the inputs {', '.join(sorted(map(str, found))) or 'none'}, "
            f"the model takes {', '.join(expected)}; rename, add or remove accordingly"
        )
    for name, like in expected.items():
        value = found[name]
        if not isinstance(value, Tensor):
            raise InputError(f"{where}: '{name}' is a {type(value).__name__}, not a tensor")
        if value.dtype != like.dtype:
            raise InputError(
                f"{where}: '{name}' is {value.dtype}, the model takes {like.dtype}; save it as "
                f"{like.dtype}"
            )
    ordered = {name: found[name] for name in expected}
    return ordered if isinstance(spec.example_inputs, Mapping) else tuple(ordered.values())
