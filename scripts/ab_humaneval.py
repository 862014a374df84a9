"""Does a smaller feature dtype cost acceptance? One target and draft, every dtype, HumanEval's prompts, greedy.

    python scripts/ab_humaneval.py -m TARGET.gguf -md DRAFT.gguf --resume ab.jsonl --json ab.json --plot ab.png

All dtypes decode each prompt before the next prompt is taken, in an order that moves on with each prompt, so that a
disturbance of the machine hits all alike. That needs the target once per dtype (its file is mapped once on a CPU); where device
memory does not allow it, --sequential takes one dtype after another.

--dtypes names what the mirror stores: a dtype for raw rows, fused:DTYPE for fused ones.

Columns:

    accepted    accepted / proposed drafted tokens, their ratio, and its 95 % interval (bootstrap over prompts, fixed seed)
    anchor      the same with each step's first token, which the target itself chose, counted as proposed and accepted: the
                definition that DFlash servers have published
    tau         mean committed tokens per draft step, the bonus token included
    decode      tokens per second from the first token on; output: from the prompt on, prefill included
    draft ms    mean time of a draft step, reading the window included
    mirror      bytes of the ring
    process     peak resident memory of a process that holds this dtype alone and decodes the first prompt; device: by how much
                that lowered the device's free memory (GPUs only)
    vs f32      paired difference to the first dtype with its 95 % interval: acceptance in points, tau
    texts       prompts whose tokens equal the first dtype's; equal plain decoding's (--plain). --json lists each first difference with
                the gap between the target's two largest logits at that place

A long run can be shared out: --part 1/4 --resume 1.jsonl and so on, each on cores of its own (taskset); then
`cat 1.jsonl 2.jsonl ... > all.jsonl` and the same command with --resume all.jsonl and no --part prints the whole.

Drafted tokens beyond --n-predict do not count as proposed, as in llama.cpp's server.

Gate, for each dtype but the first and each style: its acceptance may be up to --max-acceptance-drop points below the first dtype's.
"FAIL", and exit code 1, if the whole paired interval lies beyond that; "pass" if the whole interval lies within; "open" if the limit
lies inside the interval, which more prompts would settle. Exit code 2: the run was not possible as asked.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import llama_cpp
import typer
from decoding import Counts, Generation, first_difference, generate, load, storage, top_two_gap
from humaneval import Task, humaneval_prompts, make_tasks
from intervals import FAIL, Interval, gate, ratio, ratio_difference
from journal import Journal, part_of
from llama_cpp import Llama
from machine import describe
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from script import run as run_script

from ggml_mirror import DFlashLlama, __version__, find_device, fingerprint
from ggml_mirror.byte_size import format_bytes
from ggml_mirror.errors import ArgumentError
from ggml_mirror.output import check_writable, write_atomically, write_json
from ggml_mirror.plot import check_plot

PLAIN = "plain"


@dataclass(frozen=True)
class Setup:
    """What is run: every field but ``n_threads`` may change a text."""

    model: str
    draft: str
    n_ctx: int
    n_predict: int
    draft_window: int | None
    draft_device: str
    n_gpu_layers: int
    n_threads: int

    def load(self, variant: str) -> Llama:
        """The model for ``variant``: how the mirror stores rows, or :data:`PLAIN`."""
        common = dict(n_ctx=self.n_ctx, n_gpu_layers=self.n_gpu_layers, n_threads=self.n_threads)
        if variant == PLAIN:
            return load(self.model, None, **common)
        return load(
            self.model,
            self.draft,
            stored=variant,
            draft_window=self.draft_window,
            draft_device=self.draft_device,
            **common,
        )


@dataclass(frozen=True)
class Memory:
    mirror_bytes: int
    process_bytes: int
    device_bytes: int | None


@dataclass(frozen=True)
class Difference:
    """Where a text first differs from another: the target's two largest logits there are ``gap`` apart."""

    prompt: str
    index: int
    gap: float


