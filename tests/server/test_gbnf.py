"""Grammars are read as llama.cpp reads them: what is accepted parses there, what is refused as no grammar does not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import llama_cpp.llama_grammar
import pytest

from ggml_mirror.server.gbnf import GrammarError, read_grammar

_PIECES = [
    *(
        "root",
        "a",
        "b",
        "x-1",
        "::=",
        "::=",
        '"t"',
        r'"a\n"',
        r'"\q"',
        '""',
        "[a-z]",
        r"[^a\]]",
        "[]",
        "[a",
        '"u',
        "(",
        ")",
        "|",
    ),
    *(
        "*",
        "+",
        "?",
        "{2}",
        "{1,3}",
        "{,2}",
        "{2,}",
        "{ 1 , 2 }",
        ".",
        "<[5]>",
        "!<[7]>",
        "<t>",
        "<zz",
        "\n",
        " ",
        "# c\n",
        "\r\n",
        "=",
        "é",
        "_",
    ),
]

# llama.cpp in a process of its own, with little memory: what it does not survive is a finding, too.
_NATIVE = """
import json, os, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
import llama_cpp
from llama_cpp import Llama
vocab = Llama(sys.argv[1], vocab_only=True, n_ctx=256, verbose=False)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
parsed = []
for text in json.load(sys.stdin):
    sampler = llama_cpp.llama_sampler_init_grammar(vocab._model.vocab, text.encode(), b"root")
    parsed.append(bool(sampler))
    if sampler:
        llama_cpp.llama_sampler_free(sampler)
print(json.dumps(parsed))
"""


def _sequence(draw: random.Random, depth: int = 0) -> str:
    parts = []
    for _ in range(draw.randint(0, 4)):
        part = draw.choice(['"t"', "[a-c]", ".", "<[5]>", "root", "a", "b", '"é"', "("])
        if part == "(":
            inner = (
                _sequence(draw, depth + 1) + draw.choice(["", " | " + _sequence(draw, depth + 1)])
                if depth < 3
                else '"q"'
            )
            part = f"({draw.choice(['', chr(10)])}{inner})"
        parts.append(part + draw.choice(["", "", "", "*", "+", "?", "{2}", "{0,3}", "{2,}", "{1,3}"]))
    return " ".join(parts)


def _text(draw: random.Random) -> str:
    if draw.random() < 0.4:
        return "".join(draw.choice(_PIECES) for _ in range(draw.randint(1, 14)))
    rules = (f"{name} ::= {_sequence(draw)}{draw.choice(['', ' | ' + _sequence(draw)])}" for name in ("root", "a", "b"))
    text = "\n".join(rules)
    if draw.random() < 0.3:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(_PIECES) + text[at + 1 :]
    return text


def test_random_texts(tiny: tuple[Path, Path]) -> None:
    draw = random.Random(0)
    texts: list[str] = []
    accepted: list[bool] = []
    while len(texts) < 12_000:
        text = _text(draw)
        try:
            if read_grammar(text).tokens:
                continue  # whether a text is one token is the vocabulary's to say
            accepted.append(True)
        except GrammarError as error:
            # Of these llama.cpp does not find all, takes the last of two definitions, and does not survive the others.
            if any(word in str(error) for word in ("recursion", "without end", "twice", "backwards", "ways")):
                continue
            accepted.append(False)
        texts.append(text)
    done = subprocess.run(
        [sys.executable, "-c", _NATIVE, str(tiny[0])],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    parsed = json.loads(done.stdout)
    assert sum(parsed) > 1000
    differ = [(text, ours) for text, ours, theirs in zip(texts, accepted, parsed, strict=True) if ours is not theirs]
    assert not differ, differ[:5]


def test_llama_cpps_own_grammars_are_accepted() -> None:
    names = [name for name in dir(llama_cpp.llama_grammar) if name.endswith("_GBNF")]
    assert len(names) >= 6
    for name in names:
        assert read_grammar(getattr(llama_cpp.llama_grammar, name)).rules, name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('root ::= ("a"', "line 1: ')' was expected, not its end"),
        ('root ::= "a"\n\nb = "c"', "line 3: ::= was expected, not '= \"c\"'"),
        ("root ::= nobody", "rule 'nobody' is not defined"),
        ('a ::= "b"', "no rule 'root'"),
        (r'root ::= "\q"', "known escapes"),
        ('root ::= "a"\nroot ::= "b"', "rule 'root' is defined twice"),
        ('root ::= "a"{3,1}', "{3,1} counts backwards"),
        ('root ::= "a"{9999}', "more than 2000 times"),
        ('root ::= a\na ::= b\nb ::= "x"? a', "begins with itself"),
    ],
)
def test_the_reason_is_said(text: str, said: str) -> None:
    with pytest.raises(GrammarError) as refused:
        read_grammar(text)
    assert said in str(refused.value)


def test_depth_and_length_take_no_time() -> None:
    deep = "root ::= " + "(" * 990 + '"a"' + ")?" * 990
    assert len(read_grammar(deep).rules) == 991
    chain = "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}?\n" for i in range(7000)) + 'r7000 ::= "a"'
    assert len(read_grammar(chain).rules) == 7002
