"""The evaluation harness (lm_eval) over our scoring and Engine: importing this module registers the model "gptneo_fast".

lm_eval.simple_evaluate(model="gptneo_fast", model_args={"pretrained": "EleutherAI/gpt-neo-1.3B"}, tasks=["lambada_openai"])

`gptneo-fast eval TASKS` does the same on the command line. Answers are those of the harness's own "hf" model, whose rules for
contexts that are too long and for stop sequences hold here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
from tqdm import tqdm

from ..engine import Engine
from ..errors import InputError, NonFiniteLogitsError, SetupError
from ..models.causal import GPTNeoForCausalLM
from ..models.load import load

_SHARED = 128  # tokens of a context, over all continuations but the first, that are worth two passes of its own

Row = tuple[Any, list[int], list[int]]  # what the harness's cache calls it, context, continuation


@register_model("gptneo_fast", "gptneo-fast")
class LM(TemplateLM):
    """A GPT-Neo for the harness.

    Args:
        pretrained: folder or hub id, or a GPTNeoForCausalLM with a tokenizer.
        batch_size: requests of generate_until that decode together; None or "auto" for as many as the Engine likes. Scores run
            in batches of like length whatever it is.
        max_length: tokens that the model may see; None for its positions.
        max_gen_toks: new tokens where a task does not say.
        add_bos_token: begin every text with the token that begins texts.
        max_batch_size: taken for the harness's sake; nothing is tried out.
        options: of `gptneo_fast.load`: dtype, device, quantize, revision, ...

    Raises:
        SetupError: no tokenizer. InputError: a max_length past the model's positions.
    """

    def __init__(
        self,
        pretrained: str | GPTNeoForCausalLM,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = False,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model: Any = pretrained if isinstance(pretrained, GPTNeoForCausalLM) else load(pretrained, **options)
        self.tokenizer: Any = self.model.tokenizer
        if self.tokenizer is None:
            raise SetupError("the model has no tokenizer, and tasks are text; save one beside its weights")
        positions = self.model.config.max_position_embeddings
        self.max_length = positions if max_length is None else max_length
        if not 1 <= self.max_length <= positions:
            raise InputError(f"max_length={max_length} is not from 1 to the model's {positions} positions")
        self.max_gen_toks, self.add_bos_token = max_gen_toks, add_bos_token
        self.rows = None if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)

    @property
    def device(self) -> Any:
        """The model's."""
        return self.model.device

    @property
    def eot_token_id(self) -> int:
        """The end token, which stands before a text without context, too."""
        return int(self.model.config.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Of the harness's cache of requests."""
        return str(self.model.config.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self.tokenizer.encode(string)
        begins = self.add_bos_token if add_special_tokens is None else False
        return [self.prefix_token_id, *ids] if begins and ids[:1] != [self.prefix_token_id] else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A dialogue as text, by the tokenizer's template."""
        continues = not add_generation_prompt
        text = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=continues
        )
        return str(text)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of the model's length that do not overlap in what they score."""
        texts = [request.args[0] for request in requests]
        windows: list[Row] = []
        counts = []
        for text in texts:
            ids = self.tok_encode(text)
            found = get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            some = [(None, *make_disjoint_window(window)) for window in found]
            windows += some
            counts.append(len(some))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[Row], disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """(log-likelihood, whether all tokens were the likeliest) of continuations; contexts of several are computed once."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        contexts: dict[tuple[int, ...], list[int]] = {}
        rows = []
        for i, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise InputError(f"a continuation has {len(continuation)} tokens, and the model sees {self.max_length}")
            row = (context + continuation)[-(self.max_length + 1) :]
            rows.append((row, len(continuation)))
            contexts.setdefault(tuple(row[: len(row) - len(continuation)]), []).append(i)
        alone: list[int] = []
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring") as bar:
            for before, those in contexts.items():
                if (len(those) - 1) * len(before) < _SHARED:
                    alone += those
                    continue
                past = self.model._past(list(before[:-1]))
                own = [rows[i][0][len(before) - 1 :] for i in those]
                self._answer(requests, those, self.model._scored(own, past, False), answers)
                bar.update(len(those))
            whole, counts = [rows[i][0] for i in alone], [rows[i][1] for i in alone]
            self._answer(requests, alone, self.model._scored(whole, None, False, counts), answers)
            bar.update(len(alone))
        return answers

    def _answer(self, requests: Sequence[Row], places: list[int], found: list[Any], answers: list[tuple[float, bool]]) -> None:
        for i, (logprob, rank, *_) in zip(places, found, strict=True):
            if logprob.isnan().any():
                raise NonFiniteLogitsError(f"logits of request {i} were NaN or infinite; try dtype=float32", [i], None, [0])
            answers[i] = float(logprob.double().sum()), bool((rank == 0).all())
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop sequence, of all requests together."""
        end = self.tokenizer.decode([self.eot_token_id])
        asked = [self._asked(context, how, end) for context, how in (request.args for request in requests)]
        texts = []
        with Engine(self.model, self.rows) as engine:
            found = (engine.submit(ids, **options) for ids, _, options in asked)
            jobs = list(tqdm(found, total=len(asked), disable=disable_tqdm, desc="Generating"))
            for request, job, (_, until, _) in zip(requests, jobs, asked, strict=True):
                text = self.tokenizer.decode(job.result(), skip_special_tokens=True)
                texts.append(postprocess_generated_text(text, until, None))
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _asked(self, context: str, how: dict[str, Any], end: str) -> tuple[list[int], list[str], dict[str, Any]]:
        """(ids of a context that leaves room, stop sequences, options) of a request."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(how, self.max_gen_toks))
        until = handle_stop_sequences(options.pop("until", None), eos=end)
        new = options.pop("max_gen_toks")
        if not 0 < new < self.max_length:
            raise InputError(f"max_gen_toks={new} leaves no room for a context: the model sees {self.max_length} tokens")
        ids = self.tok_encode(context)[-(self.max_length - new) :] or [self.prefix_token_id]
        if "max_length" not in options:  # of context and continuation, where a task has it
            options["max_new_tokens"] = new
        if not options["do_sample"]:
            options.pop("temperature", None)
        stops = [text for text in until if text and text != end]
        return ids, until, options | ({"stop_strings": stops} if stops else {})


def evaluate(
    model: GPTNeoForCausalLM, tasks: list[str], batch_size: int | None = None, include_path: str | None = None, **how: Any
) -> tuple[dict[str, Any], str]:
    """Run tasks of the harness.

    Args:
        tasks: their names. batch_size: as of `LM`. include_path: a folder of tasks of one's own.
        how: of `lm_eval.simple_evaluate`: num_fewshot, limit, ...

    Returns:
        (the harness's results, a table of them)
    """
    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise InputError(f"task {unknown[0]!r} is unknown to lm_eval; `lm_eval ls tasks` has their names")
    lm = LM(model, batch_size=batch_size)
    found = simple_evaluate(model=lm, tasks=tasks, task_manager=manager, log_samples=False, **how)
    return found, make_table(found)
