"""The rehearsal's shapes are those of a real step: the same meter, real numbers, real ranks."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import tiny
from zaya_train.config.derive import layout, sequences_per_step
from zaya_train.parallel.apply import parallelize
from zaya_train.parallel.fsdp import Reduction
from zaya_train.parallel.mesh import Mesh
from zaya_train.planning.components import STATE, WEIGHTS
from zaya_train.tools import rehearsal
from zaya_train.tools.rehearsal_meter import Meter, Peak
from zaya_train.train.built import groups_of, optimizer_of
from zaya_train.train.step import Rates, train_step

if TYPE_CHECKING:
    from zaya_train.config.schema import TrainConfig

Figures = tuple[dict[str, int], dict[str, int], dict[tuple[str, str], int]]


class RealMeter(Meter):  # type: ignore[no-untyped-call]
    """Other ranks answer for themselves."""

    def _answer(self, func: Any, args: Any) -> None:
        pass


STEPS = 6
"""gloo's threads may hold a finished collective's tensors a moment longer, so that a stage's peak
is now and then too high, never too low: the least of some steps is the step's own."""


def figures(peaks: Any, flows: Any) -> Figures:
    fullest = max(peaks.values(), key=lambda peak: peak.bytes)
    return (
        {stage: peak.bytes for stage, peak in peaks.items()},
        {name: size for name, size in fullest.components.items() if size},
        {key: flow.bytes for key, flow in flows.items()},
    )


def real(config: TrainConfig, name: str, ranks: int) -> Figures:
    """`rehearsal._step` with numbers: real steps of a real model under the same meter."""
    warnings.simplefilter("ignore")
    phase = config.plan.phases[name]
    mesh = Mesh.build(layout(phase, config.parallel, ranks), "cpu")
    batch = rehearsal._batch(config, phase, mesh)
    count = sequences_per_step(phase) // (mesh.layout.data * phase.micro_batch_sequences)
    meter = RealMeter(rehearsal._axes(mesh), {})
    with meter.counting():
        with meter.labelled(WEIGHTS):
            model = parallelize(config, config.model, mesh, rehearsal.CPU)
        rehearsal._give_routing(model, batch, 1.0)
        with meter.labelled(STATE):
            optimizer = optimizer_of(config, model, groups_of(mesh))
        rates = Rates(muon=0.1, adamw=0.1, clip_norm=0.0)
        least: dict[str, Peak] = {}
        for _ in range(STEPS):
            meter.flows.clear()
            meter.peaks.clear()
            batches = [batch] * count
            train_step(model, optimizer, batches, rates, Reduction.of(mesh, config.parallel))
            for stage, peak in meter.peaks.items():
                least[stage] = min(peak, least.get(stage, peak), key=lambda peak: peak.bytes)
    return figures(least, meter.flows)


@pytest.mark.parametrize(
    ("phase", "changes"),
    [
        ("short", {}),
        ("short", {"parallel.expert_parallel": 2, "parallel.accumulation": "all_reduce_last"}),
        ("long", {"parallel.recompute": "full"}),
        ("long", {"parallel.recompute": "selective", "parallel.reshard_after_forward": True}),
    ],
)
def test_a_rehearsed_step_is_a_real_one_without_numbers(
    phase: str, changes: dict[str, Any]
) -> None:
    config = tiny({"model.num_experts": 4, "optim.clip_norm": 0.0, **changes})
    (peaks, components, flows), _ = run_ranks(real, 2, config, phase, 2)
    found = rehearsal.rehearse_phases(config, 2, [phase])[phase]
    rehearsed = figures(found.peaks, found.flows)
    assert rehearsed[2] == flows
    for stage, size in rehearsed[0].items():
        assert size == pytest.approx(peaks[stage], rel=0.01), stage
    assert rehearsed[1] == pytest.approx(components, rel=0.01, abs=512)
