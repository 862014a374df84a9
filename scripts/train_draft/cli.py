"""The stages of a training as commands. Each keeps its results in --work and goes on from them if it is run again.

prompts     what the target is to go on from, as tokens          needs llama-cpp-python; no GPU
generate    the target writes the training data                  torch
train       the draft                                            torch
export      its GGUF                                             torch (to read the checkpoint)
evaluate    acceptance on the benchmark's prompts                torch
all         generate, train, export and evaluate, with the target loaded once
plot        loss and accuracy of a report                        matplotlib
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .errors import InputError, TrainingError
from .sequences import Prompts
from .work_files import identity, write_json

if TYPE_CHECKING:
    from .target import Target, TargetFile

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 200)

Model = Annotated[Path, typer.Option("-m", "--model", help="The target, a GGUF.")]
Work = Annotated[Path, typer.Option("--work", help="Folder of what the stages make.")]
Device = Annotated[str, typer.Option(help="torch's name: cuda, cpu; auto: cuda if there is one.")]
Length = Annotated[int, typer.Option(help="Tokens of a training sequence, prompt included; a multiple of 8.", min=32)]
GenerateRows = Annotated[int, typer.Option(help="Sequences that are written at once.", min=1)]
GenerateMinutes = Annotated[float, typer.Option(help="Time for generating.", min=0)]
Tokens = Annotated[float, typer.Option(help="Tokens to generate, in millions; ends the stage earlier.", min=0)]
Greedy = Annotated[float, typer.Option(help="Part of the sequences that is written greedily.", min=0, max=1)]
TrainMinutes = Annotated[float, typer.Option(help="Time for training.", min=0)]
Steps = Annotated[int, typer.Option(help="Steps to train; 0: as time allows.", min=0)]
Rows = Annotated[int, typer.Option(help="Sequences in a training step.", min=1)]
Anchors = Annotated[int, typer.Option(help="Blocks in each of them.", min=1)]
Layers = Annotated[int, typer.Option(help="Layers of the draft.", min=1, max=64)]
BlockSize = Annotated[int, typer.Option(help="Tokens in a block, the last committed one included.", min=2, max=64)]
HeadDim = Annotated[int, typer.Option(help="Width of the draft's heads.", min=2)]
Taps = Annotated[str | None, typer.Option(help="Blocks of the target that are tapped, such as 1,4,8,12,15.")]
MaskToken = Annotated[
    int | None, typer.Option(help="Token that stands for those to be drafted; default: an unused one.")
]
Frequent = Annotated[int, typer.Option(help="The loss is over so many of the data's most frequent tokens,", min=1)]
Random = Annotated[int, typer.Option("--random", help="and so many others that change at each step.", min=0)]
MuonRate = Annotated[float, typer.Option(help="Learning rate of matrices.", min=0)]
AdamRate = Annotated[float, typer.Option(help="Learning rate of norms.", min=0)]
SaveEvery = Annotated[float, typer.Option(help="Seconds between checkpoints.", min=0)]
Output = Annotated[Path, typer.Option("-o", "--output", help="The draft's GGUF.")]
MatrixType = Annotated[str, typer.Option("--type", help="Of the draft's matrices: q8_0, f16, f32.")]
Predict = Annotated[int, typer.Option("-n", "--n-predict", help="Tokens to evaluate on behind each prompt.", min=8)]
EvaluatePrompts = Annotated[int, typer.Option(help="Prompts of the benchmark to evaluate on; 0: all.", min=0)]
Seed = Annotated[int, typer.Option(help="Same seed, same data.", min=0)]
Json = Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Draw loss and accuracy (.png, .svg, .pdf).")]


@app.command()
def prompts(
    model: Model,
    work: Work,
    n: Annotated[int, typer.Option("-n", help="Prompts to make.", min=1)] = 49152,
    longest: Annotated[int, typer.Option(help="Tokens of a prompt, at most.", min=8)] = 192,
    source: Annotated[
        list[Path] | None, typer.Option(help="Python files or folders; default: standard library, packages.")
    ] = None,
    exclude: Annotated[
        Path | None, typer.Option(help="HumanEval.jsonl.gz, or prompts as .jsonl; default: fetched.")
    ] = None,
    own: Annotated[
        Path | None, typer.Option("--prompts", help="Your own prompts (.jsonl) in place of Python functions.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Make the prompts: tokens of Python functions, none of which the benchmark has, and the benchmark's own for evaluation."""
    from .prompts import Benchmark, collect, default_sources
    from .tokenizer import Tokenizer

    benchmark = Benchmark(_benchmark_texts(exclude))
    if own:
        texts = [t for t in _texts(own) if not benchmark.overlaps(t)]
        console.print(f"{len(texts)} prompts of {own}")
    else:
        for path in source or []:
            if not path.exists():
                raise InputError(f"--source {path}: there is no such file or folder")
        texts, counts = collect(benchmark, source or default_sources(), n, seed)
        console.print(
            f"{counts.source} functions of packages, {counts.made_up} made up, {counts.dropped} dropped: benchmark"
        )
    tokenize = Tokenizer(model)
    made = Prompts(
        [t for t in tokenize(texts, longest=longest) if len(t) > 1],
        tokenize(benchmark.texts, longest=1 << 20),
        identity(model),
    )
    made.save(work / "prompts.npz")
    total = sum(map(len, made.prompts))
    console.print(
        f"{work / 'prompts.npz'}: {len(made.prompts)} prompts, {total} tokens; {len(made.evaluation)} for evaluation"
    )


