"""What the benchmarks share: fresh processes, interleaved timing, tables.

Everything heavy happens in processes of its own: a compilation's peak memory is then its own, and
no runtime's thread pool outlives its turn.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import peers
from numpy.typing import NDArray
from peers import Candidate, Feeds

STARTED = time.perf_counter()
SPAWN = multiprocessing.get_context("spawn")
TURN = 0.1  # seconds that one process runs before the other has its turn
PAUSE = 0.1  # seconds before a turn: idle threads of ONNX Runtime spin for 50 ms before they sleep


@dataclass(frozen=True)
class Row:
    """A candidate's time beside the reference's.

    Attributes:
        name: of the candidate.
        ms: median time of one call, in milliseconds.
        ratio: median over the rounds of its time divided by the reference's in the same round.
        low, high: quartiles of that ratio.
        cores: CPU time over wall time while it ran: how many threads were at work.
    """

    name: str
    ms: float
    ratio: float
    low: float
    high: float
    cores: float


@contextlib.contextmanager
def ahead(realtime: bool) -> Iterator[None]:
    """With `realtime`, every thread of this process goes before all others of the machine.

    Linux, and the right to do so, are needed: root, or the capability SYS_NICE.
    """
    if not realtime:
        yield
        return
    threads = [int(path.name) for path in Path("/proc/self/task").iterdir()]
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        for thread in threads:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


class Metered:
    """Calls of one candidate with their CPU and wall time, after two warm-up calls."""

    def __init__(
        self, run: Callable[[Feeds], object], feeds: Feeds, realtime: bool = False
    ) -> None:
        self.run, self.feeds, self.realtime = run, feeds, realtime
        self.calls, self.cpu, self.wall = 0, 0.0, 0.0

    def __call__(self) -> None:
        with ahead(self.realtime):
            cpu, wall = time.process_time(), time.perf_counter()
            self.run(self.feeds)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.calls += 1
        if self.calls > 2:
            self.cpu, self.wall = self.cpu + cpu, self.wall + wall


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(function, *args).result()


def compare(
    candidates: Sequence[Candidate],
    feeds: Feeds,
    threads: int,
    seconds: float,
    realtime: bool = False,
) -> list[Row]:
    """Time the candidates beside the first one.

    On one thread all run interleaved in one process. With more, each is timed against the first,
    each of the two in its own process, turn by turn: thread pools of several runtimes in one
    process disturb each other. The reference's own row is then that of the middle pair.

    Args:
        candidates: the first is the reference of all ratios.
        feeds: inputs by name.
        threads: of one operator.
        seconds: of measuring for each candidate.
        realtime: let each turn go before everything else on the machine.
    """
    if threads == 1:
        rows: list[Row] = apart(_together, list(candidates), feeds, seconds, realtime)
        return rows
    first, rest = candidates[0], candidates[1:]
    pairs = [_alternating(first, other, feeds, threads, 2 * seconds, realtime) for other in rest]
    if not pairs:
        return _alternating(first, first, feeds, threads, 2 * seconds, realtime)[:1]
    reference = sorted((pair[0] for pair in pairs), key=lambda row: row.ms)[len(pairs) // 2]
    return [reference, *(pair[1] for pair in pairs)]


def _together(
    candidates: list[Candidate], feeds: Feeds, seconds: float, realtime: bool
) -> list[Row]:
    from qcompiler.bench import interleave

    runs = {c.name: Metered(peers.load(c, 1), feeds, realtime) for c in candidates}
    timings = interleave(runs, seconds * len(runs))
    return [
        Row(t.name, t.ms, t.ratio, t.low, t.high, runs[t.name].cpu / runs[t.name].wall)
        for t in timings
    ]


def _alternating(
    reference: Candidate,
    other: Candidate,
    feeds: Feeds,
    threads: int,
    seconds: float,
    realtime: bool,
) -> list[Row]:
    """Two candidates in two processes, one of which runs at a time."""
    samples: list[list[float]] = [[], []]
    spent: list[list[float]] = [[], []]
    lines: list[Connection] = []
    workers = []
    for candidate in (reference, other):
        line, end = SPAWN.Pipe()
        given = (end, candidate, feeds, threads, realtime)
        worker = SPAWN.Process(target=_work, args=given, daemon=True)
        worker.start()
        end.close()  # so that a worker that dies is an EOFError here, not a wait for ever
        lines.append(line)
        workers.append(worker)
        line.recv()  # one warms up after the other
    order = [0, 1]
    deadline = time.perf_counter() + seconds
    while len(samples[0]) < 5 or time.perf_counter() < deadline:
        for index in order:
            lines[index].send(True)
            wall, cpu = lines[index].recv()
            samples[index].append(wall)
            spent[index].append(cpu)
        order.reverse()
    for line, worker in zip(lines, workers, strict=True):
        line.send(False)
        worker.join()
    rows = []
    for candidate, times, cpu in zip((reference, other), samples, spent, strict=True):
        ratios = [t / base for t, base in zip(times, samples[0], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        ms = statistics.median(times) * 1e3
        rows.append(Row(candidate.name, ms, middle, low, high, sum(cpu) / sum(times)))
    return rows


def _work(
    line: Connection, candidate: Candidate, feeds: Feeds, threads: int, realtime: bool
) -> None:
    """Run `candidate` for a turn whenever asked; answer with wall and CPU seconds of one call."""
    run = peers.load(candidate, threads)
    run(feeds)
    start = time.perf_counter()
    run(feeds)
    count = max(1, round(TURN / max(time.perf_counter() - start, 1e-7)))
    line.send(True)
    while line.recv():
        time.sleep(PAUSE)
        with ahead(realtime):
            run(feeds)  # wakes its own threads
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(count):
                run(feeds)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        line.send((wall / count, cpu / count))


def outputs(candidate: Candidate, batches: Sequence[Feeds], threads: int) -> list[NDArray[Any]]:
    """The candidate's output for each batch."""
    run = peers.load(candidate, threads)
    return [np.array(run(feeds)) for feeds in batches]


