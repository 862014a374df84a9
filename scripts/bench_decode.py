"""Decoding speed side by side: plain, prompt lookup, DFlashLlama per dtype, and llama.cpp's own draft-dflash.

    python scripts/bench_decode.py -m TARGET.gguf -md DRAFT.gguf --prompts 20 --llama-server PATH --json decode.json

Each prompt is decoded by every variant before the next prompt is taken, in an order that moves on with each prompt; greedy. A ratio is
the median, over prompts, of the ratios of decode speeds on the same prompt. Variants:

    plain          llama_cpp.Llama
    lookup         the same with llama-cpp-python's LlamaPromptLookupDecoding (it keeps n_ctx x n_vocab logits)
    f32, q8_0 ...  DFlashLlama with that feature dtype; fused:q8_0 ...: with fused rows
    server-plain   llama-server without a draft
    server         llama-server --spec-type draft-dflash: what the goals compare with

Decode is from the first token on; prefill is not in it. Figures of llama-server are from the "timings" of its answers, which do not
count steps: there, steps are the tokens after the first, less those accepted. Acceptance is accepted / proposed drafted tokens, counted
as llama-server counts. "python ms" is Python's own time per step
(per token where nothing is drafted): decoding less all native calls, median over prompts.

A long run can be shared out: --part 1/4 --resume 1.jsonl and so on, each on cores of its own (taskset); then
`cat 1.jsonl 2.jsonl ... > all.jsonl` and the same command with --resume all.jsonl and no --part prints the whole.

Threads that spin for each other lose most to other work on the machine: run on an idle one, or with -t below its cores.

llama-server comes with llama.cpp's source inside llama-cpp-python's sdist. To build it against the very ggml that llama_cpp
loads, so that both sides run the same kernels:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36     # then unpack it: tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B llama-server-build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \\
        -DLLAMA_USE_SYSTEM_GGML=ON -DCMAKE_PREFIX_PATH="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \\
        -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
    cmake --build llama-server-build --target llama-server --parallel      # the program is llama-server-build/bin/llama-server

(Without LLAMA_USE_SYSTEM_GGML and CMAKE_PREFIX_PATH it builds a ggml of its own.)
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import llama_cpp
import typer
from decoding import Counts, Generation, generate, load, storage
from humaneval import Task, humaneval_prompts, make_tasks
from journal import Journal, part_of
from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from machine import describe
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from script import run as run_script

from ggml_mirror import __version__, fingerprint
from ggml_mirror.errors import ArgumentError
from ggml_mirror.output import check_writable, write_atomically, write_json
from ggml_mirror.plot import check_plot
from ggml_mirror.prompt_run import default_threads

PLAIN, LOOKUP, SERVER, SERVER_PLAIN = "plain", "lookup", "server", "server-plain"
START_S = 120.0

Decode = Callable[[list[int]], Generation]


# ----------------------------------------------------------------------------------------------------- llama-server


class LlamaServer:
    """A llama-server on a free port of this machine, one slot, no prompt cache.

    Args:
        more: further arguments of the program.

    Raises:
        ArgumentError: it does not start; the message has the end of its log.
    """

    def __init__(
        self,
        program: Path,
        model: str,
        draft: str | None,
        *,
        n_ctx: int,
        n_gpu_layers: int,
        n_threads: int,
        n_draft: int,
        more: Sequence[str] = (),
    ) -> None:
        self._url = f"http://127.0.0.1:{_free_port()}"
        command = [str(program), "-m", model, "-c", str(n_ctx), "-np", "1", "-fa", "on", "-t", str(n_threads)]
        command += ["-tb", str(n_threads), "--no-cache-prompt", "--cache-ram", "0", "--host", "127.0.0.1"]
        command += ["--port", self._url.rsplit(":", 1)[1]]
        if n_gpu_layers >= 0:
            command += ["-ngl", str(n_gpu_layers)]
        if draft is not None:
            command += ["-md", draft, "--spec-type", "draft-dflash", "--spec-draft-n-max", str(n_draft)]
            command += ["--spec-draft-threads", str(n_threads), "--spec-draft-threads-batch", str(n_threads)]
        self.command = command = [*command, *more]
        self._log = tempfile.NamedTemporaryFile("w+")
        try:
            self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        except OSError as error:
            raise ArgumentError(f"cannot run {program}: {error.strerror}") from error
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        tail = self.log()[-1500:]
        raise ArgumentError(f"{self.command[0]} did not become ready ({' '.join(self.command[1:])}):\n{tail}")

    def log(self) -> str:
        """What it has printed so far."""
        return Path(self._log.name).read_text(errors="replace")

    def generate(self, tokens: list[int], n_predict: int) -> Generation:
        asked = {
            "prompt": tokens, "n_predict": n_predict, "temperature": 0.0, "cache_prompt": False,
            "return_tokens": True, "stream": False, "repeat_penalty": 1.0,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self._url}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        started = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                got = json.load(answer)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ArgumentError(f"{self.command[0]} gave no answer ({error}){self._last_words()}") from error
        return generation_of(got, len(tokens), time.perf_counter() - started)

    def _last_words(self) -> str:
        """Why it ended, where it tells: ggml names the assertion that failed."""
        said = [line for line in self.log().splitlines() if "GGML_ASSERT" in line or "error" in line.lower()]
        return f"; the last error in its log: {said[-1].strip()}" if said else "; its log tells of no error"

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def generation_of(answer: dict[str, Any], prompt_tokens: int, wall_s: float) -> Generation:
    """A server's answer in this package's terms. Steps are evaluations after the prefill: each gave its accepted tokens and one more."""
    timings = answer["timings"]
    accepted, n = timings.get("draft_n_accepted", 0), timings["predicted_n"]
    ended = answer.get("stop_type") == "eos"
    counts = Counts(max(n - 1 - accepted, 0), timings["draft_n"], accepted) if "draft_n" in timings else Counts()
    tokens = answer["tokens"]
    return Generation(
        tokens=tokens[: n - ended],
        ended=ended,
        counts=counts,
        accepted_by_step=[],
        prompt_tokens=prompt_tokens,
        wall_s=wall_s,
        # Its clock runs from the first token on, as ours does.
        decode_s=timings["predicted_ms"] / 1e3,
    )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# ---------------------------------------------------------------------------------------------------------- variants


class CountingLookup(LlamaPromptLookupDecoding):
    """llama-cpp-python's prompt lookup, which tells nobody how much it drafted."""

    calls = drafted = 0

    def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
        tokens = super().__call__(input_ids, **kwargs)
        self.calls += 1
        self.drafted += len(tokens)
        return tokens


