"""Many prompts from a file to a file: `dsjax generate MODEL --batch prompts.jsonl --out texts.jsonl`.

A line of the input is an object with `prompt`, or with `messages` for the chat template, and, if it likes, fields of
its own request (max_tokens, temperature, top_p, top_k, min_p, seed, stop). A line of the output has the number of its
line in the input. What is in the output already is not done again: a run that was ended goes on.
"""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from dsjax.config import ConfigError, EngineConfig, show
from dsjax.data.tokenizer import Tokenizer
from dsjax.files import write_text
from dsjax.hub.chat import ChatTemplate
from dsjax.hub.load import Loaded
from dsjax.infer.engine import Engine
from dsjax.infer.requests import Request
from dsjax.infer.text import Text

_FIELDS = {
    "max_tokens": int,
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": int,
    "min_p": (int, float),
    "seed": int,
}


def run_batch(
    loaded: Loaded,
    prompts: Path,
    out: Path,
    options: EngineConfig,
    defaults: dict[str, Any],
    *,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Continues every prompt that `out` does not hold yet, and returns their number; `out` is in order at the end.

    defaults: fields of Request for lines that do not set them; line n's seed is the default plus n. Raises ConfigError,
    with its number, for a line that cannot be done, before anything is.
    """
    with jax.set_mesh(loaded.mesh):
        engine = Engine(loaded, options)
        template = functools.cache(lambda: ChatTemplate.load(loaded.folder))
        done, todo = _done(out), []
        for n, where, record in _records(prompts):
            if n in done:
                continue
            request, text = _request(
                loaded.tokenizer, template, record, where, defaults | {"seed": defaults.get("seed", 0) + n}
            )
            try:
                request.check(engine.cfg.vocab_size, engine.longest)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
            todo.append((n, record, request, text))
        if done:
            say(f"{out}: {len(done)} are there already; {len(todo)} are left")
        _write(out, done)  # without a line that was cut off
        with (
            out.open("a", encoding="utf-8") as file,
            tqdm(total=len(todo), desc="prompts", disable=not progress, leave=False) as bar,
        ):
            for n, record, request, text in todo:
                pieces = text.follow(request)

                def finish(reason, n=n, record=record, request=request, text=text, pieces=pieces):
                    line = {
                        "line": n,
                        **({"id": record["id"]} if "id" in record else {}),
                        "text": "".join(pieces) + text.end(),
                        "finish_reason": reason,
                        "prompt_tokens": len(request.prompt),
                        "completion_tokens": request.n_new,
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                    bar.update()

                request.done = finish
                engine.submit(request)
            engine.run()
    _write(out, _done(out))
    return len(todo)


def _records(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Number, place and content of each line that is not empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from None
    for n, line in enumerate(text.splitlines(), 1):
        where = f"{path}: line {n}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
            raise ConfigError(f"{where}: expected an object with prompt or with messages")
        yield n, where, record


def _request(
    tokenizer: Tokenizer,
    template: Callable[[], ChatTemplate],
    record: dict[str, Any],
    where: str,
    defaults: dict[str, Any],
) -> tuple[Request, Text]:
    given = {}
    for name, kind in _FIELDS.items():
        if name in record:
            if not isinstance(record[name], kind) or isinstance(record[name], bool):
                raise ConfigError(f"{where}: {name}={show(record[name])}: expected a number")
            given[name] = record[name]
    stop = record.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) for s in stop):
        raise ConfigError(f"{where}: stop={show(stop)}: expected a text or a list of texts")
    if "messages" in record:
        try:
            tokens = tokenizer.encode_rendered(template().render(record["messages"]))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    elif isinstance(record["prompt"], str):
        tokens = [tokenizer.bos_id, *tokenizer.encode(record["prompt"])]
    else:
        raise ConfigError(f"{where}: prompt={show(record['prompt'])}: expected a text")
    return Request(tokens, stop_ids=tokenizer.eos_ids, **defaults | given), Text(tokenizer, stop)


def _done(out: Path) -> dict[int, dict[str, Any]]:
    """The output's lines by their number; a last one that a kill cut off is as if it were not there.

    Raises ConfigError for a file that is something else.
    """
    found = {}
    lines = out.read_text(encoding="utf-8", errors="replace").splitlines() if out.is_file() else []
    for n, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict) and isinstance(value.get("line"), int):
            found[value["line"]] = value
        elif n < len(lines) or value is not None:
            raise ConfigError(f"{out}: line {n}: not one that this command wrote; expected a new file, or its own")
    return found


def _write(out: Path, lines: dict[int, dict[str, Any]]) -> None:
    write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for _, line in sorted(lines.items())))
