"""Capture against oracles that know nothing of it: llama.cpp's own copies of block inputs, a model cut off behind the
tapped block, a new evaluation of the same tokens, and a plain Python ring."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp._internals import LlamaContext
from resident import growth
from tiny_models import BOS, TARGET_ARCHS, write_tiny_model

from ggml_mirror import FeatureMirror, capture, devices
from ggml_mirror.errors import ArgumentError, CaptureError, ClosedError, GgmlMirrorError, StaleRowError
from ggml_mirror.model_info import default_taps

Rows = npt.NDArray[np.float32]
Load = Callable[..., llama_cpp.Llama]

N_LAYER, N_EMBD, N_CTX, TAPS = 8, 64, 256, (1, 3, 6)
PROMPTS = (b"Once upon a time", b"def fibonacci(n):\n    ", "grün, 世界".encode())
#: llama.cpp copies the inputs of these architectures' blocks; for any other, asking aborts the process.
COPIES_LAYER_INPUTS = ("llama", "qwen3", "qwen35", "lfm2")


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """``load(arch, exact=False, n_layer=8, **options)``: a tiny Llama. ``exact``: F32 weights and KV cache, so that
    rows hardly depend on how a prompt is cut into batches."""
    folder = tmp_path_factory.mktemp("models")

    def load(arch: str = "llama", *, exact: bool = False, n_layer: int = N_LAYER, **options: Any) -> llama_cpp.Llama:
        dtype = "f32" if exact else "f16"
        path = folder / f"{arch}-{dtype}-{n_layer}.gguf"
        if not path.exists():
            write_tiny_model(path, arch, n_layer=n_layer, n_embd=N_EMBD, matrix_type=dtype)
        defaults = {"n_ctx": N_CTX, "n_batch": N_CTX, "n_ubatch": N_CTX, "n_threads": 1, "n_threads_batch": 1}
        if exact:
            defaults |= {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        return llama_cpp.Llama(str(path), **{**defaults, **options}, verbose=False)

    return load


@pytest.fixture
def mirror() -> Iterator[FeatureMirror]:
    with _mirror() as m:
        yield m


def _mirror(cap: int = N_CTX, dtype: str = "f32", taps: int = len(TAPS)) -> FeatureMirror:
    return FeatureMirror(taps=taps, n_embd=N_EMBD, cap=cap, dtype=dtype, n_threads=1)


def _tokens(n: int, seed: int = 0) -> list[int]:
    return [BOS, *np.random.default_rng(seed).integers(0, 256, n - 1).tolist()]


def _generate(llm: llama_cpp.Llama, tokens: Sequence[int], n: int, **sampling: Any) -> list[int]:
    return list(itertools.islice(llm.generate(list(tokens), **{"temp": 0.0, **sampling}), n))


def _evaluated(llm: llama_cpp.Llama) -> list[int]:
    return llm.input_ids[: llm.n_tokens].tolist()


def _fresh_rows(load: Load, arch: str, tokens: Sequence[int]) -> Rows:
    """Rows of the tokens, by one evaluation in a new, exact Llama."""
    llm = load(arch, exact=True)
    with _mirror() as m:
        with capture(llm, m, TAPS):
            llm.eval(tokens)
        return m.read(start=0, count=len(tokens))


def _assert_close(rows: Rows, expected: Rows, arch: str) -> None:
    """Rows of exact models; their RMS is 2 to 6, rows of other positions or blocks differ by that much. ggml's GELU is
    a table of F16 values, so that models with it amplify the last bit."""
    np.testing.assert_allclose(rows, expected, rtol=0, atol=0.05 if arch in ("gemma3", "gpt2") else 1e-3)


# ------------------------------------------------------------------------------------ the rows, by llama.cpp itself


class _LayerInputs:
    """llama.cpp's own copies of block inputs: exported, but under their C++ names and without a header."""

    def __init__(self, llm: llama_cpp.Llama, layers: Sequence[int]) -> None:
        library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libllama.so"))
        enable = library._Z30llama_set_embeddings_layer_inpP13llama_contextjb
        enable.argtypes, enable.restype = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_bool], None
        self._get = library._Z30llama_get_embeddings_layer_inpP13llama_contextj
        self._get.argtypes, self._get.restype = [ctypes.c_void_p, ctypes.c_uint32], ctypes.POINTER(ctypes.c_float)
        self._llm, self._layers = llm, layers
        for layer in layers:
            enable(llm.ctx, layer, True)

    def eval(self, tokens: Sequence[int], batch: int) -> Rows:
        """[n, layers * n_embd]: the layers' inputs, side by side, evaluated ``batch`` tokens at a time."""
        parts = []
        for i in range(0, len(tokens), batch):
            part = tokens[i : i + batch]
            self._llm.eval(part)
            shape = (len(part), self._llm.n_embd())
            inputs = [np.ctypeslib.as_array(self._get(self._llm.ctx, layer), shape=shape) for layer in self._layers]
            parts.append(np.concatenate(inputs, axis=1))
        return np.concatenate(parts)


