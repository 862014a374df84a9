"""A conversation in a file: messages, the target's state and the mirror's rows, so that it goes on as if it had never stopped.

Format version 1, a safetensors file (:mod:`ggml_mirror.tensor_file`):

===============================================  ====================  ============================================================
tensor                                           type, shape           content
===============================================  ====================  ============================================================
``messages``                                     U8 ``[n]``            JSON list of objects with ``role`` and ``content``
``tokens``                                       I32 ``[n_tokens]``    token ids that the target has evaluated
``state``                                        U8 ``[n]``            llama.cpp's state of the context
``positions``, ``tap_masks``, ``rows``           see ``snapshot``      only with a draft: the mirror's snapshot
===============================================  ====================  ============================================================

Metadata: ``format`` ("ggml-mirror.session"), ``format_version``, ``identity`` (JSON: what must be the same to go on), ``seed``,
``snapshot`` (JSON: the snapshot's header, only with a draft) and ``checksum``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import LlamaState
from safetensors import SafetensorError, safe_open

from .._native import ggml_versions
from ..dflash import DFlashLlama, DFlashState
from ..errors import SnapshotError, SnapshotMismatchError
from ..fingerprint import fingerprint
from ..snapshot import Snapshot, SnapshotHeader
from ..tensor_file import read_tensors, write_tensors
from .conversation import Chat

FORMAT, FORMAT_VERSION = "ggml-mirror.session", 1

_ROWS = ("positions", "tap_masks", "rows")
_TENSORS = ("messages", "tokens", "state", *_ROWS)

#: Context parameters that decide how a state is laid out, or what is in it.
_CONTEXT = (
    "n_rs_seq", "type_k", "type_v", "flash_attn_type", "swa_full", "rope_scaling_type", "rope_freq_base", "rope_freq_scale",
    "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx",
)  # fmt: skip


def save_session(chat: Chat, path: Path) -> None:
    """Write the conversation as it stands, in place of an older session of that name.

    Raises:
        SnapshotError: the file cannot be written, or one of that name is no session; it is left as it was.
    """
    _require_replaceable(path)
    llm = chat.llm
    state = llm.save_state()
    tensors: dict[str, Any] = {
        "messages": np.frombuffer(json.dumps(chat.messages).encode(), np.uint8),
        "tokens": llm.input_ids[: llm.n_tokens].astype(np.int32),
        "state": np.frombuffer(state.llama_state, np.uint8),
    }
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "identity": json.dumps(_identity(chat), sort_keys=True),
        "seed": str(chat.seed),
    }
    if isinstance(state, DFlashState):
        snapshot = state.mirror
        metadata["snapshot"] = json.dumps(snapshot.header.to_metadata())
        tensors |= {name: getattr(snapshot, name) for name in _ROWS}
    write_tensors(path, tensors, metadata)


def load_session(chat: Chat, path: Path) -> None:
    """Become the conversation that was saved.

    Raises:
        SnapshotError: missing, truncated, corrupt, foreign, or of another format version; nothing was changed.
        SnapshotMismatchError: of other models, or another dtype, window or context; names what differs; nothing was changed.
    """
    tensors, metadata = read_tensors(path, FORMAT, FORMAT_VERSION, _TENSORS)
    try:
        identity, seed = json.loads(metadata["identity"]), int(metadata["seed"])
        messages = json.loads(tensors["messages"].tobytes())
        tokens, target = tensors["tokens"], tensors["state"]
    except (KeyError, ValueError, TypeError) as error:
        raise SnapshotError(f"{path} lacks parts of a session: {error!r}") from None
    _require_same(_identity(chat), identity, path)
    _require_sound(messages, tokens, target, len(chat.llm.input_ids), path)
    state = _state(chat, tokens, target, tensors, metadata, path)
    try:
        chat.llm.load_state(state)
    except RuntimeError as error:  # llama.cpp's state is cleared then; the next answer evaluates the conversation anew
        raise SnapshotError(f"{path}: {error}") from error
    chat.messages, chat.seed = messages, seed


def _require_replaceable(path: Path) -> None:
    """A slip of the finger must not cost a model its file."""
    if not path.exists():
        return
    try:
        with safe_open(path, "numpy") as file:
            format = (file.metadata() or {}).get("format")
    except (OSError, SafetensorError):
        format = None
    if format != FORMAT:
        raise SnapshotError(f"{path} exists and is no session; choose another name")


def _identity(chat: Chat) -> dict[str, Any]:
    """What has to be the same for a saved state to mean the same."""
    llm = chat.llm
    facts: dict[str, Any] = {
        "llama-cpp-python": llama_cpp.__version__,
        "ggml": f"{ggml_versions().loaded} ({ggml_versions().loaded_commit})",
        "target": fingerprint(llm.model_path),
        "n_ctx": len(llm.input_ids),
        **{name: getattr(llm.context_params, name) for name in _CONTEXT},
        "draft": None,
    }
    if isinstance(llm, DFlashLlama):
        facts |= {
            "draft": llm.mirror.draft,
            "feature dtype": llm.mirror.dtype.value,
            "rows": llm.mirror.rows,
            "taps": list(llm.draft_spec.taps),
            "draft window": llm.draft_window,
        }
    return facts


def _require_same(ours: dict[str, Any], theirs: Any, path: Path) -> None:
    if not isinstance(theirs, dict):
        raise SnapshotError(f"{path} has a broken header: its identity is no object")
    wrong = [
        f"{name} {theirs.get(name)} (here {ours.get(name)})"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    if wrong:
        raise SnapshotMismatchError(f"{path} is a session of another set-up: {', '.join(wrong)}; nothing was changed")


def _require_sound(messages: Any, tokens: Any, target: Any, n_ctx: int, path: Path) -> None:
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and set(m) == {"role", "content"} and all(isinstance(v, str) for v in m.values())
        for m in messages
    )
    arrays = tokens.dtype == np.int32 and tokens.ndim == 1 and target.dtype == np.uint8 and target.ndim == 1
    if not (good and arrays and len(tokens) <= n_ctx):
        raise SnapshotError(f"{path} is broken: its parts are not what a session has")


def _state(
    chat: Chat, tokens: Any, target: Any, tensors: dict[str, Any], metadata: dict[str, str], path: Path
) -> LlamaState:
    llm = chat.llm
    input_ids = np.zeros_like(llm.input_ids)
    input_ids[: len(tokens)] = tokens
    kind = DFlashState if isinstance(llm, DFlashLlama) else LlamaState
    state = kind(
        input_ids=input_ids,
        scores=np.empty((0, llm.n_vocab()), np.single),
        n_tokens=len(tokens),
        llama_state=target.tobytes(),
        llama_state_size=len(target),
        seed=llm._seed,
    )
    if isinstance(state, DFlashState):
        try:
            header = SnapshotHeader.from_metadata(json.loads(metadata["snapshot"]), str(path))
            state.mirror = Snapshot(header, *(tensors[name] for name in _ROWS))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise SnapshotError(f"{path} lacks parts of a session: {error!r}") from None
        state.mirror._require_sound(str(path))
    return state
