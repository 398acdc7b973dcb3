"""Chat templates: as transformers renders them, on the day of the run, and never a traceback."""

import json
import shutil
import threading
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.cli.main import main
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.recipe.data import DataConfig, TemplateConfig
from megatron_opd.recipe.load import dump_config, load_config
from megatron_opd.tasks import chat_template as module
from megatron_opd.tasks import pin as pin_module
from megatron_opd.tasks.chat_template import ChatTemplate
from megatron_opd.tasks.data import load_tasks
from megatron_opd.tasks.data_files import changed_data, data_sha256
from megatron_opd.tasks.pin import keep_pins, pin
from megatron_opd.tasks.template import check_chat_template, render
from megatron_opd.tasks.tokenizer import load_tokenizer
from tests.tiny_config import tiny_config
from tests.unit.byte_tokenizer import CHAT_TEMPLATE, write_byte_tokenizer
from tests.unit.tiny_model_files import write_recipe

DAY = date(2026, 1, 31)
CONVERSATION = [
    {"role": "system", "content": " Be <brief>. "},
    {"role": "user", "content": "1 < 2 é 🙂?\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
    {"role": "user", "content": "{{ 2 }} {% x %}"},
]

# What templates of models do, in templates of our own.
TEMPLATES = {
    "chatml": """
{%- if messages[0].role != 'system' %}<|im_start|>system
Help.<|im_end|>
{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' ~ '\n' }}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "namespace and slices": """
{%- set ns = namespace(system='', turn=0) -%}
{%- for m in messages if m['role'] == 'system' %}{% set ns.system = m['content'] %}{% endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for m in messages[1:] %}
{%- set ns.turn = ns.turn + loop.index0 * 2 %}
{%- if m.role == 'assistant' %}A:{{ m.content.split('</think>')[-1].strip() }}{{ eos_token }}
{%- else %}U{{ ns.turn }}:{{ m.content }}{% endif %}
{%- endfor %}{{ messages[::-1][0].content | length }}""",
    "tools and documents": """
{%- if tools is not none %}tools{% endif %}{% if not documents %}none{% endif %}
{%- if tools is defined %}defined{% endif %}{{ undefined_name }}
{%- if date_string is not defined %}x{% endif %}
{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}""",
    "loop controls": "{% for m in messages %}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% for m in messages %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "macro": "{% macro say(m) %}<{{ m.role }}>{{ caller() }}{% endmacro %}"
    "{% for m in messages %}"
    "{% call say(m) %}{{ m.content | upper ~ m.role ~ 1 }}{% endcall %}{% endfor %}",
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(model_dir: Path) -> Any:
    return load_tokenizer(model_dir)


def rendered(text: str, messages: list[Any] | None = None) -> str:
    return ChatTemplate("m", text, {"eos_token": "</s>"}).render(messages or CONVERSATION, DAY)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "messages", [CONVERSATION, CONVERSATION[1:2]], ids=["conversation", "one message"]
)
def test_rendered_as_transformers_does(tokenizer: Any, name: str, messages: list[Any]) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert expected and rendered(TEMPLATES[name], messages) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ messages[0]['content'] + 5 }}", "TypeError: can only concatenate str"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages[9].content.x }}", "UndefinedError"),
        ("{{ raise_exception('no\nsystem') }}", r"TemplateError: no system"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{% include 'x' %}", "TypeError: no loader"),
        ("{{ messages | nofilter }}", "TemplateAssertionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
         "TimeoutError: .* 0.5"),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
         "OverflowError: it writes more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'x' * 10 ** 10 }}", r"SecurityError: the result of \* is too large"),
        ("{{ 10 ** 10 * messages }}", r"SecurityError: the result of \* is too large"),
        ("{{ 10 ** (10 ** 10) }}", r"SecurityError: the result of \*\* is too large"),
        ("{% set n = namespace(x='x') %}"
         "{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
         "OverflowError: it writes more than"),
        ("{% set n = namespace(x='x') %}"
         "{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
         r"SecurityError: the result of \+ is too large"),
        ("{{ '(' * 9999 }}{{ " + "(" * 9999 + " }}",
         "RecursionError|TemplateSyntaxError|SyntaxError|MemoryError"),
    ],
)  # fmt: skip
def test_a_template_that_fails_or_never_ends_is_one_line(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if message.startswith("TimeoutError"):  # the others have their own limits, and a busy machine
        monkeypatch.setattr(module, "MAX_SECONDS", 0.5)
    start = time.perf_counter()
    with pytest.raises(DataError, match=rf"m: the chat template fails \(({message})") as caught:
        rendered(text)
    assert time.perf_counter() - start < 60
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert str(caught.value).endswith("; set data.template.kind=raw, or mend the template")


def test_the_time_limit_leaves_no_alarm_and_needs_the_main_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS", 0.05)
    assert rendered("{{ messages[0].role }}") == "system"
    time.sleep(0.1)  # an alarm that was left would end the test
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(rendered("{{ messages[0].role }}")))
    thread.start()
    thread.join()
    assert texts == ["system"]


def edit(model_dir: Path, target: Path, template: object, jinja: str | None) -> Path:
    shutil.copytree(model_dir, target)
    (target / "chat_template.jinja").unlink()
    if jinja is not None:
        (target / "chat_template.jinja").write_text(jinja)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": template})
    )
    return target


NAMED = [{"name": "rag", "template": "rag"}, {"name": "tool_use", "template": "tools"}]


@pytest.mark.parametrize(
    ("template", "jinja", "expected"),
    [
        (None, CHAT_TEMPLATE, "<user>q</s><assistant>"),
        (CHAT_TEMPLATE, None, "<user>q</s><assistant>"),
        ("config {{ messages[0].content }}", "file {{ messages[0].content }}", "file q"),
        (
            [*NAMED, {"name": "default", "template": "default {{ messages[0].content }}"}],
            None,
            "default q",
        ),
    ],
)
def test_where_a_template_lies(
    tmp_path: Path, model_dir: Path, template: object, jinja: str | None, expected: str
) -> None:
    tokenizer = load_tokenizer(edit(model_dir, tmp_path / "m", template, jinja))
    assert render(TemplateConfig(), tokenizer, "q") == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"m: the tokenizer has no chat template; set data\.template\.kind=raw"),
        (
            NAMED,
            r"its chat templates \(rag, tool_use\) have no default; "
            r"write the one to use into .*\.jinja",
        ),
    ],
)
def test_no_template_to_use(
    tmp_path: Path, model_dir: Path, template: object, message: str
) -> None:
    tokenizer = load_tokenizer(edit(model_dir, tmp_path / "m", template, None))
    with pytest.raises(DataError, match=message):
        render(TemplateConfig(), tokenizer, "q")


# ------------------------------------------------------------------------------- opening a response
THINKING = CHAT_TEMPLATE.replace("<assistant>", "<assistant><think>\n")


def test_a_prefill_that_the_template_has_already_is_refused(tokenizer: Any) -> None:
    prefilled = TemplateConfig(prefill="<think>\n")
    assert render(prefilled, tokenizer, "q").endswith("<assistant><think>\n")
    tokenizer.chat_template = THINKING
    assert render(TemplateConfig(), tokenizer, "q").endswith("<assistant><think>\n")
    for prefill in ("<think>\n", "<think>", "\n<think>\n\n"):
        with pytest.raises(ConfigError, match=r"data\.template\.prefill: .* ends already; remove"):
            render(replace(prefilled, prefill=prefill), tokenizer, "q")
    assert render(replace(prefilled, prefill="So,"), tokenizer, "q").endswith(
        "<assistant><think>\nSo,"
    )


def test_a_trace_goes_on_after_the_tag_of_the_template(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = THINKING
    path = tmp_path / "a.jsonl"
    responses = ["<think>\nhm", "<think>hm", "hm", "<thinker>hm"]
    path.write_text(
        "".join(json.dumps({"problem": "q", "response": response}) + "\n" for response in responses)
    )
    prompts = load_tasks(
        path,
        DataConfig(""),
        tokenizer,
        max_prompt_tokens=99,
        max_sequence_length=100,
        need_answer=False,
        need_trace=True,
    )
    traces = [
        tokenizer.decode(prompt.trace_ids) for prompt in prompts if prompt.trace_ids is not None
    ]
    assert traces == ["hm</s>", "hm</s>", "hm</s>", "<thinker>hm</s>"]


# ----------------------------------------------------- the recipe's template, and what it is handed
def test_a_template_reads_what_the_recipe_hands_it(tokenizer: Any) -> None:
    """A chat template gets the arguments that transformers would hand it."""
    tokenizer.chat_template = (
        "{% if enable_thinking is defined and enable_thinking is false %}no {% endif %}"
        "{{ date_string }}{{ messages[0].content }}{% set own = level %}{{ own }}"
    )
    kwargs = {"enable_thinking": False, "date_string": "26 Jul 2024", "level": 3}
    template = TemplateConfig(chat_template_kwargs=dict(kwargs))
    messages = [{"role": "user", "content": "q"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    assert render(template, tokenizer, "q") == expected == "no 26 Jul 2024q3"
    check_chat_template(template, tokenizer)
    with pytest.raises(ConfigError, match=r"kwargs\.thinking: no effect.* reads date_string, ena"):
        check_chat_template(TemplateConfig(chat_template_kwargs={"thinking": True}), tokenizer)


def test_a_template_may_be_a_file(tmp_path: Path, tokenizer: Any) -> None:
    """A run pins it beside its data."""
    tokenizer.chat_template = None
    path = tmp_path / "mine.jinja"
    path.write_text("<{{ messages[0].content }}>{{ eos_token }}")
    template = TemplateConfig(chat_template=str(path))
    assert render(template, tokenizer, "q") == "<q></s>"
    (tmp_path / "a.jsonl").write_text('{"problem": "q"}\n')
    data = DataConfig(str(tmp_path / "a.jsonl"), template=template)
    stored = data_sha256(data)
    assert set(stored) == set(data.paths) == {str(tmp_path / "a.jsonl"), str(path)}
    path.write_text("{{ messages[0].content }")
    assert changed_data(stored, data) == str(path)
    for text, message in (
        ("{% x", "mine.jinja: the chat template fails"),
        (None, "cannot be read"),
    ):
        other = tmp_path / f"other{message[:2]}" / "mine.jinja"
        other.parent.mkdir()
        if text:
            other.write_text(text)
        with pytest.raises((ConfigError, DataError), match=message):
            check_chat_template(TemplateConfig(chat_template=str(other)), tokenizer)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.template.chat_template_kwargs={a: 1}"], "kwargs: no effect with kind=raw"),
        (
            ["data.template.kind=chat", "data.template.chat_template_kwargs={messages: 1}"],
            "kwargs.messages: every template is given it",
        ),
        (["rollout.stop=['']"], "rollout.stop: an empty text"),
        (["rollout.stop=x"], "'rollout.stop=x': must be a list"),
        (["rollout.stop=[x]", "method.teacher_share=0.5"], "rollout.stop: does not go with"),
    ],
)
def test_keys_of_prompts_and_ends_that_cannot_work_are_one_line(
    tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(write_recipe(tmp_path)), *overrides]) == 2
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- the date
class OtherDay(date):
    @classmethod
    def today(cls) -> "OtherDay":
        return cls(2026, 2, 1)


def test_a_template_sees_the_day_of_the_run(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y %H:%M') }} {{ messages[0].content }}"
    assert render(TemplateConfig(date=DAY), tokenizer, "q") == "31 Jan 2026 00:00 q"
    assert render(TemplateConfig(), tokenizer, "q") == date.today().strftime("%d %b %Y 00:00 q")


def test_a_run_that_goes_on_keeps_its_day_and_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started on one day and resumed on the next, by the recipe or by its own config.yaml."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": "q"}\n')
    recipe = tiny_config(data=DataConfig(str(path)))
    monkeypatch.setattr(
        pin_module, "date", type("FirstDay", (date,), {"today": classmethod(lambda cls: DAY)})
    )
    started = pin(recipe)
    assert started.data.template.date == DAY and list(started.data.sha256) == [str(path)]
    stored = tmp_path / "config.yaml"
    stored.write_text(dump_config(started))
    assert load_config(str(stored)) == started
    monkeypatch.setattr(pin_module, "date", OtherDay)
    assert pin(recipe).data.template.date == date(2026, 2, 1)
    assert pin(keep_pins(recipe, load_config(str(stored)))) == started
    assert pin(load_config(str(stored))) == started


def test_a_run_is_told_of_changed_data(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": "q"}\n')
    started = pin(tiny_config(data=DataConfig(str(path))))
    pin_module.check_unchanged(started)
    path.write_text('{"problem": "p"}\n')
    with pytest.raises(
        DataError, match=r"a\.jsonl: has changed since data\.sha256 of config\.yaml was made"
    ):
        pin_module.check_unchanged(started)
