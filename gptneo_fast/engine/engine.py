"""Engine: requests of many threads, run together by one thread; and `generate_many`."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..config import is_int, is_number
from ..errors import InputError, SetupError, short
from ..generation.callbacks import check_functions
from ..generation.captured.memory import check_memory, free_bytes, needed
from ..generation.config import Options
from ..generation.generate import GenerationMixin, request_of, settle
from ..generation.prompt import Prompt
from ..generation.request import LanguageModel
from ..network.inputs import check_ids
from ..progress import shown
from .job import Job
from .work import Surroundings, Work

_ROWS = {"cuda": 64}  # that decode together
_ROWS_ELSEWHERE = 16
_CHUNK = {"cuda": 2048}  # tokens of prompts between two steps
_CHUNK_ELSEWHERE = 256
_SEEDS = 2**64
_BESIDE = ("prefix", "truncate", "logits_processor", "stopping_criteria")  # arguments of `submit` that are no options

Given = str | Sequence[int] | Tensor


class Engine:
    """Continuous batching: requests join and leave between steps, each with its own options, length and random numbers.

    A thread of the engine's own does the work, in the autocast mode and on the CUDA stream of the thread that makes the
    engine. It ends with `close`, at the end of a `with`, and once neither the engine nor an unfinished job is held by anyone.
    What happens to the model meanwhile (hooks, adapters, replaced layers) counts from the next step on.

    Args:
        model: a GPTNeoForCausalLM.
        max_rows: requests that decode together; None for 16, on CUDA for up to 64, as many as memory holds.
        max_tokens: of a request, prompt and continuation; None for the model's positions. The cache is laid out for
            max_rows times that on CUDA, elsewhere as it is needed.
        max_waiting: requests that wait for a row before `submit` waits, too; None for four times max_rows.
        prefill_chunk_size: tokens of prompts that run between two steps, which is how long the others may have to wait; None
            for 2048 on CUDA and 256 elsewhere.

    Raises:
        InputError: a number out of range. OutOfMemoryError: a CUDA device has no room for the cache.
    """

    def __init__(
        self,
        model: Any,
        max_rows: int | None = None,
        max_tokens: int | None = None,
        *,
        max_waiting: int | None = None,
        prefill_chunk_size: int | None = None,
    ) -> None:
        if not isinstance(model, GenerationMixin):
            raise InputError(f"model is {short(model)}; give a GPTNeoForCausalLM")
        self.model = cast(LanguageModel, model)
        kind, positions = self.model.device.type, model.config.max_position_embeddings
        self.max_rows = _number("max_rows", max_rows, _ROWS.get(kind, _ROWS_ELSEWHERE))
        self.max_tokens = _number("max_tokens", max_tokens, positions, most=positions)
        self.prefill_chunk_size = _number("prefill_chunk_size", prefill_chunk_size, _CHUNK.get(kind, _CHUNK_ELSEWHERE))
        if kind == "cuda":
            self._fit(max_rows is None)
        self.max_waiting = _number("max_waiting", max_waiting, 4 * self.max_rows)
        self._work = Work(
            self.model,
            self.max_rows,
            columns=self.max_tokens,
            most_waiting=self.max_waiting,
            chunk=self.prefill_chunk_size,
            surroundings=Surroundings.now(self.model.device),
        )
        threading.Thread(target=self._work.run, name="gptneo_fast.Engine", daemon=True).start()
        self._end = weakref.finalize(self, self._work.close, cancel=True, wait=False)

    def submit(
        self,
        prompt: Given,
        *,
        prefix: Given | None = None,
        timeout: float | None = None,
        truncate: Literal["left"] | None = None,
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        **options: Any,
    ) -> Job:
        """Ask for the continuation of one prompt; waits while `max_waiting` requests wait.

        Args:
            prompt: text, or token ids [n].
            prefix: what comes before it, text or token ids, computed once for all requests that name the same.
            timeout: seconds to wait for a place in the queue; None for as long as it takes.
            truncate: "left" drops the oldest tokens of a text that leaves no room for the new ones.
            logits_processor, stopping_criteria: as those of `generate`; they get one row.
            options: see GenerationConfig; without beams, drafts and outputs of single steps.

        Raises:
            InputError, UnknownOptionError: as `generate`. SetupError: no tokenizer, a closed engine, or a forked process.
            BusyError: no place within `timeout`.
        """
        return self._submit(
            prompt,
            options,
            prefix=prefix,
            timeout=timeout,
            truncate=truncate,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
        )

    def _submit(
        self,
        prompt: Given,
        options: dict[str, Any],
        *,
        prefix: Given | None = None,
        timeout: float | None = None,
        truncate: Literal["left"] | None = None,
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        copies: bool = False,
    ) -> Job:
        """copies: whether all but the last token is shared with others."""
        if timeout is not None and not (is_number(timeout) and timeout >= 0):
            raise InputError(f"timeout={short(timeout)} is not a number of seconds from 0")
        self._work.require_this_process()
        settled = self._settled(options)
        shared = [] if prefix is None else self._ids("prefix", prefix, settled, None)
        nothing = isinstance(prompt, str) and not prompt and bool(shared)
        ids = shared + ([] if nothing else self._ids("prompt", prompt, settled, truncate))
        if settled.do_sample and settled.seed is None:
            settled.seed = int(torch.randint(2**63 - 1, ()))
        request = request_of(
            self.model,
            Prompt(torch.tensor([ids], device=self.model.device)),
            settled,
            own=check_functions("logits_processor", logits_processor),
            criteria=stopping_criteria,
        )
        if request.total > self.max_tokens:
            raise InputError(
                f"the prompt has {len(ids)} tokens and up to {request.total - len(ids)} are to come, past this engine's "
                f"max_tokens of {self.max_tokens}; ask for fewer, or make an engine for more"
            )
        job = Job(
            self,
            request,
            ids,
            shared=len(ids) - 1 if copies else len(shared),
            seed=settled.seed if settled.do_sample else None,
            decode=self.model if isinstance(prompt, str) else None,
            own=stopping_criteria or (),
        )
        if request.total > len(ids):
            self._work.put(job, timeout)
        else:
            job.finish()
        return job

    def generate_many(
        self,
        prompts: Iterable[Given | Mapping[str, Any]],
        *,
        num_return_sequences: int = 1,
        seed: int | None = None,
        errors: Literal["raise", "return"] = "raise",
        progress: bool = False,
        **options: Any,
    ) -> Iterator[Any]:
        """The continuations of prompts, in their order, as they are found; prompts are asked for as there is room.

        Args:
            prompts: texts or token ids, from any iterable; or a mapping of `prompt` and of options for it alone.
            num_return_sequences: continuations of each, given as a list where there is more than one; the prompt is
                computed once.
            seed: of the first continuation; each later one has the next number.
            errors: "return" gives an error in the place of the result that it stands for; "raise" raises it there.
            progress: show a bar on standard error.
            options: as of `submit`.
        """
        n = _number("num_return_sequences", num_return_sequences, 1)
        if errors not in ("raise", "return"):
            raise InputError(f"errors={short(errors)} is unknown; use 'raise' or 'return'")
        if not isinstance(prompts, Iterable) or isinstance(prompts, (str, Mapping)):
            raise InputError(f"prompts is a {type(prompts).__name__}; give a list or another iterable of prompts")
        plain = {name: value for name, value in options.items() if name not in _BESIDE}
        self._settled(plain if seed is None else plain | {"seed": seed})
        found = self._many(prompts, n, seed, errors == "return", options)
        return shown(found, "prompt", len(prompts) if isinstance(prompts, Sized) else None) if progress else found

    def close(self, cancel: bool = False) -> None:
        """Take no more requests, finish those that there are, or with `cancel` drop them, and end the thread."""
        self._work.close(cancel=cancel)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self.close(cancel=kind is not None)

    def _fit(self, fewer: bool) -> None:
        """Refuse rows for which there is no memory, or with `fewer` halve them first.

        Raises:
            OutOfMemoryError: see `check_memory`.
        """
        config, dtype, device = self.model.config, self.model.dtype, self.model.device
        while fewer and self.max_rows > 1 and needed(config, dtype, self.max_rows, self.max_tokens) > free_bytes(device):
            self.max_rows //= 2
        check_memory(self.model, self.max_rows, self.max_tokens, lambda: self.model.idle_runners.drop(device))

    def _many(self, prompts: Iterable[Any], n: int, seed: int | None, returns: bool, options: dict[str, Any]) -> Iterator[Any]:
        pending: deque[list[Future[Any]]] = deque()
        try:
            for i, given in enumerate(prompts):
                own = dict(given) if isinstance(given, Mapping) else {"prompt": given}
                first = own.pop("seed", None if seed is None else seed + i * n)
                pending.append([])
                for j in range(n):
                    how = options | own | {"seed": (first + j) % _SEEDS if is_int(first) else first}
                    pending[-1].append(self._answered(f"prompt {i}", how, copies=n > 1))
                while pending and (
                    len(pending) * n > self.max_rows + self.max_waiting or all(job.done() for job in pending[0])
                ):
                    yield _answer(pending.popleft(), returns)
            while pending:
                yield _answer(pending.popleft(), returns)
        finally:
            for jobs in pending:
                for job in jobs:
                    job.cancel()

    def _answered(self, name: str, how: dict[str, Any], copies: bool) -> Future[Any]:
        """A job; of what cannot be submitted a future that has the error."""
        beside = {name: how.pop(name, None) for name in _BESIDE}
        try:
            if "prompt" not in how:
                raise InputError(f"{name} is a mapping without 'prompt'; give the text under that name")
            return self._submit(how.pop("prompt"), how, **beside, copies=copies)
        except SetupError:  # it would be that of every prompt
            raise
        except Exception as error:
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed

    def _settled(self, options: dict[str, Any]) -> Options:
        settled = settle(self.model, None, options)
        refused = {
            "num_beams above 1": settled.num_beams > 1,
            "num_return_sequences above 1": settled.num_return_sequences > 1,
            "prompt_lookup_num_tokens": settled.prompt_lookup_num_tokens is not None,
            "use_cache=False": not settled.use_cache,
            "return_dict_in_generate": settled.return_dict_in_generate,
        }
        if wrong := [name for name, given in refused.items() if given]:
            raise InputError(f"{wrong[0]} is nothing for an engine, which gives one text a request; use model.generate")
        if not self.model.looked(anew=True).prepare:
            raise InputError(
                "the model's prepare_inputs_for_generation was overridden, and expects rows of one length; use model.generate"
            )
        return settled

    def _ids(self, name: str, given: Given, options: Options, truncate: Literal["left"] | None) -> list[int]:
        """Token ids of a prompt or a prefix."""
        if isinstance(given, str):
            found: list[int] = cast(Any, self.model)._encode(given, options, truncate, True)
            return found
        if isinstance(given, (list, tuple)) and given and all(map(is_int, given)):
            try:
                given = torch.tensor(given)
            except (RuntimeError, OverflowError) as error:
                raise InputError(f"{name} {short(given)} holds no token ids: {error}") from error
        if not isinstance(given, Tensor) or given.dim() != 1 or not len(given):
            raise InputError(f"{name} is {short(given)}; give a string, or token ids as a list or a tensor [n]")
        ids: list[int] = check_ids(name, given, self.model.config.vocab_size, given.device)[0].tolist()
        pad = options.pad_token_id
        if pad is None or pad in options.eos_ids or pad not in ids:
            return ids
        tokens = [i for i, token in enumerate(ids) if token != pad]  # as `generate` tells padding without a mask
        if not tokens or pad in (inner := ids[tokens[0] : tokens[-1] + 1]):
            raise InputError(f"{name} holds the pad token {pad} where a token belongs; give the tokens alone")
        return inner


class ManyMixin:
    """What GPTNeoForCausalLM offers to people with many prompts."""

    def generate_many(
        self, prompts: Iterable[Given | Mapping[str, Any]], *, max_rows: int | None = None, **options: Any
    ) -> Iterator[Any]:
        """The continuations of prompts of any lengths, in their order, as they are found, from an iterable of any length.

        Args:
            prompts: texts, which give texts, or token ids, which give token ids.
            max_rows: that decode together, see Engine.
            options: see `Engine.generate_many`.
        """
        engine = Engine(self, max_rows)
        try:
            found = engine.generate_many(prompts, **options)
        except BaseException:
            engine.close(cancel=True)
            raise
        return _closing(engine, found)


def _closing(engine: Engine, found: Iterator[Any]) -> Iterator[Any]:
    with engine:
        yield from found


def _answer(jobs: list[Future[Any]], returns: bool) -> Any:
    found = []
    for job in jobs:
        error = job.exception() if returns else None
        found.append(job.result() if error is None else error)
    return found[0] if len(found) == 1 else found


def _number(name: str, value: Any, default: int, most: int | None = None) -> int:
    """A number from 1 to `most`, or the default for None."""
    if value is None:
        return default
    if not is_int(value) or value < 1 or (most is not None and value > most):
        raise InputError(f"{name}={short(value)} is not an integer from 1" + ("" if most is None else f" to {most}"))
    return int(value)