def compiled(
    model: str,
    recipe: str,
    calibration: Sequence[Feeds],
    out: str,
    target: str = "ort:cpu",
    buckets: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Compile a model of the zoo, to be called in a fresh process.

    Args:
        model: its name.
        recipe: a preset's name.
        calibration: batches; empty for the model's own.
        out: the folder to write; one that is there is replaced.
        target: what runs it.
        buckets: sizes to generate code for, of `tvm:` targets.

    Returns:
        `{"recipe", "target", "seconds", "peak_mb"}`: wall time from loading the weights to the
        report, and the process's highest memory use.
    """
    import resource

    import torch

    import qcompiler
    from qcompiler.models import ZOO

    start = time.perf_counter()
    given = [{name: torch.from_numpy(x) for name, x in feeds.items()} for feeds in calibration]
    qcompiler.compile(
        ZOO[model].build(), recipe=recipe, calibration=given or None, out=out, force=True,
        target=target, buckets=buckets,
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kilobytes = peak / 1024 if sys.platform == "darwin" else peak  # bytes there, KiB elsewhere
    seconds = time.perf_counter() - start
    return {
        "recipe": recipe,
        "target": target,
        "seconds": seconds,
        "peak_mb": kilobytes * 1024 / 1e6,
    }


def gather(
    builders: Mapping[str, Callable[..., Candidate]],
    model: Path,
    calibration: Sequence[Feeds],
    folder: Path,
) -> list[Candidate]:
    """Build each peer in a fresh process and run it once; print why one is left out."""
    found = []
    for name, build in builders.items():
        say(name)
        result = apart(attempt, build, model, calibration, folder)
        if isinstance(result, Candidate):
            found.append(result)
        else:
            print(f"{name}: {result}", flush=True)
    return found


def attempt(
    build: Callable[..., Candidate], model: Path, calibration: Sequence[Feeds], folder: Path
) -> Candidate | str:
    """The candidate, or why there is none."""
    try:
        candidate = build(model, calibration, folder)
        peers.load(candidate, 1)(calibration[0])
    except ImportError as error:
        return f"skipped, the package '{error.name or error}' is not installed"
    except Exception as error:  # a peer that fails is a result, not the end of the benchmark
        lines = str(error).strip().splitlines() or [""]
        return f"failed, {type(error).__name__}: {lines[0][:200]}"
    return candidate


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text as well."""
    lines = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]

    def text(line: Sequence[str]) -> str:
        first, *rest = zip(line, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return f"| {' | '.join(cells)} |"

    rule = "|".join([":" + "-" * (widths[0] + 1), *("-" * (w + 1) + ":" for w in widths[1:])])
    return "\n".join([f"\n{title}\n", text(columns), f"|{rule}|", *map(text, rows)])


def timing_table(title: str, rows: Sequence[Row]) -> str:
    """The table of one comparison."""
    cells = [
        [r.name, f"{r.ms:.2f}", f"{r.ratio:.3f}", f"{r.low:.3f} – {r.high:.3f}", f"{r.cores:.2f}"]
        for r in rows
    ]
    return table(title, ["candidate", "ms", "× fp32", "quartiles", "CPU / wall"], cells)


def say(step: str) -> None:
    """Progress, apart from the results."""
    print(f"… {step} ({time.perf_counter() - STARTED:.0f} s)", file=sys.stderr, flush=True)
