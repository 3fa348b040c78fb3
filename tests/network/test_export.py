"""torch.export: each class as one program of any batch and length, kept in a file; for runtimes see tests/integrations."""

import pytest
import torch

from tests.support.peers import peers

CLASSES = {
    "GPTNeoModel": "last_hidden_state",
    "GPTNeoForCausalLM": "logits",
    "GPTNeoForSequenceClassification": "logits",
    "GPTNeoForTokenClassification": "logits",
    "GPTNeoForQuestionAnswering": "start_logits",
}
BATCH, LENGTH = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=512)


class Plain(torch.nn.Module):
    """A model as export likes it: tensors in, one tensor out."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False)[self.name]


def inputs(B, T, seed=0):
    """Ids and a mask that hides some columns on the left."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[0, : T // 3] = 0
    return torch.randint(3, 97, (B, T), generator=generator), mask


def exported(cls):
    _, model = peers(cls, num_layers=2, window_size=7, pad_token_id=0)
    plain = Plain(model.requires_grad_(False), CLASSES[cls]).eval()
    shapes = {"ids": {0: BATCH, 1: LENGTH}, "mask": {0: BATCH, 1: LENGTH}}
    with torch.no_grad():
        return plain, torch.export.export(plain, inputs(2, 11), dynamic_shapes=shapes)


def same(got, want, mask, cls):
    """Where padding is nothing is asked for."""
    rows = mask.bool() if want.dim() > 1 and want.shape[:2] == mask.shape else slice(None)
    torch.testing.assert_close(got[rows], want[rows], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_program_reloads_and_takes_any_batch_and_length(cls, tmp_path):
    plain, program = exported(cls)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for B, T in ((1, 2), (2, 11), (3, 40), (5, 9)):
        ids, mask = inputs(B, T, seed=T)
        with torch.no_grad():
            same(again(ids, mask), plain(ids, mask), mask, cls)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_is_one_graph(cls):
    torch.compiler.reset()
    _, model = peers(cls, num_layers=2, window_size=7, pad_token_id=0)
    plain = Plain(model.eval(), CLASSES[cls])
    compiled = torch.compile(plain, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for B, T in ((2, 11), (3, 20)):
            ids, mask = inputs(B, T)
            same(compiled(ids, mask), plain(ids, mask), mask, cls)
    torch.compiler.reset()
