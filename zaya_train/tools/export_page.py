"""EXPORT.md: a receipt of an export for people."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from zaya_train.tools.export_progress import unfinished_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_UNKNOWN = "not recorded"


def page(receipt: Mapping[str, Any]) -> str:
    """The whole page in Markdown."""
    run, totals = receipt["run"], receipt["keys"]["totals"]
    parts = [
        "# Export receipt",
        f"Run {run['run'] or _UNKNOWN}, checkpoint {run['checkpoint']}: step {run['step']} in "
        f"phase {run['phase']}, {_count(run['tokens'])} tokens seen. "
        f"{_sentence(receipt['layout'])} layout: {totals['parameters']:,} parameters and "
        f"{totals['buffers']:,} balancing biases in {totals['theirs']:,} tensors, "
        f"{totals['bytes']:,} bytes. `export_receipt.json` has every tensor with its hash; "
        "`zaya verify-export` repeats all checks.",
        *filter(None, [unfinished_line(receipt)]),
        *_agreement(receipt),
        *_skip(receipt),
        *_rope(receipt["rope"]),
        *_tokenizer(receipt["tokenizer"]),
        *_keys(receipt["keys"]["tensors"]),
        "## Identity",
        _table(("", ""), _identity(receipt)),
    ]
    return "\n\n".join(parts) + "\n"


def agreement_line(receipt: Mapping[str, Any]) -> str:
    """The comparison with transformers in one line."""
    agreement = receipt["agreement"]
    if not agreement["verified"]:
        return f"not verified ({agreement['reason']})"
    result = agreement["fp32"]
    return (
        f"agrees with transformers on {result['tokens']:,} tokens ({receipt['check']['source']}): "
        f"logits to {result['logits']['largest']:.1e} of their standard deviation, "
        f"{result['equal_choices']:.3%} of expert choices equal"
        + (", once the skip class's biases are put back" if lost(receipt) else "")
    )


def lost(receipt: Mapping[str, Any]) -> bool:
    """Whether transformers loses trained skip biases when it loads the folder."""
    return receipt["skip"].get("loading") == "lost"


def loss_line(receipt: Mapping[str, Any]) -> str:
    """What transformers makes of a folder whose trained skip biases it loses."""
    reset = receipt["skip"]["biases_reset_by_transformers"]
    layers = len(receipt["skip"]["skipped_by_layer"])
    return (
        f"LOST ON LOAD: transformers {receipt['versions']['transformers']} sets the skip class's "
        f"balancing bias to {reset['to']:g} whenever it loads a model; layers "
        f"{_listed(reset['layers'])} were trained to another value, which changes "
        f"{reset['choices_changed']:,} of {receipt['skip']['tokens'] * layers:,} expert choices"
    )


def skip_line(receipt: Mapping[str, Any]) -> str:
    """The verdict on the skip class in one line."""
    skip = receipt["skip"]
    if not skip["verified"]:
        return f"skip class: not verified ({skip['reason']})"
    if skip["verdict"] == "same":
        return f"skip class: {skip['trained']} in training and in the {receipt['layout']} layout"
    ways = (
        f"trained with {skip['trained']}, the {receipt['layout']} layout's code gives "
        f"{skip['target']}"
    )
    if skip["verdict"] == "unused":
        return (
            f"skip class: {ways}; no token of {skip['tokens']:,} took it (closest: "
            f"{max(skip['closest_by_layer']):+.3f} from being chosen)"
        )
    taken = sum(skip["skipped_by_layer"])
    return (
        f"skip class: {ways}: {taken:,} of {skip['tokens'] * len(skip['skipped_by_layer']):,} "
        f"choices are skips, up to {skip['touched_tokens']:,} tokens computed otherwise"
    )


def _agreement(receipt: Mapping[str, Any]) -> list[str]:
    agreement = receipt["agreement"]
    head = ["## Agreement with transformers", f"{_sentence(agreement_line(receipt))}."]
    if not agreement["verified"]:
        return head
    result = agreement["fp32"]
    parts = [
        *head,
        f"{_sentence(receipt['compared'])}; both compute in fp32. Tolerances: "
        f"{agreement['logit_tolerance']:g} of the logits' standard deviation "
        f"({result['logit_std']:.3g}); where an expert choice differs, "
        f"{agreement['margin_tolerance']:g} of the standard deviation of a token's biased "
        "probabilities. In fp32 transformers' tokens go to the experts of our choice, so that all "
        f"are judged; longest document: {max(map(len, receipt['check']['documents']))} tokens.",
        _table(
            ("over", "logits, largest", "p99", "p50", "loss ours", "loss theirs", "equal choices"),
            [
                _row("fp32", result),
                *([_row("bf16, as stored", agreement["stored_dtype"])] if _low(agreement) else []),
            ],
        ),
        _table(
            ("layer", "equal choices", "differing", "largest margin", "stream difference"),
            [
                (
                    x["layer"],
                    f"{x['equal']:.4%}",
                    x["differing"],
                    f"{x['largest_margin']:.1e}",
                    f"{x['stream_difference']:.1e}",
                )
                for x in result["layers"]
            ],
        ),
    ]
    if cast := agreement.get("cast"):
        parts.append(
            f"The cast itself: loss {cast['loss']['ours']:.5f} with the trained weights, "
            f"{cast['loss']['theirs']:.5f} with the stored ones; {cast['equal_choices']:.3%} of "
            "choices equal."
        )
    return parts


def _low(agreement: Mapping[str, Any]) -> bool:
    return "stored_dtype" in agreement


def _row(name: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    logits, loss = result["logits"], result["loss"]
    figures = (logits["largest"], logits["p99"], logits["p50"])
    losses = (f"{loss['ours']:.6f}", f"{loss['theirs']:.6f}")
    return (name, *(f"{x:.1e}" for x in figures), *losses, f"{result['equal_choices']:.3%}")


def _skip(receipt: Mapping[str, Any]) -> list[str]:
    skip = receipt["skip"]
    parts = ["## Skip class", f"{_sentence(skip_line(receipt))}."]
    if not skip["verified"]:
        return parts
    rows = zip(skip["skipped_by_layer"], skip["closest_by_layer"], strict=True)
    parts.append(
        _table(
            ("layer", "tokens skipped", "closest to a skip"),
            [(number, count, f"{margin:+.4f}") for number, (count, margin) in enumerate(rows)],
        )
    )
    if difference := skip.get("difference"):
        parts.append(
            f"Documents {_listed(skip['touched_documents'])} have skips. There the two ways differ "
            f"by up to {difference['logits_largest']:.2g} standard deviations of the logits; loss "
            f"{difference['loss_identity']:.5f} with identity, {difference['loss_zero']:.5f} with "
            "zero."
        )
    if lost(receipt):
        parts.append(f"{loss_line(receipt)}. The comparison above has the stored values put back.")
    return parts


def _rope(rope: Mapping[str, Any]) -> list[str]:
    trained, exported = rope["trained"], rope["exported"]
    parts = [
        "## RoPE and context",
        _table(
            ("", f"phase {rope['phase']}", "config.json"),
            [
                ("base", f"{trained['base']:,.0f}", f"{exported['base']:,.0f}"),
                ("rotated fraction", trained["fraction"], exported["fraction"]),
                (
                    "context, tokens",
                    _count(trained["context_tokens"]),
                    f"{exported['context_tokens']:,}",
                ),
            ],
        ),
    ]
    context = trained["context_tokens"]
    if context is not None and exported["context_tokens"] > context:
        parts.append(f"Contexts longer than {context:,} tokens were not trained in this phase.")
    return parts


def _tokenizer(section: Mapping[str, Any] | None) -> list[str]:
    parts = ["## Tokenizer and chat template"]
    if section is None:
        return [*parts, "None exported: the run keeps none and none was named."]
    special = ", ".join(f"`{token}` {index}" for token, index in section["special_tokens"].items())
    parts.append(
        f"{section['vocab_size']:,} ids, sha256 `{section['sha256'][:16]}`; "
        f"{section['round_trip_texts']} texts encode and decode alike in training and in "
        f"transformers. Special tokens, equal there and in config.json: {special}."
    )
    template = section["template"]
    if template is None:
        return [*parts, "No chat template."]
    parts.append(f"Chat template: {template['kind']}, sha256 `{template['sha256'][:16]}`.")
    if "example_tokens" in template:
        parts.append(
            f"An example of four turns becomes the same {template['example_tokens']} tokens in "
            f"training and in transformers:\n\n```\n{template['example']}\n```"
        )
    else:
        parts.append(f"The example: {template['example']}.")
    return parts


def _keys(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """One row for the same tensor of all layers."""
    rows: dict[tuple[str, ...], int] = {}
    for entry in entries:
        first = entry["theirs"][0]
        row = (
            _without_numbers(entry["ours"]),
            _without_numbers(first["name"]),
            str(entry["shape"]),
            f"{len(entry['theirs'])} x {first['shape']}"
            if len(entry["theirs"]) > 1
            else "same"
            if first["shape"] == entry["shape"]
            else str(first["shape"]),
            first["dtype"],
            "; ".join(entry["changes"]) or "none",
        )
        rows[row] = rows.get(row, 0) + 1
    return [
        "## Tensors",
        _table(
            ("count", "ours", "theirs", "shape", "theirs", "type", "change"),
            [(count, *row) for row, count in rows.items()],
        ),
    ]


def _without_numbers(name: str) -> str:
    return f"`{re.sub(r'(?<=layers.)[0-9]+|(?<=experts.)[0-9]+', 'N', name)}`"


def _identity(receipt: Mapping[str, Any]) -> list[tuple[str, str]]:
    run = receipt["run"]
    rows = [
        ("math hash", run["math_hash"] or _UNKNOWN),
        ("configuration hash", run["config_hash"]),
        ("checkpoint manifest", run["manifest_sha256"]),
        ("plan", {None: _UNKNOWN, True: "done", False: "not done"}[run["finished"]]),
        ("supervised tokens", _count(run["supervised_tokens"])),
    ]
    rows += [(f"corpus {name}", digest) for name, digest in run["corpora"].items()]
    rows += [(f"trained with {name}", text) for name, text in run["trained_with"].items()]
    rows += [(f"exported with {name}", text) for name, text in receipt["versions"].items()]
    return rows


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _count(value: int | None) -> str:
    return _UNKNOWN if value is None else f"{value:,}"


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:20]))
    return shown if len(numbers) <= 20 else f"{shown} and {len(numbers) - 20} more"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
