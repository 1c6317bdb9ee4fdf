"""Which way imports may point: every import of the package, nested ones too, is parsed and judged.

The table is the architecture's: kernels <- model <- parallel <- train <- run <- main, with config
below everything, optim on kernels and the collectives, data and phases on config, hub on model,
planning on all that can be counted without ranks (docs/decisions/0013), and tools above all,
imported by commands alone, late (docs/decisions/0007). `runtime.files` is a leaf below data, hub
and train.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = {"zaya_train": "zaya_train", "zaya_kernels": "kernels/zaya_kernels"}

LEAF = "runtime.files"
"""Imported by rooms above and below; must itself import nothing but the standard library and
`config` (docs/decisions/0005)."""

# room -> what it may import of ours, besides itself; a dotted entry means that module alone.
ALLOWED: dict[str, set[str]] = {
    "zaya_train": set(),
    "config": set(),
    "zaya_kernels": {"config"},
    "model": {"config", "zaya_kernels"},
    "parallel": {"config", "zaya_kernels", "model"},
    "optim": {"config", "zaya_kernels", "parallel.collectives"},
    "data": {"config", LEAF},
    "phases": {"config"},
    "hub": {"config", "model", LEAF},
    "runtime": {"config"},
    "train": {"config", "zaya_kernels", "model", "parallel", "optim", "phases", LEAF},
}
ALLOWED["planning"] = {
    "config", "zaya_kernels", "model", "parallel", "optim", "phases", "runtime.peaks",
    "runtime.versions", LEAF,
}  # fmt: skip
ALLOWED["context"] = {*ALLOWED} - {"zaya_train"}
ALLOWED["run"] = {*ALLOWED} - {"zaya_train"}
ALLOWED["tools"] = {*ALLOWED, "zaya_train"}
ALLOWED["plan_arguments"] = {"config"}
ALLOWED["arguments"] = {"config", "plan_arguments"}
ALLOWED["model_arguments"] = {"config", "arguments"}
ALLOWED["model_commands"] = {*ALLOWED}
ALLOWED["commands"] = {*ALLOWED} - {"model_commands"}
ALLOWED["main"] = {*ALLOWED}
ALLOWED["__main__"] = {"main", "config"}

MAY_IMPORT_LATE = {"main", "commands", "model_commands"}
ONLY_IN_MAIN = {"hydra", "omegaconf"}
_KERNELS = ("triton", "triton_kernels", "triton_backward")
ONLY_IN_FILES = {
    "triton": _KERNELS,
    "transformer_engine": ("transformer_engine",),
    "flash_attn": ("libraries",),
    "aiter": ("libraries",),
}
"""Optional package -> names of the files that may import it."""


def imports_of(tree: ast.Module, package: str) -> list[tuple[str, int, bool]]:
    """(module, line, nested in a function) of every import, relative ones made absolute.

    `from a import b` counts as a.b, which is right for modules and harmless for names.
    `import_module("a")` and `__import__("a")` count as well.
    """
    nested = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    found: list[tuple[str, int, bool]] = []
    for node in ast.walk(tree):
        for name in _imported(node, package):
            found.append((name, getattr(node, "lineno", 0), id(node) in nested))
    return found


def _imported(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*(parents if node.level else []), *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = ast.unparse(node.func).rsplit(".", 1)[-1]
        if called in ("import_module", "__import__"):
            return [str(node.args[0].value)]
    return []


def room_of(module: str) -> str:
    """`zaya_train.model.cca` -> model; `zaya_kernels.cca.op` -> zaya_kernels."""
    parts = module.split(".")
    return parts[1] if parts[0] == "zaya_train" and len(parts) > 1 else parts[0]


def is_ours(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


def allowed_inside(room: str, target: str) -> bool:
    """Whether code in `room` may import our module `target`."""
    if target.startswith("zaya_train.") and room_of(target) not in ALLOWED:
        # A name of the package itself, such as zaya_train.__version__.
        return "zaya_train" in ALLOWED[room]
    below = target.removeprefix("zaya_train.")
    rooms = ALLOWED[room] | {room}
    return any(below == entry or below.startswith(entry + ".") for entry in rooms)


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """Every import of one module that points the wrong way, as `line: reason`."""
    room = room_of(module)
    package = module if is_package else module.rpartition(".")[0]
    if room not in ALLOWED:
        return [f"0: `{room}` is no room of the architecture"]
    is_leaf = module == f"zaya_train.{LEAF}"
    found = []
    for target, line, nested in imports_of(ast.parse(source), package):
        top = target.split(".")[0]
        if is_ours(target):
            if not allowed_inside(room, target) or (is_leaf and room_of(target) != "config"):
                found.append(f"{line}: {room} must not import {target}")
            elif nested and room not in MAY_IMPORT_LATE and not _is_triton(target):
                found.append(f"{line}: {target} is imported inside a function")
        elif (room == "config" or is_leaf) and top not in sys.stdlib_module_names:
            where = LEAF if is_leaf else room
            found.append(f"{line}: {where} imports only the standard library, not {top}")
        elif top in ONLY_IN_MAIN and module != "zaya_train.main":
            found.append(f"{line}: {top} belongs in main.py")
        elif top in ONLY_IN_FILES and not _may_import(module, top):
            found.append(f"{line}: {top} belongs in files named {ONLY_IN_FILES[top][0]}.py")
    return found


def _may_import(module: str, package: str) -> bool:
    """Files of that package's own; Triton also the workshop, which interprets and compiles."""
    leaf = module.rsplit(".", 1)[-1]
    workshop = package == "triton" and module.startswith("zaya_kernels.workshop.")
    return leaf in ONLY_IN_FILES[package] or workshop


