"""Chat templates give what transformers gives, and nothing else: no effects, no endless work."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from mergelab.data.chat import chat_text, render_chat
from mergelab.data.chat_sandbox import Budget
from mergelab.data.tokenizer import Tokenizer
from mergelab.errors import ChatTemplateError

MESSAGES = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": "{{ 7 * 7 }} é"},
    {"role": "assistant", "content": "49?"},
    {"role": "user", "content": "yes\n"},
]
TEMPLATE = """\
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif -%}
{%- for message in messages if message['role'] != 'system' %}
    {%- if loop.index > 2 %}{% break %}{% endif %}
    {{- '<' ~ message.role | upper ~ '>' + message['content'].strip() }}
    {%- generation %}{{ eos_token }}{% endgeneration %}
{% endfor %}
{%- set state = namespace(count=0) %}
{%- macro note(text) %}[{{ text }}|{{ caller() if caller else '' }}]{% endmacro %}
{%- for message in messages %}{% set state.count = state.count + 1 %}{% endfor %}
{{- note(state.count) }}{% call note('x') %}in{% endcall %}
{{- messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('/') }}
{{- messages[0] | tojson }}
{%- if add_generation_prompt %}<ASSISTANT>{% endif %}
"""
EXPECTED = (
    "<USER>{{ 7 * 7 }} é</s><ASSISTANT>49?</s>[4|][x|in]{{ 7 * 7 }} é/yes\n"
    '{"role": "system", "content": "Be <brief>."}<ASSISTANT>'
)


def test_a_template_of_every_feature_renders() -> None:
    assert render_chat(TEMPLATE, MESSAGES, eos_token="</s>") == EXPECTED
    plain = render_chat(TEMPLATE, MESSAGES, eos_token="</s>", add_generation_prompt=False)
    assert plain == EXPECTED.removesuffix("<ASSISTANT>")


@pytest.mark.oracle
def test_transformers_renders_the_same() -> None:
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    for tools in (None, [{"type": "function", "function": {"name": "f<>"}}]):
        theirs, _ = render_jinja_template(
            [MESSAGES], tools=tools, chat_template=TEMPLATE, add_generation_prompt=True, eos_token="</s>"
        )
        assert render_chat(TEMPLATE, MESSAGES, eos_token="</s>", tools=tools) == theirs[0]


def test_the_time_is_the_callers() -> None:
    template = "{{ strftime_now('%d %b %Y') }}"
    assert render_chat(template, [], now=datetime(2024, 7, 26)) == "26 Jul 2024"
    assert render_chat(template, []) == datetime.now().strftime("%d %b %Y")


def test_a_tokenizer_brings_its_templates_and_special_tokens() -> None:
    templates = {"default": "{{ bos_token }}{{ messages[0].content }}", "tool_use": "T"}
    backend = Backend(models.WordLevel({"a": 0}, "a"))
    tokenizer = Tokenizer(backend, {"bos_token": "<s>"}, (), templates, Path("folder"))
    assert chat_text(tokenizer, MESSAGES[:1]) == "<s>Be <brief>."
    assert chat_text(tokenizer, MESSAGES, template="tool_use") == "T"
    with pytest.raises(ChatTemplateError, match=r"no chat template 'tooluse' \(did you mean 'tool_use'\?\)"):
        chat_text(tokenizer, MESSAGES, template="tooluse")


GROW = "{%% set n = namespace(x=%s) %%}{%% for i in range(60) %%}%s{%% set n.x = %s %%}{%% endfor %%}%s"
HOSTILE = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loop": "{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(80) }}",
    "concatenation": GROW % ("'ab'", "", "n.x ~ n.x", ""),
    "sum": GROW % ("['ab']", "", "n.x + n.x", ""),
    "captured block": GROW % ("'ab'", "{% set y %}{{ n.x }}{{ n.x }}{% endset %}", "y", ""),
    "nesting": GROW % ("['a']", "", "[n.x, n.x]", "{{ n.x }}"),
    "nested json": GROW % ("['a']", "", "[n.x, n.x]", "{{ n.x | tojson }}"),
    "squares": GROW % ("3", "", "n.x * n.x", ""),
    "product": "{{ 'a' * 10**12 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "width": "{{ 'a'.center(10**12) }}",
    "percent width": "{{ '%1000000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**12, 1) }}",
    "format width": "{{ '{:1000000000000}'.format(1) }}",
    "format argument": "{{ '{:{w}}'.format(1, w=10**12) }}",
    "replace": "{% set a = 'a' * 9000000 %}{{ a.replace('a', a) | length }}",
    "replace filter": "{% set a = 'a' * 9000000 %}{{ a | replace('a', a) | length }}",
    "join": "{% set a = 'a' * 9000000 %}{{ a.join(range(9000) | map('string')) | length }}",
    "join filter": "{{ range(9000) | list | join('a' * 9000000) | length }}",
    "indent": "{% set a = 'a\n' * 900000 %}{{ a | indent(1000000) | length }}",
    "long output": "{% for i in range(99999) %}" + "x" * 10_000 + "{% endfor %}",
}
FORBIDDEN = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "formatted classes": "{{ '{0.__class__}'.format(messages) }}!{{ ''.__class__.x }}",
    "functions": "{{ raise_exception.__globals__.x }}",
    "environment": "{{ self._TemplateReference__context.environment.budget }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "attr filter": "{{ '' | attr('__class__') }}",
    "syntax": "{% for %}",
    "depth": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "division": "{{ 1 / 0 }}",
    "refusal": "{{ raise_exception('roles must alternate') }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_work_and_memory_are_bounded(name: str) -> None:
    begun = time.process_time()
    with pytest.raises(ChatTemplateError, match=r"does not end|more than \d+ characters"):
        render_chat(HOSTILE[name], MESSAGES, budget=Budget(steps=5_000, elements=50_000))
    assert time.process_time() - begun < 5


def test_the_bounds_leave_room_for_real_conversations() -> None:
    long = [{"role": "user", "content": "word " * 20_000}, {"role": "assistant", "content": "ok"}] * 20
    template = "{% for m in messages %}{{ '<' ~ m.role ~ '>' + m.content | trim }}{% endfor %}"
    assert len(render_chat(template, long)) > 1_900_000


@pytest.mark.parametrize("name", FORBIDDEN)
def test_templates_cannot_reach_out_and_their_faults_are_told(name: str) -> None:
    with pytest.raises(ChatTemplateError, match="the chat template"):
        render_chat(FORBIDDEN[name], MESSAGES)
    assert MESSAGES[-1]["content"] == "yes\n"
    if name == "refusal":
        with pytest.raises(ChatTemplateError, match="refuses these messages: roles must alternate"):
            render_chat(FORBIDDEN[name], MESSAGES)
