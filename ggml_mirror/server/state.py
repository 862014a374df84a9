"""What a server is at the moment: which model is loaded, what it drafts with, and whether requests are answered."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import llama_cpp

from ..cache.prefix_cache import PrefixCache
from ..draft import DraftSpec
from ..fingerprint import fingerprint
from ..model_info import ModelInfo
from .cache import make_cache
from .facts import ModelFacts
from .model import Served, ServedDFlashLlama
from .turns import Turns

if TYPE_CHECKING:
    from .settings import ServeConfig


@dataclass(frozen=True)
class ModelCard:
    """What ``GET /props`` says of a model.

    Attributes:
        mirror: None if nothing is drafted.
    """

    target: dict[str, Any]
    draft: dict[str, Any] | None
    mirror: dict[str, Any] | None
    reason: str
    llama: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        drafting = {"on": self.mirror is not None, "reason": self.reason}
        return {**self.llama, "drafting": drafting, "target": self.target, "draft": self.draft, "mirror": self.mirror}

    @classmethod
    def of(cls, llm: Served) -> ModelCard:
        settings = llm.settings
        path = str(llm.model_path)
        template = llm.metadata.get("tokenizer.chat_template", "")
        llama = {
            "model_alias": settings.model_alias,
            "model_path": path,
            "total_slots": 1,
            "default_generation_settings": {"n_ctx": llm.n_ctx(), "params": {"n_predict": settings.n_predict}},
            "chat_template": template,
            "chat_format": settings.chat_format or llm.chat_format,
            "bos_token": _token(llm, llm.token_bos()),
            "eos_token": _token(llm, llm.token_eos()),
            "modalities": {"vision": settings.clip_model_path is not None, "audio": False},
            "n_vocab": llm.n_vocab(),
            "build_info": f"llama-cpp-python {llama_cpp.__version__}",
        }
        target = {"name": ModelInfo.read(path).name, "path": path, "fingerprint": fingerprint(path)}
        if not isinstance(llm, ServedDFlashLlama):
            return cls(target, None, None, "no draft was given (-md)", llama)
        spec: DraftSpec = llm.draft_spec
        mirror = llm.mirror
        draft = {
            "name": spec.name,
            "path": str(spec.path),
            "fingerprint": fingerprint(spec.path),
            "arch": spec.arch,
            "block_size": spec.block_size,
            "n_draft": llm.n_draft,
            "taps": list(spec.taps),
        }
        held = {
            "dtype": str(mirror.dtype),
            "cap": mirror.cap,
            "window": llm.draft_window,
            "rows": mirror.rows,
            "row_bytes": mirror.row_nbytes,
            "bytes": mirror.nbytes,
            "device": mirror.device.name,
        }
        return cls(target, draft, held, f"{spec.name} drafts up to {llm.n_draft} tokens per step", llama)


def _token(llm: Served, token: int) -> str:
    return llm._model.token_get_text(token) if token >= 0 else ""


class ServerState:
    """Written by the thread that loads, read by everyone.

    Attributes:
        not_ready: why requests are not answered; None: they are.
        facts: of each model that has been loaded, by alias.
        card: of the model that is loaded.
        cache: its prefix cache.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.turns = Turns(config.max_queue, interrupt=config.server.interrupt_requests)
        self.not_ready: str | None = "loading the model"
        self.draining = False
        self.facts: dict[str, ModelFacts] = {}
        self.card: ModelCard | None = None
        self.cache: PrefixCache | None = None
        self._lock = threading.Lock()

    def loaded(self, llm: Served) -> None:
        """A model was loaded: run a draft step, give it its cache, and say so."""
        alias, before = str(llm.settings.model_alias), self.not_ready
        self.not_ready = f"warming up {alias}"
        try:
            llm.warm_up()
            self.close()
            cache = make_cache(self.config, llm)
            if cache is not None:
                llm.set_cache(cache)
            facts, card = ModelFacts.of(llm), ModelCard.of(llm)
        except BaseException:
            self.not_ready = before
            raise
        with self._lock:
            self.facts[alias], self.card, self.cache = facts, card, cache
            drafts = isinstance(llm, ServedDFlashLlama)
            no_step = drafts and not llm.stats.draft_steps
            self.not_ready = "no draft step has run: the context leaves no room for one" if no_step else None

    def close(self) -> None:
        """Write what the cache has not written yet."""
        if self.cache is not None:
            self.cache.close()
