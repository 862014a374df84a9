"""HumanEval's prompts in the two styles in which they are given to a target: raw, and as a chat."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_cpp import Llama

from ggml_mirror.errors import ArgumentError
from ggml_mirror.prompt_run import BOTH, CHAT, RAW, STYLES, make_jobs
from ggml_mirror.prompts import Prompt, read_prompts

_SETUP = Path(__file__).resolve().parent / "setup/humaneval.py"


@dataclass(frozen=True)
class Task:
    """One prompt in one style, as the target's tokens."""

    name: str
    style: str
    tokens: list[int]

    @property
    def key(self) -> str:
        return f"{self.style}/{self.name}"


def humaneval_prompts(file: Path | None = None) -> list[Prompt]:
    """All 164, named ``HumanEval/0`` and so on.

    Args:
        file: ``HumanEval.jsonl.gz``, or prompts of your own as .txt or .jsonl; None: the cached file, fetched if absent.

    Raises:
        ArgumentError: the file cannot be read as such.
    """
    if file is None:
        found = subprocess.run([sys.executable, str(_SETUP)], check=True, stdout=subprocess.PIPE, text=True)
        file = Path(found.stdout.strip())
    if file.suffix != ".gz":
        return list(read_prompts(file))
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            tasks = [json.loads(line) for line in lines if line.strip()]
        return [Prompt(task["task_id"], task["prompt"]) for task in tasks]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"{file}: not HumanEval's jsonl.gz ({error})") from error


def as_chat(prompt: Prompt) -> Prompt:
    """The user turn; the target's own template adds its default system turn."""
    return Prompt(prompt.name, f"Complete this Python function:\n\n```python\n{prompt.text.rstrip()}\n```")


def make_tasks(llm: Llama, prompts: Sequence[Prompt], style: str, *, limit: int) -> list[Task]:
    """The prompts as tokens: all raw ones, then all chats, in the order given.

    Args:
        limit: most tokens that a prompt may have.

    Raises:
        ArgumentError: a prompt is longer, or "chat" for a target without a chat template.
    """
    if style not in STYLES:
        raise ArgumentError(f"style {style!r}; use one of {', '.join(STYLES)}")
    tasks = []
    for one in (RAW, CHAT) if style == BOTH else (style,):
        texts = [as_chat(p) for p in prompts] if one == CHAT else prompts
        jobs, _ = make_jobs(llm, texts, one, limit=1 << 30)
        tasks += [Task(job.name, one, job.tokens) for job in jobs]
    longest = max(tasks, key=lambda task: len(task.tokens))
    if len(longest.tokens) > limit:
        raise ArgumentError(
            f"{longest.key} has {len(longest.tokens)} tokens; the context, less the tokens to generate and a block, has "
            f"room for {limit}: pass a larger -c"
        )
    return tasks
