"""A process from nothing to its first token: import, load of a saved 125m, one step; ours and transformers' take turns.

The files are in the page cache, as after a first start. Seconds are those of the whole process, to its end; memory is its
high-water mark of resident pages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cpu.turns import beside, keep
from benchmarks.models import pair
from benchmarks.tables import OURS, PEER, ROOT

WORK = "start to first token, 125m"
RUN = """
import json, sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from {library} import GPTNeoForCausalLM
model = GPTNeoForCausalLM.from_pretrained({folder!r}, dtype=torch.float32)
ids = torch.arange(100, 110)[None]
how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)
token = model.generate(ids, **how)[0, -1].item()
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps(dict(token=token, peak=peak)))
"""


class Starts:
    """Processes that say their first token and how much memory they took.

    library: to import. folder: of the checkpoint. path: where it is looked for first.
    """

    def __init__(self, library: str, folder: Path, path: list[str]) -> None:
        self.code = RUN.format(library=library, folder=str(folder), path=path)
        self.folder, self.said = folder, []

    def __call__(self) -> None:
        # compiled Python is kept, as an install does; and not in the project's folder: transformers would import our `kernels`
        not_theirs = "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"
        env = {k: v for k, v in os.environ.items() if k not in not_theirs} | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", self.code], capture_output=True, text=True, env=env, check=False, cwd=self.folder
        )
        assert done.returncode == 0, done.stderr
        self.said.append(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_start(benchmark, tmp_path):
    _, ours = pair("125m", torch.float32)
    ours.save_pretrained(tmp_path)
    starts = {OURS: Starts("gptneo_fast", tmp_path, [str(ROOT)]), PEER: Starts("transformers", tmp_path, [])}
    seconds = beside(benchmark, starts[OURS], {PEER: starts[PEER]})
    assert len({said["token"] for start in starts.values() for said in start.said}) == 1
    weights = sum(p.numel() * p.element_size() for p in ours.parameters())

    def more(runner: str, _: float) -> dict[str, float]:
        peak = max(said["peak"] for said in starts[runner].said)
        return {"peak_mb": peak / 1e6, "weights_mb": weights / 1e6}

    keep(benchmark, WORK, "fp32", 1, 0, seconds, more)
