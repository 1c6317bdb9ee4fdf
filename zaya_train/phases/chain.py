"""A plan run as a chain of jobs, one phase each."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from zaya_train.config.errors import ConfigError

if TYPE_CHECKING:
    from zaya_train.config.schema import TrainConfig

log = logging.getLogger(__name__)


def only_phase_is_done(config: TrainConfig, phase_index: int) -> bool:
    """Whether run.only_phase lies behind a run whose newest checkpoint stands in phase number
    `phase_index`, counted from zero; False where the configuration names none.

    Raises:
        ConfigError: it lies ahead of that phase, whose end it would start from.
    """
    if config.run.only_phase is None:
        return False
    names = list(config.plan.phases)
    only = names.index(config.run.only_phase)
    if only > phase_index:
        raise ConfigError(
            f"run.only_phase: {names[only]} starts from the end of {names[only - 1]}, and the "
            f"newest checkpoint of {config.run.dir} stands in {names[phase_index]}"
        )
    if only < phase_index:
        log.info("phase %s is done; run.only_phase asks for no more", names[only])
    return only < phase_index
