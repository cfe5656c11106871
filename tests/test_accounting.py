"""The formulas of the accounting against what models store, read and compute, and against published numbers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from terseformer.accounting import (
    Cost,
    account,
    attention_cost,
    dense_cost,
    feed_forward_cost,
    feed_forward_units,
    head_cost,
    local_convolution_cost,
    multiplicative_cost,
    norm_cost,
    position_cost,
    recurrent_cost,
    table_cost,
)
from terseformer.config import (
    AttentionPatternConfig,
    BlockFeedForwardConfig,
    DenseFeedForwardConfig,
    DenseHeadConfig,
    DenseProjectionConfig,
    EncoderDecoderConfig,
    FeedForwardConfig,
    LocalPatternConfig,
    LSHPatternConfig,
    MixedPatternConfig,
    ModelConfig,
    MultiplicativeHeadConfig,
    Seq2SeqConfig,
    SparseFeedForwardConfig,
    SparseProjectionConfig,
    SRUConfig,
    SwitchFeedForwardConfig,
    TerraformerConfig,
)
from terseformer.layers.feedforward import SparseFeedForward
from terseformer.layers.projection import LocalConvolution, Multiplicative, MultiplicativeModular
from terseformer.model import CausalLM
from test_encoder_decoder import CONFIGS as ENCODER_DECODERS
from test_encoder_decoder import new_model
from variants import MAX_POSITION, PYTORCH_ONLY, VARIANTS, make_model

aten = torch.ops.aten
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
with_patterns = pytest.mark.parametrize(
    "config", [*VARIANTS.values(), *PYTORCH_ONLY.values()], ids=[*VARIANTS.keys(), *PYTORCH_ONLY.keys()]
)
CONTEXT = 6


# What a model stores, reads and computes, counted on the model itself.


def part_of(name: str) -> str:
    """The part of the account that a parameter belongs to."""
    name = re.sub(r"^blocks\.\d+\.(\w+_norm)\..*", "norms", name)
    name = re.sub(r"^norm\..*", "final_norm", name)
    return re.sub(r"^blocks\.\d+\.", "", name).split(".")[0]


def distinct_elements(x: Tensor) -> int:
    """Elements of memory that a tensor shows; an expanded dimension shows the same ones again."""
    return int(torch.tensor([n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]).prod())


class Reads(TorchDispatchMode):
    """Counts the elements that operations read of some tensors, over all their views.

    A gather reads the rows that it gives, any other operation all that it is handed. An operation
    whose output shares the tensor's memory (a view, a write in place) reads nothing.
    """

    GATHERS = (aten.embedding, aten.index, aten.index_select, aten.gather)

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {x.untyped_storage().data_ptr(): name for name, x in tensors.items()}
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        made = {x.untyped_storage().data_ptr() for x in tree_leaves(outputs) if isinstance(x, Tensor)}
        for x in tree_leaves((args, kwargs)):
            memory = x.untyped_storage().data_ptr() if isinstance(x, Tensor) else None
            if memory in self.names and memory not in made:
                gathers = func.overloadpacket in self.GATHERS
                self.elements[self.names[memory]] += outputs.numel() if gathers else distinct_elements(x)
        return outputs


class MultiplyAdds(FlopCounterMode):
    """Counts the multiply-adds of matrix products and attention, but none of elementwise products."""

    def __init__(self) -> None:
        def addmm(shape: Any, a: Any, b: Any, out_shape: Any = None, **_: Any) -> int:
            return 2 * a[0] * a[1] * b[1]

        def attention(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
            batch, heads, length, width = q
            return 2 * batch * heads * length * k[2] * (width + v[3])

        custom = {aten.addmm_: addmm, aten._scaled_dot_product_flash_attention_for_cpu: attention}
        super().__init__(display=False, custom_mapping=custom)

    @property
    def total(self) -> int:
        assert self.get_total_flops() % 2 == 0
        return self.get_total_flops() // 2


@torch.no_grad()
def decode_one(config: ModelConfig) -> tuple[Counter[str], int, int]:
    """Decodes one token with CONTEXT tokens in sight.

    Gives the parameters that are read, by part, the elements of the key-value cache that are read, and
    the multiply-adds, with the products of the input with D in multiplicative layers added.
    """
    model = make_model(config)
    tokens = torch.randint(config.vocab_size, (1, CONTEXT))
    state = model.new_state(1, capacity=MAX_POSITION)
    model(tokens[:, :-1], state)
    caches = {f"cache {i}.{name}": x for i, s in enumerate(state.layers) for name, x in vars(s.cache).items()}
    with MultiplyAdds() as macs, Reads(dict(model.named_parameters()) | caches) as reads:
        model(tokens[:, -1:], state)
    parts: Counter[str] = Counter()
    for name, count in reads.elements.items():
        parts["cache" if name in caches else part_of(name)] += count
    return parts, parts.pop("cache"), macs.total + elementwise(model, Multiplicative, MultiplicativeModular)


def elementwise(model: CausalLM, *kinds: type) -> int:
    """Products of the input with D in layers of some kinds, for a token."""
    return sum(m.modules_weight.numel() for m in model.modules() if isinstance(m, kinds))


@with_patterns
def test_parameters_are_those_of_the_model(config: ModelConfig) -> None:
    stored: Counter[str] = Counter()
    for name, parameter in CausalLM(config).named_parameters():
        stored[part_of(name)] += parameter.numel()
    accounted = account(config)
    assert {part.name: part.total.parameters for part in accounted.parts if part.total.parameters} == stored
    assert accounted.parameters == stored.total()


@with_patterns
def test_decoding_reads_and_computes_what_the_account_says(config: ModelConfig) -> None:
    accounted = account(config, CONTEXT)
    parts, cache, macs = decode_one(config)
    read = Counter({part.name: part.total.parameters_read for part in accounted.parts})
    if isinstance(config.head, DenseHeadConfig) and config.head.tied:
        read["embedding"] += read.pop("head")  # one matrix: a row of it, then all of it
    assert +read == parts
    assert accounted.total.parameters_read == parts.total()
    assert accounted.total.cache_read == cache
    assert accounted.total.macs == macs


def test_counts_see_the_masked_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """What computes all units reads and multiplies more than the account says: the test above can fail."""
    config = VARIANTS["feed_forward-sparse"]
    monkeypatch.setattr(SparseFeedForward, "gathered", SparseFeedForward.masked)
    parts, _, macs = decode_one(config)
    accounted = {part.name: part.total for part in account(config, CONTEXT).parts}
    extra = {name: count - accounted[name].parameters_read for name, count in parts.items()}
    layer = config.feed_forward
    unused = 2 * config.hidden_size * layer.intermediate_size * (layer.ff_block_size - 1) // layer.ff_block_size
    assert extra.pop("feed_forward") == config.num_hidden_layers * unused
    assert not any(extra.values())
    assert macs == account(config, CONTEXT).total.macs + config.num_hidden_layers * unused


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name)
        for name, config in VARIANTS.items()
        if config.attention_pattern.kind == "softmax"  # the others: below, at a length of whole chunks
    ],
)
def test_training_computes_what_the_account_says(config: ModelConfig) -> None:
    """One sequence more in a batch costs its tokens' multiply-adds, and twice as many in the backward pass."""
    model, length = make_model(config).train(), MAX_POSITION

    def count(batch: int) -> tuple[int, int]:
        tokens = torch.randint(config.vocab_size, (batch, length))
        with MultiplyAdds() as forward:
            loss = model(tokens).sum()
        with MultiplyAdds() as backward:
            loss.backward()
        return forward.total, backward.total

    (forward, backward), (less_forward, less_backward) = count(3), count(2)  # less what a call costs at any size
    convolutions = [m for m in model.modules() if isinstance(m, LocalConvolution)]
    padding = sum((m.kernel.shape[0] - 1) * m.kernel.numel() * m.num_modules for m in convolutions)

    def expected(context: int) -> int:
        return (
            length * (account(config, context).total.training_macs - elementwise(model, MultiplicativeModular))
            + padding
        )

    assert forward - less_forward == expected(length)
    # The counter does not see attention's backward pass on CPUs, and positions need no gradient.
    assert backward - less_backward == 2 * expected(0) - length * position_cost(config).training_macs


