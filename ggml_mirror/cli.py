"""The command line.

Commands import what they need when they run, so that --help is quick and doctor runs on a broken install.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from . import errors
from .output import STDOUT, check_writable, write_json

if TYPE_CHECKING:
    from .probe import Progress

DEBUG_VARIABLE = "GGML_MIRROR_DEBUG"

# Exit codes: 2 what was asked for cannot be, 3 it does not fit, 1 anything else.
_BAD_INPUT = (
    errors.ArgumentError,
    errors.DtypeError,
    errors.ShapeError,
    errors.DeviceError,
    errors.ModelFileError,
    errors.UnsupportedDraftError,
    errors.DraftMismatchError,
    errors.SnapshotError,
)

app = typer.Typer(
    name="ggml-mirror",
    help="Feature mirrors for DFlash speculative decoding: what each ggml dtype costs, saves and distorts.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="[FILE]", help="Write JSON to FILE; without FILE to standard output, and nothing else."
    ),
]

#: Flags of more than one command.
_FEATURE_DTYPE = typer.Option(
    metavar="DTYPE",
    help="How the mirror stores rows; auto: the most precise that leaves the memory margin, of raw rows f32, bf16, q8_0. "
    "Default: DFLASH_FEATURE_DTYPE, else f32.",
)
_MEMORY_MARGIN = typer.Option(
    metavar="BYTES",
    help="What auto leaves free, as 512MiB. Default: 5 % of the device's memory, at most 1 GiB.",
)
_FEATURE_ROWS = typer.Option(
    "--feature-rows",
    metavar="raw|fused|auto",
    help="What the mirror holds; fused: what the draft makes of rows; auto: raw if it fits. With --feature-dtype auto, the whole ladder "
    "(see plan) is walked.",
)
_DRAFT_KV = typer.Option(
    "--draft-kv", metavar="TYPE", help="Of the draft's keys and values: f16, q8_0, or off: none are kept."
)
_DRAFT_WINDOW = typer.Option(help="Context rows that the draft attends to. Default: 4096.")
_CTX_SIZE = typer.Option("-c", "--ctx-size", help="Context; 0: the model's. Default: the model's, at most 4096.")
_GPU_LAYERS = typer.Option("-ngl", "--gpu-layers", "--n-gpu-layers", help="Blocks on the GPU; all or -1: all.")
_KV_OFFLOAD = typer.Option("-kvo/-nkvo", "--kv-offload/--no-kv-offload", help="Keep the KV cache on the GPU.")

DtypesOption = Annotated[
    str | None,
    typer.Option(
        "--dtypes", metavar="LIST", help="Comma-separated: f32,f16,bf16,q8_0,q5_1,q5_0,q4_1,q4_0,iq4_nl. Default: all."
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from .doctor import package_version

        print(f"ggml-mirror {package_version('ggml-mirror') or '(run from a checkout)'}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Tracebacks and llama.cpp's log, as with {DEBUG_VARIABLE}=1.")
    ] = False,
) -> None:
    """Options that come before the command; :func:`main` has already acted on --debug."""


@app.command(no_args_is_help=True)
def probe(
    model: Annotated[Path, typer.Option("-m", "--model", metavar="GGUF", help="The target model.")],
    draft: Annotated[
        Path | None,
        typer.Option(
            "-md", "--model-draft", metavar="GGUF", help="A DFlash draft of it: its taps, and what makes fused rows."
        ),
    ] = None,
    rows: Annotated[
        str, typer.Option("--feature-rows", metavar="raw|fused", help="fused: as the draft's first step leaves them.")
    ] = "raw",
    taps: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="0-based blocks whose outputs are taken, as 1,8,14,20,27. Default: the draft's, or DFlash's five.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help='.txt: one a line; .jsonl: objects with "prompt". Default: a built-in set of 8.'
        ),
    ] = None,
    dtypes: DtypesOption = None,
    style: Annotated[str, typer.Option(help="raw, chat (the model's own template), or both.")] = "both",
    n_predict: Annotated[
        int, typer.Option("-n", "--n-predict", help="Tokens to generate after each prompt, greedily.")
    ] = 32,
    n_ctx: Annotated[
        int | None,
        _CTX_SIZE,
    ] = None,
    n_batch: Annotated[int, typer.Option("-b", "--batch-size")] = 2048,
    n_ubatch: Annotated[int, typer.Option("-ub", "--ubatch-size")] = 512,
    n_threads: Annotated[int | None, typer.Option("-t", "--threads")] = None,
    n_gpu_layers: Annotated[int, typer.Option("-ngl", "--gpu-layers", help="Blocks on the GPU; -1: all.")] = -1,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Where the mirrors are: cpu, auto (first GPU, else CPU), or as CUDA0.")
    ] = "auto",
    json: JsonOption = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Memory against signal-to-noise; .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Measure every dtype on the features of a real model.

    Runs prompts through the model, captures the outputs of the tapped blocks into one mirror per dtype, and reports
    memory, signal-to-noise, outliers and time. A draft is needed for fused rows only.

    [bold]Examples[/]

    ggml-mirror probe -m model.gguf

    ggml-mirror probe -m model.gguf --dtypes f32,bf16,q8_0 --plot probe.png --json probe.json

    ggml-mirror probe -m model.gguf -md draft.gguf --feature-rows fused

    ggml-mirror probe -m model.gguf --prompts HumanEval.jsonl --style chat -ngl 99 --device CUDA0
    """
    _check_outputs(json, plot)
    layers = None if taps is None else _integers(taps, "--taps")
    _check_default_dtype()

    from .probe import probe as run
    from .prompts import DEFAULT_PROMPTS, read_prompts
    from .report import make_console, print_probe

    with _progress() as progress:
        report = run(
            model,
            draft=draft,
            rows=rows,
            taps=layers,
            prompts=DEFAULT_PROMPTS if prompts is None else read_prompts(prompts),
            dtypes=_names(dtypes),
            style=style,
            n_predict=n_predict,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
            device=device,
            verbose=_debugging(),
            progress=progress,
        )
    if json is not None:
        write_json(report.to_json(), json)
    if plot is not None:
        from .plot import write_plot

        write_plot(report, plot)
    if json != STDOUT:
        print_probe(report, make_console())
        for path in (json, plot):
            if path is not None:
                print(f"wrote {path}")