def _is_triton(target: str) -> bool:
    """Kernels whose compiler is an extra may be imported late, by the name that chooses them."""
    return "triton" in target.split(".")


def modules_below(root: Path) -> list[tuple[str, Path]]:
    """(module name, file) of every Python file of both packages."""
    found = []
    for package, directory in PACKAGES.items():
        for path in sorted((root / directory).rglob("*.py")):
            parts = path.relative_to(root / directory).with_suffix("").parts
            names = parts[:-1] if parts[-1] == "__init__" else parts
            found.append((".".join([package, *names]), path))
    return found


def all_violations(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{reason}"
        for module, path in modules_below(root)
        for reason in violations(
            module, path.read_text(encoding="utf-8"), path.name == "__init__.py"
        )
    ]


def test_every_import_points_the_allowed_way() -> None:
    assert all_violations(REPOSITORY) == []


def test_every_file_is_parsed() -> None:
    parsed = {path for _, path in modules_below(REPOSITORY)}
    for directory in ("zaya_train", "kernels/zaya_kernels"):
        assert parsed >= set((REPOSITORY / directory).rglob("*.py"))
    modules = [module for module, _ in modules_below(REPOSITORY)]
    assert "zaya_train.config.schema" in modules and "zaya_kernels" in modules
    assert {room_of(module) for module in modules} <= set(ALLOWED)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("zaya_train.model.cca", "from zaya_train.parallel.mesh import Mesh"),
        ("zaya_train.model.cca", "import zaya_train.parallel.mesh"),
        ("zaya_train.model.cca", "from zaya_train import parallel"),
        ("zaya_train.model.cca", "from ..parallel import mesh"),
        ("zaya_train.model.cca", "from .. import parallel"),
        ("zaya_train.model.cca", "def f():\n    from zaya_train.train import loop"),
        (
            "zaya_train.model.cca",
            "from typing import *\nif TYPE_CHECKING:\n    import zaya_train.run",
        ),
        ("zaya_train.model.cca", "import importlib\nimportlib.import_module('zaya_train.run')"),
        ("zaya_train.model.cca", "__import__('zaya_train.run')"),
        ("zaya_train.model.cca", "def f():\n    from zaya_train.model.moe import MoE"),
        ("zaya_train.model.cca", "from zaya_train import __version__"),
        ("zaya_kernels.cca.op", "from zaya_train.model import cca"),
        ("zaya_train.optim.muon", "from zaya_train.parallel.mesh import Mesh"),
        ("zaya_train.optim.muon", "from zaya_train.parallel import mesh"),
        ("zaya_train.optim.muon", "import zaya_train.parallel"),
        ("zaya_train.data.order", "from zaya_train.phases.plan import Plan"),
        ("zaya_train.train.loop", "from zaya_train.tools.report import report"),
        ("zaya_train.train.loop", "import zaya_train.run"),
        ("zaya_train.run", "from zaya_train.tools import report"),
        ("zaya_train.run", "from zaya_train.main import main"),
        ("zaya_train.run", "from zaya_train.commands import HANDLERS"),
        ("zaya_train.commands", "from zaya_train.main import compose"),
        ("zaya_train.model_commands", "from zaya_train.main import compose"),
        ("zaya_train.tools.report", "from zaya_train.model_commands import MODEL_HANDLERS"),
        ("zaya_train.model_arguments", "from zaya_train.tools import report"),
        ("zaya_train.arguments", "from zaya_train.tools import report"),
        ("zaya_train.run", "from omegaconf import OmegaConf"),
        ("zaya_train.tools.report", "import hydra.utils"),
        ("zaya_train.config.schema", "import torch"),
        ("zaya_train.runtime.files", "import torch"),
        ("zaya_train.runtime.files", "from zaya_train.runtime import log"),
        ("zaya_train.data.reading", "from zaya_train.runtime import log"),
        ("zaya_train.data.reading", "from zaya_train.runtime.dist import start"),
        ("zaya_train.train.loop", "import zaya_train.runtime.signals"),
        ("zaya_train.config.schema", "def f():\n    import numpy.random"),
        ("zaya_train.config.schema", "from zaya_train.data import order"),
        ("zaya_kernels.cca.op", "import triton"),
        ("zaya_kernels.cca.op", "from transformer_engine import pytorch"),
        ("zaya_kernels.grouped_mlp.triton", "from transformer_engine import pytorch"),
        ("zaya_kernels.workshop.cases", "import flash_attn"),
        ("zaya_kernels.attention.op", "from aiter import flash_attn_varlen_func"),
        ("zaya_train.extras.thing", "import os"),
    ],
)
def test_a_planted_import_is_caught(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("zaya_train.config.check", "import json.decoder\nfrom zaya_train.config import errors"),
        ("zaya_train.runtime.files", "import fcntl\nfrom zaya_train.config import errors"),
        ("zaya_train.data.reading", "from zaya_train.runtime.files import file_sha256"),
        ("zaya_train.hub.convert", "from zaya_train.runtime import files"),
        ("zaya_train.config.check", "from . import errors\nfrom .errors import ConfigError"),
        ("zaya_train.model.cca", "from zaya_kernels.cca.op import mix\nimport torch.nn"),
        ("zaya_train.optim.muon", "from zaya_train.parallel.collectives import sum_over"),
        ("zaya_train.optim.muon", "from zaya_train.parallel import collectives"),
        ("zaya_train.train.loop", "from zaya_train.parallel.mesh import Mesh"),
        ("zaya_train.tools.report", "from zaya_train import __version__, run"),
        ("zaya_train.main", "import hydra\ndef f():\n    from zaya_train.tools import report"),
        ("zaya_train.commands", "def f():\n    from zaya_train.tools import report"),
        ("zaya_train.__main__", "from zaya_train.main import main"),
        ("zaya_kernels.cca.triton", "import triton.language as tl"),
        ("zaya_kernels.workshop.compile", "import triton"),
        ("zaya_kernels.cca.op", "def f():\n    from zaya_kernels.cca import triton"),
        ("zaya_train.tools.replay_sinks", "def f():\n    import wandb"),
    ],
)
def test_an_allowed_import_is_let_through(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_relative_imports_of_a_package_file_start_at_the_package() -> None:
    assert violations("zaya_train.model", "from . import cca", is_package=True) == []
    assert violations("zaya_train.model", "from .. import parallel", is_package=True) != []


def test_a_planted_file_is_found_in_the_tree(tmp_path: Path) -> None:
    (tmp_path / "zaya_train" / "model" / "deep").mkdir(parents=True)
    planted = tmp_path / "zaya_train" / "model" / "deep" / "bad.py"
    planted.write_text("import os\nfrom zaya_train.parallel import mesh\n")
    assert all_violations(tmp_path) == [
        "zaya_train/model/deep/bad.py:2: model must not import zaya_train.parallel.mesh"
    ]
