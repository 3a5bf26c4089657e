"""The command-line runner on good and bad input, watched by sanitizers; the .npy reader fuzzed."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.backends import edge_folder
from qcompiler.backends.edge_target import host_family

NATIVE = "tvm:native"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def watched(
    edge: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """The small model's runner with AddressSanitizer and UndefinedBehaviorSanitizer."""
    made = edge(NATIVE)
    folder = tmp_path_factory.mktemp("watched")
    options = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    edge_folder.write(made.model, folder, options)
    return made, folder


@pytest.fixture
def run(watched: tuple[Any, Path], tmp_path: Path) -> Run:
    def call(*words: object) -> subprocess.CompletedProcess[str]:
        command = [str(watched[1] / "model"), *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "Sanitizer" not in done.stderr, done.stderr
        return done

    return call


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("more", [[], ["--copy-weights"]])
def test_a_run(
    watched: tuple[Any, Path], run: Run, tmp_path: Path, threads: int, more: list[str]
) -> None:
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    for words in (["x.npy"], ["--input", "x=x.npy"]):
        words += ["--out", ".", "--threads", str(threads), "--benchmark", "3", "--profile", *more]
        done = run(*words)
        assert done.returncode == 0, done.stderr
        assert "y float32 (5, 16) -> ./y.npy" in done.stdout
        assert "runs int64 (1,) -> ./runs.npy" in done.stdout
        assert f"3 runs, {threads} thread" in done.stdout
        assert 'linear "one"' in done.stdout
        y = np.load(tmp_path / "y.npy")
        np.testing.assert_allclose(y, watched[0].expected(x), rtol=1e-5, atol=1e-5)
        assert np.load(tmp_path / "runs.npy").tolist() == [1]


def test_benchmark_on_zeros(run: Run) -> None:
    done = run("--benchmark", 5)
    assert done.returncode == 0
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        f"inputs float32 ({rows}, 8)" for rows in (1, 4, 64)
    ]


def test_help(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in ("--input", "--out", "--threads", "--weights", "--benchmark", "--generate",
                 "--max-new-tokens", "--info", "Exit codes"):  # fmt: skip
        assert word in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "input 'x' is not given"),
        (["--inptu", "x"], "unknown option '--inptu'"),
        (["--input"], "--input takes a value"),
        (["--input", "x.npy"], "--input takes NAME=FILE.npy"),
        (["--input", "z=x.npy"], "the model has no input 'z'"),
        (["--input", "x=x.npy", "--input", "x=x.npy"], "input 'x' is given twice"),
        (["x.npy", "x.npy"], "one file too many: the model has 1 input"),
        (["x.npy", "--threads", "two"], "--threads takes a number from 0 to 1024, not 'two'"),
        (["x.npy", "--threads", "-1"], "not '-1'"),
        (["x.npy", "--threads", "99999999999999999999"], "takes a number"),
        (["x.npy", "--benchmark", "0"], "from 1 to 1000000"),
        (["x.npy", "--weights", "nothere"], "nothere cannot be read: No such file"),
        (["x.npy", "--weights", "."], ". is no file"),
        (["x.npy", "--weights", "x.npy"], "truncated or another model's"),
        (["x.npy", "--out", "nothere"], "nothere/y.npy: No such file"),
        (["nothere.npy"], "nothere.npy: No such file"),
        (["."], ".: it is no file"),
        (["--generate", "x.npy"], "--generate is for language models"),
        (["rows.npy"], "rows=65 fit none that were compiled: rows=1, rows=4, rows=64"),
        (["wide.npy"], "has the shape (1, 9), and the model takes (rows, 8)"),
        (["double.npy"], "input 'x' is float64, and the model takes float32"),
        (["scalar.npy"], "has the shape ()"),
        (["fortran.npy"], "it is in Fortran order"),
        (["big.npy"], "its numbers are big-endian"),
        (["struct.npy"], "its dtype is no plain number format"),
        (["text.npy"], "its dtype is none of"),
        (["archive.npz"], "it is no .npy file"),
        (["short.npy"], "it is truncated"),
        (["long.npy"], "it goes on after its numbers"),
        (["empty.npy"], "it is no .npy file"),
    ],
)
def test_refusals(run: Run, tmp_path: Path, words: list[str], message: str) -> None:
    good = np.zeros((4, 8), np.float32)
    arrays = {
        "x": good,
        "rows": np.zeros((65, 8), np.float32),
        "wide": np.zeros((1, 9), np.float32),
        "double": np.zeros((4, 8)),
        "scalar": np.float32(1),
        "fortran": np.asfortranarray(good),
        "big": good.astype(">f4"),
        "struct": np.zeros(3, [("a", "<f4"), ("b", "<i4")]),
        "text": np.array(["a", "b"]),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.savez(tmp_path / "archive.npz", good)
    content = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(content[:-1])
    (tmp_path / "long.npy").write_bytes(content + b"\0")
    (tmp_path / "empty.npy").write_bytes(b"")
    assert message in refused(run(*words))


HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 8), }",
    '{"shape": (4, 8), "descr": "<f4", "fortran_order": False}',
]
BAD_HEADERS = [
    "",
    "{}",
    "{",
    "{'descr': '<f4', 'fortran_order': False}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 8), 'shape': (4, 8)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 8), 'more': 1}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 8)} x",
    "{'descr': '<f4', 'fortran_order': None, 'shape': (4, 8)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': [4, 8]}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (32)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4, -8)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4 8)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 8)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296, 4294967296)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 1, 1, 1, 1, 1, 4, 8)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 8)}",
    "{'descr': '<f4\\'', 'fortran_order': False, 'shape': (4, 8)}",
    "{'descr': '<f4",
]