@app.command(no_args_is_help=True)
def plan(
    width: Annotated[int | None, typer.Option(help="Values in a row.")] = None,
    taps: Annotated[
        str | None, typer.Option(metavar="N|LIST", help="Taps: how many, or their layers as 1,8,14,20,27. Default: 5.")
    ] = None,
    n_embd: Annotated[int | None, typer.Option(help="Values in a tap.")] = None,
    model: Annotated[
        Path | None, typer.Option("-m", "--model", metavar="GGUF", help="Take n_embd and the context from a target.")
    ] = None,
    draft: Annotated[
        Path | None,
        typer.Option("-md", "--model-draft", metavar="GGUF", help="Take taps, n_embd and the context from a draft."),
    ] = None,
    cap: Annotated[
        int | None, typer.Option(help="Rows that the mirror holds. Default: the model's context, else 4096.")
    ] = None,
    dtypes: DtypesOption = None,
    budget: Annotated[
        str | None, typer.Option(metavar="BYTES", help="As 8GiB: also give the most rows whose storage fits in it.")
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="Only this device. Default: all.")] = None,
    rows: Annotated[
        str, typer.Option(help="raw: the tapped outputs; fused: what the draft makes of them, as wide as the draft.")
    ] = "raw",
    json: JsonOption = None,
) -> None:
    """Exact bytes of a mirror per dtype, which fit where, and the ladder of rows and dtypes that auto walks.

    [bold]Examples[/]

    ggml-mirror plan --width 25600 --cap 262144

    ggml-mirror plan --taps 5 --n-embd 5120 --budget 8GiB

    ggml-mirror plan -m target.gguf

    ggml-mirror plan -md draft.gguf --cap 4112 --json

    ggml-mirror plan --rows fused --width 5120 --cap 262144
    """
    _check_outputs(json)
    _check_default_dtype()

    from .plan import plan as make_plan
    from .report import make_console, print_plan
    from .row_source import row_source

    count = None if taps is None else _tap_count(taps)
    row = row_source(width=width, taps=count, n_embd=n_embd, model=model, draft=draft, cap=cap, rows=rows)
    made = make_plan(
        width=row.width,
        taps=row.taps,
        n_embd=row.n_embd,
        cap=row.cap,
        dtypes=_names(dtypes),
        device=device,
        budget=budget,
        rows=row.rows,
        draft_n_embd=row.draft_n_embd,
    )
    if json is not None:
        write_json(made.to_json(), json)
    if json != STDOUT:
        print_plan(made, make_console(), source=row.source)


