"""The command line as a user meets it: output, files, exit codes, and one clean line per error."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_run import Result, Run
from tiny_models import write_tiny_draft, write_tiny_model

from ggml_mirror import FeatureMirror, devices, doctor
from ggml_mirror.dtype import FeatureDtype
from ggml_mirror.errors import VersionMismatchError
from ggml_mirror.prompts import read_prompts

DTYPES = [d.value for d in FeatureDtype]


def _error(result: Result) -> str:
    """The error's line; there is nothing else."""
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    return result.err


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama", n_layer=8, n_embd=64, n_ctx=384)


# ------------------------------------------------------------------------------------------------------------ plan


def test_plan_prints_exact_bytes_and_what_fits(run: Run) -> None:
    result = run("plan", "--width", 25600, "--cap", 262144)
    assert result.code == 0 and result.err == ""
    for figure in ("26,843,545,600", "13,421,772,800", "7,130,316,800", "102,400", "27,200"):
        assert figure in result.out
    for device in devices():
        assert device.name in result.out


def test_plan_json_alone_on_standard_output(run: Run) -> None:
    made = run("plan", "--json", "--taps", 5, "--n-embd", 5120, "--cap", 262144, "--budget", "8GiB").json
    assert made["dtypes"]["f32"] == {"row_bytes": 102400, "ring_bytes": 26843545600, "max_cap_in_budget": 83886}
    assert list(made["dtypes"]) == DTYPES


@pytest.mark.parametrize(
    "options", [("--json",), ("--json", "-"), ("--json", "--cap", "7"), ("--json=-",), ("--cap", "7", "--json")]
)
def test_json_without_a_file_goes_to_standard_output(options: tuple[str, ...], run: Run) -> None:
    assert run("plan", "--width", 64, *options).json["width"] == 64


def test_plan_reads_a_target_a_draft_or_both(run: Run, tiny: Path, tmp_path: Path) -> None:
    draft = write_tiny_draft(tmp_path / "draft.gguf", "dflash", taps=(1, 3, 5), n_embd=64)
    made = run("plan", "-m", tiny, "--json").json
    assert (made["taps"], made["n_embd"], made["cap"]) == (5, 64, 384)
    made = run("plan", "-m", tiny, "--taps", "1,2", "--cap", 10, "--json").json
    assert (made["taps"], made["cap"]) == (2, 10)
    assert run("plan", "-md", draft, "--json").json["taps"] == 3
    made = run("plan", "-md", draft, "-m", tiny, "--json").json
    assert (made["taps"], made["cap"]) == (3, 384)


def test_plan_defaults_to_five_taps_and_4096_rows(run: Run) -> None:
    made = run("plan", "--n-embd", 64, "--json").json
    assert (made["taps"], made["cap"]) == (5, 4096)


def test_plan_refuses_contradictions(run: Run, tiny: Path, tmp_path: Path) -> None:
    draft = write_tiny_draft(tmp_path / "draft.gguf", "dflash", taps=(1, 3, 5), n_embd=64)
    wide = write_tiny_model(tmp_path / "wide.gguf", n_embd=96)
    for arguments, says in [
        (("-m", tiny, "--width", 64), "not both"),
        (("-m", draft), "-md"),
        (("-md", tiny), "-m"),
        (("-md", draft, "--taps", 4), "3 taps"),
        (("-md", draft, "-m", wide), "96"),
        (("--width", 64, "--dtypes", "f32,q9"), "q9"),
        (("--width", 64, "--budget", "8 apples"), "8GiB"),
        (("--width", 64, "--taps", "a,b"), "--taps"),
        (("--width", 64, "--device", "CUDA99"), "CUDA99"),
        (("--cap", 64), "give width"),
    ]:
        result = run("plan", *arguments)
        assert result.code == 2
        assert says in _error(result)


