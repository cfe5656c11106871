"""Seq2Seq and Terraformer: rows alone and together, whole and in chunks, and that every parameter learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from terseformer.config import (
    AttentionPatternConfig,
    ConfigError,
    DenseFeedForwardConfig,
    DenseHeadConfig,
    EncoderDecoderConfig,
    FavorPatternConfig,
    FavorSoftmaxPatternConfig,
    LocalConvolutionProjectionConfig,
    LocalPatternConfig,
    LSHPatternConfig,
    MixedPatternConfig,
    MultiplicativeHeadConfig,
    Seq2SeqConfig,
    SparseCrossProjectionConfig,
    SparseFeedForwardConfig,
    SparseProjectionConfig,
    SRUConfig,
    TerraformerConfig,
)
from terseformer.models import make_model
from terseformer.terraformer import following, join
from variants import make_visible

CLOSE = {"atol": 1e-9, "rtol": 1e-9}
SIZES = {
    "vocab_size": 21,
    "hidden_size": 30,
    "num_attention_heads": 3,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "max_position_embeddings": 11,
    "feed_forward": DenseFeedForwardConfig(intermediate_size=35),
}
SPARSE = {
    "feed_forward": SparseFeedForwardConfig(intermediate_size=35, ff_block_size=5, controller_rank=7),
    "attention": SparseProjectionConfig(qkv_modules=5),
    "head": MultiplicativeHeadConfig(head_modules=3),
    "sru": SRUConfig(num_layers=2, size=4),
}
WIDE = SPARSE | {  # can be halved
    "hidden_size": 60,
    "feed_forward": SparseFeedForwardConfig(intermediate_size=70, ff_block_size=5, controller_rank=7),
}
CONFIGS: dict[str, EncoderDecoderConfig] = {
    "seq2seq-dense": Seq2SeqConfig(**SIZES),
    "seq2seq-sinusoidal-rms": Seq2SeqConfig(**SIZES, position="sinusoidal", norm="rms_norm"),
    "seq2seq-sparse": Seq2SeqConfig(**SIZES | SPARSE, cross_attention=SparseCrossProjectionConfig(qkv_modules=5)),
    "seq2seq-convolving-encoder": Seq2SeqConfig(
        **SIZES, encoder_attention=LocalConvolutionProjectionConfig(qkv_modules=5)
    ),
    "terraformer-dense": TerraformerConfig(**SIZES),
    "terraformer-sparse": TerraformerConfig(**SIZES | SPARSE, reversible_encoder=True, num_attention_layers=1),
    "terraformer-sparse-one-swap": TerraformerConfig(**SIZES | SPARSE, swap_twice=False, norm="rms_norm"),
    "terraformer-sinusoidal": TerraformerConfig(**SIZES, position="sinusoidal", num_attention_layers=3),
}
POSITIONS = {
    "sin_cos": {"position": "sin_cos"},
    "fixed_base": {"position": "fixed_base", "hidden_size": 24},
    "axial": {"position": "axial", "axial_shape": (3, 4), "axial_sizes": (10, 20)},
    "rotary": {"position": "rotary"},
    "encoder_rotary": {"position": "none", "encoder_position": "rotary"},
}
for name, options in POSITIONS.items():
    CONFIGS[f"seq2seq-{name}"] = Seq2SeqConfig(**SIZES | options)
    CONFIGS[f"terraformer-{name}"] = TerraformerConfig(**SIZES | options, num_attention_layers=1)
OPTIONS = {
    "forget": {"forget_every": 1, "num_encoder_layers": 4, "num_decoder_layers": 3},
    "rms-but-last": {"norm": "rms_norm", "last_norm": "layer_norm"},
    "layer-norms-but-last": {"last_norm": "rms_norm", "reversible_encoder": True},
    "half": {"half_before_layer": 1, "num_decoder_layers": 3},
    "half-all": {"half_before_layer": 2, "reversible_encoder": True},
    "double": {"double_after_layer": 1, "num_decoder_layers": 3, "num_attention_layers": 1},
    "half-and-double": {"half_before_layer": 1, "double_after_layer": 2, "num_decoder_layers": 3},
    "chunked": {"ff_chunk_size": 3},
}
for name, options in OPTIONS.items():
    CONFIGS[f"terraformer-{name}"] = TerraformerConfig(**SIZES | WIDE | options)
CONFIGS["seq2seq-chunked"] = Seq2SeqConfig(**SIZES | SPARSE, ff_chunk_size=2)
PATTERNS = {
    "local": (LocalPatternConfig(chunk_length=3), LocalPatternConfig(chunk_length=2, chunks_after=1)),
    # Windows over all tokens: the whole form, too, is exact.
    "lsh": (LSHPatternConfig(chunk_length=7), LSHPatternConfig(chunk_length=3, chunks_after=1)),
    "mixed": (MixedPatternConfig(exact_length=18), MixedPatternConfig(exact_length=7)),
    "favor": (FavorPatternConfig(), FavorPatternConfig()),
    "favor_softmax": (FavorSoftmaxPatternConfig(num_features=12), FavorSoftmaxPatternConfig(num_features=12)),
}
for name, (pattern, encoder_pattern) in PATTERNS.items():
    patterns = {"attention_pattern": pattern, "encoder_attention_pattern": encoder_pattern}
    CONFIGS[f"seq2seq-{name}"] = Seq2SeqConfig(**SIZES, **patterns)
    CONFIGS[f"terraformer-{name}"] = TerraformerConfig(**SIZES | SPARSE, **patterns)
LENGTHS = [7, 2, 5, 1]
every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def new_model(config: EncoderDecoderConfig) -> nn.Module:
    """In double precision: what follows asks for the same sums, not for their last digits."""
    torch.manual_seed(0)
    return make_visible(make_model(config)).double().eval()


def draw(rows: int, length: int, seed: int = 1) -> Tensor:
    """Tokens, none of them the padding."""
    return torch.randint(1, 21, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(source: Tensor, lengths: list[int]) -> Tensor:
    return torch.where(torch.arange(source.shape[1]) < torch.tensor(lengths)[:, None], source, 0)


@every_model
@torch.no_grad()
def test_a_row_in_a_batch_is_the_row_alone(config: EncoderDecoderConfig) -> None:
    model, source, target = new_model(config), padded(draw(4, 7), LENGTHS), draw(4, 6, seed=2)
    together = model(source, target)
    for row, length in enumerate(LENGTHS):
        alone = model(source[row : row + 1, :length], target[row : row + 1])
        assert_close(together[row], alone[0], **CLOSE)


HASHED = {"lsh": LSHPatternConfig(chunk_length=2), "mixed": MixedPatternConfig(chunk_length=2, exact_length=4)}


@pytest.mark.parametrize("pattern", HASHED.values(), ids=HASHED.keys())
@pytest.mark.parametrize("place", ["attention_pattern", "encoder_attention_pattern"])
@pytest.mark.parametrize("cls", [Seq2SeqConfig, TerraformerConfig])
@torch.no_grad()
def test_a_row_is_hashed_as_if_it_were_alone(
    cls: type[EncoderDecoderConfig], place: str, pattern: AttentionPatternConfig
) -> None:
    """Of its own length are its buckets and chunks, and whether it is hashed at all."""
    model = new_model(cls(**SIZES, **{place: pattern}))
    source, target, num_target = padded(draw(4, 7), LENGTHS), draw(4, 6, seed=2), [6, 3, 1, 5]
    together = model.hidden(*model.encode(source), target, torch.tensor(num_target))
    for row, (length, end) in enumerate(zip(LENGTHS, num_target, strict=True)):
        alone = model.hidden(*model.encode(source[row : row + 1, :length]), target[row : row + 1, :end])
        assert_close(together[row, :end], alone[0], **CLOSE)


@every_model
@torch.no_grad()
def test_padding_leaves_no_trace(config: EncoderDecoderConfig) -> None:
    model, source, target = new_model(config), draw(4, 7), draw(4, 6, seed=2)
    num_source = torch.tensor(LENGTHS)
    logits = model(source, target, num_source)
    behind = torch.arange(7) >= num_source[:, None]
    assert_close(model(torch.where(behind, draw(4, 7, seed=3), source), target, num_source), logits, **CLOSE)
    assert_close(model(padded(source, LENGTHS), target), logits, **CLOSE)


@every_model
@pytest.mark.parametrize("sizes", [[1] * 6, [2, 1, 3], [6]])
@torch.no_grad()
def test_chunk_invariance(config: EncoderDecoderConfig, sizes: list[int]) -> None:
    model, source, target = new_model(config), padded(draw(4, 7), LENGTHS), draw(4, 6, seed=2)
    state = model.new_state(source)
    parts = [model.decode(part, state) for part in target.split(sizes, dim=1)]
    assert_close(torch.cat(parts, dim=1), model(source, target), **CLOSE)


@every_model
@torch.no_grad()
def test_chunk_invariance_of_ragged_targets(config: EncoderDecoderConfig) -> None:
    """Each call brings some rows more real tokens than others."""
    model, source, target = new_model(config), padded(draw(4, 7), LENGTHS), draw(4, 6, seed=2)
    whole, state = model(source, target), model.new_state(source)
    done = torch.zeros(4, dtype=torch.long)
    for counts in ([1, 3, 0, 2], [0, 1, 2, 2], [3, 0, 1, 1], [2, 2, 3, 1]):
        num_real = torch.tensor(counts)
        index = (done[:, None] + torch.arange(3)).clamp(max=5)
        logits = model.decode(target.gather(1, index), state, num_real)
        for row, count in enumerate(counts):
            assert_close(logits[row, :count], whole[row, done[row] : done[row] + count], **CLOSE)
        done += num_real
    assert done.tolist() == [6] * 4


@every_model
@torch.no_grad()
def test_a_state_is_cloned_and_its_rows_go_on_alone(config: EncoderDecoderConfig) -> None:
    model, source, target = new_model(config), padded(draw(4, 7), LENGTHS), draw(4, 6, seed=2)
    state = model.new_state(source)
    model.decode(target[:, :4], state)
    rows = [2, 0, 2]
    selected, clone = state.select(rows), state.clone()
    expected = model(source, target)[:, 4:]
    assert_close(model.decode(target[rows, 4:], selected), expected[rows], **CLOSE)
    assert_close(model.decode(target[:, 4:], state), expected, **CLOSE)
    assert_close(model.decode(target[:, 4:], clone), expected, **CLOSE)


@every_model
@torch.no_grad()
def test_who_acts_on_whom(config: EncoderDecoderConfig) -> None:
    """All of the source on all of the target, and a target's token on those after it."""
    model, source, target = new_model(config), draw(2, 7), draw(2, 6, seed=2)
    logits = model(source, target)
    changed = target.clone()
    changed[:, 3] = changed[:, 3] % 20 + 1
    moved = (model(source, changed) - logits).abs().amax((0, 2))
    assert moved[:3].max() < 1e-6
    assert moved[3:].min() > 1e-4
    for place in (0, 6):
        other = source.clone()
        other[:, place] = other[:, place] % 20 + 1
        assert (model(other, target) - logits).abs().amax((0, 2)).min() > 1e-4


