"""GPT-Neo's weights as a GPT-2's, for runtimes that know GPT-2 only: within the window they compute the same.

GPT-2 has one matrix for queries, keys and values, biases with it, divides scores by the root of the head's size and sees all
that was before. So queries are multiplied by that root, biases are zero, and a text that fits the window sees all of it.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import likeliest, missing


def as_gpt2(model: Any) -> dict[str, Tensor]:
    """Weights under GPT-2's names, matrices [out, in] as in GPT-Neo (GPT-2's own files have them turned).

    Args:
        model: transformers' GPTNeoForCausalLM with a tied head.
    """
    weights, C = model.state_dict(), model.config.hidden_size
    root = (C // model.config.num_heads) ** 0.5
    found = {f"{name}.weight": weights[f"transformer.{name}.weight"] for name in ("wte", "wpe", "ln_f")}
    found["ln_f.bias"] = weights["transformer.ln_f.bias"]
    for i in range(model.config.num_layers):
        of = {
            name.removeprefix(f"transformer.h.{i}."): w for name, w in weights.items() if name.startswith(f"transformer.h.{i}.")
        }
        q, k, v = (of[f"attn.attention.{name}_proj.weight"] for name in "qkv")
        layer = {
            "attn.c_attn.weight": torch.cat([q * root, k, v]),
            "attn.c_attn.bias": q.new_zeros(3 * C),
            "attn.c_proj.weight": of["attn.attention.out_proj.weight"],
            "attn.c_proj.bias": of["attn.attention.out_proj.bias"],
        } | {name: of[name] for name in of if name.startswith(("ln_", "mlp."))}
        found |= {f"h.{i}.{name}": w for name, w in layer.items()}
    return found


class CTranslate2:
    """CTranslate2's generator."""

    name: ClassVar[str] = "CTranslate2, as GPT-2"
    coarse: ClassVar[torch.dtype] = torch.float32

    def __init__(self, model: Any, threads: int, bits: int | None = None) -> None:
        import ctranslate2

        compute = "int8" if bits else "float32" if model.dtype == torch.float32 else "bfloat16"
        with tempfile.TemporaryDirectory() as folder:
            ctranslate2_spec(model, compute).save(folder)
            self.generator = ctranslate2.Generator(folder, "cpu", inter_threads=1, intra_threads=threads, compute_type=compute)

    @staticmethod
    def why_not(dtype: torch.dtype, bits: int | None = None) -> str:
        """bfloat16 is for CPUs that multiply it."""
        if reason := missing("ctranslate2"):
            return reason
        if bits == 4:
            return "CTranslate2 has no weights in 4 bits on the CPU"
        import ctranslate2

        can = ctranslate2.get_supported_compute_types("cpu")
        return "" if str(dtype).removeprefix("torch.") in can else f"CTranslate2 computes here in {', '.join(sorted(can))}"

    def decode(self, ids: Tensor, new: int) -> Tensor:
        """As `Peer`."""
        [found] = self.generator.generate_batch(
            [[str(i) for i in ids[0].tolist()]], max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False
        )
        return torch.cat([ids, torch.tensor([found.sequences_ids[0]])], 1)


