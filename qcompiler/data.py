"""Calibration and held-out batches of one compilation, as flat tuples, checked as they are read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from torch import Tensor

from qcompiler.calibration import check_finite, split_held_out
from qcompiler.errors import InputError
from qcompiler.program import Batch, Program
from qcompiler.recipe import Recipe
from qcompiler.spec import Batches, Inputs, ModelSpec


class Data:
    """Calibration and held-out batches as flat tuples, checked as they are read."""

    def __init__(self, program: Program, spec: ModelSpec, recipe: Recipe) -> None:
        self.program = program
        self.spec = spec
        self.limit = recipe.batches
        self.mask = spec.padding_mask
        if self.mask and self.mask not in program.inputs:
            raise InputError(
                f"padding_mask '{self.mask}' is no input of the model: {', '.join(program.inputs)}"
            )
        source, held = spec.calibration, spec.held_out
        self.note = spec.calibration_note
        self.real = source is not None  # not the example inputs alone
        if source is None:
            if recipe.needs_data:
                raise InputError(
                    f"recipe '{recipe.name}' needs calibration data and {spec.name} brings none: "
                    "give --calibration (a file, a folder or module:function), or use w8, w4a16 or "
                    "w8a8-dynamic --set smooth=false --set rounding=rtn"
                )
            example = spec.example_inputs
            source = held = lambda: [example]
            self.note = "the example inputs alone; give --calibration with real data"
        elif held is None:
            source, held = split_held_out(source)
            if next(iter(held()), None) is None:
                held = source
                self.note = "a single batch, nothing held out; give more batches"
        self._calibration, self._held_out = source, held

    def calibration(self) -> Iterator[Batch]:
        """The calibration batches, at most the recipe's number."""
        return itertools.islice(self._read(self._calibration, "calibration"), self.limit)

    def excerpts(self, count: int) -> list[Batch]:
        """Small parts of the first calibration batches: `ModelSpec.excerpt`."""
        found = self._read(self._calibration, "calibration", excerpt=True)
        return list(itertools.islice(found, count))

    def held_out(self) -> Iterator[Batch]:
        """The held-out batches, or small parts of them."""
        return self._read(self._held_out, "held-out data", excerpt=True)

    def _read(self, factory: Batches | None, name: str, excerpt: bool = False) -> Iterator[Batch]:
        assert factory is not None
        count = 0
        for index, inputs in enumerate(factory()):
            batch = flatten(self.program, inputs, f"{name} batch {index}")
            self.program.check_batch(batch, f"{name} batch {index}")
            check_finite(
                dict(zip(self.program.inputs, batch, strict=True)), f"{name} batch {index}"
            )
            count += 1
            if excerpt and self.spec.excerpt is not None:
                named = dict(zip(self.program.inputs, batch, strict=True))
                part = self.spec.excerpt(named, index)
                batch = flatten(self.program, part, f"{name} batch {index}")
            yield batch
        if count == 0:
            raise InputError(f"{name}: there is no data; give at least one batch")


def flatten(program: Program, inputs: Inputs | Tensor, where: str) -> Batch:
    """One batch, by name or position, in the order of the program's inputs."""
    if isinstance(inputs, Tensor):
        return (inputs,)
    if isinstance(inputs, Mapping):
        missing = [n for n in program.inputs if n not in inputs]
        unknown = [n for n in inputs if n not in program.inputs]
        if missing or unknown:
            raise InputError(
                f"{where}: inputs {sorted(inputs)} given, the model takes {list(program.inputs)}"
            )
        return tuple(inputs[n] for n in program.inputs)
    return tuple(inputs)