@every_model
def test_every_parameter_learns(config: EncoderDecoderConfig) -> None:
    model = new_model(config).train()
    for _ in range(4):  # some calls of a sparse layer use the hard choice, some the soft one
        model(draw(4, 7), draw(4, 6, seed=2), torch.tensor(LENGTHS)).logsumexp(-1).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_model
def test_dropout_acts_in_training_only(config: EncoderDecoderConfig) -> None:
    model = new_model(replace(config, dropout=0.3, attention_dropout=0.3))
    source, target = draw(2, 7), draw(2, 6, seed=2)
    assert_close(model(source, target), model(source, target))
    model.train()
    assert not torch.allclose(model(source, target), model(source, target), atol=1e-3)


@every_model
@torch.no_grad()
def test_what_does_not_fit(config: EncoderDecoderConfig) -> None:
    model = new_model(config)
    with pytest.raises(ValueError, match="the source reaches 12 tokens, but max_position_embeddings is 11"):
        model(draw(2, 12), draw(2, 3))
    with pytest.raises(ValueError, match="the target reaches 12 tokens, but max_position_embeddings is 11"):
        model(draw(2, 3), draw(2, 12))
    with pytest.raises(ValueError, match="a source has no token"):
        model(padded(draw(2, 3), [3, 0]), draw(2, 3))
    for rows, length in ((2, 0), (0, 3)):
        with pytest.raises(ValueError, match=rf"there is no source among \[{rows}, {length}\] tokens"):
            model(draw(rows, length), draw(rows, 3))
    with pytest.raises(ValueError, match="num_source = 4 is more than the 3 tokens that a row has"):
        model(draw(2, 3), draw(2, 3), torch.tensor([1, 4]))
    state = model.new_state(draw(2, 3), capacity=4)
    with pytest.raises(ValueError, match="does not fit a state of capacity"):
        model.decode(draw(2, 5), state)
    with pytest.raises(ValueError, match="the target reaches 12 tokens"):
        model.decode(draw(2, 12), model.new_state(draw(2, 3)))


