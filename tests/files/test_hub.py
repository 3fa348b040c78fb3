"""Checkpoints from a hub: a server on loopback that speaks its protocol, and huggingface_hub's own cache."""

import os
import shutil
import time
import traceback
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace

import pytest

import gptneo_fast
from gptneo_fast.errors import CheckpointError, GPTNeoFastError, InputError, ModelNotFoundError, SetupError, TokenizerError
from gptneo_fast.files import repository
from gptneo_fast.files.hub import Source
from tests.support.hub_cache import NAME, Causal, blobs, load, refused, same, snapshot
from tests.support.hub_server import COMMIT, Repository, files_of


def test_a_model_and_its_tokenizer_arrive_and_nothing_else_is_fetched(hub, published, checkpoint):
    model = load()
    assert same(model, checkpoint) and model.tokenizer("Once")["input_ids"]
    fetched = {path.split("/")[-1] for path in hub.requests("GET")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= fetched
    assert not fetched & {"pytorch_model.bin", "flax_model.msgpack", "README.md", "vocab.json", "merges.txt"}
    assert model.config.name_or_path == NAME


def test_every_file_but_the_first_is_asked_for_at_its_commit(hub, published):
    first, *others = load() and hub.requests("HEAD")
    assert first.endswith("/resolve/main/config.json")
    assert len(others) > 3 and all(f"/resolve/{COMMIT}/" in p for p in others if not p.endswith("/main/config.json"))
    assert all(f"/resolve/{COMMIT}/" in p or p.endswith("config.json") for p in hub.requests("GET"))


def test_a_branch_that_moves_while_it_is_loaded_mixes_nothing(hub, published, checkpoint, monkeypatch):
    other = Repository(dict.fromkeys(published.files, b"moved"), commit="f" * 40)
    answer = hub.answer

    def moving(request, body):
        if len(hub.log) >= 3 and "/main/" in request.path:  # the branch is another commit now; commits stay served
            hub.repositories[NAME] = other
        answer(request, body)
        hub.repositories[NAME] = published

    monkeypatch.setattr(hub, "answer", moving)
    assert same(load(), checkpoint)


def test_a_second_load_asks_for_nothing_but_the_commit(hub, published, checkpoint):
    load()
    hub.log.clear()
    assert same(load(), checkpoint)
    assert {p.split("/")[-1] for p in hub.requests("HEAD")} == {"config.json"} and not hub.requests("GET")


def test_offline_the_cache_is_enough_by_either_switch(hub, published, checkpoint, monkeypatch):
    from huggingface_hub import constants

    load()
    hub.log.clear()
    assert same(load(local_files_only=True), checkpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load().tokenizer is not None and not hub.log


def test_a_hub_that_does_not_answer_is_no_reason_to_fail_where_the_cache_holds_all(hub, published, checkpoint):
    load()
    hub.close()
    assert same(load(), checkpoint)


def test_3_offline_and_not_cached(hub, published, tmp_path, monkeypatch):
    from huggingface_hub import constants

    refused(ModelNotFoundError, NAME, tmp_path / "cache", "local_files_only=True", f"hf download {NAME}", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(ModelNotFoundError, "offline (HF_HUB_OFFLINE=1)", f"hf download {NAME}")
    assert not hub.log


def test_3_a_hub_that_cannot_be_reached_and_nothing_cached(hub, published):
    hub.close()
    began = time.perf_counter()
    refused(ModelNotFoundError, NAME, "cannot be reached", hub.address, f"hf download {NAME}")
    assert time.perf_counter() - began < 20


def test_4_half_a_snapshot_offline_names_what_is_missing(hub, published, tmp_path):
    load()
    (snapshot(tmp_path) / "model.safetensors").unlink()
    refused(
        CheckpointError,
        "holds no weights; looked for model.safetensors",
        "offline (local_files_only=True)",
        "it holds 'config.json'",
        f"hf download {NAME}",
        local_files_only=True,
    )
    assert load() is not None  # with network the rest is fetched


def test_4_a_shard_that_is_missing_offline_is_named(hub, published, checkpoint, tmp_path):
    Causal.from_pretrained(checkpoint).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    published.files = files_of(tmp_path / "shards")
    assert same(Causal.from_pretrained(NAME), checkpoint)
    shard = sorted(snapshot(tmp_path).glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} named by .* is missing; present: .*hf download {NAME}"):
        Causal.from_pretrained(NAME, local_files_only=True)
    (snapshot(tmp_path) / "config.json").unlink()
    refused(GPTNeoFastError, "holds no config.json", "offline", "hf download", local_files_only=True)


@pytest.mark.parametrize(
    ("status", "error", "kind", "words"),
    [
        (403, "GatedRepo", SetupError, "is gated: accept its terms"),
        (401, "RepoNotFound", ModelNotFoundError, "a private one needs token="),
        (404, "RepoNotFound", ModelNotFoundError, "neither a folder here nor a repository"),
        (403, "", SetupError, "answered 'config.json' of 'someone/small-neo' with status 403"),
        (503, "", ModelNotFoundError, "status 503"),
        (429, "", SetupError, "with status 429"),
    ],
)
def test_5_a_hub_that_refuses_is_passed_on_with_advice_and_never_shows_the_token(hub, published, status, error, kind, words):
    published.status, published.error = status, error
    error = refused(kind, words, NAME, token="hf_SECRETSECRET")
    assert any(token == "Bearer hf_SECRETSECRET" for *_, token in hub.log)
    assert "SECRET" not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, "RepoNotFound"), (403, "GatedRepo"), (403, ""), (404, "RepoNotFound"), (408, ""), (429, ""), (500, "")],
)
def test_5_a_hub_that_refuses_does_not_fail_what_the_cache_holds_whole(hub, published, checkpoint, tmp_path, status, error):
    load()
    published.status, published.error = status, error
    model = load()
    assert same(model, checkpoint) and model.tokenizer is not None
    (snapshot(tmp_path) / "model.safetensors").unlink()
    refused(CheckpointError, "holds no weights", "hub" if error else f"status {status}", f"hf download {NAME}")


