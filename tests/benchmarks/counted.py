"""Cycles counted from generated code beside the time that the same code takes here.

    python tests/benchmarks/counted.py FOLDER [--target tvm:x86-64-v3] [--realtime]

What `--latency` estimates for machines that are not here, checked on one that is: linears in every
format, alone (`qcompiler.costs.micro`), and their counted cycles. Printed are the rank correlation,
measured ÷ counted by its quartiles and extremes (as shares of its median, which is the clock's
period where the count is right), and each format's share of float's time, both ways. Times are
kept in FOLDER.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import measure
import torch
from torch import nn

from qcompiler import costs
from qcompiler.backends import edge_count
from qcompiler.passes.normalize import normalize
from qcompiler.program import capture
from qcompiler.target import Target

SHAPES = ((384, 384), (1536, 384), (384, 1536), (576, 576), (1536, 576), (576, 1536), (2048, 2048))
FORMATS = ("int8:channel/int8:token", "int4:g32/int8:token", "int2:g32/int8:token", "int8:channel",
           "int4:g32", "bfloat16")  # fmt: skip
ROWS = {"one row": 1, "128 rows": 128}


def cycles(target: Target, outputs: int, inputs: int, rows: int, text: str) -> float | None:
    """Millions of one linear; None where the target has no such format."""
    program = normalize(capture(nn.Linear(inputs, outputs), (torch.zeros(rows, inputs),)))
    made = costs.in_format(program, text, target)
    if made is None:
        return None
    return edge_count.cycles(made, target, {made.inputs[0]: [rows, inputs]}) / 1e6


def ranks(values: list[float]) -> list[float]:
    """The place of each value in order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    return [float(order.index(i)) for i in range(len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="tvm:native")
    parser.add_argument("--realtime", action="store_true", help="see minilm.py; about 10 seconds")
    given = parser.parse_args()
    target = Target.parse(given.target)
    turns = costs.interleave

    def ahead(*args: Any) -> Any:
        with measure.ahead(given.realtime):
            return turns(*args)

    costs.interleave = ahead
    formats = [f for f in FORMATS if f != "bfloat16" or target.multiplies_bfloat16]
    timed = costs.micro(target, SHAPES, formats, ROWS, given.folder, lambda text: None)
    print(f"{target}: counted for a {edge_count.core(target).name}")
    for phase, rows in ROWS.items():
        found = {
            (shape, text): (row[phase], counted)
            for shape, times in timed.items()
            for text, row in times.items()
            if (counted := cycles(target, *shape, rows, text)) is not None
        }
        measured, counted = (list(side) for side in zip(*found.values(), strict=True))
        rank = statistics.correlation(ranks(measured), ranks(counted))
        ratios = sorted(m / c for m, c in found.values())
        middle = statistics.median(ratios)
        low, _, high = statistics.quantiles(ratios, n=4)
        print(f"\n{phase}: {len(found)} linears, rank correlation {rank:.3f}; measured ÷ counted "
              f"{middle:.3f} ns a cycle, quartiles {low / middle:.2f} to {high / middle:.2f}, "
              f"extremes {ratios[0] / middle:.2f} to {ratios[-1] / middle:.2f}")  # fmt: skip
        print("| share of float's time: measured, counted |" + " | ".join(formats) + " |")
        print("|---|" + "---|" * len(formats))
        for shape in timed:
            base = found[shape, "float"]
            cells = [
                "{:.2f}, {:.2f}".format(
                    *(a / b for a, b in zip(found[shape, t], base, strict=True))
                )
                if (shape, t) in found
                else ""
                for t in formats
            ]
            print(f"| {shape[0]} × {shape[1]} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