@every_model
@torch.no_grad()
def test_padding_may_reach_beyond_the_end(config: EncoderDecoderConfig) -> None:
    model, source, target = new_model(config), draw(2, 3), draw(2, 11, seed=2)
    state = model.new_state(source, capacity=13)
    model.decode(target[:, :9], state)
    logits = model.decode(draw(2, 4, seed=3).index_copy(1, torch.arange(2), target[:, 9:]), state, torch.tensor([2, 2]))
    assert_close(logits[:, :2], model(source, target)[:, 9:], **CLOSE)


def test_a_target_lies_behind_its_source() -> None:
    source = torch.arange(1.0, 9).view(2, 4, 1)
    target = -torch.arange(1.0, 7).view(2, 3, 1)
    merged = join(source, target, torch.tensor([2, 4]))[..., 0]
    assert merged[0, :5].tolist() == [1, 2, -1, -2, -3]
    assert merged[1].tolist() == [5, 6, 7, 8, -4, -5, -6]
    assert_close(following(merged[..., None], torch.tensor([2, 4]), 3), target)


def forgets(blocks: int, every: int, before: int = 0) -> list[int]:
    """As the reference says it."""
    if blocks <= every + 1:
        return []
    return [before + every, *forgets(blocks - every, every, before + every)]


@pytest.mark.parametrize("blocks", range(1, 10))
def test_where_a_stack_forgets(blocks: int) -> None:
    for every in range(1, 6):
        config = TerraformerConfig(**SIZES | {"num_decoder_layers": blocks}, forget_every=every, num_attention_layers=2)
        assert list(config.forgets(blocks)) == forgets(blocks, every)
        assert list(make_model(config).decoder.joints) == [str(3 * block) for block in forgets(blocks, every)]


