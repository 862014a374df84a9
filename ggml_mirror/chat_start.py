"""From paths and flags to a loaded model: the budget is shown, and kept to, before anything is allocated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from .budget import make_budget
from .budget_report import print_budget
from .dflash import LLAMA_DEFAULTS, DFlashLlama
from .errors import DraftMismatchError, UnsupportedError
from .llama_log import explained
from .model_info import ModelInfo
from .plain_llama import PlainLlama
from .row_kind import RAW

#: Context unless told otherwise, where the model has more.
DEFAULT_N_CTX = 4096

#: llama.cpp rounds contexts up to this; ``Llama`` does not, and would fail where its own number ends.
_CELLS = 256


def start(
    model: Path,
    draft: Path | None,
    *,
    err: Console,
    feature_dtype: str | None = None,
    draft_window: int | None = None,
    draft_device: str = "auto",
    n_draft: int | None = None,
    memory_margin: str | None = None,
    feature_rows: str = RAW,
    draft_kv: str = "f16",
    verbose: bool = False,
    n_ctx: int | None = None,
    **llama_kwargs: Any,
) -> DFlashLlama | PlainLlama:
    """Show the budget on ``err``, then load the target and, if there is one, its draft.

    Args:
        n_ctx: None: the model's, at most 4096; 0: the model's.
        llama_kwargs: as for ``llama_cpp.Llama``.

    Raises:
        BudgetError: they do not fit; nothing was allocated.
        GgmlMirrorError: they cannot be loaded.
    """
    info = ModelInfo.read(model)
    if info.is_draft:
        raise DraftMismatchError(f"{model} is a DFlash draft: it drafts for a target (-m TARGET -md {model})")
    wanted = info.n_ctx_train if n_ctx == 0 else n_ctx or min(info.n_ctx_train, DEFAULT_N_CTX)
    llama_kwargs["n_ctx"] = -(-wanted // _CELLS) * _CELLS
    if not info.has_chat_template:
        llama_kwargs["chat_format"] = "chatml"  # llama.cpp's choice, too
        err.print(f"[yellow]note:[/] {escape(info.name)} has no chat template; chatml is used", soft_wrap=True)
    if wanted > info.n_ctx_train:
        err.print(
            f"[yellow]note:[/] the context of {wanted:,} tokens is larger than what the model was trained on, "
            f"{info.n_ctx_train:,}",
            soft_wrap=True,
        )
    drafting: dict[str, Any] = {}
    if draft is None:
        err.print("[yellow]note:[/] no draft was given (-md): the target runs plainly")
    else:
        drafting = {
            "draft_path": os.fspath(draft),
            "feature_dtype": feature_dtype,
            "draft_window": draft_window,
            "draft_device": draft_device,
            "n_draft": n_draft,
            "memory_margin": memory_margin,
            "feature_rows": feature_rows,
            "draft_kv": draft_kv,
        }
    llama_kwargs = {**LLAMA_DEFAULTS, **llama_kwargs}
    path = os.fspath(model)
    try:
        budget = make_budget(path, **drafting, **llama_kwargs)
    except UnsupportedError as error:
        err.print(f"[yellow]note:[/] no budget: {escape(str(error))}", soft_wrap=True)
    else:
        print_budget(budget, err)
        budget.require_fit()
        if draft is not None:
            drafting["feature_dtype"] = budget.dtype
    with explained(path, llama_kwargs["n_ctx"], verbose=verbose):
        if draft is None:
            return PlainLlama(path, verbose=verbose, **llama_kwargs)
        return DFlashLlama(path, verbose=verbose, **drafting, **llama_kwargs)