@pytest.mark.parametrize("command", [("plan", "--width", "64"), ("probe", "-m", "absent.gguf")])
def test_a_bad_dtype_policy_is_an_error_that_lists_the_good_ones(
    command: tuple[str, ...], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DFLASH_FEATURE_DTYPE", "fp8")
    result = run(*command)
    assert result.code == 2
    error = _error(result)
    assert "DFLASH_FEATURE_DTYPE" in error and "'fp8'" in error and all(name in error for name in DTYPES)


def test_the_dtype_policy_does_not_narrow_a_comparison(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLASH_FEATURE_DTYPE", "q8_0")
    assert list(run("plan", "--width", 64, "--json").json["dtypes"]) == DTYPES


# ---------------------------------------------------------------------------------------------------------- doctor


def test_doctor_finds_this_environment_sound(run: Run) -> None:
    result = run("doctor", "--json")
    found = result.json
    assert (result.code, found["ok"], found["problems"]) == (0, True, [])
    import llama_cpp

    assert found["versions"]["llama-cpp-python"] == llama_cpp.__version__
    assert found["versions"]["ggml at build"] == found["versions"]["ggml loaded"]
    assert found["default_dtype"] == "f32"
    cpu = found["devices"][[d["name"] for d in found["devices"]].index("CPU")]
    assert cpu["self_test"] == "ok"
    assert cpu["dtypes"] == {name: {"capture": True, "read": True, "own_kernels": True} for name in DTYPES}


def test_doctor_prints_versions_devices_and_support(run: Run) -> None:
    result = run("doctor")
    assert result.code == 0
    for text in ("ggml at build", "llama-cpp-python", "CPU", "iq4_nl", "f32 (default)", "No problems found."):
        assert text in result.out


def test_doctor_reports_a_bad_policy_and_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLASH_FEATURE_DTYPE", "fp8")
    result = run("doctor")
    assert result.code == 1
    assert "'fp8'" in result.out


def test_doctor_explains_a_native_library_that_does_not_load(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise VersionMismatchError("built against ggml 1.2.3")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    result = run("doctor")
    assert result.code == 1
    assert "built against ggml 1.2.3" in result.out and "llama-cpp-python" in result.out


def test_doctor_notices_rows_that_come_back_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeatureMirror, "read", lambda self, *, start, count: np.zeros((count, self.width), np.float32))
    result = run("doctor", "--json")
    assert result.code == 1
    assert result.json["devices"][0]["self_test"] != "ok" and result.json["problems"]


# -------------------------------------------------------------------------------------------------------- snapshot


def test_snapshot_prints_a_header(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    with FeatureMirror(taps=2, n_embd=32, cap=8, dtype="q8_0", target="abc") as m:
        m.write_rows(start=5, rows=np.ones((10, 64), np.float32))
        m.snapshot().save(path)
    before = path.read_bytes()
    header = run("snapshot", path, "--json").json
    expected = {"dtype": "q8_0", "taps": 2, "n_embd": 32, "cap": 8, "first_position": 7, "count": 8, "target": "abc"}
    assert {key: header[key] for key in expected} == expected
    shown = run("snapshot", path)
    assert shown.code == 0 and "first_position" in shown.out and "q8_0" in shown.out
    assert path.read_bytes() == before


def test_what_is_no_snapshot_is_refused(run: Run, tiny: Path, tmp_path: Path) -> None:
    for path in (tiny, tmp_path / "absent", tmp_path):
        result = run("snapshot", path)
        assert result.code == 2
        assert str(path) in _error(result)


# ----------------------------------------------------------------------------------------- outputs, before any work


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""
    import llama_cpp

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(llama_cpp, "Llama", load)


@pytest.mark.usefixtures("no_model")
def test_bad_input_is_found_before_the_model_is_loaded(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    draft = write_tiny_draft(tmp_path / "draft.gguf", "dflash")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-100])
    for arguments, says in [
        (("-m", tmp_path / "absent.gguf"), "no such file"),
        (("-m", cut), "truncated"),
        (("-m", draft), "draft"),
        (("-m", tiny, "--taps", "1,7"), "blocks 0..6"),
        (("-m", tiny, "--taps", "-1"), "-1"),
        (("-m", tiny, "--taps", "1,1"), "each once"),
        (("-m", tiny, "--taps", "one"), "--taps"),
        (("-m", tiny, "--dtypes", "f32,fp8"), "fp8"),
        (("-m", tiny, "--dtypes", ","), "no dtype"),
        (("-m", tiny, "--style", "loud"), "loud"),
        (("-m", tiny, "--device", "TPU0"), "TPU0"),
        (("-m", tiny, "-n", "-1"), "n_predict"),
        (("-m", tiny, "-c", "32"), "context of 32"),
        (("-m", tiny, "-b", "0"), "n_batch"),
        (("-m", tiny, "-t", "0"), "n_threads"),
        (("-m", tiny, "--prompts", tmp_path / "absent.txt"), "absent.txt"),
        (("-m", tiny, "--prompts", tmp_path / "empty.txt"), "no prompts"),
        (("-m", tiny, "--prompts", tmp_path / "bad.jsonl"), "bad.jsonl:2"),
        (("-m", tiny, "--prompts", tmp_path / "torn.jsonl"), "torn.jsonl:2"),
        (("-m", tiny, "--prompts", tmp_path / "latin.txt"), "UTF-8"),
        (("-m", tiny, "--prompts", tiny), ".jsonl"),
        (("-m", tiny, "--json", tmp_path / "no" / "x.json"), "no directory"),
        (("-m", tiny, "--json", tmp_path), "directory"),
        (("-m", tiny, "--plot", tmp_path / "x.bmp"), ".png"),
        (("-m", tiny, "--plot", "/proc/x.png"), "cannot write"),
    ]:
        result = run("probe", *arguments)
        assert result.code == 2, arguments
        assert says in _error(result), arguments
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".gguf", ".gguf", ".jsonl", ".jsonl", ".txt", ".txt"]


@pytest.mark.usefixtures("no_model")
def test_a_dtype_that_does_not_divide_the_taps_is_an_error_when_asked_for(run: Run, tmp_path: Path) -> None:
    odd = write_tiny_model(tmp_path / "odd.gguf", n_embd=48)
    result = run("probe", "-m", odd, "--dtypes", "q8_0")
    assert result.code == 2
    assert "48" in _error(result)


def test_a_model_that_llama_cpp_refuses_is_one_line(run: Run, tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "nosucharch")
    for key in ("block_count", "embedding_length", "context_length"):
        writer.add_uint32(f"nosucharch.{key}", 64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = run("probe", "-m", path)
    assert result.code == 2
    assert "'nosucharch'" in _error(result)


def test_prompt_files_are_read_as_they_are_meant(tmp_path: Path) -> None:
    text = tmp_path / "p.txt"
    text.write_bytes("first\r\n\n  second  \u2028 still second\n".encode())
    assert [p.text for p in read_prompts(text)] == ["first", "  second  \u2028 still second"]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"task_id": "HumanEval/0", "prompt": "def f():\\n    "}\n\n{"prompt": "b"}')
    assert [(p.name, p.text) for p in read_prompts(lines)] == [("p.jsonl:1", "def f():\n    "), ("p.jsonl:3", "b")]


def test_output_files_are_replaced_whole(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    path.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    result = run("plan", "--width", 64, "--json", link)
    assert result.code == 0 and "bytes a row" in result.out  # the table as well
    assert json.loads(path.read_text())["width"] == 64
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    assert len(list(tmp_path.iterdir())) == 2
    assert run("plan", "--width", 64, "--json", "/dev/null").code == 0
    assert not Path("/dev/null").is_file()


# --------------------------------------------------------------------------------------------------- as a process


def _process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from ggml_mirror.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def test_help_teaches_with_examples(run: Run) -> None:
    for command in ("probe", "plan", "doctor", "snapshot", "inspect"):
        result = run(command, "--help")
        assert result.code == 0
        assert f"ggml-mirror {command}" in result.out and "Example" in result.out


def test_version_and_usage_errors(run: Run) -> None:
    result = run("--version")
    assert result.code == 0 and result.out.startswith("ggml-mirror ")
    for arguments in (("plan", "--bogus"), ("nosuch",), ("plan", "--cap", "many")):
        result = run(*arguments)
        assert result.code == 2 and result.out == "" and "Traceback" not in result.err


def test_a_traceback_only_when_asked_for() -> None:
    quiet = _process("plan", "--width", "0")
    assert quiet.returncode == 2 and "Traceback" not in quiet.stderr
    for loud in (_process("plan", "--width", "0", "--debug"), _process("plan", "--width", "0", GGML_MIRROR_DEBUG="1")):
        assert loud.returncode != 0 and "Traceback" in loud.stderr and "ArgumentError" in loud.stderr


def test_out_of_memory_has_its_own_exit_code(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ggml_mirror import probe
    from ggml_mirror.errors import MirrorMemoryError

    def refuse(**_: object) -> None:
        raise MirrorMemoryError("needs 5 bytes, 4 are free")

    monkeypatch.setattr(probe, "FeatureMirror", refuse)
    result = run("probe", "-m", tiny, "-n", 1)
    assert result.code == 3
    assert "needs 5 bytes" in _error(result)


def test_unexpected_errors_are_one_line_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda: 1 / 0)
    result = run("doctor")
    assert result.code == 1
    assert "ZeroDivisionError" in _error(result) and "--debug" in result.err


def test_output_survives_an_ascii_terminal() -> None:
    result = _process("plan", "--width", "64", PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and "f32" in result.stdout


def test_the_error_is_red_on_a_terminal_and_plain_elsewhere() -> None:
    assert "\033" not in _process("plan", "--width", "0").stderr
    ours, theirs = pty.openpty()
    code = "from ggml_mirror.cli import main; main(['plan', '--width', '0'])"
    subprocess.run([sys.executable, "-c", code], stderr=theirs, timeout=120)
    os.close(theirs)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert shown.startswith("\033[31merror:\033[0m ")


def test_help_does_not_load_the_plot_library() -> None:
    code = "import sys; from ggml_mirror.cli import app; app(['--help'], standalone_mode=False); print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and "probe" in shown.stdout
    assert "typer" in shown.stdout and "matplotlib" not in shown.stdout