@pytest.mark.parametrize(
    "pattern",
    [
        LocalPatternConfig(chunk_length=4),
        LSHPatternConfig(chunk_length=4, num_hashes=3, chunks_before=0, num_buckets=6),
        MixedPatternConfig(chunk_length=4, num_hashes=1, num_buckets=6, exact_length=11),
        MixedPatternConfig(exact_length=12),
    ],
    ids=["local", "lsh", "mixed, lsh", "mixed, exact"],
)
def test_training_with_a_pattern_computes_what_the_account_says(pattern: AttentionPatternConfig) -> None:
    """At a length of whole chunks; and for each round a hash of every token."""
    length, config = 12, replace(VARIANTS["norm-rms_norm"], max_position_embeddings=12, attention_pattern=pattern)
    model = make_model(config).train()
    counts = []
    for batch in (2, 3):
        with MultiplyAdds() as forward:
            model(torch.randint(config.vocab_size, (batch, length)))
        counts.append(forward.total)
    is_hashed = isinstance(pattern, (LSHPatternConfig, MixedPatternConfig)) and pattern.num_buckets
    hashes = config.num_hidden_layers * pattern.num_hashes * config.hidden_size * 3 if is_hashed else 0
    assert counts[1] - counts[0] == length * (account(config, length).total.training_macs + hashes)


