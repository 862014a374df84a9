"""The draft as a llama.cpp ``dflash`` GGUF: without embedding and output matrix, which are the target's. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from .errors import InputError
from .work_files import write_whole

#: Types of the matrices, and llama.cpp's number for a file of them.
TYPES = {
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "f32": gguf.LlamaFileType.ALL_F32,
}

_MASK_TOKENS = ("<mask>", "<|mask|>", "<MASK>", "[MASK]", "<reponame>", "<unused0>", "<|reserved_special_token_0|>")


def find_mask_token(reader: gguf.GGUFReader) -> int:
    """A token that text never holds: the target's own mask token, or else one that it does not use.

    Raises:
        InputError: none is known.
    """
    own = reader.fields.get("tokenizer.ggml.mask_token_id")
    if own is not None:
        return int(own.contents())
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    for name in _MASK_TOKENS:
        if name in tokens:
            return int(tokens.index(name))
    padding = reader.fields.get("tokenizer.ggml.padding_token_id")
    eos = reader.fields.get("tokenizer.ggml.eos_token_id")
    if padding is not None and (eos is None or padding.contents() != eos.contents()):
        return int(padding.contents())
    raise InputError("the target's vocabulary has no token that is known to be unused: name one with --mask-token")


def write_draft(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, npt.NDArray[np.float32]],
    target: gguf.GGUFReader,
    *,
    matrix_type: str = "q8_0",
) -> None:
    """Write the file, whole or not at all.

    Args:
        config: fields of ``DraftConfig``.
        tensors: matrices ``[n_out, n_in]`` and norms, under their names in the GGUF.
        target: whose tokenizer it gets.

    Raises:
        InputError: an unknown type, a value that is not finite, or the file cannot be written.
    """
    if matrix_type not in TYPES:
        raise InputError(f"matrices as {matrix_type!r}; {', '.join(TYPES)} are possible")
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise InputError(f"{name} holds values that are not finite: the training has diverged")
    write_whole(path, lambda file: _write(file, config, tensors, target, matrix_type))


def _write(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, npt.NDArray[np.float32]],
    target: gguf.GGUFReader,
    matrix_type: str,
) -> None:
    def key(name: str) -> Any:
        field = target.fields.get(name)
        return None if field is None else field.contents()

    writer = gguf.GGUFWriter(path, "dflash")
    writer.add_type("model")
    writer.add_name(f"{key('general.name') or 'Target'} DFlash")
    if key("general.license"):
        writer.add_license(key("general.license"))
    arch = key("general.architecture")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(key(f"{arch}.context_length"))
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_ff"])
    writer.add_head_count(config["n_head"])
    writer.add_head_count_kv(config["n_head_kv"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_base"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_eps"])
    writer.add_vocab_size(len(target.fields["tokenizer.ggml.tokens"].data))
    if config["embedding_scale"] != 1.0:
        writer.add_embedding_scale(config["embedding_scale"])  # the target's graph scales its embeddings in code
    writer.add_file_type(TYPES[matrix_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_uint32("dflash.block_size", config["block_size"])
    writer.add_array("dflash.target_layers", [tap + 1 for tap in config["taps"]])  # inputs of the blocks behind
    for name, field in target.fields.items():
        if name.startswith("tokenizer.") and name != "tokenizer.ggml.mask_token_id":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_mask_token_id(config["mask_token"])
    matrices = gguf.GGMLQuantizationType[matrix_type.upper()]
    for name, values in tensors.items():
        values = np.ascontiguousarray(values, np.float32)
        kind = matrices if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