@dataclass(frozen=True)
class Line:
    """One dtype in one style."""

    style: str
    dtype: str
    prompts: int
    tokens: int
    counts: Counts
    acceptance: Interval
    decode_tok_s: float
    output_tok_s: float
    draft_ms: float
    memory: Memory
    acceptance_difference: Interval
    tau_difference: Interval
    verdict: str
    like_reference: list[Difference]
    like_plain: list[Difference] | None

    def to_json(self) -> dict[str, Any]:
        counts = self.counts
        return {
            **asdict(self),
            "acceptance_with_anchor": counts.acceptance_with_anchor,
            "tau": counts.tau,
            "texts_as_reference": self.prompts - len(self.like_reference),
            "texts_as_plain": None if self.like_plain is None else self.prompts - len(self.like_plain),
        }


# ------------------------------------------------------------------------------------------------------------ the run


def run(setup: Setup, variants: list[str], tasks: list[Task], journal: Journal, sequential: bool) -> None:
    """Decode what the journal does not hold yet."""
    todo = [(number, task, v) for number, task in enumerate(tasks) for v in _rotated(variants, number)]
    todo = [entry for entry in todo if _key(entry[1], entry[2]) not in journal]
    if not todo:
        return
    if sequential:
        todo.sort(key=lambda entry: variants.index(entry[2]))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress,
        _Models(setup, one=sequential) as models,
    ):
        bar = progress.add_task("", total=len(todo))
        for _, task, variant in todo:
            progress.update(bar, description=f"{task.key}, {variant}")
            journal.add(_key(task, variant), generate(models[variant], task.tokens, setup.n_predict).to_json())
            progress.advance(bar)


def _rotated(variants: list[str], by: int) -> list[str]:
    by %= len(variants)
    return variants[by:] + variants[:by]


def _key(task: Task, variant: str) -> str:
    return f"{task.key}/{variant}"


class _Models:
    """Models by variant, loaded when first asked for; with ``one``, only the latest is kept."""

    def __init__(self, setup: Setup, *, one: bool) -> None:
        self._setup, self._one = setup, one
        self._loaded: dict[str, Llama] = {}

    def __enter__(self) -> _Models:
        return self

    def __exit__(self, *_: object) -> None:
        for llm in self._loaded.values():
            llm.close()
        self._loaded.clear()

    def __getitem__(self, variant: str) -> Llama:
        if variant not in self._loaded:
            if self._one:
                self.__exit__()
            self._loaded[variant] = self._setup.load(variant)
            # The first evaluation touches weights and buffers for the first time: not on the first prompt's account.
            generate(self._loaded[variant], [self._loaded[variant].token_bos()] * 16, 2)
        return self._loaded[variant]


def measure_memory(setup: Setup, dtype: str, tokens: list[int]) -> Memory:
    """In a process of its own, since a process has one peak."""
    command = [sys.executable, __file__, "--memory-of", json.dumps({**asdict(setup), "dtype": dtype, "tokens": tokens})]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return Memory(**json.loads(done.stdout))


def peak_memory() -> int:
    """Peak resident bytes of this process. Linux hands a parent's ru_maxrss down to its children, so that is second choice."""
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _memory_process(request: str) -> None:
    asked = json.loads(request)
    dtype, tokens = asked.pop("dtype"), asked.pop("tokens")
    setup = Setup(**asked)
    device = find_device("auto")
    before = device.memory_free
    with ExitStack() as stack:
        llm = setup.load(dtype)
        stack.callback(llm.close)
        generate(llm, tokens, setup.n_predict)
        assert isinstance(llm, DFlashLlama)
        peak = peak_memory()
        taken = None if device.is_host else before - find_device(device.name).memory_free
        print(json.dumps(asdict(Memory(llm.mirror.nbytes, peak, taken))))


# -------------------------------------------------------------------------------------------------------- the results


