"""The header of a GGUF file: metadata and tensor table, without its tensor data.

``gguf.GGUFReader`` trusts the file (a corrupt array length makes it loop without end), so this walks the header itself:
each length is checked against the file's size before it is used, and large arrays are counted, not loaded.
Type numbers and block sizes come from the ``gguf`` package. Format: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ModelFileError

_KEEP = 4096  # elements; longer arrays (vocabularies, merges) are represented by their length alone
_MAX_STRINGS = 1 << 24  # elements of a string array, each of which has to be stepped over
_MAX_DIMS = 4  # GGML_MAX_DIMS

# GGUFValueType -> struct code
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table."""

    name: str
    shape: tuple[int, ...]  # ggml order: the contiguous dimension first
    type: int  # enum ggml_type
    offset: int  # bytes from the start of the file
    n_bytes: int | None  # None: a type that the installed gguf package does not know


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says about itself.

    Attributes:
        metadata: key -> int, float, bool, str, or a list of these (arrays of up to 4096 elements).
        array_lengths: key -> element count, for every array.
    """

    path: Path
    n_bytes: int
    metadata: dict[str, Any] = field(default_factory=dict)
    array_lengths: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, GgufTensor] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> GgufFile:
        """Read the header of ``path``; the tensor data is checked to be there, and not touched.

        Raises:
            ModelFileError: missing, unreadable, not GGUF, corrupt, or shorter than its tensors need.
        """
        path = Path(path)
        try:
            if path.is_dir():
                raise ModelFileError(f"{path}: is a directory, not a GGUF file")
            if not path.exists():
                raise ModelFileError(f"{path}: no such file")
            if not path.is_file():
                raise ModelFileError(f"{path}: not a regular file")
            with path.open("rb") as file:
                magic = file.read(4)
                if magic != b"GGUF":
                    raise ModelFileError(f"{path}: not a GGUF file ({_guess(magic)})")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return _Parser(path, data).parse()
        except OSError as error:
            raise ModelFileError(f"{path}: {error.strerror or error}") from error


def _guess(magic: bytes) -> str:
    if not magic:
        return "it is empty"
    if magic[:2] == b"PK":
        return "a zip archive or PyTorch checkpoint"
    if magic[:4] in (b"lmgg", b"tjgg", b"fmgg"):
        return "an old ggml format; convert it again with a current llama.cpp"
    if magic[:4] == b"vers":
        return "a Git LFS pointer: the model itself was not downloaded"
    if magic[:1] == b"<":
        return "an HTML or XML page: the download failed"
    return f"it starts with {magic!r}"


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 4  # behind the magic

    def parse(self) -> GgufFile:
        (version,) = self.unpack("I")
        if version not in (2, 3):
            if version and version & 0xFFFF == 0:
                raise self.error(
                    "a GGUF file of the other byte order; convert it with gguf-py's gguf_convert_endian.py"
                )
            raise self.error(f"GGUF version {version}; versions 2 and 3 can be read")
        n_tensors, n_pairs = self.unpack("QQ")
        out = GgufFile(self.path, self.size)
        for _ in range(n_pairs):
            self.pair(out)
        alignment = out.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self.error(f"corrupt: general.alignment is {alignment!r}, not a power of two")
        table = [self.tensor_info() for _ in range(n_tensors)]
        data_start = -(-self.at // alignment) * alignment
        for name, shape, type_, offset in table:
            if name in out.tensors:
                raise self.error(f"corrupt: two tensors are named {name!r}")
            tensor = GgufTensor(name, shape, type_, data_start + offset, _tensor_bytes(shape, type_))
            end = tensor.offset + (tensor.n_bytes or 0)
            if end > self.size:
                raise self.error(
                    f"truncated: tensor {name!r} ends at byte {end}, the file has {self.size}; download it again"
                )
            out.tensors[name] = tensor
        return out

    def pair(self, out: GgufFile) -> None:
        key = self.string()
        if key in out.metadata or key in out.array_lengths:
            raise self.error(f"corrupt: key {key!r} occurs twice")
        (kind,) = self.unpack("I")
        if kind != _ARRAY:
            out.metadata[key] = self.value(kind, key)
            return
        (kind,) = self.unpack("I")
        (count,) = self.unpack("Q")
        out.array_lengths[key] = count
        if kind in _SCALARS:
            code = _SCALARS[kind]
            self.need(count * struct.calcsize("<" + code))
            if count <= _KEEP:
                out.metadata[key] = list(self.unpack(f"{count}{code}"))
            else:
                self.at += count * struct.calcsize("<" + code)
        elif kind == _STRING:
            self.need(count * 8)
            if count > _MAX_STRINGS:
                raise self.error(f"corrupt: {key!r} claims {count} strings")
            if count <= _KEEP:
                out.metadata[key] = [self.string() for _ in range(count)]
            else:
                for _ in range(count):
                    (length,) = self.unpack("Q")
                    self.need(length)
                    self.at += length
        else:
            raise self.error(f"corrupt: {key!r} is an array of value type {kind}")

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string()
        if kind not in _SCALARS:
            raise self.error(f"corrupt: {key!r} has value type {kind}")
        return self.unpack(_SCALARS[kind])[0]

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        (n_dims,) = self.unpack("I")
        if n_dims > _MAX_DIMS:
            raise self.error(f"corrupt: tensor {name!r} has {n_dims} dimensions")
        shape = self.unpack(f"{n_dims}Q")
        type_, offset = self.unpack("IQ")
        return name, tuple(shape), type_, offset

    def string(self) -> str:
        (length,) = self.unpack("Q")
        self.need(length)
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", errors="replace")

    def unpack(self, code: str) -> tuple[Any, ...]:
        size = struct.calcsize("<" + code)
        self.need(size)
        out = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return out

    def need(self, size: int) -> None:
        if size > self.size - self.at:
            raise self.error(
                f"truncated or corrupt: its header asks for {size} bytes at byte {self.at}, the file has {self.size}"
            )

    def error(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {what}")


def _tensor_bytes(shape: tuple[int, ...], type_: int) -> int | None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(type_)]
    except (KeyError, ValueError):
        return None
    n = 1
    for dim in shape:
        n *= dim
    return n // block * size
