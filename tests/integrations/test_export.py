"""Exported models in other runtimes: AOTInductor, and ONNX Runtime with keys and values going in and out."""

import pytest
import torch

from gptneo_fast.integrations.export import Step
from tests.network.test_export import exported, inputs, same
from tests.support.peers import peers


def test_a_program_compiles_ahead_of_time(tmp_path):
    plain, program = exported("GPTNeoForCausalLM")
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for B, T in ((1, 3), (4, 25)):
        ids, mask = inputs(B, T, seed=T)
        with torch.no_grad():
            same(compiled(ids, mask), plain(ids, mask), mask, "GPTNeoForCausalLM")


@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_gives_the_logits_past_the_window_with_keys_and_values_going_in_and_out(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    _, model = peers(num_layers=2, window_size=7)
    model = model.eval().requires_grad_(False)
    step = Step(model)
    names, shapes = step.names(), step.dynamic_shapes()
    torch.onnx.export(step, step.example(), tmp_path / "step.onnx", dynamic_shapes=shapes, dynamo=True, verbose=False, **names)
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx", providers=["CPUExecutionProvider"])
    ids, _ = inputs(2, 20)
    ids[0] = ids[0].clamp_min(3)
    with torch.no_grad():
        want = model(ids).logits
    held, found = [t.numpy() for t in step.empty(2)], []
    for part in (ids[:, :9], *ids[:, 9:].split(1, 1)):
        logits, *held = session.run(None, dict(zip(names["input_names"], [part.numpy(), *held], strict=True)))
        found.append(torch.from_numpy(logits))
    torch.testing.assert_close(torch.cat(found, 1), want, atol=1e-4, rtol=1e-4)
