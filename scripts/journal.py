"""Results of a long run, kept one a line as they come, so that a run that was killed can go on, or be shared out."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ggml_mirror.errors import ArgumentError

Item = TypeVar("Item")


class Journal:
    """A JSON-lines file: the run's settings, then one result a line under its key. Without a path, kept in memory only.

    Each line is written by one call and forced to disk. What a kill leaves of a line is cut off at the next start. The journals of
    several parts of one run make one journal when they are put one after the other (``cat``).

    Raises:
        ArgumentError: the file is of a run with other settings (the message names them), or not a journal.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self._path = path
        self._results: dict[str, Any] = {}
        self._file: int | None = None
        if path is None:
            return
        settings = json.loads(json.dumps(settings))
        lines = self._whole_lines(path)
        if lines:
            self._read(lines, settings)
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise ArgumentError(f"cannot write {path}: {error.strerror}") from error
        os.ftruncate(self._file, sum(len(line) + 1 for line in lines))
        if not lines:
            self._append({"settings": settings})

    @staticmethod
    def _whole_lines(path: Path) -> list[bytes]:
        if not path.exists():
            return []
        return path.read_bytes().split(b"\n")[:-1]  # what follows the last line end is half a line, or nothing

    def _read(self, lines: list[bytes], settings: dict[str, Any]) -> None:
        try:
            parsed = [json.loads(line) for line in lines]
            runs = [line["settings"] for line in parsed if "settings" in line]
            kept = next((run for run in runs if run != settings), parsed[0]["settings"])
            self._results = {line["key"]: line["result"] for line in parsed if "settings" not in line}
        except (ValueError, KeyError, TypeError) as error:
            raise ArgumentError(f"{self._path} is not a journal of this script; name another file") from error
        other = sorted(name for name in kept.keys() | settings.keys() if kept.get(name) != settings.get(name))
        if other:
            pairs = ", ".join(f"{name} {kept.get(name)!r}, now {settings.get(name)!r}" for name in other)
            raise ArgumentError(f"{self._path} was begun with other settings ({pairs}); name another file")

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __getitem__(self, key: str) -> Any:
        return self._results[key]

    def __len__(self) -> int:
        return len(self._results)

    def add(self, key: str, result: Any) -> None:
        self._results[key] = result
        self._append({"key": key, "result": result})

    def _append(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            os.write(self._file, json.dumps(line, allow_nan=False).encode() + b"\n")
            os.fsync(self._file)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def part_of(tasks: Sequence[Item], part: str | None) -> list[Item]:
    """Every Nth of the tasks, from the Ith on, for ``part`` "I/N"; all for None.

    Raises:
        ArgumentError: no such part.
    """
    if part is None:
        return list(tasks)
    index, _, of = part.partition("/")
    if not (index.isdecimal() and of.isdecimal() and 1 <= int(index) <= int(of)):
        raise ArgumentError(f"--part {part}: as 1/4, 2/4, 3/4, 4/4")
    return list(tasks[int(index) - 1 :: int(of)])
