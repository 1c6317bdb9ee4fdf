"""Commands that stand in the pages, held against the program: the real parser takes their words,
and Hydra composes their overrides. Nothing is run."""

from __future__ import annotations

import argparse
import re
import shlex
from functools import cache
from typing import TYPE_CHECKING

import pytest

from tests.helpers.paths import REPOSITORY
from zaya_train.config.check import check
from zaya_train.main import _parser, compose, compose_submission

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

READERS_OWN = {"model=mine": "model=zaya1_8b", "cluster=mysite": "cluster=mi300x_pollara"}
"""Configuration files that a reader makes on the way, and shipped ones that stand for them."""
_TUTORIALS_RECIPE = "recipe=mine"
OTHERS = frozenset(
    {"source", "git", "docker", "apptainer", "tensorboard", "wandb", "scancel", "squeue", "sbatch"}
    | {"cat", "head", "tail", "grep", "ls", "cp", "mkdir", "rm", "echo", "kill", "wait", "sleep"}
    | {"cd", "du", "test"}
)
"""Programs that are not ours and whose words are nobody's business here."""
_NODE = 8
"""Ranks that launch/torchrun.sh starts on the machines the pages speak of."""
_HYDRA_FLAGS = ("--cfg", "--multirun", "--help", "-m", "-h", "--resolve", "--package")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*=")


class WrongCommandError(AssertionError):
    """A command of a page that the program would not take, with the reason."""


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of every simple command of a block; here-documents are skipped."""
    lines = iter(text.replace("\\\n", " ").splitlines())
    for line in lines:
        words = _words(line)
        if "<<" in words:
            end = words[words.index("<<") + 1]
            while next(lines, end) != end:
                pass
            words = words[: words.index("<<")]
        command: list[str] = []
        for word in [*words, ";"]:
            if word in ("&&", "||", ";", "|", "&"):
                if command:
                    yield command
                command = []
            elif not (_VARIABLE.match(word) and not command):
                command.append(word)


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    if words[:1] == ["for"]:
        return []
    words = [word for word in words if word not in ("do", "done", "until", "while", "!")]
    # What is redirected where is the shell's business.
    for i in reversed(range(len(words))):
        if words[i] in (">", ">>", "<", "&>", ">&"):
            del words[i : i + 2]
    return words


def hold(words: Sequence[str]) -> None:
    """WrongCommandError unless the program takes this command."""
    name, *rest = words
    if name == "$":
        return hold(rest)
    if name == "zaya":
        return _zaya(rest)
    if name.endswith("python") or name == "torchrun":
        return _python(rest, is_torchrun=name == "torchrun")
    if name == "launch/torchrun.sh":
        return _zaya(rest if rest[:1] in (["train"], ["preflight"]) else ["train", *rest], _NODE)
    if name == "make":
        return _make(rest)
    if name.startswith((".venv/bin/", "launch/", "kernels/")):
        return _need(name.startswith(".venv/") or (REPOSITORY / name).exists(), f"no file {name}")
    _need(name in OTHERS, f"{name}: unknown program; a new one goes into shell_words.OTHERS")


def _need(is_so: bool, reason: str) -> None:
    if not is_so:
        raise WrongCommandError(reason)


def _make(words: Sequence[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    known = re.findall(r"\b([A-Z_]+)=", (REPOSITORY / "Makefile").read_text())
    for word in words:
        key, found, _ = word.partition("=")
        _need(key in (known if found else targets), f"make {word}: no such target or variable")


def _python(words: Sequence[str], is_torchrun: bool) -> None:
    if "-m" in words:
        module, *rest = words[words.index("-m") + 1 :]
        if module == "zaya_train":
            ranks = int(words[words.index("--nproc-per-node") + 1]) if is_torchrun else 1
            return _zaya(rest, ranks)
        if module in ("pytest", "sphinx"):
            paths = [word for word in rest if "/" in word]
            missing = [path for path in paths if not (REPOSITORY / path.split("::")[0]).exists()]
            return _need(not missing, f"no file {missing}")
        path = REPOSITORY / (module.replace(".", "/") + ".py")
    else:
        _need(not is_torchrun, "torchrun of something else than -m zaya_train")
        if words[0] == "-c":
            return
        path, rest = REPOSITORY / words[0], list(words[1:])
    _need(path.is_file(), f"no script {path.name}")
    source = path.read_text()
    for flag in (word for word in rest if word.startswith("--")):
        _need(f'"{flag}"' in source, f"{path.name} has no {flag}")


def _zaya(words: Sequence[str], ranks: int = 1) -> None:
    """`ranks`: of the launch; the commands that have a flag for it are told otherwise."""
    words = [READERS_OWN.get(word, word) for word in words]
    if _TUTORIALS_RECIPE in words:
        # Composed where it exists: in the nightly walk through the tutorial.
        if words[0] != "train":
            parse(words)
        return
    if words[:1] == ["train"]:
        if words[1:2] != ["--frozen"]:
            _compose(tuple(_overrides(words[1:])), ranks)
        return
    options = parse(words)
    if words[0] == "submit":
        submit, rest = compose_submission(options.words)
        _compose(tuple(rest), submit.nodes * submit.tasks_per_node)
    elif hasattr(options, "overrides"):
        overrides = options.overrides[words[:2] == ["plan", "phases"] :]
        if words[0] == "smoke":
            overrides = ["recipe=smoke_cpu", *overrides]
        if words[0] in ("plan", "supervise"):
            ranks = options.ranks * getattr(options, "nodes", 1)
        elif words[0] in ("doctor", "smoke"):
            # Ranks of the shrunk run, and of miniature phases that fit any number.
            ranks = 0
        _compose(tuple(overrides), ranks)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Options of the real parser."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            argparse.ArgumentParser, "_print_message", lambda *given: said.append(given[1])
        )
        try:
            return _parser().parse_args(list(words))
        except SystemExit as stop:
            raise WrongCommandError(said[-1].strip() if said else f"exit {stop.code}") from stop


def _overrides(words: Sequence[str]) -> Iterator[str]:
    """Without Hydra's own flags; of the choices of a sweep the first."""
    is_sweep = "--multirun" in words or "-m" in words
    rest = iter(words)
    for word in rest:
        if word == "--cfg":
            next(rest)
        elif word not in _HYDRA_FLAGS:
            yield word.split(",")[0] if is_sweep else word