def test_5_a_hub_that_refuses_from_the_second_file_on(hub, published, checkpoint, monkeypatch, tmp_path):
    answer = hub.answer

    def tired(request, body):
        published.status = 429 if "/main/" not in request.path else 200
        answer(request, body)

    load()
    shutil.rmtree(snapshot(tmp_path).parent.parent / ".no_exist")  # as huggingface_hub leaves it: it asked for what is there
    monkeypatch.setattr(hub, "answer", tired)
    assert same(load(), checkpoint)
    (snapshot(tmp_path) / "config.json").unlink()
    refused(GPTNeoFastError, "holds no config.json", "status 429")


def test_5_an_unknown_revision_is_named(hub, published):
    refused(ModelNotFoundError, "has no revision 'v9'", revision="v9")


def test_5_an_unknown_repository_is_named(hub, published):
    refused(ModelNotFoundError, "'someone/other' is neither a folder here nor a repository", name="someone/other")


def test_1_an_unknown_repository_is_told_with_a_folder_that_resembles_it(hub, published, tmp_path, monkeypatch):
    (tmp_path / "my-story-model").mkdir()
    monkeypatch.chdir(tmp_path)
    refused(
        ModelNotFoundError, "neither a folder here nor a repository", "did you mean 'my-story-model'", name="my-story-modell"
    )


def test_5_a_server_that_is_no_hub_is_told_apart(hub, published, monkeypatch):
    send = BaseHTTPRequestHandler.send_header
    hidden = ("X-Repo-Commit", "ETag")
    monkeypatch.setattr(BaseHTTPRequestHandler, "send_header", lambda s, k, v: None if k in hidden else send(s, k, v))
    refused(SetupError, "is no hub", "HF_ENDPOINT")


@pytest.mark.parametrize("name", ["a//b", "a/b.git", "a/b-", "a/-b", "x" * 90 + "/y" * 50])
def test_6_a_name_that_the_hub_allows_nowhere(hub, name):
    refused((InputError, ModelNotFoundError), name[:20], name=name)


@pytest.mark.parametrize("name", [3, None, b"x", ["a/b"], "~nobodyatall/model"])
def test_6_a_name_that_is_no_text_or_of_nobody(hub, name):
    refused((InputError, ModelNotFoundError), repr(name)[:20], name=name)


@pytest.mark.parametrize("value", ["../x", "/x", "a/../../b", "a\0b", " ", "x" * 300, 7, "a\nb"])
@pytest.mark.parametrize("what", ["revision", "subfolder"])
def test_6_a_revision_or_subfolder_that_leads_elsewhere(hub, checkpoint, what, value):
    error = refused(InputError, what, **{what: value})
    assert len(str(error)) < 300 and not hub.log
    refused(InputError, what, name=checkpoint, **{what: value})


def test_5_a_source_does_not_show_its_token():
    assert "SECRET" not in repr(Source.of(NAME, token="hf_SECRET"))


@pytest.mark.parametrize("name", ["X-Repo-Commit", "ETag"])
def test_5_a_server_that_names_a_path_where_a_hash_belongs(hub, published, monkeypatch, name, tmp_path):
    send = BaseHTTPRequestHandler.send_header
    monkeypatch.setattr(BaseHTTPRequestHandler, "send_header", lambda s, k, v: send(s, k, "../../x" if k == name else v))
    refused(SetupError, "is no hub", "'../../x'")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("status", [None, 404, 429, 503])
def test_a_hub_that_falls_silent_or_refuses_between_two_files(hub, published, monkeypatch, status):
    fetch = repository.Repository.fetch

    def last(*arguments):
        if status:
            published.status = status
        else:
            hub.close()
        return fetch(*arguments)

    monkeypatch.setattr(repository.Repository, "fetch", last)
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.1)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    with pytest.raises((SetupError, ModelNotFoundError), match=r"could not be fetched|cannot be reached|status|neither"):
        Causal.from_pretrained(NAME)