@pytest.mark.parametrize(("n_batch", "n_ubatch"), [(256, 256), (256, 16), (32, 32), (48, 13), (1, 1)])
@pytest.mark.parametrize("arch", COPIES_LAYER_INPUTS)
def test_a_blocks_captured_output_is_the_input_of_the_next_block_bit_for_bit(
    arch: str, n_batch: int, n_ubatch: int, load: Load
) -> None:
    layers, tokens = range(N_LAYER - 1), _tokens(100)
    llm = load(arch, n_batch=n_batch, n_ubatch=n_ubatch)
    with _mirror(taps=len(layers)) as m:
        with capture(llm, m, layers):
            llm.eval(tokens)
        rows = m.read(start=0, count=len(tokens))
    inputs = _LayerInputs(load(arch, n_batch=n_batch, n_ubatch=n_ubatch), [layer + 1 for layer in layers])
    np.testing.assert_array_equal(rows, inputs.eval(tokens, n_batch))


@pytest.mark.slow
@pytest.mark.parametrize(("n_batch", "n_ubatch"), [(512, 512), (64, 24)])
def test_rows_of_the_demo_target_are_its_block_inputs(n_batch: int, n_ubatch: int, demo_target: Path) -> None:
    taps = default_taps(30)
    options = {"n_ctx": 512, "n_batch": n_batch, "n_ubatch": n_ubatch, "verbose": False}
    llm = llama_cpp.Llama(str(demo_target), **options)
    tokens = llm.tokenize(b"from typing import List\n\n\ndef has_close_elements(numbers: List[float]) -> bool:\n" * 3)
    with FeatureMirror(taps=len(taps), n_embd=576, cap=512, dtype="f32") as m:
        with capture(llm, m, taps):
            llm.eval(tokens)
        rows = m.read(start=0, count=len(tokens))
    inputs = _LayerInputs(llama_cpp.Llama(str(demo_target), **options), [tap + 1 for tap in taps])
    np.testing.assert_array_equal(rows, inputs.eval(tokens, n_batch))


@pytest.mark.parametrize("tap", [3, 6])  # a twin without a block of attention, llama.cpp does not run
@pytest.mark.parametrize("arch", TARGET_ARCHS)
def test_rows_lead_to_the_embeddings_of_a_model_cut_off_behind_the_tap(arch: str, tap: int, load: Load) -> None:
    """For any architecture: the embeddings of the first ``tap + 1`` blocks are the final norm of the rows."""
    tokens = _tokens(60)
    llm = load(arch)
    with _mirror(taps=1) as m:
        with capture(llm, m, [tap]):
            llm.eval(tokens)
        rows = m.read(start=0, count=len(tokens))

    twin = load(arch, n_layer=tap + 1, embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_NONE, logits_all=True)
    twin.eval(tokens)
    shape = (len(tokens), N_EMBD)
    embeddings = np.ctypeslib.as_array(llama_cpp.llama_get_embeddings(twin.ctx), shape=shape)

    weights = {t.name: np.asarray(t.data) for t in gguf.GGUFReader(twin.model_path).tensors if "norm" in t.name}
    gain = weights["token_embd_norm.weight" if arch == "lfm2" else "output_norm.weight"]
    if arch == "gpt2":
        centred = rows - rows.mean(axis=1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * gain + weights["output_norm.bias"]
    else:
        normed = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-6) * gain
    np.testing.assert_allclose(embeddings, normed, rtol=0, atol=1e-4)


@pytest.mark.parametrize("arch", TARGET_ARCHS)
def test_rows_do_not_depend_on_how_the_prompt_is_cut_into_batches(arch: str, load: Load) -> None:
    tokens = _tokens(120)
    whole = _fresh_rows(load, arch, tokens)
    for n_batch, n_ubatch in (16, 16), (256, 16), (256, 7), (50, 20), (1, 1):
        llm = load(arch, exact=True, n_batch=n_batch, n_ubatch=n_ubatch)
        with _mirror() as m:
            with capture(llm, m, TAPS):
                llm.eval(tokens)
            _assert_close(m.read(start=0, count=len(tokens)), whole, arch)


def test_the_last_block_can_be_tapped_where_it_gives_every_row(load: Load) -> None:
    """qwen35 picks the rows whose logits are asked for behind its last block, the other architectures inside."""
    tokens, llm = _tokens(40), load("qwen35", n_ubatch=16)
    with _mirror(taps=1) as m:
        with capture(llm, m, [N_LAYER - 1]):
            llm.eval(tokens)
        rows = m.read(start=0, count=40)
    longer = load("qwen35", n_layer=N_LAYER + 1, n_ubatch=16)
    np.testing.assert_array_equal(rows, _LayerInputs(longer, [N_LAYER]).eval(tokens, 40))


