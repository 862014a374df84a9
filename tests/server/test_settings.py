"""What is served, from flags, config files and the environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import yaml
from llama_cpp.server.settings import ModelSettings, ServerSettings

from ggml_mirror.errors import ArgumentError, DraftMismatchError, DtypeError, ModelFileError
from ggml_mirror.server.settings import ServedModelSettings, read_keys, read_settings


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ServedModelSettings.model_fields, *ServerSettings.model_fields, "CONFIG_FILE", "LLAMA_API_KEY"):
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def fields(tiny: tuple[Path, Path]) -> dict[str, Any]:
    return {"model": str(tiny[0]), "model_draft": str(tiny[1])}


def test_defaults(fields: dict[str, Any]) -> None:
    server, (model,) = read_settings(fields)
    assert (server.host, server.port, server.interrupt_requests) == ("127.0.0.1", 8000, False)
    assert (model.n_ctx, model.n_gpu_layers, model.flash_attn, model.logits_all) == (2048, -1, True, False)
    assert (model.verbose, model.use_mlock, model.feature_dtype, model.model_alias) == (
        False,
        False,
        "f32",
        "target.gguf",
    )
    assert (model.feature_rows, model.draft_kv, model.chat_format) == ("raw", "f16", "chatml")
    assert read_settings({**fields, "feature_rows": " Auto "})[1][0].feature_rows == "auto"
    _, (plain,) = read_settings({"model": fields["model"]})
    assert not plain.flash_attn
    # llama.cpp's contexts are multiples of 256; 0 is the model's.
    assert [read_settings({**fields, "n_ctx": n})[1][0].n_ctx for n in (0, 1, 300, 5000)] == [2048, 256, 512, 5120]


def test_what_was_given_stands(fields: dict[str, Any]) -> None:
    given = {
        "logits_all": True,
        "flash_attn": False,
        "verbose": True,
        "use_mlock": True,
        "n_gpu_layers": 0,
        "n_ctx": 768,
    }
    server, (model,) = read_settings({**fields, **given, "interrupt_requests": True, "host": "::1"})
    assert {name: getattr(model, name) for name in given} == given
    assert server.interrupt_requests and server.host == "::1"


def test_every_setting_of_llama_cpp_server_can_be_given(fields: dict[str, Any]) -> None:
    """By its name, as python -m llama_cpp.server takes them."""
    sample = {bool: "true", int: "3", float: "0.5", str: "x"}
    for name, info in {**ModelSettings.model_fields, **ServerSettings.model_fields}.items():
        if name in ("model", "draft_model"):
            continue
        text = "ram" if name == "cache_type" else "{}" if "dict" in str(info.annotation).lower() else None
        kinds = [kind for kind in sample if kind.__name__ in str(info.annotation)]
        text = text or sample[kinds[0]]
        server, (model,) = read_settings({"model": fields["model"]}, [f"--{name}", text])
        owner: Any = server if name in ServerSettings.model_fields else model
        assert name in owner.model_fields_set and getattr(owner, name) is not None, name
    plain = {"model": fields["model"]}
    assert read_settings(plain, ["--draft_model", "prompt-lookup-decoding"])[1][0].draft_model


def test_a_typing_error_is_found_without_a_draft_too(fields: dict[str, Any]) -> None:
    plain = {"model": fields["model"]}
    with pytest.raises(DtypeError, match="q9_9"):
        read_settings({**plain, "feature_dtype": "q9_9"})
    with pytest.raises(ArgumentError, match="molten"):
        read_settings({**plain, "feature_rows": "molten"})
    with pytest.raises(ArgumentError, match="draft_kv is 'f64'"):
        read_settings({**plain, "draft_kv": "f64"})
    with pytest.raises(ArgumentError, match="'some' is not a size"):
        read_settings({**plain, "memory_margin": "some"})


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_config_file(kind: str, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {
        "host": "127.0.0.2",
        "port": 1234,
        "models": [
            {
                **fields,
                "model_alias": "drafted",
                "n_ctx": 128,
                "feature_dtype": "q8_0",
                "draft_window": 64,
                "n_draft": 3,
            },
            {"model": fields["model"], "model_alias": "plain"},
        ],
    }
    path = tmp_path / f"config.{kind}"
    path.write_text(json.dumps(content) if kind == "json" else yaml.safe_dump(content))
    server, (drafted, plain) = read_settings({"port": 99}, config_file=str(path))
    assert (server.host, server.port) == ("127.0.0.2", 99)  # a flag is closer than a file
    assert (drafted.n_ctx, drafted.feature_dtype, drafted.draft_window, drafted.n_draft) == (256, "q8_0", 64, 3)
    assert plain.model_draft is None and plain.n_ctx == 2048
    monkeypatch.setenv("CONFIG_FILE", str(path))
    assert read_settings({})[0].port == 1234
    with pytest.raises(ArgumentError, match="settings of models belong into it"):
        read_settings(fields)


def test_config_files_that_say_too_little_or_too_much(fields: dict[str, Any], tmp_path: Path) -> None:
    cases = {
        "[]": "object",
        "{": "config.json",
        "{}": "no models",
        '{"models": []}': "no models",
        '{"models": [{}]}': "models.0.model",
        '{"models": [{"model": "x", "n_cxt": 5}]}': "models.0.n_cxt",
        '{"modles": []}': "modles",
        json.dumps({"models": [fields, fields]}): "two models are called target.gguf",
        json.dumps({"api_key": ["sesame"], "models": [fields]}): "api_key",
    }
    path = tmp_path / "config.json"
    for content, said in cases.items():
        path.write_text(content)
        with pytest.raises(ArgumentError) as refused:
            read_settings({}, config_file=str(path))
        assert said in str(refused.value) and "sesame" not in str(refused.value)


def test_environment(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """llama_cpp.server's variables are its fields' names."""
    monkeypatch.setenv("N_CTX", "256")
    monkeypatch.setenv("PORT", "4321")
    monkeypatch.setenv("DFLASH_FEATURE_DTYPE", "bf16")
    server, (model,) = read_settings(fields)
    assert (model.n_ctx, server.port, model.feature_dtype) == (256, 4321, "bf16")
    server, (model,) = read_settings({**fields, "n_ctx": 128, "feature_dtype": "q8_0"})
    assert (model.n_ctx, model.feature_dtype) == (256, "q8_0")


def test_what_cannot_be_is_refused_before_anything_is_loaded(fields: dict[str, Any]) -> None:
    draft = fields["model_draft"]
    for change, error, said in (
        ({"model": "nowhere.gguf"}, ModelFileError, "nowhere.gguf"),
        ({"model": draft}, DraftMismatchError, "itself a draft"),
        ({"model": draft, "model_draft": None}, ArgumentError, "with -md"),
        ({"feature_dtype": "q9_9"}, DtypeError, "q9_9"),
        ({"n_draft": 8}, ArgumentError, "1 to 7"),
        ({"feature_rows": "cooked"}, ArgumentError, "cooked"),
        ({"draft_model": draft}, ArgumentError, "model_draft"),
        ({"draft_model": "prompt-lookup-decoding"}, ArgumentError, "not together"),
        ({"hf_model_repo_id": "a/b"}, ArgumentError, "file"),
        ({"n_ctx": "many"}, ArgumentError, "n_ctx"),
    ):
        with pytest.raises(error, match=said):
            read_settings({**fields, **change})


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ServerSettings(api_key="theirs")
    file = tmp_path / "keys"
    file.write_text("# comment\n\n one \ntwo\n")
    assert read_keys("a, b", file, server) == ["a", "b", "one", "two", "theirs"]
    assert server.api_key is None
    monkeypatch.setenv("LLAMA_API_KEY", "of-environment")
    assert read_keys(None, None, server) == ["of-environment"]
    assert read_keys("flag", None, server) == ["flag"]
    monkeypatch.delenv("LLAMA_API_KEY")
    assert read_keys(None, None, server) == []
    with pytest.raises(ArgumentError, match="empty"):
        read_keys(" ,", None, server)
    file.write_text("# none\n")
    with pytest.raises(ArgumentError, match="no key"):
        read_keys(None, file, server)


def test_a_request_without_a_seed_gets_a_random_one_or_the_servers(fields: dict[str, Any]) -> None:
    _, (model,) = read_settings(fields)
    assert model.seed == llama_cpp.LLAMA_DEFAULT_SEED and len({model.request_seed() for _ in range(8)}) > 1
    _, (model,) = read_settings({**fields, "seed": 5})
    assert model.request_seed() == 5
