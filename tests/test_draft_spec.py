"""Draft files: the conventions of each family, drafts that do not fit their target, and files that are broken or change."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_edit import edit_gguf
from tiny_models import DRAFT_FORMATS, LUCEBOX_FORMATS, MASK, N_VOCAB, write_tiny_draft, write_tiny_model

from ggml_mirror import find_device
from ggml_mirror._native import check, ffi, lib
from ggml_mirror.draft import DraftSpec, draft_bytes, draft_params
from ggml_mirror.errors import (
    ArgumentError,
    DraftMismatchError,
    GgmlMirrorError,
    MirrorMemoryError,
    ModelFileError,
    ShapeError,
    UnsupportedDraftError,
)
from ggml_mirror.gguf_file import GgufFile
from ggml_mirror.model_info import ModelInfo, default_taps

N_EMBD = 64


@pytest.fixture(scope="module")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("target") / "target.gguf", n_layer=8, n_embd=N_EMBD)


@pytest.fixture(scope="module")
def target(target_path: Path) -> ModelInfo:
    return ModelInfo.read(target_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_draft(tmp_path_factory.mktemp("draft") / "sound.gguf")


# ------------------------------------------------------------------------------------------------ conventions


@pytest.mark.parametrize("fmt", DRAFT_FORMATS)
def test_every_family_gives_the_same_spec(fmt: str, target: ModelInfo, tmp_path: Path) -> None:
    path = write_tiny_draft(tmp_path / "d.gguf", fmt, taps=(0, 3, 6), block_size=5, n_layer=3, head_dim=16)
    spec = DraftSpec.read(path, target)
    assert (spec.arch, spec.taps, spec.n_embd_target, spec.block_size, spec.mask_token) == (fmt, (0, 3, 6), 64, 5, MASK)
    assert (spec.n_layer, spec.n_embd, spec.n_head, spec.n_head_kv, spec.head_dim, spec.n_rot) == (3, 64, 4, 2, 16, 16)
    assert (spec.causal, spec.n_swa, spec.swa_layers, spec.gelu, spec.rope_scale) == (False, 0, (), False, 1.0)


@pytest.mark.parametrize("fmt", LUCEBOX_FORMATS)
def test_taps_that_are_only_counted_are_the_default_ones(fmt: str, target: ModelInfo, tmp_path: Path) -> None:
    path = write_tiny_draft(tmp_path / "d.gguf", fmt, name_taps=False)
    assert DraftSpec.read(path, target).taps == default_taps(8, 5)


@pytest.mark.parametrize("fmt", DRAFT_FORMATS)
def test_windows(fmt: str, target: ModelInfo, tmp_path: Path) -> None:
    path = write_tiny_draft(tmp_path / "d.gguf", fmt, n_layer=3, sliding_window=7, sliding_window_pattern=[1, 0, 1])
    spec = DraftSpec.read(path, target)
    assert (spec.n_swa, spec.swa_layers) == (7, (0, 2))
    without = edit_gguf(path, tmp_path / "e.gguf", without=[f"{fmt}.attention.sliding_window_pattern"])
    assert DraftSpec.read(without, target).swa_layers == (0, 1, 2)
    longer = edit_gguf(path, tmp_path / "f.gguf", keys={f"{fmt}.attention.sliding_window_pattern": [True] * 70})
    assert DraftSpec.read(longer, target).swa_layers == (0, 1, 2)
    off = edit_gguf(path, tmp_path / "g.gguf", keys={f"{fmt}.attention.sliding_window": 0})
    assert (DraftSpec.read(off, target).n_swa, DraftSpec.read(off, target).swa_layers) == (0, ())


@pytest.mark.parametrize("causal", [True, False, None])
def test_causal(causal: bool | None, target: ModelInfo, tmp_path: Path) -> None:
    assert DraftSpec.read(write_tiny_draft(tmp_path / "d.gguf", causal=causal), target).causal is bool(causal)


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({}, 1.0),
        ({"scaling.factor": 4.0}, 0.25),
        ({"scaling.factor": 4.0, "scaling.type": "linear"}, 0.25),
        ({"scaling.factor": 4.0, "scaling.type": "none"}, 1.0),
    ],
)
def test_rope_scaling(keys: dict[str, Any], scale: float, sound: Path, target: ModelInfo, tmp_path: Path) -> None:
    path = edit_gguf(sound, tmp_path / "d.gguf", keys={f"dflash.rope.{k}": v for k, v in keys.items()})
    assert DraftSpec.read(path, target).rope_scale == scale


# ---------------------------------------------------------------------------------------- drafts that do not fit


@pytest.mark.parametrize("fmt", DRAFT_FORMATS)
@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ({"n_embd": 96}, ["96", "64"]),
        ({"taps": (1, 2, 8)}, ["8", "7"]),
        ({"block_size": 0}, ["0", "2", "64"]),
        ({"block_size": 1}, ["1", "2", "64"]),
        ({"block_size": 65}, ["65", "2", "64"]),
        ({"taps": (1, 1, 2)}, ["1"]),
    ],
)
def test_a_draft_for_another_target_names_both_numbers(
    fmt: str, kind: dict[str, Any], numbers: list[str], target: ModelInfo, tmp_path: Path
) -> None:
    path = write_tiny_draft(tmp_path / "draft.gguf", fmt, **kind)
    with pytest.raises(DraftMismatchError, match=r"does not fit target\.gguf") as error:
        DraftSpec.read(path, target)
    words = str(error.value).partition("target.gguf")[2]
    assert all(number in words for number in numbers), words


@pytest.mark.parametrize("fmt", DRAFT_FORMATS)
def test_another_vocabulary_or_mask(fmt: str, target: ModelInfo, tmp_path: Path) -> None:
    path = write_tiny_draft(tmp_path / "draft.gguf", fmt)
    mask = "tokenizer.ggml.mask_token_id" if fmt == "dflash" else f"{fmt}.dflash.mask_token_id"
    for keys, without, says in (
        ({f"{fmt}.vocab_size": 999}, [], f"999 tokens, the target's {N_VOCAB}"),
        ({mask: N_VOCAB}, [], f"mask token {N_VOCAB} is outside the target's {N_VOCAB}"),
        ({mask: 2**32 - 1}, [], str(2**32 - 1)),
        ({}, [mask], "no mask token"),
    ):
        changed = edit_gguf(path, tmp_path / "changed.gguf", keys=keys, without=without)
        with pytest.raises(DraftMismatchError, match=says):
            DraftSpec.read(changed, target)
    changed = edit_gguf(path, tmp_path / "changed.gguf", without=[f"{fmt}{'.dflash' * (fmt != 'dflash')}.block_size"])
    with pytest.raises(DraftMismatchError, match="block size is not given"):
        DraftSpec.read(changed, target)


def test_a_narrow_draft_needs_an_embedding_of_its_own(target: ModelInfo, tmp_path: Path) -> None:
    path = write_tiny_draft(tmp_path / "d.gguf", taps=(1, 2, 3), n_embd=32)
    fc = np.zeros((32, 3 * N_EMBD), np.float32)
    narrow = edit_gguf(path, tmp_path / "narrow.gguf", tensors={"fc.weight": fc})
    with pytest.raises(DraftMismatchError, match=r"32 wide and has no embedding of its own, the target's is 64"):
        DraftSpec.read(narrow, target)
    own = {"fc.weight": fc, "token_embd.weight": np.zeros((N_VOCAB, 32), np.float32)}
    spec = DraftSpec.read(edit_gguf(path, tmp_path / "own.gguf", tensors=own), target)
    assert (spec.n_embd, spec.n_embd_target) == (32, 64)


def test_a_target_too_shallow_for_the_taps_that_are_counted(tmp_path: Path) -> None:
    path = write_tiny_draft(tmp_path / "d.gguf", "dflash-draft", name_taps=False)
    for n_layer, found in ((1, 1), (3, 2), (5, 4)):
        shallow = ModelInfo.read(write_tiny_model(tmp_path / "t.gguf", n_layer=n_layer))
        with pytest.raises(DraftMismatchError, match=rf"5 taps .* {n_layer} blocks has {found}"):
            DraftSpec.read(path, shallow)


def test_roles_that_are_exchanged(sound: Path, target: ModelInfo, target_path: Path) -> None:
    with pytest.raises(UnsupportedDraftError, match="llama model, not a DFlash draft"):
        DraftSpec.read(target_path, target)
    with pytest.raises(DraftMismatchError, match="itself a draft"):
        DraftSpec.read(sound, ModelInfo.read(sound))


# --------------------------------------------------------------------------------------------- other designs


@pytest.mark.parametrize("fmt", DRAFT_FORMATS)
@pytest.mark.parametrize(
    ("design", "names"),
    [
        ("DFlash2", ["selector_hidden.weight", "selector_prev.weight", "selector_next.weight"]),
        ("DFlash2", ["selector_hidden.weight"]),
        ("DSpark", ["markov_w1.weight", "markov_w2.weight"]),
        ("DSpark", ["markov_w1.weight"]),
    ],
)
def test_drafts_of_other_designs_are_refused_by_their_tensors(
    fmt: str, design: str, names: list[str], target: ModelInfo, tmp_path: Path
) -> None:
    path = write_tiny_draft(tmp_path / "d.gguf", fmt)
    path = edit_gguf(path, tmp_path / "other.gguf", tensors=dict.fromkeys(names, np.zeros((2, 2), np.float32)))
    for read in (lambda: DraftSpec.read(path, target), lambda: ModelInfo.read(path)):
        with pytest.raises(UnsupportedDraftError, match=f"{design} draft") as error:
            read()
        assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"dflash.rope.scaling.type": "yarn"}, "yarn"),
        ({"dflash.hidden_activation": "relu"}, "relu"),
        ({"dflash.attention.head_count": [4, 4]}, r"head_count is \[4, 4\]"),
        ({"dflash.attention.sliding_window": 9, "dflash.attention.sliding_window_pattern": 6}, "pattern is 6"),
        ({"dflash.attention.key_length": 2**32 - 1}, "4294967295"),
        ({"dflash.attention.layer_norm_rms_epsilon": "small"}, "small"),
    ],
)
def test_features_that_the_graph_lacks_are_named(
    keys: dict[str, Any], says: str, sound: Path, target: ModelInfo, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedDraftError, match=says):
        DraftSpec.read(edit_gguf(sound, tmp_path / "d.gguf", keys=keys), target)


# ---------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("key", ["attention.head_count", "attention.layer_norm_rms_epsilon", "block_count"])
def test_a_key_that_is_absent_is_named(key: str, sound: Path, target: ModelInfo, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=rf"lacks dflash\.{key}"):
        DraftSpec.read(edit_gguf(sound, tmp_path / "d.gguf", without=[f"dflash.{key}"]), target)


def test_a_draft_cut_anywhere_is_a_model_file_error(sound: Path, target: ModelInfo, tmp_path: Path) -> None:
    whole, cut = sound.read_bytes(), tmp_path / "cut.gguf"
    lengths = {0, 1, 4, 8, 16, 24, len(whole) - 1, *np.linspace(25, len(whole) - 2, 60).astype(int).tolist()}
    for length in sorted(lengths):
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match=r"cut\.gguf"):
            DraftSpec.read(cut, target)
        with pytest.raises(ArgumentError, match=r"cut\.gguf"):  # the header was of another file when it was read
            new_draft(dataclasses.replace(DraftSpec.read(sound, target), path=cut))


def test_directories_and_files_that_are_not_there(target: ModelInfo, tmp_path: Path) -> None:
    for path, says in (
        (tmp_path, "directory"),
        (tmp_path / "none.gguf", "no such file"),
        (Path("/dev/null"), "regular"),
    ):
        with pytest.raises(ModelFileError, match=says):
            DraftSpec.read(path, target)


# ------------------------------------------------- the native layer, where the file is not what its header said


def new_draft(spec: DraftSpec, window: int = 64, n_vocab: int = N_VOCAB, **params: Any) -> None:
    """Make a native draft with its own (small) target tensors absent, as far as it goes."""
    p = draft_params(spec, n_vocab=n_vocab, device_index=find_device("cpu").index, window=window, n_threads=1)
    for name, value in params.items():
        setattr(p.struct, name, value)
    out = ffi.new("gm_draft **")
    try:
        check(lib.gm_draft_new(p.struct, out))
    finally:
        if out[0] != ffi.NULL:
            lib.gm_draft_free(out[0])


@pytest.fixture(scope="module")
def own(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft that needs no tensors of its target."""
    embedding = np.zeros((N_VOCAB, N_EMBD), np.float32)
    return edit_gguf(sound, tmp_path_factory.mktemp("own") / "own.gguf", tensors={"token_embd.weight": embedding})


