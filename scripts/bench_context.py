"""Draft time and memory against context, beside llama.cpp's own draft-dflash; no text is needed, so any pair of models will do.

    python scripts/synthetic_pair.py --out /tmp/pair          # a random pair of 27B shape
    python scripts/bench_context.py time   -m /tmp/pair/target.gguf -md /tmp/pair/draft.gguf --llama-server PATH --json time.json
    python scripts/bench_context.py memory -m /tmp/pair/target.gguf -md /tmp/pair/draft.gguf --json memory.json

`time` fills a mirror with random rows and takes draft steps at each context, between which --commit rows arrive, as after a
verification. A step is the whole of it: rows fused or read, keys and values made, the block. "attention" is the draft's flash attention
alone, in a graph of nothing else, over as many keys: what a step may grow by. Medians over steps.

What a step grows by from the first context to the last is measured in --pairs rounds of four: a step at either context, each with a mirror
and a draft of its own, and attention alone over as many keys as either has. So a change of clocks meets all four. Medians of the rounds'
differences, with bootstrap intervals.

With --llama-server (see bench_decode.py for how to build it), the same random prompts of each context are then continued by
llama-server and by DFlashLlama, -n tokens each, over the whole context. llama-server's own statistics time its draft call alone, without
the rows that it puts into its draft cache after each verification; "step" is all of a step, verification included, on both sides (near
the end of a text, llama-server verifies no more tokens than are wanted). In our first step of a text the keys and values of the prompt are
made, which llama-server makes with the prompt: what it takes more than the others is counted as "prefill" on our side.

`memory` reads the device's free memory before and after each allocation: the mirror with its staging; the draft's keys, values and
scratch; llama.cpp's draft context (keys, values, scratch). Weights are in none of them. On a CPU the figures mean little: other
processes come and go, and pages are taken when they are first written.
"""

from __future__ import annotations

import ctypes
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import typer
from bench_decode import LlamaServer
from decoding import load, split_storage, storage
from intervals import Interval, median_interval
from llama_cpp import Llama
from machine import describe
from rich import box
from rich.console import Console
from rich.table import Table

from ggml_mirror import DFlashLlama, FeatureMirror, GgmlMirrorError, __version__, capture, row_bytes
from ggml_mirror.byte_size import format_bytes
from ggml_mirror.capture import Hook
from ggml_mirror.device import Device, find_device
from ggml_mirror.draft import DRAFT_KV, Draft, DraftSpec
from ggml_mirror.draft_memory import mirror_cap, row_shape, staging_cap
from ggml_mirror.dtype import FeatureDtype
from ggml_mirror.errors import ArgumentError
from ggml_mirror.fuser import Fuser
from ggml_mirror.model_info import ModelInfo
from ggml_mirror.output import check_writable, write_atomically, write_json
from ggml_mirror.plot import check_plot
from ggml_mirror.prompt_run import default_threads
from ggml_mirror.row_kind import FUSED, RAW

MICRO_BATCH = 512
MOST_S = 0.5  # per cell of `time`, once it has three steps
GIB = 1 << 30

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)


class Pair:
    """A target with its draft's file: what drafts are made of."""

    def __init__(self, model: Path, draft: Path, n_gpu_layers: int, threads: int) -> None:
        self.spec = DraftSpec.read(draft, ModelInfo.read(model))
        self.threads = threads or default_threads()
        self.llm = load(str(model), None, n_ctx=MICRO_BATCH, n_gpu_layers=n_gpu_layers, n_threads=threads)
        self.hook = Hook.of(self.llm)
        self.device = self.hook.output_device()

    def draft(self, window: int, rows: str, kv: str, n_ctx: int = 0) -> Draft:
        return Draft(
            self.spec,
            n_vocab=self.llm.n_vocab(),
            tok_embd=self.hook.tok_embd,
            output=self.hook.output,
            device_index=self.device.index,
            window=window,
            n_threads=self.threads,
            rows=rows,
            kv=kv,
            n_ctx=n_ctx,
        )

    def mirror(self, rows: str, dtype: str, cap: int) -> FeatureMirror:
        taps, n_embd = row_shape(self.spec, rows)
        return FeatureMirror(
            taps=taps, n_embd=n_embd, cap=cap, dtype=dtype, device=self.device.name, n_threads=self.threads, rows=rows
        )

    @cached_property
    def random_rows(self) -> npt.NDArray[np.float32]:
        """Raw rows, as many as a micro-batch has."""
        taps, n_embd = row_shape(self.spec, RAW)
        return np.random.default_rng(0).standard_normal((MICRO_BATCH, taps * n_embd), np.float32)

    def free(self) -> int:
        return find_device(self.device.name).memory_free

    @property
    def kv_values(self) -> int:
        """Keys and values of a token, all layers."""
        return 2 * self.spec.n_layer * self.spec.n_head_kv * self.spec.head_dim


@contextmanager
def opened(model: Path, draft: Path, n_gpu_layers: int, threads: int) -> Iterator[Pair]:
    pair = Pair(model, draft, n_gpu_layers, threads)
    try:
        yield pair
    finally:
        pair.llm.close()


# -------------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Cell:
    """Draft steps of one kind at one context; milliseconds, medians. ``rows_ms``: fusing, reading and projecting what is new."""

    stored: str
    kv: str
    window: int
    context: int
    attended: int
    steps: int
    step_ms: float
    least_ms: float
    rows_ms: float
    block_ms: float
    rows_projected: float


