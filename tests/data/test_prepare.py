from __future__ import annotations

import io
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import datasets
import pytest
from rich.console import Console

from zaya_train.config.errors import DataError
from zaya_train.data import reading
from zaya_train.data.corpus import Corpus, read_manifest
from zaya_train.data.fast_encoder import ENCODERS, GIGATOKEN
from zaya_train.data.fields import FieldOverrides, marked_answer
from zaya_train.data.prepare import PrepareRequest, prepare
from zaya_train.main import main

from .builders import problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

GSM8K = [
    {"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>\n#### {2 * n}"}
    for n in range(40)
]


def write_jsonl(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def texts(corpus: Path) -> list[str]:
    opened = Corpus.open(corpus, verify="hashes")
    tokenizer = opened.tokenizer
    return [tokenizer.decode(opened.tokens(number)) for number in range(len(opened))]


def run(tmp_path: Path, file: Path, **settings: Any) -> Path:
    return prepare(PrepareRequest(input=str(file), output=tmp_path / "out", **settings))


PAIR = "<|user|>p<|end|><|assistant|>r<|end|>"
SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "prompt-response": ({"prompt": "p", "response": "r"}, PAIR),
    "question-answer": ({"question": "p", "answer": "r"}, PAIR),
    "problem-solution": ({"problem": "p", "solution": "r", "answer": "final"}, PAIR),
    "instruction-output": ({"instruction": "p", "input": "", "output": "r"}, PAIR),
    "instruction with input": (
        {"instruction": "p", "input": "i", "output": "r"},
        "<|user|>p\n\ni<|end|><|assistant|>r<|end|>",
    ),
    "messages": (
        {"messages": problem("t", "4", "q")},
        "<|user|>q<|end|><|assistant|><think>t</think>4<|end|>",
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}]},
        PAIR,
    ),
    "text": ({"text": "plain", "path": "x"}, "plain<|end|>"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_fields_are_detected(tmp_path: Path, shape: str) -> None:
    row, expected = SHAPES[shape]
    out = run(tmp_path, write_jsonl(tmp_path / "in.jsonl", [row]))
    assert texts(out / "train") == [expected]
    assert not (out / "heldout").exists()


def test_named_fields_override_detection(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", [{"text": "no", "q": "p", "a": "r"}])
    fields = FieldOverrides(prompt="q", response="a")
    assert texts(run(tmp_path, file, fields=fields) / "train") == [PAIR]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow", "folder"])
def test_every_format_gives_the_same_tokens(tmp_path: Path, kind: str) -> None:
    table = datasets.Dataset.from_list(GSM8K)
    file = tmp_path / f"in.{kind}"
    if kind == "parquet":
        table.to_parquet(file)
    elif kind == "arrow":
        table.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(file)
    elif kind == "json":
        file.write_text(json.dumps(GSM8K))
    elif kind == "folder":
        file.mkdir()
        write_jsonl(file / "a.jsonl", GSM8K[:20])
        write_jsonl(file / "b.jsonl", GSM8K[20:])
        (file / "README.md").write_text("not data")
    else:
        write_jsonl(file, GSM8K)
    found = texts(run(tmp_path, file) / "train")
    assert found == [
        f"<|user|>{row['question']}<|end|><|assistant|><think>"
        f"{row['answer'].split(chr(10))[0]}</think>{2 * n}<|end|>"
        for n, row in enumerate(GSM8K)
    ]


def test_answer_marker_needs_every_row_and_can_be_turned_off(tmp_path: Path) -> None:
    mixed = [*GSM8K[:3], {"question": "q", "answer": "no marker"}]
    out = run(tmp_path, write_jsonl(tmp_path / "mixed.jsonl", mixed))
    assert all("<think>" not in text for text in texts(out / "train"))
    file = write_jsonl(tmp_path / "all.jsonl", GSM8K[:3])
    off = prepare(PrepareRequest(input=str(file), output=tmp_path / "off", answer_marker=""))
    assert all("<think>" not in text and "#### " in text for text in texts(off / "train"))


def test_explicit_answer_marker_must_be_in_every_row(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": "steps\nANSWER: 4"}, {"prompt": "p", "response": "steps"}]
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(DataError, match=r"in\.jsonl:2: .*no line starting with 'ANSWER:'"):
        run(tmp_path, file, answer_marker="ANSWER:")
    out = run(tmp_path, write_jsonl(file, rows[:1]), answer_marker="ANSWER:")
    assert texts(out / "train")[0].endswith("<think>steps</think>4<|end|>")


@pytest.mark.parametrize(
    ("response", "parts"),
    [
        ("a\nb\n#### 4", ("a\nb", "4")),
        ("#### 4", ("", "4")),
        ("a\n#### 1\nb\n#### 2 \n", ("a\n#### 1\nb", "2")),
        ("a #### 4", None),
    ],
)
def test_marked_answer(response: str, parts: tuple[str, str] | None) -> None:
    assert marked_answer(response, "####") == parts


def test_heldout_split_is_disjoint_exact_and_by_prompt(tmp_path: Path) -> None:
    twice = [*GSM8K, *[row | {"question": f"  {row['question'].upper()}"} for row in GSM8K]]
    out = run(tmp_path, write_jsonl(tmp_path / "in.jsonl", twice), heldout_fraction=0.1)
    train, heldout = (
        [text.split("<|end|>")[0].strip().casefold().replace(" ", "") for text in texts(out / part)]
        for part in ("train", "heldout")
    )
    train, heldout = ([t.removeprefix("<|user|>") for t in part] for part in (train, heldout))
    assert len(heldout) == 8 and len(set(heldout)) == 4
    assert not set(train) & set(heldout)
    assert len(train) + len(heldout) == len(twice)


def test_an_input_without_lines_is_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def rows(file: Path) -> Iterator[reading.LocatedRow]:
        read.append(file)
        return original(file)

    original = reading._json_rows
    monkeypatch.setattr(reading, "_json_rows", rows)
    file = tmp_path / "in.json"
    file.write_text(json.dumps(GSM8K))
    run(tmp_path, file)
    assert read == [file, file]


def test_shards_of_blank_lines_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("\n" * (5 << 20) + json.dumps({"messages": problem("r")}))
    first = next(reading.open_input(str(file)).shards())
    assert not list(first.rows())
    assert len(Corpus.open(run(tmp_path, file) / "train")) == 1


@pytest.mark.parametrize("encoder", ENCODERS)
def test_halves_of_surrogate_pairs_are_counted_not_raised(tmp_path: Path, encoder: str) -> None:
    if encoder == GIGATOKEN:
        pytest.importorskip("gigatoken", reason="an optional dependency: zaya-train[fast]")
    rows: list[dict[str, Any]] = [
        {"id": "i\ud800", "messages": problem("r", prompt=f"question {n}")} for n in range(9)
    ]
    rows += [{"messages": problem("x", prompt=f"torn {n} \udc00")} for n in range(2)]
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    out = run(tmp_path, file, heldout_fraction=0.5, encoder=encoder)
    train, heldout = (read_manifest(out / part) for part in ("train", "heldout"))
    rejected = Counter(train.rejects) + Counter(heldout.rejects)
    assert rejected == {"not_unicode": 2}
    assert train.documents + heldout.documents == 9
    ids = [json.loads(line)["id"] for line in (out / "heldout.jsonl").read_text().splitlines()]
    assert ids == ["i\ud800"] * heldout.documents and ids


def test_heldout_rows_carry_prompt_and_answer(tmp_path: Path) -> None:
    rows = [row | {"id": f"row-{n}", "family": "sums"} for n, row in enumerate(GSM8K)]
    out = run(tmp_path, write_jsonl(tmp_path / "in.jsonl", rows), heldout_fraction=0.1)
    heldout = [json.loads(line) for line in (out / "heldout.jsonl").read_text().splitlines()]
    assert len(heldout) == 4
    for row, text in zip(heldout, texts(out / "heldout"), strict=True):
        source = rows[int(row["id"].removeprefix("row-"))]
        assert row["prompt"] == source["question"] == row["messages"][0]["content"]
        assert row["answer"] == source["answer"].rpartition("#### ")[2]
        assert row["family"] == "sums"
        assert text.endswith(f"</think>{row['answer']}<|end|>")


def test_even_a_tiny_input_holds_out_one(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", GSM8K[:3])
    out = run(tmp_path, file, heldout_fraction=0.01)
    assert (len(texts(out / "train")), len(texts(out / "heldout"))) == (2, 1)


def test_a_single_prompt_cannot_be_split(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", GSM8K[:1] * 5)
    with pytest.raises(DataError, match=r"1 distinct prompts .* nothing would be left"):
        run(tmp_path, file, heldout_fraction=0.2)


def test_text_file_is_one_document_or_pieces_that_join_to_it(tmp_path: Path) -> None:
    content = "".join(f"line {n}\n" for n in range(5000))
    file = tmp_path / "book.txt"
    file.write_text(content)
    assert texts(run(tmp_path, file) / "train") == [content + "<|end|>"]
    request = PrepareRequest(
        input=str(file), output=tmp_path / "cut", document_characters=1000, heldout_fraction=0.1
    )
    out = prepare(request)
    train, heldout = texts(out / "train"), texts(out / "heldout")
    assert len(heldout) == round(0.1 * (len(train) + len(heldout)))
    assert sum(len(text) - len("<|end|>") for text in train + heldout) == len(content)
    assert not (out / "heldout.jsonl").exists()


UNCLOSED = {"messages": [*problem("x")[:1], {"role": "assistant", "content": "<think>open"}]}


def test_rejects_are_counted_not_fatal(tmp_path: Path) -> None:
    rows = [{"messages": problem("a")}, UNCLOSED, {"messages": []}, {"messages": problem("b")}]
    out = run(tmp_path, write_jsonl(tmp_path / "in.jsonl", rows))
    manifest = Corpus.open(out / "train").manifest
    assert manifest.documents == 2
    assert manifest.rejects == {"no_messages": 1, "think_not_closed": 1}


def run_and_read(tmp_path: Path, file: Path, **settings: Any) -> list[str]:
    """Printed lines of a preparation, on a console narrower than they are."""
    console = Console(record=True, width=40, file=io.StringIO())
    request = PrepareRequest(input=str(file), output=tmp_path / "out[x]", **settings)
    prepare(request, console)
    return [line for line in console.export_text().splitlines() if line.strip()]


def test_the_end_says_what_was_made_and_what_was_left_out(tmp_path: Path) -> None:
    rows = [{"messages": problem("r", prompt=f"q {n}")} for n in range(10)]
    rows[2:2] = [UNCLOSED, {"messages": []}, UNCLOSED, UNCLOSED, UNCLOSED]
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    lines = run_and_read(tmp_path, file, heldout_fraction=0.2)
    train, heldout = (
        Corpus.open(tmp_path / "out[x]" / part).manifest for part in ("train", "heldout")
    )
    assert lines == [
        f"rejected {file}:3: think_not_closed (turn 1)",
        f"rejected {file}:4: no_messages",
        f"rejected {file}:5: think_not_closed (turn 1)",
        "rejected 2 more",
        f"{tmp_path / 'out[x]' / 'train'}: {train.documents} documents, {train.tokens} tokens, "
        f"{train.supervised_tokens} supervised; {heldout.documents} documents held out, "
        "5 rejected (no_messages 1, think_not_closed 4)",
    ]
    assert train.documents + heldout.documents == 10 and heldout.documents > 0
    assert 0 < train.supervised_tokens < train.tokens


def test_an_output_that_is_kept_is_told_apart(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", [*GSM8K, *GSM8K])
    (made,) = run_and_read(tmp_path, file)
    assert made.endswith("; 0 documents held out, 0 rejected")
    (kept,) = run_and_read(tmp_path, file)
    assert kept == f"{made}; kept as it was, made earlier from the same input and settings"


def test_more_rejected_than_kept_needs_permission(tmp_path: Path) -> None:
    good = {"messages": problem("a")}
    file = write_jsonl(tmp_path / "in.jsonl", [*[UNCLOSED] * 60, good, *[{"messages": []}] * 39])
    message = (
        r"in\.jsonl: 99 of 100 documents rejected \(no_messages 39, think_not_closed 60\), .*"
        r"--allow-rejects.*first: .*in\.jsonl:1: think_not_closed \(turn 1\)"
    )
    with pytest.raises(DataError, match=message):
        run_and_read(tmp_path, file)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.jsonl"]
    lines = run_and_read(tmp_path, file, allow_rejects=True)
    assert "99 rejected (no_messages 39, think_not_closed 60)" in lines[-1]
    with pytest.raises(DataError, match="99 of 100"):
        run_and_read(tmp_path, file)


def test_exactly_half_rejected_passes_and_one_more_does_not(tmp_path: Path) -> None:
    rows = [{"messages": problem("a")}, UNCLOSED]
    assert run(tmp_path, write_jsonl(tmp_path / "in.jsonl", rows)).is_dir()
    with pytest.raises(DataError, match="2 of 3 documents rejected"):
        run(tmp_path, write_jsonl(tmp_path / "in.jsonl", [*rows, UNCLOSED]), overwrite=True)
    assert len(texts(tmp_path / "out" / "train")) == 1


def test_the_command_takes_the_permission(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": problem("a")}, UNCLOSED, UNCLOSED]
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    words = ["data", "prepare", "--input", str(file), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "2 of 3 documents rejected" in capsys.readouterr().err
    assert main([*words, "--allow-rejects"]) == 0
    assert "1 documents" in capsys.readouterr().out


@pytest.mark.parametrize("allow_rejects", [False, True])
def test_nothing_but_rejects_is_an_error(tmp_path: Path, allow_rejects: bool) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", [{"messages": []}])
    message = r"no usable document for train among 1 rows.*first: .*in\.jsonl:1: no_messages"
    with pytest.raises(DataError, match=message):
        run(tmp_path, file, allow_rejects=allow_rejects)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.jsonl"]


def test_same_request_keeps_the_output_other_needs_overwrite(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", GSM8K)
    out = run(tmp_path, file)
    inode = (out / "prepare.json").stat().st_ino
    assert run(tmp_path, file) == out
    assert (out / "prepare.json").stat().st_ino == inode
    write_jsonl(file, GSM8K[:5])
    with pytest.raises(DataError, match=r"prepared differently \(input\).*overwrite"):
        run(tmp_path, file)
    assert len(texts(out / "train")) == 40
    run(tmp_path, file, overwrite=True)
    assert len(texts(out / "train")) == 5


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_directory_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    file = write_jsonl(tmp_path / "in.jsonl", GSM8K)
    with pytest.raises(DataError, match="was not made by data prepare"):
        run(tmp_path, file, overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


BAD_FILES = {
    "broken line": ("in.jsonl", b'{"text": "a"}\n{"text": \n', r"in\.jsonl:2: not valid JSON"),
    "bare value": ("in.jsonl", b'{"text": "a"}\n7\n', r"in\.jsonl:2: a JSON object .* found int"),
    "not utf-8": ("in.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"in\.jsonl:2: not UTF-8"),
    "missing field": (
        "in.jsonl",
        b'{"text": "a"}\n\n{"body": "b"}\n',
        r"in\.jsonl:3: missing field 'text'; the row has 'body'",
    ),
    "wrong type": ("in.jsonl", b'{"text": 7}\n', r"in\.jsonl:1: field 'text' is int, text expect"),
    "messages type": ("in.jsonl", b'{"messages": "hi"}\n', r":1: field 'messages' is not a list"),
    "no role": ("in.jsonl", b'{"messages": [{"content": "x"}]}\n', r":1: .*turn 0: no role"),
    "unknown fields": ("in.jsonl", b'{"body": "b"}\n', r"in\.jsonl:1: no known fields among 'bo"),
    "empty file": ("in.jsonl", b"", r"in\.jsonl: empty file"),
    "blank file": ("in.jsonl", b"\n \n", r"in\.jsonl: no rows"),
    "broken json": ("in.json", b'[{"text": "a"},\n {"text": }]', r"in\.json: .*line 2, column 11"),
    "empty array": ("in.json", b"[]", r"in\.json: no rows"),
    "array of numbers": ("in.json", b"[1]", r"in\.json: element 0: a JSON object"),
    "not parquet": ("in.parquet", b"PAR1 but no more", r"in\.parquet: cannot be read as parquet"),
    "not arrow": ("in.arrow", b"nothing of the kind", r"in\.arrow: cannot be read as arrow"),
    "binary text": ("in.txt", b"caf\xe9 au lait", r"in\.txt: not UTF-8"),
    "unknown suffix": ("in.docx", b"PK", r"in\.docx: unknown kind of file; accepted: \.jsonl"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_input_names_place_and_rule(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        run(tmp_path, tmp_path / name)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_missing_input_and_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        run(tmp_path, tmp_path / "absent.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder: no data file"):
        run(tmp_path, tmp_path / "folder")


def test_unknown_tokenizer_stops_before_reading(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", GSM8K)
    with pytest.raises(DataError, match=r"'\./none\.json': no such file"):
        run(tmp_path, file, tokenizer="./none.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_heldout_fraction_is_checked(tmp_path: Path, fraction: float) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", GSM8K)
    with pytest.raises(DataError, match="heldout_fraction is"):
        run(tmp_path, file, heldout_fraction=fraction)


@pytest.mark.parametrize(
    "fields",
    [FieldOverrides(prompt="a"), FieldOverrides(text="a", messages="b")],
)
def test_contradicting_field_names_are_refused(tmp_path: Path, fields: FieldOverrides) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", [{"a": "1", "b": "2"}])
    with pytest.raises(DataError, match="fields: "):
        run(tmp_path, file, fields=fields)
