"""The classes that `transformers.models.gpt_neo.modeling_gpt_neo` has."""

from ...network.modules import GPTNeoAttention, GPTNeoBlock, GPTNeoMLP, GPTNeoSelfAttention
from ..causal import GPTNeoForCausalLM
from ..classifiers import GPTNeoForQuestionAnswering, GPTNeoForSequenceClassification, GPTNeoForTokenClassification
from ..model import GPTNeoModel
from ..pretrained import GPTNeoPreTrainedModel

__all__ = [
    "GPTNeoAttention",
    "GPTNeoBlock",
    "GPTNeoForCausalLM",
    "GPTNeoForQuestionAnswering",
    "GPTNeoForSequenceClassification",
    "GPTNeoForTokenClassification",
    "GPTNeoMLP",
    "GPTNeoModel",
    "GPTNeoPreTrainedModel",
    "GPTNeoSelfAttention",
]
