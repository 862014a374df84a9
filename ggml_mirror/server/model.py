"""The models that are served: DFlashLlama, or a plain Llama, with what answering requests needs.

llama_cpp.server calls ``create_completion`` of whatever it has loaded, by whichever route; so the checks, the limits and the accounts of
a request hang there and on ``generate`` and ``eval`` beneath it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING, Any

import llama_cpp
from llama_cpp import Llama
from llama_cpp.llama_tokenizer import LlamaTokenizer

from ..dflash import DFlashLlama
from ..draft_stats import DraftStats
from ..plain_llama import PlainLlama
from ..whole_tokenizer import WholeTokenizer
from .errors import RequestError
from .gbnf import read_grammar
from .memory import require_room
from .request import current
from .sampling import GuardedSampler, require_grammar, with_bias

if TYPE_CHECKING:
    from .settings import ServedModelSettings

_LONG = 64  # tokens whose text is not put together anew each time
_WARM_UP_TOKENS = 3  # the first is the prompt's, the second needs a draft step


class Served(Llama):
    """A Llama that answers requests. Bind ``settings`` and ``cache_ram`` in a subclass (:func:`served_class`) before making one."""

    settings: ServedModelSettings
    cache_ram: int
    stats: DraftStats
    _whole: WholeTokenizer
    _max_tokens: int | None = None  # of the completion that is made
    _unsaid: Sequence[int] = ()  # its tokens, if it was ended here and not by llama-cpp-python

    def __init__(self, model_path: str, **options: Any) -> None:
        self._stack = ExitStack()  # Llama closes it, also if what comes before its own __init__ raises
        super().__init__(model_path, **self._arguments(model_path, options))
        self._whole = WholeTokenizer(self)
        _check_chat_format(self)

    def _arguments(self, model_path: str, options: dict[str, Any]) -> dict[str, Any]:
        """What the model is made with, if there is room for it."""
        raise NotImplementedError

    def create_completion(self, prompt: str | list[int], **options: Any) -> Any:  # type: ignore[override]
        """As ``Llama.create_completion``, within the limits of the server and for the request that runs."""
        request = current.get()
        limit, wanted = self.settings.n_predict, options.get("max_tokens", 16)
        if limit is not None and limit > 0 and (wanted is None or wanted > limit):
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
        self._max_tokens, self._unsaid = options.get("max_tokens", 16), []
        made: Any = super().create_completion(prompt, **options)
        if options.get("stream"):
            return made if request is None else request.keep(made)
        choice = made["choices"][0]
        if self._unsaid:
            choice["text"] += self.detokenize(self._unsaid).decode("utf-8", errors="ignore")
        if not options.get("echo"):
            _cut_at_first_stop(choice, options.get("stop"))
        return made

    def generate(self, tokens: Sequence[int], *args: Any, **options: Any) -> Generator[int, Sequence[int] | None, None]:
        """As the base class, until nobody waits any more."""
        tokens = list(tokens)
        if not tokens:
            raise RequestError("prompt: it is empty, and this model has no token to begin with", param="prompt")
        request = current.get()
        self.stats = DraftStats()  # if what follows fails before it has its own
        limit = min(self._max_tokens or self._n_ctx, self._n_ctx - len(tokens))
        said: list[int] = []
        chosen = super().generate(tokens, *args, **options)
        sent: Sequence[int] | None = None
        at_end = False
        try:
            while True:
                if len(said) == limit:
                    # llama-cpp-python goes on where the text so far ends in what may be a part of a character; bytes that no
                    # character begins with would keep it going beyond the context. It is left with tokens that it has not said.
                    self._unsaid = said
                    return
                try:
                    token = chosen.send(sent)
                except StopIteration:
                    return
                said.append(token)
                at_end = bool(llama_cpp.llama_vocab_is_eog(self._model.vocab, token))
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
                request.ended_at_eos += at_end

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
            theirs: bytes = super().detokenize(tokens, prev_tokens, special)
            return theirs
        request = current.get()
        if request is None or special or len(tokens) < _LONG:
            text = b"".join([self._whole.piece(token, special) for token in tokens])
        else:
            # After each token the text of all is asked for, of the same list: what was added to it is read.
            if request.text_of is not tokens or len(tokens) < request.text_n:
                request.text_of, request.text_n, request.text = tokens, 0, bytearray()
            for token in tokens[request.text_n :]:
                request.text += self._whole.piece(token, special)
            request.text_n, text = len(tokens), bytes(request.text)
        return text[1:] if tokens and tokens[0] == self.token_bos() and text[:1] == b" " else text

    def eval(self, tokens: Sequence[int]) -> None:
        """As the base class; between batches a cancelled request ends."""
        request = current.get()
        for start in range(0, len(tokens), self.n_batch):
            if request is not None:
                request.check()
            super().eval(tokens[start : start + self.n_batch])

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

    def _init_sampler(self, *args: Any, **options: Any) -> Any:
        grammar = options.get("grammar")
        if grammar is None:
            return super()._init_sampler(*args, **options)
        request = current.get()
        param = "grammar" if request is None else request.grammar_param
        for text in read_grammar(grammar._grammar).tokens if "<" in grammar._grammar else ():
            if len(self.tokenize(text.encode(), add_bos=False, special=True)) != 1:
                raise RequestError(f"{param}: {text[:80]!r} is not one token of this model", param=param)
        require_grammar(self._model.vocab, grammar._grammar, grammar._root, param)
        return GuardedSampler(super()._init_sampler(*args, **options), self._n_vocab)


class ServedLlama(Served, PlainLlama):
    """A target that is served plainly."""

    def _arguments(self, model_path: str, options: dict[str, Any]) -> dict[str, Any]:
        if self.settings.hf_model_repo_id is None and self.settings.no_text is None:
            require_room(model_path, self.cache_ram, **options)
        return options


class ServedDFlashLlama(Served, DFlashLlama):
    """A target that is drafted for."""

    def _arguments(self, model_path: str, options: dict[str, Any]) -> dict[str, Any]:
        settings = self.settings
        options.pop("draft_model", None)  # llama_cpp.server's own drafting, which is off
        options |= {
            "draft_path": settings.model_draft,
            "feature_dtype": settings.feature_dtype,
            "draft_window": settings.draft_window,
            "draft_device": settings.draft_device,
            "n_draft": settings.n_draft,
            "feature_rows": settings.feature_rows,
            "draft_kv": settings.draft_kv,
        }
        budget = require_room(model_path, self.cache_ram, memory_margin=settings.memory_margin, **options)
        if budget is not None:
            options |= {"feature_dtype": budget.dtype, "feature_rows": budget.rows}  # what "auto" came to
        return options


def served_class(settings: ServedModelSettings, cache_ram: int = 0) -> type[Served]:
    """The class that llama_cpp.server is to make the model of these settings with."""
    base = ServedDFlashLlama if settings.model_draft else ServedLlama
    return type(base.__name__, (base,), {"settings": settings, "cache_ram": cache_ram})


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
