"""GPT-Neo, exact past the window and near the limit of the chip.

    model = gptneo_fast.load("EleutherAI/gpt-neo-1.3B")
    print(model.generate_text("Once upon a time", max_new_tokens=50))

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "auto": (
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoTokenizer",
        "load",
        "set_seed",
    ),
    "cache": ("KVCache", "cache_bytes"),
    "classifiers": ("GPTNeoForQuestionAnswering", "GPTNeoForSequenceClassification", "GPTNeoForTokenClassification"),
    "config": ("GPTNeoConfig",),
    "errors": ("GPTNeoFastError", "GPTNeoFastWarning"),
    "generation": (
        "GenerationConfig",
        "LogitsProcessor",
        "LogitsProcessorList",
        "StoppingCriteria",
        "StoppingCriteriaList",
        "TextIteratorStreamer",
        "TextStreamer",
    ),
    "heads": ("GPTNeoForCausalLM", "GPTNeoModel"),
    "pipelines": ("TextGenerationPipeline", "pipeline"),
    "pretrained": ("GPTNeoPreTrainedModel",),
    "tokenizer": ("BatchEncoding", "GPT2Tokenizer", "GPT2TokenizerFast"),
    "verification": ("verify",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_EXTRAS = {  # names that need a library which is not installed with the package; no `import *` asks for them
    "FlaxGPTNeoForCausalLM": "integrations.flax",
    "FlaxGPTNeoModel": "integrations.flax",
}

if TYPE_CHECKING:
    from .auto import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
        load,
        set_seed,
    )
    from .cache import KVCache, cache_bytes
    from .classifiers import GPTNeoForQuestionAnswering, GPTNeoForSequenceClassification, GPTNeoForTokenClassification
    from .config import GPTNeoConfig
    from .errors import GPTNeoFastError, GPTNeoFastWarning
    from .generation import (
        GenerationConfig,
        LogitsProcessor,
        LogitsProcessorList,
        StoppingCriteria,
        StoppingCriteriaList,
        TextIteratorStreamer,
        TextStreamer,
    )
    from .heads import GPTNeoForCausalLM, GPTNeoModel
    from .pipelines import TextGenerationPipeline, pipeline
    from .pretrained import GPTNeoPreTrainedModel
    from .tokenizer import BatchEncoding, GPT2Tokenizer, GPT2TokenizerFast
    from .verification import verify

if TYPE_CHECKING:
    from .integrations.flax import FlaxGPTNeoForCausalLM as FlaxGPTNeoForCausalLM
    from .integrations.flax import FlaxGPTNeoModel as FlaxGPTNeoModel

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
    "BatchEncoding",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "GPTNeoConfig",
    "GPTNeoFastError",
    "GPTNeoFastWarning",
    "GPTNeoForCausalLM",
    "GPTNeoForQuestionAnswering",
    "GPTNeoForSequenceClassification",
    "GPTNeoForTokenClassification",
    "GPTNeoModel",
    "GPTNeoPreTrainedModel",
    "GenerationConfig",
    "KVCache",
    "LogitsProcessor",
    "LogitsProcessorList",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "TextGenerationPipeline",
    "TextIteratorStreamer",
    "TextStreamer",
    "cache_bytes",
    "load",
    "pipeline",
    "set_seed",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name) or _EXTRAS.get(name)
    if home is None:
        from .errors import nearest

        raise AttributeError(f"module 'gptneo_fast' has no attribute {name!r}{nearest(name, [*__all__, *_EXTRAS])}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_EXTRAS})
