"""Which weight files a folder holds, and shards against their index."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptneo_fast
from gptneo_fast.errors import CheckpointError, ConfigError, InputError, ModelNotFoundError, UnsafePathError
from tests.support.peers import SMALL

Causal = gptneo_fast.GPTNeoForCausalLM
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A causal model in several shards."""
    Causal(gptneo_fast.GPTNeoConfig(**SMALL)).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(shards(tmp_path)) > 3
    return tmp_path


def shards(folder):
    return sorted(p.name for p in folder.glob("model-*"))


def index(folder):
    return json.loads((folder / INDEX).read_text())


def crowded(folder):
    """A shard of several tensors, another one, and the name of a tensor in the first."""
    places = index(folder)["weight_map"]
    names = list(places.values())
    shard = max(names, key=names.count)
    return shard, next(s for s in shards(folder) if s != shard), next(k for k, v in places.items() if v == shard)


def put(folder, values):
    (folder / INDEX).write_text(values if isinstance(values, str) else json.dumps(values))


def refused(folder, *words, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        Causal.from_pretrained(folder)
    for word in words:
        assert str(word) in str(caught.value), (word, str(caught.value))


def test_shards_give_the_tensors_of_one_file(folder, tmp_path_factory):
    model = Causal.from_pretrained(folder)
    whole = tmp_path_factory.mktemp("whole")
    model.save_pretrained(whole)
    values = {k: v for name in shards(folder) for k, v in load_file(folder / name).items()}
    assert values.keys() == load_file(whole / "model.safetensors").keys()
    for name, p in Causal.from_pretrained(whole).named_parameters():
        assert torch.equal(p, values[name]) and torch.equal(p, model.get_parameter(name))


def test_1_a_folder_that_is_not_there_is_told_with_folders_near(tmp_path):
    (tmp_path / "gpt-neo-125m").mkdir()
    with pytest.raises(ModelNotFoundError) as caught:
        gptneo_fast.load(tmp_path / "gpt-neo-125M", device="cpu")
    message = str(caught.value)
    assert "gpt-neo-125M" in message and "did you mean 'gpt-neo-125m'" in message and "hub id" in message


def test_2_an_empty_folder_is_told_with_the_files_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no config\.json \(it is empty\).*model\.safetensors or pytorch_model\.bin"):
        Causal.from_pretrained(tmp_path / "empty")
    gptneo_fast.GPTNeoConfig(**SMALL).save_pretrained(tmp_path / "empty")
    refused(
        tmp_path / "empty",
        "holds no weights; looked for model.safetensors, model.safetensors.index.json, pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "", "   ", "a b", "x" * 1000, "a/b/c", "a\0b", "-x", "a--b", "owner/..", "o/n\n", "é/x"]
)
def test_6_a_name_that_is_no_id_is_refused_before_any_io(name, monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    with pytest.raises(InputError):
        gptneo_fast.load(name, device="cpu")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ("{}", "it needs a 'weight_map'"),
        ('{"weight_map": {}}', "it needs a 'weight_map'"),
        ('{"weight_map": []}', "it needs a 'weight_map'"),
        ('{"weight_map": {"a": 1}}', "names a int as a shard"),
        ('{"weight_map": {"a": null}}', "names a NoneType as a shard"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "is given twice"),
    ],
)
def test_24_a_broken_index_is_named(folder, text, words):
    put(folder, text)
    refused(folder, folder / INDEX, words)


def test_25_a_missing_shard_is_named_beside_those_present(folder):
    first, *others = shards(folder)
    (folder / first).unlink()
    refused(folder, f"{first} named by", "is missing", f"present: {', '.join(others)}")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "a\0b", "x" * 300, "", ".", "..", "a\\b", "a\nb", "é" * 130], ids=range(11)
)
def test_26_a_shard_that_is_no_plain_file_name_is_an_unsafe_path(folder, name):
    values = index(folder)
    key = next(iter(values["weight_map"]))
    values["weight_map"][key] = name
    put(folder, values)
    refused(folder, folder / INDEX, "a shard is a file beside its index", kind=UnsafePathError)


def test_27_a_tensor_in_two_shards_is_refused(folder):
    first, second, *_ = shards(folder)
    a, b = load_file(folder / first), load_file(folder / second)
    name = next(iter(a))
    save_file(b | {name: a[name]}, folder / second)
    refused(folder, f"tensor {name!r} stands both in {first} and in {second}")


def test_27_a_tensor_in_another_shard_than_the_index_says_is_refused(folder):
    values = index(folder)
    first, second, name = crowded(folder)
    values["weight_map"][name] = second
    put(folder, values)
    refused(folder, f"says that {second!r} holds tensor {name!r}; {first!r} does")


def test_27_a_tensor_that_no_shard_holds_or_that_the_index_does_not_list(folder):
    values = index(folder)
    shard, _, name = crowded(folder)
    put(folder, {"weight_map": values["weight_map"] | {"ghost": shard}})
    refused(folder, f"says that {shard!r} holds tensor 'ghost'; no shard does")
    put(folder, {"weight_map": {k: v for k, v in values["weight_map"].items() if k != name}})
    refused(folder, f"holds tensor {name!r}, which", INDEX, "does not list")


def test_27_a_million_keys_or_shards_are_refused(folder):
    put(folder, {"weight_map": {str(i): "x" for i in range(10**6)}})
    refused(folder, INDEX, f"bytes, of at most {8 << 20}")
    put(folder, {"weight_map": {str(i): "x" for i in range(70_000)}})
    refused(folder, INDEX, "lists 70000 tensors, of at most 65536")
    put(folder, {"weight_map": {str(i): str(i) for i in range(5000)}})
    refused(folder, "lists 5000 shards, of at most 4096")


def test_a_fault_in_any_shard_is_found_before_any_weight_is_read(folder, monkeypatch):
    from gptneo_fast.checkpoint.fill import Copier

    monkeypatch.setattr(Copier, "fill", lambda *_: pytest.fail("weights were read"))
    last = folder / shards(folder)[-1]
    last.write_bytes(last.read_bytes()[:-4])
    refused(folder, last, "4 fewer")
