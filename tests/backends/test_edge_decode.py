"""Language models in C: prompts in chunks, the cache, greedy generation.

The model here is no neural one: what comes next is (Σ (j + 1) · token_j) mod V over all tokens so
far, so that a token that is lost, doubled or out of place changes everything after it.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcompiler import generation
from qcompiler.backends import edge_folder, edge_load
from qcompiler.backends.edge_model import Decoder, EdgeModel, Entry, Port, Step, Tensor
from qcompiler.backends.edge_target import machine
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.target import Target

tvm = pytest.importorskip("tvm", reason="the extra tvm is not installed")

CAPACITY, WORDS = 40, 13


def following(tokens: list[int]) -> int:
    """What the model says comes after these tokens."""
    return sum((j + 1) * token for j, token in enumerate(tokens)) % WORDS


def continued(tokens: list[int], count: int) -> list[int]:
    tokens = [*tokens]
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens[-count:]


def write(length: int) -> list[Any]:
    """The cache with `length` tokens put in at a position."""
    te, tir = tvm.te, tvm.tirx
    tokens, at = te.placeholder((1, length), "int64"), te.placeholder((1,), "int64")
    cache = te.placeholder((CAPACITY,), "int64")

    def put(i: Any) -> Any:
        inside = tir.all(i >= at[0], i < at[0] + length)
        place = te.max(te.min(i - at[0], length - 1), 0)
        return tir.if_then_else(inside, tokens[0, place], cache[i])

    return [tokens, at, cache, te.compute((CAPACITY,), put)]


def score(length: int, rows: int) -> list[Any]:
    """−|v − what comes next| for every word v, after each of the last `rows` tokens."""
    te, tir = tvm.te, tvm.tirx
    cache, at = te.placeholder((CAPACITY,), "int64"), te.placeholder((1,), "int64")
    j = te.reduce_axis((0, CAPACITY))

    def term(r: Any) -> Any:
        last = at[0] + r + (length - rows)
        held = te.max(te.min(cache[j], WORDS - 1), 0)
        return te.sum(tir.Select(j <= last, (j + 1) * held, tir.const(0, "int64")), axis=j)

    total = te.compute((rows,), term)
    return [
        cache, at,
        te.compute((1, rows, WORDS), lambda b, r, v: -tir.abs(
            (v.astype("int64") - tir.floormod(total[r], WORDS)).astype("float32"))),
    ]  # fmt: skip


def keep() -> list[Any]:
    cache = tvm.te.placeholder((CAPACITY,), "int64")
    return [cache, tvm.te.compute((CAPACITY,), lambda i: cache[i])]


def decoder(target: str, lengths: tuple[int, ...], last_only: bool) -> EdgeModel:
    functions = {"keep": keep()}
    entries = []
    for length in lengths:
        rows = 1 if last_only else length
        functions[f"write_{length}"] = write(length)
        functions[f"score_{length}"] = score(length, rows)
        tensors = (
            Tensor("input", 0, "int64", (1, length)),
            Tensor("input", 1, "int64", (1,)),
            Tensor("state", 0, "int64", (CAPACITY,)),
            Tensor("arena", 0, "int64", (CAPACITY,)),
            Tensor("output", 0, "float32", (1, rows, WORDS)),
        )
        steps = (
            Step(f"write_{length}", "write", (0, 1, 2, 3)),
            Step("keep", "keep", (3, 2)),
            Step(f"score_{length}", "score", (2, 1, 4)),
        )
        entries.append(Entry({"sequence": length}, CAPACITY * 8, tensors, steps))
    return EdgeModel(
        target=target,
        features=machine(Target.parse(target)).features,
        inputs=(Port("tokens", "int64", (1, "sequence")), Port("position", "int64", (1,))),
        outputs=(Port("logits", "float32", (1, 1 if last_only else "sequence", WORDS)),),
        entries=tuple(entries),
        padded=frozenset({"sequence"}),
        state=CAPACITY * 8,
        objects=(("kernels.o", build(functions, target)),),
        weights=b"",
        decoder=Decoder("tokens", "position", "logits", CAPACITY),
    )


def build(functions: dict[str, Any], target: str) -> bytes:
    import tempfile

    made = {
        name: tvm.te.create_prim_func(tensors).with_attr("global_symbol", name)
        for name, tensors in functions.items()
    }
    aim = tvm.target.Target(machine(Target.parse(target)).tvm)
    library = tvm.tirx.build(tvm.IRModule(made), target=aim)
    with tempfile.TemporaryDirectory() as folder:
        library.write_to_file(f"{folder}/kernels.o", "o")
        return (Path(folder) / "kernels.o").read_bytes()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def folder(lengths: tuple[int, ...], last_only: bool, target: str = "tvm:native") -> Path:
        path = tmp_path_factory.mktemp("decoder")
        edge_folder.write(decoder(target, lengths, last_only), path)
        return path

    return folder


def load(folder: Path, threads: int = 1) -> edge_load.Native:
    model = edge_load.load(folder, threads)
    assert isinstance(model, edge_load.Native)
    return model


FORMS = [((1, 4, 16), False), ((1, 4, 16), True), ((1,), True), ((8,), False), ((1, 40), False)]


@pytest.mark.parametrize(("lengths", "last_only"), FORMS)
def test_prompts_of_every_length(folders: Any, lengths: tuple[int, ...], last_only: bool) -> None:
    model = load(folders(lengths, last_only))
    tokens = np.random.default_rng(0).integers(0, WORDS, CAPACITY).tolist()
    most = CAPACITY if 1 in lengths else CAPACITY - 7
    for length in range(1, most + 1):
        model.reset()
        logits = model.read(torch.tensor(tokens[:length]))
        assert logits.shape == (WORDS,)
        assert int(logits.argmax()) == following(tokens[:length]), length
        assert model.position == length


@pytest.mark.parametrize("last_only", [False, True])
def test_reading_in_pieces(folders: Any, last_only: bool) -> None:
    """A conversation: what is read later follows what was read before, whatever the chunks."""
    model = load(folders((1, 4, 16), last_only), 2)
    generator = np.random.default_rng(1)
    for _ in range(40):
        model.reset()
        read: list[int] = []
        while len(read) < CAPACITY:
            count = int(generator.integers(1, min(20, CAPACITY - len(read)) + 1))
            piece = generator.integers(0, WORDS, count).tolist()
            read += piece
            assert int(model.read(torch.tensor(piece)).argmax()) == following(read)
        with pytest.raises(InputError, match=r"1 tokens after 40 .* capacity of 40"):
            model.read(torch.tensor([1]))


def test_refusals(folders: Any) -> None:
    model = load(folders((1, 4, 16), True))
    assert model.capacity == CAPACITY
    for tokens, message in [
        ([], "no tokens"),
        ([3, WORDS], "token 13 is not in the vocabulary of 13"),
        ([-1], "token -1 is not"),
        ([0] * (CAPACITY + 1), "more than the model's capacity of 40"),
    ]:
        with pytest.raises(InputError, match=message):
            model.read(torch.tensor(tokens, dtype=torch.int64))
        assert model.position == 0
    long = load(folders((8,), False))
    long.read(torch.zeros(33, dtype=torch.int64))  # less than 8 of the 40 are left
    with pytest.raises(InputError, match="no code was compiled that reads 1 tokens"):
        long.read(torch.tensor([1]))


def test_other_models_read_no_tokens(edge: Any) -> None:
    model = load(edge("tvm:native").folder)
    assert model.capacity == 0
    with pytest.raises(InputError, match="no language model"):
        model.read(torch.tensor([1]))


def test_as_the_runtime_of_a_generator(folders: Any, edge: Any) -> None:
    """What `qcompiler run --prompt` reads and writes with."""
    model = generation.runtime(folders((1, 4, 16), True), "tvm:native", 1)
    assert model.vocabulary == WORDS
    tokens = np.arange(9) % WORDS
    model.reset(CAPACITY)
    (row,) = model.feed(tokens, last=True)
    assert row.argmax() == following(tokens.tolist())
    assert model.length == 9
    model.reset(CAPACITY)
    rows = model.feed(tokens)
    assert rows.shape == (9, WORDS)
    expected = [following(tokens[: i + 1].tolist()) for i in range(9)]
    assert rows.argmax(1).tolist() == expected
    with pytest.raises(InputError, match="41 tokens asked for, and the model was compiled for 40"):
        model.reset(CAPACITY + 1)
    with pytest.raises(InputError, match="no language model"):
        generation.runtime(edge("tvm:native").folder, "tvm:native")
    if shutil.which("riscv64-linux-gnu-gcc") and shutil.which("qemu-riscv64"):
        with pytest.raises(UnsupportedError, match=r"code for another machine.*--generate"):
            generation.runtime(edge("tvm:riscv64").folder, "tvm:riscv64")


@pytest.mark.parametrize("target", ["tvm:native", "tvm:aarch64"])
def test_the_runner_generates(folders: Any, target: str, tmp_path: Path) -> None:
    aim = machine(Target.parse(target))
    if not aim.here and not (shutil.which(aim.qemu[0]) and shutil.which(aim.compiler)):
        pytest.skip(f"{aim.qemu[0]} or {aim.compiler} is not installed")
    runner = [*(() if aim.here else aim.qemu), str(folders((1, 4, 16), True, target) / "model")]
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    np.save(tmp_path / "ids.npy", np.array([prompt]))

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [*runner, "--generate", str(tmp_path / "ids.npy"), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("--max-new-tokens", 10)
    assert done.returncode == 0, done.stderr
    assert [*map(int, done.stdout.split())] == continued(prompt, 10)
    assert "read 8 tokens" in done.stderr
    assert "wrote 9 more" in done.stderr
    assert "1 thread" in done.stderr
    # to the end of the cache, and one more that needs no room
    everything = run("--max-new-tokens", 1000)
    assert [*map(int, everything.stdout.split())] == continued(prompt, CAPACITY - 8 + 1)
    assert "capacity of 40 tokens is full" in everything.stderr
    stop = continued(prompt, 10)[3]
    stopped = [*map(int, run("--max-new-tokens", 10, "--stop", stop).stdout.split())]
    assert stopped == continued(prompt, 10)[: continued(prompt, 10).index(stop) + 1]
    np.save(tmp_path / "ids.npy", np.array([[1.0]]))
    assert "it holds float64, and tokens are int64" in run().stderr
    np.save(tmp_path / "ids.npy", np.array([[1], [2]]))
    bad = run()
    assert bad.returncode == 2
    assert "several prompts" in bad.stderr


@pytest.mark.parametrize("last_only", [False, True])
def test_generation_under_sanitizers(tmp_path: Path, last_only: bool) -> None:
    options = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    edge_folder.write(decoder("tvm:native", (1, 4, 16), last_only), tmp_path, options)
    for length in (1, 3, 17, 38, 40, 41):
        prompt = [(7 * i) % WORDS for i in range(length)]
        np.save(tmp_path / "ids.npy", np.array(prompt))
        command = [str(tmp_path / "model"), "--generate", str(tmp_path / "ids.npy")]
        done = subprocess.run(
            [*command, "--threads", "2"], capture_output=True, text=True, check=False
        )
        assert "Sanitizer" not in done.stderr, done.stderr
        if length > CAPACITY:
            assert done.returncode == 2
            assert "more than the model's capacity" in done.stderr
        else:
            count = min(32, CAPACITY - length + 1)
            assert [*map(int, done.stdout.split())] == continued(prompt, count)
