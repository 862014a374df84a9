"""What a GGUF file says about a target or a draft, and which layers are tapped by default."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ArgumentError, ModelFileError, UnsupportedDraftError
from .gguf_file import GgufFile

DEFAULT_N_TAPS = 5

# Tensors that only drafts of other designs have; their graphs differ from DFlash's. The first names the design.
_OTHER_DRAFTS = {
    "DFlash2": ("selector_hidden.weight", "selector_prev.weight", "selector_next.weight"),
    "DSpark": ("markov_w1.weight", "markov_w2.weight"),
}

_FUSION_WEIGHTS = ("fc.weight", "dflash.fc.weight", "dflash_fc.weight")


@dataclass(frozen=True)
class DraftInfo:
    """What a DFlash draft says about the rows it reads.

    Attributes:
        taps: 0-based target blocks whose *outputs* it reads; None if the file does not name them.
        n_taps: how many.
        row_width: width of a row, ``n_taps * n_embd`` of the target.
        block_size: tokens in a block, the last committed one included.
        mask_token_id: token that stands for "to be predicted"; None if the file does not say.
    """

    taps: tuple[int, ...] | None
    n_taps: int
    row_width: int
    block_size: int | None
    mask_token_id: int | None


@dataclass(frozen=True)
class ModelInfo:
    """Facts from a GGUF file's metadata; the model is not loaded.

    Attributes:
        n_layer: blocks that a forward pass runs (``block_count`` less the blocks for multi-token prediction).
        n_embd: width of the hidden state, and so of one tap.
        n_ctx_train: the full context, in tokens.
        n_bytes: size on disk, all parts of a split model included.
        draft: None for a target.
    """

    path: Path
    arch: str
    name: str
    n_layer: int
    n_embd: int
    n_ctx_train: int
    n_vocab: int | None
    n_bytes: int
    has_chat_template: bool
    draft: DraftInfo | None = None

    @property
    def is_draft(self) -> bool:
        return self.draft is not None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ModelInfo:
        """Read the metadata of a target or draft.

        Raises:
            ModelFileError: missing, truncated or foreign file, or a key that is needed is absent.
            UnsupportedDraftError: a draft of another design (DFlash2, DSpark); names the tensors that show it.
        """
        file = GgufFile.read(path)
        arch = _typed(file, "general.architecture", str)
        n_bytes = _all_parts_bytes(file)
        for design, names in _OTHER_DRAFTS.items():
            if names[0] in file.tensors:
                found = ", ".join(name for name in names if name in file.tensors)
                raise UnsupportedDraftError(
                    f"{file.path}: a {design} draft (it has {found}); only DFlash drafts are supported"
                )
        n_block = _count(file, f"{arch}.block_count")
        n_predict = file.metadata.get(f"{arch}.nextn_predict_layers", 0)
        n_layer = n_block - (n_predict if isinstance(n_predict, int) else 0)
        if n_layer < 1:
            raise ModelFileError(
                f"{file.path}: {n_block} blocks, {n_predict} of them for multi-token prediction: none is left"
            )
        n_embd = _count(file, f"{arch}.embedding_length")
        n_vocab = file.metadata.get(f"{arch}.vocab_size", file.array_lengths.get("tokenizer.ggml.tokens"))
        name = file.metadata.get("general.name")
        return cls(
            path=file.path,
            arch=arch,
            name=name if isinstance(name, str) and name else file.path.stem,
            n_layer=n_layer,
            n_embd=n_embd,
            n_ctx_train=_count(file, f"{arch}.context_length"),
            n_vocab=n_vocab if isinstance(n_vocab, int) else None,
            n_bytes=n_bytes,
            has_chat_template=isinstance(file.metadata.get("tokenizer.chat_template"), str),
            draft=_read_draft(file, arch, n_embd),
        )


def default_taps(n_layer: int, n_taps: int = DEFAULT_N_TAPS) -> tuple[int, ...]:
    """The layers that DFlash taps in a target of ``n_layer`` blocks: evenly from the 2nd to the 3rd-last.

    ``round(1 + k * (n_layer - 4) / (n_taps - 1))`` for k = 0..n_taps-1, halves to even; one tap: the middle.
    (z-lab/dflash, ``build_target_layer_ids``.) Where a model has too few blocks for that, the taps spread over
    all blocks but the last, fewer of them if need be. The last block is never tapped: llama.cpp computes only those of
    its rows that need logits.

    >>> default_taps(30)
    (1, 8, 14, 20, 27)

    Raises:
        ArgumentError: ``n_taps`` < 1, or a model of fewer than two blocks.
    """
    if n_taps < 1:
        raise ArgumentError(f"n_taps = {n_taps}; at least 1 is needed")
    if n_layer < 2:
        raise ArgumentError(
            f"a model of {n_layer} block(s) has none to tap: the last block's rows are not all computed"
        )
    if n_taps == 1:
        return (min(n_layer // 2, n_layer - 2),)
    taps = [round(1 + k * (n_layer - 4) / (n_taps - 1)) for k in range(n_taps)]
    if n_layer >= 4 and len(set(taps)) == n_taps:
        return tuple(taps)
    n_taps = min(n_taps, n_layer - 1)
    if n_taps == 1:
        return (0,)
    return tuple(round(k * (n_layer - 2) / (n_taps - 1)) for k in range(n_taps))


def _read_draft(file: GgufFile, arch: str, n_embd: int) -> DraftInfo | None:
    # Two families of drafts; keys and conventions differ (llama.cpp numbers layer *inputs*, so block index + 1).
    meta = file.metadata
    if arch == "dflash":
        prefix, key, shift = "dflash.", "dflash.target_layers", 1
        mask = meta.get("tokenizer.ggml.mask_token_id")
    elif arch.endswith("dflash-draft"):
        prefix, key, shift = f"{arch}.dflash.", f"{arch}.dflash.target_layer_ids", 0
        mask = meta.get(f"{prefix}mask_token_id")
    else:
        return None

    taps: tuple[int, ...] | None = None
    if key in meta or key in file.array_lengths:
        layers = meta.get(key)
        if not isinstance(layers, list) or not layers or not all(type(x) is int and x >= shift for x in layers):
            raise ModelFileError(f"{file.path}: {key} is {layers!r}; a list of layers from {shift} was expected")
        taps = tuple(x - shift for x in layers)

    # The weight is the truth about the row width; metadata only where it is absent.
    row_width = next((file.tensors[w].shape[0] for w in _FUSION_WEIGHTS if w in file.tensors), 0)
    n_taps = len(taps) if taps else row_width // n_embd or meta.get(f"{prefix}n_target_layers", 0)
    if not isinstance(n_taps, int) or n_taps < 1:
        raise ModelFileError(
            f"{file.path}: neither {key} nor a fusion weight ({', '.join(_FUSION_WEIGHTS)}) says what it reads"
        )
    row_width = row_width or n_taps * n_embd
    if row_width % n_taps:
        raise ModelFileError(f"{file.path}: rows of {row_width} values do not divide into {n_taps} taps")
    return DraftInfo(
        taps=taps,
        n_taps=n_taps,
        row_width=row_width,
        block_size=_optional_int(meta.get(f"{prefix}block_size")),
        mask_token_id=_optional_int(mask),
    )


def _optional_int(value: Any) -> int | None:
    return value if type(value) is int else None


def _typed(file: GgufFile, key: str, kind: type) -> Any:
    value = file.metadata.get(key)
    if type(value) is not kind:
        what = "lacks" if value is None else f"has {value!r} for"
        raise ModelFileError(f"{file.path}: {what} {key}; not a language model that llama.cpp can run")
    return value


def _count(file: GgufFile, key: str) -> int:
    value: int = _typed(file, key, int)
    if value < 1:
        raise ModelFileError(f"{file.path}: {key} is {value}")
    return value


def _all_parts_bytes(file: GgufFile) -> int:
    # Split models: name-00001-of-00003.gguf; llama.cpp opens the others by these names.
    n_parts = file.metadata.get("split.count", 1)
    if not isinstance(n_parts, int) or n_parts <= 1:
        return file.n_bytes
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", file.path.name)
    if not match:
        raise ModelFileError(f"{file.path}: part of a split model; its name must end in -00001-of-{n_parts:05}.gguf")
    first = f"{match[1]}-00001-of-{n_parts:05}.gguf"
    if file.metadata.get("split.no", 0) != 0:
        raise ModelFileError(f"{file.path}: not the first part of a split model; give {first}")
    total = file.n_bytes
    for number in range(2, n_parts + 1):
        total += GgufFile.read(file.path.with_name(f"{match[1]}-{number:05}-of-{n_parts:05}.gguf")).n_bytes
    return total
