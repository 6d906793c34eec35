"""Files besides weights: allowed names, tokenizer files read within bounds, and what goes along with a model.

Of a model's folder, tokenizers and their vocabularies, chat templates, processors, the modules of
sentence-transformers and licenses are copied to what is made of it. Code is not: `transformers` would run it
for whoever trusts the new folder. A warning names what is neither copied nor known to be of no use there.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from mergelab.checkpoints.json_data import read_json
from mergelab.checkpoints.text_file import MAX_TABLE, read_bytes, read_text
from mergelab.errors import CheckpointError, shortened

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "check_file_name",
    "companion_warnings",
    "donor_files",
    "is_model_folder",
    "license_differences",
    "open_tokenizer_file",
    "put_file",
    "tokenizer_names",
]


_FOLDER = re.compile(r"\d{1,3}_\w{1,60}|additional_chat_templates", re.ASCII)
_FORBIDDEN = frozenset('/\\:*?"<>|')
_DEVICES = frozenset(
    ["CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))]
)


def check_file_name(name: object, place: str) -> str:
    """Returns `name` if it is one relative file name on every system.

    An index is written by a stranger: a separator, a drive, `..`, a device name or a control character in it
    could make a reader or writer leave the model's folder.

    Raises:
        CheckpointError: it is not; `place` says where it stood.
    """
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{place} gives {name!r} where a file name was expected; correct the file")
    unsafe = (
        name in (".", "..")
        or any(character in _FORBIDDEN or ord(character) < 32 for character in name)
        or name[-1] in " ."
        or PureWindowsPath(name).stem.upper() in _DEVICES
        or len(name) > 255
    )
    if unsafe:
        raise CheckpointError(
            f"{place} gives the file name {name!r}, which is not one plain name inside the model's folder; "
            "do not use this copy of the model"
        )
    return name


def open_tokenizer_file(path: Path) -> Tokenizer:
    """Returns the tokenizer that a `tokenizer.json` describes, as the tokenizers package makes it.

    Raises:
        CheckpointError: the file is not a regular file of at most 256 MiB, or not a tokenizer.
    """
    from tokenizers import Tokenizer

    text = read_text(path, MAX_TABLE)
    try:
        return Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the package raises bare Exception, and panics past it
        raise CheckpointError(
            f"{path} is not a tokenizer.json as the tokenizers package writes it "
            f"({shortened(str(error), 200)}); copy it again."
        ) from error


def is_model_folder(name: str) -> bool:
    """Whether a folder in a model's is of a kind that models have: a module's, or that of more templates."""
    return _FOLDER.fullmatch(name) is not None


def put_file(folder: Path, name: str, content: bytes | Path) -> None:
    """Writes a file of a model folder: bytes, or a copy of a file.

    Args:
        folder: the model's.
        name: one file name, or one in a folder that models have, with a slash: `1_Pooling/config.json`.
        content: what is in it, or where.

    Raises:
        CheckpointError: `name` is not such a name.
        OSError: it cannot be written.
    """
    inner, slash, file = name.partition("/")
    if not slash or not is_model_folder(inner):
        inner, file = "", name
    target = folder / inner / check_file_name(file, "the output")
    target.parent.mkdir(exist_ok=True)
    if isinstance(content, Path):
        shutil.copyfile(content, target)
    else:
        target.write_bytes(content)


_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "tokenizer.model.v*", "spiece.model", "sentencepiece.bpe.model",
    "sentencepiece.model", "spm.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
    "tiktoken.model", "*.tiktoken", "*.spm", "vocab-src.json", "vocab-tgt.json", "vocab.bpe",
    "encoder.json", "bpe.codes", "dict.txt", "entity_vocab.json", "normalizer.json",
)  # fmt: skip
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_MORE_TEMPLATES = "additional_chat_templates"
_OTHER = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json",
    "config_sentence_transformers.json", "sentence_*_config.json",
)  # fmt: skip
_LICENSES = ("license*", "licence*", "notice*", "copying*", "use_policy*", "acceptable_use*")
"""In lower case."""
_MODULES = "modules.json"
_MODULE_FILES = ("*.json", "*.txt", "model.safetensors", "pytorch_model.bin")
_OWN_MODULES = "sentence_transformers."

# Weights in any format, what trainings leave behind, and pages about the model, in lower case.
_OF_NO_USE = (
    "config.json", "params.json", ".*", "readme*", "*.md", "*.safetensors", "*.bin", "*.pt", "*.pth",
    "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ot", "*.npz", "*.index.json", "adapter_*",
    "trainer_state.json", "*_results.json", "training_args.*", "*.log", "*.yml", "*.yaml", "*.png",
    "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.pdf", "*.ipynb", "*.lock", "mergelab.json",
    "sha256sums", "train_script.py", "handler.py", "requirements.txt",
)  # fmt: skip
_MOST_FILES, _NAMED = 1000, 5


def tokenizer_names() -> tuple[str, ...]:
    """The names under which tokenizers are stored; some are patterns."""
    return _TOKENIZER


def donor_files(folder: Path, merged_tokenizer: Mapping[str, bytes] | None) -> dict[str, bytes]:
    """File contents by name: the donor's, its tokenizer replaced by a merged one where there is one.

    Names of files in folders have a slash: `1_Pooling/config.json`.

    Raises:
        CheckpointError: a file is a Git LFS pointer or too large, or `modules.json` names a place outside.
    """
    wanted = (*_OTHER, *_TEMPLATES, _MODULES, *(() if merged_tokenizer is not None else _TOKENIZER))
    names = [name for name in _files(folder) if _is(name, wanted) or _is(name.lower(), _LICENSES)]
    names += [
        f"{_MORE_TEMPLATES}/{name}" for name in _files(folder / _MORE_TEMPLATES) if name.endswith(".jinja")
    ]
    for module in (place for place, _ in _modules(folder) if is_model_folder(place)):
        names += [f"{module}/{name}" for name in _files(folder / module) if _is(name, _MODULE_FILES)]
    found = {name: read_bytes(folder / name, MAX_TABLE) for name in names}
    return {**found, **(merged_tokenizer or {})}


def companion_warnings(folder: Path, written: Mapping[str, object]) -> list[str]:
    """One sentence per kind of file that a model made of a folder lacks, or has as it was.

    Args:
        folder: the donor's.
        written: what `donor_files` gave of it, or more.
    """
    found = []
    rest = [name for name in _files(folder) if name not in written]
    code = [name for name in rest if name.endswith(".py") and not _is(name.lower(), _OF_NO_USE)]
    if code:
        found.append(
            f"{folder}: code is not copied ({_listed(code)}): models that need it do not load without it; "
            "copy it by hand if you trust it"
        )
    unknown = [
        name
        for name in rest
        if name not in code and not _is(name.lower(), _OF_NO_USE) and not _is(name, _TOKENIZER)
    ]
    if unknown:
        found.append(f"{folder}: not copied, since no use for it is known: {_listed(unknown)}")
    for module, kind in _modules(folder):
        weights = [
            name for name in written if name.startswith(f"{module}/") and not name.endswith((".json", ".txt"))
        ]
        if weights:
            found.append(
                f"{folder}: {_listed(weights)} is copied as it is: layers in {module}/ are not merged"
            )
        if not is_model_folder(module):
            found.append(
                f"{folder}: {module}/ is not copied: {_MODULES} names it, but not as modules are called"
            )
        if not kind.startswith(_OWN_MODULES):
            found.append(f"{folder}: {_MODULES} runs {kind!r} in {module}/, code that is not copied")
    return found


def license_differences(folders: Mapping[str, Path], donor: str) -> list[str]:
    """One sentence per model whose license files are not the donor's, which are the ones that are copied."""
    texts = {name: _license_texts(folder) for name, folder in folders.items()}
    return [
        f"the license files of model {name!r} ({_listed(list(own))}) differ from those of {donor!r}, which "
        "are copied: see that the merge heeds both"
        for name, own in texts.items()
        if own and own.items() - texts[donor].items()
    ]


def _license_texts(folder: Path) -> dict[str, bytes]:
    return {name: read_bytes(folder / name) for name in _files(folder) if _is(name.lower(), _LICENSES)}


def _is(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _files(folder: Path) -> list[str]:
    """Names of the files of a folder (and of links that lead nowhere), in order; none if it is not there."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in islice(entries, _MOST_FILES) if not entry.is_dir())
    except OSError:
        return []


def _modules(folder: Path) -> Iterator[tuple[str, str]]:
    """Folder and type of each module of a sentence-transformers model but the transformer itself."""
    path = folder / _MODULES
    if not path.is_file():
        return
    listed = read_json(path)
    for module in listed if isinstance(listed, list) else []:
        place, kind = (module.get(key) if isinstance(module, dict) else None for key in ("path", "type"))
        if not isinstance(place, str) or not isinstance(kind, str):
            raise CheckpointError(
                f"{path} lists a module without a path or a type; write it as sentence-transformers does"
            )
        if place and re.sub(r".*\.", "", kind) != "Transformer":
            yield check_file_name(place.rstrip("/"), f"{path}"), kind
