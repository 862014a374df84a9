"""Messages and tools of a chat request."""

from __future__ import annotations

import re
from typing import Any

from .body import bad, name_of
from .facts import ModelFacts, too_long
from .grammar import grammar_of_schema

MAX_TOOLS = 128

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_messages(body: dict[str, Any], facts: ModelFacts) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad("messages", "a list of at least one message was expected")
    if len(messages) > facts.n_ctx:
        raise too_long("messages", f"are {len(messages)}", facts)
    total = 0
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        if not isinstance(message, dict):
            raise bad(at, f"an object was expected, not {name_of(message)}")
        role = message.get("role")
        if role not in _ROLES:
            raise bad(f"{at}.role", f"one of {', '.join(_ROLES)} was expected")
        if role == "developer":
            message["role"] = "system"
        # OpenAI's clients send an answer back as they got it.
        messages[i] = message = {name: value for name, value in message.items() if value is not None}
        if message.get("content") is None:
            if role == "user":
                raise bad(f"{at}.content", "text was expected")
            message["content"] = ""
        if isinstance(message["content"], list):
            message["content"] = _join_parts(message["content"], f"{at}.content", facts)
        if isinstance(message["content"], str):
            total += len(message["content"].encode())
        elif not isinstance(message["content"], list):
            raise bad(f"{at}.content", f"text or a list of parts was expected, not {name_of(message['content'])}")
    if total > facts.max_prompt_bytes:
        raise too_long("messages", f"have {total} bytes of text", facts)


def _join_parts(parts: list[Any], at: str, facts: ModelFacts) -> str | list[Any]:
    """Templates of text models expect text: parts of text are joined. Images stay parts, and come in the request itself."""
    texts: list[str] = []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            if not facts.takes_images:
                raise bad(f"{at}[{i}]", "this model takes text only")
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else image
            if not isinstance(url, str) or not url.startswith("data:"):
                raise bad(f"{at}[{i}].image_url", "an image is sent in a data: URL; this server fetches nothing")
        else:
            raise bad(f"{at}[{i}].type", "a part of type text was expected")
    return "\n".join(texts) if len(texts) == len(parts) else parts


def check_tools(body: dict[str, Any], facts: ModelFacts) -> None:
    for name in ("tools", "functions"):
        tools = body.get(name)
        if tools is None:
            continue
        if not isinstance(tools, list):
            raise bad(name, f"a list was expected, not {name_of(tools)}")
        if len(tools) > MAX_TOOLS:
            raise bad(name, f"{len(tools)} of them; at most {MAX_TOOLS} are taken")
        if not tools:
            del body[name]
        for i, tool in enumerate(tools):
            _check_tool(tool, f"{name}[{i}]", wrapped=name == "tools")
    choice = body.get("tool_choice")
    tools = body.get("tools")
    if tools is None:
        if choice not in (None, "none", "auto"):
            raise bad("tool_choice", "there are no tools to choose from")
        body.pop("tool_choice", None)
    elif choice is None:
        body["tool_choice"] = "auto"  # OpenAI's default; chatml-function-calling takes its absence for "none"
    elif choice == "required" and not facts.chat_format.startswith("functionary"):
        if len(tools) > 1:
            raise bad("tool_choice", "required is supported for a single tool; name the one that is to be called")
        body["tool_choice"] = {"type": "function", "function": {"name": tools[0]["function"]["name"]}}
    chosen = body.get("tool_choice")
    if tools is not None and isinstance(chosen, dict):
        _check_choice(chosen.get("function"), [tool["function"] for tool in tools], "tool_choice.function", "tools")
    call = body.get("function_call")
    if isinstance(call, dict):
        _check_choice(call, body.get("functions", []), "function_call", "functions")


def _check_tool(tool: Any, at: str, *, wrapped: bool) -> None:
    function = tool.get("function") if wrapped and isinstance(tool, dict) else tool
    at = f"{at}.function" if wrapped else at
    if not isinstance(function, dict):
        raise bad(at, f"an object was expected, not {name_of(function)}")
    if not isinstance(function.get("name"), str) or not _TOOL_NAME.fullmatch(function["name"]):
        raise bad(f"{at}.name", "1 to 64 letters, digits, underscores or dashes were expected")
    if function.get("parameters") is None:
        function["parameters"] = {"type": "object", "properties": {}}
    if not isinstance(function["parameters"], dict):
        raise bad(f"{at}.parameters", f"a JSON schema is an object, not {name_of(function['parameters'])}")
    if not isinstance(function.get("description", ""), str):
        function.pop("description")


def _check_choice(choice: Any, functions: list[Any], at: str, among: str) -> None:
    """The function that a request insists on exists, and what it takes can be enforced."""
    name = choice.get("name") if isinstance(choice, dict) else None
    if not isinstance(name, str):
        raise bad(f"{at}.name", "the name of a function was expected")
    for i, function in enumerate(functions):
        if function["name"] == name:
            inner = ".function" if among == "tools" else ""
            grammar_of_schema(function["parameters"], f"{among}[{i}]{inner}.parameters")
            return
    raise bad(f"{at}.name", f"{name!r} is not among the {among}")
