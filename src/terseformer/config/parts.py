"""The parts of a model of which there is a choice: feed-forward layers, attention projections, heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from terseformer.config.checks import require_multiple, require_ranges

# Feed-forward layers.


@dataclass(frozen=True, kw_only=True)
class DenseFeedForwardConfig:
    """Two dense layers with an activation between them."""

    kind: Literal["dense"] = "dense"
    intermediate_size: int = 1024
    """Width F of the hidden layer."""
    activation: Literal["relu", "gelu", "swiglu"] = "relu"
    """Activation; `swiglu` has a third matrix, the gate."""
    ff_dropout: float = 0.0
    """Dropout before the activation, as the reference has it."""

    def __post_init__(self) -> None:
        require_ranges("model.feed_forward", self, count=("intermediate_size",), share_below_one=("ff_dropout",))


@dataclass(frozen=True, kw_only=True)
class SparseFeedForwardConfig:
    """The paper's feed-forward layer: a low-rank controller picks one unit in every block of N."""

    kind: Literal["sparse"] = "sparse"
    intermediate_size: int = 1024
    """Width F of the hidden layer, a multiple of `ff_block_size`."""
    ff_block_size: int = 16
    """Units in a block, N: one of them is used for each token."""
    controller_rank: int = 32
    """Rank R of the controller (the paper: hidden_size / N)."""
    temperature: float = 0.1
    """Factor of the Gumbel noise when training draws its hard choice; 0 takes the best unit."""
    quant_prob: float = 0.3
    """Probability that a training call uses the hard one-in-N choice instead of the softmax."""
    controller_gradient: Literal["chosen", "all"] = "chosen"
    """Units whose outputs tell the controller of a hard choice how they would have done: the chosen ones, as in the
    reference, or all active ones; inference is the same."""
    multiply_by_controller: bool = False
    """Scale the chosen unit by the controller's probability for it."""
    kernel_scaling: bool = False
    """Scale the second matrix by sqrt(N) at initialisation, which keeps the variance of the output."""

    def __post_init__(self) -> None:
        require_multiple(
            "model.feed_forward.intermediate_size",
            self.intermediate_size,
            "model.feed_forward.ff_block_size",
            self.ff_block_size,
        )
        require_ranges(
            "model.feed_forward",
            self,
            count=("intermediate_size", "controller_rank"),
            share=("quant_prob",),
            zero_or_more=("temperature",),
        )


@dataclass(frozen=True, kw_only=True)
class _ExpertFeedForwardConfig:
    intermediate_size: int = 1024
    """Width F of the hidden layer, a multiple of `num_experts`."""
    num_experts: int = 8
    """Contiguous blocks of F / num_experts units; one whole block is used for each token."""

    def __post_init__(self) -> None:
        require_multiple(
            "model.feed_forward.intermediate_size",
            self.intermediate_size,
            "model.feed_forward.num_experts",
            self.num_experts,
        )
        require_ranges("model.feed_forward", self, count=("intermediate_size",))


@dataclass(frozen=True, kw_only=True)
class BlockFeedForwardConfig(_ExpertFeedForwardConfig):
    """One contiguous block of units for each token; hard half of the time in training, else softmax."""

    kind: Literal["block"] = "block"
    temperature: float = 0.7
    """Factor of the Gumbel noise when training draws its hard choice."""
    quant_prob: float = 0.5
    """Probability that a training call uses the hard choice instead of the softmax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges("model.feed_forward", self, share=("quant_prob",), zero_or_more=("temperature",))


@dataclass(frozen=True, kw_only=True)
class SwitchFeedForwardConfig(_ExpertFeedForwardConfig):
    """One contiguous block of units for each token, always hard, scaled by the router's probability."""

    kind: Literal["switch"] = "switch"
    temperature: float = 0.1
    """Factor of the Gumbel noise when training draws its choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges("model.feed_forward", self, zero_or_more=("temperature",))


FeedForwardConfig = DenseFeedForwardConfig | SparseFeedForwardConfig | BlockFeedForwardConfig | SwitchFeedForwardConfig

# Attention projections.


@dataclass(frozen=True, kw_only=True)
class DenseProjectionConfig:
    """Dense query, key, value and output layers."""

    kind: Literal["dense"] = "dense"
    bias: bool = True
    """Whether the four layers have a bias."""


@dataclass(frozen=True, kw_only=True)
class LowRankProjectionConfig:
    """Query, key, value and output through a bottleneck of `rank`."""

    kind: Literal["low_rank"] = "low_rank"
    rank: int = 64
    """Width of the bottleneck."""

    def __post_init__(self) -> None:
        require_ranges("model.attention", self, count=("rank",))


@dataclass(frozen=True, kw_only=True)
class MultiplicativeProjectionConfig:
    """Query, key, value and output by the paper's multiplicative layer."""

    kind: Literal["multiplicative"] = "multiplicative"
    qkv_modules: int = 8
    """Modules S that the output is divided into."""


