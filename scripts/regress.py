"""Regression run: targets, drafts, dtypes and scenarios of a manifest against a baseline, one table, one exit code.

    python scripts/regress.py scripts/regress/demo.toml                       # compares with demo.json beside it
    python scripts/regress.py scripts/regress/demo.toml --update              # makes what it found the new baseline
    python scripts/regress.py my.toml --baseline my.json --pair my-27b --scenario warm-restore

The manifest's form is described in scripts/regress/demo.toml. Each scenario is run greedily for each dtype of each pair:

    cold           each prompt from nothing
    warm-restore   the state is saved after the prompt's first half, another prompt runs, the state comes back, the rest follows:
                   same tokens and same accepted counts, step by step, as from the state that was never saved
    wrapped-ring   a window of ``small_window`` rows, so that the ring wraps during the prompt and again while decoding
    reject-storm   drafted tokens are replaced by right ones up to a place that moves on with each step, and wrong ones from there, so that
                   each step is cut back, at every length. Afterwards the mirror's rows must equal those of a fresh capture of
                   the same tokens, within ``rows_tolerance`` (relative)
    long-prompt    the prompts repeated to ``long_prompt`` tokens, more than a batch

In every scenario the text must be plain decoding's: at a first difference the target's two largest logits may be at most ``tie``
apart. That, warm = cold and the rows need no baseline. Against the baseline: texts (hashes of tokens) and mirror bytes exactly,
accepted and proposed counts within ``count_tolerance``. On a processor with other instructions, or with another ggml, than the
baseline's, logits round differently: another text or count is then reported as "other" and does not fail.

Exit codes: 0 all well, 1 something differs, 2 the manifest or a model cannot be used.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import llama_cpp
import numpy as np
import typer
from decoding import Counts, Generation, first_difference, generate, load, storage, top_two_gap
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from script import run as run_script

from ggml_mirror import DFlashLlama, GgmlMirrorError
from ggml_mirror._native import ggml_versions
from ggml_mirror.errors import ArgumentError
from ggml_mirror.model_info import ModelInfo
from ggml_mirror.output import check_writable, write_json

if sys.version_info >= (3, 11):
    import tomllib
else:  # pip's own copy: a TOML reader came into the standard library with 3.11
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
DEMO = "demo"
SCENARIOS = ("cold", "warm-restore", "wrapped-ring", "reject-storm", "long-prompt")


# ---------------------------------------------------------------------------------------------------------- manifest


@dataclass(frozen=True)
class Pair:
    """One ``[[pair]]`` of a manifest, defaults filled in."""

    name: str
    target: str | dict[str, Any]
    draft: str | dict[str, Any]
    prompts: list[str]
    dtypes: list[str] = field(default_factory=lambda: ["f32", "q8_0"])
    scenarios: list[str] = field(default_factory=lambda: list(SCENARIOS))
    n_predict: int = 32
    n_ctx: int = 512
    n_batch: int = 128
    n_gpu_layers: int = -1
    n_threads: int = 0
    small_window: int = 24
    long_prompt: int = 300
    tie: float = 0.05
    rows_tolerance: float = 0.02
    count_tolerance: float = 0.05


#: Least values of a pair's numbers. What llama.cpp takes of them is an int32 at most.
LEAST = {
    "n_predict": 1, "n_ctx": 1, "n_batch": 1, "n_gpu_layers": -1, "n_threads": 0, "small_window": 1, "long_prompt": 1,
    "tie": 0, "rows_tolerance": 0, "count_tolerance": 0,
}  # fmt: skip


def read_manifest(path: Path) -> list[Pair]:
    """The pairs of a manifest.

    Raises:
        ArgumentError: not TOML, an unknown or missing key, or a value of the wrong kind; names the pair and the key.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ArgumentError(f"{path} is not TOML: {error}") from error
    unknown = content.keys() - {"defaults", "pair"}
    if unknown:
        raise ArgumentError(f"{path}: unknown table {min(unknown)!r}; there are [defaults] and [[pair]]")
    entries, defaults = content.get("pair", []), content.get("defaults", {})
    if not isinstance(entries, list) or not entries:
        raise ArgumentError(f"{path}: no [[pair]]")
    if not all(isinstance(table, dict) for table in (defaults, *entries)):
        raise ArgumentError(f"{path}: [defaults] and each [[pair]] are tables, not values")
    pairs = [_pair(path, {**defaults, **entry}) for entry in entries]
    names = [pair.name for pair in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ArgumentError(f"{path}: two pairs are named {twice[0]!r}")
    return pairs


def _pair(path: Path, entry: dict[str, Any]) -> Pair:
    where = f"{path}, pair {entry.get('name', '(without a name)')!r}"
    known = {f.name: f for f in fields(Pair)}
    for key in entry:
        if key not in known:
            raise ArgumentError(f"{where}: unknown key {key!r}; there are {', '.join(known)}")
    for key in ("name", "target", "draft", "prompts"):
        if key not in entry:
            raise ArgumentError(f"{where}: {key} is missing")
    kinds: dict[str, tuple[type, ...]] = {"name": (str,), "target": (str, dict), "draft": (str, dict)}
    for key, value in entry.items():
        kind = (
            kinds.get(key)
            or {"list": (list,), "int": (int,), "float": (int, float)}[str(known[key].type).split("[")[0]]
        )
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ArgumentError(f"{where}: {key} is {value!r}; {' or '.join(k.__name__ for k in kind)} was expected")
        if kind == (list,) and not (value and all(isinstance(item, str) for item in value)):
            raise ArgumentError(f"{where}: {key} is {value!r}; a list of strings, one at least, was expected")
        if key in LEAST and not LEAST[key] <= value < 2**31:
            raise ArgumentError(f"{where}: {key} is {value!r}; a number from {LEAST[key]} was expected")
    if not entry["name"] or "/" in entry["name"]:
        raise ArgumentError(f"{where}: a name is not empty and has no '/'")
    if not all(entry["prompts"]):
        raise ArgumentError(f"{where}: a prompt is empty")
    wrong = [s for s in entry.get("scenarios", []) if s not in SCENARIOS]
    if wrong:
        raise ArgumentError(f"{where}: there is no scenario {wrong[0]!r}; there are {', '.join(SCENARIOS)}")
    try:
        entry = {**entry, "dtypes": [storage(name) for name in entry.get("dtypes", ["f32", "q8_0"])]}
    except GgmlMirrorError as error:
        raise ArgumentError(f"{where}: {error}") from error
    for key in ("target", "draft"):
        if isinstance(entry[key], str):
            entry[key] = _resolved(path, entry[key], where)
        elif "tiny" not in entry[key]:
            raise ArgumentError(f'{where}: {key} is a table without "tiny"; write for example {{ tiny = "llama" }}')
    return Pair(**entry)


def _resolved(manifest: Path, text: str, where: str) -> str:
    """A model's path: ``~`` and ``$VARIABLES`` are expanded, a relative one is relative to the manifest."""
    if text == DEMO:
        text = os.environ.get("GGML_MIRROR_DEMO_TARGET") or _fetched_demo()
    expanded = Path(os.path.expanduser(os.path.expandvars(text)))
    found = (manifest.parent / expanded).resolve()
    if not found.is_file():
        raise ArgumentError(f"{where}: there is no file {found}")
    return str(found)


def _fetched_demo() -> str:
    import subprocess

    script = ROOT / "scripts/setup/demo_target.py"
    return subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def write_models(pair: Pair, folder: Path) -> tuple[str, str]:
    """Paths of the pair's target and draft; random tiny ones are written into ``folder``.

    Raises:
        ArgumentError: the tiny models' writer does not take what the manifest says.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from tiny_models import write_tiny_draft, write_tiny_model
    finally:
        sys.path.pop(0)
    out = []
    for role, spec, write in (("target", pair.target, write_tiny_model), ("draft", pair.draft, write_tiny_draft)):
        if isinstance(spec, str):
            out.append(spec)
            continue
        for key, value in spec.items():
            if isinstance(value, int) and value < 1 and key != "seed":  # llama.cpp aborts at a model without layers
                raise ArgumentError(f"pair {pair.name!r}: the tiny {role}'s {key} is {value}; it must be positive")
        try:
            out.append(
                str(
                    write(
                        folder / f"{pair.name}-{role}.gguf",
                        spec["tiny"],
                        **{k: v for k, v in spec.items() if k != "tiny"},
                    )
                )
            )
        except (TypeError, KeyError, ValueError) as error:
            raise ArgumentError(f"pair {pair.name!r}: no tiny {role} of {spec}: {error}") from error
    return out[0], out[1]


# --------------------------------------------------------------------------------------------------------- scenarios


@dataclass(frozen=True)
class Case:
    """One scenario of one dtype of one pair: what it gave, and what was wrong regardless of any baseline."""

    pair: str
    scenario: str
    dtype: str
    texts: list[str]
    tokens: int
    counts: Counts
    mirror_bytes: int
    faults: list[str]
    ties: int = 0

    @property
    def key(self) -> str:
        return f"{self.pair}/{self.scenario}/{self.dtype}"

    def to_json(self) -> dict[str, Any]:
        """What a baseline keeps: nothing that depends on the clock."""
        return {"texts": self.texts, "tokens": self.tokens, **asdict(self.counts), "mirror_bytes": self.mirror_bytes}


class PairRun:
    """The models of one pair, and the scenarios over them."""

    def __init__(self, pair: Pair, target: str, draft: str) -> None:
        self.pair, self.target, self.draft = pair, target, draft
        self._plain_texts: dict[tuple[int, ...], Generation] = {}
        for path in (target, draft):
            ModelInfo.read(path)
        try:
            self.plain = self._load(None)
        except (ValueError, RuntimeError) as error:  # llama.cpp's own, which names no cause
            raise ArgumentError(f"pair {pair.name!r}: llama.cpp does not load {target}: {error}") from error
        self.prompts = [self.plain.tokenize(text.encode(), add_bos=True, special=False) for text in pair.prompts]
        longest = max(pair.long_prompt, *(len(p) for p in self.prompts)) + pair.n_predict + 64
        if longest > pair.n_ctx:
            self.plain.close()
            raise ArgumentError(f"pair {pair.name!r}: n_ctx is {pair.n_ctx}; its prompts need {longest} (with a block)")

    def _load(self, draft: str | None, **more: Any) -> Any:
        pair = self.pair
        return load(
            self.target, draft, n_ctx=pair.n_ctx, n_batch=pair.n_batch, n_gpu_layers=pair.n_gpu_layers,
            n_threads=pair.n_threads, **more,
        )  # fmt: skip

    def close(self) -> None:
        self.plain.close()

    def cases(self, scenarios: list[str], dtypes: list[str]) -> Iterator[Case]:
        for dtype in dtypes:
            for windowed in (False, True):
                chosen = [s for s in scenarios if (s == "wrapped-ring") is windowed]
                if not chosen:
                    continue
                window = {"draft_window": self.pair.small_window} if windowed else {}
                with ExitStack() as stack:
                    llm = self._load(self.draft, stored=dtype, **window)
                    stack.callback(llm.close)
                    for scenario in chosen:
                        yield self._case(llm, scenario, dtype)

    def _case(self, llm: DFlashLlama, scenario: str, dtype: str) -> Case:
        faults: list[str] = []
        prompts = self._long_prompts() if scenario == "long-prompt" else self.prompts
        run = {"warm-restore": self._warm, "reject-storm": self._storm}.get(scenario, self._cold)
        results = [run(llm, prompt, faults) for prompt in prompts]
        if scenario == "wrapped-ring" and not all(
            len(p) + len(r.tokens) > 2 * llm.mirror.cap for p, r in zip(prompts, results, strict=True)
        ):
            faults.append(
                f"the ring of {llm.mirror.cap} rows did not wrap twice: use longer prompts or a smaller small_window"
            )
        ties = sum(self._judge(p, r, faults) for p, r in zip(prompts, results, strict=True))
        return Case(
            pair=self.pair.name,
            scenario=scenario,
            dtype=dtype,
            texts=[text_hash(r) for r in results],
            tokens=sum(r.generated for r in results),
            counts=sum((r.counts for r in results), Counts()),
            mirror_bytes=llm.mirror.nbytes,
            faults=faults,
            ties=ties,
        )

    def _long_prompts(self) -> list[list[int]]:
        n = self.pair.long_prompt
        return [(prompt * (n // len(prompt) + 1))[:n] for prompt in self.prompts]

    def _cold(self, llm: DFlashLlama, prompt: list[int], faults: list[str]) -> Generation:
        return generate(llm, prompt, self.pair.n_predict)

    def _warm(self, llm: DFlashLlama, prompt: list[int], faults: list[str]) -> Generation:
        half = prompt[: max(len(prompt) // 2, 1)]
        llm.reset()
        llm.eval(half)
        state = llm.save_state()
        cold = generate(llm, prompt, self.pair.n_predict, cold=False)
        generate(llm, prompt[::-1], 4)
        llm.load_state(state)
        warm = generate(llm, prompt, self.pair.n_predict, cold=False)
        if warm.tokens != cold.tokens:
            faults.append(f"restored, the text differs from token {first_difference(warm.tokens, cold.tokens)} on")
        elif warm.accepted_by_step != cold.accepted_by_step:
            faults.append(f"restored, steps accepted {warm.accepted_by_step}, not {cold.accepted_by_step}")
        return warm

    def _storm(self, llm: DFlashLlama, prompt: list[int], faults: list[str]) -> Generation:
        with _rejected(llm, prompt + self._plain_text(prompt).tokens):
            result = generate(llm, prompt, self.pair.n_predict)
        # All that was evaluated: the last token that was emitted has no row yet.
        count = llm.n_tokens
        start = max(0, count - llm.draft_window)
        rows = llm.mirror.read(start=start, count=count - start)
        evaluated = llm.input_ids[:count].tolist()
        llm.reset()
        llm.eval(evaluated)
        fresh = llm.mirror.read(start=start, count=count - start)
        error = float(np.linalg.norm(rows - fresh) / max(float(np.linalg.norm(fresh)), 1e-30))
        if error > self.pair.rows_tolerance:
            faults.append(f"rows are off by {error:.2g} (relative) from a fresh capture of the same tokens")
        return result

    def _plain_text(self, prompt: list[int]) -> Generation:
        key = tuple(prompt)
        if key not in self._plain_texts:
            self._plain_texts[key] = generate(self.plain, prompt, self.pair.n_predict)
        return self._plain_texts[key]

    def _judge(self, prompt: list[int], got: Generation, faults: list[str]) -> int:
        """Compare a text with plain decoding's; 1 if they part at a tie."""
        wanted = self._plain_text(prompt)
        index = first_difference([*got.tokens, *[-1] * got.ended], [*wanted.tokens, *[-1] * wanted.ended])
        if index is None:
            return 0
        gap = top_two_gap(self.plain, prompt + got.tokens[:index])
        if gap > self.pair.tie:
            faults.append(
                f"text differs from plain decoding at token {index}, where the top two logits are {gap:.3f} apart"
            )
            return 0
        return 1


@contextmanager
def _rejected(llm: DFlashLlama, text: list[int]) -> Iterator[None]:
    """Within: the draft gives 0, 1, 2 ... tokens of ``text`` (by position), step by step, and wrong ones after them."""
    original: Callable[..., tuple[list[int], int]] = llm.draft.step
    steps = 0

    def step(*args: Any, n_past: int, **kwargs: Any) -> tuple[list[int], int]:
        nonlocal steps
        tokens, context = original(*args, n_past=n_past, **kwargs)
        right = text[n_past + 1 : n_past + 1 + len(tokens)]
        good = steps % len(tokens)
        steps += 1
        wrong = [((right[i] if i < len(right) else token) + 1) % llm.n_vocab() for i, token in enumerate(tokens)]
        return right[:good] + wrong[len(right[:good]) :], context

    llm.draft.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        del llm.draft.step


def text_hash(result: Generation) -> str:
    """Of the tokens and of whether the text ended."""
    return hashlib.sha256(f"{result.tokens} {result.ended}".encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- baseline


@dataclass(frozen=True)
class Verdict:
    case: Case
    status: str  # "ok", "new", "other", "FAIL"
    notes: list[str]


def machine_kind() -> dict[str, str]:
    """What decides how logits round: instructions and devices, ggml, and llama.cpp."""
    versions = ggml_versions()
    return {
        "system": llama_cpp.llama_print_system_info().decode().strip(),
        "ggml": f"{versions.loaded} ({versions.loaded_commit})",
        "llama_cpp": llama_cpp.__version__,
    }


def judge(case: Case, kept: dict[str, Any] | None, *, same_kind: bool, tolerance: float) -> Verdict:
    """A case against its entry of the baseline.

    Args:
        same_kind: the baseline was made where logits round alike; else other texts and counts do not fail.
        tolerance: of counts, relative to the tokens that were proposed.
    """
    failures = list(case.faults)
    if kept is None:
        return Verdict(case, "FAIL" if failures else "new", failures or ["not in the baseline"])
    if case.mirror_bytes != kept["mirror_bytes"]:
        failures.append(f"mirror bytes {case.mirror_bytes}, baseline {kept['mirror_bytes']}")
    drift = []
    changed = sum(a != b for a, b in zip(case.texts, kept["texts"], strict=False)) + abs(
        len(case.texts) - len(kept["texts"])
    )
    if changed:
        drift.append(f"{changed} of {len(case.texts)} texts are not the baseline's")
    allowed = tolerance * max(kept["proposed"], 1)
    for name in ("accepted", "proposed"):
        now = getattr(case.counts, name)
        if abs(now - kept[name]) > allowed:
            drift.append(f"{name} {now}, baseline {kept[name]} (+- {allowed:.1f})")
    if same_kind:
        failures += drift
        drift = []
    status = "FAIL" if failures else "other" if drift else "ok"
    return Verdict(case, status, failures + drift)


def read_baseline(path: Path) -> dict[str, Any]:
    """Raises ArgumentError if there is a file, but no baseline in it. No file: an empty baseline."""
    if not path.exists():
        return {"machine": None, "cases": {}}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for case in content["cases"].values():
            for name in ("texts", "accepted", "proposed", "mirror_bytes"):
                case[name]
        return {"machine": content["machine"], "cases": content["cases"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(f"{path} is not a baseline of this script ({type(error).__name__}: {error})") from error


def result_table(verdicts: list[Verdict], markdown: bool) -> Table:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for name in ("pair", "scenario", "dtype", "tokens", "accepted", "%", "tau", "mirror bytes", "ties", "result"):
        table.add_column(
            name, justify="left" if name in ("pair", "scenario", "dtype", "result") else "right", no_wrap=True
        )
    table.add_column("notes")
    for v in verdicts:
        c = v.case
        table.add_row(
            *(c.pair, c.scenario, c.dtype, str(c.tokens), f"{c.counts.accepted}/{c.counts.proposed}"),
            *(f"{100 * c.counts.acceptance:.1f}", f"{c.counts.tau:.2f}", f"{c.mirror_bytes:,}", str(c.ties or "")),
            f"[red]{v.status}[/]" if v.status == "FAIL" else v.status,
            "; ".join(v.notes),
        )
    return table


# ------------------------------------------------------------------------------------------------------ command line


def main(
    manifest: Annotated[Path, typer.Argument(help="TOML manifest.")] = ROOT / "scripts/regress/demo.toml",
    baseline: Annotated[Path | None, typer.Option(help="Default: the manifest's name with .json.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Write the baseline instead of comparing.")] = False,
    pair: Annotated[list[str] | None, typer.Option(help="Only this pair; may be repeated.")] = None,
    scenario: Annotated[list[str] | None, typer.Option(help="Only this scenario; may be repeated.")] = None,
    threads: Annotated[int, typer.Option("-t", "--threads", help="Instead of the manifest's; 0: as it says.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what was found to this file.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table as Markdown.")] = False,
) -> None:
    pairs = read_manifest(manifest)
    for name in pair or []:
        if name not in [p.name for p in pairs]:
            raise ArgumentError(f"{manifest} has no pair {name!r}; it has {', '.join(p.name for p in pairs)}")
    for name in scenario or []:
        if name not in SCENARIOS:
            raise ArgumentError(f"there is no scenario {name!r}; there are {', '.join(SCENARIOS)}")
    pairs = [p for p in pairs if not pair or p.name in pair]
    baseline = baseline or manifest.with_suffix(".json")
    kept = read_baseline(baseline)
    for path in (json_file, baseline if update else None):
        if path:
            check_writable(path)

    cases: list[Case] = []
    tolerance: dict[str, float] = {}
    wanted = [(p, [s for s in p.scenarios if not scenario or s in scenario]) for p in pairs]
    with (
        tempfile.TemporaryDirectory(prefix="ggml-mirror-regress-") as folder,
        Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress,
    ):
        bar = progress.add_task("", total=sum(len(p.dtypes) * len(chosen) for p, chosen in wanted))
        for p, chosen in wanted:
            if threads:
                p = Pair(**{**asdict(p), "n_threads": threads})
            tolerance[p.name] = p.count_tolerance
            progress.update(bar, description=p.name)
            run = PairRun(p, *write_models(p, Path(folder)))
            try:
                for case in run.cases(chosen, p.dtypes):
                    cases.append(case)
                    progress.advance(bar)
            finally:
                run.close()

    kind = machine_kind()
    same_kind = kept["machine"] == kind
    entries = {} if update else kept["cases"]
    verdicts = [
        judge(case, entries.get(case.key), same_kind=same_kind, tolerance=tolerance[case.pair]) for case in cases
    ]
    console = Console(width=None if Console().is_terminal else 200)
    console.print(result_table(verdicts, markdown))
    if kept["machine"] and not same_kind and not update:
        console.print("The baseline was made where logits round differently: other texts and counts do not fail.")
    found = {"machine": kind, "cases": {case.key: case.to_json() for case in cases}}
    if json_file:
        write_json(
            {**found, "verdicts": {v.case.key: {"status": v.status, "notes": v.notes} for v in verdicts}}, json_file
        )
    bad = [v for v in verdicts if v.status == "FAIL"]
    ran_all = not pair and not scenario
    missing = sorted(kept["cases"].keys() - {c.key for c in cases}) if ran_all and not update else []
    if missing:
        console.print(f"[red]FAIL[/] in the baseline, but not in the manifest: {', '.join(missing)}")
    if update:
        if bad:
            console.print("The baseline was not written: repair what is wrong first.")
        else:
            old = {} if ran_all else kept["cases"]
            write_json({"machine": kind, "cases": {**old, **found["cases"]}}, baseline)
            console.print(f"wrote {baseline}")
    raise typer.Exit(1 if bad or missing else 0)


if __name__ == "__main__":
    run_script(main)
