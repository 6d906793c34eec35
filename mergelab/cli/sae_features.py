"""`mergelab sae features`: a page on which the latents of an SAE can be searched, sorted and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergelab.cli.numbers import WholeNumber
from mergelab.cli.options import MESH, TEXT, judged_text, model_mesh, token_options
from mergelab.cli.verbosity import is_quiet

if TYPE_CHECKING:
    from mergelab.sae.sae import SAE

__all__ = ["command"]


@click.command("features")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Folder of the SAE's model.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    metavar="PLACE",
    help="Text: file, glob, folder or data set. Repeatable.",
)
@TEXT
@judged_text
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New .html file.")
@click.option("--site", help="Site the SAE reads, such as blocks.8.resid_post (default: as it says).")
@click.option("--target-site", help="Site a transcoder writes (default: as it says).")
@click.option(
    "--context",
    type=WholeNumber(2),
    help="Tokens in a context (default: as in the SAE's training, or 64).",
)
@click.option("--latents", type=WholeNumber(1), default=2000, show_default=True, help="Maximum number shown.")
@click.option("--examples", type=WholeNumber(1), default=8, show_default=True, help="Contexts per latent.")
@click.option(
    "--explain",
    type=WholeNumber(0),
    default=0,
    show_default=True,
    help="Number of the strongest latents to explain by token patterns (N2G), with precision and recall.",
)
@click.option(
    "--wider",
    type=click.Path(path_type=Path),
    help="Wider SAE of the site, to show what latents split into.",
)
@click.option("--neuronpedia", type=click.Path(path_type=Path), help="File for Neuronpedia's JSON.")
@click.option("--mesh", type=MESH, metavar="AXES", help="Device mesh for the model, such as tensor=8.")
@click.option("--any-model", is_flag=True, help="Accept a model other than the recorded one.")
@token_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    source: Path,
    model: Path,
    texts: tuple[str, ...],
    out: Path,
    site: str | None,
    target_site: str | None,
    context: int | None,
    latents: int,
    examples: int,
    explain: int,
    wider: Path | None,
    neuronpedia: Path | None,
    mesh: dict[str, int] | None,
    any_model: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Write one HTML file with the latents of the SAE in SOURCE.

    It shows each latent's strongest contexts in the text, how often and how strongly it is active, which
    tokens it promotes, and which latents it is active with. It needs no network and no server.

    \b
    Examples:
      mergelab sae features run --model model --text corpus.txt --out features.html
      mergelab sae features run --model model --text a.py --out f.html --explain 50 --neuronpedia f.json
      mergelab sae features small --model model --text a.py --out f.html --wider large
    """
    import hashlib
    from dataclasses import replace
    from functools import cache, partial

    from tqdm import tqdm

    from mergelab.checkpoints.folder import stat_sha256
    from mergelab.checkpoints.locations import local_path
    from mergelab.checkpoints.new_files import Content, NewFiles
    from mergelab.cli.options import open_sae
    from mergelab.cli.subject import open_subject
    from mergelab.report.pages import render_features
    from mergelab.sae.features.gallery import (
        explain_gallery,
        make_gallery,
        page_data,
    )
    from mergelab.sae.features.matching import hierarchy
    from mergelab.sae.features.neuronpedia import neuronpedia_batch
    from mergelab.sae.formats import sae_path
    from mergelab.sae.sae import at_sites
    from mergelab.sae.subject_model import check_subject_model
    from mergelab.text.corpus_files import corpus_files
    from mergelab.text.tokenizer import load_tokenizer

    title, model_name, model_text = source.name, model.name, str(model)
    source, model = sae_path(source), local_path(model)
    wider = None if wider is None else sae_path(wider)
    files = corpus_files(texts)
    read = [file.path for file in files if file.path is not None]
    inputs = [source, model, *read, *([] if wider is None else [wider])]
    names = [file.name for file in files]
    options = (
        site,
        target_site,
        context,
        latents,
        examples,
        explain,
        any_model,
        names,
        sorted(given.items()),
    )
    with NewFiles(
        [path for path in (out, neuronpedia) if path is not None],
        inputs=inputs,
        identity=hashlib.sha256(repr((stat_sha256(*inputs), options)).encode()).hexdigest(),
    ) as new_files:
        sae = at_sites(open_sae(source), site, target_site)
        devices = None if mesh is None else model_mesh(mesh)
        asked = {**given, "context": context, "mesh": devices, "any_model": any_model}
        subject = open_subject([sae], model, texts, asked)
        tokenizer = load_tokenizer(model)

        @cache
        def words(token: int) -> str:
            return tokenizer.shown_piece(token)

        with tqdm(unit="context", disable=as_json or is_quiet() or None, dynamic_ncols=True) as bar:

            def progress(stage: str, done: int, total: int) -> None:
                if done < bar.n or bar.total != total:
                    bar.reset(total)
                bar.set_description_str(stage, refresh=False)
                bar.update(done - bar.n)

            gallery = make_gallery(sae, subject, most=latents, examples=examples, progress=progress)
            if wider is not None:
                other = open_sae(wider)
                check_subject_model(other, model, any_model=any_model)
                other = at_sites(other, site, target_site)
                tell = partial(progress, "wider")
                children = hierarchy(sae, other, subject, gallery.latents, progress=tell)
                gallery = replace(gallery, children=children)
        if explain:
            gallery = explain_gallery(gallery, sae, subject, count=explain, mask_token=tokenizer.mask_id)
        facts = {
            "model": model_text,
            "site": gallery.site,
            **_written(sae),
            "latents": f"{len(gallery.latents):,} of {sae.n_latents:,}",
            "text": f"{gallery.survey.rows:,} tokens that count, of {subject.rows:,}",
        }
        page = render_features(page_data(gallery, words), title=f"Features of {title}", facts=facts)
        contents: dict[Path | str, Content] = {out: page.encode()}
        if neuronpedia is not None:
            layer = int(gallery.site.split(".")[1]) if gallery.site.startswith("blocks.") else 0
            batch = neuronpedia_batch(
                gallery,
                sae,
                tokenizer.piece,
                model_id=model_name,
                sae_set=title,
                layer=layer,
                prompts=(subject.tokens.shape[0], subject.tokens.shape[1]),
                dataset=", ".join(Path(text).name for text in texts),
            )
            contents[neuronpedia] = json.dumps(batch, ensure_ascii=False).encode()
        new_files.publish(contents)
        if as_json:
            click.echo(
                json.dumps({"path": str(out), "latents": len(gallery.latents), "rows": gallery.survey.rows})
            )
        else:
            click.echo(f"{len(gallery.latents):,} latents on {gallery.survey.rows:,} tokens\n{out}")


def _written(sae: SAE) -> dict[str, str]:
    """The fact of the page that says what latents write, where that is not the site they read."""
    if not sae.target_known:
        return {"writes": "not known: taken for the same site"}
    if sae.is_autoencoder:
        return {}
    writes = sae.config.writes
    return {"writes": "another site, which is not known" if writes is None else writes[0]}
