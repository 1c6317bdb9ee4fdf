"""The style budget of CONTRIBUTING.md, measured on every file.

Each rule is a function from source text to findings, so that a planted offence can be shown to be
caught. Offending words are put together from parts here, for this file is judged too.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
from collections import Counter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

MAX_FUNCTION_LINES = 120
MAX_MEDIAN_LINES = 20
MAX_ARGUMENTS = 8
MAX_FILE_LINES = 400
MAX_KERNEL_FILE_LINES = 600
NO_INIT = ("kernels", "configs", "launch", "docker")  # would shadow PyPI packages of these names

# file -> (handlers, why one that catches anything is right there); anywhere else it is an error.
BROAD_EXCEPTS = {
    "zaya_train/runtime/dist.py": (1, "fail fast: says why, then ends the process"),
    "zaya_train/data/prefetch.py": (1, "hands the error to the consuming thread, which raises it"),
    "zaya_train/data/tokenizer.py": (
        1,
        "the tokenizers library raises bare Exception on a bad file",
    ),
}

SOURCE = [*REPOSITORY.glob("zaya_train/**/*.py"), *REPOSITORY.glob("kernels/**/*.py")]
PYTHON = [*SOURCE, *REPOSITORY.glob("tests/**/*.py")]

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions_of(source: str) -> list[Function]:
    """Every function and method, nested ones too."""
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]


def lines_of(function: Function) -> int:
    """Lines from `def` to the last one; decorators are not counted."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def long_functions(source: str) -> list[str]:
    return [
        f"{f.lineno}: {f.name} has {lines_of(f)} lines"
        for f in functions_of(source)
        if lines_of(f) > MAX_FUNCTION_LINES
    ]


def wide_functions(source: str) -> list[str]:
    """Functions with too many arguments, self and cls aside.

    Not judged: forward of an autograd.Function (its signature is the operation's) and Triton
    kernels (pointers, strides and constants cannot be bundled).
    """
    tree = ast.parse(source)
    exempt = {
        id(method)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any("Function" in ast.unparse(base) for base in node.bases)
        for method in node.body
        if isinstance(method, Function) and method.name == "forward"
    }
    found = []
    for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
        count = len(argument_names(function))
        if count > MAX_ARGUMENTS and id(function) not in exempt and not is_kernel(function):
            found.append(f"{function.lineno}: {function.name} takes {count} arguments")
    return found


def is_kernel(function: Function) -> bool:
    """Whether Triton compiles the function; its language has no annotations of types."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)


def argument_names(function: Function) -> list[str]:
    every = function.args
    names = [argument.arg for argument in (*every.posonlyargs, *every.args, *every.kwonlyargs)]
    names += [extra.arg for extra in (every.vararg, every.kwarg) if extra]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def missing_return_types(source: str) -> list[str]:
    return [
        f"{f.lineno}: {f.name}"
        for f in functions_of(source)
        if f.returns is None and not is_kernel(f)
    ]


def broad_excepts(source: str) -> list[str]:
    """Handlers that catch anything: bare, Exception or BaseException, alone or in a tuple.

    One that tidies up and ends in a plain `raise` hides nothing and is not counted.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and not _raises_again(node):
            kinds = re.findall(r"\w+", ast.unparse(node.type)) if node.type else ["BaseException"]
            if {"Exception", "BaseException"} & set(kinds):
                found.append(f"{node.lineno}: broad except")
    return found


