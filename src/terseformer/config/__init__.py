"""What a run is made of: frozen dataclasses.

A recipe has three sections, `[model]`, `[data]` and `[train]`. Where a model has a choice of parts
(feed-forward, attention projection and pattern, head), the part is a table with a `kind`, and each kind has
only the keys that it uses, so that no key can be without effect.
"""

from terseformer.config.checks import ConfigError as ConfigError
from terseformer.config.data import DataConfig as DataConfig
from terseformer.config.model import EncoderDecoderConfig as EncoderDecoderConfig
from terseformer.config.model import ModelConfig as ModelConfig
from terseformer.config.model import Seq2SeqConfig as Seq2SeqConfig
from terseformer.config.model import TerraformerConfig as TerraformerConfig
from terseformer.config.parts import AttentionProjectionConfig as AttentionProjectionConfig
from terseformer.config.parts import BlockFeedForwardConfig as BlockFeedForwardConfig
from terseformer.config.parts import CrossProjectionConfig as CrossProjectionConfig
from terseformer.config.parts import DenseFeedForwardConfig as DenseFeedForwardConfig
from terseformer.config.parts import DenseHeadConfig as DenseHeadConfig
from terseformer.config.parts import DenseProjectionConfig as DenseProjectionConfig
from terseformer.config.parts import FeedForwardConfig as FeedForwardConfig
from terseformer.config.parts import HeadConfig as HeadConfig
from terseformer.config.parts import LocalConvolutionProjectionConfig as LocalConvolutionProjectionConfig
from terseformer.config.parts import LocallyConnectedProjectionConfig as LocallyConnectedProjectionConfig
from terseformer.config.parts import LowRankProjectionConfig as LowRankProjectionConfig
from terseformer.config.parts import MultiplicativeHeadConfig as MultiplicativeHeadConfig
from terseformer.config.parts import MultiplicativeModularProjectionConfig as MultiplicativeModularProjectionConfig
from terseformer.config.parts import MultiplicativeProjectionConfig as MultiplicativeProjectionConfig
from terseformer.config.parts import SparseCrossProjectionConfig as SparseCrossProjectionConfig
from terseformer.config.parts import SparseFeedForwardConfig as SparseFeedForwardConfig
from terseformer.config.parts import SparseProjectionConfig as SparseProjectionConfig
from terseformer.config.parts import SRUConfig as SRUConfig
from terseformer.config.parts import SwitchFeedForwardConfig as SwitchFeedForwardConfig
from terseformer.config.patterns import AttentionPatternConfig as AttentionPatternConfig
from terseformer.config.patterns import FavorPatternConfig as FavorPatternConfig
from terseformer.config.patterns import FavorSoftmaxPatternConfig as FavorSoftmaxPatternConfig
from terseformer.config.patterns import LocalPatternConfig as LocalPatternConfig
from terseformer.config.patterns import LSHPatternConfig as LSHPatternConfig
from terseformer.config.patterns import MixedPatternConfig as MixedPatternConfig
from terseformer.config.patterns import SoftmaxPatternConfig as SoftmaxPatternConfig
from terseformer.config.recipe import Recipe as Recipe
from terseformer.config.training import NextTokenConfig as NextTokenConfig
from terseformer.config.training import ObjectiveConfig as ObjectiveConfig
from terseformer.config.training import PairsConfig as PairsConfig
from terseformer.config.training import SpanCorruptionConfig as SpanCorruptionConfig
from terseformer.config.training import TrainConfig as TrainConfig
