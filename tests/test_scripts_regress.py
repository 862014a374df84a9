"""regress: its manifest, how it judges, and a run on a tiny pair."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import regress  # noqa: E402
from decoding import Counts  # noqa: E402
from test_scripts_ab import run_script  # noqa: E402

from ggml_mirror.errors import GgmlMirrorError  # noqa: E402

TINY = """\
[[pair]]
name = "tiny"
target = { tiny = "qwen35", seed = 1 }
draft = { tiny = "dflash", seed = 1 }
n_threads = 1
n_predict = 20
dtypes = ["q8_0"]
prompts = ["the ring of rows in it, a window of the other in the text: 0 1 2 3 4 5 6 7 8 9"]
"""


def manifest(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "m.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no \\[\\[pair\\]\\]"),
        ("pair = 3", "no \\[\\[pair\\]\\]"),
        ("a b", "not TOML"),
        ("[pairs]\nx = 1", "unknown table 'pairs'"),
        (TINY + TINY, "two pairs are named 'tiny'"),
        (TINY + "n_predicts = 3\n", "pair 'tiny': unknown key 'n_predicts'"),
        (TINY.replace("prompts", "# prompts"), "prompts is missing"),
        (TINY.replace("n_predict = 20", 'n_predict = "20"'), "n_predict is '20'; int was expected"),
        (TINY.replace("n_predict = 20", "n_predict = true"), "n_predict is True"),
        (TINY.replace('dtypes = ["q8_0"]', "dtypes = []"), "dtypes is \\[\\]"),
        (TINY.replace("q8_0", "q9_0"), "q9_0"),
        (TINY + 'scenarios = ["warm"]\n', "no scenario 'warm'"),
        (TINY.replace('{ tiny = "qwen35", seed = 1 }', '"none.gguf"'), "there is no file .*none.gguf"),
        (TINY.replace('tiny = "qwen35", ', ""), 'target is a table without "tiny"'),
        ("pair = [1]", "each \\[\\[pair\\]\\] are tables"),
        ("defaults = 3\n" + TINY, "\\[defaults\\] and each"),
        (TINY.replace("q8_0", "q9_0"), "pair 'tiny': .*q9_0"),
        (TINY.replace("n_predict = 20", "n_predict = 0"), "n_predict is 0; a number from 1"),
        (TINY + "n_ctx = -1\n", "n_ctx is -1"),
        (TINY + f"n_ctx = {2**31}\n", "n_ctx is 2147483648"),
        (TINY + "tie = nan\n", "tie is nan"),
        (TINY + "count_tolerance = -0.1\n", "count_tolerance is -0.1; a number from 0"),
        (TINY.replace('"tiny"\n', '"a/b"\n'), "has no '/'"),
        (TINY.replace('"tiny"\n', '""\n'), "not empty"),
        (TINY.replace("prompts = [", 'prompts = ["", '), "a prompt is empty"),
    ],
)
def test_manifest_errors_name_the_place(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(GgmlMirrorError, match=says):
        regress.read_manifest(manifest(tmp_path, text))


def test_manifest_defaults_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/t.gguf").touch()
    monkeypatch.setenv("WHERE", "models")
    text = "[defaults]\nn_predict = 5\n" + TINY.replace("n_predict = 20\n", "").replace(
        '{ tiny = "qwen35", seed = 1 }', '"$WHERE/t.gguf"'
    )
    (pair,) = regress.read_manifest(manifest(tmp_path, text))
    assert pair.n_predict == 5 and pair.n_ctx == 512
    assert pair.target == str(tmp_path / "models/t.gguf")


def test_tiny_model_of_an_unknown_kind(tmp_path: Path) -> None:
    (pair,) = regress.read_manifest(manifest(tmp_path, TINY.replace('"qwen35"', '"qwen99"')))
    with pytest.raises(GgmlMirrorError, match="no tiny target"):
        regress.write_models(pair, tmp_path)


def test_tiny_models_that_llama_cpp_would_abort_at(tmp_path: Path) -> None:
    (pair,) = regress.read_manifest(manifest(tmp_path, TINY.replace("seed = 1 }", "n_layer = 0 }", 1)))
    with pytest.raises(GgmlMirrorError, match="n_layer is 0"):
        regress.write_models(pair, tmp_path)


@pytest.mark.parametrize("damage", ["junk", "cut"])
def test_models_that_do_not_load_are_one_line_and_exit_code_2(damage: str, tmp_path: Path) -> None:
    (pair,) = regress.read_manifest(manifest(tmp_path, TINY))
    target = Path(regress.write_models(pair, tmp_path)[0])
    target.write_bytes(b"junk" if damage == "junk" else target.read_bytes()[:-5000])
    done = run_script(
        "regress.py", str(manifest(tmp_path, TINY.replace('{ tiny = "qwen35", seed = 1 }', f'"{target}"')))
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and target.name in done.stderr


def test_shipped_manifest_is_complete() -> None:
    pairs = regress.read_manifest(ROOT / "scripts/regress/demo.toml")
    cases = {f"{p.name}/{s}/{d}" for p in pairs for s in p.scenarios for d in p.dtypes}
    assert cases == regress.read_baseline(ROOT / "scripts/regress/demo.json")["cases"].keys()


def case(**changes: Any) -> regress.Case:
    values: dict[str, Any] = dict(
        pair="p", scenario="cold", dtype="f32", texts=["a", "b"], tokens=40, counts=Counts(10, 70, 30), mirror_bytes=1000,
        faults=[],
    )  # fmt: skip
    return regress.Case(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "same_kind", "status"),
    [
        ({}, True, "ok"),
        ({"counts": Counts(10, 70, 27)}, True, "ok"),  # 5 % of 70 are 3.5
        ({"counts": Counts(10, 70, 26)}, True, "FAIL"),
        ({"counts": Counts(10, 70, 26)}, False, "other"),
        ({"texts": ["a", "c"]}, True, "FAIL"),
        ({"texts": ["a", "c"]}, False, "other"),
        ({"texts": ["a"]}, True, "FAIL"),
        ({"mirror_bytes": 1001}, False, "FAIL"),
        ({"faults": ["rows are off"]}, False, "FAIL"),
    ],
)
def test_judging(changes: dict[str, Any], same_kind: bool, status: str) -> None:
    assert regress.judge(case(**changes), case().to_json(), same_kind=same_kind, tolerance=0.05).status == status


def test_what_a_baseline_lacks_is_new_unless_it_is_wrong() -> None:
    assert regress.judge(case(), None, same_kind=True, tolerance=0.05).status == "new"
    assert regress.judge(case(faults=["x"]), None, same_kind=True, tolerance=0.05).status == "FAIL"


def test_a_run_agrees_with_its_own_baseline_and_not_with_another(tmp_path: Path) -> None:
    path = manifest(tmp_path, TINY)
    first = run_script("regress.py", str(path), "--update")
    assert first.returncode == 0, first.stdout + first.stderr
    baseline = tmp_path / "m.json"
    kept = json.loads(baseline.read_text())
    assert kept["cases"].keys() == {f"tiny/{s}/q8_0" for s in regress.SCENARIOS}
    assert kept["cases"]["tiny/reject-storm/q8_0"]["accepted"] > 3  # blocks were cut in the middle too

    second = run_script("regress.py", str(path), "--json", str(tmp_path / "found.json"))
    assert second.returncode == 0, second.stdout + second.stderr
    verdicts = json.loads((tmp_path / "found.json").read_text())["verdicts"]
    assert {v["status"] for v in verdicts.values()} == {"ok"}

    kept["cases"]["tiny/cold/q8_0"]["texts"] = ["0123456789abcdef"]
    baseline.write_text(json.dumps(kept))
    third = run_script("regress.py", str(path), "--scenario", "cold")
    assert third.returncode == 1
    assert "1 of 1 texts" in third.stdout


def test_a_baseline_that_is_none_is_exit_code_2(tmp_path: Path) -> None:
    path = manifest(tmp_path, TINY)
    path.with_suffix(".json").write_text("[]")
    done = run_script("regress.py", str(path))
    assert done.returncode == 2
    assert "not a baseline" in done.stderr and "Traceback" not in done.stderr
