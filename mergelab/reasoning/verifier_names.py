"""Verifiers by name, as the command line gives them: what to read, where, and what it is learned from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.errors import EvaluationError, did_you_mean, quoted
from mergelab.models.sites import match_sites
from mergelab.reasoning.answers import Extract
from mergelab.reasoning.fitted import FITTED, StepRows, fit_reading, load_probe, save_probe, step_rows
from mergelab.reasoning.readings import (
    How,
    Reading,
    confidence_reading,
    entropy_reading,
    latent_reading,
    lens_reading,
    log_probability_reading,
    probe_reading,
)
from mergelab.reasoning.tasks import Task
from mergelab.reasoning.writer import Writer

__all__ = ["VERIFIERS", "FitOn", "check_verifiers", "named_readings"]

VERIFIERS = (
    "logprob", "entropy", "confidence", "lens:SITE", "latents:SAE:ID,ID", "probe:FILE", "probe:SITE",
    "shuffled:SITE", "random:SITE",
)  # fmt: skip
"""Names of verifiers; the last three are fitted."""


@dataclass(frozen=True)
class FitOn:
    """What probes are fitted to.

    Attributes:
        tasks: tasks, none of those that are to be solved.
        samples: number of traces of each.
        answer: how answers are found.
        seed: seed of the draws and of the controls.
        how: what a trace is worth by its steps.
    """

    tasks: Sequence[Task]
    samples: int = 4
    answer: str | Extract = "auto"
    seed: int = 0
    how: How = "last"


def check_verifiers(names: Sequence[str | Reading], *, fits: bool) -> None:
    """Refuses what names no verifier, every reason at once.

    Args:
        names: verifiers.
        fits: whether there are tasks to fit probes to.

    Raises:
        EvaluationError: a name is unknown, or a probe has nothing to be fitted to.
    """
    faults = []
    kinds = {name.partition(":")[0] for name in VERIFIERS}
    for name in names:
        if not isinstance(name, str):
            continue
        kind, sign, place = name.partition(":")
        alone = kind in ("logprob", "entropy", "confidence")
        if kind not in kinds or alone == bool(sign) or alone == bool(place):
            near = did_you_mean(kind, sorted(kinds))
            faults.append(f"{quoted(name)} names no verifier{near}; they are {', '.join(VERIFIERS)}")
        elif kind in FITTED and not fits and not (kind == "probe" and place.endswith(".safetensors")):
            faults.append(f"{quoted(name)} is fitted to traces of other tasks; name them (--fit-on FILE)")
        elif kind == "latents" and _latents(place) is None:
            faults.append(
                f"{quoted(name)} names no latents; write latents:SAE:ID,ID, such as latents:run:892"
            )
    if faults:
        raise EvaluationError(faults)


def named_readings(
    names: Sequence[str | Reading],
    writer: Writer,
    *,
    model_path: Path | None = None,
    fit: FitOn | None = None,
    keep: Path | None = None,
    begin: Callable[[], object] = lambda: None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> tuple[Reading, ...]:
    """Readings by name.

    Args:
        names: verifiers (`VERIFIERS`), or readings, which stay as they are.
        writer: who writes.
        model_path: the model's place, with which an SAE is compared; not compared if None.
        fit: what probes are fitted to.
        keep: folder in which fitted probes are kept, and found again.
        begin: function that makes that folder, called before the first is kept.
        progress: function that is told how many tasks of a fit are done.

    Raises:
        EvaluationError: as `check_verifiers` and `fit_reading`.
        SiteError: the model has no such site.
        SAEError: an SAE does not fit the model.
    """
    check_verifiers(names, fits=fit is not None)
    rows: dict[str, StepRows] = {}
    found = []
    for name in names:
        if not isinstance(name, str):
            found.append(name)
            continue
        kind, _, place = name.partition(":")
        simple: dict[str, Callable[[], Reading]] = {
            "logprob": log_probability_reading,
            "entropy": entropy_reading,
            "confidence": lambda: confidence_reading(window=max(1, min(2048, writer.budget // 4))),
            "lens": lambda place=place: lens_reading(writer.model, writer.params, place),
            "latents": lambda place=place: _latent_reading(place, writer, model_path),
        }
        if kind in simple:
            found.append(simple[kind]())
        elif kind == "probe" and place.endswith(".safetensors"):
            probe, site = load_probe(Path(place))
            _check_width(writer, site, probe.weights.shape[0], place)
            found.append(probe_reading(probe, site, "last" if fit is None else fit.how))
        else:
            assert fit is not None
            (site,) = match_sites(writer.model.sites(), place)
            file = None if keep is None else keep / f"{kind}-{site}.safetensors"
            if file is not None and file.exists():
                found.append(probe_reading(load_probe(file)[0], site, fit.how, name=f"{kind}:{site}"))
                continue
            if site not in rows:
                options: dict[str, Any] = {"samples": fit.samples, "answer": fit.answer, "seed": fit.seed}
                rows[site] = step_rows(writer, fit.tasks, site, **options, progress=progress)
            reading, probe = fit_reading(rows[site], kind, how=fit.how, seed=fit.seed)
            if file is not None:
                begin()
                save_probe(file, probe, site)
            found.append(reading)
    return tuple(found)


def _latents(place: str) -> tuple[str, list[int]] | None:
    sae, _, ids = place.rpartition(":")
    parts = ids.split(",")
    if not sae or not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        return None
    return sae, [int(part) for part in parts]


def _latent_reading(place: str, writer: Writer, model_path: Path | None) -> Reading:
    from mergelab.checkpoints.locations import local_path
    from mergelab.errors import SAEError
    from mergelab.sae.formats import load_sae
    from mergelab.sae.subject_model import check_subject_model

    found = _latents(place)
    assert found is not None
    sae = load_sae(local_path(found[0]))
    reads = sae.config.reads
    if reads is None or len(reads) != 1:
        raise SAEError(f"{found[0]}: the SAE does not name the one site that it reads; give one that does.")
    if model_path is not None:
        check_subject_model(sae, model_path)
    _check_width(writer, reads[0], sae.d_in, found[0])
    return latent_reading(sae, reads[0], found[1])


def _check_width(writer: Writer, site: str, width: int, place: str) -> None:
    (name,) = match_sites(writer.model.sites(), site)
    wide = writer.model.sites()[name][2:]
    if wide != (width,):
        raise EvaluationError(
            f"{place} reads {width} numbers, but {name} of this model has shape {list(wide)}; it belongs to "
            "another model"
        )
