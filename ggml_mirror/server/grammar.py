"""Grammars from requests, before llama.cpp sees them.

llama.cpp parses a grammar by recursion and looks for left recursion along every way to begin it, so a short text can overflow its stack or
keep it busy for years. What could is refused here. JSON schemas become grammars by llama-cpp-python's own converter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf

from .body import bad, name_of
from .errors import RequestError

MAX_CHARS = 256 << 10
MAX_NESTING = 2000  # parentheses; llama.cpp's own bound on repetitions nests as deep
MAX_BEGINNINGS = 50_000
MAX_REPEATS = 2000  # of an element: MAX_REPETITION_THRESHOLD in llama.cpp's src/llama-grammar.cpp

_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r\n]+|\#[^\r\n]*)|(?P<rule>[A-Za-z0-9_-]+[ \t]*::=)|(?P<name>[A-Za-z0-9_-]+)
    |(?P<end>"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|!?<[^>]*>|\.)
    |(?P<repeat>[*+?]|\{[^}]*\})|(?P<open>\()|(?P<close>\))|(?P<bar>\|)""",
    re.VERBOSE | re.DOTALL,
)

#: Keywords of a JSON schema that llama-cpp-python writes out that many times.
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
_QUANTIFIER = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")


@dataclass
class _Element:
    """What a sequence is made of: a rule's name, alternatives in parentheses, or (neither) a terminal."""

    name: str | None = None
    group: list[list[_Element]] | None = None
    optional: bool = False


@dataclass
class _Grammar:
    rules: dict[str, list[list[_Element]]] = field(default_factory=dict)
    nullable: set[str] = field(default_factory=set)


def check_grammar(text: str, param: str) -> None:
    """Refuse what would harm llama.cpp. Whether the rest parses is llama.cpp's to say.

    Raises:
        RequestError: names ``param``.
    """
    if len(text) > MAX_CHARS:
        raise RequestError(f"{param}: a grammar of {len(text)} characters; {MAX_CHARS} are allowed", param=param)
    if "\0" in text:
        raise RequestError(f"{param}: a grammar cannot contain a null character; write \\x00", param=param)
    try:
        grammar = _read(text, param)
        beginnings = _beginnings(grammar, param)
    except RecursionError:
        raise RequestError(f"{param}: the grammar's rules refer to one another too deeply", param=param) from None
    if beginnings > MAX_BEGINNINGS:
        raise RequestError(
            f"{param}: the grammar can begin in more than {MAX_BEGINNINGS} ways; join alternatives that begin alike",
            param=param,
        )


def _read(text: str, param: str) -> _Grammar:
    grammar = _Grammar()
    open_groups: list[list[list[_Element]]] = [[[]]]  # what stands before the first rule is llama.cpp's to refuse
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            break  # a syntax error, which llama.cpp will name
        position = match.end()
        kind, token = match.lastgroup, match[0]
        alternatives = open_groups[-1]
        if kind == "rule":
            alternatives = grammar.rules.setdefault(token[:-3].rstrip(), [])
            alternatives.append([])
            open_groups = [alternatives]
        elif kind == "name":
            alternatives[-1].append(_Element(name=token))
        elif kind == "end":
            alternatives[-1].append(_Element(optional=token == '""'))
        elif kind == "bar":
            alternatives.append([])
        elif kind == "open":
            group: list[list[_Element]] = [[]]
            alternatives[-1].append(_Element(group=group))
            open_groups.append(group)
            if len(open_groups) > MAX_NESTING:
                raise RequestError(f"{param}: the grammar nests more than {MAX_NESTING} parentheses", param=param)
        elif kind == "close" and len(open_groups) > 1:
            open_groups.pop()
        elif kind == "repeat" and alternatives[-1]:
            if token in "*?" or re.match(r"\{\s*(0\s*)?[,}]", token):
                alternatives[-1][-1].optional = True
    return grammar