def ctranslate2_spec(model: Any, compute: str) -> Any:
    """What CTranslate2 saves; token i is called "i"."""
    from ctranslate2.specs import TransformerDecoderModelSpec, common_spec

    c, weights = model.config, {name: w.float().numpy() for name, w in as_gpt2(model).items()}
    spec = TransformerDecoderModelSpec.from_config(
        c.num_layers, c.num_heads, pre_norm=True, activation=common_spec.Activation.GELUTanh
    )

    def norm(to: Any, name: str) -> None:
        to.gamma, to.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]

    def linear(to: Any, name: str) -> None:
        to.weight, to.bias = weights[f"{name}.weight"], weights[f"{name}.bias"]

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight, decoder.position_encodings.encodings = weights["wte.weight"], weights["wpe.weight"]
    decoder.projection.weight = weights["wte.weight"]
    norm(decoder.layer_norm, "ln_f")
    for i, layer in enumerate(decoder.layer):
        norm(layer.self_attention.layer_norm, f"h.{i}.ln_1")
        linear(layer.self_attention.linear[0], f"h.{i}.attn.c_attn")
        linear(layer.self_attention.linear[1], f"h.{i}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"h.{i}.ln_2")
        linear(layer.ffn.linear_0, f"h.{i}.mlp.c_fc")
        linear(layer.ffn.linear_1, f"h.{i}.mlp.c_proj")
    end = str(c.eos_token_id)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = end
    spec.config.layer_norm_epsilon = c.layer_norm_epsilon
    spec.register_vocabulary([str(i) for i in range(c.vocab_size)])
    spec.validate()
    spec.optimize(quantization=compute)
    return spec


class LlamaCpp:
    """llama.cpp by llama-cpp-python's bindings of its C functions."""

    name: ClassVar[str] = "llama.cpp, as GPT-2"
    coarse: ClassVar[torch.dtype] = torch.float16  # its GELU is a table

    def __init__(self, model: Any, threads: int, bits: int | None = None) -> None:
        import llama_cpp

        self.c, self.end, self.V = llama_cpp, model.config.eos_token_id, model.config.vocab_size
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        with tempfile.TemporaryDirectory() as folder:
            path = write_gguf(model, Path(folder) / "model.gguf", _ggml_type(model.dtype, bits))
            how = llama_cpp.llama_model_default_params()
            how.use_mmap, how.n_gpu_layers = False, 0
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), how)
        if not self.model:
            raise RuntimeError("llama.cpp does not take the file")
        how = llama_cpp.llama_context_default_params()
        how.n_ctx = how.n_batch = how.n_ubatch = model.config.window_size
        how.n_threads = how.n_threads_batch = threads
        how.type_k = how.type_v = _ggml_type(model.dtype if bits is None else torch.float16)
        self.context = llama_cpp.llama_init_from_model(self.model, how)

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.c.llama_free(self.context)
        if getattr(self, "model", None):
            self.c.llama_model_free(self.model)

    @staticmethod
    def why_not(dtype: torch.dtype, bits: int | None = None) -> str:
        """It computes in either dtype on any CPU, and in few bits."""
        return missing("llama_cpp", "gguf")

    def decode(self, ids: Tensor, new: int) -> Tensor:
        """As `Peer`."""
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        tokens: list[int] = []
        text = ids[0].tolist()
        while len(tokens) < new:
            held = (self.c.llama_token * len(text))(*text)  # the batch has its address only
            if status := self.c.llama_decode(self.context, self.c.llama_batch_get_one(held, len(text))):
                raise RuntimeError(f"llama_decode: {status}")
            tokens.append(likeliest(self._logits(), self.end))
            text = tokens[-1:]
        return torch.cat([ids, torch.tensor([tokens])], 1)

    def _logits(self) -> Tensor:
        """[V] of the last token."""
        found = self.c.llama_get_logits_ith(self.context, -1)
        return torch.frombuffer(ctypes.cast(found, ctypes.POINTER(ctypes.c_float * self.V)).contents, dtype=torch.float32)


def _ggml_type(dtype: torch.dtype, bits: int | None = None) -> Any:
    """ggml's number of a dtype, which the file's format shares; of few bits that of its simplest kind, q8_0 or q4_0."""
    from gguf import GGMLQuantizationType as Kind

    if bits is not None:
        return {8: Kind.Q8_0, 4: Kind.Q4_0}[bits]
    return {torch.float32: Kind.F32, torch.bfloat16: Kind.BF16, torch.float16: Kind.F16}[dtype]


def write_gguf(model: Any, path: Path, low: Any) -> Path:
    """The weights as a GPT-2 in llama.cpp's format: matrices of ggml's type `low`, vectors in float32, no tokenizer."""
    import gguf

    c = model.config
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"} | {
        f"h.{i}.{theirs}": f"blk.{i}.{ggufs}"
        for i in range(c.num_layers)
        for theirs, ggufs in {
            "ln_1": "attn_norm",
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "ln_2": "ffn_norm",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        }.items()
    }
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.intermediate_size or 4 * c.hidden_size)
    writer.add_head_count(c.num_heads)
    writer.add_layer_norm_eps(c.layer_norm_epsilon)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(c.vocab_size)
    for name, weight in as_gpt2(model).items():
        module, _, kind = name.rpartition(".")
        dtype = low if weight.dim() == 2 and module != "wpe" else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(weight.float().numpy(), dtype)
        writer.add_tensor(f"{names[module]}.{kind}", data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
