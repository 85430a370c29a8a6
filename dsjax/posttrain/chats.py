"""Chats as a model learns them: tokens, and which of them it is to say itself.

    render_record({"messages": [...]}, template, tokenizer)                    # [Chat(tokens, learned)], mostly one
    render_record({"prompt": "2 + 2 =", "completion": " 4"}, None, tokenizer)  # bos, prompt, completion, eos

What is learned is what the model is to say behind the prompt that `dsjax generate --chat` makes of the messages before:
the prompt is rendered, the messages with the answer are rendered, and the answer is what is new. Where a template
writes turns in another way once they are past (DeepSeek-R1's drops their reasoning), no row can hold all of them as
they were said, and each becomes a row of its own.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dsjax.config import Config, ConfigError, DataConfig, show
from dsjax.data.chats import Chat, keep_chats
from dsjax.data.corpus import Corpus, heldout_score, read_facts
from dsjax.data.documents import TokenizedDocuments
from dsjax.data.sources import BadInput, read_records, source_files
from dsjax.data.tokenizer import NAMES, Tokenizer
from dsjax.hub.chat import REASONING, ChatTemplate, has_template
from dsjax.hub.files import HubError

ROLES = ("system", "user", "assistant", "tool")
COMPLETION = ("completion", "answer", "response")  # names of one field
THINK = tuple(zip(NAMES["think"], NAMES["end_think"]))
Message = Mapping[str, Any]


def render_record(
    record: Mapping[str, Any],
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    *,
    learn: str = "assistant",
    place: str = "record",
) -> list[Chat]:
    """The conversations of a record {"messages", "tools", "chat_template_kwargs"} or {"prompt", "completion"}.

    Raises BadInput, which names the place and the field, for a record that is none; ConfigError for messages without a
    template.
    """
    if "messages" not in record:
        return [_pair(record, tokenizer, place)]
    messages = _checked(record["messages"], place)
    variables = record.get("chat_template_kwargs") or {}
    if not isinstance(variables, Mapping):
        raise BadInput(place, "bad record", f"chat_template_kwargs={show(variables)}: expected an object")
    if template is None:
        raise ConfigError(f"{place}: messages, and the model's folder has no chat template; expected --template=FILE")
    reserved = ("messages", "add_generation_prompt", "learn")
    variables = {"tools": record.get("tools") or None} | {k: v for k, v in variables.items() if k not in reserved}
    try:
        return render_chat(messages, template, tokenizer, learn=learn, **variables)
    except HubError as error:
        raise BadInput(place, "not rendered", str(error)) from None


def render_chat(
    messages: list[Message], template: ChatTemplate, tokenizer: Tokenizer, /, learn: str = "assistant", **variables
) -> list[Chat]:
    """Messages as rows in which every turn of the assistant is learned once, to its end of text; or its last turn.

    A turn with "weight": 0 is context only. A template with {% generation %} says itself what is learned. Raises
    HubError for messages that the template does not take, and where what the assistant says cannot be told.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [i for i in (turns if learn == "assistant" else turns[-1:]) if messages[i].get("weight", 1)]
    if not wanted:
        raise HubError("messages: no turn of the assistant to learn; expected one without weight 0")
    if template.marks:
        return [_marked(messages, [i in wanted for i in turns], template, tokenizer, variables)]
    rows: list[list[tuple[str, bool]]] = []
    text = ""  # of the last row
    for i in wanted:
        prompt, said = _turn(messages, i, template, variables)
        if rows and prompt.startswith(text):
            rows[-1].append((prompt[len(text) :], False))
        else:
            rows.append([(prompt, False)])
        rows[-1].append((said, True))
        text = prompt + said
    return [_chat(pieces, tokenizer, ends=True) for pieces in rows]


def _turn(messages: list[Message], i: int, template: ChatTemplate, variables: dict) -> tuple[str, str]:
    """The prompt of the assistant's turn, and what it says: its reasoning, too, where the template leaves that out."""

    def written(message: Message) -> str:
        return template.render([*messages[:i], message], add_generation_prompt=False, **variables)

    prompt, whole = template.render(messages[:i], **variables), written(messages[i])
    content = messages[i].get("content") or ""
    reasoning = next((messages[i][name] for name in REASONING if messages[i].get(name)), None)
    begin, end = next((pair for pair in THINK if pair[0] in prompt or pair[1] in content), THINK[0])
    inside, is_inside, _ = content.rpartition(end)  # reasoning as part of the content, as R1 writes it
    opened = re.search(re.escape(begin) + r"(\s*)$", prompt)
    if whole.startswith(prompt):
        said = whole[len(prompt) :]
        without = {name: value for name, value in messages[i].items() if name not in REASONING}
        if is_inside and end not in said:
            said = inside + end + said
        elif reasoning and whole == written(without):  # the template has no place for it
            said = f"{begin}\n{_trimmed(reasoning)}\n{end}\n\n{said}"
        if opened is not None and said.startswith(begin):  # the prompt has said that already
            said = said.removeprefix(begin).removeprefix(opened[1])
        return prompt, said
    if opened is None or not whole.startswith(prompt[: opened.start()]):
        tail = show(prompt[-40:])
        raise HubError(
            f"messages[{i}]: what the assistant says cannot be told, as {template.where} begins its turn with other "
            f"text than its prompt ends with ({tail}); expected {{% generation %}} around it in the template"
        )
    # The prompt has begun the reasoning.
    said, gap = whole[opened.start() :].removeprefix(end), opened[1]
    if end in said:
        said = said.removeprefix(begin).removeprefix(gap)
    elif is_inside:
        said = inside.removeprefix(begin).removeprefix(gap) + end + said
    else:
        said = _trimmed(reasoning or "") + gap + end + 2 * gap + said
    return prompt, said