def _beginnings(grammar: _Grammar, param: str) -> int:
    """In how many ways the rules can begin, summed: what llama.cpp walks to find left recursion, and the stacks it may hold at once."""
    changed = True
    while changed:
        empty = {name for name, rule in grammar.rules.items() if any(_is_empty(s, grammar.nullable) for s in rule)}
        changed, grammar.nullable = empty != grammar.nullable, empty
    known: dict[str, int] = {}
    open_rules: set[str] = set()

    def of_rule(name: str) -> int:
        if name in open_rules:
            raise RequestError(
                f"{param}: rule {name!r} of the grammar begins with itself (left recursion)", param=param
            )
        if name not in known:
            open_rules.add(name)
            known[name] = of_alternatives(grammar.rules.get(name, []))
            open_rules.discard(name)
        return known[name]

    def of_alternatives(alternatives: list[list[_Element]]) -> int:
        total = 1
        for sequence in alternatives:
            for element in sequence:
                if element.name is not None:
                    total += of_rule(element.name)
                elif element.group is not None:
                    total += of_alternatives(element.group)
                else:
                    total += 1
                if not _may_be_empty(element, grammar.nullable):
                    break
        return min(total, MAX_BEGINNINGS + 1)

    return sum(of_rule(name) for name in grammar.rules)


def _may_be_empty(element: _Element, nullable: set[str]) -> bool:
    if element.optional or element.name in nullable:
        return True
    return element.group is not None and any(_is_empty(sequence, nullable) for sequence in element.group)


def _is_empty(sequence: list[_Element], nullable: set[str]) -> bool:
    return all(_may_be_empty(element, nullable) for element in sequence)


def grammar_of_schema(schema: Any, param: str) -> str:
    """The grammar of a JSON schema, by llama-cpp-python's converter.

    Raises:
        RequestError: the schema is not one, or uses what the converter does not know; names ``param``.
    """
    if not isinstance(schema, dict):
        raise RequestError(f"{param}: a JSON schema is an object, not {type(schema).__name__}", param=param)
    for name, count in _repeats(schema):
        if count > MAX_REPEATS:
            raise RequestError(f"{param}: {name} is {count}; at most {MAX_REPEATS} can be enforced", param=param)
    try:
        text: str = json_schema_to_gbnf(json.dumps(schema))
    except RecursionError:
        raise RequestError(
            f"{param}: the JSON schema has too many optional properties or nests too deeply", param=param
        ) from None
    except Exception as error:  # the converter's own assertions, and whatever a malformed schema makes it do
        reason = str(error) if isinstance(error, (AssertionError, ValueError)) and str(error) else type(error).__name__
        raise RequestError(f"{param}: this JSON schema cannot be enforced: {reason[:300]}", param=param) from None
    check_grammar(text, param)
    return text


def _repeats(schema: Any) -> Iterator[tuple[str, int]]:
    todo = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo.extend(node)
        elif isinstance(node, dict):
            todo.extend(node.values())
            for name in _COUNTS:
                if isinstance(node.get(name), int):
                    yield name, node[name]
            if isinstance(node.get("pattern"), str):
                for match in _QUANTIFIER.finditer(node["pattern"]):
                    for number in match.groups():
                        if number:
                            yield f"the pattern's {match[0]}", int(number[:9])


def take_constraint(body: dict[str, Any]) -> str:
    """A grammar, a JSON schema or a response format: in the end all is a grammar that llama.cpp can be given.

    Returns:
        The field that it came from.
    """
    wanted = [name for name in ("grammar", "json_schema", "response_format") if body.get(name) not in (None, "")]
    grammar = body.pop("grammar", "")
    schema = body.pop("json_schema", None)
    answer = body.pop("response_format", None)
    if isinstance(answer, dict) and answer.get("type") == "text":
        wanted.remove("response_format")
        answer = None
    if len(wanted) > 1:
        raise bad(wanted[1], f"not together with {wanted[0]}")
    if not wanted:
        return "grammar"
    param = wanted[0]
    if param == "grammar":
        if not isinstance(grammar, str):
            raise bad(param, f"a grammar is text, not {name_of(grammar)}")
        check_grammar(grammar, param)
        body["grammar"] = grammar
    elif param == "json_schema":
        body["grammar"] = grammar_of_schema(schema, param)
    else:
        body["grammar"] = _grammar_of_format(answer)
    return param


def _grammar_of_format(answer: Any) -> str:
    kind = answer.get("type") if isinstance(answer, dict) else None
    if kind == "json_object":
        if answer.get("schema") is None:
            return str(JSON_GBNF)
        return grammar_of_schema(answer["schema"], "response_format.schema")
    if kind == "json_schema":
        inner = answer.get("json_schema")
        if not isinstance(inner, dict):
            raise bad("response_format.json_schema", f"an object was expected, not {name_of(inner)}")
        return grammar_of_schema(inner.get("schema"), "response_format.json_schema.schema")
    raise bad("response_format.type", "one of text, json_object, json_schema was expected")
