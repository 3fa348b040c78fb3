"""GPT-Neo in JAX: FlaxGPTNeoModel and FlaxGPTNeoForCausalLM, which transformers 5 dropped.

Arguments, outputs and parameter tree are those of transformers 4.57, so that its users' code and checkpoints carry over.
Needs `pip install gptneo-fast[flax]`.
"""

from ..errors import MissingExtraError

try:
    import flax.core  # noqa: F401
    import jax  # noqa: F401
except ImportError as error:
    raise MissingExtraError(
        f"the Flax classes need jax and flax ({error}): pip install 'gptneo-fast[flax]'; flax_model.msgpack loads into "
        "GPTNeoForCausalLM without them"
    ) from error

from .causal import FlaxGPTNeoForCausalLM
from .pretrained import FlaxGPTNeoModel, FlaxGPTNeoPreTrainedModel

__all__ = ["FlaxGPTNeoForCausalLM", "FlaxGPTNeoModel", "FlaxGPTNeoPreTrainedModel"]
