"""GPT-Neo as one graph with keys and values going in and out, for runtimes that take graphs: ONNX Runtime and OpenVINO."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import likeliest, missing

_SHORT = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Step(nn.Module):
    """The modules of a transformers model, called as exporters like it: no cache object, no mask that is as large as memory.

    Args:
        model: transformers' GPTNeoForCausalLM; its modules are used, not copied.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """(logits [1, V] of the last token, then for each layer all keys and all values [1, H, S + T, D]).

        Args:
            ids: int64 [1, T].
            past: for each layer keys and values [1, H, S, D] of the tokens before.
        """
        trunk, T, S = self.model.transformer, ids.shape[1], past[0].shape[2]
        at = torch.arange(T) + S
        x = trunk.wte(ids) + trunk.wpe(at)
        back = at[:, None] - torch.arange(S + T)[None]  # [T, S + T]: how far behind a query a key is
        seen = {"global": back >= 0, "local": (back >= 0) & (back < self.config.window_size)}
        kept: list[Tensor] = []
        for i, block in enumerate(trunk.h):
            attention, h = block.attn.attention, block.ln_1(x)
            q, k, v = (self._heads(p(h)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            k, v = torch.cat([past[2 * i], k], 2), torch.cat([past[2 * i + 1], v], 2)
            kept += [k, v]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[self.config.attention_layers[i]], scale=1.0)
            x = x + attention.out_proj(y.transpose(1, 2).reshape(1, T, self.config.hidden_size))
            h = F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh")  # gelu_new under the name that runtimes fuse
            x = x + block.mlp.c_proj(h)
        return self.model.lm_head(trunk.ln_f(x[:, -1])), *kept

    def _heads(self, x: Tensor) -> Tensor:
        """[1, H, T, D] of [1, T, C]."""
        return x.view(1, -1, self.config.num_heads, self.config.hidden_size // self.config.num_heads).transpose(1, 2)

    def past(self, tokens: int = 0) -> tuple[Tensor, ...]:
        """Keys and values of so many tokens, all zero."""
        H, D = self.config.num_heads, self.config.hidden_size // self.config.num_heads
        return tuple(torch.zeros(1, H, tokens, D, dtype=self.model.dtype) for _ in range(2 * self.config.num_layers))

    def names(self, of: str) -> list[str]:
        """Of keys and values, in their order."""
        return [f"{of}_{what}_{i}" for i in range(self.config.num_layers) for what in ("key", "value")]


class OnnxRuntime:
    """ONNX Runtime on its CPU provider, every optimisation on; outputs go back in without a copy."""

    name: ClassVar[str] = "ONNX Runtime"
    coarse: ClassVar[torch.dtype] = torch.float32

    def __init__(self, model: Any, threads: int, bits: int | None = None) -> None:
        import onnxruntime

        step = Step(model).eval()
        self.step, self.end = step, model.config.eos_token_id
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        with tempfile.TemporaryDirectory() as folder:
            path = export_onnx(step, Path(folder) / "step.onnx")
            if bits is not None:
                path = round_onnx(path, bits)
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    @staticmethod
    def why_not(dtype: torch.dtype, bits: int | None = None) -> str:
        """Its CPU provider has no product of bfloat16 matrices."""
        if dtype != torch.float32:
            return "ONNX Runtime multiplies matrices on the CPU in float32 only"
        return missing("onnxruntime", "onnxscript")

    def decode(self, ids: Tensor, new: int) -> Tensor:
        """As `Peer`."""
        from onnxruntime import OrtValue

        made, fed = ["logits", *self.step.names("new")], self.step.names("past")
        kept = [OrtValue.ortvalue_from_numpy(t.numpy()) for t in self.step.past()]
        tokens, text = [], ids
        while len(tokens) < new:
            feed = {"ids": OrtValue.ortvalue_from_numpy(text.numpy())} | dict(zip(fed, kept, strict=True))
            logits, *kept = self.session.run_with_ort_values(made, feed)
            tokens.append(likeliest(torch.from_numpy(logits.numpy()[0]), self.end))
            text = torch.tensor([tokens[-1:]])
        return torch.cat([ids, torch.tensor([tokens])], 1)


def export_onnx(step: Step, path: Path) -> Path:
    """The step as an ONNX file, T and S free."""
    inputs, outputs = ["ids", *step.names("past")], ["logits", *step.names("new")]
    T, S = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    torch.onnx.export(
        step,
        (torch.zeros(1, 3, dtype=torch.int64), *step.past(5)),
        path,
        input_names=inputs,
        output_names=outputs,
        opset_version=20,  # the first with a Gelu of its own
        dynamic_shapes=({1: T}, tuple({2: S} for _ in inputs[1:])),
        dynamo=True,
        verbose=False,
    )
    return path


def round_onnx(path: Path, bits: int) -> Path:
    """Weights of all products in few bits, a scale for each 64, with x in 8 bits too, which is its fastest way."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    how = DefaultWeightOnlyQuantConfig(block_size=64, is_symmetric=True, accuracy_level=4, bits=bits)
    rounding = MatMulNBitsQuantizer(onnx.load(path), algo_config=how)
    rounding.process()
    rounded = path.with_name("rounded.onnx")
    rounding.model.save_model_to_file(str(rounded), use_external_data_format=True)
    return rounded


