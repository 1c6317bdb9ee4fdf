"""An exported folder's tokenizer and chat template as transformers reads them, against ours."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from zaya_train.config.errors import CheckpointError, first_line
from zaya_train.data.chat import encode_conversations
from zaya_train.data.chat_template import compile_template
from zaya_train.data.sections import Rejected
from zaya_train.data.tokenizer import CHAT_TEMPLATE, MARKERS, Tokenizer, load_tokenizer
from zaya_train.runtime.files import file_sha256

if TYPE_CHECKING:
    from pathlib import Path

    from zaya_train.hub.names import Layout

TEXTS = (
    "The quick brown fox jumps over 12,345 lazy dogs.",
    "def f(x):\n\treturn x ** 2  # squared\n",
    "\u00dcber stra\u00dfe, na\u00efve caf\u00e9, \u4f60\u597d, \u043f\u043e, \U0001f642",
    "  leading, trailing and   inner spaces  ",
    "x^2 + y^2 = z^2, \\frac{1}{2}, 3.14159265358979",
)
"""Encoded on both sides and decoded again."""
EXAMPLE = (
    {"role": "user", "content": "What is 98 + 57?"},
    {"role": "assistant", "content": "<think>98 + 57 = 155</think>It is 155."},
    {"role": "user", "content": "And doubled?"},
    {"role": "assistant", "content": "<think>2 * 155 = 310</think>310."},
)
"""Rendered on both sides."""


def tokenizer_section(folder: Path, source: Path, layout: Layout) -> dict[str, Any]:
    """What a receipt says of the tokenizer in `folder`, which came from `source`.

    Raises:
        CheckpointError: transformers reads another tokenizer or template than training used, or
            config.json names other special tokens.
    """
    ours = load_tokenizer(str(source))
    try:
        # AutoTokenizer also reads config.json, of the native layout only.
        kind: Any = AutoTokenizer if layout == "native" else PreTrainedTokenizerFast
        theirs = kind.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: tokenizer cannot be loaded: {first_line(error)}"
        ) from error
    # As ours: text that looks like a marker is text.
    theirs.backend_tokenizer.encode_special_tokens = True
    _require_texts(folder, ours, theirs)
    return {
        "file_sha256": file_sha256(folder / "tokenizer.json"),
        "sha256": ours.sha256,
        "vocab_size": ours.vocab_size,
        "round_trip_texts": len(TEXTS),
        "special_tokens": _special_tokens(folder, ours, theirs),
        "template": _template(folder, ours, theirs),
    }


def _require_texts(folder: Path, ours: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        mine = ours.encode(text)
        if (found := theirs(text, add_special_tokens=False)["input_ids"]) != mine:
            raise CheckpointError(
                f"{folder}: transformers encodes {text!r} as {found[:8]}..., training as "
                f"{mine[:8]}..."
            )
        decoded = theirs.decode(found, clean_up_tokenization_spaces=False)
        if decoded != ours.decode(mine):
            raise CheckpointError(
                f"{folder}: transformers decodes {text!r} as {decoded!r}, our tokenizer as "
                f"{ours.decode(mine)!r}"
            )


def _special_tokens(folder: Path, ours: Tokenizer, theirs: Any) -> dict[str, int]:
    """Id of every marker and of bos, eos, pad; each the same in tokenizer and config.json."""
    vocabulary = theirs.get_vocab()
    # A tokenizer that the user names may lack markers, which ours then adds behind its own ids.
    known = {token: int(vocabulary[token]) for token in MARKERS if token in vocabulary}
    for token, index in known.items():
        mine = ours.marker_ids[token]
        if index != mine:
            raise CheckpointError(f"{folder}: {token} is {index} there, {mine} in training")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for kind in ("bos", "eos", "pad"):
        stated, index = settings.get(f"{kind}_token_id"), getattr(theirs, f"{kind}_token_id")
        if stated != index:
            raise CheckpointError(
                f"{folder}/config.json: {kind}_token_id is {stated}, the tokenizer's is {index}"
            )
        if index is not None:
            known[kind] = index
    return known


def _template(folder: Path, ours: Tokenizer, theirs: Any) -> dict[str, Any] | None:
    source = ours.own_template
    if source is None:
        return None
    if theirs.chat_template != source.text:
        raise CheckpointError(
            f"{folder}: transformers reads another chat template than {source.file}"
        )
    shipped = source.text == CHAT_TEMPLATE
    template = None if shipped else compile_template(ours)
    (sample,) = encode_conversations(ours, [EXAMPLE], template)
    section: dict[str, Any] = {
        "sha256": hashlib.sha256(source.text.encode()).hexdigest(),
        "kind": "shipped" if shipped else "the tokenizer's own",
    }
    if isinstance(sample, Rejected):
        return section | {"example": f"not rendered: {sample.reason} ({sample.detail})"}
    theirs.backend_tokenizer.encode_special_tokens = False
    rendered = theirs.apply_chat_template(list(EXAMPLE), tokenize=False)
    found = theirs(rendered, add_special_tokens=False)["input_ids"]
    if found != sample.tokens.tolist():
        raise CheckpointError(
            f"{folder}: transformers renders the example as {rendered!r}, training as "
            f"{ours.decode(sample.tokens.tolist())!r}"
        )
    return section | {"example": rendered, "example_tokens": len(found)}
