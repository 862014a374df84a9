"""A prefix cache: what a prompt shares with an earlier one is not evaluated again, in the target and in the mirror.

When a prompt has been evaluated, the target's state and the mirror's rows are kept in memory under a budget (those used longest ago go
first) and, if a directory is given, in files there. Before a prompt is evaluated, the entry that saves most is put into the model, cut
back to what the prompt shares with it; the rest is evaluated. What then is generated equals what is generated from nothing, to the bit,
the accepted tokens of each draft step included: see :mod:`ggml_mirror.prompt_grid` and :class:`ggml_mirror.cache.entry.Coverage`.

Generated tokens are not kept: they were evaluated in other batches than those of a prompt that contains them.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llama_cpp import Llama, LlamaState
from llama_cpp.llama_cache import BaseLlamaCache

from ..errors import ArgumentError, GgmlMirrorError
from .cached_model import PlainModel, cached_model
from .counters import CacheCounters
from .disk_tier import CachedFile, DiskTier
from .entry import Entry
from .identity import CacheIdentity
from .prefix_index import token_key
from .ram_tier import RamTier
from .write_behind import WriteBehind

log = logging.getLogger("ggml_mirror.cache.prefix_cache")

#: A restore costs what copying the whole entry costs, however little of it the prompt shares: per token of the entry, this share of
#: evaluating a token. Two CPU cores take 1/500 for a model of 135M, a GPU takes up to 1/4 for one of 27B.
COPY_COST = 1 / 32

_WRITE_WAIT_S = 10.0


@dataclass(frozen=True)
class Found:
    """A candidate for a prompt: where it is ("ram" or "disk"), tokens shared, those of them that it saves, and what that is worth."""

    tier: str
    source: Entry | CachedFile
    shared: int
    n_tokens: int
    worth: float


class PrefixCache(BaseLlamaCache):
    """A cache for ``Llama.set_cache``, of a ``DFlashLlama`` or a plain ``Llama``.

    Args:
        llm: the model that the cache is for; it is not kept alive.
        ram_bytes: most bytes of memory that entries take. 0: none is kept in memory, and a file is written before generation goes on.
        directory: where files are kept, from one process to the next; None: nowhere.
        disk_bytes: most bytes that this model's files take there.
        on_restore: called with tier ("ram" or "disk"), seconds and tokens after each restore, in the thread that evaluates.

    Attributes:
        counters: what happened so far.

    Raises:
        ArgumentError: a negative size, or ``directory`` is a file.
        ModelFileError: a model's file can no longer be read.

    Example::

        llm = DFlashLlama("target.gguf", draft_path="draft.gguf", n_ctx=8192)
        with PrefixCache(llm, ram_bytes=2 << 30, directory="~/.cache/ggml-mirror/prefix") as cache:
            llm.set_cache(cache)
            llm("def fibonacci(n):", max_tokens=64)
    """

    def __init__(
        self,
        llm: Llama,
        *,
        ram_bytes: int = 2 << 30,
        directory: str | os.PathLike[str] | None = None,
        disk_bytes: int = 16 << 30,
        on_restore: Callable[[str, float, int], None] | None = None,
    ) -> None:
        if ram_bytes < 0 or disk_bytes < 0:
            raise ArgumentError(f"ram_bytes {ram_bytes} and disk_bytes {disk_bytes} must not be negative")
        super().__init__(ram_bytes)
        self.identity = CacheIdentity.of(llm)
        self.counters = CacheCounters()
        self.on_restore = on_restore
        self._model = cached_model(llm)
        grid = self._model.grid
        self._lock = threading.RLock()
        self._closed = False
        self.disk = (
            None if directory is None else DiskTier(Path(directory), disk_bytes, self.identity, grid, self.counters)
        )
        self._writer = None if self.disk is None else WriteBehind(self.disk.store)
        written = (lambda entry, wait_s: True) if self._writer is None else self._writer.wait
        self.ram = RamTier(ram_bytes, grid, self.counters, written)
        # What waits is written when the cache is forgotten or the interpreter ends, too.
        self._end = weakref.finalize(self, self._writer.close) if self._writer is not None else None

    # ----------------------------------------------------------------------------------------------- for the model

    def serves(self, llm: Llama) -> bool:
        """Was the cache made for this model?"""
        return self._model.llm is llm

    def restore(self, tokens: Sequence[int]) -> npt.NDArray[np.float32] | None:
        """Put what saves most of this prompt's evaluation into the model; it keeps what it has if that saves as much.

        Returns:
            Logits behind the prompt, float32 ``[1, n_vocab]``, if nothing of it is left to evaluate.
        """
        prompt, tried = list(tokens), set[tuple[str, bytes]]()
        started = time.perf_counter()
        while found := self._best(prompt, tried):
            tried.add((found.tier, found.source.key))
            taken = self._restore(found, prompt)
            if taken is not None:
                entry, n_tokens = taken
                self._count_hit(found.tier, n_tokens, time.perf_counter() - started)
                return entry.logits if n_tokens == len(prompt) else None
        kept = self._model.reusable(prompt)
        if kept:
            self._count_hit("context", kept)
        else:
            self.counters.misses += 1
        return None

    def keep(self, logits: npt.NDArray[np.float32] | None = None) -> None:
        """Keep the model's state as it is, if it is that of a prompt.

        Args:
            logits: float32 ``[1, n_vocab]`` behind its last token, if the prompt ends there.
        """
        try:
            state = self._model.take()
        except (MemoryError, GgmlMirrorError) as error:
            self.counters.not_stored["failed"] += 1
            log.warning("a prompt was not cached: %s", str(error) or type(error).__name__)
            return
        if isinstance(state, str):
            self.counters.not_stored[state] += 1
        else:
            self._keep(state, logits)

    def evaluate(self, tokens: Sequence[int]) -> None:
        """Let a plain ``Llama`` evaluate a prompt, but for what it or the cache has of it. (A DFlashLlama does so itself.)"""
        assert isinstance(self._model, PlainModel)
        self._model.evaluate(self, list(tokens))

    # ------------------------------------------------------------------------------------------ as a BaseLlamaCache

    def __bool__(self) -> bool:
        """False: ``Llama`` asks only a cache that is true. Here the model asks, where it evaluates the prompt."""
        return False

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        """The state of what the cache has of a prompt, for ``load_state`` of a DFlashLlama.

        Raises:
            KeyError: nothing that the model has not.
        """
        prompt, tried = list(key), set[tuple[str, bytes]]()
        while found := self._best(prompt, tried):
            tried.add((found.tier, found.source.key))
            entry = self._entry_of(found)
            if entry is not None:
                return self._model.state(entry, found.n_tokens)
        raise KeyError("no cached prompt shares more of this one than the model has")

    def __contains__(self, key: Sequence[int]) -> bool:
        return self._best(list(key), set()) is not None

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        """Keep a state, if it is that of a prompt. ``key`` is not used: the state knows its tokens."""
        self._keep(value, None)

    @property
    def cache_size(self) -> int:
        """Bytes of memory that entries take."""
        return self.ram.nbytes

    # ------------------------------------------------------------------------------------------------------ lookup

    def _best(self, tokens: list[int], tried: set[tuple[str, bytes]]) -> Found | None:
        """The candidate that is worth most, if it is worth more than what the model has."""
        if not tokens or self._closed:
            return None
        key, best, worth = token_key(tokens), None, float(self._model.reusable(tokens))
        with self._lock:
            best = self._choose("ram", self.ram.nearest(key), len(tokens), worth, tried)
        if self.disk is not None:
            self.disk.refresh()
            with self.disk.lock:
                worth = best.worth if best else worth
                best = self._choose("disk", self.disk.nearest(key), len(tokens), worth, tried) or best
        return best

    def _choose(
        self,
        tier: str,
        nearest: Iterator[tuple[int, Entry | CachedFile]],
        n_prompt: int,
        worth: float,
        tried: set[tuple[str, bytes]],
    ) -> Found | None:
        """The candidate of one tier that is worth more than ``worth``, and most."""
        best = None
        for shared, source in nearest:
            if shared <= worth:
                break  # and those that follow share less
            n = source.coverage.usable(shared, n_prompt, self._model.window, self._model.grid)
            value = n - COPY_COST * source.coverage.n_tokens
            if value > worth and (tier, source.key) not in tried:
                best, worth = Found(tier, source, shared, n, value), value
        return best

    def _restore(self, found: Found, prompt: list[int]) -> tuple[Entry, int] | None:
        """Put a candidate into the model: it, and the tokens that it saves. None: it turned out to be of no use."""
        entry = self._entry_of(found)
        if entry is None:
            return None
        # Another process may have replaced the file since its head was read.
        n = entry.coverage.usable(found.shared, len(prompt), self._model.window, self._model.grid)
        if n <= self._model.reusable(prompt):
            return None
        try:
            self._model.load(self._model.state(entry, n))
        except (GgmlMirrorError, RuntimeError) as error:
            self.counters.skipped["refused"] += 1
            log.warning("a cached prompt of %d tokens was skipped: %s", entry.coverage.n_tokens, error)
            self._forget(entry.key)
            return None
        self._use(entry)
        return entry, n

    def _entry_of(self, found: Found) -> Entry | None:
        if isinstance(found.source, Entry):
            return found.source
        assert self.disk is not None
        return self.disk.load(found.source)

    def _count_hit(self, tier: str, n_tokens: int, seconds: float | None = None) -> None:
        self.counters.hits[tier] += 1
        self.counters.reused_tokens[tier] += n_tokens
        if seconds is None:
            return
        self.counters.restores[tier] += 1
        self.counters.restore_s[tier] = self.counters.restore_s.get(tier, 0.0) + seconds
        if self.on_restore is not None:
            self.on_restore(tier, seconds, n_tokens)

    # ----------------------------------------------------------------------------------------------------- keeping

    def _keep(self, state: LlamaState, logits: npt.NDArray[np.float32] | None) -> None:
        entry: Entry | str = "closed" if self._closed else self._model.entry(state, logits)
        if isinstance(entry, str):
            self.counters.not_stored[entry] += 1
            return
        with self._lock:
            there = self.ram.get(entry.key)
            if there is not None and there.coverage.covers(entry.coverage):
                self._use(there)
                return
            held = self.ram.add(entry, wait_s=_WRITE_WAIT_S)
        if held:
            self.counters.stored["ram"] += 1
        if self._writer is None or self.disk is None:
            return
        if held:
            self._writer.submit(entry)
        elif entry.nbytes > self.capacity_bytes:
            self.disk.store(entry)  # there is nowhere to let it wait

    def _use(self, entry: Entry) -> None:
        """Let an entry be the one that was used last, in both tiers."""
        with self._lock:
            if not self.ram.use(entry.key):
                self.ram.add(entry)
        if self.disk is not None:
            self.disk.touch(entry.key)

    def _forget(self, key: bytes) -> None:
        with self._lock:
            self.ram.remove(key)
        if self.disk is not None:
            self.disk.forget(key)

    # ----------------------------------------------------------------------------------------------------- figures

    def bytes_held(self) -> dict[str, int]:
        """Bytes by tier: of memory, and of this model's files."""
        return {"ram": self.ram.nbytes} | ({} if self.disk is None else {"disk": self.disk.nbytes})

    def entries_held(self) -> dict[str, int]:
        """Prompts by tier."""
        return {"ram": len(self.ram)} | ({} if self.disk is None else {"disk": len(self.disk)})

    def waiting(self) -> int:
        """Entries that are not written yet."""
        return 0 if self._writer is None else len(self._writer)

    # ---------------------------------------------------------------------------------------------------- lifetime

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until every entry that is kept has been written; False: not within ``timeout`` seconds."""
        return self._writer is None or self._writer.flush(timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Write what waits, and free what is held. Afterwards the cache finds and keeps nothing.

        Returns:
            False: not everything was written within ``timeout`` seconds.
        """
        self._closed = True
        if self._end is not None:
            self._end.detach()
        written = self._writer is None or self._writer.close(timeout)
        with self._lock:
            self.ram.clear()
        return written

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
