"""A tokenizer's own chat template: what training sees is what it renders, sections exact."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoTokenizer

from zaya_train.config.errors import DataError
from zaya_train.data.chat import encode_conversations
from zaya_train.data.chat_template import compile_template
from zaya_train.data.corpus import Corpus
from zaya_train.data.inspect import inspect_corpus
from zaya_train.data.prepare import PrepareRequest, prepare
from zaya_train.data.sections import Kind, Rejected, RejectReason, Role, Sample
from zaya_train.data.tokenizer import Tokenizer, _hub_backend, load_tokenizer
from zaya_train.data.trim import Trimmed, trim

from .builders import problem, problems

if TYPE_CHECKING:
    from pathlib import Path

CHATML = (
    "{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# As published reasoning models do it: earlier reasoning dropped, white space trimmed, new lines
# around the reasoning, a system prompt of its own.
REASONER = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nBe good.<|im_end|>\\n' }}"
    "{%- endif %}{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}"
    "{%- set answer = m.content.split('</think>')[-1] | trim %}"
    "{%- if loop.last and '</think>' in m.content %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{{- '<think>\\n' + thought + '\\n</think>\\n\\n' + answer }}"
    "{%- else %}{{- answer }}{%- endif %}{{- '<|im_end|>\\n' }}"
    "{%- elif m.role == 'tool' %}{{- raise_exception('no tools here') }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
)
NO_TOOLS = "{%- if tools is not none or documents is not none %}{{- 'tools' }}{%- endif %}" + CHATML
GENERATION = CHATML.replace(
    "{{- '<|im_start|>' + m.role", "{%- set who = m.role %}{{- '<|im_start|>' + who"
).replace(
    "m.content + '<|im_end|>' + '\\n' }}",
    "'' }}{% generation %}{%- set who = 'me' %}{{- m.content + '<|im_end|>' }}\n"
    "    {% endgeneration %}{{- '\\n' if who == m.role }}",
)
JSON = (
    "{%- set object = {'b': '\u00e4<', 'a': [1]} %}"
    "{{- object | tojson }}{{- object | tojson(true) }}"
    "{{- object | tojson(indent=2, separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}"
) + CHATML
TWO_TURNS = [
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "<think>early</think>one"},
    *problem(" \nlate\n", answer="\n\ntwo", prompt="second <|im_end|>"),
]


def make(folder: Path, template: Any, jinja: str | None = None) -> Tokenizer:
    """The bytes tokenizer with ChatML's tokens and a template of its own."""
    tokenizer = load_tokenizer("bytes")
    tokenizer.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder.mkdir(exist_ok=True)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return load_tokenizer(str(folder))


