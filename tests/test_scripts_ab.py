"""ab_humaneval: its journal, and a run on a tiny pair that is cut off and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import write_tiny_draft, write_tiny_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from humaneval import as_chat, humaneval_prompts  # noqa: E402
from journal import Journal, part_of  # noqa: E402

from ggml_mirror.errors import ArgumentError  # noqa: E402
from ggml_mirror.prompts import Prompt  # noqa: E402

SETTINGS = {"target": "a", "n_predict": 8}


def test_journal_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    first = Journal(path, SETTINGS)
    first.add("raw/0/f32", {"tokens": [1, 2]})
    first.close()
    second = Journal(path, SETTINGS)
    assert "raw/0/f32" in second and len(second) == 1
    assert second["raw/0/f32"] == {"tokens": [1, 2]}
    second.add("raw/0/q8_0", {"tokens": [3]})
    second.close()
    assert len(Journal(path, SETTINGS)) == 2


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_journal_drops_half_a_line(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal(path, SETTINGS)
    journal.add("a", {"tokens": [1]})
    journal.add("b", {"tokens": [2]})
    journal.close()
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path, SETTINGS)
    assert "a" in again and "b" not in again
    again.add("b", {"tokens": [2]})
    again.close()
    assert Journal(path, SETTINGS)["b"] == {"tokens": [2]}


def test_journal_killed_in_its_first_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"settings": {"tar')
    journal = Journal(path, SETTINGS)
    journal.add("a", 1)
    journal.close()
    assert Journal(path, SETTINGS)["a"] == 1


def test_journal_of_other_settings_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    Journal(path, SETTINGS).close()
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match="n_predict 8, now 9"):
        Journal(path, {**SETTINGS, "n_predict": 9})
    path.write_bytes(before + b"no json\n")
    with pytest.raises(ArgumentError, match="not a journal"):
        Journal(path, SETTINGS)
    assert path.read_bytes() == before + b"no json\n"


def test_journals_of_parts_make_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        journal = Journal(tmp_path / name, SETTINGS)
        journal.add(name, 1)
        journal.close()
    both = tmp_path / "both"
    both.write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
    journal = Journal(both, SETTINGS)
    assert "a" in journal and "b" in journal and len(journal) == 2
    journal.close()
    Journal(tmp_path / "other", {**SETTINGS, "n_predict": 9}).close()
    both.write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "other").read_bytes())
    with pytest.raises(ArgumentError, match="n_predict 9, now 8"):
        Journal(both, SETTINGS)


def test_parts() -> None:
    tasks = list(range(7))
    assert sorted(t for i in (1, 2, 3) for t in part_of(tasks, f"{i}/3")) == tasks
    assert part_of(tasks, None) == tasks
    for bad in ("0/3", "4/3", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(ArgumentError, match="--part"):
            part_of(tasks, bad)


def test_chat_prompt() -> None:
    chat = as_chat(Prompt("x", "def f():\n    pass\n\n"))
    assert chat.text == "Complete this Python function:\n\n```python\ndef f():\n    pass\n```"


def test_prompt_file_that_is_no_humaneval(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(b"nothing")
    with pytest.raises(ArgumentError, match="HumanEval"):
        humaneval_prompts(tmp_path / "x.gz")


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    prompts = folder / "prompts.txt"
    prompts.write_text("the ring of rows in it\nin the other, a window\n")
    return write_tiny_model(folder / "t.gguf"), write_tiny_draft(folder / "d.gguf"), prompts


def test_a_run_resumed_in_the_middle_reports_what_a_whole_run_does(
    tiny: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    target, draft, prompts = tiny
    journal, report = tmp_path / "ab.jsonl", tmp_path / "ab.json"
    arguments = [
        *("-m", str(target), "-md", str(draft), "--prompt-file", str(prompts)),
        *("--style", "raw", "-n", "12", "-c", "256"),
        *("-t", "1", "--dtypes", "f32,q8_0", "--plain", "--resume", str(journal), "--json", str(report)),
        *("--plot", str(tmp_path / "ab.png")),
    ]
    whole = run_script("ab_humaneval.py", *arguments)
    assert whole.returncode == 0, whole.stderr
    lines = json.loads(report.read_text())["lines"]
    assert [line["dtype"] for line in lines] == ["f32", "q8_0"]
    assert all(line["texts_as_plain"] == line["prompts"] == 2 for line in lines)
    assert lines[0]["memory"]["mirror_bytes"] > lines[1]["memory"]["mirror_bytes"] > 0
    assert lines[0]["memory"]["process_bytes"] > 1 << 20
    assert (tmp_path / "ab.png").stat().st_size > 1000

    # As if killed while the fourth of six results was written.
    kept = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join(kept[:4]) + b'\n{"key": "raw/promp')
    resumed = run_script("ab_humaneval.py", *arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert "holds 3 results" in " ".join(resumed.stderr.split())
    assert len(journal.read_bytes().split(b"\n")) == len(kept)
    again = json.loads(report.read_text())["lines"]
    assert [line["counts"] for line in again] == [line["counts"] for line in lines]


def test_what_cannot_be_run_is_exit_code_2(tiny: tuple[Path, Path, Path]) -> None:
    target, draft, _ = tiny
    done = run_script("ab_humaneval.py", "-m", str(target), "-md", str(draft), "--dtypes", "f32,f33")
    assert done.returncode == 2
    assert "f33" in done.stderr and "Traceback" not in done.stderr


def test_parts_of_a_decode_benchmark_make_the_whole(tiny: tuple[Path, Path, Path], tmp_path: Path) -> None:
    target, draft, prompts = tiny
    common = ["-m", str(target), "-md", str(draft), "--prompt-file", str(prompts), "-n", "12", "-c", "256", "-t", "1"]
    journals = []
    for i in (1, 2):
        journals.append(tmp_path / f"{i}.jsonl")
        done = run_script("bench_decode.py", *common, "--part", f"{i}/2", "--resume", str(journals[-1]))
        assert done.returncode == 0, done.stderr
    joined, report = tmp_path / "all.jsonl", tmp_path / "decode.json"
    joined.write_bytes(b"".join(path.read_bytes() for path in journals))
    size = joined.stat().st_size
    done = run_script("bench_decode.py", *common, "--resume", str(joined), "--json", str(report))
    assert done.returncode == 0, done.stderr
    assert joined.stat().st_size == size  # nothing was left to decode
    rows = {row["variant"]: row for row in json.loads(report.read_text())["rows"]}
    assert set(rows) == {"plain", "lookup", "f32", "q8_0"}
    assert all(row["prompts"] == row["texts_as_plain"] == 2 for row in rows.values())
    assert rows["f32"]["counts"]["proposed"] > 0
    done = run_script("bench_decode.py", *common, "--part", "1/2")
    assert done.returncode == 2 and "--resume" in done.stderr
