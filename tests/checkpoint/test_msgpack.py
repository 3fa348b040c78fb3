"""flax_model.msgpack without jax: what flax.serialization writes arrives bit for bit, and what is wrong is refused by name."""

import json
import random

import numpy as np
import pytest
import torch

import gptneo_fast
from gptneo_fast.checkpoint import msgpack
from gptneo_fast.errors import CheckpointError, InputError, UnsafeCheckpointError, UnsafePathError
from tests.support.peers import SMALL

Causal = gptneo_fast.GPTNeoForCausalLM
NAME = "flax_model.msgpack"


class Ext:
    def __init__(self, kind, data):
        self.kind, self.data = kind, data


def pack(value):
    """The bytes of msgpack (its specification, chosen as the msgpack package chooses): what flax.serialization builds on."""
    if value is None or isinstance(value, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        wide = next((w for w in range(4) if value < 1 << (8 << w)), 3)
        return bytes([value]) if 0 <= value < 128 else bytes([0xCC + wide]) + value.to_bytes(1 << wide, "big")
    if isinstance(value, Ext):
        body = bytes([value.kind]) + value.data
        fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}.get(len(value.data))
        return bytes([fixed]) + body if fixed else _sized(len(value.data), 0xC7) + body
    if isinstance(value, bytes):
        return _sized(len(value), 0xC4) + value
    if isinstance(value, str):
        data = value.encode()
        return (bytes([0xA0 + len(data)]) if len(data) < 32 else _sized(len(data), 0xD9)) + data
    head = 0x80 if isinstance(value, dict) else 0x90
    items = [x for pair in value.items() for x in pair] if isinstance(value, dict) else value
    count, wide = len(value), (0xDE if isinstance(value, dict) else 0xDC)
    begin = bytes([head + count]) if count < 16 else bytes([wide]) + count.to_bytes(2, "big")
    return begin + b"".join(map(pack, items))


def _sized(size, first):
    wide = 0 if size < 256 else 1 if size < 65536 else 2
    return bytes([first + wide]) + size.to_bytes(1 << wide, "big")


def leaf(tensor):
    """A tensor as the extension that flax makes of an array."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Ext(1, pack([list(tensor.shape), dtype, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()]))


def chunked(tensor, size):
    parts = tensor.reshape(-1).split(size)
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): n for i, n in enumerate(tensor.shape)},
        "chunks": {str(i): leaf(part) for i, part in enumerate(parts)},
    }


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *modules, last = path.split("/")
        place = tree
        for module in modules:
            place = place.setdefault(module, {})
        place[last] = value
    return tree


def flat_of(model):
    """The parameters under the names and in the shapes of transformers' Flax classes."""
    flat = {}
    for name, p in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        module, _, kind = name.replace(".", "/").rpartition("/")
        if kind == "weight":
            kind = "embedding" if module.endswith(("wte", "wpe")) else "scale" if p.dim() == 1 else "kernel"
        flat[f"{module}/{kind}"] = p.T if kind == "kernel" else p
    return flat


@pytest.fixture
def model():
    return Causal(gptneo_fast.GPTNeoConfig(**SMALL))


@pytest.fixture
def folder(model, tmp_path):
    """A checkpoint with nothing but Flax's weights."""
    model.config.save_pretrained(tmp_path)
    write(tmp_path, {path: leaf(p) for path, p in flat_of(model).items()})
    return tmp_path


def write(folder, flat):
    (folder / NAME).write_bytes(flat if isinstance(flat, bytes) else pack(nested(flat)))


def refused(folder, *words, kind=CheckpointError, **options):
    with pytest.raises(kind) as caught:
        Causal.from_pretrained(folder, **options)
    for word in words:
        assert str(word) in str(caught.value), (word, str(caught.value))


def same(loaded, model):
    for name, p in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), p), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_arrive_bit_for_bit_with_kernels_transposed(model, folder, dtype):
    model.to(dtype)
    write(folder, {path: leaf(p) for path, p in flat_of(model).items()})
    loaded = Causal.from_pretrained(folder)
    assert loaded.dtype == dtype
    same(loaded, model)
    same(gptneo_fast.load(folder, device="cpu"), model)


@pytest.mark.parametrize("prefix", ["", "params/transformer/"])
def test_a_base_models_file_and_a_variables_dict_load(model, folder, prefix):
    write(folder, {prefix + path.removeprefix("transformer/"): leaf(p) for path, p in flat_of(model).items()})
    same(Causal.from_pretrained(folder), model)


@pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
def test_chunked_arrays_are_put_together(model, folder, size, monkeypatch):
    monkeypatch.setattr("gptneo_fast.checkpoint.fill.BLOCK", 24)  # blocks and chunks meet at odd places
    flat = {path: leaf(p) for path, p in flat_of(model).items()}
    for path in ("transformer/ln_f/bias", "transformer/h/0/mlp/c_fc/kernel", "transformer/wpe/embedding"):
        flat[path] = chunked(flat_of(model)[path], max(size, flat_of(model)[path].numel() // 900))
    write(folder, flat)
    same(Causal.from_pretrained(folder), model)
    same(Causal.from_pretrained(folder, dtype=torch.float64).float(), model)


def test_an_untied_head_is_read(folder):
    untied = Causal(gptneo_fast.GPTNeoConfig(**SMALL, tie_word_embeddings=False))
    untied.config.save_pretrained(folder)
    write(folder, {path: leaf(p) for path, p in flat_of(untied).items()})
    same(Causal.from_pretrained(folder), untied)


def test_other_weights_win_unless_flax_is_asked_for(model, folder):
    other = Causal(model.config)
    other.save_pretrained(folder)
    same(Causal.from_pretrained(folder), other)
    same(Causal.from_pretrained(folder, from_flax=True), model)
    same(gptneo_fast.load(folder, device="cpu", from_flax=True), model)
    refused(folder, "leave one out", kind=InputError, from_flax=True, use_safetensors=True)
    (folder / NAME).unlink()
    refused(folder, "looked for flax_model.msgpack, flax_model.msgpack.index.json", from_flax=True)
    (folder / "model.safetensors").unlink()
    refused(folder, "pytorch_model.bin.index.json, flax_model.msgpack")


def shard(model, folder):
    """Two shards and their index, as transformers 4.57 splits them: the index has the tree's paths."""
    (folder / NAME).unlink()
    flat = {path: leaf(p) for path, p in flat_of(model).items()}
    names = [f"flax_model-0000{i}-of-00002.msgpack" for i in (1, 2)]
    places = {path: names[i % 2] for i, path in enumerate(flat)}
    for name in names:
        (folder / name).write_bytes(pack(nested({path: flat[path] for path in flat if places[path] == name})))
    return places


def test_shards_load_and_their_index_is_held_to_them(model, folder):
    places = shard(model, folder)
    index = folder / f"{NAME}.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    same(Causal.from_pretrained(folder), model)
    first, second = sorted(set(places.values()))
    index.write_text(json.dumps({"weight_map": places | {"transformer/ln_f/scale": first, "transformer/ln_f/bias": first}}))
    refused(folder, "transformer.ln_f", index)
    index.write_text(json.dumps({"weight_map": places | {"transformer/ln_f/scale": "../x"}}))
    refused(folder, "'../x'", kind=UnsafePathError)
    index.write_text(json.dumps({"weight_map": places}))
    (folder / second).unlink()
    refused(folder, second, "missing", first)


def test_an_infinite_value_is_named(model, folder):
    flat = flat_of(model)
    flat["transformer/ln_f/bias"] = torch.full_like(flat["transformer/ln_f/bias"], float("inf"))
    write(folder, {path: leaf(p) for path, p in flat.items()})
    refused(folder, "transformer.ln_f.bias", "inf", "check_finite=False")


def test_a_kernel_that_was_not_transposed_is_told_by_its_shape(model, folder):
    flat = {path: leaf(p) for path, p in flat_of(model).items()}
    path = "transformer/h/0/mlp/c_fc/kernel"
    flat[path] = leaf(flat_of(model)[path].T)
    write(folder, flat)
    refused(folder, "transformer.h.0.mlp.c_fc.weight", "[32, 128]", "[128, 32]", "intermediate_size")


def wrong_leaf(value):
    return lambda flat: flat | {"transformer/ln_f/bias": value}


def array(shape, dtype="float32", data=b"\0" * 128, **head):
    return Ext(1, pack([shape, dtype, data]))


FAULTS = {
    "unknown tensor": (lambda f: f | {"transformer/h/0/ln_3/scale": array([32])}, "h.0.ln_3.weight"),
    "missing tensor": (lambda f: {k: v for k, v in f.items() if k != "transformer/ln_f/bias"}, "no tensor for ln_f.bias"),
    "both prefixes": (lambda f: f | {"ln_f/bias": array([32])}, "are one parameter"),
    "a number": (wrong_leaf(7), "an integer as tensor 'transformer/ln_f/bias'"),
    "nothing": (wrong_leaf(None), "None as tensor"),
    "text": (wrong_leaf("x"), "text as tensor"),
    "a list": (wrong_leaf([1]), "a list as tensor"),
    "bytes": (wrong_leaf(b"x"), "bytes as tensor"),
    "complex": (wrong_leaf(Ext(2, pack([1, 2]))), "extension of type 2"),
    "integers": (wrong_leaf(array([32], "int32")), "int32"),
    "dtype": (wrong_leaf(array([32], "float128")), "dtype 'float128'"),
    "object": (wrong_leaf(array([32], "object")), "dtype 'object'"),
    "short": (wrong_leaf(array([33])), "needs 132 bytes"),
    "huge": (wrong_leaf(array([2**62, 2**62])), "bytes and has 128"),
    "text for a size": (wrong_leaf(array(["32"])), "whose shape has text"),
    "rank": (wrong_leaf(array([1] * 9)), "at most 8 sizes"),
    "no array": (wrong_leaf(Ext(1, b"\xc0")), "not [shape"),
    "tail in the extension": (wrong_leaf(Ext(1, pack([[32], "float32", b"\0" * 128]) + b"x")), "extension"),
    "chunks of too few": (wrong_leaf(chunked(torch.zeros(32), 8) | {"shape": {"0": 33}}), "in chunks of 32 elements in all"),
    "chunks of two dtypes": (
        wrong_leaf(
            chunked(torch.zeros(32), 16)
            | {"chunks": {"0": array([16], data=b"\0" * 64), "1": array([32], "float16", b"\0" * 64)}}
        ),
        "in chunks of",
    ),
    "chunks out of order": (
        wrong_leaf(chunked(torch.zeros(32), 16) | {"chunks": {"1": leaf(torch.zeros(16)), "0": leaf(torch.zeros(16))}}),
        "chunked array that is not",
    ),
    "no chunks": (wrong_leaf(chunked(torch.zeros(32), 16) | {"chunks": {}}), "in chunks of 0"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_tree_is_refused_with_the_tensors_name(model, folder, name):
    change, word = FAULTS[name]
    write(folder, change({path: leaf(p) for path, p in flat_of(model).items()}))
    refused(folder, word)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "0 bytes"),
        (b"\xc0", "begins with None"),
        (b"\xc1", "begins nothing"),
        (b"\x81\xa1a", "is cut"),
        (b"\x81\x01\x02", "where a name is due"),
        (b"\x81\xa1\xff\x02", "not UTF-8"),
        (b"\x81\xd9\xff", "is cut"),
        (b"\xdf\xff\xff\xff\xff", "is cut"),
        (b"\x82\xa1a\x80\xa1a\x80", "'a' twice"),
        (b"\x80\x80", "1 bytes after the end"),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "4294967295"),
        (b"<!DOCTYPE html><p>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x81\xda\xff\xff" + b"a" * 65535 + b"\x80", "text of 65535 bytes"),
    ],
)
def test_a_file_of_another_kind_or_a_cut_one_is_refused(folder, data, word):
    write(folder, data)
    refused(folder, NAME, word)