def lookup_decoder(llm: Llama, lookup: CountingLookup, n_predict: int) -> Decode:
    def decode(tokens: list[int]) -> Generation:
        lookup.calls = lookup.drafted = 0
        result = generate(llm, tokens, n_predict)
        # Each call follows one evaluation, the prefill's first; each later one committed one token of the target's own.
        accepted = max(result.generated - lookup.calls, 0)
        return replace(result, counts=Counts(max(lookup.calls - 1, 0), lookup.drafted, accepted))

    return decode


@dataclass(frozen=True)
class Row:
    """One variant in one style."""

    style: str
    variant: str
    prompts: int
    tokens: int
    counts: Counts
    decode_tok_s: float
    output_tok_s: float
    tokens_per_step: float
    ratio_to_plain: float
    ratio_to_server: float | None
    python_ms: float | None
    draft_ms: float
    verify_ms: float
    texts_as_plain: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "acceptance": self.counts.acceptance, "tau": self.counts.tau}


@dataclass(frozen=True)
class Goal:
    name: str
    wanted: str
    reached: float
    met: bool


def summarise(style: str, results: dict[str, list[Generation]]) -> list[Row]:
    """Rows from each variant's results, prompt by prompt in the same order."""
    plain = results[PLAIN]
    server = results.get(SERVER)

    def ratio(mine: list[Generation], others: list[Generation]) -> float:
        return median(a.decode_tok_s / b.decode_tok_s for a, b in zip(mine, others, strict=True) if b.decode_tok_s)

    rows = []
    for variant, mine in results.items():
        counts = sum((r.counts for r in mine), Counts())
        after_first = sum(max(r.generated - 1, 0) for r in mine)
        steps = counts.steps
        clocked = [1e3 * r.python_s / (r.counts.steps or r.generated) for r in mine if r.python_s is not None]
        rows.append(
            Row(
                style=style,
                variant=variant,
                prompts=len(mine),
                tokens=sum(r.generated for r in mine),
                counts=counts,
                decode_tok_s=median(r.decode_tok_s for r in mine),
                output_tok_s=median(r.generated / r.wall_s for r in mine),
                tokens_per_step=after_first / steps if steps else 1.0,
                ratio_to_plain=ratio(mine, plain),
                ratio_to_server=ratio(mine, server) if server else None,
                python_ms=median(clocked) if len(clocked) == len(mine) else None,
                draft_ms=1e3 * sum(r.draft_s for r in mine) / steps if steps else 0.0,
                verify_ms=1e3 * sum(r.verify_s for r in mine) / steps if steps else 0.0,
                texts_as_plain=sum(a.tokens == b.tokens for a, b in zip(mine, plain, strict=True)),
            )
        )
    return rows