def summarise(
    setup: Setup,
    dtypes: list[str],
    tasks: list[Task],
    journal: Journal,
    memory: dict[str, Memory],
    limit: float,
    plain: bool,
) -> list[Line]:
    lines = []
    with _gaps(setup) as gap:
        for style, group in groupby(tasks, key=lambda task: task.style):
            of_style = list(group)

            def results(variant: str, of_style: list[Task] = of_style) -> list[Generation]:
                return [Generation.from_json(journal[_key(task, variant)]) for task in of_style]

            reference = results(dtypes[0])
            plain_texts = results(PLAIN) if plain else None
            for dtype in dtypes:
                own = reference if dtype == dtypes[0] else results(dtype)
                lines.append(_line(style, dtype, of_style, own, reference, plain_texts, memory[dtype], limit, gap))
    return lines


def _line(
    style: str,
    dtype: str,
    tasks: list[Task],
    results: list[Generation],
    reference: list[Generation],
    plain: list[Generation] | None,
    memory: Memory,
    limit: float,
    gap: Any,
) -> Line:
    mine, others = _accepted(results), _accepted(reference)
    points = ratio_difference(mine, others, 100.0)

    def differences(to: list[Generation]) -> list[Difference]:
        found = []
        for task, a, b in zip(tasks, results, to, strict=True):
            # The end of a text is a token too, of which only its place is kept: -1 stands for it.
            index = first_difference([*a.tokens, *[-1] * a.ended], [*b.tokens, *[-1] * b.ended])
            if index is not None:
                found.append(Difference(task.name, index, gap(task.tokens + a.tokens[:index])))
        return found

    decode_s, steps = sum(r.decode_s for r in results), sum(len(r.accepted_by_step) for r in results)
    return Line(
        style=style,
        dtype=dtype,
        prompts=len(tasks),
        tokens=sum(r.generated for r in results),
        counts=sum((r.counts for r in results), Counts()),
        acceptance=ratio(*mine, 100.0),
        decode_tok_s=sum(r.generated - 1 for r in results) / decode_s if decode_s else 0.0,
        output_tok_s=sum(r.generated for r in results) / sum(r.wall_s for r in results),
        draft_ms=1e3 * sum(r.draft_s for r in results) / steps if steps else 0.0,
        memory=memory,
        acceptance_difference=points,
        tau_difference=ratio_difference(_per_step(results), _per_step(reference)),
        verdict="" if results is reference else gate(points, limit),
        like_reference=differences(reference),
        like_plain=None if plain is None else differences(plain),
    )


def _accepted(results: list[Generation]) -> tuple[list[float], list[float]]:
    return [float(r.counts.accepted) for r in results], [float(r.counts.proposed) for r in results]


def _per_step(results: list[Generation]) -> tuple[list[float], list[float]]:
    return [float(r.counts.accepted) for r in results], [float(r.counts.steps) for r in results]


@contextmanager
def _gaps(setup: Setup) -> Iterator[Any]:
    """The target's top-two gap after some tokens, as a function; the target is loaded at its first use."""
    with _Models(setup, one=True) as models:
        yield lambda tokens: top_two_gap(models[PLAIN], tokens)


def result_table(lines: list[Line], markdown: bool) -> Table:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    names = (
        "style",
        "dtype",
        "accepted",
        "%",
        "95 %",
        "anchor",
        "%",
        "tau",
        "decode tok/s",
        "output tok/s",
        "draft ms",
    )
    for name in (*names, "mirror", "process", "device"):
        table.add_column(name, justify="left" if name in ("style", "dtype") else "right", no_wrap=True)
    for x in lines:
        c, m = x.counts, x.memory
        table.add_row(
            *(x.style, x.dtype, f"{c.accepted}/{c.proposed}", f"{100 * c.acceptance:.1f}"),
            f"{x.acceptance.low:.1f}-{x.acceptance.high:.1f}",
            *(f"{c.accepted + c.steps}/{c.proposed + c.steps}", f"{100 * c.acceptance_with_anchor:.1f}"),
            *(f"{c.tau:.3f}", f"{x.decode_tok_s:.2f}", f"{x.output_tok_s:.2f}", f"{x.draft_ms:.3f}"),
            *(format_bytes(m.mirror_bytes), format_bytes(m.process_bytes)),
            "" if m.device_bytes is None else format_bytes(m.device_bytes),
        )
    return table


