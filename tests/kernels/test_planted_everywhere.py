"""Every shipped kernel has a bug planted in the code that it runs, in every change's tests and not
only at night."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from zaya_kernels.workshop.budgets import BUDGETS

from ..helpers.mutation import some_often

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from types import ModuleType

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from zaya_kernels.attention import triton_kernels as attention
from zaya_kernels.cca import triton_backward as cca_backward
from zaya_kernels.cca import triton_kernels as cca_forward
from zaya_kernels.grouped_mlp import triton_kernels as grouped_mlp
from zaya_kernels.linear_cross_entropy import triton_kernels as loss
from zaya_kernels.moe_permute import triton_kernels as moe_permute
from zaya_kernels.newton_schulz import triton_kernels as newton_schulz
from zaya_kernels.norm_residual import triton as norm_residual
from zaya_kernels.router import triton_kernels as router

from . import test_planted_attention_bugs as attention_bugs
from . import test_planted_bugs as cca_and_norm_bugs
from . import test_planted_grouped_mlp_bugs as grouped_mlp_bugs
from . import test_planted_loss_bugs as loss_bugs
from . import test_planted_permute_bugs as permute_bugs
from . import test_planted_router_bugs as router_bugs
from . import test_triton_newton_schulz as newton_schulz_bugs


def often(bugs: Mapping[str, tuple[str, str]], quick: Collection[str] = ()) -> list[str]:
    """What those planted with every change replace."""
    return [bugs[str(p.values[0])][0] for p in some_often(bugs, quick) if not p.marks]


def always(bugs: Mapping[str, tuple[str, str]]) -> list[str]:
    return [old for old, _ in bugs.values()]


PLANTED: tuple[tuple[ModuleType, list[str]], ...] = (
    (cca_forward, always(cca_and_norm_bugs.CCA_BUGS)),
    (cca_backward, always(cca_and_norm_bugs.CCA_BACKWARD_BUGS)),
    (norm_residual, always(cca_and_norm_bugs.NORM_BUGS)),
    (attention, always(attention_bugs.BUGS)),
    (router, often(router_bugs.BUGS)),
    (loss, often(loss_bugs.BUGS)),
    (moe_permute, often(permute_bugs.BUGS, permute_bugs.QUICK)),
    (grouped_mlp, often(grouped_mlp_bugs.BUGS, grouped_mlp_bugs.QUICK)),
    (newton_schulz, always(newton_schulz_bugs.BUGS)),
)


def functions_of(source: str) -> dict[str, tuple[str, set[str]]]:
    """By name: the function's text, and the names it reads."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            text = ast.get_source_segment(source, node) or ""
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            found[node.name] = (text, names)
    return found


def runs(kernel: str, functions: Mapping[str, tuple[str, set[str]]]) -> set[str]:
    """The kernel and the functions of its module that it calls, directly or not."""
    reached, waiting = set(), [kernel]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += [called for called in functions[name][1] if called in functions]
    return reached


def with_bugs(source: str, replaced: Iterable[str]) -> set[str]:
    """Kernels of a module in whose code a bug is planted."""
    functions = functions_of(source)
    texts = {name: text for name, (text, _) in functions.items()}
    # A replaced text may end in a line's end, which a function's last line has not.
    hit = {name for name, text in texts.items() for old in replaced if old in text + "\n"}
    return {name for name in functions if name in BUDGETS and runs(name, functions) & hit}


def test_every_kernel_has_a_planted_bug() -> None:
    found: set[str] = set()
    for module, replaced in PLANTED:
        assert module.__file__ is not None
        found |= with_bugs(Path(module.__file__).read_text(encoding="utf-8"), replaced)
    assert found == set(BUDGETS)


def test_a_kernel_without_one_is_seen() -> None:
    source = "def _part(): return 1\ndef loss_scores(): _part()\ndef loss_finish(): return 2\n"
    assert with_bugs(source, ["return 1"]) == {"loss_scores"}