class Rows:
    """A mirror that random rows are put into; fused ones by way of a draft."""

    def __init__(self, stack: ExitStack, pair: Pair, rows: str, dtype: str, cap: int) -> None:
        self.mirror = stack.enter_context(pair.mirror(rows, dtype, cap))
        self._waiting = stack.enter_context(pair.mirror(RAW, "f32", MICRO_BATCH)) if rows == FUSED else None
        self._raw = pair.random_rows
        self._block = pair.spec.block_size
        #: Positions before this one have been put in.
        self.n_past = 0
        self.attended = 0

    def add(self, draft: Draft, n: int) -> float:
        """Rows arrive. Returns the seconds that fusing them took: their way from the target is no part of a draft step."""
        sink = self.mirror if self._waiting is None else self._waiting
        sink.write_rows(start=self.n_past, rows=self._raw[:n])
        started = time.perf_counter()
        if self._waiting is not None:
            draft.fuse(self._waiting, self.mirror, start=self.n_past, count=n)
        self.n_past += n
        return time.perf_counter() - started

    def fill(self, context: int, draft: Draft) -> None:
        """Up to ``context``; rows that the ring could not keep are left out."""
        self.n_past = max(self.n_past, context - self.mirror.cap)
        while self.n_past < context:
            self.add(draft, min(MICRO_BATCH, context - self.n_past))

    def truncate(self, context: int) -> None:
        self.mirror.truncate(context)
        self.n_past = context

    def step(self, draft: Draft, commit: int) -> float:
        """Milliseconds of a step behind ``commit`` new rows."""
        fused_s = self.add(draft, commit)
        started = time.perf_counter()
        self.attended = draft.step(self.mirror, n_past=self.n_past, last_token=1, n_tokens=self._block - 1)[1]
        return 1e3 * (fused_s + time.perf_counter() - started)


class Sweep:
    """Steps over a mirror of random rows that grows from context to context."""

    def __init__(self, pair: Pair, window: int, contexts: Sequence[int], steps: int, commit: int) -> None:
        self.pair, self.window, self.contexts, self.steps, self.commit = pair, window, contexts, steps, commit
        # What the steps of one cell write must displace no row that the next cell attends to.
        self.cap = min(window, max(contexts)) + (steps + 2) * commit + pair.spec.block_size

    def run(self, stored: str, kvs: Sequence[str], progress: Callable[[str], None]) -> list[Cell]:
        rows, dtype = split_storage(stored)
        cells = []
        with ExitStack() as stack:
            filled = Rows(stack, self.pair, rows, dtype, self.cap)
            drafts = {kv: stack.enter_context(closing(self.pair.draft(self.window, rows, kv))) for kv in kvs}
            for context in self.contexts:
                filled.fill(context, next(iter(drafts.values())))
                for kv, draft in drafts.items():
                    progress(f"{stored}, {kv}, window {self.window:,}, context {context:,}")
                    cells.append(self._cell(stored, kv, draft, filled, context))
                    filled.truncate(context)
        return cells

    def _cell(self, stored: str, kv: str, draft: Draft, filled: Rows, context: int) -> Cell:
        # The first step makes keys and values of the whole window, the second is the first of its shape.
        for _ in range(2):
            filled.step(draft, self.commit)
        draft.reset_times()
        took: list[float] = []
        while len(took) < self.steps and (len(took) < 3 or sum(took) < 1e3 * MOST_S):
            took.append(filled.step(draft, self.commit))
        if filled.attended != min(self.window, filled.n_past):
            raise ArgumentError(f"a step attended to {filled.attended} rows of {min(self.window, filled.n_past)}")
        t, n = draft.times(), len(took)
        return Cell(
            stored=stored,
            kv=kv,
            window=self.window,
            context=context,
            attended=filled.attended,
            steps=n,
            step_ms=median(took),
            least_ms=min(took),
            rows_ms=(t.read_ns + t.fuse_ns + t.project_ns) / n / 1e6,
            block_ms=t.block_ns / n / 1e6,
            rows_projected=t.rows_projected / n,
        )


