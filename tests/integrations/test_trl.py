"""trl's trainers on our models, on transformers', and on transformers' over our blocks: the same losses."""

import numpy as np
import pytest

from gptneo_fast.demo import FOLDER
from tests.support.peers import peers

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
from gptneo_fast.integrations.transformers import accelerate  # noqa: E402

TEXTS = ["Once upon a time there was a fox.", "The sun was warm.", "A small boat went out.", "Tom had a red ball."]
PAIRS = {
    "prompt": ["Once upon a", "The sun", "A small", "Tom had"],
    "chosen": [" time there was a fox.", " was warm and big.", " boat went out to sea.", " a red ball."],
    "rejected": [" stone.", " cold.", " war.", " none of it at all."],
}
HOW = {
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "logging_steps": 1,
    "learning_rate": 3e-3,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "seed": 0,
    "disable_tqdm": True,
    "save_strategy": "no",
}


def tokenizer():
    made = transformers.PreTrainedTokenizerFast(tokenizer_file=str(FOLDER / "tokenizer.json"))
    made.eos_token = made.pad_token = made.convert_ids_to_tokens(0)
    return made


def models():
    theirs, ours = peers(vocab_size=1240, bos_token_id=0, eos_token_id=0)
    return {"theirs": theirs, "live": accelerate(ours.to_transformers()), "ours": ours}


def losses(trainer):
    trainer.train()
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


def sft(model, folder, **options):
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(folder), max_length=32, **HOW | options),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS * 2}),
        processing_class=tokenizer(),
        peft_config=None,
    )


def dpo(model, folder, **options):
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(output_dir=str(folder), max_length=32, **HOW | options),
        train_dataset=datasets.Dataset.from_dict({k: v * 2 for k, v in PAIRS.items()}),
        processing_class=tokenizer(),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4),
    )


@pytest.mark.parametrize("which", ["live", "ours"])
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"packing": True}], ids=["plain", "accumulated", "packed"]
)
def test_supervised_fine_tuning(which, options, tmp_path):
    found = models()
    expected = losses(sft(found["theirs"], tmp_path, **options))
    np.testing.assert_allclose(losses(sft(found[which], tmp_path, **options)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("which", ["live", "ours"])
def test_preferences_of_an_adapter(which, tmp_path):
    found = models()
    expected = losses(dpo(found["theirs"], tmp_path))
    np.testing.assert_allclose(losses(dpo(found[which], tmp_path)), expected, rtol=1e-3, atol=1e-3)