def goals(rows: list[Row], results: dict[str, list[Generation]]) -> list[Goal]:
    """For f32: acceptance within 1 point of llama-server's, as fast as it; q8_0 as fast as 0.99 x f32; Python under 0.5 ms a step."""
    of = {row.variant: row for row in rows}
    f32, server = of.get("f32"), of.get(SERVER)
    found = []
    if f32 and server:
        points = 100 * (f32.counts.acceptance - server.counts.acceptance)
        found.append(Goal("f32 acceptance less llama.cpp's, points", "within 1", points, abs(points) <= 1))
        assert f32.ratio_to_server is not None
        found.append(Goal("f32 decode speed / llama.cpp's", ">= 1.0", f32.ratio_to_server, f32.ratio_to_server >= 1.0))
    if "f32" in of and "q8_0" in of:
        paired = median(
            a.decode_tok_s / b.decode_tok_s
            for a, b in zip(results["q8_0"], results["f32"], strict=True)
            if b.decode_tok_s
        )
        found.append(Goal("q8_0 decode speed / f32's", ">= 0.99", paired, paired >= 0.99))
    if f32 and f32.python_ms is not None:
        found.append(Goal("f32 Python time per step, ms", "< 0.5", f32.python_ms, f32.python_ms < 0.5))
    return found


def result_table(rows: list[Row], markdown: bool) -> Table:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    names = ("style", "variant", "decode tok/s", "output tok/s", "x plain", "x llama.cpp", "accepted", "%", "tau")
    for name in (*names, "tokens / step", "draft ms", "verify ms", "python ms", "texts = plain"):
        table.add_column(name, justify="left" if name in ("style", "variant") else "right", no_wrap=True)
    for r in rows:
        c = r.counts
        drafted = (
            (f"{c.accepted}/{c.proposed}", f"{100 * c.acceptance:.1f}", f"{c.tau:.2f}") if c.proposed else ("",) * 3
        )
        table.add_row(
            *(r.style, r.variant, f"{r.decode_tok_s:.2f}", f"{r.output_tok_s:.2f}", f"{r.ratio_to_plain:.2f}"),
            "" if r.ratio_to_server is None else f"{r.ratio_to_server:.2f}",
            *drafted,
            f"{r.tokens_per_step:.2f}",
            f"{r.draft_ms:.2f}" if r.draft_ms else "",
            f"{r.verify_ms:.2f}" if r.verify_ms else "",
            "" if r.python_ms is None else f"{r.python_ms:.3f}",
            f"{r.texts_as_plain}/{r.prompts}",
        )
    return table