def _raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def prints(source: str) -> list[str]:
    return [
        f"{node.lineno}: print"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


def global_statements(source: str) -> list[str]:
    tree = ast.walk(ast.parse(source))
    return [f"{node.lineno}: global" for node in tree if isinstance(node, ast.Global)]


def non_ascii(text: str) -> list[str]:
    lines = enumerate(text.splitlines(), start=1)
    return [f"{number}: {line.strip()[:60]!a}" for number, line in lines if not line.isascii()]


def unfinished_marks(text: str) -> list[str]:
    words = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b")
    lines = enumerate(text.splitlines(), start=1)
    return [f"{number}: {line.strip()[:60]}" for number, line in lines if words.search(line)]


def machine_paths(text: str) -> list[str]:
    """Absolute paths below homes, work and temporary directories; /opt, /dev, /etc are no one's."""
    path = re.compile(r"(?<![\w.~$}*-])/(?:home|root|Users|work|tmp|farm|mnt|scratch)/[\w.-]+")
    lines = enumerate(text.splitlines(), start=1)
    return [f"{number}: {hit.group()}" for number, line in lines for hit in path.finditer(line)]


def oversized(path: str, text: str) -> list[str]:
    limit = MAX_KERNEL_FILE_LINES if path.startswith("kernels/") else MAX_FILE_LINES
    count = len(text.splitlines())
    return [f"{count} lines, at most {limit}"] if count > limit else []


def judge(paths: list[Path], rule: str) -> list[str]:
    """`file:finding` for every finding of the named rule."""
    find = globals()[rule]
    return [
        f"{path.relative_to(REPOSITORY)}:{finding}"
        for path in paths
        for finding in find(path.read_text(encoding="utf-8"))
    ]


def tracked_text_files() -> list[Path]:
    """Files git tracks, or would, that hold text; LICENSE's words are not ours."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("needs a git checkout to know which files are the project's")
    paths = [REPOSITORY / line for line in listed.stdout.splitlines()]
    return [
        path
        for path in paths
        if path.is_file() and b"\0" not in path.read_bytes()[:4096] and path.name != "LICENSE"
    ]


@pytest.mark.parametrize(
    "rule",
    ["long_functions", "wide_functions", "missing_return_types", "prints", "global_statements"],
)
def test_source_keeps_the_budget(rule: str) -> None:
    assert judge(SOURCE, rule) == []


def test_functions_are_short_on_the_whole() -> None:
    lengths = [lines_of(f) for path in SOURCE for f in functions_of(path.read_text("utf-8"))]
    assert statistics.median(lengths) <= MAX_MEDIAN_LINES


def test_files_are_short() -> None:
    found = []
    for path in SOURCE:
        name = path.relative_to(REPOSITORY).as_posix()
        found += [f"{name}: {what}" for what in oversized(name, path.read_text("utf-8"))]
    assert found == []


def test_broad_excepts_stay_where_they_are_justified() -> None:
    found = Counter(finding.split(":")[0] for finding in judge(SOURCE, "broad_excepts"))
    assert found == {path: count for path, (count, _) in BROAD_EXCEPTS.items()}


@pytest.mark.parametrize("rule", ["non_ascii", "unfinished_marks"])
def test_all_python_is_ascii_and_finished(rule: str) -> None:
    assert judge(PYTHON, rule) == []


def test_no_tracked_file_names_a_machine_path() -> None:
    assert judge(tracked_text_files(), "machine_paths") == []


@pytest.mark.parametrize("directory", NO_INIT)
def test_directories_that_must_not_become_packages(directory: str) -> None:
    assert (REPOSITORY / directory).is_dir()
    assert not (REPOSITORY / directory / "__init__.py").exists()


def test_the_walk_sees_the_tree() -> None:
    names = {path.relative_to(REPOSITORY).as_posix() for path in PYTHON}
    assert {"zaya_train/config/schema.py", "kernels/zaya_kernels/__init__.py"} <= names
    assert "tests/unit/test_style.py" in names


BODY = "\n".join(f"    a{number} = {number}" for number in range(MAX_FUNCTION_LINES))
NINE = ", ".join(f"a{number}: int" for number in range(9))
HOME = "/ho" + "me/someone/data"


@pytest.mark.parametrize(
    ("rule", "offence"),
    [
        ("long_functions", f"def f() -> None:\n{BODY}\n"),
        ("long_functions", f"class A:\n  async def f(self) -> None:\n{BODY}\n"),
        ("wide_functions", f"def f({NINE}) -> None: ..."),
        ("wide_functions", f"class A:\n  def f(self, {NINE}) -> None: ..."),
        ("wide_functions", f"class A(Module):\n  def forward(self, {NINE}) -> None: ..."),
        ("wide_functions", "def f(a, b, c, d, e, f, g, *h, **i) -> None: ..."),
        ("wide_functions", "def f(a, b, c, d, e, /, f, *, g, h, i) -> None: ..."),
        ("missing_return_types", "def f(): ..."),
        ("missing_return_types", "def f() -> None:\n  def g(): ..."),
        ("missing_return_types", "@torch.jit.script\ndef f(): ..."),
        ("wide_functions", f"@numba.jit\ndef f({NINE}) -> None: ..."),
        ("broad_excepts", "try: f()\nexcept Exception as error: g()"),
        ("broad_excepts", "try: f()\nexcept (ValueError, BaseException): g()"),
        ("broad_excepts", "try: f()\nexcept: g()"),
        ("broad_excepts", "try: f()\nexcept Exception as e:\n  raise ValueError from e"),
        ("broad_excepts", "try: f()\nexcept Exception:\n  if g(): raise"),
        ("broad_excepts", "try: f()\nexcept builtins.Exception: g()"),
        ("prints", "def f() -> None:\n    print('hello')"),
        ("global_statements", "def f() -> None:\n    global x\n    x = 1"),
        ("non_ascii", "a = 'caf" + chr(233) + "'"),
        ("unfinished_marks", "# TO" + "DO: later"),
        ("unfinished_marks", "x = 1  # FIX" + "ME"),
        ("machine_paths", f"root = '{HOME}'"),
        ("machine_paths", f"cd {HOME}"),
        ("machine_paths", "open('/t" + "mp/cache')"),
    ],
)
def test_a_planted_offence_is_caught(rule: str, offence: str) -> None:
    assert len(globals()[rule](offence)) == 1


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("long_functions", f"def f() -> None:\n{BODY.rsplit(chr(10), 1)[0]}\n"),
        ("wide_functions", "def f(a, b, c, d, e, f, g, h) -> None: ..."),
        ("wide_functions", "class A:\n  def f(self, a, b, c, d, e, f, g, h) -> None: ..."),
        ("wide_functions", f"class A(autograd.Function):\n  def forward(ctx, {NINE}) -> None: ..."),
        ("wide_functions", f"@triton.jit\ndef kernel({NINE}) -> None: ..."),
        ("missing_return_types", "@triton.jit\ndef kernel(x): ..."),
        ("broad_excepts", "try: f()\nexcept (OSError, CheckpointException): g()"),
        ("broad_excepts", "try: f()\nexcept BaseException:\n  g()\n  raise"),
        ("prints", "console.print('hello')"),
        ("unfinished_marks", "todos = 3"),
        ("machine_paths", "runs/work/a.txt and ${ROOT}/tmp/x and https://host.org/home/page"),
        ("machine_paths", "/opt/rocm/bin /dev/shm /proc/self"),
    ],
)
def test_what_is_allowed_is_let_through(rule: str, text: str) -> None:
    assert globals()[rule](text) == []


def test_kernel_files_may_be_longer() -> None:
    text = "\n" * 500
    assert oversized("zaya_train/run.py", text) and not oversized("kernels/a.py", text)
    assert oversized("kernels/a.py", "\n" * 601)
