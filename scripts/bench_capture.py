"""What capture costs the target: decoding, blocks and prefill with capture off, by callback, and by outputs.

    python scripts/bench_capture.py -m TARGET.gguf --device CUDA0 --json capture.json --plot capture.png

Each mechanism has a model of its own in this process (so the target is loaded three times); "off" is a plain Llama that was never
captured. All evaluate the same tokens with flash attention, and take turns: in each round, each of them does

    decode          one token behind the prompt, --repeats times
    block           --block tokens behind the prompt, the logits of all of them, as verification asks for them, --repeats times
    prefill N/U     --prefill tokens at once, in micro-batches of U

A call is timed from the batch to its logits, what this package does in Python included. ms are medians over all calls; the overhead is
the median, over rounds, of a mechanism's median against that of "off" in the same round, with the quartiles of the rounds beside it.

"reused" is how many graphs llama.cpp reused per call, of one for each micro-batch. "bus" is feature bytes that crossed between host
and device per call. With layers on a GPU, decode and block are run again in a process with GGML_CUDA_DISABLE_GRAPHS=1: if CUDA graphs
are in use, it is slower there.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import llama_cpp
import numpy as np
import typer
from llama_cpp import Llama
from machine import describe
from rich import box
from rich.console import Console
from rich.table import Table
from script import run as run_script

from ggml_mirror import FeatureMirror, __version__, capture, find_device
from ggml_mirror.errors import ArgumentError
from ggml_mirror.mechanism import CaptureMechanism
from ggml_mirror.mirror import bus_bytes
from ggml_mirror.model_info import ModelInfo, default_taps
from ggml_mirror.output import check_writable, write_atomically, write_json
from ggml_mirror.plot import check_plot
from ggml_mirror.prompt_run import default_threads

OFF = "off"
WITHOUT_GRAPHS = "GGML_CUDA_DISABLE_GRAPHS"


@dataclass
class Calls:
    """One mechanism in one phase: seconds of each call, round by round."""

    rounds: list[list[float]] = field(default_factory=list)
    reused: int = 0
    bus: int = 0

    @property
    def count(self) -> int:
        return sum(len(r) for r in self.rounds)

    @property
    def median_s(self) -> float:
        return float(np.median(np.concatenate(self.rounds)))

    def overhead(self, off: Calls) -> tuple[float, float, float]:
        """Per cent against ``off``: the rounds' median and quartiles."""
        ratios = [np.median(mine) / np.median(its) - 1 for mine, its in zip(self.rounds, off.rounds, strict=True)]
        middle, low, high = np.quantile(ratios, [0.5, 0.25, 0.75])
        return 100 * float(middle), 100 * float(low), 100 * float(high)


@dataclass(frozen=True)
class Row:
    """One mechanism in one phase, as it is reported."""

    phase: str
    cuda_graphs: bool
    mechanism: str
    tokens: int
    calls: int
    median_ms: float
    tok_s: float
    overhead_pct: float
    overhead_low_pct: float
    overhead_high_pct: float
    reused: float
    bus_bytes: float


