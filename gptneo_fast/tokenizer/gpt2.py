"""GPT2Tokenizer: GPT-2's byte-level BPE over the `tokenizers` library, with the calls of transformers."""

from __future__ import annotations

import os
import tempfile
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer

from ..errors import InputError, SetupError, TokenizerError, UnknownOptionError, nearest, short, warn_once
from ..files.hub import Source
from ..forks import new_lock
from ..kinship import make_kin
from . import saving
from .arguments import checked_text, checked_tokens, flag, mapping, shape_of
from .chat import Conversations
from .decode import Decoding
from .encode import encode
from .encoding import BatchEncoding
from .files import Parts, build, given_parts, read_parts
from .padding import Padding
from .settings import read_settings
from .special import NAMES, extra_tokens
from .training import train

_END = "<|endoftext|>"
_IGNORED = {"use_fast", "trust_remote_code", "proxies", "legacy", "verbose", "tokenizer_type", "backend", "from_slow"}
_OF_THE_FOLDER = ("vocab", "merges", "tokenizer_file", "tokenizer_object")
_IGNORED |= {"do_lower_case"}  # which GPT-2's tokenizer does not know in transformers either


class GPT2Tokenizer(Decoding, Padding, Conversations):
    """Text to token ids and back.

    Args:
        vocab, merges: token -> id and pairs by rank, or paths of vocab.json and merges.txt.
        tokenizer_file: path of a tokenizer.json, instead.
        tokenizer_object: a `tokenizers.Tokenizer`, instead; it is copied.
        bos_token, eos_token, unk_token, pad_token, sep_token, cls_token, mask_token: special tokens, strings, AddedTokens
            or None; any other keyword that ends in `_token` names one more. Those that the vocabulary lacks are added.
        extra_special_tokens: special tokens without a name.
        added_tokens_decoder: id -> token that the vocabulary shall have besides.
        add_prefix_space: put a space before every text. add_bos_token, add_eos_token: put a token before or behind it.
        model_max_length: tokens that truncation cuts to; None for no limit.
        padding_side, truncation_side: "left" or "right".
        split_special_tokens: take special tokens in a text for plain text.
        model_input_names: with "token_type_ids" among them a call gives these as well.
        chat_template: for `apply_chat_template`; a text, or several under names.

    Raises:
        TokenizerError: a vocabulary that cannot be right. InputError, UnknownOptionError: other arguments.
    """

    vocab_files_names = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}  # noqa: RUF012
    SPECIAL_TOKENS_ATTRIBUTES = list(NAMES)  # noqa: RUF012 (transformers' name, as the next ones)
    backend = "tokenizers"
    slow_tokenizer_class = None
    is_fast = True
    verbose = False
    pad_token_type_id = 0

    def __init__(
        self,
        vocab: dict[str, int] | Parts | str | os.PathLike[str] | None = None,
        merges: list[tuple[str, str]] | str | os.PathLike[str] | None = None,
        *,
        tokenizer_file: str | os.PathLike[str] | None = None,
        tokenizer_object: Tokenizer | None = None,
        extra_special_tokens: list[str | AddedToken] | None = None,
        added_tokens_decoder: dict[int, AddedToken] | None = None,
        add_prefix_space: bool = False,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        errors: str = "replace",
        model_max_length: int | None = None,
        padding_side: Literal["left", "right"] = "right",
        truncation_side: Literal["left", "right"] = "right",
        split_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
        model_input_names: list[str] | None = None,
        chat_template: Any = None,
        name_or_path: str = "",
        **special: Any,
    ) -> None:
        if not isinstance(errors, str) or errors != "replace":
            raise InputError(f"errors={short(errors)} is not offered; decode gives U+FFFD for bytes that form no character")
        self._lock, self._bytes, self._around = new_lock(), {}, (False, False)
        self.deprecation_warnings: dict[str, bool] = {}  # which older scripts set, and nothing here reads
        self._extra = extra_tokens(extra_special_tokens)
        if tokenizer_object is not None:
            if not isinstance(tokenizer_object, Tokenizer):
                raise InputError(f"tokenizer_object is {short(tokenizer_object)}; give a tokenizers.Tokenizer")
            added = added_tokens_decoder or {}
            self.backend_tokenizer = Tokenizer.from_str(tokenizer_object.to_str())
        else:
            parts = given_parts(vocab, merges, tokenizer_file)
            added = parts.added if added_tokens_decoder is None else added_tokens_decoder
            self.backend_tokenizer = build(parts, flag("add_prefix_space", add_prefix_space))
        self.name_or_path, self.chat_template, self.add_prefix_space = name_or_path, chat_template, add_prefix_space
        self.model_max_length: int = model_max_length  # type: ignore[assignment]  # None becomes a number there
        self.padding_side: str = padding_side
        self.truncation_side: str = truncation_side
        self.split_special_tokens, self.clean_up_tokenization_spaces = split_special_tokens, clean_up_tokenization_spaces
        self.model_input_names = ["input_ids", "attention_mask"] if model_input_names is None else model_input_names
        self._name_special(special)
        self._add_all(added)
        if add_bos_token is not None or add_eos_token is not None or self.backend_tokenizer.post_processor is None:
            self._set_around(flag("add_bos_token", add_bos_token), flag("add_eos_token", add_eos_token))

    def _name_special(self, special: dict[str, Any]) -> None:
        """Take the keywords that end in `_token`; the vocabulary need not have them yet."""
        named: dict[str, Any] = dict.fromkeys(NAMES) | dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END)
        if flag("do_lower_case", special.get("do_lower_case")):
            warn_once("do_lower_case=True changes nothing: GPT-2's vocabulary has capitals; lower the texts before the call")
        for name, value in special.items():
            if name in _IGNORED:
                continue
            if not name.endswith("_token"):
                options = [*NAMES, *(GPT2Tokenizer.__init__.__annotations__)]
                raise UnknownOptionError(f"GPT2Tokenizer has no option {name!r}{nearest(name, options)}")
            if value is not None and not isinstance(value, (str, AddedToken)):
                raise InputError(f"{name} is a {type(value).__name__}; give a string, an AddedToken or None")
            if value is not None:
                checked_text(str(value), name)
            named[name] = value
        self._special = named

    def _add_all(self, added: dict[int, AddedToken]) -> None:
        """Add listed tokens by id, then named and extra ones that are not among them, and see that each got its id."""
        for index, given in mapping("added_tokens_decoder", added).items():
            if not isinstance(given, AddedToken):
                raise InputError(f"added_tokens_decoder[{short(index)}] is {short(given)}; give an AddedToken")
        tokens = [token for _, token in sorted(added.items())]
        known = {*self.added_tokens_encoder, *(t.content for t in tokens)}
        names = {str(t) for t in self._special.values() if t is not None}
        for token in [*self._special.values(), *self._extra]:
            if token is not None and str(token) not in known:
                known.add(str(token))
                tokens.append(AddedToken(token, special=True) if isinstance(token, str) else token)
        for token in tokens:
            token.special = token.special or token.content in names
        self.add_tokens(tokens)
        for i, token in added.items():
            if (found := self.backend_tokenizer.token_to_id(token.content)) != i:
                raise TokenizerError(
                    f"{self.name_or_path or 'the tokenizer'}: added token {token.content!r:.80} has id {i}, but its place in "
                    f"the vocabulary is {found}; ids of added tokens must follow those of the vocabulary without a gap"
                )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | Source, **options: Any) -> GPT2Tokenizer:
        """The tokenizer of a folder or hub id, from tokenizer.json or else vocab.json + merges.txt, with equal ids.

        Args:
            options: the keywords of this class, which win over the files; and revision, token, cache_dir,
                local_files_only, force_download, subfolder.

        Raises:
            TokenizerError: no tokenizer is there, or its files are broken or none of GPT-2's.
            InputError: a vocabulary beside the folder's.
        """
        if own := next((name for name in _OF_THE_FOLDER if options.pop(name, None) is not None), None):
            raise InputError(
                f"{own} goes not with from_pretrained, which takes the vocabulary of the folder; use GPT2Tokenizer({own}=...)"
            )
        given = {k: options.pop(k) for k in Source.OPTIONS if k in options}
        source = Source.of(pretrained_model_name_or_path, **given)
        extra = options.pop("extra_special_tokens", None)
        extra = options.pop("additional_special_tokens", None) if extra is None else extra
        if extra is not None:  # a list, or name -> token
            options |= extra if isinstance(extra, dict) else {"extra_special_tokens": extra_tokens(extra)}
        with source.reading():
            parts = read_parts(source)
            return cls(parts, **({"name_or_path": source.name} | read_settings(source, parts, options)))

    # Text to ids

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        *,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        max_target_length: int | None = None,
        stride: int = 0,
        pad_to_multiple_of: int | None = None,
        padding_side: Literal["left", "right"] | None = None,
        **options: Any,
    ) -> BatchEncoding:
        """Token ids and attention mask of a text (lists of integers) or of several (lists of lists, or int64 arrays [B, T]).

        Args:
            text: a string or a list of strings; of lists of words with is_split_into_words.
            text_pair: the second text of each, in the same form; or give pairs in `text` as tuples.
            text_target, text_pair_target: texts whose ids become `labels`.
            padding: True or "longest" to the longest of the batch, "max_length" to max_length or model_max_length.
            truncation: True or "longest_first", "only_first", "only_second" to max_length or model_max_length; None for
                yes where max_length is given and padding is not.
            max_length, max_target_length: in tokens.
            stride: tokens that rows of return_overflowing_tokens share with the row before.
            pad_to_multiple_of: round the padded length up.
            padding_side: None for the tokenizer's own.
            options: add_special_tokens (True), is_split_into_words, split_special_tokens (False; take special tokens for
                plain text), return_tensors ("pt" or "np"; a single text then is a batch of one), return_attention_mask
                (True), return_token_type_ids, return_special_tokens_mask, return_offsets_mapping ((start, end) in
                characters), return_length, return_overflowing_tokens (what truncation cut off, as further rows).

        Raises:
            InputError: something other than text; rows of different lengths as one array; padding without a pad token.
            UnknownOptionError: a keyword that does not exist.
        """
        if text is None and text_target is None:
            raise InputError("there is no text; give a string or a list of strings")
        side = self.padding_side if padding_side is None else padding_side
        cut = (stride, pad_to_multiple_of, side, self.model_max_length)
        encoding = target = None
        if text is not None:
            encoding = encode(self, text, text_pair, shape_of(padding, truncation, max_length, *cut), options)
        if text_target is not None:
            most = max_length if max_target_length is None else max_target_length
            target = encode(self, text_target, text_pair_target, shape_of(padding, truncation, most, *cut), options)
        if encoding is None or target is None:
            return encoding or target or BatchEncoding()
        encoding["labels"] = target["input_ids"]
        return encoding

    def encode(self, text: Any, text_pair: Any = None, **options: Any) -> Any:
        """Token ids of a text (a list, or with return_tensors an array [1, T]) or of several; options as in a call."""
        return self(text, text_pair, **options)["input_ids"]

    def encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        """The same as a call; older scripts say it this way."""
        return self(text, text_pair, **options)

    def batch_encode_plus(self, batch_text_or_text_pairs: Any, **options: Any) -> BatchEncoding:
        """The same as a call; older scripts say it this way."""
        return self(batch_text_or_text_pairs, **options)

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any) -> list[str]:
        """Tokens of one text, in the byte alphabet of GPT-2; options as in a call."""
        return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def train_new_from_iterator(
        self,
        text_iterator: Any,
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: list[str | AddedToken] | None = None,
        special_tokens_map: dict[str, str] | None = None,
        **options: Any,
    ) -> GPT2Tokenizer:
        """A tokenizer with the settings of this one and a vocabulary trained on other texts; the same as in transformers.

        Args:
            text_iterator: texts, or lists of them, in a list or one by one.
            vocab_size: tokens in all; 256 bytes and the special tokens are always among them.
            length: texts in all, for the bar.
            new_special_tokens: further ones. special_tokens_map: special token -> its new text.
            options: min_frequency, limit_alphabet, max_token_length, show_progress of `tokenizers.trainers.BpeTrainer`.

        Raises:
            InputError: a number out of range, or something that is no text. UnknownOptionError: another option.
        """
        if not isinstance(special_tokens_map, (dict, type(None))):
            raise InputError(f"special_tokens_map is {short(special_tokens_map)}; give a dict, token -> its new text")
        new, renamed = (
            checked_tokens([] if new_special_tokens is None else new_special_tokens, "new_special_tokens"),
            special_tokens_map or {},
        )
        for text in renamed.values():
            checked_text(text, "a text of special_tokens_map")
        backend = train(self.backend_tokenizer, text_iterator, vocab_size, length, new, renamed, options)
        settings = saving.settings_of(self) | {"extra_special_tokens": [*self._extra, *new], "name_or_path": self.name_or_path}
        for name, token in self._special.items():
            settings[name] = renamed.get(str(token), token)
        found = type(self)(tokenizer_object=backend, **settings)
        found._around = self._around
        return found

    def to_transformers(self) -> Any:
        """The same tokenizer as a PreTrainedTokenizerFast: for what asks for one.

        Raises:
            SetupError: transformers is not installed.
        """
        try:
            import transformers
        except ImportError as error:
            raise SetupError(f"to_transformers needs transformers ({error}); pip install transformers") from error
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return transformers.AutoTokenizer.from_pretrained(folder)

    # Files and copies

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], legacy_format: bool | None = None, **others: Any
    ) -> tuple[str, ...]:
        """Write tokenizer.json and tokenizer_config.json, which gptneo_fast and transformers load with equal ids.

        Args:
            legacy_format: True to write vocab.json, merges.txt and added_tokens.json besides.

        Returns:
            Paths of the files.

        Raises:
            TokenizerError: the folder cannot be written; what stands there is left as it is.
            UnknownOptionError: another keyword, or push_to_hub and filename_prefix, which are not offered.
        """
        if odd := next(
            (name for name, value in others.items() if value or name not in ("push_to_hub", "filename_prefix")), None
        ):
            raise UnknownOptionError(
                f"save_pretrained has no option {odd!r}{nearest(odd, ['save_directory', 'legacy_format'])}"
                + ("; save_pretrained(folder), then huggingface_hub.upload_folder" if odd == "push_to_hub" else "")
            )
        with self._lock:
            return saving.save(self, save_directory, flag("legacy_format", legacy_format))

    def save_vocabulary(self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write vocab.json and merges.txt, which do not hold the added tokens; gives their paths."""
        with self._lock:
            return saving.save_vocabulary(self, save_directory, filename_prefix)

    def push_to_hub(self, repo_id: str, **options: Any) -> None:
        """Not offered.

        Raises:
            UnknownOptionError: save to a folder, then upload it with huggingface_hub.
        """
        raise UnknownOptionError("push_to_hub is not offered; save_pretrained(folder), then huggingface_hub.upload_folder")

    @property
    def _tokenizer(self) -> Tokenizer:
        """What transformers calls so."""
        return self.backend_tokenizer

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """The settings that another tokenizer would be made with, as they are now; a copy."""
        around = {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        return saving.settings_of(self) | around | {"name_or_path": self.name_or_path}

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=new_lock())

    def __repr__(self) -> str:
        special = ", ".join(f"{k}={v!r}" for k, v in self.special_tokens_map.items())
        return f"{type(self).__name__}({len(self)} tokens, {special})"


make_kin(GPT2Tokenizer, "transformers.tokenization_utils_base", "PreTrainedTokenizerBase")
make_kin(GPT2Tokenizer, "transformers.tokenization_utils_tokenizers", "TokenizersBackend")
GPT2TokenizerFast = GPT2Tokenizer  # transformers has one class under both names as well