class Attention:
    """The draft's flash attention alone, all layers, over ``n_kv`` keys and a block of queries, in a graph of nothing else."""

    def __init__(self, stack: ExitStack, pair: Pair, n_kv: int, kv: str) -> None:
        self._ggml, spec = _Ggml(), pair.spec
        n_kv = -(-n_kv // 256) * 256
        ctx = stack.enter_context(self._ggml.context())
        nodes = []
        for _ in range(spec.n_layer):
            q = self._ggml.heads(ctx, "f32", spec.head_dim, spec.n_head, spec.block_size)
            k, v = (self._ggml.heads(ctx, DRAFT_KV[kv], spec.head_dim, spec.n_head_kv, n_kv) for _ in range(2))
            mask = self._ggml.tensor(ctx, "f16", n_kv, spec.block_size)
            nodes.append(self._ggml.flash_attention(ctx, q, k, v, mask, spec.head_dim**-0.5))
        self._backend = stack.enter_context(self._ggml.backend(pair.device, pair.threads))
        stack.enter_context(self._ggml.allocated(ctx, self._backend))
        self._graph = self._ggml.graph(ctx, nodes)

    def run(self) -> float:
        """Milliseconds."""
        started = time.perf_counter()
        self._ggml.compute(self._backend, self._graph)
        return 1e3 * (time.perf_counter() - started)


def attention_ms(pair: Pair, n_kv: int, kv: str, repeats: int = 20) -> float:
    """The median of :class:`Attention`."""
    with ExitStack() as stack:
        attention = Attention(stack, pair, n_kv, kv)
        return median([attention.run() for _ in range(repeats + 3)][3:])


@dataclass(frozen=True)
class Growth:
    """What a step takes at context ``last`` beyond one at ``first``, and what attention alone does; milliseconds, medians of ``pairs``
    differences. ``rows_ms``, ``block_ms``: by the draft's own clock, what rows and the block take more; means."""

    stored: str
    kv: str
    first: int
    last: int
    pairs: int
    first_ms: float
    last_ms: float
    step: Interval
    attention: Interval
    beyond: Interval
    rows_ms: float
    block_ms: float

    @property
    def good(self) -> bool:
        # Half a percent of a step is what medians of one machine differ by from run to run.
        return self.beyond.value <= 0.005 * self.last_ms


def measure_growth(
    pair: Pair, stored: str, kvs: Sequence[str], first: int, last: int, window: int, pairs: int, commit: int
) -> list[Growth]:
    """Over the full window, for each type of keys and values."""
    rows, dtype = split_storage(stored)
    found = []
    with ExitStack() as stack:
        room = (pairs + 2) * commit + pair.spec.block_size
        filled = [Rows(stack, pair, rows, dtype, context + room) for context in (first, last)]
        fusing = stack.enter_context(closing(pair.draft(pair.spec.block_size, rows, "f16")))
        for each, context in zip(filled, (first, last), strict=True):
            each.fill(context, fusing)
        for kv in kvs:
            with ExitStack() as inner:
                drafts = [inner.enter_context(closing(pair.draft(window, rows, kv))) for _ in filled]
                alone = [Attention(inner, pair, n + pair.spec.block_size, kv) for n in (first, last)]
                for _ in range(2):  # makes the context's keys and values; is the first of its shape
                    for each, draft in zip(filled, drafts, strict=True):
                        each.step(draft, commit)
                for draft in drafts:
                    draft.reset_times()
                took = np.array(
                    [
                        [
                            *(each.step(draft, commit) for each, draft in zip(filled, drafts, strict=True)),
                            *(a.run() for a in alone),
                        ]
                        for _ in range(pairs)
                    ]
                )
                rows_ns, block_ns = zip(
                    *((t.read_ns + t.fuse_ns + t.project_ns, t.block_ns) for t in (d.times() for d in drafts)),
                    strict=True,
                )
            for each, context in zip(filled, (first, last), strict=True):
                each.truncate(context)
            steps, attention = took[:, 1] - took[:, 0], took[:, 3] - took[:, 2]
            found.append(
                Growth(
                    stored=stored,
                    kv=kv,
                    first=first,
                    last=last,
                    pairs=pairs,
                    first_ms=float(np.median(took[:, 0])),
                    last_ms=float(np.median(took[:, 1])),
                    step=median_interval(steps),
                    attention=median_interval(attention),
                    beyond=median_interval(steps - attention),
                    rows_ms=(rows_ns[1] - rows_ns[0]) / pairs / 1e6,
                    block_ms=(block_ns[1] - block_ns[0]) / pairs / 1e6,
                )
            )
    return found


class _Ggml:
    """As much of ggml as a graph of flash attention needs, from the libraries that llama_cpp has loaded."""

    def __init__(self) -> None:
        # By their SONAMEs: what is loaded, not another copy from a file.
        self._lib, self._all = (ctypes.CDLL(f"{name}.so.0") for name in ("libggml-base", "libggml"))
        pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        for name, result, arguments in (
            ("ggml_init", pointer, [_InitParams]),
            ("ggml_free", None, [pointer]),
            ("ggml_new_tensor_3d", pointer, [pointer, ctypes.c_int, number, number, number]),
            ("ggml_flash_attn_ext", pointer, [pointer] * 5 + [real] * 3),
            ("ggml_view_3d", pointer, [pointer] * 2 + [number] * 3 + [ctypes.c_size_t] * 3),
            ("ggml_prec_set_acc", None, [pointer, ctypes.c_int]),
            ("ggml_new_graph", pointer, [pointer]),
            ("ggml_build_forward_expand", None, [pointer, pointer]),
            ("ggml_backend_dev_init", pointer, [pointer, ctypes.c_char_p]),
            ("ggml_backend_free", None, [pointer]),
            ("ggml_backend_alloc_ctx_tensors", pointer, [pointer, pointer]),
            ("ggml_backend_buffer_clear", None, [pointer, ctypes.c_uint8]),
            ("ggml_backend_buffer_free", None, [pointer]),
            ("ggml_backend_graph_compute", ctypes.c_int, [pointer, pointer]),
        ):
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, arguments
        self._all.ggml_backend_dev_get.restype, self._all.ggml_backend_dev_get.argtypes = pointer, [ctypes.c_size_t]

    @contextmanager
    def context(self) -> Iterator[Any]:
        ctx = self._lib.ggml_init(_InitParams(1 << 20, None, True))
        try:
            yield ctx
        finally:
            self._lib.ggml_free(ctx)

    def tensor(self, ctx: Any, dtype: str, ne0: int, ne1: int, ne2: int = 1) -> Any:
        return self._lib.ggml_new_tensor_3d(ctx, FeatureDtype.parse(dtype).ggml_type, ne0, ne1, ne2)

    def heads(self, ctx: Any, dtype: str, head_dim: int, n_head: int, n: int) -> Any:
        """``[head_dim, n, n_head]`` as it lies in a draft: the heads of a token side by side."""
        whole = self.tensor(ctx, dtype, head_dim * n_head, n)
        strides = row_bytes(dtype, head_dim * n_head), row_bytes(dtype, head_dim)
        return self._lib.ggml_view_3d(ctx, whole, head_dim, n, n_head, *strides, 0)

    def flash_attention(self, ctx: Any, q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
        node = self._lib.ggml_flash_attn_ext(ctx, q, k, v, mask, scale, 0.0, 0.0)
        self._lib.ggml_prec_set_acc(node, _PREC_F32)
        return node

    def graph(self, ctx: Any, nodes: Sequence[Any]) -> Any:
        graph = self._lib.ggml_new_graph(ctx)
        for node in nodes:
            self._lib.ggml_build_forward_expand(graph, node)
        return graph

    @contextmanager
    def backend(self, device: Device, threads: int) -> Iterator[Any]:
        backend = self._lib.ggml_backend_dev_init(self._all.ggml_backend_dev_get(device.index), None)
        try:
            yield backend
        finally:
            self._lib.ggml_backend_free(backend)

    @contextmanager
    def allocated(self, ctx: Any, backend: Any) -> Iterator[None]:
        buffer = self._lib.ggml_backend_alloc_ctx_tensors(ctx, backend)
        if not buffer:
            raise ArgumentError("no memory for the keys and values of attention alone")
        self._lib.ggml_backend_buffer_clear(buffer, 0)
        try:
            yield
        finally:
            self._lib.ggml_backend_buffer_free(buffer)

    def compute(self, backend: Any, graph: Any) -> None:
        if self._lib.ggml_backend_graph_compute(backend, graph):
            raise ArgumentError("ggml did not compute the attention graph")


_PREC_F32 = 10  # GGML_PREC_F32


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@dataclass(frozen=True)
class Continued:
    """One random prompt continued: milliseconds of the prefill, and per step. ``draft_ms`` of llama-server: its draft call alone."""

    who: str
    context: int
    steps: int
    accepted: int
    prefill_ms: float
    step_ms: float
    draft_ms: float


_STATISTICS = re.compile(
    r"statistics\s+draft-dflash: #calls\(b,g,a\) =\s*\d+\s+(\d+).*dur\(b,g,a\) = [\d.]+, ([\d.]+),"
)


def draft_calls(log: str) -> tuple[int, float]:
    """(calls, milliseconds) of llama-server's draft so far.

    Raises:
        ArgumentError: the log has no statistics.
    """
    found = _STATISTICS.findall(log)
    if not found:
        raise ArgumentError("llama-server printed no statistics of draft-dflash; is it of another version?")
    return int(found[-1][0]), float(found[-1][1])


def continue_by_server(
    program: Path,
    model: Path,
    draft: Path,
    prompts: dict[int, list[int]],
    kv: str,
    n_predict: int,
    n_draft: int,
    **common: Any,
) -> Iterator[Continued]:
    more = ["-lv", "4", "-b", str(common.pop("n_batch")), "-ub", str(MICRO_BATCH), "-ctkd", kv, "-ctvd", kv]
    server = LlamaServer(program, str(model), str(draft), n_draft=n_draft, more=more, **common)
    try:
        server.generate(next(iter(prompts.values()))[:MICRO_BATCH], 8)
        calls, ms = draft_calls(server.log())
        for context, prompt in prompts.items():
            got = server.generate(prompt, n_predict)
            before, (calls, ms) = (calls, ms), draft_calls(server.log())
            steps = max(got.counts.steps, 1)
            yield Continued(
                who=f"llama-server, {kv}",
                context=context,
                steps=steps,
                accepted=got.counts.accepted,
                prefill_ms=1e3 * (got.wall_s - got.decode_s),
                step_ms=1e3 * got.decode_s / steps,
                draft_ms=(ms - before[1]) / max(calls - before[0], 1),
            )
    finally:
        server.close()


def _steps(llm: DFlashLlama, prompt: list[int], n_predict: int) -> tuple[float, list[tuple[float, float]]]:
    """Seconds of the prefill; then (seconds, of them drafting) of each step but the first. That one makes keys and values of the
    whole prompt, as llama.cpp does while it evaluates the prompt: what it takes more than the others counts as prefill."""
    llm.reset()
    started = time.perf_counter()
    marks: list[tuple[int, float, float]] = []
    stream = llm.generate(prompt, temp=0.0, repeat_penalty=1.0)
    for n, _ in enumerate(stream, 1):
        marks.append((llm.stats.draft_steps, time.perf_counter(), llm.stats.draft_s))
        if n == n_predict:
            break
    stream.close()
    # A step is counted as the next one begins.
    firsts = [mark for before, mark in pairwise(marks) if mark[0] > before[0]]
    steps = [(b[1] - a[1], b[2] - a[2]) for a, b in pairwise(firsts)]
    first_token, first_step = marks[0][1] - started, (firsts[0][1] - marks[0][1] if firsts else 0.0)
    return first_token + max(first_step - median([whole for whole, _ in steps] or [first_step]), 0.0), steps


def continue_by_us(
    model: Path, draft: Path, prompts: dict[int, list[int]], stored: str, kv: str, n_predict: int, **common: Any
) -> Iterator[Continued]:
    llm = load(str(model), str(draft), stored=stored, draft_kv=kv, draft_window=common["n_ctx"], **common)
    assert isinstance(llm, DFlashLlama)
    try:
        _steps(llm, next(iter(prompts.values()))[:MICRO_BATCH], 8)
        for context, prompt in prompts.items():
            prefill_s, steps = _steps(llm, prompt, n_predict)
            yield Continued(
                who=f"{stored}, {kv}",
                context=context,
                steps=len(steps),
                accepted=llm.stats.accepted,
                prefill_ms=1e3 * prefill_s,
                step_ms=1e3 * sum(whole for whole, _ in steps) / len(steps),
                draft_ms=1e3 * sum(drafting for _, drafting in steps) / len(steps),
            )
    finally:
        llm.close()


ModelOption = Annotated[Path, typer.Option("-m", "--model", help="Target (GGUF).")]
DraftOption = Annotated[Path, typer.Option("-md", "--model-draft", help="DFlash draft (GGUF).")]
LayersOption = Annotated[int, typer.Option("-ngl", "--gpu-layers", help="Blocks on the GPU; -1: all.")]
ThreadsOption = Annotated[int, typer.Option("-t", "--threads", help="0: llama.cpp's own number.", min=0)]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Draw a picture (.png, .svg, .pdf).")]
MarkdownOption = Annotated[bool, typer.Option("--markdown", help="Tables as Markdown.")]


@app.command("time")
def time_command(
    model: ModelOption,
    draft: DraftOption,
    contexts: Annotated[str, typer.Option(help="Rows of context, ascending.")] = "512,2048,8192,32768",
    storages: Annotated[
        str, typer.Option("--stored", help="As f32,q8_0,fused:q4_0.")
    ] = "f32,q8_0,fused:q8_0,fused:q4_0",
    kvs: Annotated[str, typer.Option("--draft-kv", help="Of f16, q8_0, off.")] = "f16,q8_0,off",
    windows: Annotated[str, typer.Option("--draft-windows", help="Rows attended to; 0: the largest context.")] = "0",
    steps: Annotated[int, typer.Option(help="Steps per cell.", min=3)] = 30,
    pairs: Annotated[
        int, typer.Option(help="Steps at either context for what a step grows by; 0: leave it out.", min=0)
    ] = 60,
    commit: Annotated[int, typer.Option(help="Rows that arrive between steps.", min=1)] = 4,
    llama_server: Annotated[Path | None, typer.Option(help="llama.cpp's llama-server; compare with it.")] = None,
    continued: Annotated[
        str, typer.Option(help="What of ours continues the prompts too, as STORED/KV.")
    ] = "f32/f16,fused:q8_0/f16,fused:q4_0/f16,fused:q4_0/q8_0",
    predict: Annotated[int, typer.Option("-n", "--n-predict", help="Tokens of each continuation.", min=8)] = 96,
    n_gpu_layers: LayersOption = -1,
    threads: ThreadsOption = 0,
    json_file: JsonOption = None,
    plot_file: PlotOption = None,
    markdown: MarkdownOption = False,
) -> None:
    """Draft milliseconds per step at each context."""
    _check(json_file, plot_file)
    wanted, stored = _numbers(contexts, "--contexts"), [storage(s) for s in storages.split(",")]
    kv_types = [_kv(kv) for kv in kvs.split(",")]
    ours = [_storage_and_kv(text) for text in continued.split(",")]
    log = Console(stderr=True)
    cells: list[Cell] = []
    grown: list[Growth] = []
    alone: dict[str, dict[int, float]] = {}
    with opened(model, draft, n_gpu_layers, threads) as pair:
        n_vocab, n_draft, where = pair.llm.n_vocab(), pair.spec.block_size - 1, describe(threads)
        for window in _numbers(windows, "--draft-windows", least=0):
            sweep = Sweep(pair, window or max(wanted) + pair.spec.block_size, wanted, steps, commit)
            for each in stored:
                cells += sweep.run(each, kv_types, lambda text: log.print(text, style="dim"))
        kept = [kv for kv in kv_types if kv != "off"]
        if pairs and kept and len(wanted) > 1:
            for each in stored:
                log.print(f"{each}: {wanted[0]:,} beside {wanted[-1]:,}", style="dim")
                grown += measure_growth(
                    pair, each, kept, wanted[0], wanted[-1], wanted[-1] + pair.spec.block_size, pairs, commit
                )
        for kv in dict.fromkeys(DRAFT_KV[kv] for kv in kv_types):
            alone[kv] = {n: attention_ms(pair, n + pair.spec.block_size, kv) for n in wanted}
    texts: list[Continued] = []
    if llama_server:
        n_ctx = -(-(max(wanted) + predict + 2 * (n_draft + 1)) // 256) * 256
        common: dict[str, Any] = dict(
            n_ctx=n_ctx, n_gpu_layers=n_gpu_layers, n_threads=threads or default_threads(), n_batch=2048
        )
        rng = np.random.default_rng(1)
        prompts = {n: rng.integers(0, n_vocab - 2, n).tolist() for n in wanted}
        for each, kv in ours:
            log.print(f"continuing: {each}, {kv}", style="dim")
            texts += continue_by_us(model, draft, prompts, each, kv, predict, **common)
        for kv in ("f16", "q8_0"):
            log.print(f"continuing: llama-server, {kv}", style="dim")
            texts += continue_by_server(llama_server, model, draft, prompts, kv, predict, n_draft, **common)
    console = Console(width=None if Console().is_terminal else 300)
    console.print(f"{draft.name}; {where}; {commit} new rows a step; milliseconds, medians")
    _print_cells(cells, alone, wanted, console, markdown)
    if grown:
        _print_growth(grown, console, markdown)
    verdicts = [*_growth(grown), *_beside_server(texts)]
    if texts:
        _print_texts(texts, wanted, console, markdown)
    for verdict, good in verdicts:
        console.print(f"{'[green]PASS' if good else '[red]FAIL'}[/] {verdict}")
    if json_file:
        report = {
            "machine": where,
            "versions": {"ggml_mirror": __version__, "llama_cpp": llama_cpp.__version__},
            "commit": commit,
            "cells": [asdict(cell) for cell in cells],
            "attention_alone_ms": alone,
            "growth": [asdict(g) for g in grown],
            "continued": [asdict(text) for text in texts],
            "goals": [{"goal": verdict, "met": good} for verdict, good in verdicts],
        }
        write_json(report, json_file)
    if plot_file:
        _plot_time(cells, alone, texts, plot_file)


def _growth(grown: Sequence[Growth]) -> list[tuple[str, bool]]:
    """What a step grows by from the first context to the last, beside attention alone."""
    return [
        (f"{g.stored}, {g.kv}: a step grows by {g.beyond} ms more than attention alone, of {g.last_ms:.3f} ms", g.good)
        for g in grown
    ]


def _print_growth(grown: Sequence[Growth], console: Console, markdown: bool) -> None:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    first, last = grown[0].first, grown[0].last
    for name in (
        "mirror",
        "draft K, V",
        f"step at {first:,}",
        f"at {last:,}",
        "grows by",
        "attention alone by",
        "beyond it",
    ):
        table.add_column(name, justify="left" if name in ("mirror", "draft K, V") else "right", no_wrap=True)
    for g in grown:
        steps = f"{g.first_ms:.3f}", f"{g.last_ms:.3f}"
        parts = f"{g.rows_ms:+.3f}", f"{g.block_ms:+.3f}"
        table.add_row(g.stored, g.kv, *steps, str(g.step), str(g.attention), str(g.beyond), *parts)
    console.print(table)


def _beside_server(texts: Sequence[Continued]) -> list[tuple[str, bool]]:
    out = []
    for mine in texts:
        for theirs in texts:
            same_kv = theirs.who == f"llama-server, {mine.who.rsplit(', ', 1)[1]}"
            if same_kv and theirs.context == mine.context and mine is not theirs:
                where = f"{mine.who}, context {mine.context:,}"
                text = f"{where}: draft {mine.draft_ms:.3f} ms a step, llama-server's call {theirs.draft_ms:.3f}"
                out.append((text, mine.draft_ms <= theirs.draft_ms))
    return out


def _print_cells(
    cells: Sequence[Cell], alone: dict[str, dict[int, float]], contexts: Sequence[int], console: Console, markdown: bool
) -> None:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for name in ("mirror", "draft K, V", "window", *(f"{n:,} rows" for n in contexts), "of it rows", "rows made"):
        table.add_column(name, justify="left" if name in ("mirror", "draft K, V") else "right", no_wrap=True)
    for stored, kv, window in dict.fromkeys((c.stored, c.kv, c.window) for c in cells):
        mine = [c for c in cells if (c.stored, c.kv, c.window) == (stored, kv, window)]
        last = mine[-1]
        figures = (f"{c.step_ms:.3f}" for c in mine)
        table.add_row(stored, kv, f"{window:,}", *figures, f"{last.rows_ms:.3f}", f"{last.rows_projected:,.0f}")
    for kv, took in alone.items():
        table.add_row("attention alone", kv, "", *(f"{ms:.3f}" for ms in took.values()), "", "")
    console.print(table)


def _print_texts(texts: Sequence[Continued], contexts: Sequence[int], console: Console, markdown: bool) -> None:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for name in ("continued by", *(f"{what} at {n:,}" for n in contexts for what in ("prefill", "draft", "step"))):
        table.add_column(name, justify="left" if name == "continued by" else "right", no_wrap=True)
    for who in dict.fromkeys(t.who for t in texts):
        mine = [t for t in texts if t.who == who]
        table.add_row(
            who, *(text for t in mine for text in (f"{t.prefill_ms:.1f}", f"{t.draft_ms:.3f}", f"{t.step_ms:.3f}"))
        )
    console.print(table)


def _plot_time(
    cells: Sequence[Cell], alone: dict[str, dict[int, float]], texts: Sequence[Continued], path: Path
) -> None:
    """Step time against context, full window; "off" left out, which would dwarf the rest."""

    def draw(axes: Any) -> None:
        widest = max(c.window for c in cells)
        for stored, kv in dict.fromkeys((c.stored, c.kv) for c in cells if c.kv != "off"):
            mine = [c for c in cells if (c.stored, c.kv, c.window) == (stored, kv, widest)]
            axes.plot([c.context for c in mine], [c.step_ms for c in mine], "o-", label=f"{stored}, {kv}")
        for kv, took in alone.items():
            axes.plot(list(took), list(took.values()), "k:", label=f"attention alone, {kv}")
        for who in dict.fromkeys(t.who for t in texts if t.who.startswith("llama-server")):
            theirs = [t for t in texts if t.who == who]
            axes.plot([t.context for t in theirs], [t.draft_ms for t in theirs], "s--", label=f"{who} (call)")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("rows of context")
        axes.set_ylabel("draft, milliseconds per step")
        axes.set_ylim(bottom=0)

    _figure(path, draw)


# ------------------------------------------------------------------------------------------------------------ memory


@dataclass(frozen=True)
class Taken:
    """Device memory that one thing took; bytes. ``formula``: rows, or keys and values, by their size alone."""

    n_ctx: int
    what: str
    detail: str
    formula: int
    measured: int

    @property
    def sound(self) -> bool:
        """Not less than what must have been taken, as where other processes have given memory back meanwhile."""
        return self.measured >= self.formula


class LlamaDraft:
    """llama.cpp's own context for a draft, with the parameters that llama-server gives it."""

    def __init__(self, path: Path, target: Llama, n_gpu_layers: int) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers if n_gpu_layers >= 0 else 999
        self._target = target
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ArgumentError(f"llama.cpp does not load {path}")

    @contextmanager
    def context(self, n_ctx: int, kv: str, block_size: int) -> Iterator[None]:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 2048, MICRO_BATCH
        params.n_outputs_max = params.n_outputs_max_per_seq = block_size
        params.type_k = params.type_v = FeatureDtype.parse(kv).ggml_type
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.ctx_other = self._target.ctx
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise ArgumentError(f"llama.cpp gives the draft no context of {n_ctx} positions with {kv}")
        try:
            yield
        finally:
            llama_cpp.llama_free(context)

    def close(self) -> None:
        llama_cpp.llama_model_free(self._model)


def measure_memory(pair: Pair, theirs: LlamaDraft, n_ctx: int, windows: Sequence[int]) -> list[Taken]:
    taken, spec = [], pair.spec
    for stored in ("f32", "q8_0", "fused:q8_0", "fused:q4_0"):
        rows, dtype = split_storage(stored)
        cap, width = mirror_cap(spec, n_ctx), int(np.prod(row_shape(spec, rows)))
        small = pair.draft(64, rows, "f16")
        with pair.mirror(rows, dtype, 128) as first:
            _use(pair, first, small)
        before = pair.free()
        with pair.mirror(rows, dtype, cap) as mirror:
            measured = before - _use(pair, mirror, small)
        small.close()
        taken.append(
            Taken(n_ctx, f"mirror, {stored}", f"{cap:,} rows, staging", cap * row_bytes(dtype, width), measured)
        )

    for window in dict.fromkeys(min(window or n_ctx, n_ctx) for window in windows):
        for kv in ("f16", "q8_0"):
            before = pair.free()
            ours = pair.draft(window, FUSED, kv, n_ctx)
            measured = before - pair.free() - ours.bytes.weights
            ours.close()
            values = window * row_bytes(kv, pair.kv_values)
            taken.append(Taken(n_ctx, f"draft K and V, {kv}", f"window {window:,}, scratch", values, measured))

    for kv in ("f16", "q8_0"):
        before = pair.free()
        with theirs.context(n_ctx, kv, spec.block_size):
            measured = before - pair.free()
        values = n_ctx * row_bytes(kv, pair.kv_values)
        taken.append(Taken(n_ctx, f"llama.cpp draft context, {kv}", f"n_ctx {n_ctx:,}, scratch", values, measured))
    return taken


@dataclass(frozen=True)
class BesideLlama:
    """All that drafting takes besides weights: our mirror with the draft's keys and values, and llama.cpp's draft context; bytes."""

    n_ctx: int
    stored: str
    kv: str
    window: str
    ours: int
    theirs: int


def beside_llama(taken: Sequence[Taken]) -> list[BesideLlama]:
    """Fused rows with each window and type of keys and values, where all was measured soundly."""
    out = []
    for n_ctx in dict.fromkeys(t.n_ctx for t in taken):
        here = [t for t in taken if t.n_ctx == n_ctx and t.sound]
        theirs = {t.what.rsplit(", ", 1)[1]: t.measured for t in here if t.what.startswith("llama.cpp")}
        for mirror in here:
            if not mirror.what.startswith("mirror, fused"):
                continue
            stored = mirror.what.split(", ", 1)[1]
            for keys in (t for t in here if t.what.startswith("draft K and V")):
                kv, window = keys.what.rsplit(", ", 1)[1], keys.detail.rsplit(", ", 1)[0]
                if kv in theirs:
                    out.append(BesideLlama(n_ctx, stored, kv, window, mirror.measured + keys.measured, theirs[kv]))
    return out


def _print_beside_llama(taken: Sequence[Taken], console: Console, markdown: bool) -> None:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for name in ("positions", "mirror", "draft K, V", "of", "mirror + K, V", "llama.cpp's context", "ratio"):
        table.add_column(name, justify="left" if name in ("mirror", "draft K, V", "of") else "right", no_wrap=True)
    for b in beside_llama(taken):
        sizes = format_bytes(b.ours), format_bytes(b.theirs), f"{b.ours / b.theirs:.3f}"
        table.add_row(f"{b.n_ctx:,}", b.stored, b.kv, b.window, *sizes)
    console.print(table)


def _use(pair: Pair, mirror: FeatureMirror, draft: Draft) -> int:
    """Rows of the target, and a step that reads them: what is taken at first use is taken then. Returns what is free meanwhile."""
    tokens = [1] * (MICRO_BATCH // 2)
    with ExitStack() as stack:
        sink: FeatureMirror | Fuser = mirror
        if mirror.rows == FUSED:
            slots = staging_cap(MICRO_BATCH, pair.spec, pair.hook.mechanism)
            sink = stack.enter_context(Fuser(draft, mirror, staging=slots, n_threads=pair.threads))
        stack.enter_context(capture(pair.llm, sink, pair.spec.taps))
        pair.llm.reset()
        pair.llm.eval(tokens)
        if isinstance(sink, Fuser):
            sink.commit(len(tokens))
        draft.step(mirror, n_past=len(tokens), last_token=1, n_tokens=draft.spec.block_size - 1)
        return pair.free()


@app.command("memory")
def memory_command(
    model: ModelOption,
    draft: DraftOption,
    contexts: Annotated[str, typer.Option("-c", "--contexts", help="Positions.")] = "2048,8192,32768,262144",
    windows: Annotated[str, typer.Option("--draft-windows", help="Rows that our draft attends to; 0: all.")] = "4096,0",
    n_gpu_layers: LayersOption = -1,
    threads: ThreadsOption = 0,
    json_file: JsonOption = None,
    plot_file: PlotOption = None,
    markdown: MarkdownOption = False,
) -> None:
    """Device memory before and after each allocation."""
    _check(json_file, plot_file)
    with opened(model, draft, n_gpu_layers, threads) as pair:
        device, where = pair.device.name, describe(threads)
        wanted, attended = _numbers(contexts, "--contexts", least=256), _numbers(windows, "--draft-windows", least=0)
        theirs = LlamaDraft(draft, pair.llm, n_gpu_layers)
        try:
            taken = [t for n_ctx in wanted for t in measure_memory(pair, theirs, n_ctx, attended)]
        finally:
            theirs.close()
    console = Console(width=None if Console().is_terminal else 300)
    console.print(f"{draft.name}; {device}; {where}; free memory of the device before and after")
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for name in ("positions", "", "of", "by size alone", "measured, bytes", "measured", "x mirror f32"):
        table.add_column(name, justify="left" if name in ("", "of") else "right", no_wrap=True)
    for t in taken:
        f32 = next(u for u in taken if u.n_ctx == t.n_ctx)
        ratio = f"{t.measured / f32.measured:.3f}" if f32.sound and t.sound else ""
        sizes = format_bytes(t.formula), f"{t.measured:,}", format_bytes(t.measured)
        table.add_row(f"{t.n_ctx:,}", t.what, t.detail, *sizes, ratio)
    console.print(table)
    _print_beside_llama(taken, console, markdown)
    limits = {"mirror, fused:q4_0": 0.85 * GIB, "mirror, fused:q8_0": 1.5 * GIB}
    verdicts = [
        (
            f"{t.what}: {t.measured / GIB:.3f} GiB of at most {limits[t.what] / GIB:.2f}",
            t.sound and t.measured <= limits[t.what],
        )
        for t in taken
        if t.n_ctx == max(wanted) and t.what in limits
    ]
    verdicts += [
        (
            f"{b.n_ctx:,} positions, {b.stored} and {b.kv}, {b.window}: {format_bytes(b.ours)}, llama.cpp {format_bytes(b.theirs)}",
            b.ours < b.theirs,
        )
        for b in beside_llama(taken)
    ]
    for verdict, good in verdicts:
        console.print(f"{'[green]PASS' if good else '[red]FAIL'}[/] {verdict}")
    if json_file:
        report = {
            "machine": where,
            "device": device,
            "versions": {"ggml_mirror": __version__, "llama_cpp": llama_cpp.__version__},
            "taken": [asdict(t) for t in taken],
            "goals": [{"goal": verdict, "met": good} for verdict, good in verdicts],
        }
        write_json(report, json_file)
    if plot_file:

        def draw(axes: Any) -> None:
            last = [t for t in taken if t.n_ctx == max(wanted)][::-1]
            labels = [f"{t.what} ({t.detail.rsplit(', ', 1)[0]})" if "K and V" in t.what else t.what for t in last]
            bars = axes.barh(labels, [t.measured / GIB for t in last], color="#2563a8")
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
            axes.set_xlabel(f"device memory at {max(wanted):,} positions, GiB")

        _figure(plot_file, draw, legend=False)


# -------------------------------------------------------------------------------------------------------- the rest


def _figure(path: Path, draw: Callable[[Any], None], legend: bool = True) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.lower().lstrip(".")))


def _check(json_file: Path | None, plot_file: Path | None) -> None:
    if json_file:
        check_writable(json_file)
    if plot_file:
        check_plot(plot_file)


def _numbers(text: str, option: str, least: int = 1) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise ArgumentError(f"{option} {text}: whole numbers from {least} with commas between them were expected")
    return sorted(set(numbers)) if option == "--contexts" else numbers


def _kv(text: str) -> str:
    if text not in DRAFT_KV:
        raise ArgumentError(f"--draft-kv {text}: one of {', '.join(DRAFT_KV)} was expected")
    return text


def _storage_and_kv(text: str) -> tuple[str, str]:
    stored, slash, kv = text.partition("/")
    return storage(stored), _kv(kv if slash else "f16")


if __name__ == "__main__":
    try:
        app()
    except GgmlMirrorError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