def plot(rows: list[Row], path: Path) -> None:
    """Decode speed of each variant, styles side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    styles = list(dict.fromkeys(r.style for r in rows))
    variants = list(dict.fromkeys(r.variant for r in rows))
    figure = Figure(figsize=(max(8.0, 1.1 * len(variants)), 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (style, colour) in enumerate(zip(styles, ("#2563a8", "#c9a227"), strict=False)):
        speeds = {r.variant: r.decode_tok_s for r in rows if r.style == style}
        xs = [i + 0.38 * (place - (len(styles) - 1) / 2) for i in range(len(variants))]
        bars = axes.bar(xs, [speeds[v] for v in variants], 0.36, color=colour, label=style)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(variants)), variants)
    axes.set_ylabel("decode, tokens per second (median)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.lower().lstrip(".")))


# ------------------------------------------------------------------------------------------------------ command line


def main(
    model: Annotated[Path, typer.Option("-m", "--model", help="Target (GGUF).")],
    draft: Annotated[Path, typer.Option("-md", "--model-draft", help="DFlash draft (GGUF).")],
    dtypes: Annotated[str, typer.Option(help="Comma-separated, as f32,q8_0,fused:q4_0.")] = "f32,q8_0",
    prompts: Annotated[int, typer.Option(help="How many of the prompts; 0: all.", min=0)] = 20,
    prompt_file: Annotated[Path | None, typer.Option(help="Other prompts (.txt, .jsonl) than HumanEval's 164.")] = None,
    style: Annotated[str, typer.Option(help="raw, chat or both.")] = "raw",
    n_predict: Annotated[int, typer.Option("-n", "--n-predict", help="Tokens per prompt.", min=2)] = 128,
    n_ctx: Annotated[int, typer.Option("-c", "--ctx-size", help="Context.", min=32)] = 1024,
    n_gpu_layers: Annotated[int, typer.Option("-ngl", "--gpu-layers", help="Blocks on the GPU; -1: all.")] = -1,
    threads: Annotated[int, typer.Option("-t", "--threads", help="0: llama.cpp's own number.", min=0)] = 0,
    draft_window: Annotated[int, typer.Option(help="Rows that the draft attends to; 0: the context.", min=0)] = 0,
    lookup: Annotated[bool, typer.Option(help="Prompt lookup too.")] = True,
    llama_server: Annotated[Path | None, typer.Option(help="llama.cpp's llama-server (see above).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw a picture (.png, .svg, .pdf).")] = None,
    resume: Annotated[Path | None, typer.Option(help="Keep results in this .jsonl and go on from it.")] = None,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only every Nth prompt, from the Ith, into --resume.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables as Markdown.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 unless every goal is met.")] = False,
) -> None:
    names = [storage(name) for name in dtypes.split(",")]
    if json_file:
        check_writable(json_file)
    if plot_file:
        check_plot(plot_file)
    if part and not resume:
        raise ArgumentError("--part needs --resume FILE, to keep its results")
    part_of([], part)
    chosen = humaneval_prompts(prompt_file)
    chosen = chosen[: prompts or len(chosen)]
    n_threads = threads or default_threads()
    common: dict[str, Any] = dict(n_ctx=n_ctx, n_gpu_layers=n_gpu_layers, n_threads=n_threads)

    with ExitStack() as stack:

        def opened(llm: Any) -> Any:
            stack.callback(llm.close)
            return llm

        def greedy(llm: Llama) -> Decode:
            return lambda tokens: generate(llm, tokens, n_predict, clock=True)

        plain = opened(load(str(model), None, **common))
        decoders: dict[str, Decode] = {PLAIN: greedy(plain)}
        if lookup:
            drafting = CountingLookup(num_pred_tokens=7)
            # Without logits_all, Llama writes a draft_model's logits past the end of an array of n_batch rows.
            llm = opened(load(str(model), None, draft_model=drafting, logits_all=True, **common))
            decoders[LOOKUP] = lookup_decoder(llm, drafting, n_predict)
        n_draft = 7
        for name in names:
            llm = opened(load(str(model), str(draft), stored=name, draft_window=draft_window or None, **common))
            n_draft = llm.n_draft
            decoders[name] = greedy(llm)
        if llama_server:
            for variant, its_draft in ((SERVER_PLAIN, None), (SERVER, str(draft))):
                server = opened(LlamaServer(llama_server, str(model), its_draft, n_draft=n_draft, **common))
                decoders[variant] = lambda tokens, server=server: server.generate(tokens, n_predict)

        tasks = make_tasks(plain, chosen, style, limit=n_ctx - n_predict - n_draft - 1)
        settings = {
            "target": fingerprint(model), "draft": fingerprint(draft), "n_predict": n_predict, **common,
            "draft_window": draft_window, "llama_cpp": llama_cpp.__version__, "machine": describe(threads),
        }  # fmt: skip
        journal = stack.enter_context(closing(Journal(resume, settings)))
        _run(decoders, part_of(tasks, part), journal)
        if part:
            return
        results = {v: [Generation.from_json(journal[_key(task, v)]) for task in tasks] for v in decoders}

    console = Console(width=None if Console().is_terminal else 200)
    console.print(f"{model.name} + {draft.name}; {describe(threads)}; greedy, {n_predict} tokens; medians over prompts")
    rows, reached = [], []
    for each in dict.fromkeys(task.style for task in tasks):
        of_style = {v: [r for t, r in zip(tasks, got, strict=True) if t.style == each] for v, got in results.items()}
        rows += summarise(each, of_style)
        reached += [replace(g, name=f"{each}: {g.name}") for g in goals(rows[-len(results) :], of_style)]
    console.print(result_table(rows, markdown))
    for goal in reached:
        verdict = "[green]PASS" if goal.met else "[red]FAIL"
        console.print(f"{verdict}[/] {goal.name}: {goal.reached:.3f}, goal {goal.wanted}")
    if json_file:
        report = {
            "machine": describe(threads),
            "versions": {"ggml_mirror": __version__, "llama_cpp": llama_cpp.__version__},
            "n_predict": n_predict,
            "rows": [row.to_json() for row in rows],
            "goals": [asdict(goal) for goal in reached],
            "prompts": {v: {t.key: r.to_json() for t, r in zip(tasks, got, strict=True)} for v, got in results.items()},
        }
        write_json(report, json_file)
    if plot_file:
        plot(rows, plot_file)
    if strict and not all(goal.met for goal in reached):
        raise typer.Exit(1)


def _run(decoders: dict[str, Decode], tasks: list[Task], journal: Journal) -> None:
    """Decode what the journal does not hold yet; a first, uncounted run touches weights and buffers."""
    variants = list(decoders)
    todo = [
        (task, variants[(number + i) % len(variants)])
        for number, task in enumerate(tasks)
        for i in range(len(variants))
    ]
    todo = [(task, variant) for task, variant in todo if _key(task, variant) not in journal]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("warming up", total=len(todo))
        for variant in dict.fromkeys(variant for _, variant in todo):
            decoders[variant](tasks[0].tokens)
        for task, variant in todo:
            progress.update(bar, description=f"{task.key}, {variant}")
            journal.add(_key(task, variant), decoders[variant](task.tokens).to_json())
            progress.advance(bar)


def _key(task: Task, variant: str) -> str:
    return f"{task.key}/{variant}"


if __name__ == "__main__":
    run_script(main)
