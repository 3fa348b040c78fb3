"""Ray Data on a real local Ray: what actors add is what the model says, weights are shared, a killed actor loses nothing."""

import copy
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import InputError

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
from gptneo_fast.integrations.ray import Embedder, Generator, Scorer, share, shared  # noqa: E402

TEXTS = [f"Once upon a time there was a {a} number {i}" for i in range(10) for a in ("fox", "dog", "king")]
ACTORS = {"compute": ray.data.ActorPoolStrategy(size=2), "num_cpus": 1, "batch_size": 4}


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model():
    return gptneo_fast.load(FOLDER, dtype="float32")


def rows(blocks=None):
    return ray.data.from_items([{"id": i, "text": text} for i, text in enumerate(TEXTS)], override_num_blocks=blocks)


def in_order(dataset):
    found = dataset.take_all()
    assert sorted(row["id"] for row in found) == list(range(len(TEXTS)))  # none lost, none twice
    return sorted(found, key=lambda row: row["id"])


def test_scores_are_the_model_s(cluster, model):
    kept = {"want": ["logprob"]}
    found = in_order(rows().map_batches(Scorer, fn_constructor_args=(share(model),), fn_constructor_kwargs=kept, **ACTORS))
    for row, score in zip(found, model.score(TEXTS, want=["logprob"]), strict=True):
        assert row["total"] == pytest.approx(score.total, abs=1e-3) and row["tokens"] == len(score.tokens)
        np.testing.assert_allclose(row["logprob"], score.logprob.numpy(), atol=1e-4)
        assert row["text"] in TEXTS


def test_contexts_come_from_a_column(cluster, model):
    data = ray.data.from_items([{"id": i, "text": f" {t}", "before": "The dog" if i % 2 else ""} for i, t in enumerate(TEXTS)])
    found = in_order(
        data.map_batches(Scorer, fn_constructor_args=(share(model),), fn_constructor_kwargs={"context": "before"}, **ACTORS)
    )
    for row in found[:6]:
        assert row["total"] == pytest.approx(model.score(row["text"], context=row["before"]).total, abs=1e-3)


def test_vectors_are_the_model_s(cluster, model):
    found = in_order(rows().map_batches(Embedder, fn_constructor_args=(share(model),), **ACTORS))
    torch.testing.assert_close(
        torch.tensor(np.stack([row["embedding"] for row in found])), model.embed(TEXTS), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("sampled", [False, True])
def test_continuations_do_not_depend_on_how_rows_are_batched(cluster, model, sampled):
    how = {"max_new_tokens": 8, "do_sample": sampled, "seed": 3}
    reference = share(model)
    first, second = (
        in_order(
            rows().map_batches(
                Generator, fn_constructor_args=(reference,), fn_constructor_kwargs=how, **ACTORS | {"batch_size": size}
            )
        )
        for size in (4, 7)
    )
    assert [row["generated"] for row in first] == [row["generated"] for row in second]
    if not sampled:
        assert [row["generated"] for row in first] == list(model.generate_many(TEXTS, max_new_tokens=8, do_sample=False))


class Dying(Scorer):
    """The first actor to see its third batch is killed in the middle of it."""

    def __init__(self, model, mark):
        super().__init__(model)
        self.mark, self.seen = Path(mark), 0

    def __call__(self, batch):
        self.seen += 1
        found = super().__call__(batch)
        if self.seen == 3:
            try:
                self.mark.open("x").close()
            except FileExistsError:
                return found
            os.kill(os.getpid(), signal.SIGKILL)
        return found


def test_the_work_of_a_killed_actor_is_done_again(cluster, model, tmp_path):
    mark = tmp_path / "killed"
    data = rows(blocks=15).map_batches(Dying, fn_constructor_args=(share(model), str(mark)), **ACTORS | {"batch_size": 2})
    found = in_order(data)
    assert mark.exists()
    assert [row["total"] for row in found] == pytest.approx([score.total for score in model.score(TEXTS)], abs=1e-3)


@ray.remote
def memory_of(reference):
    """Where weights lie in another process, and the logits there."""
    model = shared(reference[0])
    weight = model.transformer.h[0].mlp.c_fc.weight
    at = getattr(weight, "values" if model.is_quantized else "data").data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(x, 16) for x in line.split()[0].split("-"))
        if begin <= at < end:
            return line, model(torch.tensor([[1, 2, 3]])).logits.detach()
    raise AssertionError


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("how", ["float32", "bfloat16", "int8"])
def test_weights_are_the_memory_of_the_store(cluster, how):
    options = {"dtype": how} if how != "int8" else {"quantize": "int8"}
    model = gptneo_fast.load(FOLDER, **options)
    reference = share(model)
    line, logits = ray.get(memory_of.remote([reference]))
    assert "plasma" in line or "/dev/shm" in line
    assert torch.equal(logits, model(torch.tensor([[1, 2, 3]])).logits)
    own = shared(reference)
    assert own.lm_head.weight is own.transformer.wte.weight  # tied as it was
    changed = copy.deepcopy(own)
    if how != "int8":
        with torch.no_grad():
            changed.transformer.wte.weight.add_(1)  # a copy may be written to


def test_what_somebody_put_on_a_weight_goes_with_it(cluster):
    model = gptneo_fast.load(FOLDER, dtype="float32")
    weight = model.transformer.wpe.weight
    weight.note = "mine"
    own = shared(share(model)).transformer.wpe.weight
    assert own.note == "mine" and torch.equal(own, weight)
    weight.requires_grad_().register_hook(lambda gradient: gradient * 2)
    with pytest.raises(InputError, match="has a tensor hook, which does not go to other processes"):
        share(model)


def test_bad_input_says_what_is_wrong(cluster, model):
    with pytest.raises(InputError, match=r"model is 3; give what share\(model\) returns"):
        Scorer(3)
    with pytest.raises(InputError, match="there is no column 'text'; the rows have 'words'"):
        Scorer(share(model))({"words": np.array(["a"])})
