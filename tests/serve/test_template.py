"""Chat templates of strangers: they render as in transformers, and neither escape nor run on."""

import json

import pytest
from tiny_models import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from elmwood.errors import BadInput
from elmwood.serve.template import read_template, render

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}\n    {%- if loop.index0 % 2 and message.role == 'user' %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}\n"
    "    {% if message.role == 'user' %}[INST] {{ message.content }} [/INST]{% else %}{{ message.content }}{{ eos_token }}{% endif %}\n"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ messages | tojson }}"
)
CHAT = [{"role": "user", "content": " hi <b> 海 "}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "so"}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("template", [CHATML, INST])
def test_templates_render_as_in_transformers(template):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), **SPECIAL)
    tokenizer.chat_template = template
    theirs = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert render(template, CHAT, SPECIAL, 0.0) == theirs


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 999999999 }}", "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "{{ 9 ** 9 ** 9 }}",
        "{{ range(999999999) | list }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__.os }}",
        "{% include '/etc/passwd' %}", "{{ raise_exception('never') }}", "{{ nothing.at.all }}", "{% if %}", "{{ messages[0] / 2 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ '%999999999d' % 1 }}", "{{ '{:999999999}'.format(1) }}",
        "{{ 'x'.center(999999999) }}", "{{ 'x' | center(999999999) }}", "{{ lipsum(9999) }}",
        "{{ 'x' | indent(width=999999999, first=true) }}", "{{ ('a' * 9999).replace('a', 'b' * 99999) }}", "{{ '%*d' % (999999999, 1) }}",
        "{% set ns = namespace(x='xxxx') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='xxxx') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ range(99999) | join('x' * 99999) }}", "{{ '{:{}}'.format(1, 999999999) }}", "{{ '%s' | format('x' * 99999999) }}",
    ],
)  # fmt: skip
def test_hostile_templates_are_refused(template):
    with pytest.raises(BadInput, match="template"):
        render(template, CHAT, SPECIAL, 0.0, seconds=0.3)


def test_templates_are_found_where_transformers_keeps_them(tmp_path):
    assert read_template(tmp_path) == (None, {})
    config = {
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}],
        "eos_token": {"content": "</s>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_template(tmp_path) == ("yes", {"eos_token": "</s>"})
    (tmp_path / "chat_template.jinja").write_text("own")
    assert read_template(tmp_path)[0] == "own"
