"""Chat templates: the text of a conversation by the Jinja template that a fine-tune ships, in a sandbox, as in transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ..errors import InputError, SetupError, TokenizerError
from .arguments import flag

_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_NONE = (
    "this tokenizer has no chat template: GPT-Neo was trained to continue text, not on talk; write the prompt as text, "
    "such as 'Q: ...\nA:', set tokenizer.chat_template, or pass chat_template="
)


def template_of(own: Any, asked: str | None, tools: bool) -> str:
    """The template to use: one that is passed, by its text or by the name of one of `own`, or the tokenizer's own.

    Raises:
        SetupError: there is none.
        InputError: several, none of them named "default".
        TokenizerError: a list of anything else than names and templates.
    """
    try:
        named = own if isinstance(own, Mapping) else {t["name"]: t["template"] for t in own} if isinstance(own, list) else None
    except (KeyError, TypeError) as error:
        raise TokenizerError(f"chat_template {own!r:.80} is no list of {{'name': ..., 'template': ...}}") from error
    if asked is not None:
        return str(named[asked]) if named and asked in named else asked
    if named:
        name = "tool_use" if tools and "tool_use" in named else "default"
        if name not in named:
            raise InputError(f"the tokenizer has the chat templates {', '.join(sorted(named))}; name one with chat_template=")
        return str(named[name])
    if not own:
        raise SetupError(_NONE)
    return str(own)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **names: Any,
) -> str:
    """The text of one conversation.

    Args:
        template: in Jinja.
        messages: such as {"role": "user", "content": "..."}.
        add_generation_prompt: end with what an answer begins with, where the template knows that.
        continue_final_message: end with the last message, open for continuation.
        names: what the template sees besides: tools, documents, special tokens.

    Raises:
        InputError: no messages, or such as are no mappings.
        TokenizerError: the template is faulty or refuses the conversation; with its own words.
    """
    if not isinstance(messages, Sequence) or not messages or not all(isinstance(message, Mapping) for message in messages):
        raise InputError("a conversation is a list of messages, each such as {'role': 'user', 'content': 'hello'}")
    if flag("continue_final_message", continue_final_message) and flag("add_generation_prompt", add_generation_prompt):
        raise InputError("continue_final_message and add_generation_prompt contradict each other; leave one out")
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if continue_final_message:
        if not isinstance(chat[-1].get("content"), str):
            raise InputError("continue_final_message needs a last message whose content is text")
        chat[-1]["content"] += _TAG
    try:
        text: str = _compiled(template).render(messages=chat, add_generation_prompt=add_generation_prompt, **names)
    except Exception as error:  # a template's own
        raise TokenizerError(f"the chat template failed ({type(error).__name__}: {error})") from error
    if not continue_final_message:
        return text
    at = text.rfind(_TAG.strip())
    if at < 0:
        raise TokenizerError("the chat template changes the last message, which then cannot be continued")
    return text[:at] if text[at : at + len(_TAG)] == _TAG else text[:at].rstrip()


@functools.lru_cache(32)
def _compiled(template: str) -> Any:
    from jinja2 import Environment, TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, which marks what an assistant says and changes no text."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's way)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox: Environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    sandbox.filters["tojson"] = tojson
    sandbox.globals["raise_exception"] = refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox.from_string(template)
