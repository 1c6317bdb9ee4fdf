"""Arguments of `zaya plan`."""

from __future__ import annotations

from pathlib import Path
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
    parser.add_argument(
        "--device", help="forecast time on this: MI300X, MI355X, H100 (SXM), H200, ..."
    )
    parser.add_argument("--node-ranks", type=int, help="devices of a node; without: 8")
    parser.add_argument("--inside-gb-per-second", type=float, help="of a rank's links in a node")
    parser.add_argument("--between-gb-per-second", type=float, help="of a rank to another node")
    parser.add_argument("--preflight", type=Path, help="preflight.json: measured rates instead")
    parser.add_argument(
        "--document-tokens", type=int, help="average length; without: documents fill the context"
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="time steps of this model on this machine's CPU"
    )
    parser.add_argument(
        "--search", action="store_true", help="the fastest layouts that fit; needs --device"
    )
    parser.add_argument(
        "--explain", action="store_true", help="where every figure of memory and time comes from"
    )
