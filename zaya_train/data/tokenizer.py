"""Text to token ids and back: bytes, a `tokenizer.json`, or a Hugging Face tokenizer.

Every tokenizer used here carries the eight markers of the chat format as single special tokens;
the ones it lacks are added. Markers are placed by id, never parsed out of document text, so a
document that quotes `<think>` or `<|user|>` cannot forge structure.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from zaya_train.config.errors import DataError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from zaya_train.data.fast_encoder import FastEncoder

PAD, END = "<|pad|>", "<|end|>"
SYSTEM, USER, ASSISTANT, TOOL = "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
MARKERS = (PAD, END, SYSTEM, USER, ASSISTANT, TOOL, THINK_OPEN, THINK_CLOSE)
"""Ids 0 to 7 of the bytes tokenizer, in this order."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""The shipped format: one special token per role, one at the end, no newlines between."""

_TEMPLATE_TOKENS = tuple(
    f"{kind}_token" for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
)
"""What transformers hands to a template where the tokenizer has it."""
_ACCEPTED = "'bytes', a tokenizer.json, a folder holding one, a hub name"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(?<!\.json)")


@dataclass(frozen=True)
class TemplateSource:
    """A chat template as found, and the tokens it may name (_TEMPLATE_TOKENS)."""

    file: str
    """Where it stands, for messages."""
    text: str
    variables: tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` with the chat markers; build it with `load_tokenizer`."""

    backend: tokenizers.Tokenizer = field(repr=False)
    spec: str
    own_template: TemplateSource | None = field(default=None, repr=False)
    """The chat template it came with; see chat_template. None: the shipped format."""
    fast: FastEncoder | None = field(default=None, repr=False)
    """Encodes batches in place of `backend`; see fast_encoder."""

    @cached_property
    def vocab_size(self) -> int:
        """Highest id plus one, markers included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def marker_ids(self) -> dict[str, int]:
        """Id of every string in MARKERS."""
        added = self.backend.get_added_tokens_decoder().items()
        ids = {token.content: index for index, token in added}
        return {marker: ids[marker] for marker in MARKERS}

    @property
    def pad_id(self) -> int:
        """Fills rows; never an end of document."""
        return self.marker_ids[PAD]

    @property
    def end_id(self) -> int:
        """Closes a turn and a document."""
        return self.marker_ids[END]

    @cached_property
    def sha256(self) -> str:
        """Identity of the tokenizer: hash of its canonical JSON, independent of where it lies."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @cached_property
    def continues(self) -> NDArray[np.bool_]:
        """[vocab_size], True for ids whose first byte continues a UTF-8 character.

        Text cut before such an id would end in a broken character. Known for byte-level
        vocabularies and for those with byte fallback; others have no such ids.
        """
        table = np.zeros(self.vocab_size, dtype=np.bool_)
        decoder = self.backend.decoder
        kinds = repr(decoder) if decoder is not None else ""
        continuation = {_byte_alphabet()[byte] for byte in range(0x80, 0xC0)}
        fallback = {f"<0x{byte:02X}>" for byte in range(0x80, 0xC0)}
        for token, index in self.backend.get_vocab(with_added_tokens=False).items():
            if "ByteLevel" in kinds:
                table[index] = token[:1] in continuation
            elif "ByteFallback" in kinds:
                table[index] = token in fallback
        return table

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; marker strings in it are encoded as ordinary characters."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """Strings that are one token each and no part of ordinary text."""
        added = self.backend.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    @cached_property
    def _markup(self) -> dict[str, list[int]]:
        return {marker: [index] for marker, index in self.marker_ids.items()}

    def markup_ids(self, text: str) -> list[int]:
        """Ids of a format's own text; special tokens in it are found, unlike in documents."""
        if text not in self._markup:
            self.backend.encode_special_tokens = False
            try:
                self._markup[text] = self.encode(text)
            finally:
                self.backend.encode_special_tokens = True
        return self._markup[text]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """`encode` for many texts, on all cores."""
        if self.fast is not None:
            return self.fast.encode_batch(texts)
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def character_offsets(self, text: str) -> list[int]:
        """First character of every token of `text`, and the length of `text` last."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return [*(start for start, _ in encoding.offsets), len(text)]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids, markers included unless `skip_special`."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, loadable by AutoTokenizer.

        With the shipped chat template, or with the tokenizer's own and the tokens that it may name:
        one more would change what it renders.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        own = self.own_template
        if own is None:
            config |= {"eos_token": END, "pad_token": PAD, "chat_template": CHAT_TEMPLATE}
        else:
            # Padding, which generation needs, is no part of a text unless the template says so.
            padding = {} if "pad_token" in own.text else {"pad_token": PAD}
            config |= {**padding, **dict(own.variables), "chat_template": own.text}
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(spec: str) -> Tokenizer:
    """Tokenizer named by `spec`.

    Args:
        spec: `bytes`; a `tokenizer.json` file or a folder holding one; or a name on the hub.

    Raises:
        DataError: nothing by that name can be loaded, or the file is no tokenizer.
    """
    if spec == "bytes":
        return Tokenizer(_with_markers(_bytes_backend()), spec)
    path = Path(spec)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return Tokenizer(_with_markers(_read_backend(path)), spec, read_template(path.parent))
    if not _HUB_NAME.fullmatch(spec):
        raise DataError(f"tokenizer {spec!r}: no such file or folder; accepted: {_ACCEPTED}")
    backend, template = _hub_backend(spec)
    return Tokenizer(_with_markers(backend), spec, template)


def _bytes_backend() -> tokenizers.Tokenizer:
    """One token per byte: a BPE without merges over GPT-2's printable byte alphabet."""
    vocab = {marker: index for index, marker in enumerate(MARKERS)}
    vocab |= {char: len(MARKERS) + byte for byte, char in enumerate(_byte_alphabet())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level tokenizers, by byte value."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_in = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in stand_in)
    stand_in |= {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    return [stand_in[byte] for byte in range(256)]


def _with_markers(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Register the markers as special tokens and stop parsing them out of plain text."""
    backend.add_special_tokens(
        [AddedToken(marker, special=True, normalized=False) for marker in MARKERS]
    )
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    return backend


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    text = read_text(path)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:
        if type(error) is not Exception:  # the library raises bare Exception for a malformed file
            raise
        raise DataError(f"{path}: not a tokenizer.json: {first_line(error)}") from error


def read_text(path: Path) -> str:
    """A file's text; DataError where it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: offset {error.start}: not UTF-8: {error.reason}") from error


def read_template(folder: Path) -> TemplateSource | None:
    """The chat template beside a tokenizer.json; DataError where its file is malformed."""
    file, jinja = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config: Any = {}
    try:
        if file.is_file():
            config = json.loads(read_text(file))
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{file}: an object is expected")
    if jinja.is_file():
        return _template_source(str(jinja), read_text(jinja), config)
    return _template_source(str(file), config.get("chat_template"), config)


def _template_source(file: str, template: Any, config: Mapping[str, Any]) -> TemplateSource | None:
    if isinstance(template, dict):  # named ones, as transformers hands them over
        template = template.get("default")
    if isinstance(template, list):  # named ones: [{name, template}, ...]
        if not all(isinstance(entry, dict) for entry in template):
            raise DataError(f"{file}: chat_template: a text or a list of objects is expected")
        template = next((e.get("template") for e in template if e.get("name") == "default"), None)
    if not isinstance(template, str):
        return None
    variables = []
    for name in _TEMPLATE_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            variables.append((name, text))
    return TemplateSource(file, template, tuple(variables))


def _hub_backend(name: str) -> tuple[tokenizers.Tokenizer, TemplateSource | None]:
    # transformers takes seconds to import and only hub names need it.
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"tokenizer {name!r}: no such file or folder, and the hub does not serve it "
            f"({first_line(error)}); accepted: {_ACCEPTED}"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise DataError(f"tokenizer {name!r}: has no tokenizer.json form (slow tokenizer)")
    template = _template_source(name, loaded.chat_template, loaded.special_tokens_map)
    return tokenizers.Tokenizer.from_str(backend.to_str()), template
