"""What a model card says to the hub: front matter that it accepts, from what the inputs say of themselves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mergelab.checkpoints.hub import hub_origin, parse_hub_place
from mergelab.checkpoints.json_data import read_optional_json
from mergelab.checkpoints.locations import exists, is_url, location_text
from mergelab.checkpoints.text_file import read_text
from mergelab.checkpoints.yaml_data import parse_yaml
from mergelab.errors import MergelabError

__all__ = ["CardFacts", "card_facts", "front_matter", "portable_name", "short_card"]

_FRONT = re.compile(r"---\n(.*?)\n---(?:\n|$)", re.DOTALL)
_LICENSE = ("license", "license_name", "license_link")
_LARGEST = 2**20  # bytes of a card that is read


@dataclass(frozen=True)
class CardFacts:
    """What the inputs of a model say, as far as it holds for what was made of them.

    Attributes:
        base_models: their ids on the hub; paths on a disk mean nothing there, and the hub refuses them.
        license: `license`, and `license_name` and `license_link` where they belong to it; empty unless all
            inputs name the same one.
        pipeline_tag: what the model is for, such as `text-generation`; None where it is not known.
    """

    base_models: tuple[str, ...] = ()
    license: Mapping[str, str] = field(default_factory=dict)
    pipeline_tag: str | None = None


def card_facts(inputs: Iterable[str | Path], config: Mapping[str, Any] | None = None) -> CardFacts:
    """The facts of the models in local folders, copies of hub models among them.

    Args:
        inputs: folders or weight files.
        config: the `config.json` of what was made of them; the first input's own if None.
    """
    folders = [path if path.is_dir() else path.parent for path in map(Path, inputs)]
    origins = [hub_origin(folder) for folder in folders]
    licenses = [_license(folder) for folder in folders]
    agreed = licenses[0] if licenses and all(one == licenses[0] for one in licenses) else {}
    if config is None:
        config = _config(folders[0]) if folders else {}
    repos = dict.fromkeys(origin.repo for origin in origins if origin is not None)
    return CardFacts(tuple(repos), agreed, _pipeline(config))


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        return read_optional_json(folder / "config.json")
    except MergelabError:
        return {}


def _license(folder: Path) -> dict[str, str]:
    """What a folder's card says of the license; nothing where there is no readable card."""
    try:
        match = _FRONT.match(read_text(folder / "README.md", _LARGEST))
        said = parse_yaml(match[1], "README.md", strict_keys=False)[0].data if match else {}
    except (MergelabError, IndexError):
        return {}
    if not isinstance(said, dict):
        return {}
    found = {name: said[name] for name in _LICENSE if isinstance(said.get(name), str)}
    if not re.fullmatch(r"[a-z0-9.+-]+", found.get("license", "")):
        return {}
    return found if found["license"] == "other" else {"license": found["license"]}


def _pipeline(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "text-generation"
    if name.endswith("ForMaskedLM"):
        return "fill-mask"
    return "feature-extraction" if name.startswith(("Bert", "Roberta", "DistilBert")) else None


def front_matter(library: str, tags: Sequence[str], facts: CardFacts) -> list[str]:
    """The lines between and with the two `---` that begin a card.

    Args:
        library: name of the library that loads the files: `transformers`, `peft`, ....
        tags: what the model is, in words that people filter by.
        facts: what is known of the inputs.
    """
    front: dict[str, Any] = {"library_name": library, "tags": list(dict.fromkeys(tags))}
    if facts.base_models:
        front["base_model"] = list(facts.base_models)
    front |= facts.license
    if facts.pipeline_tag is not None:
        front["pipeline_tag"] = facts.pipeline_tag
    return ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---"]


def short_card(
    name: str, library: str, tags: Sequence[str], facts: CardFacts, paragraphs: Sequence[str]
) -> bytes:
    """A card of a heading and some paragraphs, as the content of `README.md`."""
    lines = [*front_matter(library, tags, facts), "", f"# {name}"]
    for paragraph in paragraphs:
        lines += ["", paragraph]
    return ("\n".join(lines) + "\n").encode()


def portable_name(place: str | os.PathLike[str]) -> str:
    """How a file that others will read names a model: its hub id, its URL, or its folder's own name.

    The rest of a path on this machine is nobody else's business, and of no use to anybody else.
    """
    path = Path(place)
    if (origin := hub_origin(path)) is not None:
        return origin.repo
    if is_url(place):
        return location_text(place)
    if not exists(path) and (hub := parse_hub_place(os.fspath(place))) is not None:
        return hub.repo
    return path.absolute().name
