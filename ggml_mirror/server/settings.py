"""What is served and how: llama_cpp.server's settings with those of drafting, from flags, a config file or the environment."""

from __future__ import annotations

import argparse
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Optional

import llama_cpp
from llama_cpp.server.cli import add_args_from_model
from llama_cpp.server.settings import ModelSettings, ServerSettings
from pydantic import Field, ValidationError

from ..dflash import check_drafting, resolve_n_draft
from ..draft import DraftSpec
from ..dtype import AUTO
from ..errors import ArgumentError
from ..model_info import ModelInfo
from ..row_kind import RAW

CONFIG_VARIABLE = "CONFIG_FILE"  # llama_cpp.server's
KEY_VARIABLE = "LLAMA_API_KEY"  # llama-server's

DEFAULT_N_CTX = 4096  # or the model's, if that is smaller
CELLS = 256  # llama.cpp's contexts are multiples of it

#: Fields whose default differs from llama_cpp.server's; a value that was given always stands.
#: logits_all keeps n_ctx * n_vocab floats, mlock needs a limit that few systems grant, and the log of llama.cpp is long.
_MODEL_DEFAULTS: dict[str, Any] = {"n_gpu_layers": -1, "logits_all": False, "use_mlock": False, "verbose": False}
_SERVER_DEFAULTS: dict[str, Any] = {"host": "127.0.0.1", "interrupt_requests": False}

_RANDOM_SEEDS = (-1, llama_cpp.LLAMA_DEFAULT_SEED)