@app.command()
def generate(
    model: Model,
    work: Work,
    device: Device = "auto",
    length: Length = 384,
    generate_rows: GenerateRows = 2048,
    generate_minutes: GenerateMinutes = 5,
    tokens: Tokens = 30,
    greedy: Greedy = 0.5,
    seed: Seed = 0,
) -> None:
    """Let the target write the training data."""
    run = _Run(model, work, device, length)
    run.generate(generate_rows, generate_minutes, tokens, greedy, seed)


@app.command()
def train(
    model: Model,
    work: Work,
    device: Device = "auto",
    train_minutes: TrainMinutes = 10,
    steps: Steps = 0,
    rows: Rows = 64,
    anchors: Anchors = 32,
    layers: Layers = 5,
    block_size: BlockSize = 8,
    head_dim: HeadDim = 64,
    taps: Taps = None,
    mask_token: MaskToken = None,
    frequent: Frequent = 16384,
    random: Random = 4096,
    muon_rate: MuonRate = 0.02,
    adam_rate: AdamRate = 0.003,
    save_every: SaveEvery = 60,
    seed: Seed = 0,
    json_file: Json = None,
    plot_file: PlotFile = None,
) -> None:
    """Train the draft on what the target wrote."""
    run = _Run(model, work, device, plot_file=plot_file)
    run.train(
        _draft_config(run, layers, block_size, head_dim, taps, mask_token),
        seconds=60 * train_minutes, max_steps=steps or 1 << 40, n_rows=rows, n_anchors=anchors, frequent=frequent, random=random,
        muon_rate=muon_rate, adam_rate=adam_rate, save_every=save_every, seed=seed,
    )  # fmt: skip
    run.report(json_file)


@app.command()
def export(model: Model, work: Work, output: Output, matrix_type: MatrixType = "q8_0") -> None:
    """Write the checkpoint's draft as a GGUF for llama.cpp and ggml-mirror."""
    run = _Run(model, work, "cpu", weights=False)
    run.export(output, matrix_type)


@app.command()
def evaluate(
    model: Model,
    work: Work,
    device: Device = "auto",
    n_predict: Predict = 128,
    evaluate_prompts: EvaluatePrompts = 0,
    json_file: Json = None,
) -> None:
    """Acceptance on the benchmark's prompts, greedy, without quantisation of the draft."""
    run = _Run(model, work, device)
    run.evaluate(n_predict, evaluate_prompts)
    run.report(json_file)