def test_a_draft_with_its_own_matrices_needs_no_target(own: Path, target: ModelInfo) -> None:
    new_draft(DraftSpec.read(own, target))


def test_without_a_targets_tensors_a_draft_says_what_it_lacks(sound: Path, target: ModelInfo) -> None:
    with pytest.raises(ArgumentError, match="no token embedding of its own"):
        new_draft(DraftSpec.read(sound, target))


@pytest.mark.parametrize(
    "params",
    [
        {"n_layer": 0},
        {"n_layer": 3},
        {"n_layer": 65},
        {"n_layer": -1},
        {"n_embd": 0},
        {"n_embd": 128},
        {"n_embd": 2**31 - 1},
        {"n_head": 0},
        {"n_head": 3},
        {"n_head": 8},
        {"n_head_kv": 0},
        {"n_head_kv": 4},
        {"head_dim": 0},
        {"head_dim": 32},
        {"n_rot": 0},
        {"n_rot": 7},
        {"n_rot": 18},
        {"n_taps": 0},
        {"n_taps": 4},
        {"n_taps": 65},
        {"n_embd_target": 32},
        {"block_size": 1},
        {"block_size": 65},
        {"mask_token": -1},
        {"mask_token": N_VOCAB},
        {"rms_eps": -1.0},
        {"rms_eps": float("nan")},
        {"rope_base": 0.0},
        {"rope_base": float("nan")},
        {"rope_scale": float("inf")},
        {"n_swa": -1},
        {"window": 0},
        {"window": -1},
        {"window": 2**62},
        {"path": ffi.NULL},
    ],
    ids=str,
)
def test_wrong_parameters_are_refused(params: dict[str, Any], own: Path, target: ModelInfo) -> None:
    with pytest.raises(ArgumentError):
        new_draft(DraftSpec.read(own, target), **params)


