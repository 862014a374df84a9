"""Training a draft: which prompts are left out, the files on the way, and, where torch is installed, a draft from nothing to text.

torch is no dependency of the tests: what needs it is skipped without it (pip install torch).
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_cpp import Llama
from llama_dflash import LlamaDFlash, relative_difference
from tiny_models import BOS, MASK, N_VOCAB, write_tiny_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from train_draft.errors import InputError, UnsupportedTargetError
from train_draft.export import find_mask_token, write_draft
from train_draft.prompts import Benchmark, collect
from train_draft.sequences import N_GRAM, Prompts, Sequences, n_gram_hashes

from ggml_mirror import DFlashLlama, FeatureMirror, capture

ARCHS = ("llama", "qwen3", "gemma3")
TAPS, BLOCK, N_EMBD, N_CTX = (1, 2, 3, 4, 5), 8, 64, 256

# F32 throughout, and no flash attention, which rounds through F16.
EXACT: dict[str, Any] = {
    "n_ctx": N_CTX, "n_threads": 1, "n_threads_batch": 1, "flash_attn": False, "type_k": 0, "type_v": 0, "verbose": False,
}  # fmt: skip


def random_prompts(n: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.array([BOS, *rng.integers(32, 127, rng.integers(8, 20))], np.int32) for _ in range(n)]


# --------------------------------------------------------------------------------------- without torch


def test_functions_of_the_benchmark_are_not_prompts(tmp_path: Path) -> None:
    theirs = 'def has_close(xs):\n    """Check if in given list of numbers, are any two numbers closer than given."""\n'
    source = tmp_path / "module.py"
    source.write_text(
        theirs + "    return 1\n\n\n"
        'def other_name(a):\n    """Here we check if in given list of numbers are any two equal."""\n    return a\n\n\n'
        'def kept(value, count):\n    """Return the value so many times as the count says."""\n    return [value] * count\n'
    )
    texts, counts = collect(Benchmark([theirs]), [source], 200, seed=0)
    assert len(texts) == len(set(texts)) == counts.source + counts.made_up
    assert [t for t in texts if "def kept(" in t] and counts.source == 1
    assert not [t for t in texts if "has_close" in t or "other_name" in t] and counts.dropped == 2
    assert counts.made_up > 150


def test_sequences_that_hold_a_run_of_the_benchmark_are_dropped() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 1000, (5, 64)).astype(np.int32)
    secret = rng.integers(0, 1000, 40).astype(np.int32)
    tokens[1, 20 : 20 + N_GRAM] = secret[7 : 7 + N_GRAM]
    tokens[3, 20 : 20 + N_GRAM - 1] = secret[: N_GRAM - 1]  # one token short
    n = np.full(5, 64, np.int32)
    kept = Sequences(tokens, n // 4, n, np.zeros(5, bool)).without(Prompts([], [secret], "").excluded())
    np.testing.assert_array_equal(kept.tokens, tokens[[0, 2, 3, 4]])
    assert n_gram_hashes(secret[:3]).shape == (0,)


@pytest.mark.parametrize("cut", [0, 10, 1000])
def test_files_on_the_way_are_whole_or_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "prompts.npz"
    made = Prompts(random_prompts(30), random_prompts(3, seed=1), "target")
    made.save(path)
    again = Prompts.load(path)
    for mine, theirs in ((made.prompts, again.prompts), (made.evaluation, again.evaluation)):
        assert [p.tolist() for p in mine] == [p.tolist() for p in theirs]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="cut off"):
        Prompts.load(path)


def random_draft(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    e, f, d = config["n_embd"], config["n_ff"], config["head_dim"]
    q, kv = config["n_head"] * d, config["n_head_kv"] * d
    shapes: dict[str, tuple[int, ...]] = {
        "fc": (e, len(config["taps"]) * e),
        "enc.output_norm": (e,),
        "output_norm": (e,),
    }
    for i in range(config["n_layer"]):
        layer = {
            "attn_norm": (e,), "ffn_norm": (e,), "attn_q_norm": (d,), "attn_k_norm": (d,), "attn_q": (q, e), "attn_k": (kv, e),
            "attn_v": (kv, e), "attn_output": (e, q), "ffn_gate": (f, e), "ffn_up": (f, e), "ffn_down": (e, f),
        }  # fmt: skip
        shapes.update({f"blk.{i}.{name}": shape for name, shape in layer.items()})
    return {
        f"{n}.weight": (rng.normal(1.0 if len(s) == 1 else 0, 0.1, s)).astype(np.float32) for n, s in shapes.items()
    }


CONFIG = {
    "taps": TAPS, "block_size": BLOCK, "mask_token": MASK, "n_layer": 2, "n_embd": N_EMBD, "n_ff": 96, "n_head": 4, "n_head_kv": 2,
    "head_dim": 16, "rms_eps": 1e-6, "rope_base": 100000.0, "embedding_scale": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def demo(demo_draft: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(demo_draft)


@pytest.mark.parametrize("matrix_type", ["q8_0", "f16"])
def test_export_is_laid_out_as_the_demo_draft(tmp_path: Path, demo: gguf.GGUFReader, matrix_type: str) -> None:
    target = gguf.GGUFReader(write_tiny_model(tmp_path / "target.gguf"))
    tensors = random_draft(CONFIG)
    write_draft(tmp_path / "draft.gguf", CONFIG, tensors, target, matrix_type=matrix_type)
    made = gguf.GGUFReader(tmp_path / "draft.gguf")

    def keys(reader: gguf.GGUFReader) -> dict[str, list[Any]]:
        return {n: f.types for n, f in reader.fields.items() if not n.startswith("tokenizer.") or "mask" in n}

    assert keys(made) == keys(demo)
    own = {name for name in target.fields if name.startswith("tokenizer.")}
    assert own <= set(made.fields) and all(made.fields[n].contents() == target.fields[n].contents() for n in own)
    names = {t.name: t for t in demo.tensors if not t.name.startswith("blk.") or int(t.name.split(".")[1]) < 2}
    assert {t.name for t in made.tensors} == set(names)
    for tensor in made.tensors:
        wanted = (
            gguf.GGMLQuantizationType.F32 if tensor.data.ndim == 1 else gguf.GGMLQuantizationType[matrix_type.upper()]
        )
        assert tensor.tensor_type == wanted
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(values, tensors[tensor.name], atol=0.004)


def test_export_refuses_what_has_diverged(tmp_path: Path) -> None:
    target = gguf.GGUFReader(write_tiny_model(tmp_path / "target.gguf"))
    tensors = random_draft(CONFIG)
    tensors["blk.1.ffn_down.weight"][3, 4] = np.nan
    with pytest.raises(InputError, match=r"blk\.1\.ffn_down"):
        write_draft(tmp_path / "draft.gguf", CONFIG, tensors, target)
    assert not (tmp_path / "draft.gguf").exists()


def test_the_target_s_own_mask_token_is_taken(tmp_path: Path) -> None:
    assert find_mask_token(gguf.GGUFReader(write_tiny_model(tmp_path / "target.gguf"))) == MASK


# ------------------------------------------------------------------------------------------ with torch


def load_target(path: Path) -> Any:
    torch = pytest.importorskip("torch")
    from train_draft.target import Target, TargetFile

    torch.set_num_threads(1)
    return Target(TargetFile(path), device="cpu", dtype=torch.float32, max_length=N_CTX)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_torch_target_is_llama_cpp_s(tmp_path: Path, arch: str) -> None:
    """Logits and rows over more positions than gemma3's window; the cache token by token as all at once."""
    torch = pytest.importorskip("torch")
    path = write_tiny_model(tmp_path / "target.gguf", arch, n_embd=N_EMBD, matrix_type="f32")
    target = load_target(path)
    tokens = [BOS, *np.random.default_rng(3).integers(32, 127, 79).tolist()]
    llm = Llama(str(path), logits_all=True, **EXACT)
    with FeatureMirror(taps=len(TAPS), n_embd=N_EMBD, cap=128, n_threads=1) as mirror, capture(llm, mirror, TAPS):
        llm.eval(tokens)
        rows = mirror.read(start=0, count=len(tokens))
    logits = llm.scores[: len(tokens)].copy()
    llm.close()
    ids = torch.tensor([tokens])
    hidden, _ = target.forward(ids)
    tolerance = 5e-3 if arch == "gemma3" else 1e-4  # llama.cpp looks GELU up in a table of F16 values
    assert relative_difference((hidden @ target.head.T)[0].numpy(), logits) < tolerance
    assert relative_difference(target.features(ids, TAPS)[0].numpy(), rows) < tolerance

    from train_draft.target import KvCache

    cache = KvCache(target, 1, 80)
    first, _ = target.forward(ids[:, :30], cache=cache, rows=slice(0, 1))
    more = [target.forward(ids[:, i : i + 1], cache=cache, rows=slice(0, 1), start=i)[0] for i in range(30, 80)]
    assert relative_difference(torch.cat([first, *more], 1).numpy(), hidden.numpy()) < 1e-4


