"""Tiny pairs that chat: every target of ``dflash.pair``, and the program itself."""

from __future__ import annotations

from typing import Any

import pytest
from dflash.conftest import name
from dflash.pair import _EXACT, TARGETS, Pair

from ggml_mirror.chat.conversation import Chat, Sampling
from ggml_mirror.plain_llama import PlainLlama

__all__ = ["name", "pair"]


class ChatPair(Pair):
    """Chats over the tiny targets. Their text has no end of its own: ``n`` ends an answer."""

    def chat(self, name: str = "llama", *, temp: float = 0.0, n: int = 20, seed: int = 1, **options: Any) -> Chat:
        options = {"chat_format": "chatml", "draft": self.draft(seed=2), "n_ctx": 1024, **options}
        return Chat(self.dflash(name, **options), sampling=Sampling(temp=temp, n_predict=n), seed=seed)

    def plain_chat(self, name: str = "llama", *, temp: float = 0.0, n: int = 20, seed: int = 1, **options: Any) -> Chat:
        arch, own, _ = TARGETS[name]
        options = {"chat_format": "chatml", **_EXACT, **own, "n_ctx": 1024, **options}
        if "swa_full" in options:
            options["swa_full"] = True
        return Chat(PlainLlama(self.target(arch), **options), sampling=Sampling(temp=temp, n_predict=n), seed=seed)


def say(chat: Chat, text: str) -> str:
    return "".join(chat.answer(text))


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> ChatPair:
    return ChatPair(tmp_path_factory.mktemp("chat"))