# Numbers that were published, or computed elsewhere: system.md.


def sparse_ff(size: int, width: int, n: int, rank: int) -> Cost:
    return feed_forward_cost(
        SparseFeedForwardConfig(intermediate_size=width, ff_block_size=n, controller_rank=rank), size
    )


def dense_ff(size: int, width: int) -> Cost:
    return feed_forward_cost(DenseFeedForwardConfig(intermediate_size=width), size)


def dense_attention(size: int) -> Cost:
    return attention_cost(DenseProjectionConfig(), size)


def sparse_qkv(size: int, modules: int) -> Cost:
    return attention_cost(SparseProjectionConfig(qkv_modules=modules), size)


def sparse_cross(size: int, modules: int) -> Cost:
    """What decoding reads of a sparse cross-attention: the query's two layers."""
    width = size // modules
    return multiplicative_cost(size, size, modules) + local_convolution_cost(width, width, modules, 3, 3)


def head(size: int, modules: int = 0) -> Cost:
    return head_cost(MultiplicativeHeadConfig(head_modules=modules) if modules else DenseHeadConfig(), size, 32000)


@pytest.mark.parametrize(
    ("size", "width", "n", "rank", "sparse", "dense"),
    [
        (1024, 4096, 64, 64, 463_872, 8_393_728),
        (1024, 6144, 64, 96, 891_904, 12_590_080),
        (9216, 65536, 256, 32, 7_185_408, 1_208_034_304),
    ],
)
def test_feed_forward(size: int, width: int, n: int, rank: int, sparse: int, dense: int) -> None:
    """A.1."""
    assert sparse_ff(size, width, n, rank).parameters_read == sparse
    assert dense_ff(size, width).parameters_read == dense
    assert (
        sparse_ff(size, width, n, rank).parameters == dense + size * rank + rank * width
    )  # b1 makes way for the controller's


def test_sparse_qkv() -> None:
    """A.7: weights, and multiply-adds as multiples of the square of the width."""
    assert sparse_qkv(1024, 16).parameters_read == 169_152
    assert sparse_qkv(9216, 64).parameters_read == 2_362_032
    assert dense_attention(1024).parameters_read == 4_198_400
    assert sparse_cross(1024, 16).parameters_read == 119_872
    assert (dense_cost(1024, 1024) * 2).parameters_read == 2_099_200
    assert sparse_qkv(1024, 16).training_macs == (1 + 21 / 16) * 1024**2
    assert sparse_qkv(9216, 64).training_macs == (1 + 21 / 64) * 9216**2


def test_sparse_loss_and_recurrence() -> None:
    """A.8 and A.10."""
    reads = [head(1024, modules).parameters_read / 1e6 for modules in (0, 2, 4, 8)]
    assert reads == pytest.approx([32.80, 16.42, 8.23, 4.14], abs=0.005)
    assert head(1024, 4).macs == head(1024).macs + 4 * 1024
    branch = recurrent_cost(SRUConfig(num_layers=1, size=32), 1024) + norm_cost("layer_norm", 1024)
    assert branch.parameters == pytest.approx(71_000, abs=1000)


