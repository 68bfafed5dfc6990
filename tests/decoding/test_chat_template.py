"""Chat templates: the text that transformers makes, and what a template may not do."""

import datetime
import json
import pathlib
import time

import pytest

from fdq.decoding import chat_template, template_process
from fdq.decoding.chat_template import ChatTemplate, TemplateError
from fdq.decoding.tokenizer import Tokenizer
from tests.covering import slow_but

ORACLES = pathlib.Path(__file__).parent.parent / "oracles" / "chat"
STYLES = ("llama3", "chatml", "mistral", "gemma", "deepseek", "ernie")
HELLO = [{"role": "user", "content": "Hello"}]


def options_of(case, expected):
    names = ("tools", "documents", "add_generation_prompt")
    options = {name: case[name] for name in names if name in case} | case.get("variables", {})
    return options | {"now": datetime.datetime.fromisoformat(expected["now"])}


@pytest.mark.parametrize("style", STYLES)
def test_text_and_tokens_are_those_of_transformers(style, monkeypatch):
    template, tokenizer = ChatTemplate.load(ORACLES / style), Tokenizer.load(ORACLES / style)
    expected = json.loads((ORACLES / style / "expected.json").read_text("utf-8"))
    first = expected["cases"][1]
    # One in a process of its own, as all are; the others in this one, for it is sooner done.
    assert template.render(first["messages"], **options_of(first, expected)) == first["text"]
    in_this = lambda _, request: template_process.answer(json.loads(request))  # noqa: E731
    monkeypatch.setattr(ChatTemplate, "_answer", in_this)
    for case in expected["cases"]:
        options = options_of(case, expected)
        if "error" in case:
            with pytest.raises(TemplateError) as raised:
                template.render(case["messages"], **options)
            assert " ".join(case["message"].split()).removesuffix(".") in str(raised.value)
            continue
        text = template.render(case["messages"], **options)
        assert text == case["text"]
        assert tokenizer.encode(text) == case["ids"]


def of(source, **more):
    return ChatTemplate({"default": source, **more}, {}, "model/chat_template.jinja")


GROWING = "{% set x = namespace(a='aaaaaaaa') %}{% for i in range(99) %}"
HOSTILE = {
    "endless loops": (
        "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
        "did not end within 1 s",
    ),
    "a large number": ("{{ 9 ** (9 ** 9) }}", "did not end within 1 s"),
    "a large range": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    "a long string": ("{{ 'a' * 10 ** 10 }}", "more than 512 MiB"),
    "a wide field": ("{{ '%01000000000d' % 1 }}", "more than 512 MiB"),
    "text that doubles": (GROWING + "{% set x.a = x.a ~ x.a %}{% endfor %}", "more than 512 MiB"),
    "much text": (
        "{% for i in range(9999) %}{{ 'a' * 99999 }}{% endfor %}",
        "more than 512 MiB",
    ),
    "a walk to classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "may not do"),
    "a walk by filter": ("{{ (messages | attr('__init__')).__globals__ }}", "may not do"),
    "a function's code": ("{{ raise_exception.__globals__.keys() }}", "may not do"),
    "a namespace's insides": ("{% set n = namespace(__class__=1) %}", "may not do"),
    "what it was given": ("{{ messages.append(1) }}", "may not do"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "itself without end": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "without end"),
    "deep nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
    "an unknown tag": ("\n{% frobnicate %}", "line 2: Encountered unknown tag"),
}


SEEN = (
    "endless loops",
    "a large range",
    "much text",
    "a walk to classes",
    "what it was given",
    "itself without end",
)


@pytest.mark.parametrize("case", slow_but(SEEN, HOSTILE))
def test_a_hostile_template_is_refused_soon(case, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    source, message = HOSTILE[case]
    start = time.perf_counter()
    with pytest.raises(TemplateError, match=message) as raised:
        of(source).render(HELLO)
    assert str(raised.value).startswith("model/chat_template.jinja: ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    "source", ["{{ '{0.__class__}'.format('a') }}", "{{ raise_exception.__code__ }}"]
)
def test_what_python_keeps_inside_is_undefined(source):
    assert of(source).render(HELLO) == ""


def test_where_templates_are_looked_for(tmp_path):
    assert ChatTemplate.find(tmp_path) is None
    with pytest.raises(ValueError, match="no chat template"):
        ChatTemplate.load(tmp_path)

    def found():
        return ChatTemplate.load(tmp_path / "tokenizer.json").templates

    (tmp_path / "chat_template.json").write_text('{"chat_template": "d"}')
    assert found() == {"default": "d"}
    named = [{"name": "default", "template": "c"}, {"name": "tool_use", "template": "t"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert found() == {"default": "c", "tool_use": "t"}
    (tmp_path / "chat_template.jinja").write_text("j")
    assert found() == {"default": "j"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("r")
    assert found() == {"default": "j", "rag": "r"}
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: no text in UTF-8"):
        found()
    (tmp_path / "chat_template.jinja").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(ValueError, match="larger than 1024 KiB"):
        found()


@pytest.mark.parametrize("value", [1, [{"name": "default"}], ["text"], {"default": 3}])
def test_a_template_of_another_kind_is_refused(value, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template: expected a text"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("messages", ["Hello", {"role": "user"}, ["Hello"], [{"content": "a"}]])
def test_messages_that_are_none(messages):
    with pytest.raises(TypeError, match="messages: expected"):
        of("").render(messages)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(chat_template.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'jinja2>="):
        of("").render(HELLO)
