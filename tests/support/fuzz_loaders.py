"""Damaged files against the loaders of checkpoints, configurations and tokenizers.

python tests/support/fuzz_loaders.py --seconds 60          # make fuzz; make fuzz-long SECONDS=3600
python tests/support/fuzz_loaders.py --only 7:1234         # one case again, with its traceback

A case is made from its seed and number alone. It takes the files of a good model, damages one (bytes, JSON structure, or
what a format holds inside), and loads. The loader may succeed or raise a GPTNeoFastError. A bare builtin error, more than
2 seconds of processor time, more than 256 MB of memory or a crash is a failure, and its case is printed.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # it runs as a file, too

SECONDS, GROWTH = 2.0, 256 << 20  # processor time and memory that one case may take
NUMBERS = [0, 1, 2, 7, 8, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
VALUES = [
    *(v for n in NUMBERS for v in (n, -n)),
    *(None, True, False, 0.5, -0.0, 1e308, 10**30),
    *("", "0", "global", "local", "F32", "BF16", "I64", "\ud800", "\0", "x" * 5000, "../x"),
    *([], {}, [[]], [[["global"], 10**9]], ["a", "b"], {"a": {}}, {"content": "x"}),
]
PIECES = [
    *(b"", b"\0", b"\xff", b"\x80", b"<html>", b"version https://git-lfs"),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"null",
        b"NaN",
        b"1e999",
        b"-",
        b"\\u0000",
        b"\\ud800",
        b"\xed\xa0\x80",
        b"\r\n",
    ),
    *(b"[" * 5000, b'{"a":' * 5000, b"9" * 5000),
    *(b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x01\x02"),
    *(b"cposix\nsystem\n", b"R", b"Q", b"\x85", b"\x86", b"h\0", b"q\0"),
    *(b"\xc7", b"\x81", *(bytes([code]) + b"\xff\xff\xff\xff" for code in (0xC6, 0xC9, 0xDD, 0xDF))),
]


# Damage


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few random edits, most of them near the beginning, where headers stand."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        reach = len(out) if rng.random() < 0.5 else min(len(out), 400)
        at = rng.randrange(reach + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 2:
            out[at : at + rng.choice([1, 2, 4, 8])] = rng.choice(PIECES)
        elif kind == 3:
            form = rng.choice(["<B", "<H", "<I", "<Q", ">I", ">Q"])
            value = rng.choice(NUMBERS) & (256 ** struct.calcsize(form) - 1)
            out[at : at + struct.calcsize(form)] = struct.pack(form, value)
        elif kind == 4:
            del out[at : at + rng.choice([1, 4, 100, len(out)])]
        elif kind == 5:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + rng.choice([1, 8, 64, 1000])]
        else:
            out[at:at] = rng.choice(PIECES)
    return bytes(out)


def damage_json(rng: random.Random, data: bytes) -> bytes:
    """Values of a JSON text replaced, removed, renamed or repeated."""
    root = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        node, path = root, []
        while isinstance(node, (dict, list)) and node and (not path or rng.random() < 0.75):
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            path.append((node, key))
            node = node[key]
        if not path:
            root = deepcopy(rng.choice(VALUES))
            break
        parent, key = path[-1]
        kind = rng.randrange(5)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(["", "x", "\ud800", "a" * 300, "__metadata__", "0", str(key) + "x"])] = parent.pop(key)
        elif kind == 2 and isinstance(parent, list):
            parent.extend(parent[:50] * rng.choice([1, 20]))
        else:
            # Copies: the next edit must change neither VALUES nor make a circle.
            parent[key] = deepcopy(rng.choice(VALUES) if rng.random() < 0.8 else rng.choice(path)[0])
    return json.dumps(root).encode()


def damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The header as JSON, its length right again."""
    length = int.from_bytes(data[:8], "little")
    header = damage_json(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def damage_archive(rng: random.Random, data: bytes) -> bytes:
    """One member of a zip archive, usually data.pkl, in an archive that is right again."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    chosen = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
    if rng.random() < 0.2:
        chosen = rng.randrange(len(members))
    name, content = members[chosen]
    members[chosen] = (name, damage_bytes(rng, content))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])) as new:
        for name, content in members:
            new.writestr(name, content)
    return out.getvalue()


# What is loaded

Damage = Callable[[random.Random, bytes], bytes]
TEXTS = {".json": [damage_json, damage_json, damage_bytes], ".txt": [damage_bytes]}
MODEL_FILES: dict[str, list[Damage]] = {
    "model.safetensors": [damage_bytes, damage_safetensors, damage_safetensors],
    "pytorch_model.bin": [damage_bytes, damage_archive, damage_archive],
    "flax_model.msgpack": [damage_bytes],
}


def corpora(root: Path) -> dict[str, Path]:
    """Good folders by the name of what is damaged in them."""
    import torch

    import gptneo_fast
    from gptneo_fast.demo import FOLDER
    from tests.checkpoint.test_msgpack import flat_of, leaf, nested, pack

    config = gptneo_fast.GPTNeoConfig(
        vocab_size=40, hidden_size=16, num_heads=2, num_layers=2, max_position_embeddings=32, window_size=4, eos_token_id=0,
        bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = gptneo_fast.GPTNeoForCausalLM(config)
    found = {name: root / name for name in ("safetensors", "shards", "pickle", "flax", "tokenizer", "vocabulary")}
    for name in ("safetensors", "pickle", "flax"):
        model.save_pretrained(found[name])
    model.save_pretrained(found["shards"], max_shard_size="10KB")
    torch.save(model.state_dict(), found["pickle"] / "pytorch_model.bin")
    (found["flax"] / "flax_model.msgpack").write_bytes(
        pack(nested({path: leaf(p.detach()) for path, p in flat_of(model).items()}))
    )
    for name in ("pickle", "flax"):
        (found[name] / "model.safetensors").unlink()
    for name in ("tokenizer", "vocabulary"):
        found[name].mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json") if name == "tokenizer" else ("vocab.json", "merges.txt"):
            shutil.copy(FOLDER / file, found[name] / file)
    return found


def load(kind: str, folder: Path) -> None:
    """Load what a folder holds and use it once."""
    import torch

    import gptneo_fast

    if kind in ("tokenizer", "vocabulary"):
        tokenizer = gptneo_fast.GPT2Tokenizer.from_pretrained(folder)
        tokenizer.decode(tokenizer("Once upon a time\u00e9\U0001f600")["input_ids"])
        return
    model = gptneo_fast.GPTNeoForCausalLM.from_pretrained(folder)
    model(torch.zeros(1, 3, dtype=torch.long))


class Case:
    """One damaged folder, made from its seed and number."""

    def __init__(self, good: dict[str, Path], work: Path, seed: int, number: int) -> None:
        rng = random.Random(f"{seed}:{number}")
        self.name, self.work = f"{seed}:{number}", work
        self.kind = list(good)[number % len(good)]
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(good[self.kind], work)
        files = sorted(p.name for p in work.iterdir())
        weights = [f for f in files if f in MODEL_FILES or f.startswith("model-")]
        chosen = rng.choice(weights) if weights and rng.random() < 0.7 else rng.choice(files)
        damages = MODEL_FILES.get(chosen) or (
            MODEL_FILES["model.safetensors"] if chosen in weights else TEXTS[Path(chosen).suffix]
        )
        damage = rng.choice(damages)
        self.what = f"{self.kind}, {chosen}, {damage.__name__}"
        (work / chosen).write_bytes(damage(rng, (work / chosen).read_bytes()))


# One case


class TookTooLongError(BaseException):
    """More processor time than a case may take; no `except Exception` swallows it."""


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def judge(run: Callable[[], None]) -> tuple[str, str]:
    """("accepted" | "refused" | "FAILED", what happened) of one load."""
    from gptneo_fast.errors import GPTNeoFastError

    def late(*_: object) -> None:
        raise TookTooLongError

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark of memory begins anew
    before = status("VmRSS")
    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        run()
        outcome = ("accepted", "")
    except GPTNeoFastError as error:
        if not str(error).isprintable() and not str(error).replace("\n", "").isprintable():
            outcome = ("FAILED", f"message with characters that are not printed: {str(error)[:200]!r}")
        elif len(str(error)) > 4000:
            outcome = ("FAILED", f"message of {len(str(error))} characters: {str(error)[:200]!r}")
        else:
            outcome = ("refused", type(error).__name__)
    except TookTooLongError:
        outcome = ("FAILED", f"more than {SECONDS} s of processor time\n{traceback.format_exc()[-1500:]}")
    except BaseException as error:
        outcome = ("FAILED", f"bare {type(error).__name__}: {str(error)[:300]}\n{traceback.format_exc()[-1500:]}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    growth = status("VmHWM") - before
    if growth > GROWTH:
        outcome = ("FAILED", f"{growth >> 20} MB of memory, of at most {GROWTH >> 20}")
    return outcome


# Many cases


def work_through(seed: int, first: int, seconds: float, only: int | None = None) -> None:
    """Cases in this process, one JSON line each; the line that names a case comes before it is loaded."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # a case that asks for everything fails alone
    with tempfile.TemporaryDirectory() as root:
        good = corpora(Path(root) / "good")
        for kind, folder in good.items():
            load(kind, folder)
        end, number = time.monotonic() + seconds, first
        while time.monotonic() < end:
            case = Case(good, Path(root) / "case", seed, number)
            print(json.dumps({"case": case.name, "what": case.what}), flush=True)
            faulthandler.dump_traceback_later(60, exit=True)  # a hang where no signal is looked at
            outcome, detail = judge(lambda case=case: load(case.kind, case.work))
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps({"outcome": outcome, "detail": detail}), flush=True)
            number += 1
            if only is not None:
                return


