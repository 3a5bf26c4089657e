"""How well a compiled language model predicts text, measured on the artifact as it runs.

Perplexity is taken over non-overlapping windows: each begins without a past, its first token is not
scored, and the mean negative log-likelihood is over all scored tokens of all windows,

    ppl = exp(−1/T Σ ln p(x_t | x_<t in its window)).

Its 95 % interval takes the windows as independent samples (tokens of one window are not), with
Student's t for their number. Beside it stand the float model on the same windows, the divergence
KL(float ‖ artifact) of the next-token distributions and how often both prefer the same token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.artifact import REFERENCE, Artifact
from qcompiler.errors import InputError
from qcompiler.generation import Runtime, Tokenizer, float_target, runtime, settings_of

WINDOW = 1024
CHUNK = 256  # tokens read at once: the logits of a whole window would take 200 MB
Array = NDArray[np.float32]


@dataclass
class Windows:
    """Sums over the windows of one model.

    Attributes:
        losses: negative log-likelihood of each window, summed over its scored tokens.
        counts: scored tokens of each window.
    """

    losses: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Perplexity and its 95 % interval; no interval for a single window."""
        losses, counts = np.array(self.losses), np.array(self.counts)
        mean = float(losses.sum() / counts.sum())
        low = high = None
        if len(losses) > 1:
            # The ratio estimator's deviation: windows need not be of one length.
            spread = (losses - mean * counts) / counts.mean()
            error = float(spread.std(ddof=1)) / math.sqrt(len(losses)) * student(len(losses) - 1)
            low, high = math.exp(mean - error), math.exp(mean + error)
        return {"perplexity": math.exp(mean), "low": low, "high": high}


def student(degrees: int) -> float:
    """Student's t, two-sided 95 %.

    Exact for up to four degrees, else the expansion in 1/degrees (Abramowitz and Stegun, 26.7.5),
    right to 0.5 %.
    """
    z, n = 1.959964, degrees
    if n < 5:
        return (12.7062, 4.3027, 3.1824, 2.7764)[n - 1]
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def perplexity(
    folder: str | Path,
    path: str | Path,
    tokens: int | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Perplexity of an artifact and of its float model on a text file.

    Args:
        folder: an artifact of a language model.
        path: UTF-8 text, read as one sequence of tokens.
        tokens: how many of its tokens to take; all when not given.
        threads: of one operator.
        progress: called with what is being done.

    Returns:
        `{"artifact": {perplexity, low, high}, "float": the same or None, "ratio", "kl", "top1",
        "tokens", "windows", "window"}`; kl in nats per token, top1 as a share.

    Raises:
        InputError: the file is missing, not UTF-8 or has fewer than two tokens.
    """
    say = progress or (lambda step: None)
    artifact = Artifact.open(folder)
    settings = settings_of(artifact.folder, artifact.manifest)
    tokenizer = Tokenizer(artifact.folder)
    ids = _read(tokenizer, Path(path), tokens)
    window = min(WINDOW, int(settings["context"]))
    models = _models(artifact, threads)
    sums = {name: Windows() for name in models}
    divergence, agreed, scored = 0.0, 0, 0
    parts = list(_windows(ids, window, tokenizer.prefix))
    for index, part in enumerate(parts):
        say(f"window {index + 1} of {len(parts)}")
        for model in models.values():
            model.reset(len(part))
        losses = dict.fromkeys(models, 0.0)
        for start in range(0, len(part), CHUNK):
            block = part[start : start + CHUNK]
            targets = part[start + 1 : start + 1 + CHUNK]
            logs = {n: log_softmax(m.feed(block)[: len(targets)]) for n, m in models.items()}
            for name, values in logs.items():
                losses[name] -= float(values[np.arange(len(targets)), targets].sum())
            if "float" in logs:
                expected, got = logs["float"], logs["artifact"]
                divergence += float((np.exp(expected) * (expected - got)).sum())
                agreed += int((expected.argmax(-1) == got.argmax(-1)).sum())
            scored += len(targets)
        for name, loss in losses.items():
            sums[name].losses.append(loss)
            sums[name].counts.append(len(part) - 1)
    results = {name: s.summary() for name, s in sums.items()}
    known = "float" in results
    return {
        "artifact": results["artifact"],
        "float": results.get("float"),
        "ratio": results["artifact"]["perplexity"] / results["float"]["perplexity"]
        if known
        else None,
        "kl": divergence / scored if known else None,
        "top1": agreed / scored if known else None,
        "tokens": scored,
        "windows": len(parts),
        "window": window,
    }


def log_softmax(logits: Array) -> NDArray[np.float64]:
    """Natural logarithms of the probabilities, (rows, vocabulary)."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    logs: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs


@dataclass(frozen=True)
class LastWords:
    """How often the last word was predicted.

    Attributes:
        accuracy: share of texts whose last word's tokens are all the most likely ones.
        low, high: its 95 % interval (Wilson's).
    """

    accuracy: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, count: int) -> LastWords:
        """From a number of hits."""
        z, p = 1.96, hits / count
        centre = (p + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count**2))
        return cls(p, centre - half, centre + half)


