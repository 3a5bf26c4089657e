"""What `qcompiler run` and `qcompiler eval` do with language models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from qcompiler.terminal import add_row, print_json, stdout, steps, table


def write(
    folder: Path,
    prompt: str,
    max_new_tokens: int,
    sampling: dict[str, Any],
    threads: int | None,
    as_json: bool,
) -> None:
    """Print the text that follows a prompt as it comes; the times go to stderr."""
    from dataclasses import asdict

    from qcompiler.artifact import Artifact
    from qcompiler.generation import Generated, Sampling

    chosen = Sampling(**sampling)
    artifact = Artifact.open(folder)
    with steps(as_json) as progress:
        progress("load the model")
        generator = artifact.generator(threads)
    if not as_json:
        sys.stdout.write(prompt)
        sys.stdout.flush()
    for item in generator.stream(prompt, max_new_tokens, chosen):
        if not isinstance(item, Generated):
            if not as_json:
                sys.stdout.write(item)
                sys.stdout.flush()
            continue
        rates = {"prefill_rate": item.prefill_rate, "decode_rate": item.decode_rate}
        if as_json:
            print_json(asdict(item) | rates)
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        sys.stderr.write(
            f"prefill {item.prompt_tokens} tokens, {item.prefill_rate:.1f} tokens/s; "
            f"decode {len(item.tokens)} tokens, {item.decode_rate:.1f} tokens/s; "
            f"ended by {item.stopped}\n"
        )


def evaluate(
    folder: Path,
    perplexity: Path | None,
    lambada: Path | None,
    tokens: int | None,
    texts: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Print what was asked for of an artifact and of its float model."""
    from qcompiler import language

    found: dict[str, Any] = {}
    with steps(as_json) as progress:
        if perplexity is not None:
            found["perplexity"] = language.perplexity(folder, perplexity, tokens, threads, progress)
        if lambada is not None:
            found["last_word"] = language.last_words(folder, lambada, texts, threads, progress)
    if as_json:
        print_json(found)
        return
    console = stdout()
    for part in _shown(found):
        if isinstance(part, str):
            console.print(part, markup=False, soft_wrap=True)
        else:
            console.print(part)


def _shown(found: dict[str, Any]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for kind, column in (("perplexity", "perplexity"), ("last_word", "accuracy")):
        result = found.get(kind)
        if result is None:
            continue
        rows = table("model", column, "95 % interval", numbers=" nn")
        for name in ("artifact", "float"):
            row = result[name]
            if row is None:
                continue
            spread = "" if row["low"] is None else f"{row['low']:.4g} to {row['high']:.4g}"
            add_row(rows, name, f"{row[column]:.4g}", spread)
        parts.append(rows)
        if kind == "last_word":
            parts.append(f"last word of {result['texts']} texts, all of its tokens most likely\n")
            continue
        note = (
            f"{result['tokens']} tokens scored in {result['windows']} non-overlapping windows of "
            f"{result['window']}; the first of each is not scored"
        )
        if result["kl"] is not None:
            note += (
                f"\nratio {result['ratio']:.4f}, KL(float ‖ artifact) {result['kl']:.4f} nats a "
                f"token, same most likely token {100 * result['top1']:.1f} %"
            )
        parts.append(note + "\n")
    return parts
