"""A hub with nothing on it, with a small model, and with a large one."""

import pytest

import gptneo_fast
from tests.support.hub_cache import NAME, Causal
from tests.support.hub_server import Hub, Repository, files_of
from tests.support.peers import SMALL


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub, with huggingface_hub pointed at it and at an empty cache."""
    from huggingface_hub import constants

    server = Hub()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.address)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # it writes no less at a time
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.close()


@pytest.fixture
def published(hub, checkpoint):
    """The checkpoint with a tokenizer as a repository that holds other formats too."""
    files = files_of(checkpoint) | {"pytorch_model.bin": b"x" * 100, "flax_model.msgpack": b"x" * 100, "README.md": b"x"}
    hub.repositories[NAME] = Repository(files)
    return hub.repositories[NAME]


@pytest.fixture
def large(hub, tmp_path):
    """A repository with 8 MB of weights."""
    folder = tmp_path / "made"
    Causal(gptneo_fast.GPTNeoConfig(**SMALL).replace(hidden_size=128, vocab_size=9000)).save_pretrained(folder)
    hub.repositories[NAME] = Repository(files_of(folder))
    return hub.repositories[NAME]
