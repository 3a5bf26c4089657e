"""Time a compiled language model beside its float model: a prompt read, and tokens written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from qcompiler.bench import take_turns
from qcompiler.errors import InputError
from qcompiler.generation import Runtime

PROMPT, PAST = 512, 128  # tokens of the prompt that is read; tokens before those that are written
STEPS = 16  # tokens that are written at a time


def sizes_of(shape: str | None, room: int) -> tuple[int, int]:
    """Tokens of the prompt, and tokens before those that are written.

    Args:
        shape: as "512x128"; `PROMPT` and `PAST`, or what there is room for, where not given.
        room: tokens that the model can hold.

    Raises:
        InputError: no two sizes, or more tokens than there is room for.
    """
    if room <= STEPS:
        raise InputError(
            f"the model holds {room} tokens, and {STEPS} are written after a past of 1 at least: "
            "it is too small to be timed; compile it with a larger capacity"
        )
    if shape is None:
        return min(PROMPT, room), min(PAST, room - STEPS)
    parts = shape.lower().replace("×", "x").split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(
            f"--shape {shape}: for language models give the tokens of a prompt and those before "
            f"the written ones, such as {PROMPT}x{PAST}"
        )
    prompt, past = map(int, parts)
    if max(prompt, past + STEPS) > room:
        raise InputError(
            f"--shape {shape}: the model holds {room} tokens, and {STEPS} are written after the "
            "past; give less"
        )
    return prompt, past


def time_writers(
    writers: Mapping[str, Runtime], prompt: int, past: int, seconds: float
) -> list[dict[str, Any]]:
    """Tokens a second of each, taking turns.

    Args:
        writers: the first is the one that all are compared with.
        prompt: tokens that are read at once.
        past: tokens that stand before the `STEPS` that are written one by one.
        seconds: of measuring, both phases together.

    Returns:
        For each writer and phase ("prefill", "decode"): `name`, `phase`, tokens a second as `rate`,
        and `ms` of a token; `ratio`, `low`, `high`: median and quartiles of its time ÷ the first's
        of the same round; `rounds`.
    """
    rows: list[dict[str, Any]] = []
    phases = {"prefill": partial(_read, tokens=prompt), "decode": partial(_write, past=past)}
    for phase, run in phases.items():
        samplers = {name: partial(run, writer) for name, writer in writers.items()}
        for sampler in samplers.values():  # to warm up
            sampler()
        for timing in take_turns(samplers, seconds / 2):
            rows.append({"phase": phase, "rate": 1e3 / timing.ms, **asdict(timing)})
    return rows


def _read(writer: Runtime, tokens: int) -> float:
    """Seconds a token of a prompt."""
    ids = _some(tokens, writer.vocabulary)
    writer.reset(tokens)
    since = time.perf_counter()
    writer.feed(ids, last=True)
    return (time.perf_counter() - since) / tokens


def _write(writer: Runtime, past: int) -> float:
    """Seconds a token that is written."""
    ids = _some(past + STEPS, writer.vocabulary)
    writer.reset(past + STEPS)
    writer.feed(ids[:past], last=True)
    since = time.perf_counter()
    for token in ids[past:]:
        writer.feed(np.array([token]), last=True)
    return (time.perf_counter() - since) / STEPS


def _some(count: int, vocabulary: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Arbitrary tokens, the same each time: what they are changes nothing about the time."""
    return np.random.default_rng(0).integers(0, vocabulary, count)