def test_widths() -> None:
    config = TerraformerConfig(
        **SIZES | WIDE | {"num_decoder_layers": 5}, half_before_layer=2, double_after_layer=3, num_attention_layers=1
    )
    model = make_model(config)
    assert [block.hidden_size for block in config.decoder_blocks] == [30, 30, 60, 60, 120]
    assert [block.feed_forward.intermediate_size for block in config.decoder_blocks] == [35, 35, 70, 70, 140]
    assert list(model.decoder.joints) == ["4", "8"]
    assert model.embedding.weight.shape == (21, 30)
    assert model.norm.weight.shape == (120,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"half_before_layer": 1, "forget_every": 1}, "model.forget_every cannot be combined with"),
        ({"half_before_layer": 3}, "model.half_before_layer = 3 must be at most model.num_decoder_layers = 2"),
        ({"double_after_layer": 2}, "model.double_after_layer = 2 below it"),
        ({"double_after_layer": 1, "head": DenseHeadConfig(tied=True)}, "model.head.tied = true needs one width"),
        ({"half_before_layer": 1, "num_attention_heads": 4}, "halves the width, model.hidden_size = 30 is not a mult"),
        (
            {"double_after_layer": 1, "position": "axial", "axial_shape": (3, 4), "axial_sizes": (20, 40)},
            r"where model.double_after_layer doubles the width, .*axial_sizes",
        ),
        ({"half_before_layer": 1, "feed_forward": DenseFeedForwardConfig(intermediate_size=7)}, "the divisor = 2"),
    ],
)
def test_options_that_do_not_fit_together(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TerraformerConfig(**SIZES | WIDE | {"num_decoder_layers": 2} | change)