def supervise(seed: int, seconds: float) -> tuple[collections.Counter, list[str]]:
    """Cases in a child that is started again where it crashes: (what, outcome, detail) counted, and the failures."""
    counts: collections.Counter = collections.Counter()
    failures: list[str] = []
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end and len(failures) < 50:
        command = [sys.executable, __file__, "--child", f"{seed}:{number}", "--seconds", str(end - time.monotonic())]
        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            case = None
            for line in child.stdout or ():
                entry = json.loads(line)
                if "case" in entry:
                    case, number = entry, number + 1
                    continue
                detail = entry["detail"] if entry["outcome"] == "refused" else ""
                counts[case["what"], entry["outcome"], detail] += 1
                if entry["outcome"] == "FAILED":
                    failures.append(f"{case['case']} ({case['what']}): {entry['detail']}")
                case = None
            if child.wait() or case:
                errors.seek(0)
                if case is None:
                    raise SystemExit(f"the fuzzer itself failed:\n{errors.read()[-3000:]}")
                counts[case["what"], "FAILED", ""] += 1
                failures.append(
                    f"{case['case']} ({case['what']}): the process died, {child.returncode}\n{errors.read()[-1500:]}"
                )
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, help="default: from the clock")
    parser.add_argument("--only", metavar="SEED:NUMBER", help="one case again")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child or args.only:
        seed, number = map(int, (args.child or args.only).split(":"))
        work_through(seed, number, args.seconds, only=number if args.only else None)
        return 0
    seed = args.seed if args.seed is not None else int(time.time())
    counts, failures = supervise(seed, args.seconds)
    table: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for (what, outcome, detail), count in counts.items():
        table[what][detail or outcome] += count
    print(f"seed {seed}, {args.seconds:.0f} seconds, {sum(counts.values())} cases, {len(failures)} failures")
    for what in sorted(table):
        print(f"  {what}: {', '.join(f'{count} {name}' for name, count in table[what].most_common())}")
    for failure in failures[:20]:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
