"""What holds for every suite."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# So that a comparison that fails in there says what it found.
pytest.register_assert_rewrite("tests.helpers.kernels")

# A machine that others have loaded misses any deadline for an example, or for making it.
settings.register_profile(
    "no deadline", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("no deadline")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long forms out unless the selection names them; a default `-m` in pyproject.toml
    would be lost as soon as somebody selects by another mark."""
    if "nightly" in config.option.markexpr:
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    if nightly:
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