@app.command("plot")
def plot_report(
    report: Annotated[Path, typer.Argument(help="What --json wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A .png, .svg or .pdf file.")],
) -> None:
    """Draw the loss and accuracy of a report, where the machine that trained has no matplotlib."""
    import json

    from .plot import check_plot, plot_history

    check_plot()
    try:
        history = json.loads(report.read_text(encoding="utf-8"))["train"]["history"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{report} is no report of a training: {error}") from error
    plot_history(history, output)


@app.command("all")
def all_stages(
    model: Model,
    work: Work,
    output: Output,
    device: Device = "auto",
    length: Length = 384,
    generate_rows: GenerateRows = 2048,
    generate_minutes: GenerateMinutes = 5,
    tokens: Tokens = 30,
    greedy: Greedy = 0.5,
    train_minutes: TrainMinutes = 10,
    steps: Steps = 0,
    rows: Rows = 64,
    anchors: Anchors = 32,
    layers: Layers = 5,
    block_size: BlockSize = 8,
    head_dim: HeadDim = 64,
    taps: Taps = None,
    mask_token: MaskToken = None,
    frequent: Frequent = 16384,
    random: Random = 4096,
    muon_rate: MuonRate = 0.02,
    adam_rate: AdamRate = 0.003,
    save_every: SaveEvery = 60,
    matrix_type: MatrixType = "q8_0",
    n_predict: Predict = 128,
    evaluate_prompts: EvaluatePrompts = 0,
    seed: Seed = 0,
    json_file: Json = None,
    plot_file: PlotFile = None,
) -> None:
    """Generate, train, export and evaluate."""
    run = _Run(model, work, device, length, plot_file=plot_file)
    config = _draft_config(run, layers, block_size, head_dim, taps, mask_token)
    run.generate(generate_rows, generate_minutes, tokens, greedy, seed)
    run.train(
        config,
        seconds=60 * train_minutes, max_steps=steps or 1 << 40, n_rows=rows, n_anchors=anchors, frequent=frequent, random=random,
        muon_rate=muon_rate, adam_rate=adam_rate, save_every=save_every, seed=seed,
    )  # fmt: skip
    run.export(output, matrix_type)
    run.report(json_file)  # whatever happens to the evaluation
    run.evaluate(n_predict, evaluate_prompts)
    run.report(json_file)


class _Run:
    """One call of the program: the target on its device, and the folder."""

    def __init__(
        self,
        model: Path,
        work: Path,
        device: str,
        length: int = 0,
        *,
        weights: bool = True,
        plot_file: Path | None = None,
    ) -> None:
        from .plot import check_plot
        from .target import TargetFile

        if length % 8:
            raise InputError(f"--length {length}: a multiple of 8 is needed")
        if plot_file:
            check_plot()
        self.plot_file = plot_file
        self.work, self.length = work, length
        self.id = identity(model)
        self.file: TargetFile = TargetFile(model)
        self.figures: dict[str, Any] = {"target": self.file.config.name, "device": device}
        self.prompts: Prompts | None = None
        if (work / "prompts.npz").exists():
            self.prompts = Prompts.load(work / "prompts.npz")
            if self.prompts.target != self.id:
                raise InputError(f"{work / 'prompts.npz'} holds another target's tokens: choose another --work folder")
        self.target: Target | None = self._load(device) if weights else None

    def _load(self, device: str) -> Target:
        import torch

        from .target import Target

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            kind = torch.device(device).type
        except RuntimeError as error:
            raise InputError(f"--device {device}: {error}") from error
        if kind == "cuda" and not torch.cuda.is_available():
            raise InputError(f"--device {device}: torch finds no GPU here")
        started = time.monotonic()
        if kind == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # it would make a plan for each new shape
            self.figures["device"] = torch.cuda.get_device_name(torch.device(device))
        dtype = torch.bfloat16 if kind == "cuda" else torch.float32
        longest = max(map(len, self.prompts.evaluation), default=0) if self.prompts else 0
        target = Target(self.file, device=device, dtype=dtype, max_length=longest + 4096)
        console.print(
            f"{self.file.path.name}: {self.file.config.arch}, on {self.figures['device']} in {time.monotonic() - started:.1f} s"
        )
        return target

    def generate(self, n_rows: int, minutes: float, millions: float, greedy: float, seed: int) -> None:
        from .generation import Mix, generate

        if self.prompts is None:
            raise InputError(f"{self.work / 'prompts.npz'} is missing: run the stage prompts first")
        assert self.target is not None
        shares = (greedy, 0.7 * (1 - greedy), 0.3 * (1 - greedy))

        def tell(shards: int, written: int, seconds: float) -> None:
            self.figures["generate"] = {"shards": shards, "tokens": written, "seconds": seconds}
            console.print(
                f"generate: {shards} shards, {written / 1e6:.2f} M tokens, {seconds:.0f} s, {written / seconds:.0f} tok/s"
            )

        generate(
            self.target, self.prompts, self.work / "sequences",
            length=self.length, n_rows=n_rows, seconds=60 * minutes, n_tokens=int(1e6 * millions), mix=Mix(shares=shares), seed=seed,
            tell=tell,
        )  # fmt: skip

    def train(self, config: Any, **settings: Any) -> None:
        from .generation import load_shards
        from .plot import plot_history
        from .training import Progress, Settings, Trainer

        assert self.target is not None
        sequences = load_shards(self.work / "sequences", self.id)
        trainer = Trainer(self.target, sequences, config, Settings(**settings), self.work / "checkpoint.pt", self.id)
        n_parameters = sum(p.numel() for p in trainer.draft.parameters())
        console.print(
            f"train: {len(sequences)} sequences, {sequences.written / 1e6:.2f} M tokens; draft of {n_parameters / 1e6:.1f} M parameters; "
            f"loss over {100 * trainer.vocabulary.coverage:.2f} % of the tokens"
        )
        began, first = time.monotonic(), trainer.progress.step
        told = -1e9

        def tell(progress: Progress) -> None:
            nonlocal told
            if time.monotonic() - told < 5 or not progress.history:
                return
            told = time.monotonic()
            last = progress.history[-1]
            rate = (progress.step - first) / max(told - began, 1e-9)
            accuracy = " ".join(f"{100 * a:.0f}" for a in last["accuracy"])
            console.print(
                f"train: step {progress.step}, {progress.seconds:.0f} s, loss {last['loss']:.3f}, right % {accuracy}, "
                f"{rate:.2f} steps/s, {rate * settings['n_rows'] * sequences.tokens.shape[1]:.0f} tok/s"
            )

        trainer.run(tell)
        history = trainer.progress.history
        self.figures["train"] = {
            "steps": trainer.progress.step, "seconds": trainer.progress.seconds, "parameters": n_parameters,
            "sequences": len(sequences), "tokens": sequences.written, "coverage": trainer.vocabulary.coverage,
            "draft": config.to_json(), "settings": {k: v for k, v in settings.items() if k != "max_steps"}, "history": history,
        }  # fmt: skip
        if self.plot_file:
            plot_history(history, self.plot_file)

    def export(self, output: Path, matrix_type: str) -> None:
        import torch

        from .export import write_draft
        from .model import DraftConfig, DraftModel
        from .training import read_checkpoint

        state = read_checkpoint(self.work / "checkpoint.pt", self.id, torch.device("cpu"))
        draft = DraftModel(DraftConfig.from_json(state["config"]), dtype=torch.float32, max_length=8)
        draft.load_state_dict(state["draft"])
        tensors = {name: t.float().numpy() for name, t in draft.tensors().items()}
        write_draft(output, state["config"], tensors, self.file.reader, matrix_type=matrix_type)
        console.print(
            f"export: {output}, {output.stat().st_size / 1e6:.1f} MB, matrices {matrix_type}, step {state['step']}"
        )

    def evaluate(self, n_predict: int, n_prompts: int) -> None:
        from .evaluation import evaluate
        from .training import load_draft

        assert self.target is not None
        if self.prompts is None or not self.prompts.evaluation:
            raise InputError(f"{self.work / 'prompts.npz'} holds no prompts for evaluation")
        prompts = self.prompts.evaluation[: n_prompts or None]
        length = max(map(len, prompts)) + n_predict + 8
        draft = load_draft(self.work / "checkpoint.pt", self.target, self.id, max_length=length)
        found = evaluate(draft, self.target, prompts, n_predict)
        self.figures["evaluate"] = {**found.__dict__, "tau": found.tau, "acceptance": found.acceptance}
        console.print(
            f"evaluate: {found.prompts} prompts, {found.tokens} tokens, accepted {found.accepted}/{found.proposed} "
            f"({100 * found.acceptance:.1f} %), tau {found.tau:.2f}"
        )

    def report(self, json_file: Path | None) -> None:
        if json_file:
            write_json(self.figures, json_file)


def _draft_config(
    run: _Run, layers: int, block_size: int, head_dim: int, taps: str | None, mask_token: int | None
) -> Any:
    from .export import find_mask_token
    from .model import DraftConfig

    try:
        wanted = None if taps is None else [int(t) for t in taps.split(",")]
    except ValueError:
        raise InputError(f"--taps {taps}: numbers of blocks with commas between them were expected") from None
    return DraftConfig.for_target(
        run.file.config, taps=wanted, n_layer=layers, block_size=block_size, head_dim=head_dim,
        mask_token=find_mask_token(run.file.reader) if mask_token is None else mask_token,
    )  # fmt: skip


def _benchmark_texts(path: Path | None) -> list[str]:
    if path is None:
        import subprocess

        setup = Path(__file__).resolve().parents[1] / "setup/humaneval.py"
        found = subprocess.run([sys.executable, str(setup)], stdout=subprocess.PIPE, text=True)
        if found.returncode:
            raise InputError("HumanEval's prompts could not be fetched: pass --exclude HumanEval.jsonl.gz")
        path = Path(found.stdout.strip())
    return _texts(path)


def _texts(path: Path) -> list[str]:
    """``prompt`` of each line of a .jsonl or .jsonl.gz file."""
    import gzip
    import json

    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            texts = [json.loads(line)["prompt"] for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise InputError(f'{path}: lines of JSON with a "prompt" were expected ({error})') from error
    if not texts or not all(isinstance(t, str) and t for t in texts):
        raise InputError(f'{path}: each line\'s "prompt" must be a text')
    return texts


def main() -> None:
    try:
        app()
    except TrainingError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
