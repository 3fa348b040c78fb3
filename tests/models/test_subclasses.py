"""Classes of users' own over ours behave as over transformers': what is initialised, tied, loaded, and called by generate."""

import pytest
import torch
from torch import nn

import gptneo_fast
from gptneo_fast.errors import CheckpointError, InputError
from tests.support.peers import SMALL, peers

transformers = pytest.importorskip("transformers")
IDS = torch.arange(3, 15).view(2, 6)
C = SMALL["hidden_size"]


@pytest.fixture
def folder(tmp_path):
    peers(initializer_range=0.1)[0].save_pretrained(tmp_path)
    return tmp_path


def both(make, *args):
    """What `make(library, ...)` gives in transformers and here, from the same seed."""
    found = []
    for library in (transformers, gptneo_fast):
        torch.manual_seed(5)
        with torch.no_grad():
            found.append(make(library, *args))
    return found


def same(make, *args):
    want, got = both(make, *args)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def base_of(library):
    return getattr(library, "GPTNeoPreTrainedModel", transformers.models.gpt_neo.modeling_gpt_neo.GPTNeoPreTrainedModel)


@pytest.mark.parametrize("cls", ["GPTNeoModel", "GPTNeoForCausalLM"])
@pytest.mark.parametrize("over", ["transformers", "ours"])
def test_post_init_keeps_what_was_loaded_and_initialises_the_rest(cls, over, folder):
    def make(library):
        class Own(transformers.PreTrainedModel if over == "transformers" else base_of(library)):
            config_class = transformers.GPTNeoConfig if over == "transformers" else library.GPTNeoConfig

            def __init__(self, config):
                super().__init__(config)
                self.backbone = getattr(library, cls).from_pretrained(folder)
                self.head = nn.Linear(C, 3)
                self.post_init()

        made = Own(Own.config_class.from_pretrained(folder))
        assert made.head.bias.abs().max() == 0 and 0.07 < made.head.weight.std() < 0.13
        return made.backbone(IDS)[0]

    same(make)


@pytest.mark.filterwarnings("ignore:.*freshly initialised")
def test_a_new_head_is_initialised_and_nothing_else(folder):
    def make(library):
        model = library.GPTNeoForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
        model.initialize_weights()
        model.score = nn.Linear(C, 5, bias=False)
        model.num_labels = 5
        model.init_weights()
        assert 0.05 < model.score.weight.std() < 0.2
        return model.transformer(IDS)[0]

    same(make)


@pytest.mark.parametrize("part", ["trunk", "wte", "lm_head"])
def test_a_part_put_in_by_an_init_is_tied_when_fresh_and_when_loaded(part, folder):
    def make(library):
        class Trunk(library.GPTNeoModel):
            pass

        class Own(library.GPTNeoForCausalLM):
            def __init__(self, config):
                super().__init__(config)
                if part == "trunk":
                    self.transformer = Trunk(config)
                elif part == "wte":
                    self.transformer.wte = nn.Embedding(config.vocab_size, config.hidden_size)
                else:
                    self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
                self.post_init()

        for model in (Own(library.GPTNeoConfig.from_pretrained(folder)), loaded := Own.from_pretrained(folder)):
            assert model.lm_head.weight is model.transformer.wte.weight
        return loaded(IDS).logits, loaded.generate(IDS[:1], max_new_tokens=4, do_sample=False)

    same(make)


def test_our_model_in_somebodys_pretrained_model_is_saved_and_loaded_whole(folder, tmp_path):
    def make(library):
        class Own(transformers.PreTrainedModel):
            config_class = transformers.GPTNeoConfig
            base_model_prefix = "lm"

            def __init__(self, config):
                super().__init__(config)
                self.lm = library.GPTNeoForCausalLM(library.GPTNeoConfig.from_dict(config.to_dict()))
                self.post_init()

        made = Own(transformers.GPTNeoConfig.from_pretrained(folder))
        made.lm.load_state_dict(library.GPTNeoForCausalLM.from_pretrained(folder).state_dict())
        made.save_pretrained(tmp_path / library.__name__)
        again, info = Own.from_pretrained(tmp_path / library.__name__, output_loading_info=True)
        assert not info["missing_keys"] and again.lm.lm_head.weight is again.lm.transformer.wte.weight
        return again.eval().lm(IDS).logits

    same(make)