@pytest.mark.parametrize(
    ("size", "blocks", "feed_forward", "qkv", "cross", "loss", "block", "total"),
    [
        (1024, 24, (4096,), 0, 0, 0, 14.691, 385.4),
        (1024, 24, (4096, 64, 64), 0, 0, 0, 6.761, 195.1),
        (1024, 24, (4096, 128, 32), 0, 0, 0, 6.532, 189.6),
        (1024, 24, (6144,), 16, 0, 0, 14.858, 389.4),
        (1024, 24, (6144, 64, 96), 16, 0, 0, 3.160, 108.7),
        (1024, 24, (6144, 64, 96), 16, 16, 0, 1.181, 61.1),
        (1024, 24, (6144, 64, 96), 16, 0, 4, 3.160, 84.1),
        (9216, 6, (40960,), 0, 0, 0, 1264.7, 7880),
        (9216, 6, (40960, 256, 32), 0, 0, 0, 514.3, 3380),
        (9216, 6, (65536,), 64, 0, 0, 1380.3, 8580),
        (9216, 6, (65536,), 64, 64, 0, 1212.5, 7570),
        (9216, 6, (65536, 256, 32), 64, 0, 0, 179.4, 1370),
        (9216, 6, (65536, 256, 32), 64, 64, 0, 11.66, 365),
    ],
)
def test_decoder_blocks(
    size: int, blocks: int, feed_forward: tuple[int, ...], qkv: int, cross: int, loss: int, block: float, total: float
) -> None:
    """A.11: millions of weights read in a decoder block with cross-attention, and in all blocks and the head."""
    cost = dense_ff(size, *feed_forward) if len(feed_forward) == 1 else sparse_ff(size, *feed_forward)
    cost += sparse_qkv(size, qkv) if qkv else dense_attention(size)
    cost += sparse_cross(size, cross) if cross else dense_cost(size, size) * 2
    assert cost.parameters_read / 1e6 == pytest.approx(block, rel=1e-3)
    assert (cost * blocks + head(size, loss)).parameters_read / 1e6 == pytest.approx(total, rel=2e-3)


def test_encoder_decoder_models() -> None:
    """C.3 and C.5: what the paper's models store. Terraformer has a second attention for the cross-attention."""

    def stored(
        size: int, encoders: int, decoders: int, ff: Cost, attention: Cost, cross: Cost, head: Cost, sru: int = 0
    ) -> float:
        norm = norm_cost("layer_norm", size)
        shared = ff + norm * 2 + (recurrent_cost(SRUConfig(num_layers=1, size=sru), size) + norm if sru else Cost())
        encoder, decoder = shared + dense_attention(size), shared + attention + cross + norm
        return (encoder * encoders + decoder * decoders + table_cost(32000, size) + norm * 2 + head).parameters / 1e6

    d, positions = 1024, 2 * 512 * 1024 / 1e6
    dense, sparse = dense_attention(d), sparse_qkv(d, 16)
    assert stored(d, 24, 24, dense_ff(d, 4096), dense, dense, head(d)) + positions == pytest.approx(772, abs=0.5)
    ff = sparse_ff(d, 4096, 64, 64)
    assert stored(d, 24, 24, ff, dense, dense, head(d)) + positions == pytest.approx(788, abs=0.5)
    ff = sparse_ff(d, 6144, 64, 96)
    assert stored(d, 24, 24, ff, sparse, dense, head(d)) + positions == pytest.approx(910, abs=0.5)
    assert stored(d, 24, 24, ff, sparse, sparse, head(d, 4), sru=32) == pytest.approx(
        791, abs=0.5
    )  # Terraformer medium

    d, ff = 9216, sparse_ff(9216, 65536, 256, 32)
    sparse = sparse_qkv(d, 64)
    assert stored(d, 6, 6, ff, sparse, sparse, head(d, 4)) == pytest.approx(16_960, abs=10)
    assert stored(d, 6, 36, ff, sparse, sparse, head(d, 8), sru=64) == pytest.approx(53_400, abs=50)
    dense = dense_attention(d)
    assert stored(d, 6, 6, dense_ff(d, 40960), dense, dense, head(d)) == pytest.approx(15_800, abs=80)


