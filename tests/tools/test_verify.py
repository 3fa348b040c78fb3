"""verify(): it passes a right path and fails a wrong one."""

import types

import pytest
import torch

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import InputError
from gptneo_fast.ops import backends, reference
from gptneo_fast.tools import verify as verification


@pytest.fixture(scope="module")
def model():
    return gptneo_fast.load(FOLDER, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_path_is_verified(model, dtype):
    found = gptneo_fast.verify(model.to(dtype), new_tokens=24)
    assert found.ok and found.tokens == 72 and 0 < found.error <= found.allowed
    assert str(found).startswith(f"verified: {model.backend.name} backend, stepwise path, {str(dtype)[6:]}")
    model.float()


@pytest.fixture(scope="module")
def random_model():
    """One that looks as far back as its windows let it, which trained models seldom do."""
    config = gptneo_fast.GPTNeoConfig(
        vocab_size=211, hidden_size=32, num_heads=2, num_layers=2, window_size=8, max_position_embeddings=128,
        attention_layers=["global", "local"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = gptneo_fast.GPTNeoForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.dim() == 1))
    return model


def wrong(monkeypatch, name, function):
    """The model's own path has a wrong op; the reference has not."""
    broken = types.SimpleNamespace(**{k: getattr(reference, k) for k in vars(reference)})
    setattr(broken, name, function)
    choose = backends.choose

    def chosen(backend, *rest):
        return choose("reference", *rest) if backend == "reference" else backends.Choice("broken", "", broken)

    monkeypatch.setattr(backends, "choose", chosen)


def test_a_window_one_key_too_narrow_is_noticed(random_model, monkeypatch):
    def narrow(q, k, v, window, *rest):
        return reference.attention(q, k, v, window and window - 1, *rest)

    assert gptneo_fast.verify(random_model, new_tokens=4).ok
    wrong(monkeypatch, "attention", narrow)
    found = gptneo_fast.verify(random_model, new_tokens=4)
    assert not found.ok and found.error > found.allowed
    assert str(found).startswith("NOT EQUAL: broken backend")


def test_a_wrong_cached_step_is_noticed_though_its_prompt_is_right(model, monkeypatch):
    def forgets(q, k_cache, v_cache, lengths, window, starts=None):
        return reference.decode_attention(q, k_cache, v_cache * 0.5, lengths, window, starts)

    wrong(monkeypatch, "decode_attention", forgets)
    found = gptneo_fast.verify(model, new_tokens=24)
    assert not found.ok and found.error <= found.allowed
    assert found.divergence.token >= 1 and found.divergence.margin > 2 * found.allowed


def test_what_cannot_be_verified_is_refused(model):
    with pytest.raises(InputError, match="needs a GPTNeoForCausalLM"):
        gptneo_fast.verify(gptneo_fast.GPTNeoModel(model.config))
    with pytest.raises(InputError, match="512 positions"):
        gptneo_fast.verify(model, new_tokens=511)


@torch.no_grad()
def test_another_order_of_the_sums_is_the_same_model(model):
    exact = verification.twin(model, torch.float64)
    ids = torch.arange(40)[None]
    for order in (1, 2):
        logits = verification.reordered(exact, order)(ids).logits
        assert not torch.equal(logits, exact(ids).logits)
        assert (logits - exact(ids).logits).abs().max() < 1e-9
