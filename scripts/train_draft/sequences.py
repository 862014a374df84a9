"""Token sequences that the target wrote: how they are kept, and which are left out. Needs no torch."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .work_files import write_whole

Ints = npt.NDArray[np.int32]

#: A sequence that shares so many tokens in a row with a prompt of the benchmark is dropped.
N_GRAM = 13

_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def n_gram_hashes(tokens: Ints, n: int = N_GRAM) -> npt.NDArray[np.uint64]:
    """A hash of each run of ``n`` tokens along the last axis, ``[..., T - n + 1]`` (none if T < n)."""
    count = max(tokens.shape[-1] - n + 1, 0)
    out = np.zeros((*tokens.shape[:-1], count), np.uint64)
    for i in range(n):
        out = out * _FACTOR + tokens[..., i : i + count].astype(np.uint64) + np.uint64(1)
    return out


@dataclass(frozen=True)
class Prompts:
    """What the target is to go on from, and the benchmark that it must not see.

    Attributes:
        prompts: token ids of each.
        evaluation: the benchmark's prompts, for evaluation alone.
    """

    prompts: list[Ints]
    evaluation: list[Ints]
    target: str  # identity of the file whose tokens these are

    def excluded(self) -> npt.NDArray[np.uint64]:
        """Hashes of the token runs that only the benchmark may hold, sorted."""
        return np.unique(np.concatenate([np.zeros(0, np.uint64), *(n_gram_hashes(p) for p in self.evaluation)]))

    def save(self, path: Path) -> None:
        arrays = {**_pack("prompts", self.prompts), **_pack("evaluation", self.evaluation)}
        _save(path, {"target": self.target}, **arrays)

    @classmethod
    def load(cls, path: Path) -> Prompts:
        """
        Raises:
            InputError: not such a file.
        """
        info, arrays = _load(path, "prompts", "prompts_ends", "evaluation", "evaluation_ends")
        return cls(_unpack("prompts", arrays), _unpack("evaluation", arrays), str(info.get("target")))


@dataclass(frozen=True)
class Sequences:
    """Sequences of equal room.

    Attributes:
        tokens: int32 ``[n, length]``.
        prompt_lengths: int32 ``[n]``: tokens that the target did not write.
        lengths: int32 ``[n]``: tokens that count; behind an end of text they do not.
        greedy: bool ``[n]``: written without sampling.
    """

    tokens: Ints
    prompt_lengths: Ints
    lengths: Ints
    greedy: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def written(self) -> int:
        """Tokens by the target."""
        return int((self.lengths - self.prompt_lengths).sum())

    def select(self, keep: npt.NDArray[Any]) -> Sequences:
        return Sequences(self.tokens[keep], self.prompt_lengths[keep], self.lengths[keep], self.greedy[keep])

    def without(self, excluded: npt.NDArray[np.uint64]) -> Sequences:
        """Those that share no run of tokens with the benchmark."""
        if not len(excluded):
            return self
        return self.select(~np.isin(n_gram_hashes(self.tokens), excluded).any(-1))

    def save(self, path: Path, **info: Any) -> None:
        _save(
            path, info,
            tokens=self.tokens, prompt_lengths=self.prompt_lengths, lengths=self.lengths, greedy=self.greedy,
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> tuple[Sequences, dict[str, Any]]:
        """The sequences, and what was saved with them.

        Raises:
            InputError: not such a file.
        """
        info, arrays = _load(path, "tokens", "prompt_lengths", "lengths", "greedy")
        return cls(**arrays), info

    @classmethod
    def join(cls, parts: Iterable[Sequences]) -> Sequences:
        """
        Raises:
            InputError: there are none.
        """
        parts = list(parts)
        if not any(map(len, parts)):
            raise InputError("there are no sequences to train on: run the stage generate first")
        return cls(
            *(np.concatenate([getattr(p, name) for p in parts]) for name in ("tokens", "prompt_lengths", "lengths", "greedy"))
        )  # fmt: skip


def _pack(name: str, rows: Sequence[Ints]) -> dict[str, npt.NDArray[Any]]:
    ends = np.cumsum([len(r) for r in rows], dtype=np.int64)
    return {name: np.concatenate([np.zeros(0, np.int32), *rows]), f"{name}_ends": ends}


def _unpack(name: str, arrays: dict[str, npt.NDArray[Any]]) -> list[Ints]:
    ends = arrays[f"{name}_ends"]
    return np.split(arrays[name], ends[:-1]) if len(ends) else []


def _save(path: Path, info: dict[str, Any], **arrays: npt.NDArray[Any]) -> None:
    write_whole(path, lambda file: np.savez(file, info=np.array(json.dumps(info)), **arrays))


def _load(path: Path, *names: str) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file["info"])), {name: file[name] for name in names}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{path} is no file of this kind, or cut off: {error}") from error
