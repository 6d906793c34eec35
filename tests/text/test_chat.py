"""Chat templates give what transformers gives, and nothing else: no effects, no endless work."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from mergelab.errors import ChatTemplateError
from mergelab.text import chat_sandbox
from mergelab.text.chat import chat_text, render_chat
from mergelab.text.chat_sandbox import Budget
from mergelab.text.tokenizer import Tokenizer

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
    zone = timezone(timedelta(hours=2), "CEST")
    moment = datetime(2024, 7, 26, 1, tzinfo=zone)
    assert render_chat("{{ strftime_now('%H %Z %z') }}", [], now=moment) == "01 CEST +0200"


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
    import resource

    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ChatTemplateError, match=r"does not end|more than \d+ (characters|MB)|too deeply"):
        render_chat(HOSTILE[name], MESSAGES, budget=Budget(seconds=0.1, memory=300_000_000))
    assert time.monotonic() - begun < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB; nothing is made here


ODD = {
    "infinity": ("{{ 1e999 }}", "inf"),
    "sorted list": ("{{ messages | dictsort }}", "AttributeError"),
    "nested loops": ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "too many statically nested blocks"),
    "long number": ("{{ " + "1" * 5000 + " }}", "Exceeds the limit"),
    "endless range": ("{{ range(10**12) }}", "Range too big"),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
    "unary": ("{{ " + "-" * 50_000 + "1 }}", "nested too deeply"),
    "sum": ("{{ 1" + "+1" * 20_000 + " }}", "nested too deeply"),
    "surrogate": ("{{ '\\ud800'.encode() }}", "UnicodeEncodeError"),
    "lone surrogate": ("\ud800", "\ud800"),
    "random words": ("{{ lipsum() }}", "'lipsum' is undefined"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_templates_render_or_are_refused(name: str) -> None:
    template, expected = ODD[name]
    try:
        found = render_chat(template, MESSAGES)
    except ChatTemplateError as error:
        found = str(error)
    assert expected in found and len(found) < 1_000


def test_one_process_serves_many_templates_and_what_breaks_it_costs_only_itself() -> None:
    render_chat("a", [])
    child = chat_sandbox._workshop.child
    assert child is not None
    for number in range(20):
        assert render_chat("{{ messages[0].content }}", [{"content": str(number)}]) == str(number)
    with pytest.raises(ChatTemplateError, match="refuses"):
        render_chat("{{ raise_exception('no') }}", [])
    assert chat_sandbox._workshop.child is child
    with pytest.raises(ChatTemplateError, match="does not end"):
        render_chat(HOSTILE["loop"], [], budget=Budget(seconds=0.1))
    assert child.process.returncode is not None  # killed, and waited for
    assert render_chat("b", []) == "b"


@pytest.mark.parametrize("when", ["idle", "asked"])
def test_a_process_that_dies_is_an_error_or_is_replaced(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    render_chat("a", [])
    child = chat_sandbox._workshop.child
    assert child is not None
    if when == "idle":
        child.process.kill()
        child.process.wait()
        assert render_chat("b", []) == "b"
        return
    ask = child.ask

    def killed(line: bytes, seconds: float, longest: int) -> bytes:
        child.process.kill()
        return ask(line, seconds, longest)

    monkeypatch.setattr(child, "ask", killed)
    with pytest.raises(ChatTemplateError, match="ended the process that rendered it"):
        render_chat("b", [])
    assert child.process.returncode is not None
    assert render_chat("c", []) == "c"


def test_without_a_program_to_start_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("/nowhere/python", "", sys.executable + "\0"):
        chat_sandbox._workshop.discard()
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(ChatTemplateError, match="no process can be started"):
            render_chat("a", [])
    if true := shutil.which("true"):
        monkeypatch.setattr(sys, "executable", true)
        with pytest.raises(ChatTemplateError, match=r"did not start \(status 0\)"):
            render_chat("a", [])


def test_an_interruption_ends_the_process_and_passes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    render_chat("a", [])
    child = chat_sandbox._workshop.child
    assert child is not None
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        render_chat(HOSTILE["loop"], [])
    timer.join()
    assert time.monotonic() - begun < 2
    assert child.process.returncode is not None and chat_sandbox._workshop.child is None


def test_threads_take_turns() -> None:
    def render(number: int) -> str:
        return render_chat("{{ messages[0].content }}", [{"content": str(number)}])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(render, range(40))) == [str(number) for number in range(40)]


@pytest.mark.skipif(sys.platform != "linux", reason="facts about a process are read from Linux's /proc")
def test_the_process_sees_no_environment_and_opens_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    chat_sandbox._workshop.discard()
    render_chat("a", [])
    child = chat_sandbox._workshop.child
    assert child is not None
    facts = Path(f"/proc/{child.process.pid}")
    assert b"hunter2" not in (facts / "environ").read_bytes()
    limits = {line[:26].strip(): line[26:47].strip() for line in (facts / "limits").read_text().splitlines()}
    assert limits["Max open files"] == "3" and limits["Max file size"] == "0"
    assert int(limits["Max address space"]) == Budget().memory


class _Turn(Mapping[str, Any]):
    """A message that is not a dict."""

    def __getitem__(self, key: str) -> Any:
        return {"role": "user", "n": np.int64(3)}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("role", "n"))

    def __len__(self) -> int:
        return 2


def test_messages_are_plain_data() -> None:
    assert render_chat("{{ messages | tojson }}", [_Turn()]) == '[{"role": "user", "n": 3}]'
    itself: list[Any] = []
    itself.append(itself)
    for tools, words in (
        (b"a", "'tools': it holds a bytes"),
        ({1: 2}, "holds a dict"),
        (itself, "themselves"),
    ):
        with pytest.raises(ChatTemplateError, match=words):
            render_chat("a", [], tools=tools)


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