@pytest.mark.parametrize("n_vocab", [N_VOCAB - 1, N_VOCAB + 1, 1 << 20])
def test_another_vocabulary_than_the_output_matrixs(n_vocab: int, own: Path, target: ModelInfo) -> None:
    with pytest.raises(ShapeError, match=rf"{N_VOCAB}.*vocabulary of {n_vocab}"):
        new_draft(DraftSpec.read(own, target), n_vocab=n_vocab)


def test_a_window_that_does_not_fit_names_the_bytes(own: Path, target: ModelInfo) -> None:
    with pytest.raises(MirrorMemoryError, match="window 1073741824") as error:
        new_draft(DraftSpec.read(own, target), window=2**30)
    assert error.value.bytes_needed > 2**36 > error.value.bytes_free > 0 or error.value.bytes_free > 2**36


def _names(path: Path) -> list[str]:
    return [name for name in GgufFile.read(path).tensors if name != "token_embd.weight"]


def test_every_tensor_is_needed_but_values(own: Path, target: ModelInfo, tmp_path: Path) -> None:
    for name in _names(own):
        path = edit_gguf(own, tmp_path / "d.gguf", without=[name])
        spec = dataclasses.replace(DraftSpec.read(own, target), path=path)
        if "attn_v" in name:
            new_draft(spec)
            continue
        with pytest.raises(ArgumentError, match=rf"d\.gguf: tensor {name} is missing"):
            new_draft(spec)


