"""The chat in a terminal: lines in, answers out, commands, Ctrl-C and Ctrl-D. Answers and what commands print go to standard output,
everything else to standard error, so that answers can be piped."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..byte_size import format_bytes
from ..dflash import DFlashLlama
from ..errors import ArgumentError, GgmlMirrorError
from ..report import _table
from .conversation import LENGTH, STOPPED, SYSTEM, AnswerStats, Chat
from .session import load_session, save_session

PROMPT = "> "

#: What a terminal would act on: control characters but tab and newline.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ChatTerminal:
    """Reads lines from standard input until it ends, or until ``/exit``.

    Args:
        out, err: for answers and commands; for everything else.
    """

    def __init__(self, chat: Chat, *, out: Console, err: Console) -> None:
        self.chat, self.out, self.err = chat, out, err
        self.at_terminal = sys.stdin.isatty()
        self._first_error: GgmlMirrorError | None = None
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/help": ("", "this list", self._help),
            "/stats": ("", "tokens, speed and acceptance of this conversation; what the mirror holds", self._stats),
            "/reset": ("", "forget the conversation, but for the system prompt (also /clear)", self._reset),
            "/save": (
                "FILE",
                "write the conversation to a file, with the model's state and the mirror's rows",
                self._save,
            ),
            "/load": (
                "FILE",
                "go on with a conversation from a file; it must be of the same models and settings",
                self._load,
            ),
            "/exit": ("", "leave (also Ctrl-D)", self._exit),
        }

    def run(self) -> GgmlMirrorError | None:
        """The whole session. Returns the first error, if lines did not come from a terminal; it has been printed."""
        if self.at_terminal:
            self.err.print("[dim]/help lists commands; Ctrl-C stops an answer, Ctrl-D leaves.[/]", soft_wrap=True)
        with contextlib.suppress(_Leave):
            for text in self._messages():
                self._handle(text)
        return None if self.at_terminal else self._first_error

    def one_shot(self, prompt: str) -> None:
        """One answer.

        Raises:
            GgmlMirrorError: as :meth:`Chat.answer`.
        """
        self._say(prompt)

    # ------------------------------------------------------------------ what comes in

    def _messages(self) -> Iterator[str]:
        """Messages and commands: lines, joined where one ends in a backslash."""
        parts: list[str] = []
        for line in self._lines():
            more = line.endswith("\\")
            parts.append(line[:-1] if more else line)
            if more:
                continue
            text, parts = "\n".join(parts), []
            if text.strip():
                yield text
        if parts:
            yield "\n".join(parts)

    def _lines(self) -> Iterator[str]:
        if not self.at_terminal:
            for line in sys.stdin:
                yield line.rstrip("\r\n")
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() a history and keys to edit with
        while True:
            try:
                yield self._ask()
            except EOFError:
                self.err.print()
                return
            except KeyboardInterrupt:
                self.err.print("\n[dim]Ctrl-D or /exit leaves.[/]", soft_wrap=True)

    def _ask(self) -> str:
        if sys.stdout.isatty():
            return input(PROMPT)
        self.err.print(PROMPT, end="")
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def _handle(self, text: str) -> None:
        try:
            if text.startswith("/") and not text.startswith("//"):
                self._command(text)
            else:
                self._say(text.removeprefix("/") if text.startswith("//") else text)
        except GgmlMirrorError as error:
            self._first_error = self._first_error or error
            self.err.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)

    # ------------------------------------------------------------------ answers

    def _say(self, text: str) -> None:
        answer = self.chat.answer(text)
        with contextlib.suppress(KeyboardInterrupt), _Interruptible() as interrupt:
            try:
                for piece in answer:
                    interrupt.begun = True
                    self.out.file.write(_CONTROLS.sub("", piece) if self.out.is_terminal else piece)
                    self.out.file.flush()
                    if interrupt.asked:
                        break
            finally:
                interrupt.done = True
                answer.close()
        self.out.file.write("\n")
        self.out.file.flush()
        if self.chat.finish == STOPPED:
            self.err.print("[dim](stopped)[/]", soft_wrap=True)
        elif self.chat.finish == LENGTH:
            full = self.chat.sampling.n_predict is None
            why = "the context is full: /reset, or start with a larger -c" if full else "its limit of tokens (-n)"
            self.err.print(f"[dim](cut off at {why})[/]", soft_wrap=True)
        if self.chat.last is not None:
            self.err.print(f"[dim]{escape(stats_line(self.chat.last, drafts=self.chat.drafts))}[/]", soft_wrap=True)

    # ------------------------------------------------------------------ commands

    def _command(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        name = {"/clear": "/reset", "/quit": "/exit", "/?": "/help"}.get(name, name)
        if name not in self._commands:
            raise ArgumentError(f"there is no command {name}; /help lists them, and // begins a message with a slash")
        self._commands[name][2](argument.strip())

    def _help(self, _: str) -> None:
        for name, (argument, what, _run) in self._commands.items():
            self.out.print(f"{escape(f'{name} {argument}'):14} {what}")
        self.out.print(
            "A line that ends in \\ goes on in the next one; a message that begins with / is written with //."
        )

    def _stats(self, _: str) -> None:
        chat, llm = self.chat, self.chat.llm
        table = _table("This conversation")
        table.add_column("")
        table.add_column("", justify="right")
        for name, value in _totals(chat.total, drafts=chat.drafts):
            table.add_row(name, value)
        table.add_section()
        table.add_row("messages", f"{len(chat.messages):,}")
        table.add_row("context in use", f"{llm.n_tokens:,} of {llm.n_ctx():,} tokens")
        if isinstance(llm, DFlashLlama):
            m, held = llm.mirror, llm.mirror.positions
            span = f" ({held[0]:,} to {held[-1]:,})" if len(held) else ""
            table.add_row(
                "mirror",
                f"{m.dtype}, {m.cap:,} rows x {m.row_nbytes:,} B = {format_bytes(m.nbytes)} on {m.device.name}",
            )
            table.add_row("positions held", f"{len(held):,}{span}")
            table.add_row("draft window", f"{llm.draft_window:,}")
        self.out.print(table)

    def _reset(self, _: str) -> None:
        self.chat.reset()
        self.err.print("[dim](the conversation is forgotten)[/]", soft_wrap=True)

    def _save(self, name: str) -> None:
        path = self._path("/save", name)
        save_session(self.chat, path)
        self.err.print(f"[dim](saved to {escape(str(path))}, {format_bytes(path.stat().st_size)})[/]", soft_wrap=True)

    def _load(self, name: str) -> None:
        path = self._path("/load", name)
        load_session(self.chat, path)
        n = sum(m["role"] != SYSTEM for m in self.chat.messages)
        self.err.print(
            f"[dim](loaded {escape(str(path))}: {n} messages, {self.chat.llm.n_tokens:,} tokens)[/]", soft_wrap=True
        )

    def _exit(self, _: str) -> None:
        raise _Leave

    def _path(self, command: str, name: str) -> Path:
        if not name:
            raise ArgumentError(f"{command} needs a file name")
        return Path(name).expanduser()


def stats_line(s: AnswerStats, *, drafts: bool) -> str:
    """One answer's statistics in a line."""
    parts = [f"{s.tokens:,} tokens", f"{s.decode_tok_s:.1f} tok/s"]
    if drafts:
        parts += [f"tau {s.tau:.2f}", f"acceptance {s.acceptance:.1%} of {s.proposed:,} drafted"]
    prompt = f"prompt {s.prompt_tokens:,} tokens, {s.reused:,} of them reused, {s.prefill_tok_s:.1f} tok/s"
    return f"[{', '.join(parts)}; {prompt}]"


