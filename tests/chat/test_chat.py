"""A conversation: answers are those of the plain target, wherever it is stopped or interrupted, and its statistics add up."""

from __future__ import annotations

from typing import Any

import pytest
from dflash.pair import TARGETS
from llama_cpp import Llama
from llama_cpp._internals import LlamaContext

from ggml_mirror.chat.conversation import LENGTH, STOPPED, Chat, Sampling
from ggml_mirror.dflash import DFlashLlama
from ggml_mirror.errors import ArgumentError, BackendError

from .conftest import ChatPair, say

SAID = ["Once upon", "and then?", "why"]


@pytest.mark.parametrize(("name", "temp"), [("llama", 0.0), *((name, 0.9) for name in TARGETS)])
def test_drafted_and_plain_conversations_are_the_same(name: str, temp: float, pair: ChatPair) -> None:
    """Also where tokens are drawn: by the same seed."""
    drafted, plain = pair.chat(name, temp=temp), pair.plain_chat(name, temp=temp)
    for text in SAID:
        assert say(drafted, text) == say(plain, text)
    assert drafted.messages == plain.messages and len(plain.messages) == 6
    assert drafted.total.tokens == plain.total.tokens == 60 and drafted.total.answers == 3
    assert drafted.total.prompt_tokens == plain.total.prompt_tokens
    assert drafted.total.draft_steps > 0 and plain.total.draft_steps == 0


def test_answers_are_those_of_create_chat_completion(demo_target: Any, demo_draft: Any) -> None:
    """The demo pair and its template, three turns, greedily; and through the same conversation again, by the same seed."""
    options = {"n_ctx": 1024, "n_threads": 2, "n_threads_batch": 2, "verbose": False}
    chat = Chat(
        DFlashLlama(str(demo_target), draft_path=str(demo_draft), **options),
        system="You are brief.",
        sampling=Sampling(temp=0.0, n_predict=12),
    )
    plain = Llama(str(demo_target), flash_attn=True, **options)
    messages: list[Any] = [{"role": "system", "content": "You are brief."}]
    for text in ("What is a ring?", "Give an example.", "Thanks!"):
        messages.append({"role": "user", "content": text})
        whole = plain.create_chat_completion(messages, temperature=0.0, max_tokens=12)["choices"][0]["message"][
            "content"
        ]
        messages.append({"role": "assistant", "content": whole})
        assert say(chat, text) == whole
    assert chat.messages == messages
    assert chat.last is not None and chat.last.reused > 40
    assert 1.0 < chat.total.tau < 8.0 and 0 < chat.total.acceptance < 1
    assert chat.total.decode_tok_s > 0 and chat.total.prefill_tok_s > 0


def test_seeds(pair: ChatPair) -> None:
    texts = [[say(chat, t) for t in SAID] for chat in (pair.chat(temp=1.5, seed=s) for s in (7, 7, 8))]
    assert texts[0] == texts[1] != texts[2]
    assert pair.chat(seed=-1).seed != pair.chat(seed=-1).seed


