"""Checkpoints from a hub: a server on loopback that speaks its protocol, and huggingface_hub's own cache."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gptneo_fast
from gptneo_fast.errors import CheckpointError, GPTNeoFastError, InputError, ModelNotFoundError, SetupError, TokenizerError
from gptneo_fast.files import repository
from gptneo_fast.files.hub import Source
from tests.support.hub_server import COMMIT, Hub, Repository, etag_of, files_of
from tests.support.peers import SMALL

NAME = "someone/small-neo"
Causal = gptneo_fast.GPTNeoForCausalLM


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


def snapshot(tmp_path):
    return tmp_path / "cache" / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT


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


def blobs(tmp_path):
    return snapshot(tmp_path).parent.parent / "blobs"


@pytest.fixture
def large(hub, tmp_path):
    """A repository with 8 MB of weights."""
    folder = tmp_path / "made"
    Causal(gptneo_fast.GPTNeoConfig(**SMALL).replace(hidden_size=128, vocab_size=9000)).save_pretrained(folder)
    hub.repositories[NAME] = Repository(files_of(folder))
    return hub.repositories[NAME]


def left(tmp_path):
    """What stands in the cache and is neither a blob with the hash that it is named for, nor a link to one, nor a note."""
    files = [p for p in (tmp_path / "cache").rglob("*") if not p.is_dir() and ".locks" not in p.parts and "refs" not in p.parts]
    kept = [p for p in files if not p.is_symlink() and ".no_exist" not in p.parts]
    return [p for p in kept if p.parent.name != "blobs" or p.name != etag_of(p.read_bytes())]


def flipped(data):
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def page(data):
    return b"<html>Please log in</html>".ljust(len(data))


def shorter(data):
    return data[:-4]


def longer(data):
    return data + b"more"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("damage", [flipped, page, shorter, longer])
def test_a_file_that_arrives_damaged_is_not_kept_and_the_next_one_is(hub, published, checkpoint, tmp_path, name, damage):
    published.sent[name] = damage(published.files[name])
    refused(GPTNeoFastError, repr(name), NAME, hub.address)
    assert not left(tmp_path) and not (snapshot(tmp_path) / name).exists()
    published.sent.clear()
    assert same(load(), checkpoint) and load().tokenizer is not None


def test_a_large_file_that_lies_elsewhere_is_held_to_what_the_hub_says_and_its_host_gets_no_token(hub, large, tmp_path):
    large.elsewhere = True
    large.sent["model.safetensors"] = flipped(large.files["model.safetensors"])
    refused(CheckpointError, "'model.safetensors'", "arrived damaged", token="hf_SECRET")
    large.sent.clear()
    assert same(Causal.from_pretrained(NAME, token="hf_SECRET"), tmp_path / "made")
    tokens = {path.split("/")[1] == "elsewhere": token for _, path, token in hub.log}
    assert tokens == {True: None, False: "Bearer hf_SECRET"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damage_that_leaves_the_size_is_told_as_such(hub, large, tmp_path, name):
    large.sent[name] = flipped(large.files[name])
    size, etag = len(large.files[name]), etag_of(large.files[name])
    refused(
        CheckpointError, f"'{name}' of '{NAME}' arrived damaged: its {size} bytes", f"the hash {etag}", "nothing of it is kept"
    )


def test_a_hub_that_does_not_tell_the_size_changes_nothing(hub, published, checkpoint, monkeypatch, tmp_path):
    send = BaseHTTPRequestHandler.send_header
    monkeypatch.setattr(
        BaseHTTPRequestHandler,
        "send_header",
        lambda s, k, v: None if k == "Content-Length" and s.command == "HEAD" else send(s, k, v),
    )
    published.sent["model.safetensors"] = published.files["model.safetensors"][:-4]
    refused(CheckpointError, "arrived damaged")
    published.sent.clear()
    assert same(load(), checkpoint)


def test_a_download_that_breaks_off_leaves_nothing(hub, large, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))  # between attempts
    large.cut = {"model.safetensors": 50_000}
    refused(SetupError, "model.safetensors", hub.address)
    assert not left(tmp_path)
    large.cut.clear()
    assert same(Causal.from_pretrained(NAME), tmp_path / "made")


@pytest.mark.parametrize("dripping", ["HEAD", "GET", "body"])
def test_a_hub_that_drips_is_given_up(hub, published, checkpoint, monkeypatch, tmp_path, dripping):
    monkeypatch.setattr(repository, "ANSWER", 0.5)
    monkeypatch.setattr(repository, "SILENCE", 0.5)
    published.dripping = dripping
    began = time.perf_counter()
    refused(GPTNeoFastError, f"the hub {hub.address} fell silent for 0 seconds")
    assert time.perf_counter() - began < 20 and not left(tmp_path)
    published.dripping = ""
    assert same(load(), checkpoint)
    published.dripping = dripping
    assert same(load(), checkpoint)


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "page"])
def test_34_what_was_left_over_is_neither_followed_nor_opened_nor_believed(hub, published, checkpoint, tmp_path, kind):
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    blobs(tmp_path).mkdir(parents=True)
    snapshot(tmp_path).mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        etag = etag_of(published.files[name])
        for place in (blobs(tmp_path) / etag, blobs(tmp_path) / f"{etag}.incomplete", snapshot(tmp_path) / name):
            if kind == "fifo" and place.parent != snapshot(tmp_path):
                os.mkfifo(place)
            elif kind == "page" and place.parent != snapshot(tmp_path):
                place.write_bytes(b"<html>")
            elif kind == "dangling" or (kind == "link" and place.parent != snapshot(tmp_path)):
                place.symlink_to(outside if kind == "link" else tmp_path / "nowhere")
    assert same(load(), checkpoint)
    assert outside.read_bytes() == b"mine" and not (tmp_path / "nowhere").exists()


LOADER = """
import sys, hashlib
from gptneo_fast.files.hub import Source
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 100_000
path = Source.of(sys.argv[1]).file("model.safetensors")
print(hashlib.sha256(path.read_bytes()).hexdigest())
"""


def start(hub, tmp_path, *command):
    env = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "cache")}
    env |= {"HF_HUB_DOWNLOAD_TIMEOUT": "300", "HF_HUB_ETAG_TIMEOUT": "300"}  # on a machine as busy as it likes
    command = command or (sys.executable, "-c", LOADER, NAME)
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_34_two_processes_at_once_fetch_once_and_one_killed_does_not_hold_up_the_other(hub, large, tmp_path):
    data = large.files["model.safetensors"]
    large.held_at = 4 << 20
    first = start(hub, tmp_path)
    deadline = time.time() + 240
    while not any(p.stat().st_size >= 2 << 20 for p in blobs(tmp_path).rglob("*.incomplete")):
        assert time.time() < deadline and first.poll() is None, first.communicate()
        time.sleep(0.05)
    second = start(hub, tmp_path)
    while len(hub.requests("HEAD", "model.safetensors")) < 3:  # it stands before the lock, which the first has passed
        assert time.time() < deadline and second.poll() is None, second.communicate()
        time.sleep(0.05)
    time.sleep(0.5)
    assert len(hub.requests("GET", "model.safetensors")) == 1
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    large.gate.set()
    out, err = second.communicate(timeout=240)
    assert out.strip() == etag_of(data), err
    assert len(hub.requests("GET", "model.safetensors")) == 2


def test_34_what_a_killed_process_left_is_cleared_away_once_it_is_old(hub, large, tmp_path):
    for name, age in (("old", 2 * repository.STALE), ("new", 0)):
        folder = blobs(tmp_path) / f".gptneo_fast-{name}"
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "part.incomplete").write_bytes(b"x")
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (time.time() - age,) * 2)
    Causal.from_pretrained(NAME)
    assert [p.name for p in blobs(tmp_path).glob(".*")] == [".gptneo_fast-new"]


def test_34_two_writers_where_locks_do_nothing_do_not_meet(hub, large, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils.WeakFileLock", lambda *_, **__: nullcontext())
    large.held_at = 4 << 20
    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(Source.of(NAME).file, "model.safetensors") for _ in range(2)]
        deadline = time.time() + 60
        while len(hub.requests("GET", "model.safetensors")) < 2:
            assert time.time() < deadline
            time.sleep(0.02)
        large.gate.set()
        assert all(f.result().read_bytes() == large.files["model.safetensors"] for f in found)
    assert not left(tmp_path)


def test_where_links_are_not_supported_the_file_itself_stands_in_the_snapshot(
    hub, published, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda folder: False)
    assert same(load(), checkpoint) and same(load(force_download=True), checkpoint)
    assert not (snapshot(tmp_path) / "model.safetensors").is_symlink() and not list(blobs(tmp_path).iterdir())


DAMAGES = {  # to a file of the cache, each seen when it is read
    "model.safetensors": shorter,
    "tokenizer.json": shorter,
    "config.json": lambda data: data.replace(b"gpt_neo", b"gpt_nep"),
    "generation_config.json": shorter,
}


@pytest.fixture(params=DAMAGES)
def spoiled(request, hub, published, tmp_path):
    """A cache with one damaged file; its name, and the message."""
    load()
    path = snapshot(tmp_path) / request.param
    path.resolve().write_bytes(DAMAGES[request.param](path.read_bytes()))
    words = f"The cache's {request.param} is not what the hub sent: pass force_download=True, or run: hf download {NAME}"
    return request.param, str(refused(GPTNeoFastError, path, words, cache_dir=str(tmp_path / "cache")))


def test_a_damaged_cache_is_healed_by_force_download(spoiled, checkpoint):
    assert same(load(force_download=True), checkpoint) and same(load(), checkpoint)


@pytest.mark.parametrize("spoiled", ["model.safetensors"], indirect=True)
def test_a_damaged_cache_is_healed_by_the_command_that_the_error_names(hub, spoiled, checkpoint, tmp_path):
    program, *arguments = shlex.split(spoiled[1].split("or run: ")[1])
    assert arguments[-1] == str(tmp_path / "cache")
    process = start(hub, tmp_path, str(Path(sys.executable).parent / program), *arguments)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert same(load(), checkpoint)


def test_a_damaged_cache_is_healed_by_deleting_the_file_and_fetching_it_again(spoiled, checkpoint, tmp_path):
    (snapshot(tmp_path) / spoiled[0]).unlink()
    assert same(load(), checkpoint)


def test_a_fault_that_the_hub_sent_is_not_blamed_on_the_cache(hub, published):
    published.files["model.safetensors"] = published.files["model.safetensors"][:-4]
    assert "force_download" not in str(refused(CheckpointError, "4 fewer"))


def test_force_download_fetches_every_file_that_is_needed_once(hub, published):
    load()
    first = sorted(p.split("/")[-1] for p in hub.requests("GET"))
    hub.log.clear()
    load(force_download=True)
    assert sorted(p.split("/")[-1] for p in hub.requests("GET")) == first and len(set(first)) == len(first)
    hub.log.clear()
    gptneo_fast.GPT2Tokenizer.from_pretrained(NAME, force_download=True)
    assert hub.requests("GET", "tokenizer.json")


def test_force_download_is_not_taken_for_granted_without_the_hub(hub, published):
    load()
    refused(SetupError, "force_download=True", "local_files_only=True", local_files_only=True, force_download=True)
    hub.close()
    refused(SetupError, "force_download=True", "cannot be reached", force_download=True)


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
