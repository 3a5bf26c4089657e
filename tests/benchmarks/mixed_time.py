"""Mixed precision within budgets of time beside one format for all, at times that were measured.

    python tests/benchmarks/mixed_time.py FOLDER [--model minilm] [--target ort:cpu] [--realtime]

For each budget the best measured plan (`qcompiler.choosing`), beside every uniform one: its loss,
the share of the float model's time that was foreseen, and the share measured with the whole model
in that plan, all plans interleaved in one run. Weights are rounded to nearest for the timing. The
study is kept in FOLDER and gone on with.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import measure

from qcompiler import choosing, costs, mixed
from qcompiler.compiler import prepare
from qcompiler.data import Data
from qcompiler.mixer import Mixer, Point
from qcompiler.models import ZOO
from qcompiler.program import capture
from qcompiler.recipe import load_recipe
from qcompiler.target import Target


def mixer_of(model: str, target: Target, folder: Path, say: Any) -> Mixer:
    """The study of a zoo model, made and timed."""
    spec = ZOO[model].build()
    recipe = mixed.prepared(load_recipe("mixed", {"latency": "0.5x"}), target, spec)
    program = capture(spec.module, spec.example_inputs, spec.dynamic_shapes)
    data = Data(program, spec, recipe)
    ready = prepare(program, data, recipe, target, say)
    made = Mixer(ready.program, data, recipe, target, folder, say)
    made.study()
    made.time()
    return made


def measured(mixer: Mixer, points: list[Point], say: Any) -> dict[str, float]:
    """Share of the float model's time that each plan takes, by its label."""
    programs = {"float": mixer.program}
    for point in points:
        recipe = mixed.recipe_of(mixer, point)
        made = costs.quantized_program(mixer.program, recipe, mixer.target)
        if made is not None:
            programs[point.label] = made
    batch = max(mixer.batches[-mixer.settings.trials :], key=lambda b: b[0].numel())
    times = costs.anchors(
        programs, mixer.target, batch, mixer.spec.dynamic_shapes, mixer.settings.mask, say
    )
    return {label: ms / times["float"] for label, ms in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--target", default="ort:cpu")
    parser.add_argument("--budgets", default="0.45,0.6,0.8")
    parser.add_argument("--realtime", action="store_true", help="see minilm.py")
    given = parser.parse_args()
    turns = costs.interleave

    def ahead(*args: Any) -> Any:
        with measure.ahead(given.realtime):
            return turns(*args)

    costs.interleave = ahead

    def say(text: str) -> None:
        print(f"  {text}", flush=True)

    mixer = mixer_of(given.model, Target.parse(given.target), given.folder, say)
    points = mixer.measure(choosing.uniform_choices(mixer))
    for share in map(float, given.budgets.split(",")):
        best, _ = choosing.best(mixer, [mixer.latency_limit(share)])
        (point,) = mixer.measure({f"mixed, {share:g}x": best.choice})
        points.append(point)
    found = measured(mixer, points, say)
    print(f"\n{given.model}, {given.target}\n\n| plan | loss | foreseen | measured |")
    print("|---|---|---|---|")
    for point in sorted(points, key=lambda p: found.get(p.label, 0.0)):
        share = f"{found[point.label]:.3f}" if point.label in found else ""
        print(f"| {point.label} | {point.loss:.3g} | {point.time:.3f} | {share} |")


if __name__ == "__main__":
    main()