# The account itself.


def test_totals_and_units() -> None:
    config = VARIANTS["whole-scaling_sru_rotary_rms"]
    near, far = account(config), account(config, 10)
    per_context = 2 * config.hidden_size * config.num_hidden_layers
    assert near.total.cache_read == near.cache_bytes_per_token() == 0
    assert far.flops_per_token - near.flops_per_token == 2 * per_context * 10
    assert far.cache_bytes_per_token(2) == 2 * per_context * 10
    assert far.bytes_per_token() == 4 * far.total.parameters_read == 2 * far.bytes_per_token(2)
    assert far.training_flops_per_token == 6 * far.total.training_macs
    assert far.parameters == near.parameters


@pytest.mark.parametrize(
    ("layer", "read"),
    [
        (DenseFeedForwardConfig(intermediate_size=35), 35),
        (SparseFeedForwardConfig(intermediate_size=35, ff_block_size=5, controller_rank=7), 7),
        (BlockFeedForwardConfig(intermediate_size=35, num_experts=7), 5),
        (SwitchFeedForwardConfig(intermediate_size=35, num_experts=7), 5),
    ],
)
def test_units_of_feed_forward_layers(layer: FeedForwardConfig, read: int) -> None:
    """Of the decoder alone, at each block's own width."""
    config = replace(VARIANTS["norm-rms_norm"], feed_forward=layer)
    assert feed_forward_units(config) == (config.num_hidden_layers * read, config.num_hidden_layers * 35)
    for other in ENCODER_DECODERS.values():
        widths = [other.feed_forward.intermediate_size] * other.num_decoder_layers
        if isinstance(other, TerraformerConfig):
            widths = [block.feed_forward.intermediate_size for block in other.decoder_blocks]
        assert feed_forward_units(other)[1] == sum(widths)


def test_parts_stand_in_the_order_of_the_data_flow() -> None:
    names = [part.name for part in account(VARIANTS["sru-1"], context=1).parts]
    assert names == [
        "embedding",
        "position",
        "attention",
        "attention_scores",
        "feed_forward",
        "recurrent",
        "norms",
        "final_norm",
        "head",
    ]
    absent = {"position", "attention_scores", "recurrent"}
    names = {part.name for part in account(VARIANTS["position-rotary"]).parts}
    assert not names & absent


def test_tied_head_is_stored_once_and_read_whole() -> None:
    config = VARIANTS["head-tied"]
    untied = account(replace(config, head=DenseHeadConfig()))
    tied = account(config)
    matrix = config.vocab_size * config.hidden_size
    assert untied.parameters - tied.parameters == matrix + config.vocab_size
    assert untied.total.parameters_read - tied.total.parameters_read == config.vocab_size


# Encoder-decoders.


@pytest.mark.parametrize("config", ENCODER_DECODERS.values(), ids=ENCODER_DECODERS.keys())
def test_an_encoder_decoder_stores_what_the_account_says(config: EncoderDecoderConfig) -> None:
    model = new_model(config)
    accounted = account(config)
    assert accounted.parameters == sum(p.numel() for p in model.parameters())
    stored = {part.name: part.total.parameters for part in accounted.parts}
    of_encoder = [p.numel() for name, p in model.named_parameters() if "encoder" in name]
    assert sum(size for name, size in stored.items() if name.startswith("encoder_")) == sum(of_encoder)


@pytest.mark.parametrize("config", ENCODER_DECODERS.values(), ids=ENCODER_DECODERS.keys())
def test_a_target_token_reads_no_encoder(config: EncoderDecoderConfig) -> None:
    parts = {part.name: part.total for part in account(config, context=4, num_source=9).parts}
    assert all(cost.parameters_read == cost.macs == 0 for name, cost in parts.items() if name.startswith("encoder_"))
    assert ("cross_attention_scores" in parts) == isinstance(config, Seq2SeqConfig)