def difference_table(lines: list[Line], reference: str, markdown: bool) -> Table:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    names = ("style", "dtype", f"points vs {reference}", f"tau vs {reference}", "gate")
    for name in (*names, f"texts = {reference}", "texts = plain", "largest gap at a difference"):
        table.add_column(name, justify="left" if name in ("style", "dtype", "gate") else "right", no_wrap=True)
    for x in lines:
        gaps = [d.gap for d in (*x.like_reference, *(x.like_plain or ()))]
        first = x.dtype == reference
        table.add_row(
            *(x.style, x.dtype),
            *(("", "", "") if first else (str(x.acceptance_difference), str(x.tau_difference), x.verdict)),
            "" if first else f"{x.prompts - len(x.like_reference)}/{x.prompts}",
            "" if x.like_plain is None else f"{x.prompts - len(x.like_plain)}/{x.prompts}",
            f"{max(gaps):.3f}" if gaps else "",
        )
    return table


def plot(lines: list[Line], reference: str, limit: float, path: Path) -> None:
    """Acceptance less the reference's, with its interval, per dtype and style; the gate as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [x for x in lines if x.dtype != reference]
    dtypes = list(dict.fromkeys(x.dtype for x in shown))
    styles = list(dict.fromkeys(x.style for x in shown))
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(0, color="#1f2933", linewidth=1)
    axes.axhline(-limit, color="#b4471f", linestyle=(0, (5, 3)), linewidth=1.4, label=f"gate: -{limit:g} points")
    for place, (style, colour) in enumerate(zip(styles, ("#2563a8", "#c9a227"), strict=False)):
        of_style = [x for x in shown if x.style == style]
        xs = [dtypes.index(x.dtype) + 0.16 * (place - (len(styles) - 1) / 2) for x in of_style]
        ys = [x.acceptance_difference for x in of_style]
        errors = [[y.value - y.low for y in ys], [y.high - y.value for y in ys]]
        label = f"{style}, {of_style[0].prompts} prompts"
        axes.errorbar(xs, [y.value for y in ys], errors, fmt="o", color=colour, capsize=4, label=label)
    axes.set_xticks(range(len(dtypes)), dtypes, rotation=30 if len(dtypes) > 6 else 0)
    axes.set_xlim(-0.6, len(dtypes) - 0.4)
    axes.set_ylabel(f"acceptance less that of {reference}, points")
    axes.set_title("95 % paired bootstrap intervals over prompts", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.lower().lstrip(".")))


# ------------------------------------------------------------------------------------------------------- command line


def main(
    model: Annotated[Path | None, typer.Option("-m", "--model", help="Target (GGUF).")] = None,
    draft: Annotated[Path | None, typer.Option("-md", "--model-draft", help="DFlash draft (GGUF).")] = None,
    dtypes: Annotated[
        str, typer.Option(help="Comma-separated, as f32,q8_0,fused:q4_0; the first is the reference.")
    ] = "f32,bf16,f16,q8_0",
    prompts: Annotated[int, typer.Option(help="How many of the prompts; 0: all.", min=0)] = 0,
    prompt_file: Annotated[Path | None, typer.Option(help="Other prompts (.txt, .jsonl) than HumanEval's 164.")] = None,
    style: Annotated[str, typer.Option(help="raw, chat or both.")] = "both",
    n_predict: Annotated[int, typer.Option("-n", "--n-predict", help="Tokens per prompt.", min=2)] = 128,
    n_ctx: Annotated[int, typer.Option("-c", "--ctx-size", help="Context.", min=32)] = 1024,
    n_gpu_layers: Annotated[int, typer.Option("-ngl", "--gpu-layers", help="Blocks on the GPU; -1: all.")] = -1,
    threads: Annotated[int, typer.Option("-t", "--threads", help="0: llama.cpp's own number.", min=0)] = 0,
    draft_window: Annotated[int, typer.Option(help="Rows that the draft attends to; 0: the context.", min=0)] = 0,
    draft_device: Annotated[str, typer.Option(help="Device of draft and mirror.")] = "auto",
    plain: Annotated[bool, typer.Option("--plain", help="Compare texts with plain decoding too.")] = False,
    sequential: Annotated[bool, typer.Option("--sequential", help="One dtype after another, to save memory.")] = False,
    max_acceptance_drop: Annotated[float, typer.Option(help="The gate, in points of acceptance.", min=0)] = 1.0,
    resume: Annotated[Path | None, typer.Option(help="Keep results in this .jsonl and go on from it.")] = None,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only every Nth prompt, from the Ith, into --resume.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw a picture (.png, .svg, .pdf).")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables as Markdown.")] = False,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    if memory_of is not None:
        return _memory_process(memory_of)
    if model is None or draft is None:
        raise ArgumentError("-m TARGET.gguf and -md DRAFT.gguf are needed")
    names = [storage(name) for name in dtypes.split(",")]
    if len(set(names)) != len(names):
        raise ArgumentError(f"--dtypes {dtypes}: each once")
    if part and not resume:
        raise ArgumentError("--part needs --resume FILE, to keep its results")
    part_of([], part)
    if json_file:
        check_writable(json_file)
    if plot_file:
        check_plot(plot_file)
    setup = Setup(
        str(model), str(draft), n_ctx, n_predict, draft_window or None, draft_device, n_gpu_layers, threads
    )  # fmt: skip
    chosen = humaneval_prompts(prompt_file)
    chosen = chosen[: prompts or len(chosen)]

    variants = [*names, *([PLAIN] if plain else [])]
    block = 64  # the largest that a draft may have
    with _Models(setup, one=True) as models:
        tasks = make_tasks(models[names[0]], chosen, style, limit=n_ctx - n_predict - block)
    settings = {
        "target": fingerprint(model),
        "draft": fingerprint(draft),
        **{name: value for name, value in asdict(setup).items() if name not in ("model", "draft")},
        "llama_cpp": llama_cpp.__version__,
    }
    journal = Journal(resume, settings)
    try:
        if len(journal):
            Console(stderr=True).print(f"{resume} holds {len(journal)} results: going on from there")
        run(setup, variants, part_of(tasks, part), journal, sequential)
        if part:
            return
        memory = {name: measure_memory(setup, name, tasks[0].tokens) for name in names}
        lines = summarise(setup, names, tasks, journal, memory, max_acceptance_drop, plain)
    finally:
        journal.close()

    console = Console(width=None if Console().is_terminal else 200)
    console.print(f"{model.name} + {draft.name}; {describe(threads)}; greedy, {n_predict} tokens, {len(tasks)} tasks")
    if plain:
        speed = _plain_speed(tasks, journal)
        console.print(
            f"plain decoding: {speed['decode_tok_s']:.2f} decode tok/s, {speed['output_tok_s']:.2f} output tok/s"
        )
    console.print(result_table(lines, markdown))
    if len(names) > 1:
        console.print(difference_table(lines, names[0], markdown))
    if json_file:
        report = {
            "machine": describe(threads),
            "versions": {"ggml_mirror": __version__, "llama_cpp": llama_cpp.__version__},
            "settings": settings,
            "max_acceptance_drop": max_acceptance_drop,
            "lines": [line.to_json() for line in lines],
            "plain": _plain_speed(tasks, journal) if plain else None,
        }
        write_json(report, json_file)
    if plot_file:
        plot(lines, names[0], max_acceptance_drop, plot_file)
    failed = [line for line in lines if line.verdict == FAIL]
    for line in failed:
        console.print(
            f"[red]FAIL[/] {line.style}, {line.dtype}: {line.acceptance_difference} points, limit -{max_acceptance_drop}"
        )
    raise typer.Exit(1 if failed else 0)


def _plain_speed(tasks: list[Task], journal: Journal) -> dict[str, float]:
    results = [Generation.from_json(journal[_key(task, PLAIN)]) for task in tasks]
    return {
        "decode_tok_s": sum(r.generated - 1 for r in results) / max(sum(r.decode_s for r in results), 1e-9),
        "output_tok_s": sum(r.generated for r in results) / sum(r.wall_s for r in results),
    }


if __name__ == "__main__":
    run_script(main)
