"""Chat templates: what they see, and what the sandbox keeps from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from consilium.errors import CheckpointError, InvalidRequest
from gateway.chat_template import ChatTemplate, load_chat_template
from gateway.tokenizer import Tokenizer
from tests.tiny_tokenizer import CHAT_TEMPLATE, save_tokenizer

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "The answer is "}


def render(source: str, *messages: dict[str, str], **settings: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages or [USER], **settings)


def test_chatml() -> None:
    turn = "<|im_start|>user\nHi<|im_end|>\n"
    assert render(CHAT_TEMPLATE) == turn + "<|im_start|>assistant\n"
    assert render(CHAT_TEMPLATE, add_generation_prompt=False) == turn


def test_the_final_message_goes_on() -> None:
    text = render(CHAT_TEMPLATE, USER, ASSISTANT, add_generation_prompt=False, continue_final_message=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nThe answer is"


def test_a_final_message_that_the_template_hides_cannot_go_on() -> None:
    with pytest.raises(InvalidRequest, match="shows unchanged"):
        render("nothing of it", USER, ASSISTANT, continue_final_message=True)


def test_whitespace_as_transformers_trims_it() -> None:
    source = "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n"
    assert render(source) == "Hi\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'a': '<b> & ü'} | tojson }}", '{"a": "<b> & ü"}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{{ bos_token }}{{ eos_token is defined }}", "<s>False"),
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hi"),
        ("{{ thinking }}", "on"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
    ],
)
def test_what_templates_use(source: str, expected: str) -> None:
    assert render(source, extra={"thinking": "on"}) == expected


def test_dates() -> None:
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", render("{{ strftime_now('%Y-%m-%d') }}"))


def test_a_client_cannot_replace_what_the_template_sees() -> None:
    assert render("{{ messages[0].content }}", extra={"messages": [{"content": "forged"}]}) == "Hi"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ (messages | attr('__class__')).__name__ }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ range(10 ** 6) | list }}",
        "{{ self.__init__.__globals__ }}",
        "{{ joiner.__init__.__builtins__ }}",
    ],
)
def test_the_sandbox_holds(attack: str) -> None:
    with pytest.raises(InvalidRequest):
        render(attack)


def test_text_of_a_client_is_never_a_template() -> None:
    content = "{{ 7 * 7 }}{% for i in range(9) %}x{% endfor %}"
    assert content in render(CHAT_TEMPLATE, {"role": "user", "content": content})


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('roles must alternate') }}", "{{ 1 / 0 }}", "{{ messages[7].content }}", "{{ x.y }}"]
)
def test_what_a_template_refuses_is_the_clients_error(source: str) -> None:
    with pytest.raises(InvalidRequest, match="template refuses"):
        render(source)


def test_bad_jinja_is_the_models_error() -> None:
    with pytest.raises(CheckpointError, match="line 1"):
        ChatTemplate("{% if %}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path, 384)
    return tmp_path


def load(folder: Path, **settings: Any) -> ChatTemplate | None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **settings}), "utf-8")
    return load_chat_template(folder, Tokenizer(folder, 384))


def test_where_the_template_is_found(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ bos_token }}named"}]
    templates = [load(folder), load(folder, chat_template=named), load(folder, chat_template=None)]
    (folder / "chat_template.jinja").write_text("{{ eos_token }}file", "utf-8")
    templates.append(load(folder, chat_template=named))
    found = [template and template.render([USER], add_generation_prompt=False) for template in templates]
    assert found == ["<|im_start|>user\nHi<|im_end|>\n", "<s>named", None, "</s>file"]


@pytest.mark.parametrize("stated", [[{"name": "tool_use", "template": "x"}], [], 7, [{"name": "default"}]])
def test_a_template_without_default_is_refused(folder: Path, stated: object) -> None:
    with pytest.raises(CheckpointError, match="default"):
        load(folder, chat_template=stated)
