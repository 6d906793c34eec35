"""A model folder's tokenizer: text to token ids and back, and the ids that begin, end and fill texts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from mergelab.checkpoints.companion_files import donor_files
from mergelab.checkpoints.companions import companion_json, has_companion
from mergelab.checkpoints.gguf.model_file import is_gguf
from mergelab.checkpoints.locations import local_path
from mergelab.checkpoints.model_files import open_tokenizer_file
from mergelab.checkpoints.text_file import read_text
from mergelab.errors import CheckpointError, MergelabError, quoted

__all__ = ["Tokenizer", "load_tokenizer"]

_SPECIAL = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")

_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
"""Bytes by the character that spells them in byte-level vocabularies: itself if printable, else 256 on."""


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
        backend: the `tokenizers` object, without padding and truncation.
        special: the special tokens by role, as chat templates name them: `bos_token`, `eos_token`, ...
        end_ids: the tokens that end a text: those of `generation_config.json`, else the `eos_token`.
        chat_templates: jinja by name; the usual one is `default`.
        folder: where it was read, for messages.
    """

    backend: tokenizers.Tokenizer
    special: Mapping[str, str]
    end_ids: tuple[int, ...]
    chat_templates: Mapping[str, str]
    folder: Path

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones among them."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def id_of(self, role: str) -> int | None:
        """The id of a special token, or None; `role` is bos, eos, pad, unk, sep, cls or mask."""
        token = self.special.get(f"{role}_token")
        return None if token is None else self.backend.token_to_id(token)

    @property
    def pad_id(self) -> int:
        """The id to pad with: that of `pad`, else of the token that ends a text, else 0."""
        pad = self.id_of("pad")
        return pad if pad is not None else next(iter(self.end_ids), 0)

    @property
    def mask_id(self) -> int:
        """The id that takes a token's place: that of `mask`, else `pad_id`."""
        mask = self.id_of("mask")
        return mask if mask is not None else self.pad_id

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of all special tokens: those that have a role, that end texts, or that the file marks as such.

        The markers of chats, such as `<|im_start|>`, are among them.
        """
        added = self.backend.get_added_tokens_decoder()
        marked = {number for number, token in added.items() if token.special}
        roles = {number for role in _SPECIAL if (number := self.id_of(role)) is not None}
        return tuple(sorted(marked | roles | set(self.end_ids)))

    @property
    def frame(self) -> tuple[int, int] | None:
        """The `cls` and `sep` between which the tokenizer puts a text, as encoders have it, or None."""
        begin, end = self.id_of("cls"), self.id_of("sep")
        if begin is None or end is None or self.encode("") != [begin, end]:
            return None
        return begin, end

    def piece(self, token: int) -> str:
        """The text of one token as it stands within a text, with the space before it if it brings one."""
        raw = self.backend.id_to_token(token) or ""
        decoder = self.backend.decoder
        if isinstance(decoder, tokenizers.decoders.WordPiece):
            return raw.removeprefix(decoder.prefix) if raw.startswith(decoder.prefix) else f" {raw}"
        text = self.decode([token], skip_special_tokens=False)
        return f" {text}" if raw.startswith("▁") and not text.startswith(" ") else text

    def shown_piece(self, token: int) -> str:
        """The text of `piece`, with bytes that are not a character on their own spelled out: `<0xE2>`."""
        text = self.piece(token)
        raw = self.backend.id_to_token(token) or ""
        if "\ufffd" not in text or not all(sign in _BYTES for sign in raw):
            return text
        # Python marks the byte 0xE2 that it cannot decode as the character U+DCE2.
        signs = bytes(_BYTES[sign] for sign in raw).decode("utf-8", errors="surrogateescape")
        return "".join(f"<0x{ord(s) - 0xDC00:02X}>" if 0xDC80 <= ord(s) <= 0xDCFF else s for s in signs)

    def piece_bytes(self, token: int) -> bytes:
        """The bytes of `piece`, also where they are not a character on their own."""
        text, raw = self.piece(token), self.backend.id_to_token(token) or ""
        if "\ufffd" in text and all(sign in _BYTES for sign in raw):
            return bytes(_BYTES[sign] for sign in raw)
        if "\ufffd" in text and len(raw) == 6 and raw.startswith("<0x"):
            return bytes([int(raw[3:5], 16)])  # a byte of a character, in vocabularies with byte fallback
        return text.encode()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: the text; special tokens written out in it become those tokens.
            add_special_tokens: let the tokenizer add what its file says begins and ends a text. Rendered chat
                templates hold these already.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def files(self) -> dict[str, bytes]:
        """The files of a model folder that hold this tokenizer, by name.

        Those of the folder it was read from, byte for byte, with the chat templates and
        `generation_config.json` beside it; of a tokenizer without such a folder, `tokenizer.json` and
        `tokenizer_config.json` as they read the same.

        Raises:
            CheckpointError: a file of the folder is a Git LFS pointer.
        """
        if has_companion(self.folder, "tokenizer.json"):
            return donor_files(self.folder, None)
        config: dict[str, Any] = dict(self.special)
        if self.chat_templates:
            config["chat_template"] = [
                {"name": name, "template": template} for name, template in self.chat_templates.items()
            ]
        written = {
            "tokenizer.json": self.backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config),
        }
        if self.end_ids:
            written["generation_config.json"] = json.dumps({"eos_token_id": list(self.end_ids)})
        return {name: text.encode() for name, text in written.items()}

    def encode_batch(
        self, texts: str | Sequence[str], *, max_length: int | None = None, pad_left: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of several texts as one array.

        Args:
            texts: texts, at least one; a single text is a batch of one.
            max_length: cut longer texts, keeping the special tokens that end them; None for no limit.
            pad_left: pad on the left (generation), not on the right (encoders, training).

        Returns:
            Tokens int32 `[batch, length]`, and the mask, bool, True for real tokens.

        Raises:
            MergelabError: there are no texts, or `max_length` leaves no room beside the special tokens.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if not texts:
            raise MergelabError("encode_batch was given no texts; give it at least one.")
        encodings = self.backend.encode_batch(list(texts))
        if max_length is not None:
            added = self.backend.num_special_tokens_to_add(is_pair=False)
            if max_length <= added:
                raise MergelabError(
                    f"max_length={max_length} leaves no room for text beside the {added} special tokens that "
                    f"{self.folder / 'tokenizer.json'} adds; give a larger one."
                )
            plain = self.backend.encode_batch(list(texts), add_special_tokens=False)
            for encoding in plain:
                encoding.truncate(max_length - added)
            encodings = [self.backend.post_process(encoding, None, True) for encoding in plain]
        length = max(len(encoding.ids) for encoding in encodings)
        tokens = np.full((len(texts), length), self.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for i, encoding in enumerate(encodings):
            count = len(encoding.ids)
            place = slice(length - count, length) if pad_left else slice(0, count)
            tokens[i, place], mask[i, place] = encoding.ids, True
        return tokens, mask


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads the tokenizer of a model folder: `tokenizer.json` and the small files beside it.

    Of a model on the Hugging Face hub (`org/name[@revision][:subfolder]`) or at a URL only these are fetched.
    A GGUF file has all of these in its metadata.

    Raises:
        CheckpointError: there is no `tokenizer.json`, or one of the files is malformed.
    """
    folder = local_path(folder, "tokenizer")
    path = folder / "tokenizer.json"
    if not os.path.exists(folder):
        raise CheckpointError(f"{folder} does not exist; name the folder of a model.")
    if not is_gguf(folder) and not os.path.isdir(folder):
        raise CheckpointError(f"{folder} is not a folder; name the folder of a model.")
    if not has_companion(folder, "tokenizer.json"):
        raise CheckpointError(
            f"{folder} has no tokenizer.json; copy the tokenizer files of the model it was made from, or "
            "give token ids in place of text."
        )
    backend = open_tokenizer_file(path)
    # What a file remembers of its last use for padding would change the ids of a text with its neighbors.
    backend.no_padding()
    backend.no_truncation()
    config = companion_json(folder, "tokenizer_config.json")
    _add_missing_tokens(backend, config, str(folder / "tokenizer_config.json"))
    special = _special_tokens({**companion_json(folder, "special_tokens_map.json"), **config})
    return Tokenizer(backend, special, _end_ids(folder, backend, special), _chat_templates(folder), folder)


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], place: str) -> None:
    """Adds tokens that only `tokenizer_config.json` knows, where their ids follow on."""
    known = backend.get_vocab(with_added_tokens=True)
    decoder: Any = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(map(_is_token, decoder, decoder.values())):
        raise CheckpointError(
            f"{place} has an added_tokens_decoder that does not map ids to {{content, ...}}; copy it again."
        )
    for number, definition in sorted(decoder.items(), key=lambda item: int(item[0])):
        content = definition["content"]
        if content not in known and int(number) == backend.get_vocab_size(with_added_tokens=True):
            flags = ("single_word", "lstrip", "rstrip", "normalized")
            options = {flag: bool(definition[flag]) for flag in flags if flag in definition}
            token = tokenizers.AddedToken(content, special=bool(definition.get("special")), **options)
            backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])