def _marked(
    messages: list[Message], wanted: list[bool], template: ChatTemplate, tokenizer: Tokenizer, variables: dict
) -> Chat:
    pieces = template.render_marked(messages, **variables)
    marks = [k for k, (_, learned) in enumerate(pieces) if learned]
    if not all(wanted):
        if len(marks) != len(wanted):
            raise HubError(
                f"{template.where}: {len(marks)} {{% generation %}} parts for {len(wanted)} turns of the assistant; "
                "expected one each, where some turns are not to be learned"
            )
        pieces = [(text, learned and wanted[marks.index(k)]) for k, (text, learned) in enumerate(pieces)]
    chat = _chat(pieces, tokenizer, ends=False)
    if not chat.learned[1:].any():
        raise HubError(f"{template.where}: nothing of these messages is between {{% generation %}} and its end")
    return chat


def _chat(pieces: list[tuple[str, bool]], tokenizer: Tokenizer, ends: bool) -> Chat:
    """The conversation of pieces of a rendered text. ends: what is learned is so up to an end of text, which is put
    behind the last piece where there is none."""
    tokens, learned = [], []
    for ids, (_, is_learned) in zip(tokenizer.encode_pieces([text for text, _ in pieces]), pieces):
        stops = [k for k, id in enumerate(ids, 1) if id in tokenizer.eos_ids]
        n = (stops[-1] if ends and stops else len(ids)) if is_learned else 0
        tokens += ids
        learned += [True] * n + [False] * (len(ids) - n)
    if ends and not any(id in tokenizer.eos_ids for id in ids):
        tokens, learned = [*tokens, tokenizer.eos_id], [*learned, True]
    return Chat(np.array(tokens, np.int32), np.array(learned, bool))


def _pair(record: Mapping[str, Any], tokenizer: Tokenizer, place: str) -> Chat:
    name = next((name for name in COMPLETION if name in record), None)
    if "prompt" not in record or name is None:
        fields = ", ".join(show(field) for field in list(record)[:8]) or "none"
        raise BadInput(
            place, "bad record", f"expected messages, or prompt and {' or '.join(COMPLETION)}; its fields: {fields}"
        )
    prompt, completion = (record[field] for field in ("prompt", name))
    for field, text in (("prompt", prompt), (name, completion)):
        if not isinstance(text, str):
            raise BadInput(place, "bad record", f"{field}={show(text)}: expected a text")
    if not completion.strip():
        raise BadInput(place, "empty answer", f"{name}={show(completion)}: expected a text that is not empty")
    before = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    said = tokenizer.encode_rendered(completion)  # <think> in it is a token, as the model says it
    if not set(said[-1:]) & set(tokenizer.eos_ids):
        said.append(tokenizer.eos_id)
    return Chat(np.array(before + said, np.int32), np.arange(len(before + said)) >= len(before))


def _checked(messages: Any, place: str) -> list[Message]:
    """Messages that a template can take, and that have something to learn. Raises BadInput."""

    def bad(reason: str, detail: str) -> BadInput:
        return BadInput(place, reason, f"messages{detail}")

    if not isinstance(messages, list) or not messages:
        raise bad("bad record", f"={show(messages)}: expected a list of one or more")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise bad("bad record", f'[{i}]={show(message)}: expected {{"role": ..., "content": ...}}')
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise bad("bad role", f"[{i}].role={show(role)}: expected {', '.join(ROLES[:-1])} or {ROLES[-1]}")
        calls = message.get("tool_calls") if role == "assistant" else None
        if not isinstance(content, str) and not (content is None and calls):
            raise bad("bad record", f"[{i}].content={show(content)}: expected a text")
        context = message.get("weight", 1) == 0
        if role == "assistant" and not (content or "").strip() and not calls and not context:
            raise bad("empty answer", f"[{i}].content={show(content)}: expected a text that is not empty")
        for name in REASONING:
            if not isinstance(message.get(name), str | None):
                raise bad("bad record", f"[{i}].{name}={show(message[name])}: expected a text")
        if message.get("weight", 1) not in (0, 1):
            raise bad("bad record", f"[{i}].weight={show(message['weight'])}: expected 0 or 1")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not any(messages[i].get("weight", 1) for i in turns):
        raise bad("no answer", ": no turn of the assistant to learn; expected one or more")
    if turns[0] == 0 and messages[0].get("weight", 1):
        raise bad("bad record", "[0].role=assistant: expected a message before the assistant's first, or weight 0")
    return messages


