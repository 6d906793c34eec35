"""The files of a model folder beside its weights and config: what a model made of it takes along.

Tokenizers and their vocabularies, chat templates, processors, the modules of sentence-transformers and
licenses are copied. Code is not: `transformers` would run it for whoever trusts the new folder. What is
neither copied nor known to be of no use to the new model is named in a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from mergelab.checkpoints.companions import companion_names, read_companion
from mergelab.checkpoints.json_data import read_json
from mergelab.checkpoints.model_files import check_file_name, is_model_folder
from mergelab.checkpoints.text_file import MAX_TABLE, read_bytes
from mergelab.errors import CheckpointError

__all__ = ["companion_warnings", "donor_files", "license_differences", "tokenizer_names"]


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
_NAMED = 5


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
    names = [name for name in companion_names(folder) if _is(name, wanted) or _is(name.lower(), _LICENSES)]
    more = companion_names(folder / _MORE_TEMPLATES)
    names += [f"{_MORE_TEMPLATES}/{name}" for name in more if name.endswith(".jinja")]
    for module in (place for place, _ in _modules(folder) if is_model_folder(place)):
        names += [f"{module}/{name}" for name in companion_names(folder / module) if _is(name, _MODULE_FILES)]
    found = {name: read_companion(folder, name, MAX_TABLE) for name in names}
    return {**found, **(merged_tokenizer or {})}


def companion_warnings(folder: Path, written: Mapping[str, object]) -> list[str]:
    """One sentence per kind of file that a model made of a folder lacks, or has as it was.

    Args:
        folder: the donor's.
        written: what `donor_files` gave of it, or more.
    """
    found = []
    rest = [name for name in companion_names(folder) if name not in written]
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
    names = [name for name in companion_names(folder) if _is(name.lower(), _LICENSES)]
    return {name: read_bytes(folder / name) for name in names}


def _is(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


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