#: One target for each way of rolling back.
MEANS = ("llama", "gemma3-windowed", "qwen35", "mamba")


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("pieces", [1, 6, 11])
def test_an_answer_that_is_closed_stands_as_far_as_it_was_said(pieces: int, name: str, pair: ChatPair) -> None:
    """What follows is what follows a conversation in which it was the answer."""
    chat = pair.chat(name, n=40)
    say(chat, SAID[0])
    answer = chat.answer(SAID[1])
    said = "".join(next(answer) for _ in range(pieces))
    answer.close()
    assert chat.finish == STOPPED and chat.messages[-1] == {"role": "assistant", "content": said}
    twin = pair.plain_chat(name, n=40)
    twin.messages = [dict(m) for m in chat.messages]
    assert say(chat, SAID[2]) == say(twin, SAID[2])


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize(("call", "when"), [(1, "before"), (1, "after"), (3, "after"), (6, "before")])
def test_an_interrupt_around_any_evaluation(
    call: int, when: str, name: str, pair: ChatPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is seen where llama.cpp returns to Python: before or after the n-th evaluation of an answer."""
    chat = pair.chat(name, n=30, n_batch=32, n_ubatch=16)
    say(chat, SAID[0])
    real, calls = LlamaContext.decode, iter(range(1, 1000))

    def decode(self: LlamaContext, batch: Any) -> None:
        number = next(calls)
        if number == call and when == "before":
            raise KeyboardInterrupt
        real(self, batch)
        if number == call:
            raise KeyboardInterrupt

    monkeypatch.setattr(LlamaContext, "decode", decode)
    with pytest.raises(KeyboardInterrupt):
        say(chat, "and then, what came after all of that? " * 2)
    monkeypatch.undo()
    assert chat.finish == STOPPED and chat.messages[-1]["role"] == "assistant"
    twin = pair.plain_chat(name, n=30)
    twin.messages = [dict(m) for m in chat.messages]
    assert say(chat, SAID[2]) == say(twin, SAID[2])


def test_a_failed_evaluation_is_a_typed_error(pair: ChatPair, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = pair.chat()
    say(chat, SAID[0])
    before = list(chat.messages)

    def decode(self: LlamaContext, batch: Any) -> None:
        raise RuntimeError("llama_decode returned -3")

    monkeypatch.setattr(LlamaContext, "decode", decode)
    with pytest.raises(BackendError, match="llama_decode returned -3"):
        say(chat, SAID[1])
    monkeypatch.undo()
    assert chat.messages == before and chat.last is None
    twin = pair.plain_chat()
    twin.messages = list(before)
    assert say(chat, SAID[1]) == say(twin, SAID[1])


@pytest.mark.parametrize("kind", ["chat", "plain_chat"])
def test_a_conversation_that_outgrows_its_context(kind: str, pair: ChatPair) -> None:
    chat: Chat = getattr(pair, kind)(n_ctx=256)
    chat.sampling = Sampling(temp=0.0)  # as much as the context holds
    say(chat, "go on")
    assert chat.finish == LENGTH and chat.last is not None and chat.llm.n_tokens >= 255
    before = list(chat.messages)
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"no longer fits into the context.*/reset"):
            say(chat, "and on")
        assert chat.messages == before
    chat.reset()
    assert chat.messages == []
    chat.sampling = Sampling(temp=0.0, n_predict=10)
    twin = pair.plain_chat(n=10, n_ctx=256)
    assert say(chat, "go on") == say(twin, "go on")


def test_reset_keeps_the_system_prompt(pair: ChatPair) -> None:
    llm = pair.chat().llm
    chat = Chat(llm, system="S", sampling=Sampling(temp=0.0, n_predict=5))
    first = say(chat, "a")
    say(chat, "b")
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "S"}]
    assert say(chat, "a") == first


def test_a_template_that_refuses(pair: ChatPair, tmp_path: Any) -> None:
    from gguf_edit import edit_gguf

    template = "{{ raise_exception('roles must alternate') }}"
    path = edit_gguf(pair.target("llama"), tmp_path / "t.gguf", keys={"tokenizer.chat_template": template})  # type: ignore[arg-type]
    chat = Chat(DFlashLlama(str(path), draft_path=pair.draft(), n_ctx=256, verbose=False))
    with pytest.raises(ArgumentError, match=r"template refuses this conversation: .*roles must alternate"):
        say(chat, "hello")
    assert chat.messages == []


def test_plain_statistics_count_what_was_evaluated(pair: ChatPair) -> None:
    chat = pair.plain_chat(n=10)
    say(chat, SAID[0])
    assert chat.last is not None and (chat.last.tokens, chat.last.reused) == (10, 0)
    assert chat.llm.n_tokens == chat.last.prompt_tokens + 9  # the last token was not evaluated
    say(chat, SAID[1])
    assert 0 < chat.last.reused < chat.last.prompt_tokens
    assert chat.last.draft_steps == chat.last.proposed == 0 and chat.last.tau == 0.0