@dataclass(frozen=True, kw_only=True)
class LocalConvolutionProjectionConfig:
    """Query, key, value and output by convolutions over modules and time."""

    kind: Literal["local_convolution"] = "local_convolution"
    qkv_modules: int = 8
    """Modules S, over which the weights are shared."""
    module_kernel: int = 3
    """Neighbouring modules that the kernel sees; odd."""
    length_kernel: int = 3
    """Tokens that the kernel sees: the present one and those before it."""

    def __post_init__(self) -> None:
        require_ranges("model.attention", self, odd=("module_kernel",), count=("length_kernel",))


@dataclass(frozen=True, kw_only=True)
class LocallyConnectedProjectionConfig:
    """Query, key, value and output by modules with weights of their own, each seeing its neighbours."""

    kind: Literal["locally_connected"] = "locally_connected"
    qkv_modules: int = 8
    """Modules S."""
    module_kernel: int = 3
    """Neighbouring modules that an output module sees; odd."""

    def __post_init__(self) -> None:
        require_ranges("model.attention", self, odd=("module_kernel",))


@dataclass(frozen=True, kw_only=True)
class MultiplicativeModularProjectionConfig:
    """Query, key, value and output by a multiplicative layer followed by one matrix a module."""

    kind: Literal["multiplicative_modular"] = "multiplicative_modular"
    qkv_modules: int = 8
    """Modules S."""


@dataclass(frozen=True, kw_only=True)
class SparseProjectionConfig:
    """The paper's sparse QKV: one multiplicative layer, then a small convolution for each of q, k and v."""

    kind: Literal["sparse"] = "sparse"
    qkv_modules: int = 8
    """Modules S of the multiplicative layer and of the convolutions."""
    length_kernel: int = 3
    """Tokens that the convolutions see: the present one and those before it."""
    module_kernel: int = 3
    """Neighbouring modules that the convolutions of q and k see; odd (that of v sees one)."""
    share_qk: bool = False
    """Use one convolution for both q and k."""
    output_layer: Literal["none", "mult", "conv", "multconv"] = "none"
    """What follows the merged heads; `none` adds them straight to the residual stream."""
    value_input: Literal["none", "fixed", "original"] = "none"
    """What v sees beside the multiplicative layer's output: nothing, the input's module, or all of the input."""

    def __post_init__(self) -> None:
        require_ranges("model.attention", self, odd=("module_kernel",), count=("length_kernel",))


AttentionProjectionConfig = (
    DenseProjectionConfig
    | LowRankProjectionConfig
    | MultiplicativeProjectionConfig
    | LocalConvolutionProjectionConfig
    | LocallyConnectedProjectionConfig
    | MultiplicativeModularProjectionConfig
    | SparseProjectionConfig
)


@dataclass(frozen=True, kw_only=True)
class SparseCrossProjectionConfig:
    """A sparse query for cross-attention: a multiplicative layer, then a convolution.

    Keys and values, which are made once for a source, stay dense, and nothing follows the merged heads.
    """

    kind: Literal["sparse"] = "sparse"
    qkv_modules: int = 8
    """Modules S of the query's two layers."""
    length_kernel: int = 3
    """Tokens that the convolution sees: the present one and those before it."""
    module_kernel: int = 3
    """Neighbouring modules that the convolution sees; odd."""

    def __post_init__(self) -> None:
        require_ranges("model.cross_attention", self, odd=("module_kernel",), count=("length_kernel",))


CrossProjectionConfig = DenseProjectionConfig | SparseCrossProjectionConfig

# Heads.


@dataclass(frozen=True, kw_only=True)
class DenseHeadConfig:
    """A dense layer from hidden_size to the vocabulary."""

    kind: Literal["dense"] = "dense"
    tied: bool = False
    """Use the embedding's matrix, without bias."""


@dataclass(frozen=True, kw_only=True)
class MultiplicativeHeadConfig:
    """The paper's sparse loss layer: a multiplicative layer from hidden_size to the vocabulary."""

    kind: Literal["multiplicative"] = "multiplicative"
    head_modules: int = 4
    """Modules S that the vocabulary is divided into; it must divide vocab_size."""
    sparse_prob: float = 1.0
    """Below 1, training has a dense head beside it and uses the sparse one with this probability."""
    gates_std: float = 0.5
    """Standard deviation of the initial factor D. The factor E shrinks as it grows, so that their product stays the
    reference's; under Adam, whose steps have one size, the product then learns faster."""

    def __post_init__(self) -> None:
        require_ranges("model.head", self, share=("sparse_prob",), positive=("gates_std",))


HeadConfig = DenseHeadConfig | MultiplicativeHeadConfig

# The recurrent branch.


@dataclass(frozen=True, kw_only=True)
class SRUConfig:
    """A branch of simple recurrent units that is added to the feed-forward layer's output."""

    num_layers: int = 0
    """Recurrent layers in the branch; 0 leaves it out."""
    size: int = 32
    """Width of the branch."""

    def __post_init__(self) -> None:
        require_ranges("model.sru", self, zero_or_more=("num_layers",), count=("size",))
