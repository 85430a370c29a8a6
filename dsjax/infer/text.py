"""Tokens as text while they come: whole characters only, up to a stop string."""

from collections import deque
from collections.abc import Iterable, Sequence

from dsjax.data.tokenizer import Detokenizer, Tokenizer
from dsjax.infer.requests import Request, Sampled


class Text:
    """The text of one request. What may become a stop string is held back until it is known not to be one."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, keep_stop: bool = False, skip_special: bool = True
    ):
        self._detokenizer = Detokenizer(tokenizer, skip_special)
        self._stop, self._keep = [s for s in stop if s], keep_stop
        self._held = ""
        self.stopped: str | None = None  # the stop string that came

    def follow(self, request: Request) -> deque[str]:
        """The pieces of a request's text, as they come from now on; a stop string ends it."""
        pieces: deque[str] = deque()

        def tell(said: list[Sampled]) -> bool:
            pieces.append(self.push(one.token for one in said if one.token not in request.stop_ids))
            return self.stopped is not None

        request.tell = tell
        return pieces

    def push(self, ids: Iterable[int]) -> str:
        """What is certain now; nothing more once a stop string came."""
        return self._certain("".join(map(self._detokenizer.push, ids)))

    def end(self) -> str:
        """What was held back, when no token follows."""
        text = self._certain(self._detokenizer.end()) + ("" if self.stopped is not None else self._held)
        self._held = ""
        return text

    def _certain(self, more: str) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + more
        found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, at, self.stopped = min(found)  # the one that is whole first; of two, the longer
            self._held = ""
            return text[: end if self._keep else at]
        hold = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]