def npy(header: str, numbers: bytes, version: int = 1) -> bytes:
    text = header.encode("latin1") + b"\n"
    width = 2 if version == 1 else 4
    start = b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(width, "little")
    return start + text + numbers


def test_headers(run: Run, tmp_path: Path) -> None:
    for version in (1, 2, 3):
        for header in HEADERS:
            (tmp_path / "x.npy").write_bytes(npy(header, bytes(128), version))
            assert run("x.npy").returncode == 0
    for header in BAD_HEADERS:
        (tmp_path / "x.npy").write_bytes(npy(header, bytes(128)))
        refused(run("x.npy"))
    (tmp_path / "x.npy").write_bytes(npy(HEADERS[0], bytes(128), 9))
    assert "unknown version" in refused(run("x.npy"))


FUZZER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "edge_npy.h"

/* Parses the files that come on stdin, each behind its length, and touches all their numbers. */
int main(void) {
  unsigned length, good = 0, bad = 0;
  while (fread(&length, 4, 1, stdin) == 1) {
    unsigned char *file = malloc(length ? length : 1), sum = 0;
    const char *problem;
    model_tensor array;
    if (fread(file, 1, length, stdin) != length) return 3;
    if (npy_parse(file, length, &array, &problem)) {
      if (!problem) return 4;
      bad++;
    } else {
      size_t size = npy_size(array.dtype);
      for (int i = 0; i < array.rank; i++) size *= (size_t)array.shape[i];
      for (size_t i = 0; i < size; i++) sum ^= ((unsigned char *)array.data)[i];
      good += 1 + 0 * sum;
    }
    free(file);
  }
  printf("%u %u\n", good, bad);
  return 0;
}
"""


def mutated(generator: random.Random, seeds: list[bytes]) -> bytes:
    """A file with a few bytes changed, inserted, removed or repeated; mostly in its header."""
    data = bytearray(generator.choice(seeds))
    words = [b"(", b")", b",", b"'", b"{", b"}", b"9" * 19, b"0", b"<f8", b"|O", b"\\", b"\0",
             b"True", b"shape", b"\xff\xff\xff\xff", b"1" * 40, b" " * 300]  # fmt: skip
    for _ in range(generator.randint(1, 6)):
        at = generator.randrange(min(len(data), 140) + 1)
        match generator.randrange(5):
            case 0 if data:
                data[at % len(data)] = generator.randrange(256)
            case 1:
                data[at:at] = generator.choice(words)
            case 2:
                del data[at : at + generator.randint(1, 9)]
            case 3:
                data[at : at + generator.randint(1, 6)] = generator.choice(words)
            case _:
                del data[generator.randrange(len(data) + 1) :]
    return bytes(data)


def test_fuzzed_files(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Mutations of good files: parsed or refused, never read beyond their end."""
    count = int(request.config.getoption("--fuzz"))
    source = edge_folder.SOURCES
    shutil.copy(source / edge_folder.API, tmp_path / edge_folder.HEADER)
    (tmp_path / "fuzz.c").write_text(FUZZER)
    command = [
        "cc", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-I.",
        f"-I{source}", "fuzz.c", str(source / "edge_npy.c"), "-o", "fuzz",
    ]  # fmt: skip
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    subprocess.run(command, cwd=tmp_path, check=True)
    seeds = [npy(h, bytes(128), v) for h in (*HEADERS, *BAD_HEADERS) for v in (1, 2, 3)]
    seeds += [npy("{'descr': '|b1', 'fortran_order': False, 'shape': (), }", b"\1")]
    generator = random.Random(0)
    files = [mutated(generator, seeds) for _ in range(count)]
    files += [seeds[0][:end] for end in range(len(seeds[0]))]
    stream = b"".join(len(file).to_bytes(4, "little") + file for file in (*seeds, *files))
    done = subprocess.run([tmp_path / "fuzz"], input=stream, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    good, bad = map(int, done.stdout.split())
    assert good + bad == len(seeds) + len(files)
    assert good > len(HEADERS)


GARBAGE = r"""
#include <stdio.h>
#include <stdlib.h>
#include "model.h"

/* Runs the model on tensors whose dtype, rank and shape are anything. */
static unsigned next(void) {
  static unsigned state = 1;
  return state = state * 1664525u + 1013904223u, state >> 8;
}

int main(void) {
  static float numbers[65 * 8];
  static const long long sizes[] = {0, 1, 3, 8, 64, 65, -1, 1ll << 31, 1ll << 62, -(1ll << 62)};
  model *m = model_create("weights.bin", 2);
  int good = 0, bad = 0;
  for (int i = 0; m && i < 20000; i++) {
    model_tensor input = {MODEL_FLOAT32, 2, {1, 8}, numbers}, outputs[2];
    if (next() % 2) input.shape[0] = sizes[next() % 10];
    if (next() % 4 == 0) input.shape[1] = sizes[next() % 10];
    if (next() % 4 == 0) input.rank = (int)(next() % 12) - 2;
    if (next() % 9 == 0) input.rank = (int)next();
    if (next() % 4 == 0) input.dtype = (model_dtype)((int)(next() % 16) - 2);
    if (next() % 9 == 0) input.data = (char *)numbers + 4;
    if (next() % 9 == 0) input.data = NULL;
    if (model_run(m, &input, outputs))
      bad += *model_error(m) != 0;
    else
      good += outputs[0].shape[0] == input.shape[0];
  }
  printf("%d %d\n", good, bad);
  model_destroy(m);
  return 0;
}
"""


def test_garbage_in_c(watched: tuple[Any, Path], tmp_path: Path) -> None:
    folder = watched[1]
    (tmp_path / "garbage.c").write_text(GARBAGE)
    command = [
        "cc", "-g", "-fsanitize=address,undefined", f"-I{folder}", str(tmp_path / "garbage.c"),
        str(folder / "libmodel.a"), "-lm", "-lpthread", "-o", str(tmp_path / "garbage"),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    done = subprocess.run(
        [tmp_path / "garbage"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    good, bad = map(int, done.stdout.split())
    assert good + bad == 20000
    assert min(good, bad) > 3000


BARRIER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "edge_program.h"

typedef struct { void *handle; int32_t tasks; } group;
typedef int (*task)(int, group *, void *);
extern int (*__TVMBackendParallelLaunch)(task, void *, int);
extern int (*__TVMBackendParallelBarrier)(int, group *);

/* Each task writes its number, and after a barrier sums those of all. */
static int numbers[64], sums[64];
static int body(int i, group *all, void *data) {
  numbers[i] = i + 1 + 0 * (data != NULL);
  if (__TVMBackendParallelBarrier(i, all)) return -1;
  sums[i] = 0;
  for (int k = 0; k < all->tasks; k++) sums[i] += numbers[k];
  return __TVMBackendParallelBarrier(i, all);
}

int main(int count, char **words) {
  int threads = count > 1 ? atoi(words[1]) : 1;
  struct pool *pool = pool_create(threads);
  pool_enter(pool);
  for (int round = 0; round < 500; round++) {
    memset(numbers, 0, sizeof numbers);
    if (__TVMBackendParallelLaunch(body, NULL, 0)) return 1;
    for (int i = 0; i < threads; i++)
      if (sums[i] != threads * (threads + 1) / 2) return 2;
  }
  if (!__TVMBackendParallelLaunch(body, NULL, threads + 1)) return 3;
  puts(pool_error());
  pool_leave();
  pool_destroy(pool);
  return 0;
}
"""


def test_barriers(tmp_path: Path) -> None:
    """Tasks that wait for each other; more of them than threads are refused, not deadlocked."""
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    source = edge_folder.SOURCES
    shutil.copy(source / edge_folder.API, tmp_path / edge_folder.HEADER)
    (tmp_path / "barrier.c").write_text(BARRIER)
    files = ["barrier.c", str(source / "edge_pool.c"), str(source / "edge_cpu.c")]
    command = ["cc", "-g", "-O1", "-I.", f"-I{source}", *files, "-lpthread", "-o", "barrier"]
    subprocess.run(command, cwd=tmp_path, check=True)
    for threads in ("1", "2", "5"):
        command = [str(tmp_path / "barrier"), threads]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert done.stdout == "a barrier among more tasks than threads\n"


def test_no_races(edge: Callable[[str], Any], tmp_path: Path) -> None:
    """The thread pool under ThreadSanitizer: many short loops, more threads than CPUs too."""
    options = ("-g", "-fsanitize=thread")
    try:
        edge_folder.write(edge(NATIVE).model, tmp_path, options)
    except edge_folder.UnsupportedError as error:
        pytest.skip(f"no ThreadSanitizer here: {error}")
    for threads in (2, 5):
        command = [tmp_path / "model", "--benchmark", "300", "--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "unexpected memory mapping" in done.stderr:
            pytest.skip("ThreadSanitizer does not run under this kernel's address layout")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "ThreadSanitizer" not in done.stderr, done.stderr[:3000]


def test_memory_under_valgrind(edge: Callable[[str], Any], tmp_path: Path) -> None:
    """All memory is given back, and runs after the first take none."""
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    if host_family() != "x86-64":
        pytest.skip("the code is for x86-64")
    # valgrind knows no AVX512
    edge_folder.write(edge("tvm:x86-64-v3").model, tmp_path, ("-g",))
    allocations = []
    for count in ("2", "30"):
        command = ["valgrind", "--leak-check=full", "--error-exitcode=9", tmp_path / "model"]
        words = ["--benchmark", count, "--threads", "2"]
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "no leaks are possible" in done.stderr
        (line,) = (line for line in done.stderr.splitlines() if "total heap usage" in line)
        allocations.append(line.split("usage:")[1].split("allocs")[0])
    assert allocations[0] == allocations[1]
