"""What a model will take of which device's memory, shown and kept to before it is loaded."""

from __future__ import annotations

import logging
from typing import Any

from ..budget import Budget, make_budget
from ..device import find_device
from ..errors import UnsupportedError
from ..memory_parts import Part
from .log import log_budget

_LOG = logging.getLogger("ggml_mirror.server")


def require_room(model_path: str, cache_ram: int, **arguments: Any) -> Budget | None:
    """The budget of a model, or None where llama.cpp does not tell it.

    Args:
        cache_ram: bytes that the prefix cache may take.
        arguments: as for :func:`ggml_mirror.budget.make_budget`.

    Raises:
        BudgetError: it does not fit; nothing was allocated.
    """
    try:
        cache = Part("prefix_cache", "prefix cache", find_device("cpu").name, cache_ram, at_most=True)
        budget = make_budget(model_path, extra=[cache] if cache_ram else [], **arguments)
    except UnsupportedError as error:
        _LOG.warning(f"no budget of memory: {error}")
        return None
    log_budget(budget)
    budget.require_fit()
    return budget
