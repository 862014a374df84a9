"""The command line in this process: what it returned, printed and complained about."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Result:
    code: Any
    out: str
    err: str

    @property
    def json(self) -> Any:
        def refuse(literal: str) -> None:
            raise AssertionError(f"{literal} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


Run = Callable[..., Result]
