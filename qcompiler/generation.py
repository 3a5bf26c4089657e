"""Text from a compiled language model: tokens, sampling, streaming, and the time it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qcompiler.errors import InputError, UnsupportedError

TOKENIZER = "tokenizer.json"
REPLACEMENT = "\ufffd"  # what a tokenizer writes for bytes that are no character yet


class Runtime(Protocol):
    """What a backend gives: one text in its cache, read token by token."""

    vocabulary: int
    length: int

    def reset(self, capacity: int) -> None:
        """Forget the text; `capacity` tokens at most will follow."""

    def feed(self, tokens: NDArray[np.int64], last: bool = False) -> NDArray[np.float32]:
        """Read (new,) tokens; logits (new, vocabulary), or of the last alone."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only so many of the most likely tokens; 0: all.
        top_p: only the most likely tokens that together have this probability; 1: all.
        seed: of the random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature {self.temperature}: give 0 (greedy) or more")
        if self.top_k < 0:
            raise InputError(f"top-k {self.top_k}: give 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p {self.top_p}: give a probability above 0, at most 1")

    def choose(self, logits: NDArray[np.float32], generator: np.random.Generator) -> int:
        """A token from logits of shape (vocabulary,)."""
        if not self.temperature:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scaled, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        weights = np.exp(scaled[order] - scaled[order[0]])
        weights /= weights.sum()
        if self.top_p < 1:
            # The smallest set that reaches the probability, so the one that crosses it belongs.
            kept = int(np.searchsorted(np.cumsum(weights), self.top_p)) + 1
            order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
        return int(order[generator.choice(len(order), p=weights)])