class Runner:
    """A model with one mechanism, and the mirror that it fills."""

    def __init__(self, stack: contextlib.ExitStack, mechanism: str, options: Options, n_ubatch: int) -> None:
        self.mechanism = mechanism
        self.llm = Llama(
            str(options.model),
            n_ctx=-(-(options.prefill + 512) // 256) * 256,
            n_batch=options.prefill,
            n_ubatch=n_ubatch,
            n_gpu_layers=options.n_gpu_layers,
            n_threads=options.threads or None,
            n_threads_batch=options.threads or None,
            flash_attn=True,
            verbose=False,
        )
        stack.callback(self.llm.close)
        if mechanism != OFF:
            taps = default_taps(llama_cpp.llama_model_n_layer(self.llm.model))
            mirror = stack.enter_context(
                FeatureMirror(
                    taps=len(taps),
                    n_embd=self.llm.n_embd(),
                    cap=options.prefill + 512,
                    dtype=options.dtype,
                    device=options.device,
                    n_threads=options.threads,
                )
            )
            stack.enter_context(capture(self.llm, mirror, taps, mechanism=mechanism))

    def prompt(self, tokens: list[int]) -> None:
        self.llm.reset()
        self.llm._ctx.kv_cache_seq_rm(0, 0, -1)
        self.llm.eval(tokens)
        llama_cpp.llama_synchronize(self.llm.ctx)

    def call(self, tokens: list[int], start: int, *, all_logits: bool, into: Calls | None) -> float:
        """Seconds of an evaluation of ``tokens`` from ``start`` on; what lies there is cut off first."""
        llm = self.llm
        llm.n_tokens = start
        llm._ctx.kv_cache_seq_rm(0, start, -1)
        llm._batch.set_batch(tokens, start, all_logits)
        reused, crossed = self._reused(), bus_bytes()
        started = time.perf_counter()
        llm._ctx.decode(llm._batch)
        llama_cpp.llama_get_logits_ith(llm.ctx, -1)  # waits
        seconds = time.perf_counter() - started
        if into is not None:
            after = bus_bytes()
            into.reused += self._reused() - reused
            into.bus += after.to_host + after.to_device - crossed.to_host - crossed.to_device
        return seconds

    def _reused(self) -> int:
        return int(llama_cpp.llama_perf_context(self.llm.ctx).n_reused)


@dataclass(frozen=True)
class Options:
    model: Path
    device: str
    n_gpu_layers: int
    threads: int
    dtype: str
    block: int
    prefill: int
    prompt: int
    rounds: int
    repeats: int
    mechanisms: tuple[str, ...]


def measure(options: Options, n_ubatch: int, phases: list[str]) -> Iterator[tuple[str, int, dict[str, Calls]]]:
    """(phase, tokens of a call, calls by mechanism) of one size of micro-batches."""
    rng = np.random.default_rng(0)
    prefill = f"prefill {options.prefill}/{n_ubatch}"
    sizes = {"decode": 1, "block": options.block, prefill: options.prefill}
    with contextlib.ExitStack() as stack:
        runners = [Runner(stack, m, options, n_ubatch) for m in (OFF, *options.mechanisms)]
        words = rng.integers(100, runners[0].llm.n_vocab() - 100, options.prefill).tolist()
        for phase in phases or [prefill]:
            found = {r.mechanism: Calls() for r in runners}
            start = 0 if phase == prefill else options.prompt
            tokens = words[start : start + sizes[phase]] if start else words
            repeats = 1 if phase == prefill else options.repeats
            for runner in runners:
                runner.prompt(words[: max(start, 1)])
                for _ in range(4):  # graphs are built, and captured where CUDA does
                    runner.call(tokens, start, all_logits=phase == "block", into=None)
            for number in range(options.rounds):
                for i in range(len(runners)):
                    runner = runners[(i + number) % len(runners)]
                    calls = found[runner.mechanism]
                    calls.rounds.append(
                        [runner.call(tokens, start, all_logits=phase == "block", into=calls) for _ in range(repeats)]
                    )
            yield phase, sizes[phase], found


def rows_of(phase: str, tokens: int, found: dict[str, Calls], graphs: bool) -> list[Row]:
    out = []
    for mechanism, calls in found.items():
        middle, low, high = calls.overhead(found[OFF])
        out.append(
            Row(
                phase, graphs, mechanism, tokens, calls.count, 1e3 * calls.median_s, tokens / calls.median_s,
                middle, low, high, calls.reused / calls.count, calls.bus / calls.count,
            )
        )  # fmt: skip
    return out


def without_cuda_graphs() -> list[Row]:
    """Decode and block of this very command line, in a process that has CUDA graphs switched off."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--json", str(path), "--ubatches", "", "--no-graphs-off"]
        drop = {"--plot", "--markdown"}
        command = [c for i, c in enumerate(command) if c not in drop and command[i - 1] != "--plot"]
        done = subprocess.run(command, env={**os.environ, WITHOUT_GRAPHS: "1"}, capture_output=True, text=True)
        if done.returncode:
            raise ArgumentError(f"the run with {WITHOUT_GRAPHS}=1 failed:\n{done.stderr[-2000:]}")
        return [Row(**{**row, "cuda_graphs": False}) for row in json.loads(path.read_text())["rows"]]


def table_of(rows: list[Row], markdown: bool) -> Table:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    names = ("phase", "CUDA graphs", "capture", "ms", "tok/s", "overhead, %", "quartiles", "reused", "bus, B")
    for name in names:
        table.add_column(name, justify="left" if name in names[:3] else "right", no_wrap=True)
    for r in rows:
        table.add_row(
            *(r.phase, "as llama.cpp has them" if r.cuda_graphs else "disabled", r.mechanism),
            *(f"{r.median_ms:.3f}", f"{r.tok_s:,.0f}"),
            *(("", "") if r.mechanism == OFF else (f"{r.overhead_pct:+.1f}", f"{r.overhead_low_pct:+.1f} {r.overhead_high_pct:+.1f}")),
            *(f"{r.reused:.2f}", f"{r.bus_bytes:,.0f}"),
        )  # fmt: skip
    return table


def plot(rows: list[Row], path: Path) -> None:
    """Overhead by phase, mechanisms side by side, quartiles as whiskers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [r for r in rows if r.cuda_graphs and r.mechanism != OFF]
    phases, mechanisms = (list(dict.fromkeys(getattr(r, name) for r in shown)) for name in ("phase", "mechanism"))
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (mechanism, colour) in enumerate(zip(mechanisms, ("#a83225", "#2563a8"), strict=False)):
        mine = [next(r for r in shown if (r.phase, r.mechanism) == (phase, mechanism)) for phase in phases]
        heights = np.array([r.overhead_pct for r in mine])
        reach = np.abs([[r.overhead_low_pct for r in mine], [r.overhead_high_pct for r in mine]] - heights)
        xs = np.arange(len(phases)) + 0.8 * ((i + 0.5) / len(mechanisms) - 0.5)
        axes.bar(xs, heights, 0.75 / len(mechanisms), yerr=reach, color=colour, ecolor="#1f2933", label=mechanism)
    axes.axhline(0, color="#1f2933", linewidth=0.8)
    axes.set_xticks(range(len(phases)), phases)
    axes.set_ylabel("overhead of capture, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.lower().lstrip(".")))


def main(
    model: Annotated[Path, typer.Option("-m", "--model", help="Target (GGUF).")],
    device: Annotated[str, typer.Option(help="Where the mirror lies.")] = "auto",
    n_gpu_layers: Annotated[int, typer.Option("-ngl", "--gpu-layers", help="Blocks on the GPU; -1: all.")] = -1,
    threads: Annotated[int, typer.Option("-t", "--threads", help="0: llama.cpp's own number.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="How the mirror stores rows.")] = "f32",
    block: Annotated[int, typer.Option(help="Tokens of a block.", min=1)] = 8,
    prefill: Annotated[int, typer.Option(help="Tokens of a prefill.", min=2)] = 2048,
    ubatches: Annotated[str, typer.Option(help="Sizes of micro-batches for it, comma-separated.")] = "512,2048",
    prompt: Annotated[int, typer.Option(help="Tokens before what is decoded.", min=1)] = 512,
    rounds: Annotated[int, typer.Option(help="Rounds in which all take turns.", min=2)] = 30,
    repeats: Annotated[int, typer.Option(help="Calls in a round, but for prefill.", min=1)] = 10,
    mechanisms: Annotated[str, typer.Option(help="Beside off, comma-separated.")] = "callback,outputs",
    graphs_off: Annotated[bool, typer.Option(help="Also without CUDA graphs, if layers are on a GPU.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw a picture (.png, .svg, .pdf).")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Table as Markdown.")] = False,
) -> None:
    if prompt + block > prefill:
        raise ArgumentError(f"--prompt {prompt} and --block {block} are more than the --prefill of {prefill} tokens")
    if json_file:
        check_writable(json_file)
    if plot_file:
        check_plot(plot_file)
    ModelInfo.read(model)  # a file that is none is told as such
    names = tuple(str(CaptureMechanism(name)) for name in mechanisms.split(","))
    options = Options(
        model, device, n_gpu_layers, threads, dtype, block, prefill, prompt, rounds, repeats, names
    )  # fmt: skip
    graphs = not os.environ.get(WITHOUT_GRAPHS)
    rows: list[Row] = []
    for phase, size, found in measure(options, min(512, prefill), ["decode", "block"]):
        rows += rows_of(phase, size, found, graphs)
    for n_ubatch in [int(n) for n in ubatches.split(",") if n]:
        for phase, size, found in measure(options, n_ubatch, []):
            rows += rows_of(phase, size, found, graphs)
    if graphs and graphs_off and n_gpu_layers != 0 and find_device("auto").type != "CPU":
        rows += without_cuda_graphs()

    console = Console(width=None if Console().is_terminal else 240)
    console.print(
        f"{model.name}; mirror of {dtype} on {find_device(device).name}, -ngl {n_gpu_layers}; {describe(threads)}; "
        f"{rounds} rounds, {repeats} calls each (prefill: 1)"
    )
    console.print(table_of(rows, markdown))
    if json_file:
        report = {
            "machine": describe(threads),
            "threads": threads or default_threads(),
            "versions": {"ggml_mirror": __version__, "llama_cpp": llama_cpp.__version__},
            "options": {**asdict(options), "model": model.name},
            "rows": [asdict(row) for row in rows],
        }
        write_json(report, json_file)
    if plot_file:
        plot(rows, plot_file)


if __name__ == "__main__":
    run_script(main)
