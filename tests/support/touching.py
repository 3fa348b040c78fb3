"""Ways to run a model that was touched, and what its hooks got; beside transformers' model that was touched in the same way."""

import torch

IDS = torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(0))
LAYERS = dict(num_layers=2, window_size=5, max_position_embeddings=64)


def forward(model):
    return model(IDS).logits


def without_cache(model):
    return model(IDS, use_cache=False, output_hidden_states=True).logits


def cached(model):
    """A prefill, a chunk and single steps past the window."""
    out, past = [], None
    for begin, end in ((0, 9), (9, 13), *((i, i + 1) for i in range(13, 19))):
        got = model(IDS[:, begin:end], past_key_values=past, use_cache=True)
        out, past = [*out, got.logits], got.past_key_values
    return torch.cat(out, 1)


def generate(model):
    mask = torch.ones_like(IDS)
    return model.generate(IDS, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)


def backward(model):
    """Every gradient, in one vector."""
    with torch.enable_grad():
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()])


RUNS = [forward, without_cache, cached, generate, backward]


def tensors(value):
    """The tensors in what a hook got, in order; caches are not looked into."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []


def close(ours, theirs, what=""):
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    scale = theirs.double().abs().max().clamp(min=1)
    assert (ours.double() - theirs.double()).abs().max() <= 1e-4 * scale, what
