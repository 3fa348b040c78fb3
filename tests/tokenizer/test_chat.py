"""Conversations by a fine-tune's template: the text and the ids of transformers, in a sandbox."""

import json
import shutil
from pathlib import Path

import pytest

import gptneo_fast
from gptneo_fast.errors import GPTNeoFastWarning, InputError, TokenizerError

transformers = pytest.importorskip("transformers")
DEMO = Path(gptneo_fast.__file__).parent / "demo" / "model"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n  {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
    "{{ m.role }}: {% generation %}{{ m['content'] | trim }}{% endgeneration %}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": " hello <b> "},
    {"role": "assistant", "content": "hi", "tool_calls": None},
    {"role": "user", "content": "a story"},
]
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {}}}]


def written(folder, template, as_file=False):
    shutil.copy(DEMO / "tokenizer.json", folder)
    settings = json.loads((DEMO / "tokenizer_config.json").read_text())
    if as_file:
        (folder / "chat_template.jinja").write_text(template)
    else:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def pair(folder, template, as_file=False):
    written(folder, template, as_file)
    return transformers.AutoTokenizer.from_pretrained(folder), gptneo_fast.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        dict(tokenize=False),
        dict(tokenize=False, add_generation_prompt=True),
        dict(tokenize=False, continue_final_message=True),
        dict(tokenize=False, tools=TOOLS),
        dict(tokenize=False, chat_template="{{ messages[0].content }}{{ eos_token }}"),
        dict(add_generation_prompt=True),
        dict(return_dict=False),
        dict(return_tensors="pt", padding=False),
        dict(max_length=4, truncation=True),
    ],
    ids=str,
)
def test_a_conversation_gives_what_transformers_gives(tmp_path, options, as_file):
    theirs, ours = pair(tmp_path, TEMPLATE, as_file)
    for talk in (TALK, [TALK, TALK[1:2]]):
        if options.get("return_tensors") and talk is not TALK:
            continue
        assert str(ours.apply_chat_template(talk, **options)) == str(theirs.apply_chat_template(talk, **options))


UPPER = (
    "{% for m in messages %}{% filter upper %}{% generation %}{{ m.content }}é🙂{% endgeneration %}{% endfilter %};{% endfor %}"
)
MARKED = [*TALK[:3], {"role": "user", "content": "more"}, {"role": "assistant", "content": "once upon a time"}]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_tensors": "pt"},
        {"max_length": 9, "truncation": True},
        {"add_generation_prompt": True},
        {"chat_template": TEMPLATE.replace("{% generation %}", "{%- generation -%}")},
        {"chat_template": UPPER},
        {"max_length": 12, "truncation": True, "truncation_side": "left"},
    ],
    ids=str,
)
def test_tokens_of_the_assistant_are_marked_as_in_transformers(tmp_path, options):
    theirs, ours = pair(tmp_path, TEMPLATE)
    for talk in (MARKED, [MARKED, TALK[1:2]]):
        if options.get("return_tensors") and talk is not MARKED:
            continue
        asked = options | {"return_assistant_tokens_mask": True, "return_dict": True}
        for tokenizer in (theirs, ours):
            tokenizer.truncation_side = asked.get("truncation_side", "right")
        asked.pop("truncation_side", None)
        want, got = (dict(tokenizer.apply_chat_template(talk, **asked)) for tokenizer in (theirs, ours))
        assert str(got) == str(want) and "1" in str(got["assistant_masks"])
    with pytest.raises(InputError, match="return_assistant_tokens_mask needs return_dict=True"):
        ours.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=False)
    with pytest.warns(GPTNeoFastWarning, match="marks nothing"):
        out = ours.apply_chat_template(TALK, chat_template="{{ messages[1].content }}", return_assistant_tokens_mask=True)
    assert set(out["assistant_masks"]) == {0}


def test_several_templates_have_names(tmp_path):
    both = [{"name": "default", "template": "D{{ messages[0].content }}"}, {"name": "tool_use", "template": "T"}]
    theirs, ours = pair(tmp_path, both)
    for options in ({}, {"tools": TOOLS}, {"chat_template": "tool_use"}):
        options = options | {"tokenize": False}
        assert ours.apply_chat_template(TALK, **options) == theirs.apply_chat_template(TALK, **options)


@pytest.mark.parametrize(
    ("template", "talk", "options", "error", "message"),
    [
        ([{"name": "default"}], TALK, {}, TokenizerError, "is no list of"),
        ("{{ raise_exception('no system, please') }}", TALK, {}, TokenizerError, "no system, please"),
        ("{% for %}", TALK, {}, TokenizerError, "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", TALK, {}, TokenizerError, "SecurityError"),
        ("{{ messages.append(1) }}", TALK, {}, TokenizerError, "SecurityError"),
        ("x", [], {}, InputError, "list of messages"),
        ("x", "hello", {}, InputError, "list of messages"),
        ("x", TALK, dict(continue_final_message=True), TokenizerError, "cannot be continued"),
        ("x", TALK, dict(continue_final_message=True, add_generation_prompt=True), InputError, "contradict"),
    ],
)
def test_what_goes_wrong_is_said(tmp_path, template, talk, options, error, message):
    ours = gptneo_fast.AutoTokenizer.from_pretrained(written(tmp_path, template))
    with pytest.raises(error, match=message):
        ours.apply_chat_template(talk, tokenize=False, **options)


@pytest.mark.parametrize(
    "template", [TEMPLATE, "{% for m in messages %}{{ m.content }}{{ eos_token if loop.last }}{% endfor %}"]
)
def test_a_message_has_the_tokens_that_it_adds_to_a_conversation(tmp_path, template):
    theirs, ours = pair(tmp_path, template)
    for n in range(len(TALK)):
        for history in (TALK[:n], None) if n == 0 else (TALK[:n],):
            found = ours.encode_message_with_chat_template(TALK[n], history)
            assert found == theirs.encode_message_with_chat_template(TALK[n], history)
    joined = [i for n in range(len(TALK)) for i in ours.encode_message_with_chat_template(TALK[n], TALK[:n])]
    whole = ours.apply_chat_template(TALK, return_dict=False)
    assert (joined == whole) == (template is TEMPLATE)
    for name in ("add_generation_prompt", "tokenize", "return_dict", "return_tensors"):
        with pytest.raises(InputError, match=f"{name} goes not with a single message"):
            ours.encode_message_with_chat_template(TALK[0], **{name: False})