@cache
def _compose(overrides: tuple[str, ...], ranks: int = 0) -> None:
    config = compose(list(overrides))
    if ranks:
        check(config, ranks)


@cache
def flags_of(command: tuple[str, ...]) -> frozenset[str]:
    """Flags of `zaya COMMAND`; KeyError where there is no such command."""
    parser: argparse.ArgumentParser = _parser()
    for word in command:
        parser = _subparsers(parser)[word]
    return frozenset(flag for action in parser._actions for flag in action.option_strings)


def has_commands(command: tuple[str, ...]) -> bool:
    """Whether another word must follow, as after `zaya data`."""
    parser: argparse.ArgumentParser = _parser()
    for word in command:
        parser = _subparsers(parser)[word]
    return bool(_subparsers(parser))


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return {
        name: choice
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, choice in action.choices.items()
    }


def mentioned(text: str) -> None:
    """WrongCommandError where a `zaya ...` in running text, which may leave words out, names a
    command or a flag that is not there, or an override that does not compose."""
    words = [word.strip("[],") for word in text.split()[1:]]
    command: tuple[str, ...] = ()
    while words and has_commands(command):
        # `submit | env | preflight` lists several.
        name = words.pop(0)
        if not re.fullmatch(r"[a-z][a-z-]+", name):
            return
        try:
            flags_of((*command, name))
        except KeyError as error:
            raise WrongCommandError(f"no command zaya {' '.join((*command, name))}") from error
        command = (*command, name)
    for flag in (word.split("=")[0] for word in words if word.startswith("--")):
        known = flags_of(command) | {*_HYDRA_FLAGS, "--frozen"}
        _need(flag in known, f"zaya {' '.join(command)} has no {flag}")