class ServedModelSettings(ModelSettings):
    """llama_cpp.server's settings of a model, and how it is drafted for. (Its parser of arguments knows Optional, not |.)"""

    model_draft: Optional[str] = Field(default=None, description="A DFlash draft (GGUF) made for the model.")  # noqa: UP045
    feature_dtype: Optional[str] = Field(  # noqa: UP045
        default=None, description="How the mirror stores rows. Default: DFLASH_FEATURE_DTYPE, else f32."
    )
    draft_window: Optional[int] = Field(default=None, ge=1, description="Context rows that the draft attends to.")  # noqa: UP045
    draft_device: str = Field(default="auto", description="Device of draft and mirror.")
    feature_rows: str = Field(default=RAW, description="What the mirror holds: raw or fused rows; or auto.")
    draft_kv: str = Field(default="f16", description="Type of the draft's keys and values: f16, q8_0, off.")
    memory_margin: Optional[str] = Field(  # noqa: UP045
        default=None, description="For auto: bytes to leave free, as 512MiB. Default: 5 %, at most 1 GiB."
    )
    n_draft: Optional[int] = Field(default=None, ge=1, description="Most tokens to draft per step.")  # noqa: UP045
    n_predict: Optional[int] = Field(  # noqa: UP045
        default=None, description="Most tokens of a completion, and how many if a request names none. -1: no limit."
    )

    def request_seed(self) -> int:
        """For a request that names none: the server's own, or a random one."""
        return secrets.randbits(32) if self.seed in _RANDOM_SEEDS else self.seed

    @property
    def no_text(self) -> str | None:
        """Why such a model cannot generate text, or None."""
        if self.embedding:
            return "it is served for embeddings (--embedding)"
        return "only its vocabulary is loaded (--vocab_only)" if self.vocab_only else None

    def complete(self) -> None:
        """Fill in what was not given, from the files themselves.

        Raises:
            ModelFileError, UnsupportedDraftError, DraftMismatchError, DtypeError, ArgumentError: nothing was loaded.
        """
        if self.n_predict is not None and (self.n_predict == 0 or self.n_predict < -1):
            raise ArgumentError(f"n_predict is {self.n_predict}; a number of tokens, or -1 for no limit, was expected")
        given = self.model_fields_set
        for name, value in _MODEL_DEFAULTS.items():
            if name not in given:
                setattr(self, name, value)
        if self.draft_model is not None and self.draft_model != "prompt-lookup-decoding":
            raise ArgumentError(
                f"draft_model is llama_cpp.server's own setting and knows prompt-lookup-decoding only, not {self.draft_model!r}; "
                "a DFlash draft is given as model_draft (-md)"
            )
        dtype, rows = check_drafting(
            feature_dtype=self.feature_dtype,
            feature_rows=self.feature_rows,
            draft_kv=self.draft_kv,
            memory_margin=self.memory_margin,
        )
        self.feature_dtype = AUTO if dtype is None else dtype.value
        self.feature_rows = AUTO if rows is None else rows
        if self.model_draft is None:
            if self.hf_model_repo_id is None:
                self._complete_context(ModelInfo.read(self.model))
            return
        if self.hf_model_repo_id is not None:
            raise ArgumentError("a draft is checked against its target's file before loading; give the model as a file")
        for name in ("draft_model", "embedding", "vocab_only"):
            if getattr(self, name):
                raise ArgumentError(f"{name} and model_draft (-md): not together")
        if "flash_attn" not in given:
            self.flash_attn = True
        target = ModelInfo.read(self.model)
        spec = DraftSpec.read(self.model_draft, target)
        spec.require_rows(rows)
        resolve_n_draft(self.n_draft, spec)
        self._complete_context(target)

    def _complete_context(self, target: ModelInfo) -> None:
        if target.is_draft:
            raise ArgumentError(f"{target.path} is a draft; give it with -md, and its target with -m")
        if "n_ctx" not in self.model_fields_set:
            self.n_ctx = min(target.n_ctx_train, DEFAULT_N_CTX)
        # llama.cpp rounds contexts up. Llama has ids for what it was asked for, but checks prompts against what llama.cpp made of it.
        self.n_ctx = -(-(self.n_ctx or target.n_ctx_train) // CELLS) * CELLS
        if self.chat_format is None and not target.has_chat_template:
            self.chat_format = "chatml"  # llama.cpp's choice, too


class _ConfigFile(ServerSettings):
    """llama_cpp.server's configuration file, with models of our kind."""

    models: list[ServedModelSettings] = Field(default=[])


@dataclass
class ServeConfig:
    """All that ``serve`` was told.

    Attributes:
        models: the first is loaded at start; others take its place when a request names them.
        api_keys: any of them opens the server; empty: it is open.
        cache_ram, cache_disk, cache_disk_max: bytes (None: no cache), a folder, bytes.
        max_body: bytes of a request.
        max_queue: requests that may wait for the one that is being answered.
        timeout: seconds that a client may take to send a request, or to take an answer.
        shutdown_timeout: seconds that running requests have after SIGTERM; None: as long as they take.
    """

    server: ServerSettings
    models: list[ServedModelSettings]
    api_keys: list[str] = field(default_factory=list)
    cors_origins: str = "localhost"
    cache_ram: int | None = None
    cache_disk: Path | None = None
    cache_disk_max: int | None = None
    max_body: int = 16 << 20
    max_queue: int = 256
    timeout: float = 3600.0
    shutdown_timeout: int | None = None
    log_json: bool = False

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--max-body", self.max_body, 1),
            ("--max-queue", self.max_queue, 0),
            ("--timeout", self.timeout, 0.1),
            ("--shutdown-timeout", self.shutdown_timeout, 0),
        ):
            if value is not None and not value >= least:
                raise ArgumentError(f"{flag} is {value}; it must be at least {least}")


