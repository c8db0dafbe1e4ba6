"""Strings to ids and back: SentencePiece and Rust tokenizers, chat turns, incremental decoding.

Importing this loads neither PyTorch nor the tokenizer libraries; they come with the first tokenizer.
"""

from gemmakit.text.chat import GEMMA_TEMPLATE
from gemmakit.text.encoding import BatchEncoding
from gemmakit.text.rust import GemmaTokenizerFast
from gemmakit.text.sentencepiece import GemmaTokenizer
from gemmakit.text.stream import IncrementalDecoder
from gemmakit.text.vocabulary import AddedToken

__all__ = [
    "GEMMA_TEMPLATE",
    "AddedToken",
    "BatchEncoding",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
    "IncrementalDecoder",
]