def _is_token(number: str, definition: Any) -> bool:
    content = definition.get("content") if isinstance(definition, dict) else None
    return len(number) < 10 and number.isascii() and number.isdigit() and isinstance(content, str)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for role in _SPECIAL:
        token = config.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[f"{role}_token"] = token
    return found


def _end_ids(folder: Path, backend: tokenizers.Tokenizer, special: Mapping[str, str]) -> tuple[int, ...]:
    declared = companion_json(folder, "generation_config.json").get("eos_token_id")
    if declared is None and "eos_token" in special:
        declared = backend.token_to_id(special["eos_token"])
    if declared is None:
        declared = companion_json(folder, "config.json").get("eos_token_id")
    if declared is None:
        return ()
    return token_ids(declared, f"{folder}: eos_token_id")


def token_ids(declared: Any, place: str) -> tuple[int, ...]:
    """One id or a list of them, as configs give them.

    Raises:
        CheckpointError: something else; `place` says where it stood.
    """
    found = tuple(declared) if isinstance(declared, list) else (declared,)
    for number in found:
        if type(number) is not int or not -1 <= number < 2**31:
            raise CheckpointError(f"{place} is {quoted(declared)}; expected a token id or a list of them.")
    return found


def _chat_templates(folder: Path) -> dict[str, str]:
    """Chat templates by name; files of their own win over `tokenizer_config.json`."""
    templates: dict[str, str] = {}
    for name in ("tokenizer_config.json", "chat_template.json"):
        declared = companion_json(folder, name).get("chat_template")
        if isinstance(declared, str):
            templates["default"] = declared
        elif isinstance(declared, list):
            entries = [entry for entry in declared if isinstance(entry, dict) and "name" in entry]
            templates |= {str(entry["name"]): str(entry.get("template", "")) for entry in entries}
    named = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        named["default"] = folder / "chat_template.jinja"
    return templates | {name: read_text(path) for name, path in named.items()}