def _totals(s: AnswerStats, *, drafts: bool) -> list[tuple[str, str]]:
    rows = [
        ("answers", f"{s.answers:,}"),
        ("tokens generated", f"{s.tokens:,}"),
        ("tok/s", f"{s.decode_tok_s:.1f}"),
        ("prompt tokens evaluated", f"{s.prompt_tokens - s.reused:,}"),
        ("prompt tok/s", f"{s.prefill_tok_s:.1f}"),
    ]
    if drafts:
        rows += [
            ("draft steps", f"{s.draft_steps:,}"),
            ("tau", f"{s.tau:.2f}"),
            ("acceptance", f"{s.acceptance:.1%} ({s.accepted:,} of {s.proposed:,})"),
        ]
    return rows


class _Leave(Exception):
    pass


class _Interruptible:
    """Ctrl-C while an answer is made. Once it has begun, it ends between two pieces; before that, and at a second time, at once.

    Attributes:
        begun, done: set by the user of this object; what is left to do then is short, and is not interrupted.
        asked: Ctrl-C was pressed.
    """

    begun = done = asked = _raised = False

    def __enter__(self) -> _Interruptible:
        self._previous: Any = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        at_once = self.asked or not self.begun
        self.asked = True
        if at_once and not (self.done or self._raised):
            self._raised = True
            raise KeyboardInterrupt
