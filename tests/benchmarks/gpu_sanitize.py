"""The small cases and programs of `gpu.py` under compute-sanitizer, each in a process of its own.

Memcheck looks for accesses out of bounds, racecheck for hazards in shared memory. Both look at our
kernels alone, not at torch's, which make the inputs and the references. A kernel with a planted
fault of each kind comes first: where that is not found, nothing that follows means anything.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_programs

LIMIT = 120  # seconds that a case may take
# Tool → the kernel that it must find something in.
PLANTED = {"memcheck": "planted_bounds", "racecheck": "planted_race"}
FAULTS = """
extern "C" __global__ void planted_bounds_kernel(float* out) { out[threadIdx.x + (1 << 24)] = 1; }
extern "C" __global__ void planted_race_kernel(float* out) {
  __shared__ float held[64];
  held[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = held[63 - threadIdx.x];  // of the other warp, without a barrier
}
"""
IMAGE = "planted.fatbin"
# Racecheck takes a lane's arrival at a barrier as that lane's alone, though the warp met before.
OPTIONS = ("-DQC_EACH_LANE",)


def build(folder: Path, capability: int) -> None:
    """Compile the planted faults."""
    from qcompiler.backends.edge_cuda_build import compiled

    (folder / IMAGE).write_bytes(compiled(FAULTS, [capability]))


def plant(folder: Path, name: str) -> int:
    """Run one of them."""
    import torch

    from qcompiler.backends.edge_cuda_driver import Launch, Module

    out = torch.empty(64, device="cuda")
    module = Module((folder / IMAGE).read_bytes())
    module.run(Launch(f"{name}_kernel", (1, 1, 1), 64, 0, (0,), False), [out.data_ptr()])
    torch.cuda.synchronize()
    return 0


def sanitize(folder: Path, out: Path | None, script: Path) -> int:
    """Check all small cases that `gpu.py build` made; 1 if anything is found or did not end."""
    command = shutil.which("compute-sanitizer")
    if command is None:
        print("error: compute-sanitizer was not found; it is part of CUDA's toolkit")
        return 2
    names = []
    for entry in json.loads((folder / "cases.json").read_text()):
        if not entry["case"]["timed"]:
            names.append(entry["launch"]["name"].removesuffix("_kernel"))
    programs = gpu_programs.names(folder)
    names = [*programs, *names]
    jobs = [(tool, name) for tool, fault in PLANTED.items() for name in (fault, *names)]

    def job(what: tuple[str, str]) -> dict[str, Any]:
        tool, name = what
        run = [sys.executable, str(script), "run", str(folder), "--small", "--only", name]
        run = gpu_programs.command(folder, name) if name in programs else run
        return checked([command, "--tool", tool, "--kernel-regex", "kns=_kernel", *run], tool, name)

    rows = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(job, jobs):
            rows.append(row)
            print(f"{row['tool']:10}{row['name']:60}{row['result']:10}{row['seconds']:6.1f} s")
            if row["result"] not in ("clean", "found"):
                print(row["said"])
            sys.stdout.flush()
    wrong = 0
    for tool, fault in PLANTED.items():
        results = {r["name"]: r["result"] for r in rows if r["tool"] == tool}
        clean = sum(results[name] == "clean" for name in names)
        wrong += len(names) - clean + (results[fault] != "found")
        print(f"{tool}: {clean} of {len(names)} clean; the planted fault: {results[fault]}")
    if out is not None:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        out.write_text(f'{{\n "rows": [\n{lines}\n ]\n}}\n')
    return int(wrong > 0)


def checked(command: Sequence[str], tool: str, name: str) -> dict[str, Any]:
    """One run: clean, found (faults), failed (ended with an error) or stopped (took too long)."""
    start = time.monotonic()
    row = {"tool": tool, "name": name, "result": "stopped", "seconds": float(LIMIT), "said": ""}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return row
    row["seconds"] = round(time.monotonic() - start, 1)
    told = done.stdout + done.stderr
    faults = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", told)
    if faults and int(faults[1]):
        row["result"] = "found"
    else:
        row["result"] = "clean" if faults and not done.returncode else "failed"
    if row["result"] != "clean":
        row["said"] = "\n".join(line for line in told.splitlines() if line.startswith("=="))[:1500]
        row["said"] = row["said"] or told[-1500:]
    return row
