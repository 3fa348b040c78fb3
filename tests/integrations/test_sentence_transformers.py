"""sentence-transformers over our models and over transformers': the same embeddings, training and files."""

import pytest
import torch

import gptneo_fast
from gptneo_fast.demo import FOLDER
from tests.support.peers import demo

transformers = pytest.importorskip("transformers")
st = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: E402

from gptneo_fast.integrations.transformers import accelerate  # noqa: E402

TEXTS = [
    "a small dog went to the river",
    "the cat",
    "Once upon a time there was a little fox who lived in a wood and sang. " * 12,  # past the window
    "the cat",
]


def embedder(kind, pooling):
    """A SentenceTransformer of the demo's folder, whose model and tokenizer are then those of a kind."""
    model, tokenizer = demo(kind, "GPTNeoModel")
    inner = Transformer(str(FOLDER), model_kwargs={"dtype": torch.float32})
    inner.model, inner.processor = model, tokenizer
    return st.SentenceTransformer(modules=[inner, Pooling(model.config.hidden_size, pooling_mode=pooling)], device="cpu")


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["weightedmean", "mean", "lasttoken"])  # the first is SGPT's
@pytest.mark.parametrize("kind", ["accelerated", "converted", "ours"])
def test_embeddings_are_those_over_transformers_and_are_kept_by_a_folder(kind, pooling, fused_calls, tmp_path):
    plain = embedder("plain", pooling)
    expected = plain.encode(TEXTS, convert_to_tensor=True)
    assert not torch.allclose(expected[0], expected[2], atol=0.1) and not fused_calls
    made = embedder(kind, pooling)
    for batch_size in (1, 2, 4):
        fused_calls.clear()
        same(made.encode(TEXTS, batch_size=batch_size, convert_to_tensor=True), expected)
        assert len(fused_calls) == made[0].model.config.num_layers * 4 // batch_size
    made.save(str(tmp_path))
    again = st.SentenceTransformer(str(tmp_path), device="cpu")
    assert type(again[0].model) is transformers.GPTNeoModel
    same(again.encode(TEXTS, convert_to_tensor=True), expected)
    accelerate(again[0].model)
    same(again.encode(TEXTS, convert_to_tensor=True), expected)
    ours = gptneo_fast.GPTNeoModel.from_pretrained(tmp_path)
    ids = torch.tensor([made.tokenizer(TEXTS[0]).input_ids])
    assert torch.equal(gptneo_fast.GPT2Tokenizer.from_pretrained(tmp_path)(TEXTS[0], return_tensors="pt").input_ids, ids)
    if pooling == "mean":
        same(ours(ids)[0].mean(1)[0], expected[0])


@pytest.mark.parametrize("kind", ["accelerated", "converted", "ours"])
def test_training_by_pairs_of_texts_is_that_over_transformers(kind, tmp_path):
    datasets = pytest.importorskip("datasets")
    losses, embeddings = [], []
    rows = {"anchor": [f"the {a}" for a in "cat dog fox hen owl bee".split()], "positive": [f"{n} animals" for n in range(6)]}
    for each in ("plain", kind):
        made = embedder(each, "weightedmean")
        for name, p in made.named_parameters():
            p.requires_grad_(name.endswith("bias"))  # as SGPT trains
        trainer = st.SentenceTransformerTrainer(
            model=made,
            args=st.SentenceTransformerTrainingArguments(
                output_dir=str(tmp_path / each),
                max_steps=4,
                per_device_train_batch_size=3,
                learning_rate=1e-3,
                logging_steps=1,
                save_steps=4,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_dict(rows),
            loss=MultipleNegativesRankingLoss(made),
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        embeddings.append(made.encode(TEXTS, convert_to_tensor=True))
    assert abs(losses[0][0] - losses[0][-1]) > 1e-3
    torch.testing.assert_close(losses[1], losses[0], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(embeddings[1], embeddings[0], atol=1e-3, rtol=1e-3)
    saved = st.SentenceTransformer(str(tmp_path / kind / "checkpoint-4"), device="cpu")
    same(saved.encode(TEXTS, convert_to_tensor=True), embeddings[1])
