"""From paths and flags to a loaded model: the budget is shown, and kept to, before anything is allocated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..budget_report import within_budget
from ..dflash import LLAMA_DEFAULTS, DFlashLlama, check_drafting
from ..errors import DraftMismatchError
from ..llama_log import explained
from ..model_info import ModelInfo
from ..plain_llama import PlainLlama
from ..whole_tokenizer import WholeTokenizer

#: Context unless told otherwise, where the model has more.
DEFAULT_N_CTX = 4096

#: llama.cpp rounds contexts up to this; ``Llama`` does not, and would fail where its own number ends.
_CELLS = 256

#: What only a DFlashLlama takes.
_DRAFTING = ("feature_dtype", "feature_rows", "draft_window", "draft_device", "draft_kv", "n_draft", "memory_margin")

_CHECKED = ("feature_dtype", "feature_rows", "draft_window", "draft_kv", "memory_margin")


def loading_options(
    model: Path, draft: Path | None, *, err: Console, n_ctx: int | None = None, **options: Any
) -> dict[str, Any]:
    """Arguments of ``DFlashLlama``, or of ``Llama`` without a draft; what was decided is said on ``err``.

    Args:
        n_ctx: None: the model's, at most 4096; 0: the model's.
        options: as for ``DFlashLlama``; without a draft, what only drafting takes is checked and left out.

    Raises:
        GgmlMirrorError: the target is none, or an option cannot be.
    """
    check_drafting(**{name: options[name] for name in _CHECKED if name in options})
    info = ModelInfo.read(model)
    if info.is_draft:
        raise DraftMismatchError(f"{model} is a DFlash draft: it drafts for a target (-m TARGET -md {model})")
    wanted = info.n_ctx_train if n_ctx == 0 else n_ctx or min(info.n_ctx_train, DEFAULT_N_CTX)
    options = {**LLAMA_DEFAULTS, **options, "n_ctx": -(-wanted // _CELLS) * _CELLS}
    if not info.has_chat_template:
        options["chat_format"] = "chatml"  # llama.cpp's choice, too
        _note(err, f"{info.name} has no chat template; chatml is used")
    if wanted > info.n_ctx_train:
        _note(
            err, f"the context of {wanted:,} tokens is larger than what the model was trained on, {info.n_ctx_train:,}"
        )
    if draft is not None:
        return {**options, "draft_path": os.fspath(draft)}
    _note(err, "no draft was given (-md): the target runs plainly")
    return {name: value for name, value in options.items() if name not in _DRAFTING}


def start(model: Path, *, err: Console, verbose: bool = False, **options: Any) -> DFlashLlama | PlainLlama:
    """Show the budget on ``err``, then load the target and, if there is one, its draft.

    Args:
        options: of :func:`loading_options`.

    Raises:
        BudgetError: they do not fit; nothing was allocated.
        GgmlMirrorError: they cannot be loaded.
    """
    path = os.fspath(model)
    options = within_budget(path, err, **options)
    kind = DFlashLlama if "draft_path" in options else PlainLlama
    with explained(path, options["n_ctx"], verbose=verbose):
        llm = kind(path, verbose=verbose, **options)
    llm.tokenizer_ = WholeTokenizer(llm)
    return llm


def _note(err: Console, text: str) -> None:
    err.print(f"[yellow]note:[/] {escape(text)}", soft_wrap=True)