@dataclass(frozen=True)
class Generated:
    """What was written.

    Attributes:
        text: without the prompt.
        tokens: its tokens, the stop token not among them.
        prompt_tokens: tokens of the prompt.
        prefill_seconds: until the prompt was read.
        decode_seconds: for the rest.
        steps: runs of the model after the prompt.
        stopped: "stop token", "length" or "context".
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    steps: int
    stopped: str

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """Written tokens per second after the first; 0 where only one was written."""
        return self.steps / self.decode_seconds if self.steps else 0.0


class Tokenizer:
    """The tokenizer of an artifact."""

    def __init__(self, folder: Path) -> None:
        path = folder / TOKENIZER
        if not path.is_file():
            raise InputError(
                f"{path} is missing, so text cannot be read: compile the model with its tokenizer"
            )
        try:
            import tokenizers
        except ImportError as error:
            raise InputError(
                "reading text needs the package 'tokenizers'; pip install 'qcompiler[hf]'"
            ) from error
        try:
            self._core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise InputError(f"{path} is corrupt ({error}); compile the model again") from error
        self._core.no_truncation()
        self._core.no_padding()
        self.prefix: tuple[int, ...] = tuple(self._core.encode("").ids)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text.

        Args:
            text: any text; special tokens that it spells out are read as such.
            special: add the tokens that the model expects around a text.
        """
        return list(self._core.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, special tokens left out."""
        return str(self._core.decode(list(tokens), skip_special_tokens=True))


class Stream:
    """Text that grows by tokens; a character is given when its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = self._shown = 0  # what is decoded anew, and what of it was given

    def add(self, token: int) -> str:
        """The text that this token completes; often empty in the middle of a character."""
        self._tokens.append(token)
        return self._fresh(final=False)

    def finish(self) -> str:
        """What is left."""
        return self._fresh(final=True)

    def _fresh(self, final: bool) -> str:
        # Decoded from a token back, because a tokenizer may drop the space before the first.
        before = self._tokenizer.decode(self._tokens[self._start : self._shown])
        whole = self._tokenizer.decode(self._tokens[self._start :])
        if len(whole) <= len(before) or (whole.endswith(REPLACEMENT) and not final):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return whole[len(before) :]


class Generator:
    """A compiled language model, loaded on first use, that writes any number of texts.

    Args:
        folder: of the artifact of a language model that was compiled with its cache.
        manifest: the artifact's.
        threads: of one operator; the runtime's choice when not given.

    Raises:
        InputError: it is no such model, or has no tokenizer.
    """

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], threads: int | None = None
    ) -> None:
        self.settings = settings_of(folder, manifest)
        self.tokenizer = Tokenizer(folder)
        target = str(manifest["target"])
        self._load = partial(runtime, folder, target, threads)
        self._cold = _device(target) == "cuda"

    @cached_property
    def runtime(self) -> Runtime:
        """The model itself, loaded when a prompt was found good."""
        return self._load()

    def stream(
        self, prompt: str, max_new_tokens: int = 64, sampling: Sampling | None = None
    ) -> Iterator[str | Generated]:
        """Pieces of text as they come; the last item is the `Generated` as a whole.

        Args:
            prompt: at least one token.
            max_new_tokens: tokens to write at most; the context may end earlier.
            sampling: greedy when not given.

        Raises:
            InputError: the prompt is empty or leaves no room in the context.
        """
        sampling = sampling or Sampling()
        context = int(self.settings["context"])
        tokens = self.tokenizer.encode(prompt)
        if not tokens:
            raise InputError("the prompt is empty: give at least one word")
        if max_new_tokens < 1:
            raise InputError(f"max-new-tokens {max_new_tokens}: give 1 or more")
        if len(tokens) >= context:
            raise InputError(
                f"the prompt has {len(tokens)} tokens and the model's context holds {context}: "
                "shorten the prompt, so that there is room for an answer"
            )
        room = min(max_new_tokens, context - len(tokens))
        generator = np.random.default_rng(sampling.seed)
        self.runtime.reset(len(tokens) + room)  # loads the model before the clock starts
        self._warm(tokens, room)
        start = time.perf_counter()
        logits = self.runtime.feed(np.array(tokens, np.int64), last=True)
        begun = time.perf_counter()
        written: list[int] = []
        text, pieces = Stream(self.tokenizer), []
        stopped = "length" if room == max_new_tokens else "context"
        steps = 0
        while True:
            token = sampling.choose(logits[-1], generator)
            if token in self.settings["stop"]:
                stopped = "stop token"
                break
            written.append(token)
            piece = text.add(token)
            pieces.append(piece)
            if piece:
                yield piece
            if len(written) == room:
                break
            logits = self.runtime.feed(np.array([token], np.int64), last=True)
            steps += 1
        ended = time.perf_counter()
        pieces.append(text.finish())
        if pieces[-1]:
            yield pieces[-1]
        yield Generated(
            "".join(pieces), tuple(written), len(tokens), begun - start, ended - begun, steps,
            stopped,
        )  # fmt: skip

    def _warm(self, tokens: Sequence[int], room: int) -> None:
        """What a GPU does once, also before the clock: libraries start, graphs are captured."""
        if self._cold:
            self._cold = False
            for piece in (tokens, *[tokens[:1]] * min(2, room)):
                self.runtime.feed(np.array(piece, np.int64), last=True)
            self.runtime.reset(len(tokens) + room)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generated:
        """Write a text; see `stream`.

        Args:
            prompt: at least one token.
            max_new_tokens: tokens to write at most.
            sampling: greedy when not given.
            on_text: called with each piece of text as it comes.
        """
        for item in self.stream(prompt, max_new_tokens, sampling):
            if isinstance(item, Generated):
                return item
            if on_text is not None:
                on_text(item)
        raise AssertionError("a stream ends with what was generated")


def runtime(folder: Path, target: str, threads: int | None = None) -> Runtime:
    """The target's decoder of the model in `folder`: an artifact's own, or its float model."""
    from importlib import import_module

    backends = {
        "ort": "ort_decode", "ort:cuda": "ort_cuda_decode", "tvm": "edge_decode",
        "torch:cuda": "torch_half",
    }  # fmt: skip
    runtime = target.partition(":")[0]
    name = backends.get(f"{runtime}:{_device(target)}") or backends.get(runtime)
    if name is None:
        raise UnsupportedError(f"target '{target}' writes no text; compile for ort:cpu")
    made: Any = import_module(f"qcompiler.backends.{name}").Decoder(folder, threads)
    decoder: Runtime = made
    return decoder


def _device(target: str) -> str:
    """A target's second part: `cuda` of `ort:cuda:sm_90+tvm`."""
    return target.partition("+")[0].split(":")[1]


def float_target(target: str) -> str:
    """What runs the float model beside an artifact for a target."""
    if target.startswith("tvm:cuda"):
        import torch

        return "torch:cuda" if torch.cuda.is_available() else "ort:cpu"
    return target if target.startswith("ort:") else "ort:cpu"


def settings_of(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's part on generation; an `InputError` where the model writes no text."""
    found = manifest.get("generation")
    if not found:
        raise InputError(f"{folder} is no language model with a cache, so it cannot write text")
    return dict(found)
