"""What transformers' scripts pass, set and take apart, with the results that they get there."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import DeviceError, GPTNeoFastWarning, InputError, UnknownOptionError
from tests.support.peers import peers

transformers = pytest.importorskip("transformers")
IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pair():
    return peers(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])


def tokens(model, **options):
    torch.manual_seed(1)
    options = {"attention_mask": torch.ones_like(IDS), "pad_token_id": 0, "eos_token_id": None} | options
    return model.generate(IDS, **options)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# Numbers and lists of other libraries


@pytest.mark.parametrize(
    "options",
    [
        dict(max_length=np.int64(16)),
        dict(max_length=torch.tensor(16)),
        dict(max_new_tokens=np.int32(4)),
        dict(max_new_tokens=4, eos_token_id=(1, 2)),
        dict(max_new_tokens=4, eos_token_id=torch.tensor([1, 2])),
        dict(max_new_tokens=3, num_beams=2, num_return_sequences=np.int64(2)),
        dict(max_new_tokens=3, do_sample=True, temperature=np.float64(0.7), top_k=np.int64(5)),
        dict(max_new_tokens=3, do_sample=np.bool_(True), top_p=torch.tensor(0.5)),
    ],
    ids=str,
)
def test_numbers_of_numpy_and_torch_and_tuples_are_numbers_and_lists(pair, options):
    theirs, ours = pair
    plain = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in options.items()}
    assert torch.equal(tokens(ours, **options), tokens(theirs, **plain))


def test_one_text_without_a_batch_gives_logits_without_one(pair):
    _, ours = pair
    close(ours(IDS[0]).logits, ours(IDS[:1]).logits[0])
    close(ours(IDS[0], labels=IDS[0]).loss, ours(IDS[:1], labels=IDS[:1]).loss)


# Outputs


@torch.no_grad()
def test_outputs_are_dicts_and_trees_and_are_built_anew_from_mappings(pair):
    out = pair[1](IDS, labels=IDS, output_hidden_states=True, use_cache=False)
    assert isinstance(out, dict) and list(out) == ["loss", "logits", "hidden_states"] == list(dict(out))
    doubled = pytree.tree_map(lambda t: t * 2, out)
    assert type(doubled) is type(out) and torch.equal(doubled.logits, out.logits * 2) and len(doubled.hidden_states) == 3
    again = type(out)(dict(out))  # as accelerate does
    assert torch.equal(again.loss, out.loss) and again.to_tuple()[1] is out.logits
    again.loss = None
    assert "loss" not in again and again[0] is out.logits
    del again["hidden_states"]
    assert again.hidden_states is None and len(copy.deepcopy(again)) == 1
    with pytest.raises(KeyError, match="no field 'other'"):
        again["other"] = 1


# Loading and saving


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    pair[0].save_pretrained(place)
    return place


@pytest.mark.parametrize(
    "options",
    [
        dict(device_map="auto", low_cpu_mem_usage=True, torch_dtype="auto"),
        dict(device_map={"transformer": "cpu", "lm_head": "cpu"}, offload_folder="x", max_memory={"cpu": "4GiB"}),
        dict(variant=None, offload_state_dict=True, revision="main", trust_remote_code=True),
    ],
    ids=str,
)
@torch.no_grad()
def test_arguments_of_loading_that_mean_nothing_here_are_taken(pair, folder, options):
    close(gptneo_fast.GPTNeoForCausalLM.from_pretrained(folder, **options)(IDS).logits, pair[0](IDS).logits)


def test_arguments_of_loading_that_would_be_lost_are_refused(folder):
    load = gptneo_fast.GPTNeoForCausalLM.from_pretrained
    with pytest.raises(InputError, match="splits the model"):
        load(folder, device_map={"transformer": "cpu", "lm_head": "meta"})
    with pytest.raises(UnknownOptionError, match="variant"):
        load(folder, variant="fp16")


def test_what_callers_of_save_pretrained_pass(pair, tmp_path):
    _, ours = pair
    ours.save_pretrained(tmp_path / "other process", is_main_process=False)
    assert not (tmp_path / "other process").exists()
    other = {name: value + 1 for name, value in ours.state_dict().items()}
    ours.save_pretrained(tmp_path, True, other, torch.save, False, "40KB", token=None)
    loaded = gptneo_fast.GPTNeoForCausalLM.from_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(loaded.transformer.wpe.weight, ours.transformer.wpe.weight + 1)
    for option, error in (
        ({"push_to_hub": True}, "push_to_hub"),
        ({"variant": "fp16"}, "variant"),
        ({"max_shardsize": 1}, "max_shardsize"),
    ):
        with pytest.raises(UnknownOptionError, match=error):
            ours.save_pretrained(tmp_path, **option)
    with pytest.warns(GPTNeoFastWarning, match="safetensors are written, as transformers does"):
        ours.save_pretrained(tmp_path / "no pickle", safe_serialization=False)
    assert {path.name for path in (tmp_path / "no pickle").iterdir()} >= {"model.safetensors", "config.json"}


def test_a_head_that_came_apart_from_the_embedding_is_saved_and_loaded(pair, tmp_path):
    ours = copy.deepcopy(pair[1])
    ours.lm_head.weight = nn.Parameter(torch.randn_like(ours.lm_head.weight))
    ours.save_pretrained(tmp_path)
    for library in (gptneo_fast, transformers):
        loaded = library.GPTNeoForCausalLM.from_pretrained(tmp_path)
        close(loaded(IDS).logits, ours(IDS).logits)


# Heads of one's own


@pytest.mark.parametrize("post_init", [True, False])
def test_a_head_of_ones_own_is_built_loaded_saved_and_initialised_as_in_transformers(folder, tmp_path, post_init):
    found = []
    for library in (transformers, gptneo_fast):

        class Reward(library.GPTNeoPreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                self.transformer = (gptneo_fast if isinstance(config, gptneo_fast.GPTNeoConfig) else transformers).GPTNeoModel(
                    config
                )
                self.value = nn.Linear(config.hidden_size, 1, bias=False)
                self.scale = nn.Parameter(torch.full((3,), 0.5))
                if post_init or hasattr(config, "transformers_version"):  # theirs cannot do without
                    self.post_init()

            def forward(self, input_ids=None):
                return self.value(self.transformer(input_ids)[0]).squeeze(-1) * self.scale.sum()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kw: None)
            model = Reward.from_pretrained(folder)
        if library is gptneo_fast:
            assert torch.equal(model.scale, torch.full((3,), 0.5)) and 0.005 < float(model.value.weight.std()) < 0.05
        with torch.no_grad():
            model.value.weight.copy_(torch.linspace(-1, 1, 32)[None])
            model.scale.fill_(0.5)
        model.save_pretrained(tmp_path / library.__name__)
        found.append(Reward.from_pretrained(tmp_path / library.__name__)(IDS).detach())
    close(found[1], found[0])


def test_names_that_libraries_ask_a_model_for(pair):
    theirs, ours = pair
    for name in (
        "get_memory_footprint prepare_inputs_for_generation enable_input_require_grads set_output_embeddings "
        "post_init init_weights get_position_embeddings push_to_hub name_or_path main_input_name "
        "config_class _no_split_modules _tied_weights_keys supports_gradient_checkpointing _from_config "
        "loss_function warn_if_padding_and_no_attention_mask add_model_tags"
    ).split():
        assert hasattr(theirs, name) and hasattr(ours, name), name
    assert ours.get_memory_footprint() == sum(p.nbytes for p in ours.parameters())
    assert type(ours).can_generate() and not gptneo_fast.GPTNeoModel.can_generate()
    ours.add_model_tags(["a", "b"])
    assert ours.model_tags == ["a", "b"] and gptneo_fast.GPTNeoForCausalLM.model_tags == []


@pytest.mark.parametrize("size", ["abc", "", "5", "5XB", 0, -1, 1.5, None, True], ids=repr)
def test_a_shard_size_that_is_none_is_named_and_nothing_is_written(pair, tmp_path, size):
    with pytest.raises(InputError, match=r"max_shard_size .* is no size; give bytes above 0"):
        pair[1].save_pretrained(tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"use_safetensors": "x"}, InputError, "use_safetensors is 'x'"),
        ({"config": {}}, InputError, r"config is {} \(dict\); give a gptneo_fast.GPTNeoConfig"),
        ({"config": 5}, InputError, "config is 5"),
        ({"device_map": "meta"}, DeviceError, "'meta' has no memory"),
        ({"device_map": "mps"}, DeviceError, "device 'mps' was asked for, but torch has none here"),
        ({"device_map": "xla"}, DeviceError, "device 'xla' was asked for, but torch has none here"),
        ({"device_map": "nonsense"}, InputError, "device 'nonsense' is unknown"),
    ],
    ids=str,
)
def test_loading_names_an_argument_that_it_cannot_follow(pair, tmp_path, options, error, words):
    pair[1].save_pretrained(tmp_path)
    with pytest.raises(error, match=words):
        gptneo_fast.GPTNeoForCausalLM.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize("options", [{"ignore_index": 5}, {"shift": True}, {"shift": True, "num_items_in_batch": 7}], ids=str)
def test_keywords_of_the_loss_reach_it(pair, options):
    labels = IDS.clone()
    labels[0, 3:6] = options.get("ignore_index", -100)
    options = dict(options)
    if options.pop("shift", False):
        options["shift_labels"] = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    close(pair[1](IDS, labels=labels, **options).loss, pair[0](IDS, labels=labels, **options).loss)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1.5,), "new_num_tokens 1.5"),
        ((0,), "new_num_tokens 0"),
        ((None, 1.3), "pad_to_multiple_of 1.3"),
        ((9, -2), "multiple_of -2"),
    ],
    ids=str,
)
def test_a_vocabulary_of_no_size_is_refused_by_the_argument_that_says_it(pair, sizes, words):
    with pytest.raises(InputError, match=f"{words} is not a positive integer"):
        pair[1].resize_token_embeddings(*sizes)


def test_a_configuration_goes_to_a_file_and_back(pair, tmp_path):
    pair[1].config.to_json_file(tmp_path / "mine.json")
    assert type(pair[1].config).from_json_file(tmp_path / "mine.json") == pair[1].config
    assert transformers.GPTNeoConfig.from_json_file(tmp_path / "mine.json").hidden_size == pair[1].config.hidden_size


def test_a_fresh_model_takes_the_keywords_of_transformers(pair):
    config = pair[1].config
    for make in (gptneo_fast.GPTNeoForCausalLM.from_config, gptneo_fast.AutoModelForCausalLM.from_config):
        made = make(config, torch_dtype="bfloat16", attn_implementation="eager", trust_remote_code=True)
        assert type(made) is gptneo_fast.GPTNeoForCausalLM and made.dtype is made.config.dtype is torch.bfloat16
        assert make(config.replace(dtype="float16")).dtype is torch.float16
        with pytest.raises(InputError, match="attn_implementation 'sdpa' is not offered"):
            make(config, attn_implementation="sdpa")
    gptneo_fast.GPTNeoPreTrainedModel(config, attn_implementation="eager")  # a base of heads of one's own, as theirs
    with pytest.raises(InputError, match="attn_implementation 'sdpa' is not offered"):
        gptneo_fast.GPTNeoPreTrainedModel(config, attn_implementation="sdpa")


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_deterministic_algorithms_compute_the_same(quantize):
    _, model = peers(window_size=7)
    if quantize:
        model.quantize_(quantize)
    ids = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(0))

    def computed():
        with torch.no_grad():
            drawn = model.generate(ids, max_new_tokens=12, do_sample=True, seed=1)
            return model(ids).logits, drawn, model.score(ids[0].tolist()).logprob, model.embed(ids[0].tolist())

    want = computed()
    torch.use_deterministic_algorithms(True)
    try:
        got = computed()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_a_configuration_may_be_of_transformers_or_a_folder(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path)
    made = gptneo_fast.GPTNeoForCausalLM(theirs.config)
    assert isinstance(made.config, gptneo_fast.GPTNeoConfig) and made.config is made.transformer.config
    assert made.config.attention_layers == ours.config.attention_layers
    for config in (theirs.config, tmp_path, str(tmp_path)):
        loaded = gptneo_fast.GPTNeoForCausalLM.from_pretrained(tmp_path, config=config)
        torch.testing.assert_close(loaded(IDS).logits, ours(IDS).logits)
    config, unused = gptneo_fast.GPTNeoConfig.from_pretrained(tmp_path, window_size=9, foo=5, return_unused_kwargs=True)
    assert (config.window_size, unused) == (9, {"foo": 5}) and "foo" not in config
    assert gptneo_fast.GPTNeoConfig.get_config_dict(tmp_path, foo=5) == (
        ours.config.to_dict() | {"architectures": ["GPTNeoForCausalLM"], "dtype": "float32"},
        {"foo": 5},
    )
    assert gptneo_fast.AutoConfig.for_model("gpt_neo", num_layers=2).num_layers == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_small_dtypes_are_compared_with_a_limit_that_they_cannot_hold(dtype):
    _, ours = peers(vocab_size=50000)
    torch.testing.assert_close(ours(IDS.to(dtype)).logits, ours(IDS).logits)


def test_what_scripts_pass_that_means_little(pair, tmp_path):
    _, ours = pair
    ours.save_pretrained(tmp_path)
    config = gptneo_fast.GenerationConfig(max_new_tokens=3)
    loaded = gptneo_fast.GPTNeoForCausalLM.from_pretrained(tmp_path, generation_config=config, from_tf=False, variant=None)
    assert loaded.generation_config is config
    assert torch.equal(loaded.generate(IDS, head_mask=None), loaded.generate(IDS))
    with pytest.raises(UnknownOptionError, match="no option 'head_mask'"):
        loaded.generate(IDS, head_mask=torch.ones(1))
    out = loaded(IDS)
    out.remark = "mine"
    assert out.remark == "mine" and "remark" not in out and len(out.to_tuple()) == 2


def test_a_pipeline_saves_its_model_and_tokenizer(tmp_path):
    pipe = gptneo_fast.pipeline("text-generation", model=str(FOLDER))
    pipe.save_pretrained(tmp_path)
    again = gptneo_fast.pipeline("text-generation", model=str(tmp_path))
    assert again("The fox", do_sample=False, max_new_tokens=5) == pipe("The fox", do_sample=False, max_new_tokens=5)
