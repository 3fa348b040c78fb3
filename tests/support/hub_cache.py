"""A repository of a hub and the cache that it is fetched into: to load, to refuse, and to look at what is left there."""

import pytest
import torch

import gptneo_fast
from tests.support.hub_server import COMMIT, etag_of

NAME = "someone/small-neo"
Causal = gptneo_fast.GPTNeoForCausalLM


def load(**options):
    return gptneo_fast.load(NAME, device="cpu", **options)


def refused(kind, *words, name=NAME, **options):
    with pytest.raises(kind) as caught:
        gptneo_fast.load(name, device="cpu", **options)
    for word in words:
        assert str(word) in str(caught.value), (word, str(caught.value))
    return caught.value


def same(model, folder):
    want = Causal.from_pretrained(folder)
    return all(torch.equal(model.get_parameter(n), p) for n, p in want.named_parameters())


def snapshot(tmp_path):
    return tmp_path / "cache" / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT


def blobs(tmp_path):
    return snapshot(tmp_path).parent.parent / "blobs"


def left(tmp_path):
    """What stands in the cache and is neither a blob with the hash that it is named for, nor a link to one, nor a note."""
    files = [p for p in (tmp_path / "cache").rglob("*") if not p.is_dir() and ".locks" not in p.parts and "refs" not in p.parts]
    kept = [p for p in files if not p.is_symlink() and ".no_exist" not in p.parts]
    return [p for p in kept if p.parent.name != "blobs" or p.name != etag_of(p.read_bytes())]
