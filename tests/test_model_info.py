"""GGUF headers against the gguf package's own reader and writer, broken files, and the DFlash tap formula."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_models import DRAFT_FORMATS, MASK, TARGET_ARCHS, write_tiny_draft, write_tiny_model

from ggml_mirror.errors import ArgumentError, ModelFileError, UnsupportedDraftError
from ggml_mirror.gguf_file import GgufFile
from ggml_mirror.model_info import ModelInfo, default_taps


def _write(path: Path, arch: str = "llama", fill: Callable[[gguf.GGUFWriter], Any] | None = None, **keys: int) -> Path:
    """A GGUF of one tensor: a target's metadata, or ``keys`` instead of parts of it."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {"block_count": 12, "embedding_length": 64, "context_length": 2048, **keys}.items():
        writer.add_uint32(f"{arch}.{key}", value)
    if fill:
        fill(writer)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ------------------------------------------------------------------------------------------------ real headers


def test_the_demo_target_reads_as_the_gguf_package_reads_it(demo_target: Path) -> None:
    theirs = gguf.GGUFReader(demo_target)
    ours = GgufFile.read(demo_target)
    for key, field in theirs.fields.items():
        if key.startswith("GGUF."):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            assert ours.array_lengths[key] == len(field.data), key
        if key in ours.metadata:
            assert ours.metadata[key] == field.contents(), key
        else:
            assert ours.array_lengths[key] > 4096, key
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        mine = ours.tensors[t.name]
        assert (list(mine.shape), mine.type, mine.offset, mine.n_bytes) == (
            t.shape.tolist(),
            t.tensor_type,
            t.data_offset,
            t.n_bytes,
        )


def test_the_demo_target_is_described(demo_target: Path) -> None:
    info = ModelInfo.read(demo_target)
    assert (info.arch, info.n_layer, info.n_embd, info.n_ctx_train, info.n_vocab) == ("llama", 30, 576, 8192, 49152)
    assert info.n_bytes == demo_target.stat().st_size
    assert info.has_chat_template and not info.is_draft and info.draft is None


@pytest.mark.parametrize("arch", TARGET_ARCHS)
def test_targets_of_every_architecture_are_described(arch: str, tmp_path: Path) -> None:
    info = ModelInfo.read(write_tiny_model(tmp_path / "t.gguf", arch, n_layer=6, n_embd=96, n_ctx=384))
    assert (info.arch, info.n_layer, info.n_embd, info.n_ctx_train, info.draft) == (arch, 6, 96, 384, None)


@pytest.mark.parametrize("fmt", DRAFT_FORMATS)
def test_taps_of_every_draft_format_are_blocks_whose_output_is_read(fmt: str, tmp_path: Path) -> None:
    path = write_tiny_draft(tmp_path / "d.gguf", fmt, taps=(0, 3, 6), n_embd=64, block_size=4)
    draft = ModelInfo.read(path).draft
    assert draft is not None
    assert (draft.taps, draft.n_taps, draft.row_width) == ((0, 3, 6), 3, 192)
    assert (draft.block_size, draft.mask_token_id) == (4, MASK)


def test_a_draft_that_only_counts_its_taps_says_so(tmp_path: Path) -> None:
    path = _write(tmp_path / "d.gguf", "dflash-draft", **{"dflash.n_target_layers": 4})
    draft = ModelInfo.read(path).draft
    assert draft is not None
    assert (draft.taps, draft.n_taps, draft.row_width, draft.block_size, draft.mask_token_id) == (
        None,
        4,
        256,
        None,
        None,
    )


def test_the_fusion_weight_outranks_a_wrong_tap_count(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_uint32("qwen35-dflash-draft.dflash.n_target_layers", 40)
        writer.add_tensor("dflash.fc.weight", np.zeros((64, 320), np.float32))

    draft = ModelInfo.read(_write(tmp_path / "d.gguf", "qwen35-dflash-draft", fill)).draft
    assert draft is not None
    assert (draft.n_taps, draft.row_width) == (5, 320)


def test_blocks_for_multi_token_prediction_are_not_layers(tmp_path: Path) -> None:
    assert ModelInfo.read(_write(tmp_path / "m.gguf", nextn_predict_layers=2)).n_layer == 10


def test_a_split_model_counts_all_parts_and_wants_its_first(tmp_path: Path) -> None:
    def part(number: int) -> Path:
        def fill(writer: gguf.GGUFWriter) -> None:
            writer.add_uint16("split.count", 2)
            writer.add_uint16("split.no", number)

        return _write(tmp_path / f"m-{number + 1:05}-of-00002.gguf", fill=fill)

    first, second = part(0), part(1)
    assert ModelInfo.read(first).n_bytes == first.stat().st_size + second.stat().st_size
    with pytest.raises(ModelFileError, match=r"not the first part.*m-00001-of-00002\.gguf"):
        ModelInfo.read(second)
    second.unlink()
    with pytest.raises(ModelFileError, match=r"m-00002-of-00002\.gguf: no such file"):
        ModelInfo.read(first)


# ------------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"GGU", "not a GGUF"),
        (b"PK\x03\x04", "zip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"GGUF", "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "byte order"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "truncated or corrupt"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**64 - 1) + b"key", "truncated or corrupt"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), r"lacks general\.architecture"),
    ],
)
def test_foreign_and_broken_headers_are_model_file_errors(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=says) as error:
        ModelInfo.read(path)
    assert str(path) in str(error.value)


def test_what_is_no_file_is_a_model_file_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        ModelInfo.read(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError, match="directory"):
        ModelInfo.read(tmp_path)