def test_every_tensors_shape_and_type_is_checked(own: Path, target: ModelInfo, tmp_path: Path) -> None:
    reader = {t.name: t for t in gguf.GGUFReader(own).tensors}
    for name in _names(own):
        shape = tuple(int(n) for n in reversed(reader[name].shape))  # numpy's
        wrong = [
            np.ones((*shape[:-1], shape[-1] + 32)),
            np.ones((2, *shape)),
            np.ones(shape[-1:] if len(shape) > 1 else (5,)),
        ]
        if "ffn_gate" not in name and len(shape) > 1:
            wrong.append(np.ones((shape[0] + 1, shape[1])))
        for values in wrong:
            path = edit_gguf(own, tmp_path / "d.gguf", tensors={name: values.astype(np.float32)})
            with pytest.raises(ArgumentError, match=rf"tensor ({name}|blk\.\d\.ffn_\w+\.weight) is \["):
                new_draft(dataclasses.replace(DraftSpec.read(own, target), path=path))
        other: list[Any] = [np.int32] if len(shape) > 1 else [np.float16, np.int32]
        for kind in other:
            path = edit_gguf(own, tmp_path / "d.gguf", tensors={name: np.ones(shape, kind)})
            with pytest.raises(ArgumentError, match=rf"tensor {name} is (i32|f16); .* expected"):
                new_draft(dataclasses.replace(DraftSpec.read(own, target), path=path))


