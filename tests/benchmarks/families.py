"""Compile the tiny model of each transformers family with each recipe, and print README's table.

    python tests/benchmarks/families.py [--only Llama,BERT]

Each cell is the lowest SQNR in dB of the artifact, as ONNX Runtime runs it, against the float
model on held-out data; then what the rotation did. Random weights have no outliers: the numbers
show that a family compiles and matches, not how well it would do when trained.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import qcompiler
from qcompiler.errors import QCompilerError
from qcompiler.models.families import FAMILIES, build
from qcompiler.recipe import load_recipe

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "`w8`": ("w8", {}),
    "`w4a16`": ("w4a16", {"weights": "int4:g16"}),
    "`w8a8`": ("w8a8", {}),
    "`w4a16` rotated": ("w4a16", {"weights": "int4:g16", "rotation": "hadamard"}),
}


def cell(family: str, name: str, settings: dict[str, Any], folder: Path) -> tuple[str, str]:
    """The lowest SQNR or the error, and what the rotation did."""
    recipe = load_recipe(name, {**settings, "min_sqnr": 0, "keep_reference": False})
    try:
        artifact = qcompiler.compile(build(family), recipe=recipe, out=folder, force=True)
    except QCompilerError as error:
        return f"refused: {error}", ""
    rows = artifact.manifest["errors"]["quantization"]
    worst = min(row["sqnr_db"] for row in rows if row["data"] == "held-out")
    for entry in artifact.manifest["history"]:
        if entry["name"] == "fuse_rotation":
            done = sorted({note[:2] for note in entry["notes"] if note[0] == "R"})
            why = next((r["reason"] for r in entry["refusals"] if r["reason"][:2] == "R1"), "")
            said = why.partition(") ")[2] or why
            return f"{worst:.0f}", ", ".join(done) + (f"; R1 refused: {said}" if why else "")
    return f"{worst:.0f}", ""


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="families, with commas between")
    wanted = [part for part in parser.parse_args().only.split(",") if part]
    print("| family | " + " | ".join(RECIPES) + " | rotations |")
    print("|---" * (len(RECIPES) + 2) + "|")
    with tempfile.TemporaryDirectory() as scratch:
        for family in wanted or FAMILIES:
            cells, rotations = [], ""
            for name, settings in RECIPES.values():
                text, said = cell(family, name, settings, Path(scratch) / "artifact")
                cells.append(text)
                rotations = said or rotations
            print(f"| {family} | " + " | ".join(cells) + f" | {rotations} |", flush=True)


if __name__ == "__main__":
    main()
