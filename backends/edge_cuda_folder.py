"""EdgeModel → an artifact for a GPU: kernels.fatbin, weights.bin, program.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qcompiler.backends.edge import Maker
from qcompiler.backends.edge_calls import Calls
from qcompiler.backends.edge_cuda_build import build
from qcompiler.backends.edge_cuda_calls import ISA, CudaCalls
from qcompiler.backends.edge_model import EdgeModel
from qcompiler.backends.edge_program import check
from qcompiler.errors import UnsupportedError
from qcompiler.kernels.cuda_code import GPUS
from qcompiler.target import Target

KERNELS, LAUNCHES = "kernels.fatbin", "launches.json"
WEIGHTS, PROGRAM = "weights.bin", "program.json"


class CudaMaker(Maker):
    """Code for GPUs of one compute capability."""

    chunks = (1, 16, 64, 512)

    def __init__(self, target: Target) -> None:
        self.capability = int(target.feature.removeprefix("sm_"))
        self.isa, self.features = ISA, (target.feature,)

    def calls(self, *given: Any) -> Calls:
        """The calls of a trace."""
        return CudaCalls(GPUS[self.capability], *given)

    def compile(self, kernels: Mapping[str, Any]) -> tuple[tuple[str, bytes], ...]:
        """The fat binary, and how its kernels are launched."""
        room = GPUS[self.capability].shared
        for kernel in kernels.values():
            if kernel.shared > room:
                raise UnsupportedError(
                    f"'{kernel.name}' needs {kernel.shared} bytes of shared memory, and GPUs of "
                    f"compute capability {self.capability / 10} have {room}"
                )
        image, launches = build([*kernels.values()], [self.capability])
        table = {name: asdict(launch) for name, launch in launches.items()}
        return ((KERNELS, image), (LAUNCHES, json.dumps(table).encode()))

    def write(self, edge: EdgeModel, folder: Path) -> None:
        """Write the model."""
        check(edge)
        files = dict(edge.objects)
        (folder / KERNELS).write_bytes(files[KERNELS])
        (folder / WEIGHTS).write_bytes(edge.weights)
        program = {
            "target": edge.target,
            "capability": self.capability,
            "weights": len(edge.weights),
            "state": edge.state,
            "padded": sorted(edge.padded),
            "inputs": [asdict(port) for port in edge.inputs],
            "outputs": [asdict(port) for port in edge.outputs],
            "entries": [asdict(entry) for entry in edge.entries],
            "decoder": asdict(edge.decoder) if edge.decoder is not None else None,
            "launches": json.loads(files[LAUNCHES]),
        }
        (folder / PROGRAM).write_text(json.dumps(program) + "\n")