def test_reduced_vocabularies_that_point_elsewhere(own: Path, target: ModelInfo, tmp_path: Path) -> None:
    output = np.zeros((4, N_EMBD), np.float32)
    cases: list[tuple[Any, str]] = [
        (np.array([0, 1, 2, N_VOCAB], np.int64), f"token {N_VOCAB}, the target has {N_VOCAB}"),
        (np.array([0, 1, 2, -1], np.int64), "token -1"),
        (np.array([0, 1, 2], np.int64), "does not map"),
        (np.array([0, 1, 2, 3], np.int32), "does not map"),
    ]
    for d2t, says in cases:
        path = edit_gguf(own, tmp_path / "d.gguf", tensors={"output.weight": output, "d2t": d2t})
        with pytest.raises(ArgumentError, match=says):
            new_draft(dataclasses.replace(DraftSpec.read(own, target), path=path))


def test_bytes_need_a_readable_file_too(own: Path, target: ModelInfo, tmp_path: Path) -> None:
    spec = DraftSpec.read(own, target)
    device = find_device("cpu").index
    said = draft_bytes(spec, n_vocab=N_VOCAB, device_index=device, window=64)
    tensors = GgufFile.read(own).tensors.values()
    assert 0 <= said.weights - sum(t.n_bytes or 0 for t in tensors) < 64 * len(tensors)  # alignment of each
    for path in (tmp_path, tmp_path / "none.gguf", Path("/dev/null")):
        with pytest.raises(ArgumentError, match="not a readable GGUF file"):
            draft_bytes(dataclasses.replace(spec, path=path), n_vocab=N_VOCAB, device_index=device, window=64)


def _flip(data: bytearray, rng: np.random.Generator, header: int) -> None:
    for _ in range(int(rng.integers(1, 4))):
        data[int(rng.integers(0, header))] = int(rng.integers(0, 256))


def _grow(data: bytearray, rng: np.random.Generator, header: int) -> None:
    at = int(rng.integers(8, header - 8))
    data[at : at + 8] = struct.pack("<Q", int(rng.choice([2**63, 2**32, 2**31, 2**40])))


@pytest.mark.parametrize("damage", [_flip, _grow])
def test_damaged_headers_never_do_more_than_raise(
    damage: Callable[[bytearray, np.random.Generator, int], None], own: Path, target: ModelInfo, tmp_path: Path
) -> None:
    whole, path = own.read_bytes(), tmp_path / "d.gguf"
    header = min(t.offset for t in GgufFile.read(own).tensors.values())
    sound_spec = dataclasses.replace(DraftSpec.read(own, target), path=path)
    rng = np.random.default_rng(11)
    for _ in range(150):
        data = bytearray(whole)
        damage(data, rng, header)
        path.write_bytes(data)
        for make in (lambda: new_draft(DraftSpec.read(path, target)), lambda: new_draft(sound_spec)):
            try:
                make()
            except GgmlMirrorError:
                pass
