"""Real text -> token batches, resumable: corpora -> split -> tokenizer -> shards -> prepare -> sampler.

Everything here but `turnout.data.sampler` works without torch.
"""

from turnout.data.corpora import CORPORA, Corpus, Document, open_corpus
from turnout.data.prepare import DataConfig, Dataset, prepare
from turnout.data.shards import TokenShard, write_shard
from turnout.data.survey import CorpusCard, survey
from turnout.data.tokenizer import Tokenizer

__all__ = [
    "CORPORA",
    "Corpus",
    "CorpusCard",
    "DataConfig",
    "Dataset",
    "Document",
    "TokenShard",
    "Tokenizer",
    "open_corpus",
    "prepare",
    "survey",
    "write_shard",
]
