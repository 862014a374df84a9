"""Time to the first token with a prefix cache: from nothing, from memory, from disk; and what a cached token takes.

    python scripts/bench_restore.py -m TARGET.gguf -md DRAFT.gguf --json restore.json --plot restore.png

For each dtype and length, a prompt of HumanEval's texts is run from nothing into an empty cache, then again:

    cold         nothing is cached, the model is empty
    ram, disk    the same prompt: everything comes back, and the first token is sampled from logits that were kept
    ... other    a prompt of the same length that shares all but its last tokens (--other): those and the batch in which they
                 begin are evaluated

"disk" drops the file from the page cache before each run ("disk cached" does not). Medians over --repeats runs, but for cold, which runs
once. Each warm run goes on for --n-predict tokens, which must be those of the cold one, accepted for accepted. (The other prompt runs from
nothing only in the shortest length; in the others, its runs from memory and disk are compared with each other.)

"keep" is the copy of the state after the first token of a new prompt; "write" the thread behind, checksum and fsync included.

Beside these, of the largest entry: what checksums and copies cost on this machine. And of an index of --entries prompts of 4,096
tokens: a lookup, and the start on a directory of as many files.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import llama_cpp
import numpy as np
import typer
from decoding import load, storage
from humaneval import humaneval_prompts
from machine import describe
from rich import box
from rich.console import Console
from rich.table import Table
from script import run as run_script

from ggml_mirror import DFlashLlama, PrefixCache, __version__
from ggml_mirror.byte_size import format_bytes
from ggml_mirror.cache import state_file
from ggml_mirror.cache.counters import CacheCounters
from ggml_mirror.cache.disk_tier import DiskTier
from ggml_mirror.cache.entry import Coverage, Entry
from ggml_mirror.cache.identity import CacheIdentity
from ggml_mirror.cache.prefix_index import PrefixIndex, token_key
from ggml_mirror.errors import ArgumentError
from ggml_mirror.output import check_writable, write_atomically, write_json
from ggml_mirror.plot import check_plot
from ggml_mirror.prompt_grid import PromptGrid
from ggml_mirror.prompt_run import default_threads

INDEX_TOKENS = 4096


@dataclass(frozen=True)
class Run:
    """One prompt: seconds to the first token, and what followed."""

    first_s: float
    reused: int
    tokens: list[int]
    steps: list[int]


@dataclass(frozen=True)
class Row:
    """One dtype at one length. Seconds to the first token by case; bytes of the prompt's entry by part."""

    dtype: str
    n_prompt: int
    first_s: dict[str, float]
    reused: dict[str, int]
    same: bool
    keep_s: float
    write_s: float
    target_bytes: int
    row_bytes: int
    entry_bytes: int
    file_bytes: int

    def to_json(self) -> dict[str, Any]:
        per_token = {"target": self.target_bytes / self.n_prompt, "rows": self.row_bytes / self.n_prompt}
        return {**asdict(self), "bytes_per_token": {**per_token, "entry": self.entry_bytes / self.n_prompt}}


def run(llm: DFlashLlama, prompt: list[int], n_predict: int) -> Run:
    """From an empty model. What is cached is another matter."""
    llm.reset()
    started = time.perf_counter()
    stream = llm.generate(prompt, temp=0.0, repeat_penalty=1.0)
    tokens = [next(stream)]
    first = time.perf_counter() - started
    for token in stream:
        if len(tokens) >= n_predict or llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
            break
        tokens.append(token)
    stream.close()
    return Run(first, llm.stats.prefix_reused, tokens, list(llm.stats.steps))


