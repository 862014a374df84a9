"""The models that are served: DFlashLlama, or a plain Llama, with what answering requests needs.

llama_cpp.server calls ``create_completion`` of whatever it has loaded, by whichever route; so the checks, the limits and the accounts of
a request hang there and on ``generate`` and ``eval`` beneath it.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Generator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_tokenizer import LlamaTokenizer

from ..dflash import DFlashLlama
from ..draft_stats import DraftStats
from .errors import RequestError
from .request import current
from .sampling import GuardedSampler, require_grammar, with_bias

if TYPE_CHECKING:
    from .settings import ServedModelSettings

_WARM_UP_TOKENS = 3  # the first is the prompt's, the second needs a draft step


class Served(Llama):
    """A Llama that answers requests. Bind ``settings`` in a subclass (:func:`served_class`) before making one."""

    settings: ServedModelSettings
    stats: DraftStats
    _pieces: dict[tuple[int, bool], bytes]

    def create_completion(self, prompt: str | list[int], **options: Any) -> Any:  # type: ignore[override]
        """As ``Llama.create_completion``, within the limits of the server and for the request that runs."""
        request = current.get()
        limit, wanted = self.settings.n_predict, options.get("max_tokens", 16)
        if limit is not None and limit >= 0 and (wanted is None or wanted > limit):
            options["max_tokens"] = limit
        if options.get("logit_bias"):
            processors = with_bias(options.get("logits_processor"), options.pop("logit_bias"))
            options["logits_processor"] = processors
        if request is not None:
            request.prompt_made = True
            request.check()
            if request.prompt_tokens is not None:
                prompt = request.prompt_tokens
            if options.get("seed") is None:
                options["seed"] = request.seed
        if options.get("seed") is None:
            options["seed"] = self.settings.request_seed()
        made: Any = super().create_completion(prompt, **options)
        if options.get("stream"):
            return made if request is None else request.keep(made)
        if not options.get("echo"):
            _cut_at_first_stop(made["choices"][0], options.get("stop"))
        return made

    def generate(self, tokens: Sequence[int], *args: Any, **options: Any) -> Generator[int, Sequence[int] | None, None]:
        """As the base class, until nobody waits any more."""
        tokens = list(tokens)
        if not tokens:
            raise RequestError("prompt: it is empty, and this model has no token to begin with", param="prompt")
        request = current.get()
        self._begin(len(tokens))
        chosen = super().generate(tokens, *args, **options)
        sent: Sequence[int] | None = None
        at_eos = False
        try:
            while True:
                try:
                    token = self._next(chosen, sent)
                except StopIteration:
                    return
                at_eos = bool(llama_cpp.llama_vocab_is_eog(self._model.vocab, token))
                if request is not None:
                    request.check()
                    request.token()
                    if request.interrupted:
                        return
                sent = yield token
        finally:
            chosen.close()
            if request is not None:
                request.generations.append(self.stats)
                request.ended_at_eos += at_eos

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """As the base class; a long text was tokenized before llama_cpp.server asks for it in the event loop."""
        request = current.get()
        if (
            request is not None
            and request.tokenized is not None
            and request.tokenized[0] == text
            and add_bos
            and special
        ):
            return request.tokenized[1]
        tokens: list[int] = super().tokenize(text, add_bos, special)
        return tokens

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """As the base class, which reads 32 bytes of a token and drops those that have more: deep indentation, long rules."""
        if type(self.tokenizer_) is not LlamaTokenizer:
            text: bytes = super().detokenize(tokens, prev_tokens, special)
            return text
        joined = b"".join([self._piece(token, special) for token in tokens])
        return joined[1:] if tokens and tokens[0] == self.token_bos() and joined[:1] == b" " else joined

    def _piece(self, token: int, special: bool) -> bytes:
        known = self._pieces.get((token, special))
        if known is None:
            size = 32
            while True:
                buffer = ctypes.create_string_buffer(size)
                n = llama_cpp.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, special)
                if n >= 0:
                    break
                size = -n
            known = self._pieces[token, special] = buffer.raw[:n]
        return known

    def eval(self, tokens: Sequence[int]) -> None:
        """As the base class; between batches a cancelled request ends."""
        request = current.get()
        for start in range(0, len(tokens), self.n_batch):
            if request is not None:
                request.check()
            super().eval(tokens[start : start + self.n_batch])

    def close(self) -> None:
        if hasattr(self, "_stack"):  # not if it was refused before llama_cpp.Llama had begun
            super().close()

    def warm_up(self) -> None:
        """Run everything once, so that the first request does not pay for it, and forget it."""
        if self.settings.no_text is not None:
            return
        first = self.token_bos()
        generator = self.generate([max(first, 0)], temp=0.0)
        try:
            list(islice(generator, _WARM_UP_TOKENS))
        finally:
            generator.close()
        self.reset()

    def _begin(self, n_prompt: int) -> None:
        self.stats = DraftStats(prompt_tokens=n_prompt)

    def _next(self, chosen: Generator[int, Any, None], sent: Sequence[int] | None) -> int:
        return chosen.send(sent)

    def _init_sampler(self, *args: Any, **options: Any) -> Any:
        grammar = options.get("grammar")
        if grammar is None:
            return super()._init_sampler(*args, **options)
        request = current.get()
        require_grammar(
            self._model.vocab, grammar._grammar, grammar._root, "grammar" if request is None else request.grammar_param
        )
        return GuardedSampler(super()._init_sampler(*args, **options), self._n_vocab)


class ServedLlama(Served):
    """A target that is served plainly. Counts and seconds are those of :class:`DraftStats`; nothing is drafted."""

    def __init__(self, model_path: str, **options: Any) -> None:
        super().__init__(model_path, **options)
        _settle_in(self)

    def eval(self, tokens: Sequence[int]) -> None:
        super().eval(tokens)
        if hasattr(self, "stats") and not self.stats.tokens:
            self._evaluated += len(tokens)

    def _begin(self, n_prompt: int) -> None:
        super()._begin(n_prompt)
        self._evaluated = 0

    def _next(self, chosen: Generator[int, Any, None], sent: Sequence[int] | None) -> int:
        started = time.perf_counter()
        token = chosen.send(sent)
        elapsed = time.perf_counter() - started
        stats = self.stats
        if stats.tokens == 0:
            stats.prefill_s = elapsed
            stats.prefix_reused = max(stats.prompt_tokens - self._evaluated, 0)
        else:
            stats.decode_s += elapsed
            stats.plain_steps += 1
        stats.tokens += 1
        return token


class ServedDFlashLlama(Served, DFlashLlama):
    """A target that is drafted for."""

    def __init__(self, model_path: str, **options: Any) -> None:
        settings = self.settings
        assert settings.model_draft is not None
        DFlashLlama.__init__(
            self,
            model_path,
            draft_path=settings.model_draft,
            feature_dtype=settings.feature_dtype,
            draft_window=settings.draft_window,
            draft_device=settings.draft_device,
            n_draft=settings.n_draft,
            **options,
        )
        _settle_in(self)


def served_class(settings: ServedModelSettings) -> type[Served]:
    """The class that llama_cpp.server is to make the model of these settings with."""
    base = ServedDFlashLlama if settings.model_draft else ServedLlama
    return type(base.__name__, (base,), {"settings": settings})


def _settle_in(llm: Served) -> None:
    llm._pieces = {}
    n_ctx = llm.n_ctx()
    if (
        len(llm.input_ids) < n_ctx
    ):  # llama.cpp rounds the context up, llama_cpp.Llama checks prompts against that, but has no room for them
        llm.input_ids = np.zeros(n_ctx, np.intc)
        if llm._logits_all:
            llm.scores = np.zeros((n_ctx, llm._n_vocab), np.single)
    _check_chat_format(llm)


def _check_chat_format(llm: Served) -> None:
    """Chat formats turn messages into prompts with code of many hands: what that cannot do with them is the request's fault."""
    name: Any = llm.chat_format
    handler = (
        llm.chat_handler
        or llm._chat_handlers.get(name)
        or llama_cpp.llama_chat_format.get_chat_completion_handler(name)
    )

    def checked(**arguments: Any) -> Any:
        request = current.get()
        try:
            return handler(**arguments)
        except RequestError:
            raise
        except Exception as error:
            if request is None or request.prompt_made:
                raise
            raise RequestError(
                f"messages: the model's chat format ({llm.chat_format or 'its own'}) cannot make a prompt of them: {error}",
                param="messages",
                code="chat_format",
            ) from error

    llm.chat_handler = checked


def _cut_at_first_stop(choice: dict[str, Any], stop: str | list[str] | None) -> None:
    """llama-cpp-python cuts at the first stop of the list; where a token completes two, another may stand before it."""
    stops = [stop] if isinstance(stop, str) else stop or []
    found = [choice["text"].find(one) for one in stops]
    choice["text"] = choice["text"][: min((at for at in found if at >= 0), default=None)]
