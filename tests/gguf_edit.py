"""A copy of a GGUF file with some keys and tensors left out, changed or added."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt


def edit_gguf(
    source: Path,
    path: Path,
    *,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, npt.NDArray[Any]] | None = None,
    without: Iterable[str] = (),
) -> Path:
    """Write ``source`` to ``path`` with other values of ``keys``, other ``tensors`` (numpy shapes), and ``without`` some of either."""
    reader = gguf.GGUFReader(source)
    keys, tensors, without = dict(keys or {}), dict(tensors or {}), set(without)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in keys or name in without:
            continue
        kind, sub = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), kind, sub_type=sub)
    for name, value in keys.items():
        unsigned = type(value) is int and value >= 0  # what llama.cpp expects
        writer.add_key_value(name, value, gguf.GGUFValueType.UINT32 if unsigned else gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        if tensor.name not in tensors and tensor.name not in without:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