@pytest.mark.filterwarnings("ignore:.*freshly initialised")
def test_layers_of_ones_own_in_blocks_another_prefix_and_arguments(folder, tmp_path):
    def blocks(library):
        class Own(library.GPTNeoForCausalLM):
            def __init__(self, config, extra=3):
                super().__init__(config)
                for block in self.transformer.h:
                    block.adapter = nn.Linear(C, extra)
                self.post_init()

        model = Own.from_pretrained(folder, extra=5)
        assert model.transformer.h[0].adapter.weight.shape == (5, C) and model.transformer.h[0].adapter.bias.abs().max() == 0
        return model(IDS).logits

    def prefix(library):
        class Own(base_of(library)):
            base_model_prefix = "model"

            def __init__(self, config):
                super().__init__(config)
                self.model = library.GPTNeoModel(config)
                self.post_init()

        return Own.from_pretrained(tmp_path / "trunk").model(IDS)[0]

    same(blocks)
    transformers.GPTNeoModel.from_pretrained(folder).save_pretrained(tmp_path / "trunk")
    same(prefix)
    config = gptneo_fast.GPTNeoConfig.from_pretrained(folder).replace(num_layers=4)
    with pytest.raises(CheckpointError, match=r"no tensor for h\.3"):  # a released layer is still missed
        gptneo_fast.GPTNeoForCausalLM.from_pretrained(folder, config=config)


def turned(out, name):
    out[name] = -out[name]
    return out


def test_generate_calls_what_a_class_overrides(folder):
    def calls(library):
        class Own(library.GPTNeoForCausalLM):
            def __call__(self, *args, **keywords):
                return turned(super().__call__(*args, **keywords), "logits")

        class Trunk(library.GPTNeoModel):
            def __call__(self, *args, **keywords):
                return turned(super().__call__(*args, **keywords), "last_hidden_state")

        model, other = Own.from_pretrained(folder), library.GPTNeoForCausalLM.from_pretrained(folder)
        other.transformer = Trunk.from_pretrained(folder)
        other.tie_weights()
        how = {"max_new_tokens": 5, "do_sample": False}
        return [
            model.generate(IDS, **how),
            model.generate(IDS, num_beams=2, **how),
            model.generate(IDS, use_cache=False, **how),
            other(IDS).logits,
            other.generate(IDS, **how),
        ]

    def keywords(library):
        class Own(library.GPTNeoForCausalLM):
            def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **how):
                found = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **how)
                return found | {"position_ids": found["position_ids"] + 3}

        return Own.from_pretrained(folder).generate(IDS, max_new_tokens=5, do_sample=False)

    def forwards(library):
        seen = []

        class Own(library.GPTNeoForCausalLM):
            def forward(self, input_ids=None, **others):
                seen.append(sorted({"past_key_values": "cache"}.get(name, name) for name in others))
                hidden = self.transformer(input_ids, **others)
                return transformers.modeling_outputs.CausalLMOutputWithPast(
                    logits=self.lm_head(hidden[0]), past_key_values=hidden[1]
                )

        found = Own.from_pretrained(folder).generate(IDS[:1], max_new_tokens=3, do_sample=False)
        return found, [len(names) for names in seen]

    for make in (calls, keywords, forwards):
        same(make)


def test_a_part_of_transformers_generate_that_is_not_called_is_refused():
    class Own(gptneo_fast.GPTNeoForCausalLM):
        def _sample(self, *args, **keywords):
            return None

    _, ours = peers()
    with pytest.raises(InputError, match=r"Own\._sample is a part of transformers' generate, which this one does not call"):
        Own(ours.config).generate(IDS)
    ours._get_logits_processor = lambda *args, **keywords: []
    with pytest.raises(InputError, match=r"GPTNeoForCausalLM\._get_logits_processor is a part"):
        ours.generate(IDS)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids, **others):
        return self.inner(ids, **others)


