"""The chat formats a recipe may ask for by name, as jinja templates.

Each writes the format its publisher documents (trim_blocks and lstrip_blocks on, as chat templates are
rendered everywhere). Where mergekit's template of that name strays from it, this one does not.
"""

from __future__ import annotations

__all__ = ["CHAT_FORMATS"]

_CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_LLAMA3 = """\
{{ bos_token }}
{%- for message in messages %}
{{ '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim ~ '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_MISTRAL = """\
{% set turns = namespace(system='', expected='user') %}
{{ bos_token }}
{%- for message in messages %}
{% if loop.first and message['role'] == 'system' %}
{% set turns.system = message['content'] ~ '\\n\\n' %}
{% elif message['role'] != turns.expected %}
{{ raise_exception('user and assistant must take turns after an optional system message') }}
{%- elif message['role'] == 'user' %}
{{ ' [INST] ' ~ turns.system ~ message['content'] ~ ' [/INST]' }}
{%- set turns.system = '' %}
{% set turns.expected = 'assistant' %}
{% else %}
{{ ' ' ~ message['content'] ~ eos_token }}
{%- set turns.expected = 'user' %}
{% endif %}
{% endfor %}
"""

_ALPACA = """\
{% for message in messages %}
{% if message['role'] == 'system' %}
{{ message['content'] | trim ~ '\\n\\n' }}
{%- elif message['role'] == 'user' %}
{{ '### Instruction:\\n' ~ message['content'] | trim ~ '\\n\\n' }}
{%- else %}
{{ '### Response:\\n' ~ message['content'] | trim ~ eos_token ~ '\\n\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '### Response:\\n' }}
{%- endif %}
"""

_EXAONE = """\
{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '[|system|][|endofturn|]\\n' }}
{%- endif %}
{{ '[|' ~ message['role'] ~ '|]' ~ message['content'] }}
{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '[|assistant|]' }}
{%- endif %}
"""

CHAT_FORMATS = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
"""Template by name."""