@app.command()
def doctor(json: JsonOption = None) -> None:
    """Versions, devices, memory, what each device supports, and what is wrong. Exit code 1 if something is.

    [bold]Examples[/]

    ggml-mirror doctor

    ggml-mirror doctor --json
    """
    _check_outputs(json)

    from .doctor import diagnose
    from .report import make_console, print_doctor

    diagnosis = diagnose()
    if json is not None:
        write_json(diagnosis.to_json(), json)
    if json != STDOUT:
        print_doctor(diagnosis, make_console())
    if diagnosis.problems:
        raise typer.Exit(1)


@app.command(no_args_is_help=True)
def snapshot(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A snapshot, as FeatureMirror.snapshot().save() writes it.")
    ],
    json: JsonOption = None,
) -> None:
    """Print the header of a mirror snapshot.

    [bold]Example[/]

    ggml-mirror snapshot features.safetensors
    """
    _check_outputs(json)

    from .report import make_console, print_header
    from .snapshot import read_header

    header = read_header(file)
    if json is not None:
        write_json(header, json)
    if json != STDOUT:
        print_header(str(file), header, make_console())


@app.command(no_args_is_help=True)
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A target or a DFlash draft, GGUF.")],
    target: Annotated[
        Path | None, typer.Option("-m", "--target", metavar="GGUF", help="Also check a draft against this target.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """What a target or draft says: taps, row bytes per dtype, block, window, weights; and whether a pair fits.

    Exit code 1 if a draft does not fit its target.

    [bold]Examples[/]

    ggml-mirror inspect target.gguf

    ggml-mirror inspect draft.gguf --target target.gguf

    ggml-mirror inspect draft.gguf --json
    """
    _check_outputs(json)
    _check_default_dtype()

    from .inspect_report import inspect as read
    from .inspect_report import print_inspection
    from .report import make_console

    found = read(file, target=target)
    if json is not None:
        write_json(found.to_json(), json)
    if json != STDOUT:
        print_inspection(found, make_console())
    if found.fit is not None and not found.fit.fits:
        raise typer.Exit(1)


@app.command(no_args_is_help=True)
def run(
    model: Annotated[Path, typer.Option("-m", "--model", metavar="GGUF", help="The target model.")],
    draft: Annotated[
        Path | None,
        typer.Option(
            "-md",
            "--model-draft",
            metavar="GGUF",
            help="A DFlash draft made for it. Default: none, the target runs plainly.",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Answer this and leave. Default: read messages, one a line.")
    ] = None,
    system: Annotated[str | None, typer.Option("-sys", "--system-prompt", help="The system prompt.")] = None,
    feature_dtype: Annotated[
        str | None,
        _FEATURE_DTYPE,
    ] = None,
    memory_margin: Annotated[
        str | None,
        _MEMORY_MARGIN,
    ] = None,
    feature_rows: Annotated[
        str,
        _FEATURE_ROWS,
    ] = "raw",
    draft_kv: Annotated[
        str,
        _DRAFT_KV,
    ] = "f16",
    draft_window: Annotated[int | None, _DRAFT_WINDOW] = None,
    draft_device: Annotated[
        str,
        typer.Option(
            "-devd",
            "--spec-draft-device",
            metavar="NAME",
            help="Of draft and mirror; auto: where the output matrix is.",
        ),
    ] = "auto",
    n_draft: Annotated[
        int | None,
        typer.Option(
            "--spec-draft-n-max", "--draft-max", help="Most tokens to draft per step. Default: the whole block."
        ),
    ] = None,
    n_ctx: Annotated[
        int | None,
        _CTX_SIZE,
    ] = None,
    n_predict: Annotated[
        int,
        typer.Option("-n", "--predict", "--n-predict", help="Most tokens of an answer; -1: what the context holds."),
    ] = -1,
    temp: Annotated[float, typer.Option("--temp", help="0: the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k")] = 40,
    top_p: Annotated[float, typer.Option("--top-p")] = 0.95,
    min_p: Annotated[float, typer.Option("--min-p")] = 0.05,
    repeat_penalty: Annotated[float, typer.Option("--repeat-penalty")] = 1.0,
    seed: Annotated[
        int, typer.Option("-s", "--seed", help="The same seed and messages give the same answers; -1: any.")
    ] = -1,
    n_batch: Annotated[int, typer.Option("-b", "--batch-size")] = 2048,
    n_ubatch: Annotated[int, typer.Option("-ub", "--ubatch-size")] = 512,
    n_threads: Annotated[int | None, typer.Option("-t", "--threads")] = None,
    n_threads_batch: Annotated[int | None, typer.Option("-tb", "--threads-batch", help="Default: as -t.")] = None,
    n_gpu_layers: Annotated[str, _GPU_LAYERS] = "all",
    flash_attn: Annotated[str, typer.Option("-fa", "--flash-attn", metavar="on|off")] = "on",
    type_k: Annotated[str, typer.Option("-ctk", "--cache-type-k", metavar="TYPE", help="Of the KV cache.")] = "f16",
    type_v: Annotated[str, typer.Option("-ctv", "--cache-type-v", metavar="TYPE")] = "f16",
    offload_kqv: Annotated[bool, _KV_OFFLOAD] = True,
    use_mmap: Annotated[
        bool, typer.Option("--mmap/--no-mmap", help="Map the model's file rather than read it.")
    ] = True,
    use_mlock: Annotated[bool, typer.Option("--mlock", help="Keep the model in RAM.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what everything would take, and leave: exit code 3 if it does not fit."),
    ] = False,
    json: JsonOption = None,
) -> None:
    """Chat with a target and its draft.

    Shows first what everything will take of which device's memory, and leaves with exit code 3 if it does not fit. Answers go to
    standard output, the rest to standard error. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves. If messages are
    piped in, what goes wrong with one of them does not end the session, but decides the exit code.

    [bold]Examples[/]

    ggml-mirror run -m target.gguf -md draft.gguf

    ggml-mirror run -m target.gguf -md draft.gguf --feature-dtype auto --memory-margin 2GiB -c 32768 -ngl all

    ggml-mirror run -m target.gguf -md draft.gguf --temp 0 -p "Write a haiku about rings."

    ggml-mirror run -m target.gguf < questions.txt > answers.txt

    ggml-mirror run -m target.gguf -md draft.gguf -c 131072 --dry-run --json
    """
    _check_outputs(json)
    if json is not None and not dry_run:
        raise errors.ArgumentError("--json goes with --dry-run: it writes the budget")
    from .flags import cache_type, layers, switch

    llama_kwargs = {
        "n_batch": n_batch,
        "n_ubatch": n_ubatch,
        "n_gpu_layers": layers(n_gpu_layers),
        "flash_attn": switch(flash_attn, "-fa") is not False,
        "type_k": cache_type(type_k, "-ctk"),
        "type_v": cache_type(type_v, "-ctv"),
        "offload_kqv": offload_kqv,
        "use_mmap": use_mmap,
        "use_mlock": use_mlock,
    }
    _check_run(prompt, n_ctx=n_ctx, n_predict=n_predict, n_batch=n_batch, n_ubatch=n_ubatch, n_threads=n_threads)

    from .chat.start import loading_options
    from .prompt_run import default_threads
    from .report import make_console

    out, err = make_console(), make_console(stderr=True)
    threads = n_threads or default_threads()
    options = loading_options(
        model,
        draft,
        err=err,
        feature_dtype=feature_dtype,
        feature_rows=feature_rows,
        draft_window=draft_window,
        draft_device=draft_device,
        draft_kv=draft_kv,
        n_draft=n_draft,
        memory_margin=memory_margin,
        n_ctx=n_ctx,
        n_threads=threads,
        n_threads_batch=n_threads_batch or threads,
        **llama_kwargs,
    )
    if dry_run:
        from .budget import make_budget
        from .budget_report import print_budget

        budget = make_budget(model, **options)
        if json is not None:
            write_json(budget.to_json(), json)
        if json != STDOUT:
            print_budget(budget, out)
        budget.require_fit()
        return

    from .chat.conversation import STOPPED, Chat, Sampling
    from .chat.start import start
    from .chat.terminal import ChatTerminal

    llm = start(model, err=err, verbose=_debugging(), **options)
    sampling = Sampling(temp, top_k, top_p, min_p, repeat_penalty, n_predict if n_predict > 0 else None)
    try:
        chat = Chat(llm, system=system, sampling=sampling, seed=seed)
        terminal = ChatTerminal(chat, out=out, err=err)
        if prompt is not None:
            terminal.one_shot(prompt)
            if chat.finish == STOPPED:
                raise typer.Exit(130)  # as a shell counts an interrupt
        elif (failed := terminal.run()) is not None:
            raise typer.Exit(_exit_code(failed))
    finally:
        llm.close()


def _check_run(prompt: str | None, *, n_ctx: int | None, n_predict: int, **positive: int | None) -> None:
    if prompt is not None and not prompt.strip():
        raise errors.ArgumentError("-p: the prompt is empty")
    if n_ctx is not None and n_ctx < 0:
        raise errors.ArgumentError(f"-c {n_ctx}: a number of tokens, or 0, was expected")
    if n_predict == 0 or n_predict < -1:
        raise errors.ArgumentError(f"-n {n_predict}: a number of tokens, or -1, was expected")
    for name, value in positive.items():
        if value is not None and value < 1:
            raise errors.ArgumentError(f"{name} is {value}; it must be positive")


@app.command(
    no_args_is_help=True,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    rich_help_panel=None,
)
def serve(
    context: typer.Context,
    model: Annotated[Path | None, typer.Option("-m", "--model", metavar="GGUF", help="The target model.")] = None,
    model_draft: Annotated[
        Path | None, typer.Option("-md", "--model-draft", metavar="GGUF", help="A DFlash draft made for it.")
    ] = None,
    feature_dtype: Annotated[
        str | None,
        _FEATURE_DTYPE,
    ] = None,
    memory_margin: Annotated[
        str | None,
        _MEMORY_MARGIN,
    ] = None,
    feature_rows: Annotated[
        str | None,
        _FEATURE_ROWS,
    ] = None,
    draft_kv: Annotated[
        str | None,
        _DRAFT_KV,
    ] = None,
    draft_window: Annotated[int | None, _DRAFT_WINDOW] = None,
    draft_device: Annotated[
        str | None, typer.Option("-devd", "--spec-draft-device", metavar="NAME", help="Device of draft and mirror.")
    ] = None,
    n_draft: Annotated[
        int | None, typer.Option("--spec-draft-n-max", "--draft-max", help="Most tokens to draft per step.")
    ] = None,
    n_ctx: Annotated[
        int | None,
        _CTX_SIZE,
    ] = None,
    n_predict: Annotated[
        int | None, typer.Option("-n", "--predict", "--n-predict", help="Most tokens of a completion. -1: no limit.")
    ] = None,
    n_batch: Annotated[int | None, typer.Option("-b", "--batch-size")] = None,
    n_ubatch: Annotated[int | None, typer.Option("-ub", "--ubatch-size")] = None,
    n_threads: Annotated[int | None, typer.Option("-t", "--threads")] = None,
    n_threads_batch: Annotated[int | None, typer.Option("-tb", "--threads-batch")] = None,
    n_gpu_layers: Annotated[str | None, _GPU_LAYERS] = None,
    flash_attn: Annotated[
        str | None, typer.Option("-fa", "--flash-attn", metavar="on|off", help="Default: on if there is a draft.")
    ] = None,
    type_k: Annotated[
        str | None, typer.Option("-ctk", "--cache-type-k", metavar="TYPE", help="Of the KV cache.")
    ] = None,
    type_v: Annotated[str | None, typer.Option("-ctv", "--cache-type-v", metavar="TYPE")] = None,
    offload_kqv: Annotated[bool | None, _KV_OFFLOAD] = None,
    use_mlock: Annotated[bool | None, typer.Option("--mlock/--no-mlock", help="Keep the model in RAM.")] = None,
    use_mmap: Annotated[bool | None, typer.Option("--mmap/--no-mmap")] = None,
    split_mode: Annotated[str | None, typer.Option("-sm", "--split-mode", metavar="none|layer|row")] = None,
    tensor_split: Annotated[
        str | None, typer.Option("-ts", "--tensor-split", metavar="N0,N1,...", help="Shares of the devices.")
    ] = None,
    lora_path: Annotated[str | None, typer.Option("--lora", metavar="GGUF", help="An adapter.")] = None,
    main_gpu: Annotated[int | None, typer.Option("-mg", "--main-gpu")] = None,
    seed: Annotated[int | None, typer.Option("-s", "--seed", help="For requests without one. Default: random.")] = None,
    alias: Annotated[str | None, typer.Option("-a", "--alias", help="The model's name to clients.")] = None,
    chat_format: Annotated[
        str | None,
        typer.Option("--chat-format", metavar="NAME", help="llama-cpp-python's. Default: the model's template."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Default: 8000. 0: any that is free.")] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Better in LLAMA_API_KEY: ps shows flags. Commas between several.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Keys, one a line.")] = None,
    ssl_keyfile: Annotated[str | None, typer.Option("--ssl-key-file", metavar="FILE")] = None,
    ssl_certfile: Annotated[str | None, typer.Option("--ssl-cert-file", metavar="FILE")] = None,
    cors_origins: Annotated[
        str, typer.Option(metavar="LIST", help="Web pages that may call: localhost, * or origins with commas.")
    ] = "localhost",
    cache_ram: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Prefix cache in RAM, as 2GiB; a bare number is MiB, as in llama-server."),
    ] = None,
    cache_disk: Annotated[Path | None, typer.Option(metavar="DIR", help="Prefix cache on disk.")] = None,
    cache_disk_max: Annotated[str | None, typer.Option(metavar="SIZE", help="Most bytes in it, as 20GiB.")] = None,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Most bytes of a request.")] = "16MiB",
    max_queue: Annotated[int, typer.Option(help="Requests that may wait for their turn.")] = 256,
    timeout: Annotated[
        float, typer.Option("-to", "--timeout", help="Seconds that a client may take to send or to receive.")
    ] = 3600,
    shutdown_timeout: Annotated[
        int | None, typer.Option(help="Seconds for running requests after SIGTERM. Default: as long as they take.")
    ] = None,
    config_file: Annotated[
        str | None,
        typer.Option("--config-file", "--config_file", metavar="FILE", help="llama_cpp.server's, JSON or YAML."),
    ] = None,
    log_json: Annotated[bool, typer.Option("--log-json", "--log-jsonl", help="One JSON object per log line.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also llama.cpp's log.")] = False,
) -> None:
    """Serve OpenAI's API with drafting: llama-cpp-python's own server application over DFlashLlama.

    Every other setting of llama_cpp.server is given by its name, as --rope_freq_base 10000; python -m llama_cpp.server --help lists them.

    [bold]Examples[/]

    ggml-mirror serve -m target.gguf -md draft.gguf --feature-dtype q8_0

    ggml-mirror serve -m target.gguf -md draft.gguf -c 32768 -ngl all --host 0.0.0.0 --api-key-file keys.txt

    ggml-mirror serve --config_file models.yaml --log-json
    """
    from .server import require_extra

    require_extra()
    from .flags import cache_type, layers, mebibytes, shares, split_number, switch
    from .server.run import serve as run
    from .server.settings import ServeConfig, read_keys, read_settings

    given = {
        "model": None if model is None else str(model),
        "model_draft": None if model_draft is None else str(model_draft),
        "feature_dtype": feature_dtype,
        "memory_margin": memory_margin,
        "feature_rows": feature_rows,
        "draft_kv": draft_kv,
        "draft_window": draft_window,
        "draft_device": draft_device,
        "n_draft": n_draft,
        "n_ctx": n_ctx,
        "n_predict": n_predict,
        "n_batch": n_batch,
        "n_ubatch": n_ubatch,
        "n_threads": n_threads,
        "n_threads_batch": n_threads_batch,
        "n_gpu_layers": None if n_gpu_layers is None else layers(n_gpu_layers),
        "flash_attn": None if flash_attn is None else switch(flash_attn, "-fa"),
        "type_k": None if type_k is None else cache_type(type_k, "-ctk"),
        "type_v": None if type_v is None else cache_type(type_v, "-ctv"),
        "offload_kqv": offload_kqv,
        "use_mlock": use_mlock,
        "use_mmap": use_mmap,
        "split_mode": None if split_mode is None else split_number(split_mode, "-sm"),
        "tensor_split": None if tensor_split is None else shares(tensor_split, "-ts"),
        "lora_path": lora_path,
        "main_gpu": main_gpu,
        "seed": seed,
        "model_alias": alias,
        "chat_format": chat_format,
        "host": host,
        "port": port,
        "ssl_keyfile": ssl_keyfile,
        "ssl_certfile": ssl_certfile,
        "verbose": True if verbose else None,
    }
    server, models = read_settings(
        {name: value for name, value in given.items() if value is not None}, context.args, config_file
    )
    config = ServeConfig(
        server=server,
        models=models,
        api_keys=read_keys(api_key, api_key_file, server),
        cors_origins=cors_origins,
        cache_ram=None if cache_ram is None else mebibytes(cache_ram),
        cache_disk=cache_disk,
        cache_disk_max=None if cache_disk_max is None else mebibytes(cache_disk_max),
        max_body=mebibytes(max_body),
        max_queue=max_queue,
        timeout=timeout,
        shutdown_timeout=shutdown_timeout,
        log_json=log_json,
    )
    run(config, verbose=verbose)


def _integers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise errors.ArgumentError(f"{option} {text}: whole numbers with commas between them were expected") from None


def _tap_count(text: str) -> int:
    # One number is a count; several are layers.
    numbers = _integers(text, "--taps")
    return numbers[0] if len(numbers) == 1 else len(numbers)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _check_outputs(json: str | None, plot: Path | None = None) -> None:
    if json is not None:
        check_writable(json)
    if plot is not None:
        from .plot import check_plot

        check_plot(plot)


def _check_default_dtype() -> None:
    # These commands compare all dtypes, so the default chooses nothing here; a typo in it is still worth an error now.
    from .dtype import FeatureDtype

    FeatureDtype.resolve_choice(None)


def _debugging() -> bool:
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on standard error, if that is a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from .report import make_console

    console = make_console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading the model", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def normalise(arguments: Sequence[str]) -> list[str]:
    """Give a bare ``--json`` the value ``-``: the parser knows no option whose value may be left out."""
    out: list[str] = []
    for index, argument in enumerate(arguments):
        if argument == "--":
            return out + list(arguments[index:])
        out.append(argument)
        if argument == "--json":
            following = arguments[index + 1] if index + 1 < len(arguments) else "--"
            if following.startswith("-") and following != STDOUT:
                out.append(STDOUT)
    return out


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The ``ggml-mirror`` command. Ends the process: 0 done, 1 failed, 2 bad input, 3 out of memory."""
    given = normalise(sys.argv[1:] if arguments is None else arguments)
    if "--debug" in given:  # anywhere, also behind the command
        given.remove("--debug")
        os.environ[DEBUG_VARIABLE] = "1"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an infinity sign must not kill a report on an ASCII terminal
    try:
        app(given, prog_name="ggml-mirror")
    except Exception as error:
        if _debugging():
            raise
        known = isinstance(error, (errors.GgmlMirrorError, ImportError))
        _fail(str(error) if known else f"unexpected {type(error).__name__}: {error} (--debug shows where)")
        sys.exit(_exit_code(error))
    sys.exit(0)


def _exit_code(error: Exception) -> int:
    if isinstance(error, MemoryError):
        return 3
    return 2 if isinstance(error, _BAD_INPUT) else 1


def _fail(message: str) -> None:
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    label = "\033[31merror:\033[0m" if colour else "error:"
    print(f"{label} {' '.join(message.split())}", file=sys.stderr)