@pytest.mark.parametrize("arch", ["mamba", "gpt2"])
def test_a_target_that_torch_does_not_compute_is_refused(tmp_path: Path, arch: str) -> None:
    with pytest.raises(UnsupportedTargetError, match="gemma3"):
        load_target(write_tiny_model(tmp_path / "target.gguf", arch))


def test_greedy_rows_are_what_llama_cpp_says_and_sampled_rows_are_not(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from train_draft.generation import continue_prompts

    path = write_tiny_model(tmp_path / "target.gguf", "gemma3", n_embd=N_EMBD, matrix_type="f32")
    target = load_target(path)
    prompts = random_prompts(4)
    heat = np.array([0, 0, 0, 1.0], np.float32)
    found = continue_prompts(target, prompts, 64, heat, seed=0)
    again = continue_prompts(target, prompts, 64, heat, seed=1)
    llm = Llama(str(path), **EXACT)
    for i, prompt in enumerate(prompts):
        assert found.tokens[i, : len(prompt)].tolist() == prompt.tolist()
        wanted = list(itertools.islice(llm.generate(prompt.tolist(), temp=0.0), 64 - len(prompt)))
        same = found.tokens[i, len(prompt) :].tolist() == wanted
        assert same == bool(found.greedy[i])
    llm.close()
    assert (found.tokens[:3] == again.tokens[:3]).all() and (found.tokens[3] != again.tokens[3]).any()


class Trained:
    """A draft trained for seconds on a tiny target, by the commands."""

    def __init__(self, folder: Path, arch: str) -> None:
        from train_draft.work_files import identity

        self.work, self.draft = folder / "work", folder / "draft.gguf"
        self.target = write_tiny_model(folder / "target.gguf", arch, n_embd=N_EMBD, matrix_type="f32")
        Prompts(random_prompts(64), random_prompts(4, seed=5), identity(self.target)).save(self.work / "prompts.npz")

    def run(self, command: str, *arguments: object) -> None:
        from train_draft.cli import app

        app([command, "-m", str(self.target), "--work", str(self.work), *map(str, arguments)], standalone_mode=False)

    def generate(self) -> None:
        self.run("generate", "--device", "cpu", "--length", 64, "--generate-rows", 32, "--tokens", 0.003)

    def train(self, steps: int, *arguments: object) -> None:
        self.run(
            "train", "--device", "cpu", "--steps", steps, "--rows", 8, "--anchors", 8, "--layers", 2, "--head-dim", 16, "--frequent", 128,
            "--random", 32, *arguments,
        )  # fmt: skip

    def checkpoint(self) -> dict[str, Any]:
        import torch

        state: dict[str, Any] = torch.load(self.work / "checkpoint.pt", weights_only=True)
        return state


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    one = Trained(tmp_path_factory.mktemp(request.param), request.param)
    one.generate()
    one.train(40)
    one.train(80, "--json", one.work / "train.json", "--plot", one.work / "train.png")
    one.run("export", "-o", one.draft, "--type", "f32")
    return one


def test_loss_falls_and_a_second_run_goes_on(trained: Trained) -> None:
    state = trained.checkpoint()
    assert [entry["step"] for entry in state["history"]] == [20, 40, 60, 80]
    losses = [entry["loss"] for entry in state["history"]]
    assert losses[-1] < 0.8 * losses[0]
    assert (trained.work / "train.json").stat().st_size and (trained.work / "train.png").stat().st_size
    shards = {p: p.stat().st_mtime_ns for p in (trained.work / "sequences").iterdir()}
    trained.generate()
    assert {p: p.stat().st_mtime_ns for p in (trained.work / "sequences").iterdir()} == shards


def test_the_exported_draft_says_what_torch_says(trained: Trained) -> None:
    """Native draft and llama.cpp's graph against torch's, over rows that llama.cpp gave: the embedding's scale included."""
    import torch
    from train_draft.model import DraftConfig
    from train_draft.training import load_draft
    from train_draft.work_files import identity

    llm = DFlashLlama(str(trained.target), draft_path=str(trained.draft), **EXACT)
    prompt = random_prompts(1, seed=9)[0].tolist()
    n = len(prompt)
    llm.eval(prompt)
    rows = llm.mirror.read(start=0, count=n)
    llm.draft.step(llm.mirror, n_past=n, last_token=ord("k"), n_tokens=BLOCK - 1)
    native = llm.draft.logits()
    oracle = LlamaDFlash(trained.draft, llm)
    oracle.inject(0, rows)
    theirs = oracle.logits(n, [ord("k"), *[MASK] * (BLOCK - 1)])
    oracle.close()
    llm.close()

    target = load_target(trained.target)
    draft = load_draft(trained.work / "checkpoint.pt", target, identity(trained.target), max_length=N_CTX)
    assert DraftConfig.from_json(trained.checkpoint()["config"]).taps == llm.draft_spec.taps
    with torch.no_grad():
        hidden = draft(target, torch.from_numpy(rows)[None], torch.tensor([[ord("k")]]), torch.tensor([[n]]))[0, 0]
    mine = (hidden @ target.head.T).numpy()
    assert mine.shape == native.shape == (BLOCK, N_VOCAB)
    # Flash attention on a CPU sums values in F16.
    assert relative_difference(native, mine) < 6e-3 and relative_difference(theirs, mine) < 6e-3


def test_text_with_the_trained_draft_is_the_target_s(trained: Trained) -> None:
    plain, drafting = (
        Llama(str(trained.target), **EXACT),
        DFlashLlama(str(trained.target), draft_path=str(trained.draft), **EXACT),
    )
    for prompt in random_prompts(3, seed=7):
        texts = [list(itertools.islice(m.generate(prompt.tolist(), temp=0.0), 40)) for m in (plain, drafting)]
        assert texts[0] == texts[1]
    plain.close()
    drafting.close()


def test_evaluation_counts_as_decoding_does(trained: Trained) -> None:
    """Steps, proposed and accepted tokens of the torch draft along greedy text are those of DFlashLlama."""
    pytest.importorskip("torch")
    from decoding import Counts, generate
    from train_draft.evaluation import evaluate
    from train_draft.training import load_draft
    from train_draft.work_files import identity

    prompts = random_prompts(4, seed=5)
    target = load_target(trained.target)
    found = evaluate(
        load_draft(trained.work / "checkpoint.pt", target, identity(trained.target), max_length=N_CTX),
        target,
        prompts,
        40,
    )
    trained.run("evaluate", "--device", "cpu", "-n", 40, "--json", trained.work / "evaluate.json")
    figures = json.loads((trained.work / "evaluate.json").read_text())["evaluate"]
    assert (figures["steps"], figures["accepted"]) == (found.steps, found.accepted) and figures["tau"] == found.tau
    llm = DFlashLlama(str(trained.target), draft_path=str(trained.draft), **EXACT)
    counts = sum((generate(llm, p.tolist(), 40).counts for p in prompts), Counts())
    llm.close()
    near = (
        5 if "gemma3" in trained.draft.parent.name else 0
    )  # tokens; F16 GELU in llama.cpp decides ties of so young a draft
    assert abs(found.steps - counts.steps) <= near and abs(found.accepted - counts.accepted) <= near, (found, counts)
    assert found.accepted


def test_what_is_not_of_this_run_is_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another draft"):
        trained.train(90, "--block-size", 4)
    with pytest.raises(InputError, match="multiple of 8"):
        trained.run("generate", "--length", 61)
    with pytest.raises(InputError, match="another run"):
        trained.run("generate", "--device", "cpu", "--length", 72, "--generate-rows", 32)
    other = Trained(tmp_path, "qwen3")
    with pytest.raises(InputError, match="generate first"):
        other.train(1)
    (other.work / "checkpoint.pt").write_bytes((trained.work / "checkpoint.pt").read_bytes())
    with pytest.raises(InputError, match="another target"):
        other.run("export", "-o", tmp_path / "draft.gguf")
    (other.work / "checkpoint.pt").write_bytes((trained.work / "checkpoint.pt").read_bytes()[:1000])
    with pytest.raises(InputError, match="cut off"):
        other.run("export", "-o", tmp_path / "draft.gguf")
