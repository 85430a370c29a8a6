"""What a model wrote, taken apart: reasoning, content and tool calls, whole or while it comes.

DeepSeek-R1 and V3.1 put their reasoning before </think>; the chat template may have begun it in the prompt. Calls of
tools stand behind the content, in V3's format or in V3.1's (reference section 10.5, and the released templates).
"""

import json
import re
import uuid
from dataclasses import dataclass, field

THINK, END_THINK = "<think>", "</think>"
CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEP, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_CALL = re.compile(f"{CALL}(.*?){SEP}(.*?){END_CALL}", re.DOTALL)
_V3_ARGUMENTS = re.compile(r"\s*(?P<name>[^\n`]+?)\s*```json\s*(?P<arguments>.*?)\s*```\s*", re.DOTALL)


@dataclass
class ToolCall:
    name: str
    arguments: str  # JSON, as the model wrote it
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass
class Piece:
    """What more there is of an answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class Answer:
    """Takes text as it comes. thinking: the prompt ended inside the reasoning. tools: calls are looked for."""

    def __init__(self, thinking: bool = False, tools: bool = False):
        self.reasoning, self.content, self.calls = "", "", []
        self._state = "reasoning" if thinking else "start"
        self._tools, self._held = tools, ""
        self._fresh = thinking  # white space before the first word of a part is left out

    @property
    def thinking(self) -> bool:
        """The next text belongs to the reasoning."""
        return self._state == "reasoning"

    def push(self, text: str) -> Piece:
        return self._take(text, last=False)

    def end(self) -> Piece:
        """What was held back."""
        return self._take("", last=True)

    def _take(self, text: str, last: bool) -> Piece:
        self._held += text
        piece = Piece()
        while self._step(piece, last):
            pass
        self.reasoning += piece.reasoning
        self.content += piece.content
        self.calls += piece.calls
        return piece

    def _step(self, piece: Piece, last: bool) -> bool:
        """One thing more of what is held; False if more text is needed."""
        if self._state == "start":  # a model that opens its reasoning itself
            text = self._held.lstrip()
            if text.startswith(THINK):
                self._held, self._state, self._fresh = text[len(THINK) :], "reasoning", True
                return True
            if not last and THINK.startswith(text):
                return False
            self._state = "content"
            return True
        if self._state == "calls":
            return self._call(piece, last)
        end = {"reasoning": END_THINK, "content": CALLS if self._tools else None}[self._state]
        if self._fresh:
            self._held = self._held.lstrip()
            self._fresh = not self._held
        before, found, behind = self._held.partition(end) if end else (self._held, "", "")
        if not found and end and not last:
            hold = max((n for n in range(1, len(end)) if before.endswith(end[:n])), default=0)
            before, behind = before[: len(before) - hold], before[len(before) - hold :]
        if self._state == "reasoning":
            piece.reasoning += before
        else:
            piece.content += before
        self._held = behind
        if found:
            self._state, self._fresh = ("content", True) if self._state == "reasoning" else ("calls", False)
        return bool(found)

    def _call(self, piece: Piece, last: bool) -> bool:
        match = _CALL.search(self._held)
        if match is not None:
            self._held = self._held[match.end() :]
            piece.calls.append(_parsed(*match.groups()))
            return True
        if last and self._held.replace(END_CALLS, "").strip():
            piece.content += self._held  # cut off, or no call at all: nothing of it is lost
        if last:
            self._held = ""
        return False


def _parsed(kind: str, rest: str) -> ToolCall:
    """V3: `function`, then the name and a block of JSON; V3.1: the name, then JSON."""
    if kind.strip() == "function" and (v3 := _V3_ARGUMENTS.fullmatch(rest)):
        return ToolCall(v3["name"], v3["arguments"])
    return ToolCall(kind.strip(), rest.strip())


def arguments_problem(call: ToolCall) -> str | None:
    """Why the arguments are not a JSON object, if they are not."""
    try:
        value = json.loads(call.arguments)
    except ValueError as error:
        return str(error)
    return None if isinstance(value, dict) else f"expected an object, got a {type(value).__name__}"
