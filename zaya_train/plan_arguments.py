"""Arguments of `zaya plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_plan(parser: argparse.ArgumentParser) -> None:
    """What to plan, and what to show of it."""
    parser.add_argument(
        "overrides",
        nargs="+",
        metavar="[phases] OVERRIDE",
        help="as for train: recipe=zaya1_8b ...; after the word phases: the chain, edge by edge",
    )
    parser.add_argument("--ranks", type=int, default=1, help="ranks of the launch: nodes x GPUs")
    parser.add_argument("--memory-gb", type=float, help="of a device: refuse what does not fit")
    parser.add_argument(
        "--rehearse", action="store_true", help="confirm memory and traffic by a step without ranks"
    )
    parser.add_argument("--phase", action="append", help="refuse and rehearse these phases only")