@pytest.mark.parametrize("data", [b"\x81\xa1a" * 10**5, b"\xdf\x00\x10\x00\x00" + b"".join(
    bytes([0xA4]) + b"%04x" % (i % 65536) + b"\x80" for i in range(2**20))], ids=["depth", "values"])  # fmt: skip
def test_a_tree_that_only_grows_is_refused_before_it_costs_memory(folder, data, monkeypatch):
    monkeypatch.setattr(msgpack, "MAX_NODES", 5000)
    write(folder, data)
    refused(folder, kind=UnsafeCheckpointError)


def test_every_cut_is_refused(model, folder):
    data = (folder / NAME).read_bytes()
    cuts = random.Random(0).sample(range(1, len(data)), 30)
    for at in [*cuts, len(data) - 1]:
        write(folder, data[:at])
        refused(folder, "is cut")
    write(folder, data + b"x")
    refused(folder, "1 bytes after the end")


def test_damaged_bytes_are_refused_or_change_numbers_only(model, folder):
    data, draw = (folder / NAME).read_bytes(), random.Random(1)
    heads = [i for i in range(len(data) - 12) if data[i : i + 12].isascii() and data[i : i + 4] != b"\0" * 4]
    outcomes = set()
    for _ in range(80):
        at = draw.choice(heads)
        write(folder, data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :])
        try:
            Causal.from_pretrained(folder, check_finite=False)
            outcomes.add("loaded")
        except CheckpointError:
            outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}


def test_what_the_tests_write_is_what_flax_writes(model):
    serialization = pytest.importorskip("flax.serialization")
    tree = nested({path: p.detach().numpy() for path, p in flat_of(model).items()})
    tree["big"], tree["scalar"] = np.arange(300, dtype=np.int32), np.float16(3)
    mine = nested({path: leaf(p) for path, p in flat_of(model).items()})
    mine["big"] = leaf(torch.arange(300, dtype=torch.int32))
    mine["scalar"] = Ext(3, leaf(torch.tensor(3.0, dtype=torch.float16).reshape(())).data)
    assert pack(mine) == serialization.msgpack_serialize(tree, in_place=True)  # else jax sorts the keys


def test_what_flax_writes_in_chunks_loads(model, folder, monkeypatch):
    serialization = pytest.importorskip("flax.serialization")
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1000)
    tree = nested({path: p.detach().numpy() for path, p in flat_of(model).items()})
    write(folder, serialization.to_bytes(tree))
    assert b"__msgpack_chunked_array__" in (folder / NAME).read_bytes()
    same(Causal.from_pretrained(folder), model)
