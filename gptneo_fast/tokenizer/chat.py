"""Chat templates: the text of a conversation by the Jinja template that a fine-tune ships, in a sandbox, as in transformers."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ..errors import InputError, SetupError, TokenizerError, short, warn_once
from .arguments import flag, listed, mapping

_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_SAID = "said_by_the_assistant"  # in a template's context: the text so far, and where to note what is generated
_OF_WHOLE = ("add_generation_prompt", "tokenize", "return_dict", "return_tensors")
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
        raise TokenizerError(f"chat_template {short(own)} is no list of {{'name': ..., 'template': ...}}") from error
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
    spans: list[tuple[int, int]] | None = None,
    **names: Any,
) -> str:
    """The text of one conversation.

    Args:
        template: in Jinja.
        messages: such as {"role": "user", "content": "..."}.
        add_generation_prompt: end with what an answer begins with, where the template knows that.
        continue_final_message: end with the last message, open for continuation.
        spans: gets (begin, end) of what the template puts between {% generation %} and {% endgeneration %}, in characters.
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
        blocks: list[str] = []
        names |= {"messages": chat, "add_generation_prompt": add_generation_prompt, _SAID: (blocks, spans)}
        for block in _compiled(template).generate(**names):
            blocks.append(block)
        text = "".join(blocks)
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
        """{% generation %} ... {% endgeneration %}: what an assistant says, whose place is noted where a caller wants that."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's way)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_said", [nodes.ContextReference()])
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _said(self, context: Any, caller: Any) -> str:
            said: str = caller()
            blocks, spans = context.get(_SAID)
            if spans is not None:
                begin = sum(map(len, blocks))
                spans.append((begin, begin + len(said)))
            return said

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


def _mask_of(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each token, whose characters are given, that shares one with a span."""
    return [int(any(begin < end_of and end > begin_of for begin_of, end_of in spans)) for begin, end in offsets]


class Conversations:
    """What GPT2Tokenizer does with conversations."""

    chat_template: Any
    special_tokens_map: Any

    def apply_chat_template(
        self,
        conversation: Any,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        tokenizer_kwargs: dict[str, Any] | None = None,
        return_assistant_tokens_mask: bool = False,
        **names: Any,
    ) -> Any:
        """The text of a conversation, or its tokens, by the template that a fine-tune ships; the same as in transformers.

        Args:
            conversation: a list of messages such as {"role": "user", "content": "hello"}, or a list of such lists.
            tools, documents: for templates that take them; tools as JSON schemas.
            chat_template: another template, or the name of one of several.
            add_generation_prompt: end with what an answer begins with.
            continue_final_message: end with the last message, open for continuation.
            tokenize: False for the text. return_dict: False for the ids alone.
            padding, truncation, max_length, return_tensors, tokenizer_kwargs: as in a call.
            return_assistant_tokens_mask: give assistant_masks, too: 1 for tokens that the template puts between
                {% generation %} and {% endgeneration %}.
            names: what the template sees besides.

        Raises:
            SetupError: there is no template. InputError, TokenizerError: see `render`.
        """
        for name, value in (("tools", tools), ("documents", documents)):
            if value is not None and not isinstance(value, (list, tuple)):
                raise InputError(f"{name} is a {type(value).__name__}; give a list, or leave it out")
        template = self.get_chat_template(chat_template, tools)
        several = isinstance(conversation, (list, tuple)) and bool(conversation) and isinstance(conversation[0], (list, tuple))
        masked = flag("return_assistant_tokens_mask", return_assistant_tokens_mask)
        if masked and not (return_dict and tokenize):
            raise InputError("return_assistant_tokens_mask needs return_dict=True and tokenize=True, which are the defaults")
        if masked and not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            warn_once("the chat template marks nothing with {% generation %}: assistant_masks are zeros")
        seen = self.special_tokens_map | {"tools": tools, "documents": documents} | names
        conversations = conversation if several else [conversation]
        spans: list[Any] = [[] if masked else None for _ in conversations]
        texts = [
            render(
                template,
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                spans=found,
                **seen,
            )
            for messages, found in zip(conversations, spans, strict=True)
        ]
        given = texts if several else texts[0]
        if not flag("tokenize", tokenize):
            return given
        call: Any = self
        out = call(
            given,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            add_special_tokens=False,
            return_tensors=return_tensors,
            **mapping("tokenizer_kwargs", tokenizer_kwargs),
        )
        if masked:
            rows = [_mask_of(out.encodings[i].offsets, found) for i, found in enumerate(spans)]
            out["assistant_masks"] = rows if several or return_tensors else rows[0]
            out.convert_to_tensors(return_tensors)
        return out if flag("return_dict", return_dict) else out["input_ids"]

    def get_chat_template(self, chat_template: str | None = None, tools: list[dict[str, Any]] | None = None) -> str:
        """The template that `apply_chat_template` uses with these arguments."""
        return template_of(self.chat_template, chat_template, tools is not None)

    def encode_message_with_chat_template(
        self, message: Mapping[str, Any], conversation_history: Any = None, **options: Any
    ) -> list[int]:
        """Token ids that a message adds to a conversation: those from the first on that the conversation without it has not.

        Args:
            message: such as {"role": "user", "content": "hello"}.
            conversation_history: the messages before it.
            options: as of `apply_chat_template`, but for what says in which form tokens are given.

        Raises:
            InputError: an option that goes not with single messages; and as `apply_chat_template`.
        """
        if odd := next((name for name in _OF_WHOLE if name in options), None):
            raise InputError(f"{odd} goes not with a single message; use apply_chat_template for whole conversations")
        history = [] if conversation_history is None else listed("conversation_history", conversation_history)
        whole: list[int] = self.apply_chat_template([*history, message], return_dict=False, **options)
        if not history:
            return whole
        before = self.apply_chat_template(history, return_dict=False, **options)
        shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole)))
        return whole[shared:]
