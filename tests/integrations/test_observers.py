"""Libraries that look inside: captum, nnsight, TransformerLens, torch's FLOP counter; what they see in transformers' models."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gptneo_fast.demo import FOLDER
from tests.support.peers import peers

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# Captum


class Last(torch.nn.Module):
    """Logits [B, V] of the last token, as attribution wants them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits[:, -1]


LAYERS = {
    "wte": lambda m: m.model.transformer.wte,
    "block": lambda m: m.model.transformer.h[1].mlp,
    "c_fc": lambda m: m.model.transformer.h[0].mlp.c_fc,
    "q_proj": lambda m: m.model.transformer.h[2].attn.attention.q_proj,
    "ln_f": lambda m: m.model.transformer.ln_f,
}
METHODS = {
    "LayerIntegratedGradients": {"n_steps": 5},
    "LayerGradientXActivation": {},
    "LayerActivation": {},
    "LayerGradCam": {"attr_dim_summation": False},
}


@pytest.mark.parametrize("place", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_captum_attributes_to_layers(method, place):
    attr = pytest.importorskip("captum.attr")
    options, found = dict(METHODS[method]), []
    for model in peers():
        wrapped = Last(model)
        each = getattr(attr, method)(wrapped, LAYERS[place](wrapped))
        target = {} if method == "LayerActivation" else {"target": 5}
        if method == "LayerIntegratedGradients":
            options["baselines"] = torch.zeros_like(IDS)
        found.append(each.attribute(IDS, **target, **options))
    same(found[1], found[0])


@pytest.mark.parametrize("method", ["FeatureAblation", "ShapleyValueSampling"])
def test_captum_attributes_a_generated_text_to_its_prompt(method):
    attr = pytest.importorskip("captum.attr")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(FOLDER / "tokenizer.json"))
    found = []
    for library, model in enumerate(peers(vocab_size=1240, bos_token_id=0, eos_token_id=0)):
        torch.manual_seed(0)
        options = {"n_samples": 3} if method == "ShapleyValueSampling" else {}
        each = attr.LLMAttribution(getattr(attr, method)(model), tokenizer)
        given = attr.TextTokenInput("Once upon a time", tokenizer)
        # with a cache captum hands transformers' model of now a mask that is too short, which it does not mind
        found.append(each.attribute(given, target=" there was", use_cached_outputs=library == 1, **options))
        generated = each.attribute(
            given, gen_args={"max_new_tokens": 4, "do_sample": False}, use_cached_outputs=False, **options
        )
        found[-1] = (found[-1].seq_attr, found[-1].token_attr, generated.seq_attr)
    for ours, theirs in zip(found[1], found[0], strict=True):
        same(ours, theirs)


# nnsight


def test_nnsight_reads_and_writes_inside_a_forward_pass():
    nnsight = pytest.importorskip("nnsight")
    found = []
    for model in peers():
        watched = nnsight.NNsight(model)
        with torch.no_grad(), watched.trace(IDS):
            first = watched.transformer.h[0].mlp.output.save()
            watched.transformer.h[1].attn.attention.v_proj.output[:, 3] = 0
            block = watched.transformer.h[1].output.save()
            watched.transformer.h[2].mlp.c_fc.output = watched.transformer.h[2].mlp.c_fc.output * 2
            logits = watched.lm_head.output.save()
        block = block[0] if isinstance(block, tuple) else block
        found.append((first, block, logits, model(IDS).logits))
    for ours, theirs in zip(found[1], found[0], strict=True):
        same(ours, theirs)
    assert not torch.allclose(found[1][2], found[1][3], atol=1e-2)


def test_nnsight_reads_gradients():
    nnsight = pytest.importorskip("nnsight")
    found = []
    for model in peers():
        watched = nnsight.NNsight(model)
        with watched.trace(IDS):
            hidden = watched.transformer.h[1].mlp.output
            hidden.requires_grad_(True)
            loss = watched.lm_head.output[:, -1].logsumexp(-1).sum()
            with loss.backward():
                grad = hidden.grad.save()
        found.append(grad)
    same(found[1], found[0])


def test_nnsight_writes_into_every_step_of_a_generation():
    nnsight = pytest.importorskip("nnsight")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(FOLDER / "tokenizer.json"))
    found = []
    for model in peers(vocab_size=1240):
        watched = nnsight.TransformersModel(model, task="text-generation", tokenizer=tokenizer)
        how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        with torch.no_grad(), watched.generate(IDS, **how) as tracer:
            for _ in tracer.iter[:6]:
                watched.transformer.h[1].mlp.output[:] = 1.0
            tokens = tracer.result.save()
        assert not torch.equal(tokens, model.generate(IDS, **how))
        found.append(tokens)
    assert torch.equal(found[1], found[0])


# TransformerLens


@pytest.mark.parametrize("compatible", [False, True])
def test_transformer_lens_takes_our_model(compatible):
    pytest.importorskip("transformer_lens.model_bridge")
    from transformer_lens.model_bridge.sources.transformers.source import boot

    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    found = []
    for model in peers(vocab_size=1240, bos_token_id=0, eos_token_id=0):
        expected = model(IDS).logits
        bridge = boot("EleutherAI/gpt-neo-125M", hf_model=copy.deepcopy(model), tokenizer=tokenizer)
        if compatible:
            bridge.enable_compatibility_mode(no_processing=True)
        logits, cache = bridge.run_with_cache(IDS)
        same(logits, expected)
        ablated = bridge.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: x * 0)])
        found.append((ablated, {k: v for k, v in cache.items() if isinstance(v, torch.Tensor)}))
    same(found[1][0], found[0][0])
    assert found[1][1].keys() == found[0][1].keys()
    for name, value in found[0][1].items():
        same(found[1][1][name], value)


# FLOPs


@pytest.mark.parametrize("training", [False, True])
def test_flops_are_counted_as_on_transformers(training):
    counts = []
    for model in peers():
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            loss = model(IDS, labels=IDS).loss
            if training:
                loss.backward()
        counts.append((counter.get_total_flops(), {k: v for k, v in counter.get_flop_counts().items() if "transformer" in k}))
    assert counts[1][0] == counts[0][0] > 0
    for name in ("GPTNeoForCausalLM.transformer.h.0.mlp.c_fc", "GPTNeoForCausalLM.transformer.h.1.attn.attention"):
        assert counts[1][1][name] == counts[0][1][name]