def drop_from_page_cache(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def measure(
    llm: DFlashLlama,
    dtype: str,
    prompt: list[int],
    other: list[int],
    *,
    repeats: int,
    n_predict: int,
    directory: Path,
    cold_other: bool,
) -> Row:
    """One dtype at one length, in a directory of its own."""
    cold: dict[str, Run] = {}
    llm.set_cache(PrefixCache(llm, ram_bytes=0))
    if cold_other:
        cold["other"] = run(llm, other, n_predict)
    ram = PrefixCache(llm, ram_bytes=1 << 40)
    llm.set_cache(ram)
    cold["same"] = run(llm, prompt, n_predict)
    key = token_key(prompt)
    entry = ram.ram.get(key)
    if entry is None:
        raise ArgumentError(f"the prompt of {len(prompt)} tokens was not kept: {dict(ram.counters.not_stored)}")
    found: dict[str, list[Run]] = {}

    def warm(case: str, cache: PrefixCache, prompt: list[int], before: Callable[[], None] = lambda: None) -> None:
        llm.set_cache(cache)
        for _ in range(repeats):
            before()
            found.setdefault(case, []).append(run(llm, prompt, n_predict))

    llm.reset()
    llm.load_state(ram[prompt])
    keeping = [timed(llm.save_state) for _ in range(repeats)]
    disk = PrefixCache(llm, ram_bytes=0, directory=directory)
    assert disk.disk is not None
    write_s = timed(lambda: disk.disk.store(entry))  # type: ignore[union-attr]
    warm("ram", ram, prompt)
    warm("disk", disk, prompt, lambda: drop_from_page_cache(directory))
    warm("disk cached", disk, prompt)
    # The other prompt must not find itself: it would be kept by the first run.
    for case, cache in (("ram other", ram), ("disk other", disk)):
        keep, cache.keep = cache.keep, lambda *_: None  # type: ignore[method-assign]
        warm(case, cache, other, (lambda: drop_from_page_cache(directory)) if cache is disk else lambda: None)
        cache.keep = keep  # type: ignore[method-assign]
    same = all(
        (r.tokens, r.steps) == (c.tokens, c.steps)
        for case, runs in found.items()
        for c in [cold.get("other", found["ram other"][0]) if case.endswith("other") else cold["same"]]
        for r in runs
    )
    return Row(
        dtype=dtype,
        n_prompt=len(prompt),
        first_s={
            "cold": cold["same"].first_s,
            **{case: median(r.first_s for r in runs) for case, runs in found.items()},
        },
        reused={case: runs[0].reused for case, runs in found.items()},
        same=same,
        keep_s=median(keeping),
        write_s=write_s,
        target_bytes=len(entry.target),
        row_bytes=entry.rows.nbytes,
        entry_bytes=entry.nbytes,
        file_bytes=next(directory.glob("*.safetensors")).stat().st_size,
    )


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# ------------------------------------------------------------------------------------------------------ parts by themselves


def checksum_rates(nbytes: int) -> dict[str, float]:
    """GB/s of one thread over so many bytes, and of a copy into memory that is there."""
    data = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    target = np.empty_like(data)
    target[:] = 0
    work: dict[str, Callable[[], Any]] = {
        "copy": lambda: np.copyto(target, data),
        "crc32": lambda: zlib.crc32(data),
        "sha256": lambda: hashlib.sha256(data).digest(),
        "blake2b": lambda: hashlib.blake2b(data).digest(),
        "md5": lambda: hashlib.md5(data).digest(),
    }
    return {name: nbytes / median(timed(call) for _ in range(3)) / 1e9 for name, call in work.items()}


def index_times(entries: int, directory: Path) -> dict[str, float]:
    """Seconds: of lookups among so many prompts of 4,096 tokens, and of a start on as many files."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 40_000, INDEX_TOKENS)
    index: PrefixIndex[int] = PrefixIndex()
    grid, empty = PromptGrid(512, 512, (64, 16)), np.empty((0, 1), np.float32)
    tier = DiskTier(directory, 1 << 40, CacheIdentity({"of": "bench_restore"}), grid, CacheCounters())
    for i in range(entries):
        tokens = base.copy()
        tokens[1000:] = rng.integers(0, 40_000, INDEX_TOKENS - 1000)
        index.add(token_key(tokens), i)
        coverage = Coverage(INDEX_TOKENS, INDEX_TOKENS, INDEX_TOKENS, 0, logits=False)
        entry = Entry(token_key(tokens), coverage, b"x", np.empty((0, 1), np.uint8), empty, empty)
        path = directory / tier._name(entry.key)
        path.write_bytes(
            state_file.head_of(entry, tier._identity.facts, state_file._checksum([memoryview(b"x")])).encode() + b"x"
        )
    last, stranger = token_key([*base[:1000].tolist(), 1]), token_key([50_000])

    def lookup(key: bytes) -> Callable[[], Any]:
        return lambda: list(index.nearest(key))

    def start() -> None:
        tier = DiskTier(directory, 1 << 40, CacheIdentity({"of": "bench_restore"}), grid, CacheCounters())
        assert len(tier) == entries, f"{len(tier)} of {entries}: {tier._counters.to_dict()}"

    return {
        "nothing_in_common_s": median(timed(lookup(stranger)) for _ in range(20)),
        "all_share_1000_tokens_s": median(timed(lookup(last)) for _ in range(5)),
        "start_s": median(timed(start) for _ in range(3)),
    }


# ---------------------------------------------------------------------------------------------------------------- output


def time_table(rows: list[Row], markdown: bool) -> Table:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    cases = list(rows[0].first_s)
    for name in (
        "dtype",
        "tokens",
        *(f"{case} ms" for case in cases),
        "cold / ram",
        "cold / disk",
        "keep ms",
        "write ms",
        "same",
    ):
        table.add_column(name, justify="left" if name == "dtype" else "right", no_wrap=True)
    for r in rows:
        times = r.first_s
        table.add_row(
            *(r.dtype, f"{r.n_prompt:,}", *(f"{1e3 * times[case]:,.1f}" for case in cases)),
            *(f"{times['cold'] / times[case]:.0f}" for case in ("ram", "disk")),
            *(f"{1e3 * r.keep_s:,.1f}", f"{1e3 * r.write_s:,.0f}", "yes" if r.same else "NO"),
        )
    return table


def byte_table(rows: list[Row], markdown: bool) -> Table:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for name in (
        "dtype",
        "tokens",
        "target, B / token",
        "rows, B / token",
        "entry, B / token",
        "rows of entry, %",
        "entry",
        "file",
    ):
        table.add_column(name, justify="left" if name == "dtype" else "right", no_wrap=True)
    for r in rows:
        n = r.n_prompt
        table.add_row(
            *(r.dtype, f"{n:,}", *(f"{part / n:,.0f}" for part in (r.target_bytes, r.row_bytes, r.entry_bytes))),
            *(f"{100 * r.row_bytes / r.entry_bytes:.1f}", format_bytes(r.entry_bytes), format_bytes(r.file_bytes)),
        )
    return table


def plot(rows: list[Row], path: Path) -> None:
    """Time to the first token by case, lengths side by side, dtypes as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths, dtypes = sorted({r.n_prompt for r in rows}), list(dict.fromkeys(r.dtype for r in rows))
    cases = list(rows[0].first_s)
    figure = Figure(figsize=(4.5 * len(lengths), 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    colours = ("#2563a8", "#c9a227", "#5a8f3c", "#a83225", "#6b4c9a", "#777777", "#00897b", "#c2185b", "#455a64")
    for place, n in enumerate(lengths, start=1):
        axes = figure.add_subplot(1, len(lengths), place)
        for i, dtype in enumerate(dtypes):
            (row,) = (r for r in rows if r.dtype == dtype and r.n_prompt == n)
            xs = [x + 0.8 * ((i + 0.5) / len(dtypes) - 0.5) for x in range(len(cases))]
            axes.bar(
                xs, [row.first_s[c] for c in cases], 0.75 / len(dtypes), color=colours[i % len(colours)], label=dtype
            )
        axes.set_yscale("log")
        axes.set_title(f"{n:,} prompt tokens")
        axes.set_xticks(range(len(cases)), cases, rotation=30, ha="right")
        axes.set_ylabel("seconds to the first token")
        axes.spines[["top", "right"]].set_visible(False)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(dtypes), frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.lower().lstrip(".")))


# ---------------------------------------------------------------------------------------------------------- command line


def main(
    model: Annotated[Path, typer.Option("-m", "--model", help="Target (GGUF).")],
    draft: Annotated[Path, typer.Option("-md", "--model-draft", help="DFlash draft (GGUF).")],
    dtypes: Annotated[str, typer.Option(help="Comma-separated; fused:DTYPE for fused rows.")] = "f32,f16,bf16,q8_0",
    tokens: Annotated[str, typer.Option(help="Lengths of prompts, comma-separated.")] = "1024,4096",
    other: Annotated[int, typer.Option(help="Last tokens in which the other prompt differs.", min=1)] = 64,
    repeats: Annotated[int, typer.Option(help="Warm runs of each case.", min=1)] = 3,
    n_predict: Annotated[int, typer.Option("-n", "--n-predict", help="Tokens to compare.", min=1)] = 8,
    prompt_file: Annotated[Path | None, typer.Option(help="Other texts (.txt, .jsonl) than HumanEval's.")] = None,
    n_gpu_layers: Annotated[int, typer.Option("-ngl", "--gpu-layers", help="Blocks on the GPU; -1: all.")] = -1,
    threads: Annotated[int, typer.Option("-t", "--threads", help="0: llama.cpp's own number.", min=0)] = 0,
    entries: Annotated[int, typer.Option(help="Prompts of the index that is timed; 0: none.", min=0)] = 1000,
    directory: Annotated[Path | None, typer.Option(help="Where files are written; none: the system's own.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw a picture (.png, .svg, .pdf).")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables as Markdown.")] = False,
) -> None:
    names = [storage(name) for name in dtypes.split(",")]
    lengths = sorted(int(n) for n in tokens.split(","))
    if lengths[0] <= other:
        raise ArgumentError(
            f"prompts of {lengths[0]} tokens cannot differ in their last {other}; pass a smaller --other"
        )
    if json_file:
        check_writable(json_file)
    if plot_file:
        check_plot(plot_file)
    n_ctx = -(-(lengths[-1] + n_predict + 64) // 256) * 256
    text = "\n\n".join(prompt.text for prompt in humaneval_prompts(prompt_file))
    rows: list[Row] = []
    console = Console(width=None if Console().is_terminal else 240)
    for name in names:
        llm = load(str(model), str(draft), stored=name, n_ctx=n_ctx, n_gpu_layers=n_gpu_layers, n_threads=threads)
        assert isinstance(llm, DFlashLlama)
        words = llm.tokenize(text.encode())
        if len(words) < lengths[-1] + other:
            raise ArgumentError(
                f"the texts have {len(words)} tokens, {lengths[-1] + other} are needed; give a --prompt-file"
            )
        if not rows:
            run(llm, words[:200], 2)  # touches weights and buffers
        for n in lengths:
            prompt = words[:n]
            with tempfile.TemporaryDirectory(dir=directory) as folder:
                console.print(f"{name}, {n} tokens ...", style="dim")
                rows.append(
                    measure(
                        llm, name, prompt, [*prompt[:-other], *words[-other:]],
                        repeats=repeats, n_predict=n_predict, directory=Path(folder), cold_other=n == lengths[0],
                    )
                )  # fmt: skip
        llm.set_cache(None)
        llm.close()
    rates = checksum_rates(min(max(r.entry_bytes for r in rows), 1 << 30))
    found: dict[str, float] = {}
    if entries:
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            found = index_times(entries, Path(folder))

    console.print(f"{model.name} + {draft.name}; {describe(threads)}; medians of {repeats}, cold once")
    console.print(time_table(rows, markdown))
    console.print(byte_table(rows, markdown))
    console.print("GB/s of one thread: " + ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items()))
    if found:
        nothing, shared = found["nothing_in_common_s"], found["all_share_1000_tokens_s"]
        console.print(
            f"{entries:,} prompts of {INDEX_TOKENS:,} tokens: lookup where nothing is shared {1e6 * nothing:.0f} us, where all share "
            f"1,000 tokens {1e3 * shared:.1f} ms; start on as many files {found['start_s']:.2f} s"
        )
    if not all(row.same for row in rows):
        console.print("[red]FAIL[/] a warm run went on otherwise than the cold one")
    if json_file:
        report = {
            "machine": describe(threads),
            "threads": threads or default_threads(),
            "versions": {"ggml_mirror": __version__, "llama_cpp": llama_cpp.__version__},
            "other": other,
            "repeats": repeats,
            "rows": [row.to_json() for row in rows],
            "gb_per_s": rates,
            "index": {"entries": entries, "tokens": INDEX_TOKENS, **found},
        }
        write_json(report, json_file)
    if plot_file:
        plot(rows, plot_file)
    if not all(row.same for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    run_script(main)