def encode(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> Sample | Rejected:
    (sample,) = encode_conversations(tokenizer, [messages], compile_template(tokenizer))
    return sample


def parts(tokenizer: Tokenizer, sample: Sample | Rejected) -> list[tuple[str, str, str, bool]]:
    assert isinstance(sample, Sample), sample
    return [
        (
            tokenizer.decode(sample.tokens[row["start"] : row["end"]]),
            Role(row["role"]).name,
            Kind(row["kind"]).name,
            bool(row["supervised"]),
        )
        for row in sample.sections
    ]


def test_sections_of_chatml(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, CHATML)
    assert parts(tokenizer, encode(tokenizer, problem("sum"))) == [
        ("<|im_start|>user\n", "USER", "MARKUP", False),
        ("2+2?", "USER", "PROMPT", False),
        ("<|im_end|>", "USER", "MARKUP", False),
        ("\n<|im_start|>assistant\n", "ASSISTANT", "MARKUP", False),
        ("<think>", "ASSISTANT", "MARKUP", True),
        ("sum", "ASSISTANT", "REASONING", True),
        ("</think>", "ASSISTANT", "MARKUP", True),
        ("4", "ASSISTANT", "ANSWER", True),
        ("<|im_end|>", "ASSISTANT", "MARKUP", True),
        ("\n", "ASSISTANT", "MARKUP", False),
    ]


def test_sections_of_a_template_that_changes_white_space_and_drops_thoughts(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, REASONER)
    found = parts(tokenizer, encode(tokenizer, TWO_TURNS))
    assert found[0] == (
        "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\n",
        "USER",
        "MARKUP",
        False,
    )
    assert [part for part in found if part[3]] == [
        ("one", "ASSISTANT", "ANSWER", True),
        ("<|im_end|>", "ASSISTANT", "MARKUP", True),
        ("<think>", "ASSISTANT", "MARKUP", True),
        ("\n \nlate\n", "ASSISTANT", "REASONING", True),
        ("</think>", "ASSISTANT", "MARKUP", True),
        ("\n\ntwo", "ASSISTANT", "ANSWER", True),
        ("<|im_end|>", "ASSISTANT", "MARKUP", True),
    ]


@pytest.mark.parametrize("template", [CHATML, REASONER, NO_TOOLS, GENERATION, JSON])
@pytest.mark.parametrize("messages", [problem("sum"), problem(""), TWO_TURNS, TWO_TURNS[:2]])
def test_text_and_ids_are_those_of_transformers(
    tmp_path: Path, template: str, messages: list[dict[str, Any]]
) -> None:
    tokenizer = make(tmp_path, template)
    sample = encode(tokenizer, messages)
    assert isinstance(sample, Sample), sample
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert tokenizer.decode(sample.tokens) == theirs.apply_chat_template(messages, tokenize=False)
    if not any("<|im_end|>" in message["content"] for message in messages):
        ids = theirs.apply_chat_template(messages, return_dict=False)
        assert sample.tokens.tolist() == ids


VICUNA = (
    "{%- for m in messages %}{{- 'USER: ' + m.content if m.role == 'user' else "
    "' ASSISTANT: ' + m.content + '<|im_end|>' }}{%- endfor %}"
)


def test_a_turn_that_ends_without_a_special_token_takes_no_think_tag(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, VICUNA)
    messages = [*problem("sum"), *problem("more", "5", "2+3?")]
    assert parts(tokenizer, encode(tokenizer, messages))[:8] == [
        ("USER: ", "USER", "MARKUP", False),
        ("2+2?", "USER", "PROMPT", False),
        (" ASSISTANT: ", "USER", "MARKUP", False),
        ("<think>", "ASSISTANT", "MARKUP", True),
        ("sum", "ASSISTANT", "REASONING", True),
        ("</think>", "ASSISTANT", "MARKUP", True),
        ("4", "ASSISTANT", "ANSWER", True),
        ("<|im_end|>", "ASSISTANT", "MARKUP", True),
    ]


@pytest.mark.parametrize("user", ["USER: ", "USER (<think> first): "])
def test_an_earlier_turn_of_the_assistant_that_is_not_closed_is_rejected(
    tmp_path: Path, user: str
) -> None:
    only_last = VICUNA.replace("USER: ", user).replace(
        "'<|im_end|>'", "('<|im_end|>' if loop.last else '')"
    )
    tokenizer = make(tmp_path, only_last)
    assert isinstance(encode(tokenizer, problem("sum")), Sample)
    found = encode(tokenizer, [*problem("sum"), *problem("more")])
    assert isinstance(found, Rejected) and found.reason == RejectReason.TEMPLATE_MISMATCH
    assert "must end with a special token" in found.detail


@pytest.mark.parametrize(
    ("expression", "kind"),
    [
        ("1 // (m.content | length - 2)", "ZeroDivisionError"),
        ("'x' + (m.content | length)", "TypeError"),
        ("m.content.split('')", "ValueError"),
        ("'{a}'.format(b=1)", "KeyError"),
    ],
)
def test_an_expression_that_fails_on_a_conversation_rejects_it(
    tmp_path: Path, expression: str, kind: str
) -> None:
    """Two letters of a system prompt set it off, which the example has not."""
    text = "{%- for m in messages if m.role == 'system' %}{{- " + expression + " }}{%- endfor %}"
    tokenizer = make(tmp_path, text + CHATML)
    found = encode(tokenizer, [{"role": "system", "content": "ab"}, *problem("sum")])
    assert isinstance(found, Rejected) and found.reason == RejectReason.TEMPLATE_REFUSED
    assert found.detail.startswith(f"{kind}: ")
    assert isinstance(encode(tokenizer, problem("sum")), Sample)


def test_a_quoted_special_token_stays_text(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, CHATML)
    sample = encode(tokenizer, TWO_TURNS)
    assert isinstance(sample, Sample)
    (end,) = tokenizer.markup_ids("<|im_end|>")
    assert (sample.tokens == end).sum() == len(TWO_TURNS)


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make(tmp_path_factory.mktemp("reasoner"), REASONER)


@given(reasoning=st.text(alphabet="ab \n<>", max_size=30), answer=st.text(min_size=1))
def test_any_text_comes_back_or_is_rejected_by_code(
    reasoner: Tokenizer, reasoning: str, answer: str
) -> None:
    sample = encode(reasoner, problem(reasoning, answer))
    if isinstance(sample, Rejected):
        assert not answer.strip() or "\ue000" in answer or "think>" in answer + reasoning
        return
    found = parts(reasoner, sample)
    thought = [text for text, _, kind, _ in found if kind == "REASONING"]
    assert "".join(thought).strip() == reasoning.strip()
    said = [text for text, _, kind, _ in found if kind == "ANSWER"]
    assert "".join(said).strip() == answer.strip()


def test_trimming_keeps_the_answer_and_the_budget(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, REASONER)
    sample = encode(tokenizer, problem("r" * 300, answer="forty-two"))
    assert isinstance(sample, Sample)
    kept = trim(sample, 150)
    assert isinstance(kept, Trimmed) and kept.length == 150
    text = tokenizer.decode(kept.tokens(sample))
    assert text.endswith("</think>\n\nforty-two<|im_end|>\n") and "<think>\nrrr" in text


TOOL = [*problem("x")[:1], {"role": "tool", "content": "42"}, *problem("y")[1:]]


def test_what_the_template_refuses_or_changes_is_rejected_by_code(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, REASONER)
    refused = encode(tokenizer, TOOL)
    assert refused == Rejected(RejectReason.TEMPLATE_REFUSED, "no tools here")
    twice = [
        *problem("x")[:1],
        {"role": "assistant", "content": "<think>a</think>b<think>c</think>d"},
    ]
    changed = encode(tokenizer, twice)
    assert isinstance(changed, Rejected) and changed.reason == RejectReason.TEMPLATE_MISMATCH
    edits = make(tmp_path / "edits", CHATML.replace("m.content", "m.content.replace('q', 'b')"))
    assert isinstance(encode(edits, problem("x", "y", "z")), Sample)
    changed = encode(edits, problem("x", "quoted", "z"))
    assert isinstance(changed, Rejected) and "changed" in changed.detail


BAD = {
    "no template": (None, r"no chat_template in tokenizer_config\.json"),
    "syntax": ("{% for %}", r"tokenizer_config\.json: chat template, line 1: "),
    "refuses": ("{{ raise_exception('never') }}", r"template_refused \(never\) of an example"),
    "fixed": ("same for all<|im_end|>", r"template_mismatch \(a part is missing"),
    "changes": (
        CHATML.replace("m.content", "m.content[:1] + m.content"),
        r"template_mismatch \(",
    ),
    "no end": (
        CHATML.replace("<|im_end|>", "STOP"),
        r"must end with a special token of the tokenizer, this one ends with 'STOP\\n'",
    ),
    "of the day": (
        "{{ strftime_now('%Y') }}" + CHATML,
        r"template_refused \('strftime_now' is undefined",
    ),
    "fails": ("{{ 1 // 0 }}", r"template_refused \(ZeroDivisionError: .* of an example"),
    "other tags": (
        CHATML.replace("m.content", "m.content | replace('think>', 'thought>')"),
        r"between think tags .* it makes answer 'think</thought>say'",
    ),
    "unknown function": ("{{ nothing_here() }}", r"template_refused \('nothing_here' is undefined"),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_templates_name_file_and_rule(tmp_path: Path, case: str) -> None:
    template, message = BAD[case]
    tokenizer = make(tmp_path / "t", template)
    with pytest.raises(DataError, match=message) as caught:
        compile_template(tokenizer)
    assert str(tmp_path / "t") in str(caught.value) and "\n" not in str(caught.value)


def test_where_templates_are_found(tmp_path: Path) -> None:
    other = [{"name": "rag", "template": "no"}, {"name": "default", "template": CHATML}]
    assert make(tmp_path / "a", other).own_template == make(tmp_path / "a", CHATML).own_template
    found = make(tmp_path / "b", "in the configuration", jinja=CHATML).own_template
    assert found is not None and found.text == CHATML and found.file.endswith(".jinja")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: chat_template: a text or a list"):
        make(tmp_path / "c", ["x"])
    (tmp_path / "b" / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(str(tmp_path / "b"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_files_that_are_no_text_are_named_with_the_offset(tmp_path: Path, name: str) -> None:
    make(tmp_path, CHATML, jinja=CHATML)
    (tmp_path / name).write_bytes(b"{\n" + "\u00e4".encode("latin-1") + b"}")
    with pytest.raises(DataError, match=rf"{name}: offset 2: not UTF-8: "):
        load_tokenizer(str(tmp_path))


def test_tokens_that_the_tokenizer_does_not_name_render_as_nothing(tmp_path: Path) -> None:
    """Whoever renders it: one process, several, or transformers from what is stored."""
    template = CHATML + "{{- eos_token }}{{- pad_token }}"
    make(tmp_path / "t", template)
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"messages": problem("sum")}) + "\n")
    settings: dict[str, Any] = {"input": str(file), "tokenizer": str(tmp_path / "t")}
    expected = (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>sum</think>4<|im_end|>\n"
    )
    for workers in (1, 2):
        out = tmp_path / str(workers)
        prepare(PrepareRequest(output=out, workers=workers, own_template=True, **settings))
        corpus = Corpus.open(out / "train")
        assert corpus.tokenizer.decode(corpus.tokens(0)) == expected
        stored = AutoTokenizer.from_pretrained(str(corpus.tokenizer_path))
        assert stored.apply_chat_template(problem("sum"), tokenize=False) == expected


def test_padding_is_named_where_a_template_does_not_ask(tmp_path: Path) -> None:
    make(tmp_path, CHATML).save(tmp_path / "saved")
    stored = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert (stored.pad_token, stored.eos_token) == ("<|pad|>", "<|im_end|>")


def test_plain_text_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "t", CHATML)
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    request = PrepareRequest(
        input=str(tmp_path / "in.jsonl"),
        output=tmp_path / "out",
        tokenizer=str(tmp_path / "t"),
        own_template=True,
    )
    with pytest.raises(DataError, match=r"in\.jsonl:1: plain text has no chat template"):
        prepare(request)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_stores_and_inspect_shows_it(tmp_path: Path, workers: int) -> None:
    make(tmp_path / "t", REASONER)
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in problems(9)))
    settings: dict[str, Any] = {"input": str(file), "tokenizer": str(tmp_path / "t")}
    shipped = prepare(PrepareRequest(output=tmp_path / "shipped", **settings))
    settings |= {"own_template": True, "workers": workers}
    out = prepare(PrepareRequest(output=tmp_path / "out", **settings))
    with pytest.raises(DataError, match=r"prepared differently \(own_template\)"):
        prepare(PrepareRequest(output=shipped, **settings))
    assert prepare(PrepareRequest(output=out, **settings)) == out
    corpus = Corpus.open(out / "train", verify="hashes")
    stored = AutoTokenizer.from_pretrained(str(corpus.tokenizer_path))
    assert stored.chat_template == REASONER and stored.eos_token == "<|im_end|>"
    for number, messages in enumerate(problems(9)):
        text = stored.apply_chat_template(messages, tokenize=False)
        assert corpus.tokenizer.decode(corpus.tokens(number)) == text
    console = Console(record=True, width=120, color_system=None)
    inspect_corpus(out / "train", 0, 120, console)
    shown = console.export_text()
    assert "<|im_start|>assistant" in shown and "</think>" in shown and "reasoning" in shown