def _trimmed(text: str) -> str:
    return text.strip("\n")


def read_chats(
    data: DataConfig, seq_len: int, template: ChatTemplate | None, tokenizer: Tokenizer, skipped: Counter
) -> Iterator[tuple[float, list[Chat], float]]:
    """(score, conversations, weight) of every record of data.sources. A record is held out where its score, a number in
    [0, 1) that its problem decides (what stands before the last answer), is below data.heldout_fraction.

    Conversations of more than seq_len tokens are left out and counted, never cut. Raises ConfigError as read_documents.
    """

    def parse(record: dict, place: str) -> tuple[float, list[Chat]]:
        chats = render_record(record, template, tokenizer, learn=data.learn, place=place)
        return heldout_score(_problem(record)), chats

    for (score, chats), weight in read_records(data, parse, skipped):
        fitting = [chat for chat in chats if len(chat.tokens) <= seq_len]
        if len(fitting) < len(chats):
            skipped[f"longer than {seq_len:,} tokens"] += len(chats) - len(fitting)
        if fitting:
            yield score, fitting, weight


def _problem(record: Mapping[str, Any]) -> str:
    """What a record answers: its prompt, or the messages before the assistant's last; all of it where that is empty."""
    messages = record.get("messages", ())
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    problem = messages[: turns[-1]] if turns else record["prompt"]
    return json.dumps(problem or record, sort_keys=True, ensure_ascii=False)


def put_chats(config: Config, folder: Path, *, progress: bool = False) -> None:
    """Renders the conversations of data.sources into a run folder, with the tokenizer and template that lie there; does
    nothing where they are there already.

    Raises ConfigError for records that are none, and where there are not two conversations that fit in a row.
    """
    data = config.data
    fingerprint = fingerprint_of(config, folder)
    if read_facts(folder / "data", fingerprint) is not None:
        return
    tokenizer, template = Tokenizer.load(folder), load_template(folder)
    facts = {
        "sha256": fingerprint,
        "sources": list(data.sources),
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
    }
    limit = data.heldout_fraction
    for _ in range(2):
        skipped, scores, weight = Counter(), [], 0.0

        def parts(skipped=skipped, scores=scores, limit=limit):
            nonlocal weight
            records = read_chats(data, config.seq_len, template, tokenizer, skipped)
            for score, chats, times in tqdm(records, desc="Render", unit=" chats", disable=not progress):
                scores.append(score)
                weight += times * (score >= limit)
                yield from (("heldout" if score < limit else "train", chat, times) for chat in chats)

        counts = keep_chats(parts(), folder / "data", fingerprint, facts | {"skipped": skipped})
        names = ",".join(data.sources)
        if not scores:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items()) or "nothing there"
            raise ConfigError(f"data.sources={names}: no conversations in them ({reasons})")
        if min(scores) == max(scores):
            raise ConfigError(
                f"data.sources={names}: one problem; expected two or more, as one is held out with its answers"
            )
        if all(count["documents"] for count in counts.values()):
            break
        limit = max(scores) if counts["heldout"]["documents"] else np.nextafter(min(scores), 1)  # the nearest moves
    if weight < 1:
        (folder / "data" / "facts.json").unlink()
        raise ConfigError(f"data.sources={names}: the weights leave less than one conversation in an epoch")


def fingerprint_of(config: Config, folder: Path) -> str:
    """What decides a run's conversations: records, tokenizer, template, and settings."""
    data, sha = config.data, hashlib.sha256()
    for path, weight in source_files(data):
        with open(path, "rb") as file:
            sha.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()} {weight}\n".encode())
    template = load_template(folder)
    sha.update(f"{data.learn} {data.heldout_fraction} {config.seq_len} held out by problem\n".encode())
    sha.update(f"{template and (template.source, sorted(template.tokens.items()))}\n".encode())
    sha.update(Tokenizer.load(folder).dumps().encode())
    return sha.hexdigest()


def whole_chats(config: Config, folder: Path) -> Corpus:
    """All conversations of data.sources as held-out ones, rendered as the run in `folder` does; nothing is written."""
    data, tokenizer, skipped = config.data, Tokenizer.load(folder), Counter()
    records = read_chats(data, config.seq_len, load_template(folder), tokenizer, skipped)
    chats = [chat for _, chats, _ in records for chat in chats]
    if not chats:
        raise ConfigError(f"data.sources={','.join(data.sources)}: no conversations in them")
    tokens, learned = (np.concatenate([getattr(chat, name) for chat in chats]) for name in ("tokens", "learned"))
    lengths = np.array([len(chat.tokens) for chat in chats], np.int64)
    documents = TokenizedDocuments(tokens, lengths, np.ones(len(chats)), learned)
    counts = {"documents": len(chats), "tokens": len(tokens), "learned": int(learned.sum())}
    return Corpus(tokenizer, documents, documents, b"", {"heldout": counts, "skipped": dict(skipped)})


def load_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a folder, None where it has none. Raises HubError for a damaged one."""
    return ChatTemplate.load(folder) if has_template(folder) else None
