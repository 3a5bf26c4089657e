"""Text from a compiled language model: what transformers writes, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcompiler import benching, generation, language_bench
from qcompiler.artifact import Artifact
from qcompiler.errors import InputError
from qcompiler.generation import Generated, Generator, Sampling, Stream, Tokenizer
from qcompiler.language import last_words, perplexity, student

CONTEXT = 48  # of the fixture's model


def reference(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of transformers, the whole text read anew for each."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_the_float_model_writes_what_transformers_writes(
    language_artifact: Artifact, language_folder: Path
) -> None:
    from qcompiler.backends.ort_decode import Decoder

    prompt = [5, 9, 40, 77, 12]
    expected = reference(language_folder, prompt, 20)
    decoder = Decoder(language_artifact.folder / "reference", 1)
    for _ in range(2):  # the second text finds no trace of the first
        decoder.reset(25)
        logits = decoder.feed(np.array(prompt), last=True)
        got = []
        for _ in range(20):
            got.append(int(logits[-1].argmax()))
            logits = decoder.feed(np.array(got[-1:]), last=True)
        assert got == expected


def test_reading_in_pieces_gives_the_same_logits(language_artifact: Artifact) -> None:
    generator = language_artifact.generator(1)
    tokens = np.arange(3, 33)
    generator.runtime.reset(30)
    whole = generator.runtime.feed(tokens)
    generator.runtime.reset(30)
    pieces = [generator.runtime.feed(part) for part in np.split(tokens, [1, 12, 13])]
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=1e-3, atol=1e-3)


def test_only_the_last_logits_are_computed_for_a_prompt(language_artifact: Artifact) -> None:
    runtime = language_artifact.generator(1).runtime
    tokens = np.arange(3, 33)
    runtime.reset(30)
    whole = runtime.feed(tokens)
    runtime.reset(30)
    np.testing.assert_allclose(runtime.feed(tokens, last=True), whole[-1:], rtol=1e-5, atol=1e-5)
    from qcompiler.backends import ort, ort_cache

    session = ort.session(language_artifact.folder / ort.MODEL, 1)
    assert [i.name for i in session.get_overridable_initializers()] == [ort_cache.FIRST]
    assert ort_cache.FIRST not in [i.name for i in session.get_inputs()]


def test_projections_are_one_product(language_artifact: Artifact) -> None:
    """Query, key and value of each of the two layers; the audit still knows all their names."""
    audit = language_artifact.manifest["audit"]
    assert not audit["broken"]
    assert audit["kernels"]["GroupQueryAttention"] == 2
    assert audit["kernels"]["MatMulNBits"] == 2 * (1 + 1 + 3) + 1
    assert len({layer["name"] for layer in audit["layers"]}) == 2 * 7 + 1


def test_streamed_text_is_the_text(language_artifact: Artifact) -> None:
    pieces: list[str] = []
    result = language_artifact.generate(
        "the cat", 30, temperature=1.0, seed=3, threads=1, on_text=pieces.append
    )
    assert "".join(pieces) == result.text
    tokenizer = Tokenizer(language_artifact.folder)
    assert result.text == tokenizer.decode(result.tokens)
    assert result.prompt_tokens == len(tokenizer.encode("the cat"))
    again = language_artifact.generate("the cat", 30, temperature=1.0, seed=3, threads=1)
    assert again.tokens == result.tokens
    other = language_artifact.generate("the cat", 30, temperature=1.0, seed=4, threads=1)
    assert other.tokens != result.tokens


def test_a_character_is_given_when_it_is_whole(language_artifact: Artifact) -> None:
    tokenizer = Tokenizer(language_artifact.folder)
    stream = Stream(tokenizer)
    tokens = tokenizer.encode("aé b")
    assert len(tokens) == 5
    assert [stream.add(t) for t in tokens] == ["a", "", "é", " ", "b"]
    broken = Stream(tokenizer)
    assert [broken.add(t) for t in tokens[:2]] == ["a", ""]
    assert broken.finish() == "\ufffd"


def test_the_context_ends_a_text(language_artifact: Artifact) -> None:
    generator = language_artifact.generator(1)
    items = list(generator.stream("a" * (CONTEXT - 3), 50))
    result = items[-1]
    assert isinstance(result, Generated)
    assert (result.stopped, len(result.tokens)) in {("context", 3), ("stop token", 0)}
    for prompt, message in (("", "the prompt is empty"), ("a" * CONTEXT, r"context holds 48")):
        with pytest.raises(InputError, match=message):
            list(generator.stream(prompt))


def test_sampling_keeps_to_its_set() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.25, 0.15], np.float32))
    draws = {
        sampling: np.bincount(
            [sampling.choose(logits, generator) for _ in range(4000)], minlength=4
        )
        / 4000
        for sampling, generator in (
            (s, np.random.default_rng(0))
            for s in (
                Sampling(),
                Sampling(1.0),
                Sampling(1.0, top_k=2),
                Sampling(1.0, top_p=0.7),
                Sampling(0.5),
            )
        )
    }
    expected = {
        Sampling(): [0, 1, 0, 0],
        Sampling(1.0): [0.1, 0.5, 0.25, 0.15],
        Sampling(1.0, top_k=2): [0, 2 / 3, 1 / 3, 0],
        Sampling(1.0, top_p=0.7): [0, 2 / 3, 1 / 3, 0],
        Sampling(0.5): np.array([0.01, 0.25, 0.0625, 0.0225]) / 0.345,
    }
    for sampling, shares in expected.items():
        np.testing.assert_allclose(draws[sampling], shares, atol=0.03)
    for bad in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": math.nan}):
        with pytest.raises(InputError):
            Sampling(**bad)


def test_perplexity_is_that_of_torch(
    language_artifact: Artifact, language_folder: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    text = "a cat sat on a mat. é and then it ran away from the dog that came along, twice." * 2
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    result = perplexity(language_artifact.folder, tmp_path / "text.txt", threads=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(language_folder).eval()
    ids = Tokenizer(language_artifact.folder).encode(text)
    loss, count = 0.0, 0
    for start in range(0, len(ids), CONTEXT):
        part = torch.tensor([ids[start : start + CONTEXT]])
        with torch.no_grad():
            logs = model(part).logits[0, :-1].double().log_softmax(-1)
        loss -= float(logs.gather(1, part[0, 1:, None]).sum())
        count += part.shape[1] - 1
    assert result["tokens"] == count
    assert result["window"] == CONTEXT
    assert result["windows"] == -(-len(ids) // CONTEXT)
    assert result["float"]["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert result["artifact"]["perplexity"] == pytest.approx(math.exp(loss / count), rel=0.1)
    assert result["artifact"]["low"] < result["artifact"]["perplexity"]
    assert 0 < result["kl"] < 0.1
    assert result["top1"] > 0.7


def test_last_words(language_artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "words.jsonl"
    path.write_text('{"text": "a cat sat"}\n\n{"text": "the dog ran"}\n')
    result = last_words(language_artifact.folder, path, threads=1)
    assert result["texts"] == 2
    assert (
        0 <= result["float"]["low"] <= result["float"]["accuracy"] <= result["float"]["high"] <= 1
    )


def test_student_is_that_of_scipy() -> None:
    stats: Any = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 5, 10, 40, 300):
        assert student(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=5e-3)


def test_bad_input_is_one_line(language_artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "rows.jsonl").write_text('{"words": 1}\n')
    folder = language_artifact.folder
    for path, message in (
        ("none.txt", "no such file"),
        ("empty.txt", "0 tokens"),
        ("latin.txt", "not UTF-8"),
    ):
        with pytest.raises(InputError, match=message):
            perplexity(folder, tmp_path / path)
    with pytest.raises(InputError, match=r"rows.jsonl:1: not a JSON object"):
        last_words(folder, tmp_path / "rows.jsonl")


def test_an_artifact_without_tokenizer_or_cache(
    language_artifact: Artifact, tmp_path: Path
) -> None:
    lacking = Artifact(tmp_path, language_artifact.manifest)
    with pytest.raises(InputError, match=r"tokenizer.json is missing"):
        lacking.generate("a")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer.json is corrupt"):
        lacking.generate("a")
    other = Artifact(tmp_path, {**language_artifact.manifest, "generation": None})
    with pytest.raises(InputError, match="no language model with a cache"):
        other.generate("a")


def test_the_command_line_writes_and_measures(
    language_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qcompiler.cli import app

    folder = str(language_artifact.folder)
    app(["run", folder, "--prompt", "a cat", "--max-new-tokens", "8"], standalone_mode=False)
    written = capsys.readouterr()
    assert written.out.startswith("a cat")
    assert "prefill 5 tokens" in written.err
    (tmp_path / "text.txt").write_text("a cat sat on a mat " * 8)
    words = tmp_path / "words.jsonl"
    words.write_text('{"text": "a cat sat"}\n')
    options = ["--perplexity", str(tmp_path / "text.txt"), "--lambada", str(words), "--json"]
    app(["eval", folder, *options], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"]["windows"] == 4
    assert found["last_word"]["texts"] == 1
    app(["eval", folder, *options[:-1]], standalone_mode=False)
    assert "non-overlapping windows of 48" in capsys.readouterr().out


def test_bench_times_a_language_model_as_it_writes(
    language_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    from qcompiler.cli import app

    given = [
        "bench",
        str(language_artifact.folder),
        "--seconds",
        "0",
        "--against",
        "float,ort",  # the 4-bit tool
    ]
    app([*given, "--shape", "24x8", "--json"], standalone_mode=False)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["name"], r["phase"]) for r in rows] == [
        (name, phase)
        for phase in ("prefill", "decode")
        for name in ("float", "qcompiler", "ort-int4")
    ]
    assert all(r["ratio"] == 1 for r in rows if r["name"] == "float")
    app([*given, "--shape", "24x8"], standalone_mode=False)
    assert "a prompt of 24, 16 after 8, 1 thread" in capsys.readouterr().out


class Counting:
    """A writer that notes what it is fed."""

    vocabulary = 7
    length = 0

    def __init__(self) -> None:
        self.fed: list[int] = []

    def reset(self, capacity: int) -> None:
        self.room = capacity
        self.length = 0

    def feed(self, tokens: np.ndarray[Any, Any], last: bool = False) -> np.ndarray[Any, Any]:
        self.length += len(tokens)
        assert self.length <= self.room
        assert tokens.max() < self.vocabulary
        assert last
        self.fed.append(len(tokens))
        return np.zeros((1, self.vocabulary), np.float32)


def test_a_gpu_is_warm_before_the_clock(
    language_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first runs are not what `qcompiler run` calls its speed; what is written stays."""
    real, fed = generation.runtime, list[Any]()

    def counting(folder: Path, target: str, threads: int | None) -> Any:
        made = real(folder, "ort:cpu", threads)
        feed = made.feed
        monkeypatch.setattr(
            made, "feed", lambda x, last=False: (fed.append(len(x)), feed(x, last))[1]
        )
        return made

    monkeypatch.setattr(generation, "runtime", counting)
    made = {}
    for target in ("ort:cpu", "ort:cuda:sm_90+tvm", "tvm:cuda:sm_90"):
        generator = Generator(language_artifact.folder, {**language_artifact.manifest,
                                                         "target": target})  # fmt: skip
        for count in (1, 5):
            fed.clear()
            made[target, count] = generator.generate("a cat", count)
            steps = [5, *[1] * made[target, count].steps]
            cold = "cuda" in target and count == 1
            assert fed == ([5, 1, *steps] if cold else steps)
    for count in (1, 5):
        assert len({(made[key].text, made[key].tokens) for key in made if key[1] == count}) == 1