def test_each_tap_goes_where_it_was_asked_for(load: Load) -> None:
    tokens, llm = _tokens(20), load()
    with _mirror() as straight, _mirror() as turned:
        with capture(llm, straight, (1, 3, 6)):
            llm.eval(tokens)
        llm.reset()
        with capture(llm, turned, (6, 1, 3)):
            llm.eval(tokens)
        a = straight.read(start=0, count=20).reshape(20, 3, N_EMBD)
        b = turned.read(start=0, count=20).reshape(20, 3, N_EMBD)
    np.testing.assert_array_equal(b, a[:, [2, 0, 1]])


def test_taps_default_to_the_dflash_layers(load: Load) -> None:
    tokens, llm = _tokens(20), load()
    with _mirror(taps=5) as by_default, _mirror(taps=5) as by_hand:
        with capture(llm, by_default):
            llm.eval(tokens)
        llm.reset()
        with capture(llm, by_hand, default_taps(N_LAYER)):
            llm.eval(tokens)
        np.testing.assert_array_equal(by_default.read(start=0, count=20), by_hand.read(start=0, count=20))


@pytest.mark.gpu
@pytest.mark.parametrize("n_gpu_layers", [-1, 4, 0])
def test_mirrors_on_a_gpu_hold_what_one_in_host_memory_does(load: Load, n_gpu_layers: int) -> None:
    """From a target on the GPU, on both, in host memory: by kernels and by ggml's operations, over several batches and the ring's end."""
    gpus = [d.name for d in devices() if not d.is_host]
    if not gpus:
        pytest.skip("needs a GPU")
    llm, cap = load(n_gpu_layers=n_gpu_layers, n_batch=32, n_ubatch=16), 100
    with contextlib.ExitStack() as stack:
        mirrors = [stack.enter_context(_mirror(cap))]
        for gpu, dtype, ggml_ops in itertools.product(gpus, ("f32", "f16", "q8_0"), (False, True)):
            options: dict[str, Any] = {"taps": len(TAPS), "n_embd": N_EMBD, "cap": cap, "dtype": dtype}
            mirrors.append(stack.enter_context(FeatureMirror(**options, device=gpu, ggml_ops=ggml_ops)))
        with capture(llm, mirrors, TAPS):
            _generate(llm, _tokens(130), 40)
        want = mirrors[0].read(start=160 - cap // 2, count=cap // 2)
        for m in mirrors[1:]:
            assert m.positions.tolist() == mirrors[0].positions.tolist()
            rows = m.read(start=160 - cap // 2, count=cap // 2)
            if m.dtype == "f32":
                np.testing.assert_array_equal(rows, want)
            else:
                blocks = np.abs(want.reshape(-1, 32)).max(axis=1).repeat(32).reshape(want.shape)
                step = blocks / 127 if m.dtype == "q8_0" else blocks * 2.0**-10
                assert (np.abs(rows - want) <= 0.57 * step).all()  # half a step, and the rounding of the scale to f16


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_mirrors_of_several_dtypes_hold_the_same_rows(dtype: str, load: Load) -> None:
    """All fed by one evaluation; the quantised one as gguf's reference quantiser has it, but for ties."""
    tokens, llm = _tokens(100), load()
    with _mirror() as exact, _mirror(dtype=dtype) as quantised, _mirror(cap=32, dtype=dtype) as short:
        with capture(llm, [exact, quantised, short], TAPS):
            llm.eval(tokens)
        x = exact.read(start=0, count=100)
        y = quantised.read(start=0, count=100)
        np.testing.assert_array_equal(short.read(start=68, count=32), y[68:])
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    reference = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    assert (y == reference).mean() > 0.999
    # A tie may go the other way, by one step: relative to the value, or to the largest |x| in its block of 32.
    step = {
        "f16": 2**-10,
        "bf16": 2**-7,
        "q8_0": 1 / 127,
        "q5_1": 2 / 31,
        "q5_0": 1 / 16,
        "q4_1": 2 / 15,
        "q4_0": 1 / 8,
    }
    scale = np.abs(x) if "f" in dtype else np.abs(x.reshape(-1, 32)).max(axis=1).repeat(32).reshape(x.shape)
    assert (np.abs(y - reference) <= scale * step[dtype] * 1.01).all()


# --------------------------------------------------------------------------- which positions, and of which sequence


class _PlainRing:
    """Which positions a ring of ``cap`` slots holds, told of each evaluation."""

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.slots: dict[int, int] = {}

    def evaluated(self, start: int, count: int) -> None:
        self.slots = {slot: position for slot, position in self.slots.items() if position < start}
        for position in range(start, start + count):
            self.slots[position % self.cap] = position

    @property
    def positions(self) -> list[int]:
        return sorted(self.slots.values())


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(first position, count) of each batch that any Llama evaluates from here on."""
    seen: list[tuple[int, int]] = []
    decode = LlamaContext.decode

    def recorded(self: LlamaContext, batch: Any) -> None:
        seen.append((batch.batch.pos[0], batch.batch.n_tokens))
        decode(self, batch)

    monkeypatch.setattr(LlamaContext, "decode", recorded)
    return seen


def _follow(ring: _PlainRing, spans: list[tuple[int, int]]) -> None:
    for span in spans:
        ring.evaluated(*span)
    spans.clear()


@pytest.mark.parametrize("cap", [1, 7, 24, 64, 256])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen35", "mamba"])
def test_the_mirror_follows_a_conversation(arch: str, cap: int, load: Load, spans: list[tuple[int, int]]) -> None:
    """Prompts longer than cap, more turns, reused prefixes, resets: after each the mirror is as if made anew."""
    llm = load(arch, exact=True, n_batch=40, n_ubatch=16)
    ring = _PlainRing(cap)
    first, other = _tokens(90, seed=1), _tokens(45, seed=2)
    with _mirror(cap) as m, capture(llm, m, TAPS):

        def check() -> None:
            _follow(ring, spans)
            assert m.positions.tolist() == ring.positions
            tokens = _evaluated(llm)
            held = [p for p in ring.positions if p < len(tokens)]
            assert held[-1] == len(tokens) - 1
            expected = _fresh_rows(load, arch, tokens)
            spans.clear()  # what the oracle evaluates is not part of the conversation
            for position in held:
                _assert_close(m.read(start=position, count=1), expected[position : position + 1], arch)
            run = min(len(held), len(tokens) - held[0])
            assert held[-run:] == list(range(len(tokens) - run, len(tokens)))
            rows = m.read(start=len(tokens) - run, count=run)
            _assert_close(rows, expected[len(tokens) - run :], arch)
            if len(tokens) > cap:
                with pytest.raises(StaleRowError) as error:
                    m.read(start=0, count=1)
                assert error.value.position == 0

        llm.eval(first)
        check()
        llm.eval(_tokens(30, seed=3))
        check()
        llm.eval([65])
        check()
        _generate(llm, first[:50] + other, 9)  # shares 50 tokens with what was evaluated
        assert _evaluated(llm)[:95] == first[:50] + other
        check()
        said = _generate(llm, first[:50] + other[:20], 2)  # shares 70: all of it
        check()
        _generate(llm, first[:50] + other[:20] + said + [66, 67], 3)
        check()
        llm.reset()
        llm.eval(other)
        check()
        llm.reset()
        _generate(llm, first[:10], 5)
        check()


def test_a_prefix_is_reused_and_its_rows_are_kept(load: Load, spans: list[tuple[int, int]]) -> None:
    """So that the test above does see reuse: rows before the shared prefix's end are not written again."""
    llm = load(exact=True)
    with _mirror() as m, capture(llm, m, TAPS):
        llm.eval(_tokens(60))
        before = m.read(start=0, count=60)
        spans.clear()
        _generate(llm, [*_tokens(60)[:40], 65, 66], 1)
        assert spans == [(40, 2)]
        np.testing.assert_array_equal(m.read(start=0, count=40), before[:40])
        assert m.positions.tolist() == list(range(42))


@pytest.mark.parametrize("cap", [1, 16, 33, 100])
def test_a_prefill_longer_than_cap_keeps_exactly_its_tail(cap: int, load: Load) -> None:
    tokens = _tokens(100)
    whole = _fresh_rows(load, "llama", tokens)
    for n_batch, n_ubatch in (256, 256), (256, 16), (30, 30):
        llm = load(exact=True, n_batch=n_batch, n_ubatch=n_ubatch)
        with _mirror(cap) as m:
            with capture(llm, m, TAPS):
                llm.eval(tokens)
            assert m.positions.tolist() == list(range(100 - cap, 100))
            _assert_close(m.read(start=100 - cap, count=cap), whole[100 - cap :], "llama")


def test_rows_of_a_rewound_sequence_are_forgotten_with_its_cells(load: Load, mirror: FeatureMirror) -> None:
    llm = load()
    with capture(llm, mirror, TAPS):
        llm.eval(_tokens(50))
        llm._ctx.kv_cache_seq_rm(-1, 20, -1)
        assert mirror.positions.tolist() == list(range(20))
        llm._ctx.kv_cache_clear()
        assert mirror.positions.tolist() == []


def test_rows_of_another_sequence_are_not_read_after_a_state_is_loaded(load: Load, mirror: FeatureMirror) -> None:
    """As Llama.set_cache does it at each cache hit."""
    llm = load()
    llm.eval(_tokens(30, seed=1))
    saved = llm.save_state()
    llm.reset()
    with capture(llm, mirror, TAPS):
        llm.eval(_tokens(30, seed=2))
        llm.load_state(saved)
        llm.eval([65])
        with pytest.raises(StaleRowError):
            mirror.read(start=0, count=31)
        mirror.read(start=30, count=1)


def test_rows_of_an_earlier_attachment_are_not_read_as_the_present_sequences(load: Load, mirror: FeatureMirror) -> None:
    llm = load()
    with capture(llm, mirror, TAPS):
        llm.eval(_tokens(30, seed=1))
    llm.reset()
    llm.eval(_tokens(30, seed=2))
    with capture(llm, mirror, TAPS):
        llm.eval([65])
        with pytest.raises(StaleRowError):
            mirror.read(start=0, count=31)
        mirror.read(start=30, count=1)


@pytest.mark.parametrize("how", ["a loaded state", "an evaluation while not attached"])
def test_of_an_exchanged_sequence_the_rows_of_the_shared_prefix_are_kept(
    how: str, load: Load, mirror: FeatureMirror
) -> None:
    llm = load(exact=True)
    before, now = _tokens(30), [*_tokens(30)[:12], *_tokens(20, seed=2)[1:]]
    llm.eval(now)
    saved = llm.save_state()
    llm.reset()
    with capture(llm, mirror, TAPS):
        llm.eval(before)
        if how == "a loaded state":
            llm.load_state(saved)
            llm.eval([65])
    if how == "an evaluation while not attached":
        llm.reset()
        llm.eval(now)
        with capture(llm, mirror, TAPS):
            llm.eval([65])
    assert mirror.positions.tolist() == [*range(12), len(now)]
    expected = _fresh_rows(load, "llama", [*now, 65])
    _assert_close(mirror.read(start=0, count=12), expected[:12], "llama")
    _assert_close(mirror.read(start=len(now), count=1), expected[-1:], "llama")


def test_attaching_again_to_the_same_sequence_keeps_its_rows(load: Load, mirror: FeatureMirror) -> None:
    llm, tokens = load(exact=True), _tokens(30)
    for start in 0, 10, 20:
        with capture(llm, mirror, TAPS):
            llm.eval(tokens[start : start + 10])
    _assert_close(mirror.read(start=0, count=30), _fresh_rows(load, "llama", tokens), "llama")


def test_rows_of_other_taps_are_not_read_as_the_present_ones(load: Load, mirror: FeatureMirror) -> None:
    llm = load()
    with capture(llm, mirror, TAPS):
        llm.eval(_tokens(30))
    with capture(llm, mirror, (2, 4, 5)):
        llm.eval([65])
        with pytest.raises(StaleRowError):
            mirror.read(start=0, count=31)


def test_rows_of_another_model_are_not_read_as_the_present_ones(load: Load, mirror: FeatureMirror) -> None:
    """Refusing to attach is as good as forgetting."""
    one, other = load("llama"), load("qwen3")
    with capture(one, mirror, TAPS):
        one.eval(_tokens(30))
    other.eval(_tokens(30))
    with pytest.raises(GgmlMirrorError), capture(other, mirror, TAPS):
        other.eval([65])
        mirror.read(start=0, count=31)


# ------------------------------------------------------------------------------------------- the text is the same

SAMPLED = {"temp": 0.9, "top_k": 40, "top_p": 0.95}


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("arch", TARGET_ARCHS)
def test_text_is_identical_with_capture_on_and_off(arch: str, sampling: dict[str, Any], load: Load) -> None:
    plain, captured = load(arch), load(arch)
    texts = []
    with _mirror(cap=48) as f32, _mirror(cap=48, dtype="q8_0") as q8, capture(captured, [f32, q8], TAPS):
        for prompt in PROMPTS:
            both = []
            for llm in plain, captured:
                llm.set_seed(11)
                both.append(_generate(llm, llm.tokenize(prompt), 40, **sampling))
            assert both[0] == both[1]
            texts.append(both[0])
        assert len(f32) == len(q8) == 48
    assert len(set(map(tuple, texts))) == len(PROMPTS)


@pytest.mark.parametrize("arch", TARGET_ARCHS)
def test_logits_are_identical_bit_for_bit(arch: str, load: Load, mirror: FeatureMirror) -> None:
    plain, captured = load(arch, logits_all=True, n_ubatch=16), load(arch, logits_all=True, n_ubatch=16)
    tokens = _tokens(50)
    plain.eval(tokens)
    with capture(captured, mirror, TAPS):
        captured.eval(tokens)
    np.testing.assert_array_equal(plain.scores[:50], captured.scores[:50])


def test_completions_of_the_high_level_api_are_identical(load: Load, mirror: FeatureMirror) -> None:
    plain, captured = load(), load()
    with capture(captured, mirror, TAPS):
        for prompt in "Hello", "Hello again", "Hello":
            for options in {"temperature": 0.0}, {"temperature": 0.8, "seed": 5}:
                texts = [llm(prompt, max_tokens=24, **options)["choices"][0]["text"] for llm in (plain, captured)]
                assert texts[0] == texts[1] and len(texts[0]) > 10


@pytest.mark.slow
def test_text_of_the_demo_target_is_identical(demo_target: Path) -> None:
    llm = llama_cpp.Llama(str(demo_target), n_ctx=256, verbose=False)
    tokens = llm.tokenize(b"def add(a, b):\n")
    plain = _generate(llm, tokens, 32)
    with FeatureMirror(taps=5, n_embd=576, cap=64, dtype="q8_0") as m, capture(llm, m):
        llm.reset()
        assert _generate(llm, tokens, 32) == plain


# ------------------------------------------------------------------------------------------------ attach, detach


@pytest.mark.parametrize("arch", TARGET_ARCHS)
def test_attaching_in_mid_conversation_continues_it(arch: str, load: Load, mirror: FeatureMirror) -> None:
    prompt = _tokens(30)
    uninterrupted = _generate(load(arch), prompt, 24)
    llm = load(arch)
    text = _generate(llm, prompt, 8)
    with capture(llm, mirror, TAPS):
        text += _generate(llm, prompt + text, 8)
        # The token sampled last before attaching stood at position 37, and had not been evaluated.
        assert mirror.positions[-1] == 30 + 16 - 2
        assert set(mirror.positions) >= set(range(37, 45))
    text += _generate(llm, prompt + text, 8)
    assert text == uninterrupted


def test_after_detaching_the_model_works_and_the_mirror_rests(load: Load, mirror: FeatureMirror) -> None:
    llm, tokens = load(), _tokens(20)
    with capture(llm, mirror, TAPS):
        llm.eval(tokens)
    rows, positions = mirror.read(start=0, count=20), mirror.positions.tolist()
    writes = mirror.times().write_calls
    llm.eval([65, 66])
    llm.reset()
    assert _generate(llm, tokens, 12) == _generate(load(), tokens, 12)
    assert mirror.positions.tolist() == positions
    assert mirror.times().write_calls == writes
    np.testing.assert_array_equal(mirror.read(start=0, count=20), rows)


def test_an_exception_inside_detaches(load: Load, mirror: FeatureMirror) -> None:
    llm = load()
    with pytest.raises(ZeroDivisionError), capture(llm, mirror, TAPS):
        llm.eval(_tokens(10))
        raise ZeroDivisionError
    assert len(mirror) == 10
    writes = mirror.times().write_calls
    llm.eval([65])
    assert mirror.times().write_calls == writes
    with capture(llm, mirror, TAPS):
        llm.eval([66])
    assert mirror.times().write_calls > writes


def test_the_native_context_is_remade_once(load: Load, mirror: FeatureMirror) -> None:
    llm = load()
    addresses = set()
    for _ in range(3):
        with capture(llm, mirror, TAPS):
            addresses.add(ctypes.cast(llm.ctx, ctypes.c_void_p).value)
    assert len(addresses) == 1


ATTACH_ERRORS = [
    pytest.param(CaptureError, (1, 3, N_LAYER), {}, id="tap beyond the last block"),
    pytest.param(CaptureError, (-1, 3, 6), {}, id="negative tap"),
    pytest.param(CaptureError, (1, 3, 2**40), {}, id="enormous tap"),
    pytest.param(CaptureError, (1, 3, N_LAYER - 1), {}, id="last block"),
    pytest.param(CaptureError, TAPS, {"n_embd": 32}, id="wrong width"),
    pytest.param(ArgumentError, (1, 3, 3), {}, id="tap twice"),
    pytest.param(ArgumentError, (), {}, id="no tap"),
    pytest.param(ArgumentError, TAPS, {"taps": 4}, id="too many mirror taps"),
    pytest.param(ArgumentError, TAPS, {"taps": 2}, id="too few mirror taps"),
    pytest.param(ArgumentError, (1.5, 3, 6), {}, id="tap that is no integer"),
]


@pytest.mark.parametrize("thing", [None, "x", 3, [None], []], ids=repr)
def test_what_is_no_mirror_is_refused(thing: Any, load: Load) -> None:
    with pytest.raises(ArgumentError), capture(load(), thing, TAPS):
        pass


@pytest.mark.parametrize(("error", "taps", "shape"), ATTACH_ERRORS)
@pytest.mark.parametrize("arch", ["llama", "mamba"])
def test_what_cannot_be_captured_is_refused_and_the_conversation_goes_on(
    arch: str, error: type[GgmlMirrorError], taps: Sequence[Any], shape: dict[str, int], load: Load
) -> None:
    prompt = _tokens(20)
    uninterrupted = _generate(load(arch), prompt, 16)
    llm = load(arch)
    text = _generate(llm, prompt, 8)
    with FeatureMirror(cap=64, dtype="f32", **{"taps": 3, "n_embd": N_EMBD, **shape}) as m:
        with pytest.raises(error), capture(llm, m, taps):
            pass
        assert len(m) == 0
        text += _generate(llm, prompt + text, 8)
        assert len(m) == 0
    assert text == uninterrupted


def test_a_closed_mirror_is_refused(load: Load, mirror: FeatureMirror) -> None:
    llm, closed = load(), _mirror()
    closed.close()
    for mirrors in closed, [mirror, closed]:
        with pytest.raises(ClosedError), capture(llm, mirrors, TAPS):
            pass
    assert _generate(llm, _tokens(10), 8) == _generate(load(), _tokens(10), 8)


def test_no_mirror_and_mirrors_of_two_widths_are_refused(load: Load, mirror: FeatureMirror) -> None:
    llm = load()
    with pytest.raises(ArgumentError), capture(llm, [], TAPS):
        pass
    with FeatureMirror(taps=3, n_embd=32, cap=8, dtype="f32") as narrow:
        with pytest.raises(ArgumentError), capture(llm, [mirror, narrow], TAPS):
            pass


def test_a_second_capture_of_the_same_model_is_refused_and_the_first_goes_on(load: Load, mirror: FeatureMirror) -> None:
    llm, tokens = load(exact=True), _tokens(20)
    with capture(llm, mirror, TAPS):
        llm.eval(tokens[:10])
        with _mirror() as second, pytest.raises(CaptureError, match="already"), capture(llm, second, TAPS):
            pass
        llm.eval(tokens[10:])
    _assert_close(mirror.read(start=0, count=20), _fresh_rows(load, "llama", tokens), "llama")


def test_two_models_are_captured_side_by_side(load: Load) -> None:
    tokens = _tokens(20)
    one, two = load("llama", exact=True), load("qwen3", exact=True)
    with _mirror() as a, _mirror() as b, capture(one, a, TAPS), capture(two, b, TAPS):
        for start in 0, 10:
            one.eval(tokens[start : start + 10])
            two.eval(tokens[start : start + 10])
        _assert_close(a.read(start=0, count=20), _fresh_rows(load, "llama", tokens), "llama")
        _assert_close(b.read(start=0, count=20), _fresh_rows(load, "qwen3", tokens), "qwen3")


def test_an_embedding_model_is_refused_and_still_embeds(load: Load, mirror: FeatureMirror) -> None:
    llm = load(embedding=True)
    before = llm.embed("some text")
    with pytest.raises(CaptureError, match="embedding"), capture(llm, mirror, TAPS):
        pass
    assert llm.embed("some text") == before


# ------------------------------------------------------------------------------------------- evaluations that fail


def test_a_prompt_beyond_the_context_leaves_no_partial_rows(load: Load, mirror: FeatureMirror) -> None:
    """The batch that does not fit raises; the batches before it were evaluated, and stay."""
    llm, tokens = load(exact=True, n_batch=40), _tokens(N_CTX + 30)
    with capture(llm, mirror, TAPS):
        with pytest.raises(RuntimeError, match="llama_decode"):
            llm.eval(tokens)
        assert llm.n_tokens == 240
        assert mirror.positions.tolist() == list(range(llm.n_tokens))
        rows = mirror.read(start=0, count=llm.n_tokens)
        _assert_close(rows, _fresh_rows(load, "llama", tokens[: llm.n_tokens]), "llama")
        llm.reset()
        llm.eval(tokens[100:130])
        assert mirror.positions.tolist() == list(range(30))
        _assert_close(mirror.read(start=0, count=30), _fresh_rows(load, "llama", tokens[100:130]), "llama")


@pytest.mark.parametrize(
    "done",
    [
        *(0.02, 0.3, 0.5, 0.8),
        0.99,
    ],
)
def test_an_aborted_evaluation_leaves_no_rows_of_its_own(done: float, load: Load, mirror: FeatureMirror) -> None:
    """Aborted after a share of its graph nodes, in any of four ubatches: taps may have been written, or not."""
    calls, limit = 0, 10**9

    def abort(_: Any) -> bool:
        nonlocal calls
        calls += 1
        return calls > limit

    callback = llama_cpp.ggml_abort_callback(abort)
    llm, first, second = load(exact=True, n_ubatch=8), _tokens(10), _tokens(32, seed=5)
    with capture(llm, mirror, TAPS):
        llama_cpp.llama_set_abort_callback(llm.ctx, callback, None)
        llm.eval(first)
        calls = 0
        llm.eval(second)
        whole = calls
        llm.reset()
        llm.eval(first)

        calls, limit = 0, int(done * whole)
        with pytest.raises(RuntimeError, match="llama_decode returned 2"):
            llm.eval(second)
        assert llm.n_tokens == 10
        live = [mirror._live(complete_only=complete)[0].tolist() for complete in (True, False)]
        assert live == [list(range(10))] * 2

        limit = 10**9
        llm.eval(second)
        _assert_close(mirror.read(start=0, count=42), _fresh_rows(load, "llama", first + second), "llama")
        llm.reset()
        llm.eval(second)
        assert mirror.positions.tolist() == list(range(32))


def test_the_last_block_is_refused_with_batches_too_small_to_tell_at_once(load: Load, mirror: FeatureMirror) -> None:
    llm, tokens = load(n_batch=8, n_ubatch=1), _tokens(8)
    with pytest.raises(CaptureError), capture(llm, mirror, (1, 3, N_LAYER - 1)):
        llm.eval(tokens)
    assert len(mirror) == 0
    assert _generate(llm, tokens, 8) == _generate(load(n_batch=8, n_ubatch=1), tokens, 8)


# ---------------------------------------------------------------------------------------------------- lifetimes


def _run_alone(code: str, model: str) -> None:
    """Run in a process of its own, which must not crash."""
    head = f"""
        import gc
        import llama_cpp
        from ggml_mirror import FeatureMirror, capture
        from ggml_mirror.errors import ClosedError, GgmlMirrorError
        def load():
            return llama_cpp.Llama({model!r}, n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
        taps, tokens = {TAPS}, {_tokens(20)}
        llm, m = load(), FeatureMirror(taps=3, n_embd={N_EMBD}, cap=64, dtype="q8_0")
    """
    script = textwrap.dedent(head) + textwrap.dedent(code)
    command = [sys.executable, "-X", "faulthandler", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-3000:]}"


LIFETIMES = {
    "mirror closed while attached": """
        with capture(llm, m, taps):
            llm.eval(tokens)
            m.close(); gc.collect()
            try:
                llm.eval(tokens)
            except ClosedError:
                pass  # as any use of a closed mirror
        del m; gc.collect()
        llm.eval(tokens)
    """,
    "model closed while attached": """
        with capture(llm, m, taps):
            llm.eval(tokens)
            llm.close()
        assert m.positions.tolist() == list(range(20))
    """,
    "model deleted while attached": """
        with capture(llm, m, taps):
            llm.eval(tokens)
            del llm; gc.collect()
        gc.collect()
        assert m.positions.tolist() == list(range(20))
    """,
    "model closed afterwards": """
        with capture(llm, m, taps):
            llm.eval(tokens)
        llm.close()
        del llm; gc.collect()
        assert m.read(start=0, count=20).shape == (20, 192)
    """,
    "mirror deleted afterwards": """
        with capture(llm, m, taps):
            llm.eval(tokens)
        m.close(); del m; gc.collect()
        llm.eval(tokens)
    """,
    "interpreter ends while attached": """
        attached = capture(llm, m, taps)
        attached.__enter__()
        llm.eval(tokens)
    """,
    "model deleted, another made, in a loop": """
        for _ in range(5):
            with capture(llm, m, taps):
                llm.eval(tokens)
            llm = load()
    """,
}


@pytest.mark.parametrize("code", LIFETIMES.values(), ids=LIFETIMES.keys())
def test_no_order_of_closing_crashes(code: str, load: Load) -> None:
    _run_alone(code, load().model_path)


def test_a_closed_model_is_refused(load: Load) -> None:
    code = """
        llm.close()
        try:
            with capture(llm, m, taps):
                pass
        except GgmlMirrorError:
            pass
        else:
            raise SystemExit("not refused")
    """
    _run_alone(code, load().model_path)


def test_attaching_and_detaching_does_not_leak(load: Load) -> None:
    """A ring is 2 MiB here: one that stays per cycle would add 100."""
    llm, tokens = load(), _tokens(10)

    def cycle(_: int) -> None:
        llm.reset()
        with FeatureMirror(taps=3, n_embd=N_EMBD, cap=2731, dtype="f32", n_threads=1) as m, capture(llm, m, TAPS):
            llm.eval(tokens)

    assert growth(cycle, 50, warm_up=10) < 20 * 2**20


def test_capturing_new_models_does_not_leak(load: Load) -> None:
    """A context takes more than 2 MiB, most of it for a batch of 256."""
    tokens = _tokens(200)

    def cycle(_: int) -> None:
        llm = load()
        with _mirror() as m, capture(llm, m, TAPS):
            llm.eval(tokens)

    assert growth(cycle, 50, warm_up=10) < 25 * 2**20
