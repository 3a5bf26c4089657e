"""The commands that list what there is: targets, recipes, models."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qcompiler.cli_app import Debug, Json, app, examples
from qcompiler.terminal import add_row, guarded, print_json, show, table


@app.command(epilog=examples("qcompiler targets", "qcompiler targets --json"))
def targets(as_json: Json = False, debug: Debug = False) -> None:
    """List the targets and the recipes that each can run."""
    with guarded(debug):
        from qcompiler.qtype import QType
        from qcompiler.recipe import PRESETS
        from qcompiler.target import Target, known_targets

        by_token = (QType.parse("int8:token"),)
        found = []
        for name in known_targets():
            target = Target.parse(name)
            fitting = [
                preset
                for preset, (_, recipe) in PRESETS.items()
                if any(
                    target.refusal(
                        recipe.weight_type,
                        kind,
                        recipe.cache_types,
                        target.products_apart(recipe.products),
                    )
                    is None
                    # The candidates of `mixed` read float, or integers by token where need be.
                    for kind in (recipe.activation_type, *(by_token if preset == "mixed" else ()))
                )
            ]
            found.append({"name": name, "description": target.meaning, "recipes": fitting})
        _list(found, as_json, ("name", "description", "recipes"))


@app.command(
    epilog=examples("qcompiler recipes", "qcompiler recipes w8a8", "qcompiler recipes --json")
)
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME|FILE", help="A recipe, to see all its fields.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the recipes, or show one with all its fields and what they mean."""
    with guarded(debug):
        from qcompiler.recipe import PRESETS, Recipe, load_recipe

        if name is None:
            rows = [
                {
                    "name": key,
                    "description": text,
                    **({"fields": r.model_dump()} if as_json else {}),
                }
                for key, (text, r) in PRESETS.items()
            ]
            _list(rows, as_json, ("name", "description"))
            if not as_json:
                show("\nChange a field with --set KEY=VALUE; 'qcompiler recipes NAME' lists them.")
            return
        values = load_recipe(name).model_dump()
        fields = [
            {"field": key, "value": values[key], "meaning": info.description or ""}
            for key, info in Recipe.model_fields.items()
        ]
        _list(fields, as_json, ("field", "value", "meaning"))


@app.command(epilog=examples("qcompiler models", "qcompiler compile tiny-mlp --out build/mlp"))
def models(as_json: Json = False, debug: Debug = False) -> None:
    """List the models that are known by name."""
    with guarded(debug):
        from qcompiler.models import FORMS, ZOO

        rows = [{"name": name, "description": entry.description} for name, entry in ZOO.items()]
        _list(rows, as_json, ("name", "description"))
        if not as_json:
            show(f"\nMODEL is {FORMS}.")


def _list(rows: list[dict[str, Any]], as_json: bool, columns: tuple[str, ...]) -> None:
    if as_json:
        print_json(rows)
        return
    shown = table(*columns)
    for row in rows:
        add_row(shown, *(_cell(row[column]) for column in columns))
    show(shown)


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)