def test_what_is_timed_of_a_writer() -> None:
    writer = Counting()
    rows = language_bench.time_writers({"float": writer}, prompt=40, past=9, seconds=0.0)
    assert [row["rounds"] for row in rows] == [5, 5]
    assert (
        writer.fed == [40] * 6 + [9, *[1] * language_bench.STEPS] * 6
    )  # the first of six: warm-up


@pytest.mark.parametrize("shape", ["64", "0x4", "axb", "600x16", "16x490"])
def test_sizes_that_no_model_can_be_timed_at(shape: str) -> None:
    with pytest.raises(InputError, match="--shape"):
        language_bench.sizes_of(shape, 500)
    assert language_bench.sizes_of(None, 500) == (500, 128)
    assert language_bench.sizes_of(None, 100) == (100, 84)


def test_a_model_that_is_too_small_to_be_timed() -> None:
    assert language_bench.sizes_of(None, language_bench.STEPS + 1) == (17, 1)
    with pytest.raises(InputError, match="holds 16 tokens"):
        language_bench.sizes_of(None, language_bench.STEPS)


def test_writing_needs_neither_torch_nor_onnx(language_artifact: Artifact) -> None:
    """They take more memory than a small model."""
    code = f"""
import sys
from pathlib import Path
from qcompiler.cli_language import write
write(Path({str(language_artifact.folder)!r}), "a b", 3, {{}}, 1, True)
print("loaded:", *sorted({{"torch", "onnx", "onnxscript", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]


def test_a_peer_that_runs_out_of_memory_says_so() -> None:
    """Such an error has no text of its own."""
    assert benching._failed(MemoryError()) == "failed: MemoryError"
    assert benching._failed(ValueError("one\ntwo")) == "failed: one"
