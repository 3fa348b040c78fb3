"""The public names and where they stand: the one list of them, for type checkers and for `__init__.py`."""

from .config import GPTNeoConfig as GPTNeoConfig
from .engine import Engine as Engine, Job as Job
from .errors import GPTNeoFastError as GPTNeoFastError, GPTNeoFastWarning as GPTNeoFastWarning
from .flax import FlaxGPTNeoForCausalLM as FlaxGPTNeoForCausalLM, FlaxGPTNeoModel as FlaxGPTNeoModel
from .generation import GenerationConfig as GenerationConfig, GenerationMode as GenerationMode
from .generation.processors import (
    ExponentialDecayLengthPenalty as ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor as ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor as ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor as InfNanRemoveLogitsProcessor,
    LogitsProcessor as LogitsProcessor,
    LogitsProcessorList as LogitsProcessorList,
    MinLengthLogitsProcessor as MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor as MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor as NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor as NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor as PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor as RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor as SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor as SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor as SuppressTokensLogitsProcessor,
)
from .generation.stopping import (
    ConfidenceCriteria as ConfidenceCriteria,
    EosTokenCriteria as EosTokenCriteria,
    MaxLengthCriteria as MaxLengthCriteria,
    MaxTimeCriteria as MaxTimeCriteria,
    StoppingCriteria as StoppingCriteria,
    StoppingCriteriaList as StoppingCriteriaList,
    StopStringCriteria as StopStringCriteria,
    validate_stopping_criteria as validate_stopping_criteria,
)
from .generation.streamers import (
    AsyncTextIteratorStreamer as AsyncTextIteratorStreamer,
    BaseStreamer as BaseStreamer,
    TextIteratorStreamer as TextIteratorStreamer,
    TextStreamer as TextStreamer,
)
from .generation.warpers import (
    EpsilonLogitsWarper as EpsilonLogitsWarper,
    EtaLogitsWarper as EtaLogitsWarper,
    LogitNormalization as LogitNormalization,
    MinPLogitsWarper as MinPLogitsWarper,
    TemperatureLogitsWarper as TemperatureLogitsWarper,
    TopHLogitsWarper as TopHLogitsWarper,
    TopKLogitsWarper as TopKLogitsWarper,
    TopPLogitsWarper as TopPLogitsWarper,
    TypicalLogitsWarper as TypicalLogitsWarper,
)
from .models.causal import GPTNeoForCausalLM as GPTNeoForCausalLM
from .models.classifiers import (
    GPTNeoForQuestionAnswering as GPTNeoForQuestionAnswering,
    GPTNeoForSequenceClassification as GPTNeoForSequenceClassification,
    GPTNeoForTokenClassification as GPTNeoForTokenClassification,
)
from .models.load import (
    AutoConfig as AutoConfig,
    AutoModel as AutoModel,
    AutoModelForCausalLM as AutoModelForCausalLM,
    AutoModelForQuestionAnswering as AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification as AutoModelForSequenceClassification,
    AutoModelForTokenClassification as AutoModelForTokenClassification,
    AutoTokenizer as AutoTokenizer,
    load as load,
    set_seed as set_seed,
)
from .models.model import GPTNeoModel as GPTNeoModel
from .models.pipelines import TextGenerationPipeline as TextGenerationPipeline, pipeline as pipeline
from .models.pretrained import GPTNeoPreTrainedModel as GPTNeoPreTrainedModel
from .network.cache import KVCache as KVCache, cache_bytes as cache_bytes
from .network.dynamic_cache import DynamicCache as DynamicCache
from .network.modules import (
    GPTNeoAttention as GPTNeoAttention,
    GPTNeoBlock as GPTNeoBlock,
    GPTNeoMLP as GPTNeoMLP,
    GPTNeoSelfAttention as GPTNeoSelfAttention,
)
from .scoring import Score as Score
from .tokenizer import BatchEncoding as BatchEncoding, GPT2Tokenizer as GPT2Tokenizer, GPT2TokenizerFast as GPT2TokenizerFast
from .tools.verify import verify as verify

__version__: str
__all__: list[str]
