"""`mergelab sae eval`: how well a dictionary reconstructs activations, and how sparsely."""

from __future__ import annotations

import json
from pathlib import Path

import click

__all__ = ["command"]


@click.command("eval")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--data", multiple=True, required=True, metavar="FILES", help="Activations [tokens, d]; a glob."
)
@click.option("--rows", type=click.IntRange(1), help="Use so many rows, from the start; all if not given.")
@click.option("--batch", type=click.IntRange(1), default=4096, show_default=True, help="Rows at a time.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(source: Path, data: tuple[str, ...], rows: int | None, batch: int, as_json: bool) -> None:
    """Judge the dictionary in SOURCE on activations it was not trained on.

    \b
    Examples:
      mergelab sae eval run --data 'held-out/*.npy'
      mergelab sae eval run-saelens --data acts.safetensors --rows 100000 --json
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mergelab.cli.sae_folder import open_dictionary
    from mergelab.data.activations import open_activation_files
    from mergelab.errors import SAEError
    from mergelab.sae.evaluation.reconstruction import Totals

    dictionary = open_dictionary(source)
    files = open_activation_files(list(data))
    if files.d_in != dictionary.d_in or dictionary.d_in != dictionary.d_out:
        raise SAEError(
            f"{source}: the dictionary maps {dictionary.d_in} to {dictionary.d_out} wide activations, "
            f"but the data is {files.d_in} wide; give activations of the site it was trained on."
        )
    run = jax.jit(lambda d, x: (d.encode(x), d(x)))
    totals = None
    count = min(rows or files.rows, files.rows)
    for start in range(0, count, batch):
        x = files.read(start, min(start + batch, count))
        codes, out = run(dictionary, jnp.asarray(x))
        totals = totals or Totals.zero(x, dictionary.n_latents)
        totals = totals.add(x, np.asarray(out), np.asarray(codes))
    assert totals is not None
    figures = totals.result().scalars()
    if as_json:
        click.echo(json.dumps(figures))
        return
    for name, value in figures.items():
        click.echo(f"{name.replace('_', ' '):20} {value:,.6g}")
