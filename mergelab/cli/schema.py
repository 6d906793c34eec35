"""`mergelab schema`: the JSON schemas of recipes and SAE configurations, for editors."""

from __future__ import annotations

import json

import click

__all__ = ["command", "schema_of"]


def schema_of(kind: str) -> str:
    """The schema `recipe` or `sae` as JSON text, as `configs/schemas` holds it."""
    if kind == "recipe":
        from mergelab.merging.recipe.json_schema import recipe_schema as schema
    else:
        from mergelab.sae.training.json_schema import training_schema as schema
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


@click.command("schema")
@click.argument("kind", type=click.Choice(["recipe", "sae"]))
def command(kind: str) -> None:
    """Print the JSON schema of recipes or of SAE configurations, for completion and checks in an editor.

    Editors with the YAML language server take it from a comment in the first line of a file:
    # yaml-language-server: $schema=recipe.schema.json

    \b
    Examples:
      mergelab schema recipe > recipe.schema.json
      mergelab schema sae > sae.schema.json
    """
    click.echo(schema_of(kind), nl=False)