@pytest.mark.filterwarnings("ignore:use_cache=True does not go")
@pytest.mark.parametrize("wrap", [Wrapper, nn.DataParallel])
def test_a_trunk_in_a_wrapper_counts(wrap):
    found = []
    for model in peers():
        model.transformer = wrap(model.transformer)
        with torch.no_grad():
            logits = model(IDS).logits
            tokens = [model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
        model.train()
        model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        found.append((logits, tokens, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cls", ["GPTNeoForCausalLM", "GPTNeoForSequenceClassification", "GPTNeoForQuestionAnswering"])
def test_a_hook_on_the_trunk_sees_and_changes_the_ids_in_their_place(cls):
    found = []
    for model in peers(cls, pad_token_id=0):
        model.transformer.register_forward_pre_hook(lambda module, args: ((args[0] + 1) % 90, *args[1:]))
        with torch.no_grad():
            found.append(model(IDS)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}, {"guidance_scale": 1.7}], ids=str)
@pytest.mark.parametrize("name", ["prepare_inputs_for_generation", "_update_model_kwargs_for_generation"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_overridden_steps_however_generation_goes(name, named, how, folder):
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    mask = torch.ones_like(ids)
    if not how.get("prompt_lookup_num_tokens"):
        mask[:, :2] = 0

    def make(library):
        def prepared(self, input_ids, attention_mask=None, **keywords):
            return super(Own, self).prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **keywords)

        def updated(self, outputs, model_kwargs, **more):
            found = super(Own, self)._update_model_kwargs_for_generation(outputs, model_kwargs, **more)
            return found | ({"token_type_ids": None} if named else {})

        def forward(self, *args, **keywords):
            return super(Own, self).forward(*args, **keywords)

        methods = {name: prepared if name.startswith("prepare") else updated} | ({} if named else {"forward": forward})
        Own = type("Own", (library.GPTNeoForCausalLM,), methods)
        return Own.from_pretrained(folder).generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **how)

    same(make)


def test_weights_that_got_their_memory_later_are_initialised(folder):
    with torch.device("meta"):
        model = gptneo_fast.GPTNeoForCausalLM(gptneo_fast.GPTNeoConfig(**SMALL))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    model.init_weights()
    assert 0.01 < model.transformer.wte.weight.std() < 0.03 and model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.transformer.ln_f.weight, torch.ones(C))
    model = gptneo_fast.GPTNeoForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(120)
    before = model.transformer.wte.weight.clone()
    model.init_weights()
    assert torch.equal(model.transformer.wte.weight, before)


def test_an_init_that_names_a_field_of_the_configuration_leaves_it_there(folder):
    def make(library):
        class Own(library.GPTNeoForSequenceClassification):
            def __init__(self, config, num_labels=None, resid_dropout=0.3, extra=1):
                super().__init__(config)
                self.seen = num_labels, resid_dropout, extra

        model = Own.from_pretrained(folder, num_labels=5, resid_dropout=0.25, extra=2)
        return [model.config.num_labels, model.config.resid_dropout, *model.seen[1:], *model.score.weight.shape]

    with pytest.warns(gptneo_fast.errors.GPTNeoFastWarning, match="freshly initialised"):
        want, got = both(make)
    assert got == want == [5, 0.25, 0.3, 2, 5, C]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_buffers_and_tensors_of_a_dtype_of_their_own_are_saved_and_loaded(dtype, tmp_path):
    def make(library):
        class Own(base_of(library)):
            def __init__(self, config):
                super().__init__(config)
                self.transformer = library.GPTNeoModel(config)
                self.norm, self.out = nn.BatchNorm1d(C), nn.Linear(C, 3)
                self.register_buffer("weights", torch.tensor([1.0, 2.0, 3.0]))
                self.register_buffer("order", torch.tensor([2, 0, 1]))
                self.temperature = nn.Parameter(torch.ones(1, dtype=torch.float32))
                self.post_init()

        model = Own(library.GPTNeoConfig(**SMALL))
        model.norm.running_mean += 2
        model.norm.num_batches_tracked += 7
        model.weights += 1
        model.order.copy_(torch.tensor([1, 2, 0]))
        model.temperature.data.fill_(1 / 3)
        folder = tmp_path / library.__name__
        model.save_pretrained(folder)
        loaded = Own.from_pretrained(folder, dtype=dtype)
        held = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
        assert loaded.config.dtype is loaded.out.weight.dtype is (dtype or torch.float32)
        return {n: t for n, t in held.items() if not n.startswith(("transformer.", "out."))}

    want, got = both(make)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)


def test_what_is_loaded_of_a_layer_stays_where_the_rest_is_initialised():
    model = gptneo_fast.GPTNeoForQuestionAnswering(gptneo_fast.GPTNeoConfig(**SMALL))
    values = {name: value for name, value in model.state_dict().items() if name != "qa_outputs.bias"}
    with pytest.warns(gptneo_fast.errors.GPTNeoFastWarning, match=r"no weights for qa_outputs\.bias"):
        loaded = type(model).from_pretrained(None, config=model.config, state_dict=values)
    assert torch.equal(loaded.qa_outputs.weight, model.qa_outputs.weight) and not loaded.qa_outputs.bias.any()


def test_a_buffer_of_another_kind_is_refused():
    class Own(gptneo_fast.GPTNeoForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("order", torch.tensor([2, 0, 1]))

    model = Own(gptneo_fast.GPTNeoConfig(**SMALL))
    values = model.state_dict() | {"order": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"tensor 'order' is float32, and the model's buffer is int64"):
        Own.from_pretrained(None, config=model.config, state_dict=values)
