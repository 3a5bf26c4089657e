"""Spread a study over processes of this machine, or over a Ray cluster.

What a worker needs lies in one folder: the program, the data, the units and the settings. A worker
measures its units in graph order and keeps each as soon as it is done, so that one that dies costs
one unit: the rest is given out again.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from qcompiler.errors import InputError, QCompilerError, UnsupportedError
from qcompiler.format import Format
from qcompiler.passes.measure_sensitivity import measure_sensitivity
from qcompiler.program import Batch, Program
from qcompiler.study import Findings, Settings, Unit
from qcompiler.target import Target

RETRIES = 2  # how often units of dead workers are given out again
POLL = 2.0  # seconds between looks at what is done
KNOCK = 10.0  # seconds that a cluster has to accept a connection
PARTS = 4  # tasks for each worker of a cluster, so that a slow one has less to do
PROGRAM, DATA, TASK = "program.pt2", "data.pt", "task.pkl"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """All that decides what a worker measures, beside program and data."""

    units: Sequence[Unit]
    formats: Sequence[str]
    settings: Settings
    target: str
    fingerprint: str


def measure_in_processes(
    program: Program,
    batches: Sequence[Batch],
    task: Task,
    folder: Path,
    jobs: int,
    say: Say,
    ray: str | None = None,
) -> dict[int, Unit]:
    """`measure_sensitivity` by several processes.

    Args:
        program, batches: what is studied.
        task: the rest.
        folder: of the study; results are kept there.
        jobs: processes of this machine.
        say: told how many units are done.
        ray: address of a Ray cluster that measures instead of this machine; "local" starts one.

    Returns:
        The units by their index.

    Raises:
        InputError: workers died again and again.
        UnsupportedError: Ray is asked for and not installed, or does not answer.
    """
    findings = Findings(folder, task.fingerprint)
    count = len(task.units)

    def missing() -> list[int]:
        return [i for i in range(count) if findings.get(i) is None]

    with tempfile.TemporaryDirectory(prefix="qcompiler-") as scratch:
        shared = Path(scratch)
        with warnings.catch_warnings(action="ignore"):  # of weights that are views of others
            torch.export.save(program.exported, shared / PROGRAM)
        torch.save(list(batches), shared / DATA)
        (shared / TASK).write_bytes(pickle.dumps(task))
        for attempt in range(RETRIES + 1):
            left = missing()
            if not left:
                break
            if attempt:
                say(f"{len(left)} units of workers that died are given out again")
            if ray is not None:
                _on_cluster(shared, folder, left, jobs, ray)
                continue
            _on_this_machine(shared, folder, left, jobs, lambda: say(
                f"sensitivity {count - len(missing())}/{count}"))  # fmt: skip
    left = missing()
    if left:
        names = ", ".join(task.units[i].name for i in left[:3])
        raise InputError(
            f"workers died {RETRIES + 1} times at {names}: memory may not suffice for {jobs} of "
            "them; give fewer --jobs. What was measured is kept"
        )
    return {i: unit for i in range(count) if (unit := findings.get(i)) is not None}


def measure_part(shared: str, folder: str, mine: Sequence[int], threads: int) -> None:
    """What one process does: its units, kept in `folder` one by one."""
    torch.set_num_threads(threads)
    task: Task = pickle.loads((Path(shared) / TASK).read_bytes())
    program = Program(torch.export.load(Path(shared) / PROGRAM))
    batches = torch.load(Path(shared) / DATA, weights_only=True)
    findings = Findings(Path(folder), task.fingerprint)
    target = Target.parse(task.target)
    measure_sensitivity(
        program, task.units, [Format.parse(text) for text in task.formats], batches,
        task.settings, findings, target.stored_bits, mine, outlier_bytes=target.outlier_bytes,
    )  # fmt: skip


def _on_this_machine(
    shared: Path, folder: Path, left: Sequence[int], jobs: int, look: Callable[[], None]
) -> None:
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running: set[Future[None]] = {
            # Interleaved: units at the front have more of the model behind them.
            pool.submit(measure_part, str(shared), str(folder), left[first::jobs], threads)
            for first in range(min(jobs, len(left)))
        }
        while running:
            done, running = wait(running, timeout=POLL)
            look()
            for future in done:
                error = future.exception()
                if isinstance(error, QCompilerError):
                    raise error
                if error is not None and not isinstance(error, BrokenProcessPool):
                    raise error


def _on_cluster(shared: Path, folder: Path, left: Sequence[int], jobs: int, address: str) -> None:
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError(
            f"--ray {address}: Ray is not installed; pip install 'qcompiler[ray]'"
        ) from error
    _knock(address)
    try:
        if address == "local":
            ray.init(num_cpus=jobs, include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UnsupportedError(f"--ray {address}: no cluster answers there ({error})") from error
    try:
        packed = ray.put({name: (shared / name).read_bytes() for name in (PROGRAM, DATA, TASK)})
        remote: Any = ray.remote(max_retries=RETRIES)(_remote)
        parts = min(len(left), jobs * PARTS)
        pending = [remote.remote(packed, left[first::parts]) for first in range(parts)]
        while pending:
            ready, pending = ray.wait(pending)
            for reference in ready:
                try:
                    files = ray.get(reference)
                except ray.exceptions.WorkerCrashedError:
                    continue  # its units are given out again
                for name, content in files.items():
                    path = folder / "units" / name
                    path.with_suffix(".unfinished").write_bytes(content)
                    path.with_suffix(".unfinished").replace(path)
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Ray itself takes five minutes to find out that nobody listens."""
    place = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        port = place.port
        if place.hostname and port:
            socket.create_connection((place.hostname, port), KNOCK).close()
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"--ray {address}: no cluster answers there ({error})") from error


def _remote(files: dict[str, bytes], mine: Sequence[int]) -> dict[str, bytes]:
    """A cluster's task: machines share no folder, so files go there and come back."""
    scratch = Path(tempfile.mkdtemp(prefix="qcompiler-"))
    try:
        for name, content in files.items():
            (scratch / name).write_bytes(content)
        measure_part(str(scratch), str(scratch / "study"), mine, 1)
        made = sorted((scratch / "study" / "units").iterdir(), key=lambda p: p.suffix != ".pt")
        return {path.name: path.read_bytes() for path in made}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