@pytest.mark.parametrize("count", [2**62, 10**12, 5000])
@pytest.mark.parametrize("kind", [gguf.GGUFValueType.UINT8, gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY])
def test_an_array_longer_than_the_file_is_refused_at_once(count: int, kind: int, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", gguf.GGUFValueType.ARRAY, kind, count))
    began = time.monotonic()
    with pytest.raises(ModelFileError, match="corrupt"):
        GgufFile.read(path)
    assert time.monotonic() - began < 1


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_tiny_model(tmp_path / "whole.gguf", n_layer=2, n_embd=32).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 200, 7), *range(200, len(whole), 4999), len(whole) - 64, len(whole) - 33]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelFileError):
            ModelInfo.read(cut)


def test_a_tensor_beyond_the_end_is_named_with_the_bytes(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.gguf")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(ModelFileError, match=rf"'output_norm\.weight' ends at byte {size}, the file has {size - 1}"):
        ModelInfo.read(path)


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    whole = write_tiny_draft(tmp_path / "whole.gguf", "dflash").read_bytes()
    header = min(t.offset for t in GgufFile.read(tmp_path / "whole.gguf").tensors.values())
    rng, path, refused = random.Random(1), tmp_path / "x.gguf", 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(header)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        path.write_bytes(data)
        try:
            ModelInfo.read(path)
        except ModelFileError:
            refused += 1
    assert 50 < refused < 400  # some damage hits names and values that nothing depends on


def test_the_reader_does_not_load_the_tensors(tmp_path: Path) -> None:
    # A sparse file of 1 TiB: reading it whole would fail or take minutes.
    path, n_values = tmp_path / "huge.gguf", 2**38
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"block_count": 4, "embedding_length": 64, "context_length": 128}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_tensor_info("big", [n_values], np.dtype(np.float32), n_values * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        try:
            file.truncate(-(-path.stat().st_size // 32) * 32 + n_values * 4)
        except OSError:
            pytest.skip("this file system has no sparse files of 1 TiB")
    began = time.monotonic()
    assert ModelInfo.read(path).n_bytes > 2**40
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("missing", ["block_count", "embedding_length", "context_length"])
def test_a_missing_key_is_named(missing: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key in {"block_count", "embedding_length", "context_length"} - {missing}:
        writer.add_uint32(f"llama.{key}", 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match=rf"llama\.{missing}"):
        ModelInfo.read(path)


@pytest.mark.parametrize(("tensor", "design"), [("selector_hidden.weight", "DFlash2"), ("markov_w1.weight", "DSpark")])
def test_drafts_of_other_designs_are_refused_by_name(tensor: str, design: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "d.gguf", "dflash", lambda w: w.add_tensor(tensor, np.zeros((2, 2), np.float32)))
    with pytest.raises(UnsupportedDraftError, match=rf"{design}.*{tensor}"):
        ModelInfo.read(path)


@pytest.mark.parametrize("layers", [[0, 3], [-1, 3], ["1", "2"], [1.5]])
def test_impossible_taps_of_a_draft_are_refused(layers: list[Any], tmp_path: Path) -> None:
    # llama.cpp's numbers are block index + 1: 0 would be the output of a block before the first.
    path = _write(tmp_path / "d.gguf", "dflash", lambda w: w.add_array("dflash.target_layers", layers))
    with pytest.raises(ModelFileError, match=r"dflash\.target_layers"):
        ModelInfo.read(path)


def test_rows_that_do_not_divide_into_taps_are_refused(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_array("dflash.target_layers", [2, 4, 6])
        writer.add_tensor("fc.weight", np.zeros((64, 320), np.float32))

    with pytest.raises(ModelFileError, match="320 values do not divide into 3 taps"):
        ModelInfo.read(_write(tmp_path / "d.gguf", "dflash", fill))


# --------------------------------------------------------------------------------------------------------- taps


@pytest.mark.parametrize(
    ("n_layer", "taps"),
    [
        (64, (1, 16, 31, 46, 61)),  # in the metadata of published drafts for 64-block targets
        (30, (1, 8, 14, 20, 27)),  # those of the demo draft; 7.5 and 20.5 are rounded to even
        (36, (1, 9, 17, 25, 33)),
        (48, (1, 12, 23, 34, 45)),
    ],
)
def test_default_taps_follow_the_dflash_formula(n_layer: int, taps: tuple[int, ...]) -> None:
    assert default_taps(n_layer) == taps


def test_default_taps_are_distinct_ascending_and_never_the_last_block() -> None:
    for n_layer in range(2, 130):
        for n_taps in range(1, 12):
            taps = default_taps(n_layer, n_taps)
            assert list(taps) == sorted(set(taps))
            assert len(taps) == min(n_taps, n_layer - 1)
            assert taps[0] >= 0 and taps[-1] <= n_layer - 2


def test_default_taps_of_small_models_spread_over_what_there_is() -> None:
    assert default_taps(2) == (0,)
    assert default_taps(4) == (0, 1, 2)
    assert default_taps(7) == (0, 1, 2, 4, 5)
    assert default_taps(8) == (1, 2, 3, 4, 5)
    assert default_taps(30, 1) == (15,)


@pytest.mark.parametrize(("n_layer", "n_taps"), [(1, 5), (0, 5), (30, 0)])
def test_no_taps_are_possible(n_layer: int, n_taps: int) -> None:
    with pytest.raises(ArgumentError):
        default_taps(n_layer, n_taps)
