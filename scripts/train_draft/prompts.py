"""What the target is to go on from: Python functions of installed packages, functions made up from parts, and nothing at all.

Functions of the benchmark are left out: those with one of its names, and those whose text shares eight words in a row with it.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_WORDS = 8
_NAME = re.compile(r"def\s+(\w+)\s*\(")
_WORD = re.compile(r"[a-z0-9]+")


class Benchmark:
    """Prompts that must not be trained on."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = list(texts)
        self._names = {name for text in self.texts for name in _NAME.findall(text)}
        self._runs = {run for text in self.texts for run in _runs(text)}

    def overlaps(self, text: str) -> bool:
        """Does ``text`` define a function of the benchmark, or share eight words in a row with it?"""
        return not self._names.isdisjoint(_NAME.findall(text)) or not self._runs.isdisjoint(_runs(text))


def _runs(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return {tuple(words[i : i + _WORDS]) for i in range(len(words) - _WORDS + 1)}


def default_sources() -> list[Path]:
    """The interpreter's standard library and installed packages."""
    paths = sysconfig.get_paths()
    return [Path(paths[name]) for name in ("stdlib", "purelib")]


@dataclass(frozen=True)
class Counts:
    """Prompts of each kind, and those left out because they overlap the benchmark."""

    source: int
    made_up: int
    dropped: int


def collect(benchmark: Benchmark, sources: Sequence[Path], n: int, seed: int) -> tuple[list[str], Counts]:
    """``n`` different prompts, or fewer if the sources do not give half of them; half are made up."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    dropped = 0
    for text in _of_sources(sources, rng):
        if len(found) >= n // 2:
            break
        if benchmark.overlaps(text):
            dropped += 1
        else:
            found[text] = None
    n_source = len(found)
    for _ in range(4 * n):  # the parts repeat themselves at some time
        if len(found) >= n:
            break
        text = _made_up(rng)
        if benchmark.overlaps(text):
            dropped += 1
        else:
            found[text] = None
    texts = list(found)
    rng.shuffle(texts)
    return texts, Counts(n_source, len(texts) - n_source, dropped)


# ------------------------------------------------------------------------------------------------ from sources


def _of_sources(sources: Sequence[Path], rng: random.Random) -> Iterator[str]:
    files = sorted({f for source in sources for f in ([source] if source.is_file() else source.rglob("*.py"))})
    rng.shuffle(files)
    for file in files:
        try:
            if file.stat().st_size > 400_000:
                continue
            text = file.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        yield from _functions(tree, text.splitlines(), rng)


def _functions(tree: ast.Module, lines: list[str], rng: random.Random) -> Iterator[str]:
    imports = [
        ast.get_source_segment("\n".join(lines), n)
        for n in tree.body[:8]
        if isinstance(n, (ast.Import, ast.ImportFrom))
    ]
    head = "\n".join(i for i in imports[:3] if i and len(i) < 80)
    taken = 0
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or taken >= 12:
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        body = node.body[0].lineno - 1
        documented = ast.get_docstring(node) is not None
        # Signature and docstring; sometimes some lines of the body too. Undocumented ones always with some.
        last = (node.body[0].end_lineno or body) if documented else body
        if not documented or rng.random() < 0.4:
            last = min(last + rng.randint(1, 6), node.end_lineno or last)
        part = lines[first:last]
        indent = len(part[0]) - len(part[0].lstrip()) if part else 0
        if any(line.strip() and not line[:indent].isspace() for line in part if indent):
            continue
        text = "\n".join(line[indent:] for line in part) + "\n"
        if not 40 <= len(text) <= 900:
            continue
        taken += 1
        yield f"{head}\n\n\n{text}" if head and rng.random() < 0.5 else text


# ---------------------------------------------------------------------------------------------------- made up

_VERBS = (
    "get compute find count filter merge split sort group build parse format check validate convert remove collect sum rotate "
    "select normalize encode decode update invert compress expand rank pair swap measure interleave partition chunk trim"
).split()
_THINGS = {
    "int": "numbers values scores ages prices counts ids digits weights heights marks steps offsets indices".split(),
    "str": "words names strings lines tokens keys labels tags titles cities letters paths emails codes".split(),
    "float": "temperatures ratios prices distances samples readings weights angles rates scores".split(),
}
_CONDITIONS = {
    "int": (
        "are even;are odd;are larger than {k};are smaller than {k};are divisible by {k};are not negative;occur more than once;"
        "occur exactly once;are perfect squares;differ from their neighbours;lie between {j} and {k};end in {j}"
    ).split(";"),
    "str": (
        "start with a vowel;are longer than {k} characters;contain only letters;are palindromes;end with a digit;are upper case;"
        "contain a space;appear more than once;are not empty;have an even number of characters;start with '{c}';contain '{c}'"
    ).split(";"),
    "float": "are above the mean;are below {k};lie within {j} of the median;are finite;are at least {k};are not zero".split(
        ";"
    ),
}
_AGGREGATES = {
    "int": "sum;product;largest;smallest;median;number;average;list;set;range".split(";"),
    "str": "longest;shortest;number;list;concatenation;set;first;last;most frequent".split(";"),
    "float": "sum;mean;largest;smallest;median;variance;list;number".split(";"),
}
_RESULTS = {
    "number": "int",
    "list": "List[{t}]",
    "set": "Set[{t}]",
    "average": "float",
    "mean": "float",
    "variance": "float",
}
_DOCS = (
    "Return the {agg} of the {things} that {cond}.",
    "Given a list of {things}, return the {agg} of those that {cond}.",
    "{Verb} the {things} that {cond} and return their {agg}.",
    "Find the {agg} among all {things} in {arg} that {cond}. If there are none, return None.",
    "For a given list {arg} of {things}, {verb} those that {cond}.\n    The result is the {agg} of them; the order does not change.",
    "Take {arg}, a list of {things}, and a limit. Keep those that {cond}, at most `limit` of them, and return the {agg}.",
    "You are given the {things} of a shop. {Verb} the ones that {cond} and give back the {agg}.",
)
_TASKS = (
    "# {Verb} the {things} that {cond}\n",
    "Write a Python function that {verb}s the {things} which {cond} and returns the {agg}.\n\n```python\n",
    "class {Thing}{Role}:\n    \"\"\"{Verb}s {things} that {cond}.\"\"\"\n\n    def __init__(self, {arg}: List[{t}]) -> None:\n",
    "import unittest\n\n\nclass Test{Verb}{Thing}(unittest.TestCase):\n    def test_{things}_that_{slug}(self):\n",
)  # fmt: skip


def _made_up(rng: random.Random) -> str:
    kind = rng.choice(list(_THINGS))
    verb, things, agg = rng.choice(_VERBS), rng.choice(_THINGS[kind]), rng.choice(_AGGREGATES[kind])
    cond = rng.choice(_CONDITIONS[kind]).format(
        j=rng.randint(1, 9), k=rng.randint(2, 50), c=rng.choice("abcdeklmnoprstw")
    )
    slug = "_".join(_WORD.findall(cond))
    arg = rng.choice([things, things, "values", "items", "data", "lst", "xs", "arr"])
    result = _RESULTS.get(agg, "{t}").format(t=kind)
    parts = {
        "verb": verb, "Verb": verb.capitalize(), "things": things, "Thing": things.capitalize(), "agg": agg, "cond": cond,
        "slug": slug, "arg": arg, "t": kind, "Role": rng.choice(["Filter", "Counter", "Store", "Index", "Report"]),
    }  # fmt: skip
    if rng.random() < 0.15:
        return rng.choice(_TASKS).format(**parts)
    name = rng.choice(
        [f"{verb}_{things}", f"{verb}_{things}_that_{slug}", f"{agg.replace(' ', '_')}_of_{things}", f"{verb}_{slug}"]
    )
    doc = rng.choice(_DOCS).format(**parts)
    extra = rng.choice(
        ["", "", "", f", limit: int = {rng.randint(1, 20)}", f", key: {kind} = None", ", strict: bool = False"]
    )
    examples = "".join(
        f"\n    >>> {name}({_example(kind, rng)})" + _shown(agg, kind, rng) for _ in range(rng.randint(0, 3))
    )
    hint = "from typing import List, Set\n\n\n" if rng.random() < 0.6 else ""
    quotes = rng.choice(['"""', '"""', '"""', "'''"])
    lead = rng.choice(["", " ", "\n    "])
    return (
        f"{hint}def {name}({arg}: List[{kind}]{extra}) -> {result}:\n    {quotes}{lead}{doc}{examples}\n    {quotes}\n"
    )


def _value(kind: str, rng: random.Random) -> str:
    if kind == "int":
        return str(rng.randint(-20, 120))
    if kind == "float":
        return str(round(rng.uniform(-10, 60), rng.randint(1, 2)))
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "'" + "".join(rng.choice(letters) for _ in range(rng.randint(1, 7))) + "'"


def _example(kind: str, rng: random.Random) -> str:
    return "[" + ", ".join(_value(kind, rng) for _ in range(rng.randint(0, 6))) + "]"


def _shown(agg: str, kind: str, rng: random.Random) -> str:
    if rng.random() < 0.3:
        return ""
    if agg in ("list", "set"):
        return f"\n    {_example(kind, rng)}"
    return f"\n    {rng.randint(0, 9) if agg == 'number' else _value(kind, rng)}"
