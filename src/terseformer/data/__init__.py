"""Corpora, tokenizer, token file and batch order."""

from terseformer.data.batches import batch as batch
from terseformer.data.batches import num_windows as num_windows
from terseformer.data.batches import validation_windows as validation_windows
from terseformer.data.corpus import read_documents as read_documents
from terseformer.data.corruption import SpanCorruption as SpanCorruption
from terseformer.data.errors import DataError as DataError
from terseformer.data.files import default_cache as default_cache
from terseformer.data.pairs import PairBatch as PairBatch
from terseformer.data.pairs import PairFile as PairFile
from terseformer.data.pairs import evenly_spaced as evenly_spaced
from terseformer.data.pairs import pair_batch as pair_batch
from terseformer.data.pairs import pair_validation_batches as pair_validation_batches
from terseformer.data.prepare import PreparedData as PreparedData
from terseformer.data.prepare import prepare as prepare
from terseformer.data.prepare import prepare_in_cache as prepare_in_cache
from terseformer.data.tokenizer import end_of_text_id as end_of_text_id
from terseformer.data.tokenizer import fingerprint as fingerprint
from terseformer.data.tokenizer import load_tokenizer as load_tokenizer
from terseformer.data.tokenizer import train_tokenizer as train_tokenizer
from terseformer.data.tokens import TokenFile as TokenFile
from terseformer.data.tokens import write_token_file as write_token_file
