"""Ray Data over many texts: an actor pool whose actors generate, score or embed, with one copy of the weights a node.

model = share("EleutherAI/gpt-neo-1.3B")
texts = ray.data.read_text("s3://...")
actors = ray.data.ActorPoolStrategy(size=8)
texts.map_batches(Scorer, fn_constructor_args=(model,), batch_size=256, compute=actors, num_gpus=1).write_parquet("scores")

Rows keep their columns and get new ones. Nothing depends on how rows were batched or how often a batch was begun (an actor that
dies has its batches redone): sampled texts are drawn with the row's own seed.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor, nn

from ..engine import Engine
from ..errors import InputError, short
from ..models.load import load

Batch = dict[str, Any]  # column -> array of its rows


def share(model: str | os.PathLike[str] | nn.Module, **options: Any) -> ray.ObjectRef:
    """A model in Ray's object store, of which each node keeps one copy, whatever the number of actors there.

    Args:
        model: folder or hub id, loaded here and on the CPU; or a model, with its tokenizer, adapters and hooks.
        options: of `gptneo_fast.load`.

    Returns:
        What the classes below take for a model.
    """
    found = model if isinstance(model, nn.Module) else load(model, **{"device": "cpu"} | options)
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _Pickler(file, 5, buffer_callback=buffers.append).dump(found)
    return ray.put((file.getvalue(), [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]))


def shared(reference: ray.ObjectRef) -> Any:
    """The model that `share` was given. On the CPU its weights are the object store's memory, which nothing can write to:
    a copy (`copy.deepcopy`) can be trained or changed."""
    data, arrays = ray.get(reference)
    return pickle.loads(data, buffers=arrays)


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, whose memory stays outside of the stream."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor) or type(obj) not in (Tensor, nn.Parameter):
            return NotImplemented
        if obj._backward_hooks:  # which torch would lose without a word
            raise InputError(
                f"a weight of shape {list(obj.shape)} has a tensor hook, which does not go to other processes; remove it, and "
                "register it on what shared(...) returns"
            )
        if vars(obj):  # torch keeps what somebody put there
            return NotImplemented
        array = obj.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return _tensor, (array, obj.dtype, tuple(obj.shape), isinstance(obj, nn.Parameter), obj.requires_grad)


def _tensor(array: Any, dtype: torch.dtype, shape: tuple[int, ...], parameter: bool, grad: bool) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nobody may write to it
        found = torch.from_numpy(array).view(dtype).view(shape)
    return nn.Parameter(found, grad) if parameter else found.requires_grad_(grad)


class _Worker:
    """One model in one actor.

    Args:
        model: what `share` gave; or folder or hub id, which every actor loads by itself.
        column: of the texts.
        device: None for CUDA where the actor has a GPU, else the CPU.
    """

    def __init__(self, model: Any, column: str = "text", device: str | None = None) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(model, (str, os.PathLike)):
            self.model = load(model, device=device)
        elif isinstance(model, ray.ObjectRef):
            self.model = shared(model).to(device)
        else:
            raise InputError(f"model is {short(model)}; give what share(model) returns, or a name")
        self.column = column

    def _texts(self, batch: Batch, column: str | None = None) -> list[Any]:
        column = column or self.column
        if column not in batch:
            raise InputError(f"there is no column {column!r}; the rows have {', '.join(map(repr, batch))}")
        return [text.tolist() if isinstance(text, np.ndarray) else text for text in batch[column]]


class Generator(_Worker):
    """Adds continuations of texts; rows of a batch are decoded together (Engine).

    Args:
        model, column, device: as above. output: the new column.
        max_rows: as of `Engine`.
        seed: with do_sample, a row's seed is this plus a checksum of its text, so that it draws the same wherever it runs;
            rows of one text are given one continuation.
        options: of `Engine.submit`.
    """

    def __init__(
        self,
        model: Any,
        column: str = "text",
        output: str = "generated",
        *,
        max_rows: int | None = None,
        seed: int = 0,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, column, device)
        self.output, self.seed, self.options = output, seed, options
        self.engine = Engine(self.model, max_rows)

    def __call__(self, batch: Batch) -> Batch:
        """A batch with its continuations, texts of texts and ids of ids."""
        prompts: list[Mapping[str, Any]] = [{"prompt": text, "seed": self._seed(text)} for text in self._texts(batch)]
        return batch | {self.output: _column(self.engine.generate_many(prompts, **self.options))}

    def _seed(self, text: Any) -> int:
        return self.seed + zlib.crc32(str(text).encode())


class Scorer(_Worker):
    """Adds what the model says of texts: columns `total` and `tokens`, the number of those that have a score, and the wanted.

    Args:
        model, column, device: as above.
        context: a column of what stands before each text; None for none.
        want: lists of numbers of the tokens, see `model.score`.
    """

    def __init__(
        self,
        model: Any,
        column: str = "text",
        *,
        context: str | None = None,
        want: Sequence[str] = (),
        device: str | None = None,
    ) -> None:
        super().__init__(model, column, device)
        self.context, self.want = context, list(want)

    def __call__(self, batch: Batch) -> Batch:
        """A batch with its scores."""
        texts = self._texts(batch)
        before = [None] * len(texts) if self.context is None else self._texts(batch, self.context)
        places: dict[Any, list[int]] = {}
        for i, context in enumerate(before):
            places.setdefault(tuple(context) if isinstance(context, list) else context, []).append(i)
        scores: list[Any] = [None] * len(texts)
        for context, those in places.items():
            found = self.model.score([texts[i] for i in those], context=context, want=self.want, progress=False)
            for i, score in zip(those, found, strict=True):
                scores[i] = score
        columns = {
            "total": np.array([score.total for score in scores], np.float64),
            "tokens": np.array([len(score.tokens) for score in scores], np.int64),
        }
        return batch | columns | {name: _column(getattr(score, name).numpy() for score in scores) for name in self.want}


class Embedder(_Worker):
    """Adds vectors of texts.

    Args:
        model, column, device: as above. output: the new column, float32 [C].
        options: of `model.embed`: pooling, normalize.
    """

    def __init__(
        self, model: Any, column: str = "text", output: str = "embedding", *, device: str | None = None, **options: Any
    ) -> None:
        super().__init__(model, column, device)
        self.output, self.options = output, options

    def __call__(self, batch: Batch) -> Batch:
        """A batch with its vectors."""
        return batch | {self.output: self.model.embed(self._texts(batch), progress=False, **self.options).numpy()}


def _column(rows: Any) -> Any:
    """An array of objects, of whatever lengths these have."""
    found = list(rows)
    column = np.empty(len(found), object)
    for i, row in enumerate(found):
        column[i] = row
    return column