@pytest.mark.parametrize("ref", [b"", b"\xff\xfe", b"../../..", b"\0"])
def test_34_a_reference_that_a_killed_process_left_half_written(hub, published, checkpoint, tmp_path, ref):
    load()
    written = snapshot(tmp_path).parent.parent / "refs" / "main"
    written.write_bytes(ref)
    refused(ModelNotFoundError, f"hf download {NAME}", local_files_only=True)
    assert same(load(), checkpoint)
    assert written.read_text() == COMMIT


def test_a_revision_by_its_commit_and_a_tag(hub, published, checkpoint):
    published.revisions = ("main", "v1")
    assert same(load(revision="v1"), checkpoint)
    assert same(load(revision=COMMIT), checkpoint)
    hub.log.clear()
    assert same(load(revision="v1", local_files_only=True), checkpoint)
    assert same(load(revision=COMMIT, local_files_only=True), checkpoint)
    assert not hub.log


def test_a_subfolder(hub, checkpoint):
    hub.repositories[NAME] = Repository({f"inner/{k}": v for k, v in files_of(checkpoint).items()})
    model = load(subfolder="inner")
    assert same(model, checkpoint) and model.tokenizer is not None
    assert same(load(subfolder="inner", local_files_only=True), checkpoint)


def test_a_repository_of_a_tokenizer_alone(hub, checkpoint):
    files = {k: v for k, v in files_of(checkpoint).items() if k.startswith("tokenizer")}
    hub.repositories[NAME] = Repository(files)
    assert gptneo_fast.GPT2Tokenizer.from_pretrained(NAME)("Once")["input_ids"]
    refused(GPTNeoFastError, "holds no config.json")


def test_the_size_is_said_before_a_large_download_and_not_for_a_small_one(hub, published, capfd, monkeypatch, tmp_path):
    load()
    assert "fetching" not in capfd.readouterr().err
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(repository, "LARGE", 10_000)
    size = len(published.files["model.safetensors"])
    seen = {}
    fetch = repository.Repository.fetch

    def heard(self, file, force=False):
        seen[file.path] = capfd.readouterr().err
        return fetch(self, file, force)

    monkeypatch.setattr(repository.Repository, "fetch", heard)
    load()
    said = seen["model.safetensors"]
    assert f"fetching {size / 1e9:.2f} GB of {NAME} at commit {COMMIT[:8]} (model.safetensors) into {tmp_path}/cache" in said


def test_33_a_disk_without_room_is_told_before_the_download(hub, published, monkeypatch, tmp_path):
    monkeypatch.setattr(repository, "LARGE", 10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    refused(SetupError, "needs 0.00 GB", f"in {tmp_path}/cache", "0.00 GB free", "set HF_HOME or pass cache_dir")
    assert not hub.requests("GET", "model.safetensors")


@pytest.mark.parametrize(
    ("number", "words"),
    [(28, "the disk of the cache"), (122, "the disk of the cache"), (13, "cannot be written to"), (30, "cannot be")],
)
def test_33_a_full_or_read_only_cache_names_its_path_and_the_setting(hub, published, monkeypatch, tmp_path, number, words):
    import huggingface_hub.file_download

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    load_config = Source.of(NAME)
    assert load_config.file("config.json")
    monkeypatch.setattr(huggingface_hub.file_download, "http_get", fail)
    refused(SetupError, words, tmp_path / "cache", os.strerror(number), "set HF_HOME or pass cache_dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_33_a_read_only_cache_that_holds_all_is_enough(hub, published, checkpoint, tmp_path):
    load()
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_dir():
            path.chmod(0o555)
    try:
        assert same(load(), checkpoint)
        assert same(load(local_files_only=True), checkpoint)
    finally:
        for path in (tmp_path / "cache").rglob("*"):
            if path.is_dir():
                path.chmod(0o755)


def test_no_tokenizer_is_no_fault_and_a_broken_one_is_whatever_its_message_says(checkpoint, tmp_path):
    folder = tmp_path / "looked for"
    shutil.copytree(checkpoint, folder)
    (folder / "tokenizer.json").write_text("{")
    refused(TokenizerError, "looked for", name=folder)
    for path in (*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("merges*")):
        path.unlink()
    assert gptneo_fast.load(folder, device="cpu").tokenizer is None


def test_what_huggingface_hub_downloaded_itself_is_used(hub, published, checkpoint, tmp_path):
    from huggingface_hub import hf_hub_download

    for name in published.files:
        hf_hub_download(NAME, name, cache_dir=tmp_path / "cache")
    hub.log.clear()
    assert same(load(local_files_only=True), checkpoint) and not hub.log


def test_the_weights_of_a_commit_land_where_huggingface_hub_finds_them(hub, large, tmp_path):
    from huggingface_hub import try_to_load_from_cache

    Causal.from_pretrained(NAME)
    found = try_to_load_from_cache(NAME, "model.safetensors", cache_dir=tmp_path / "cache")
    assert os.path.realpath(found).startswith(str(blobs(tmp_path)))
    assert try_to_load_from_cache(NAME, "config.json", cache_dir=tmp_path / "cache")