def read_settings(
    given: dict[str, Any], extra: Sequence[str] = (), config_file: str | None = None
) -> tuple[ServerSettings, list[ServedModelSettings]]:
    """llama_cpp.server's settings from flags or a file; what neither says comes from environment variables of the fields' names.

    Args:
        given: fields that a flag set.
        extra: further arguments, as ``--rope_freq_base 10000``: every field of llama_cpp.server can be given so.
        config_file: JSON or YAML; None takes ``CONFIG_FILE``. It names the models, so no flag may.

    Raises:
        ArgumentError: names the field and what is wrong with it.
    """
    fields = {**given, **_parse_extra(extra)}
    config_file = config_file or os.environ.get(CONFIG_VARIABLE)
    server_fields = {name: value for name, value in fields.items() if name in ServerSettings.model_fields}
    model_fields = {name: value for name, value in fields.items() if name not in ServerSettings.model_fields}
    try:
        if config_file is None:
            server, models = ServerSettings(**server_fields), [ServedModelSettings(**model_fields)]
        else:
            if model_fields:
                raise ArgumentError(
                    f"{', '.join(sorted(model_fields))}: with a config file, settings of models belong into it ({config_file})"
                )
            file = _ConfigFile.model_validate({**_read_file(config_file), **server_fields})
            models = file.models
            values = file.model_dump(include=set(ServerSettings.model_fields) & file.model_fields_set)
            server = ServerSettings(**values)
    except ValidationError as error:
        where = config_file if config_file is not None else "settings"
        raise ArgumentError(f"{where}: {_explain(error)}") from None
    if not models:
        raise ArgumentError(f'{config_file}: no models; it needs "models": [{{"model": "target.gguf"}}]')
    for name, value in _SERVER_DEFAULTS.items():
        if name not in server.model_fields_set:
            setattr(server, name, value)
    for model in models:
        model.model_alias = model.model_alias or Path(model.model).name  # llama_cpp.server's would be the whole path
    aliases = [str(model.model_alias) for model in models]
    for alias in aliases:
        if aliases.count(alias) > 1:
            raise ArgumentError(f"{config_file}: two models are called {alias}; give each its own model_alias")
    for model in models:
        model.complete()
    return server, models


def _read_file(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text("utf-8")
        if path.endswith((".yaml", ".yml")):
            import yaml

            content = yaml.safe_load(text)
        else:
            content = json.loads(text)
    except OSError as error:
        raise ArgumentError(f"cannot read the config file: {error}") from None
    except Exception as error:  # of either parser
        raise ArgumentError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ArgumentError(f'{path}: an object with "models" was expected')
    return content


def _explain(error: ValidationError) -> str:
    """One line: each field with what is wrong with it. Values are left out, for one may be a key."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False, include_input=False)
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArgumentError(
            f"{message} (serve --help lists the flags; fields of llama_cpp.server are given as --n_ctx 4096)"
        )


def settings_parser() -> argparse.ArgumentParser:
    """Every field of llama_cpp.server and of drafting as an option, as ``python -m llama_cpp.server`` has them."""
    parser = _Parser(prog="ggml-mirror serve", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    add_args_from_model(parser, ServerSettings)
    add_args_from_model(parser, ServedModelSettings)
    return parser


def _parse_extra(extra: Sequence[str]) -> dict[str, Any]:
    parsed = settings_parser().parse_args(list(extra))
    return {name: value for name, value in vars(parsed).items() if value is not None}


def read_keys(option: str | None, file: Path | None, settings: ServerSettings) -> list[str]:
    """The keys that open the server: of the flag or LLAMA_API_KEY (commas between several), a file (one a line), and llama_cpp.server's.

    Raises:
        ArgumentError: the file cannot be read or holds none.
    """
    given = option if option is not None else os.environ.get(KEY_VARIABLE, "")
    keys = [key.strip() for key in given.split(",")]
    if option is not None and not any(keys):
        raise ArgumentError("--api-key is empty")
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(f"cannot read the key file: {error}") from None
        of_file = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not of_file:
            raise ArgumentError(f"{file}: holds no key")
        keys += of_file
    if settings.api_key is not None:
        keys.append(settings.api_key)
        settings.api_key = None  # the whole server is behind the keys, not llama_cpp.server's routes alone
    return [key for key in keys if key]
