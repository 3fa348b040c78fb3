"""Models and tokenizers in other processes: spawned ones that share the weights, and the workers of a DataLoader."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gptneo_fast
from gptneo_fast.demo import FOLDER

ROOT = Path(__file__).parents[2]
SPAWN = """
import torch, gptneo_fast
from gptneo_fast.demo import FOLDER

def child(model, found):
    weight = model.transformer.wte.weight
    with torch.no_grad():
        found.put((weight.is_shared(), model(torch.tensor([[1, 2, 3]])).logits.tolist(),
                   model.generate_text("Once upon a time", max_new_tokens=8)))
        weight.zero_()  # of everybody

if __name__ == "__main__":
    model = gptneo_fast.load(FOLDER, dtype="float32").share_memory()
    want = model(torch.tensor([[1, 2, 3]])).logits.detach(), model.generate_text("Once upon a time", max_new_tokens=8)
    context = torch.multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=child, args=(model, found))
    process.start()
    shared, logits, text = found.get(timeout=120)
    process.join()
    assert process.exitcode == 0 and shared and text == want[1], text
    torch.testing.assert_close(torch.tensor(logits), want[0])
    assert not model.transformer.wte.weight.any()
    print("same")
"""


def test_a_spawned_process_computes_on_the_same_memory(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(SPAWN)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0 and "same" in done.stdout, done.stderr


class Texts(torch.utils.data.Dataset):
    """Ids of lines, made where the worker is."""

    def __init__(self, lines, tokenizer):
        self.lines, self.tokenizer = lines, tokenizer

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, i):
        return self.tokenizer(self.lines[i])


@pytest.mark.filterwarnings("ignore:This process")
def test_workers_of_a_data_loader_tokenize_and_pad():
    model = gptneo_fast.load(FOLDER, dtype="float32")
    tokenizer = model.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    lines = [f"The {a} was {b}." for a in ("fox", "little dog", "king") for b in ("red", "very happy")]
    model.generate_text("Once", max_new_tokens=2)  # threads that a fork does not have

    def collate(rows):
        return dict(tokenizer.pad(rows, return_tensors="pt"))

    batches = list(torch.utils.data.DataLoader(Texts(lines, tokenizer), batch_size=2, num_workers=2, collate_fn=collate))
    whole = tokenizer(lines, return_tensors="pt", padding=True)
    assert [row for b in batches for row in tokenizer.batch_decode(b["input_ids"], skip_special_tokens=True)] == lines
    with torch.no_grad():
        losses = [model(**batch, labels=batch["input_ids"]).loss for batch in batches]
    assert len(losses) == 3 and all(loss.isfinite() for loss in losses) and whole["input_ids"].shape[0] == len(lines)