class OpenVino:
    """OpenVINO's CPU plugin, keys and values as states inside the model, which is how it likes language models."""

    name: ClassVar[str] = "OpenVINO"
    coarse: ClassVar[torch.dtype] = torch.float32

    def __init__(self, model: Any, threads: int, bits: int | None = None) -> None:
        import openvino
        from openvino._offline_transformations import apply_make_stateful_transformation

        # in float32 whatever the model is: OpenVINO turns weights to the precision that it is asked for
        step = Step(model if model.dtype == torch.float32 else copy.deepcopy(model).float()).eval()
        self.end = model.config.eos_token_id
        graph = openvino.convert_model(step, example_input=(torch.zeros(1, 3, dtype=torch.int64), *step.past(5)))
        ids, *past = graph.inputs
        logits, *new = graph.outputs
        for ports, names in (([ids], ["ids"]), (past, step.names("past")), ([logits], ["logits"]), (new, step.names("new"))):
            for port, name in zip(ports, names, strict=True):
                port.tensor.set_names({name})
        H, D = model.config.num_heads, model.config.hidden_size // model.config.num_heads
        graph.reshape({ids: [1, -1]} | {port: [1, H, -1, D] for port in past})
        apply_make_stateful_transformation(graph, dict(zip(step.names("past"), step.names("new"), strict=True)))
        if bits is not None:
            graph = round_openvino(graph, bits)
        short = _SHORT[model.dtype]
        how = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        exact = {"INFERENCE_PRECISION_HINT": short, "KV_CACHE_PRECISION": short}
        if bits is None:
            exact["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        self.request = openvino.Core().compile_model(graph, "CPU", how | exact).create_infer_request()

    @staticmethod
    def why_not(dtype: torch.dtype, bits: int | None = None) -> str:
        """bfloat16 is for CPUs that multiply it."""
        if reason := missing("openvino", *(["nncf"] if bits else [])):
            return reason
        import openvino

        can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return "" if dtype == torch.float32 or "BF16" in can else "OpenVINO finds no bfloat16 in this CPU"

    def decode(self, ids: Tensor, new: int) -> Tensor:
        """As `Peer`."""
        self.request.reset_state()
        tokens, text = [], ids
        while len(tokens) < new:
            logits = self.request.infer({"ids": text.numpy()}, share_inputs=True)["logits"]
            tokens.append(likeliest(torch.from_numpy(logits[0]), self.end))
            text = torch.tensor([tokens[-1:]])
        return torch.cat([ids, torch.tensor([tokens])], 1)


def round_openvino(graph: Any, bits: int) -> Any:
    """Weights of all products and the embedding in few bits: a scale a row in 8, one for each 64 in 4."""
    import nncf

    if bits == 8:
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=64, ratio=1.0, all_layers=True)