def last_words(
    folder: str | Path,
    path: str | Path,
    texts: int | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Accuracy of the last word, as LAMBADA asks for, of an artifact and of its float model.

    Args:
        folder: an artifact of a language model.
        path: JSON lines, each with a field "text".
        texts: how many to take; all when not given.
        threads: of one operator.
        progress: called with what is being done.

    Returns:
        `{"artifact": {accuracy, low, high}, "float": the same or None, "texts": int}`.

    Raises:
        InputError: the file is missing or malformed.
    """
    say = progress or (lambda step: None)
    artifact = Artifact.open(folder)
    context = int(settings_of(artifact.folder, artifact.manifest)["context"])
    tokenizer = Tokenizer(artifact.folder)
    lines = _lines(Path(path), texts)
    models = _models(artifact, threads)
    hits = dict.fromkeys(models, 0)
    for index, text in enumerate(lines):
        if index % 50 == 0:
            say(f"text {index + 1} of {len(lines)}")
        before, _, word = text.rstrip().rpartition(" ")
        given = tokenizer.encode(before)
        asked = tokenizer.encode(" " + word, special=False)
        tokens = np.array([*given, *asked], np.int64)[-context:]
        for name, model in models.items():
            model.reset(len(tokens))
            logits = model.feed(tokens[:-1])[-len(asked) :]
            hits[name] += bool((logits.argmax(-1) == asked).all())
    results = {name: asdict(LastWords.of(n, len(lines))) for name, n in hits.items()}
    return {
        "artifact": results["artifact"],
        "float": results.get("float"),
        "texts": len(lines),
    }


def _models(artifact: Artifact, threads: int | None) -> dict[str, Runtime]:
    """The artifact and, where it was kept, its float model."""
    target = str(artifact.manifest["target"])
    models = {"artifact": runtime(artifact.folder, target, threads)}
    reference = artifact.folder / REFERENCE
    if reference.is_dir():
        models["float"] = runtime(reference, float_target(target), threads)
    return models


def _windows(ids: list[int], window: int, prefix: tuple[int, ...]) -> Iterator[NDArray[np.int64]]:
    """The tokens in pieces, each begun by what the model expects before a text."""
    step = window - len(prefix)
    for start in range(0, len(ids), step):
        part = [*prefix, *ids[start : start + step]]
        if len(part) > 1 + len(prefix):  # a single token has nothing to predict it from
            yield np.array(part, np.int64)


def _read(tokenizer: Tokenizer, path: Path, count: int | None) -> list[int]:
    ids = tokenizer.encode(_text(path), special=False)
    if count is not None:
        ids = ids[:count]
    if len(ids) < 2:
        raise InputError(f"{path}: {len(ids)} tokens; a text of two tokens or more is needed")
    return ids


def _text(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason})") from error


def _lines(path: Path, count: int | None) -> list[str]:
    found = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row: Mapping[str, Any] = json.loads(line)
            text = str(row["text"]).strip()
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'{path}:{number}: not a JSON object with "text"') from error
        if " " not in text:
            raise InputError(f"{path}:{number}: a text of two words or more is needed")
        found.append(text)
        if len(found) == count:
            break
    if not found:
        raise InputError(f"{path}: there are no texts")
    return found