TOKENS = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


def test_a_template_may_name_every_token_that_transformers_gives_it(tmp_path: Path) -> None:
    names = "".join(f"{{{{- {kind}_token }}}}" for kind in TOKENS)
    make(tmp_path, names + CHATML)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # Strings of ordinary text: a template only pastes them.
    config |= {f"{kind}_token": f"<|{marker}|>" for kind, marker in zip(TOKENS, NAMED, strict=True)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    sample = encode(tokenizer, problem("sum"))
    assert isinstance(sample, Sample), sample
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    rendered = theirs.apply_chat_template(problem("sum"), tokenize=False)
    assert isinstance(rendered, str)
    assert rendered.startswith("".join(f"<|{marker}|>" for marker in NAMED))
    assert tokenizer.decode(sample.tokens) == rendered
    tokenizer.save(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert saved.apply_chat_template(problem("sum"), tokenize=False) == rendered


NAMED = ("im_start", "im_end", "pad", "tool", "system", "user", "end")


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    """In a file they are a list; what transformers loads, from the hub too, has them by name."""
    named = [
        {"name": "tool_use", "template": "{{- 'tools' }}"},
        {"name": "default", "template": CHATML},
    ]
    make(tmp_path, named)
    assert isinstance(AutoTokenizer.from_pretrained(str(tmp_path)).chat_template, dict)
    from_file, (_, loaded) = load_tokenizer(str(tmp_path)).own_template, _hub_backend(str(tmp_path))
    assert from_file is not None and loaded is not None
    assert from_file.text == loaded.text == CHATML
    make(tmp_path / "none", named[:1])
    assert _hub_backend(str(tmp_path / "none"))[1] is None
