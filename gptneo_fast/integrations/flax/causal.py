"""FlaxGPTNeoForCausalLM."""

from __future__ import annotations

from jax import Array

from ... import heads
from .network import Traced
from .outputs import FlaxCausalLMOutput, FlaxOutput
from .pretrained import FlaxGPTNeoPreTrainedModel


class FlaxGPTNeoForCausalLM(FlaxGPTNeoPreTrainedModel):
    """The language model in JAX: token ids to logits."""

    _causal = True
    _torch_class = heads.GPTNeoForCausalLM

    def _output(self, main: Array, traced: Traced) -> FlaxOutput:
        return FlaxCausalLMOutput(main, traced.cache, traced.hidden_states, traced.attentions)
