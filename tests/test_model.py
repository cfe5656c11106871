"""CausalLM over every variant: chunk invariance, causality, errors, and that every parameter learns."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from terseformer.blocks import Block
from terseformer.config import DenseFeedForwardConfig, LocalPatternConfig, ModelConfig
from terseformer.layers.feedforward import SparseFeedForward
from terseformer.layers.head import MixedHead
from terseformer.model import CausalLM
from terseformer.state import Chunk, DecodeState, check_rows
from variants import DISTINCT, MAX_POSITION, PYTORCH_ONLY, VARIANTS, make_model

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
EVERY, DISTINCT = VARIANTS | PYTORCH_ONLY, DISTINCT | PYTORCH_ONLY
every_variant = pytest.mark.parametrize("config", EVERY.values(), ids=EVERY.keys())
distinct_variants = pytest.mark.parametrize("config", DISTINCT.values(), ids=DISTINCT.keys())


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def random_tokens(config: ModelConfig, batch: int, length: int = MAX_POSITION, seed: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_chunks(length: int, seed: int) -> list[int]:
    """Sizes of 1 to 5 tokens that add up to `length`."""
    rng, sizes = random.Random(seed), []
    while sum(sizes) < length:
        sizes.append(min(rng.randint(1, 5), length - sum(sizes)))
    return sizes


def feed_ragged(
    model: CausalLM, rows: list[Tensor], state: DecodeState, seed: int, poison: int | None = None
) -> list[Tensor]:
    """Feeds rows of different lengths, each call with a random number of real tokens for each row.

    What follows the real ones is noise, or `poison` everywhere. Gives each row's logits.
    """
    rng = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    left = [row.tolist() for row in rows]
    logits: list[list[Tensor]] = [[] for _ in rows]
    while any(left):
        width = rng.randint(1, 4)
        real = [min(len(row), rng.randint(0, width)) for row in left]
        tokens = torch.randint(model.config.vocab_size, (len(rows), width), generator=noise)
        if poison is not None:
            tokens.fill_(poison)
        for index, count in enumerate(real):
            tokens[index, :count] = torch.tensor(left[index][:count], dtype=torch.long)
            left[index] = left[index][count:]
        out = model(tokens, state, torch.tensor(real))
        for index, count in enumerate(real):
            logits[index].append(out[index, :count])
    return [torch.cat(row) for row in logits]


def contents(state: DecodeState) -> list[Tensor]:
    """Every tensor of a state."""
    found = [state.lengths]
    for layer in state.layers:
        found += vars(layer.cache).values()
        found += [memory.frames for memory in layer.memories.values()]
        found += [carry.carry for carry in layer.carries]
    return found


def assert_same_state(one: DecodeState, other: DecodeState) -> None:
    for a, b in zip(contents(one), contents(other), strict=True):
        assert torch.equal(a, b)


# ----------------------------------------------------------------------- contract 1, chunk invariance


@pytest.mark.parametrize("batch", [1, 3])
@every_variant
def test_chunk_invariance(config: ModelConfig, batch: int) -> None:
    model, tokens = make_model(config), random_tokens(config, batch)
    expected = model(tokens)
    assert expected.shape == (batch, MAX_POSITION, config.vocab_size)
    assert expected.std() > 0.1
    steady = [[1] * MAX_POSITION, [MAX_POSITION]]
    uneven = [random_chunks(MAX_POSITION, seed) for seed in (1, 2)]
    for sizes in steady if batch == 1 else uneven:
        state = model.new_state(batch)
        logits = torch.cat([model(chunk, state) for chunk in tokens.split(sizes, dim=1)], dim=1)
        assert_close(logits, expected, **CLOSE, msg=lambda text, sizes=sizes: f"in chunks of {sizes}: {text}")
        assert state.lengths.tolist() == [MAX_POSITION] * batch


def check_ragged(config: ModelConfig, lengths: list[int], seed: int) -> None:
    model, tokens = make_model(config), random_tokens(config, len(lengths))
    rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    state = model.new_state(len(rows))
    for row, logits in zip(rows, feed_ragged(model, rows, state, seed), strict=True):
        assert_close(logits, model(row[None])[0], **CLOSE)
    assert state.lengths.tolist() == lengths


@every_variant
def test_chunk_invariance_of_ragged_rows(config: ModelConfig) -> None:
    check_ragged(config, [MAX_POSITION, 4, 7], seed=1)


@pytest.mark.parametrize("lengths", [[9], [1, 1, 1, 2], [3, MAX_POSITION]], ids=str)
@distinct_variants
def test_chunk_invariance_of_rows_more_ragged(config: ModelConfig, lengths: list[int]) -> None:
    check_ragged(config, lengths, seed=2)


@distinct_variants
def test_padding_leaves_no_trace(config: ModelConfig) -> None:
    model, tokens = make_model(config), random_tokens(config, 3)
    rows = [tokens[0, :6], tokens[1, :1], tokens[2, :8]]
    states = [model.new_state(3) for _ in range(3)]
    poisons = (0, config.vocab_size - 1, None)
    logits = [feed_ragged(model, rows, s, 3, poison) for s, poison in zip(states, poisons, strict=True)]
    for index in (1, 2):
        assert_same_state(states[0], states[index])
        for one, other in zip(logits[0], logits[index], strict=True):
            assert_close(one, other, atol=0, rtol=0)


@distinct_variants
def test_a_call_without_real_tokens_changes_nothing(config: ModelConfig) -> None:
    model, tokens = make_model(config), random_tokens(config, 2)
    for read in (0, 5):
        state = model.new_state(2)
        if read:
            model(tokens[:, :read], state)
        before = state.clone()
        model(tokens[:, read : read + 3], state, torch.zeros(2, dtype=torch.long))
        assert_same_state(state, before)


@distinct_variants
def test_clone_goes_its_own_way(config: ModelConfig) -> None:
    model, tokens = make_model(config), random_tokens(config, 2)
    other_end = (tokens[:, 5:] + 1) % config.vocab_size
    state = model.new_state(2)
    model(tokens[:, :5], state)
    before, clone = state.clone(), state.clone()
    theirs = model(other_end, clone)
    assert_same_state(state, before)
    ours = model(tokens[:, 5:], state)
    assert_close(ours, model(tokens)[:, 5:], **CLOSE)
    assert_close(theirs, model(torch.cat([tokens[:, :5], other_end], dim=1))[:, 5:], **CLOSE)


@distinct_variants
def test_selected_rows_go_on_alone(config: ModelConfig) -> None:
    model, tokens = make_model(config), random_tokens(config, 3)
    state = model.new_state(3)
    model(tokens[:, :6], state, torch.tensor([6, 2, 5]))
    chosen = state.select([2, 0])
    before = state.clone()
    assert chosen.lengths.tolist() == [5, 6]
    logits = model(torch.stack([tokens[2, 5:8], tokens[0, 6:9]]), chosen)
    assert_close(logits[0], model(tokens[2:, :8])[0, 5:], **CLOSE)
    assert_close(logits[1], model(tokens[:1, :9])[0, 6:], **CLOSE)
    assert_same_state(state, before)


def test_a_small_state_gives_the_same_logits() -> None:
    config = VARIANTS["whole-scaling"]
    model, tokens = make_model(config), random_tokens(config, 2, 5)
    assert_close(model(tokens, model.new_state(2, capacity=5)), model(tokens), **CLOSE)


# ------------------------------------------------------------------------------------------- errors


def test_another_number_of_rows_is_an_error() -> None:
    """Asked of the function that the tests' type checks do not reach before it."""
    model = make_model(DISTINCT["attention-dense"])
    tokens = random_tokens(model.config, 2)[:, :3]
    with pytest.raises(ValueError, match="2 rows of tokens, but state has 1"):
        model.new_state(1).chunk(tokens)
    with pytest.raises(ValueError, match="2 rows of tokens, but num_real has 3"):
        check_rows(tokens, num_real=torch.tensor([1, 2, 3]))


@distinct_variants
def test_a_full_state_is_an_error_and_stays_whole(config: ModelConfig) -> None:
    model, tokens = make_model(config), random_tokens(config, 2)
    state = model.new_state(2, capacity=5)
    model(tokens[:, :4], state)
    before = state.clone()
    with pytest.raises(ValueError, match="position 5 does not fit a state of capacity 5"):
        model(tokens[:, 4:6], state)
    assert_same_state(state, before)
    assert_close(model(tokens[:, 4:5], state), model(tokens[:, :5])[:, 4:], **CLOSE)


@distinct_variants
def test_too_long_a_sequence_is_an_error_and_the_state_stays_whole(config: ModelConfig) -> None:
    model, tokens = make_model(config), random_tokens(config, 2, MAX_POSITION + 1)
    message = f"the sequence reaches {MAX_POSITION + 1} tokens, but max_position_embeddings is {MAX_POSITION}"
    with pytest.raises(ValueError, match=message):
        model(tokens)
    state = model.new_state(2)
    model(tokens[:, :-2], state)
    before = state.clone()
    with pytest.raises(ValueError, match=message):
        model(tokens[:, -2:], state)
    with pytest.raises(ValueError, match=message):
        model(tokens[:, -2:], state, torch.tensor([1, 2]))
    assert_same_state(state, before)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "sin_cos", "fixed_base", "axial"])
def test_padding_may_reach_beyond_the_end(position: str) -> None:
    config = EVERY[f"position-{position}"]
    model, tokens = make_model(config), random_tokens(config, 2)
    state = model.new_state(2)
    model(tokens, state, torch.tensor([MAX_POSITION - 1, 3]))
    end = torch.cat([tokens[:1, -1:], tokens[1:, 3:4]])
    logits = model(F.pad(end, (0, 4)), state, torch.tensor([1, 1]))[:, 0]
    assert_close(logits[0], model(tokens)[0, -1], **CLOSE)
    assert_close(logits[1], model(tokens)[1, 3], **CLOSE)


# ---------------------------------------------------------------------------------------- causality


def check_causality(config: ModelConfig, training: bool) -> None:
    # Where tokens are sorted by bucket, a token's neighbours, and so what is dropped for it, depend on all of them.
    attention_dropout = 0.0 if config.attention_pattern.kind == "lsh" else 0.2
    config = dataclasses.replace(config, dropout=0.2, attention_dropout=attention_dropout)
    model, tokens = make_model(config).train(training), random_tokens(config, 2)
    split = 6
    changed = tokens.clone()
    changed[:, split:] = (changed[:, split:] + 1) % config.vocab_size
    torch.manual_seed(5)
    before = model(tokens)
    torch.manual_seed(5)
    after = model(changed)
    assert_close(after[:, :split], before[:, :split], atol=1e-6, rtol=1e-6)
    assert (after[:, split:] - before[:, split:]).abs().amax(-1).min() > 1e-3


@every_variant
def test_the_future_does_not_act_on_the_past(config: ModelConfig) -> None:
    check_causality(config, training=False)


@distinct_variants
def test_the_future_does_not_act_on_the_past_in_training(config: ModelConfig) -> None:
    check_causality(config, training=True)


def first_in_reach(config: ModelConfig) -> int:
    """The first token that acts on the last one: each layer of local attention reaches some chunks further back."""
    pattern = config.attention_pattern
    if not isinstance(pattern, LocalPatternConfig):
        return 0
    convolving = getattr(config.attention, "length_kernel", 1) - 1  # tokens before a chunk's first that act on it
    first = MAX_POSITION - 1
    for _ in range(config.num_hidden_layers):
        chunk = first // pattern.chunk_length - pattern.chunks_before
        first = max(0, chunk * pattern.chunk_length - convolving)
    return first


@distinct_variants
def test_the_past_acts_on_the_future(config: ModelConfig) -> None:
    """The last logits know of every earlier token, through attention or recurrence, that chunks do not hide."""
    model, tokens = make_model(config), random_tokens(config, 1)
    before = model(tokens)[0, -1]
    for t in range(MAX_POSITION - 1):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % config.vocab_size
        moved = (model(changed)[0, -1] - before).abs().max()
        assert moved > 1e-6 if t >= first_in_reach(config) else moved == 0, t


# -------------------------------------------------------------------- contract 7, every parameter learns


def draws(config: ModelConfig) -> Iterator[tuple[float, float]]:
    """What `quant_prob` and `sparse_prob` to force, so that each branch of a random choice is taken."""
    for quant_prob in (1.0, 0.0) if hasattr(config.feed_forward, "quant_prob") else (1.0,):
        for sparse_prob in (1.0, 0.0) if getattr(config.head, "sparse_prob", 1.0) < 1 else (1.0,):
            yield quant_prob, sparse_prob


def is_without_effect(name: str, config: ModelConfig) -> bool:
    """Parameters whose gradient is zero, or nothing but rounding, for a reason.

    A bias of the keys adds the same to all scores of a query of a softmax, unless the keys are then rotated. A
    controller without a choice has nothing to learn.
    """
    is_softmax = config.attention_pattern.kind in ("softmax", "local")
    key_bias = ".key." in name and name.endswith("bias") and is_softmax and config.position != "rotary"
    return key_bias or (".controller." in name and getattr(config.feed_forward, "ff_block_size", 0) == 1)


@every_variant
def test_every_parameter_learns(config: ModelConfig) -> None:
    tokens = random_tokens(config, 4)
    for quant_prob, sparse_prob in draws(config):
        model = make_model(config).train()
        for module in model.modules():
            if isinstance(module, SparseFeedForward):
                module.quant_prob = quant_prob
            if isinstance(module, MixedHead):
                module.sparse_prob = sparse_prob
        unused = {1.0: "head.dense.", 0.0: "head.sparse."}[sparse_prob]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with torch.enable_grad():
            F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            step = (parameter - before[name]).norm()
            if name.startswith(unused):
                assert parameter.grad is None, name
            elif is_without_effect(name, config):
                assert step < 1e-6, name
            else:
                assert torch.isfinite(parameter).all(), name
                assert step > 1e-5, name


# ------------------------------------------------------------------------------------------ dropout


@pytest.mark.parametrize(
    "change",
    [{"dropout": 0.5}, {"attention_dropout": 0.5}, {"feed_forward": DenseFeedForwardConfig(ff_dropout=0.5)}],
    ids=["dropout", "attention_dropout", "ff_dropout"],
)
def test_dropout_acts_in_training_only(change: dict[str, object]) -> None:
    plain = dataclasses.replace(VARIANTS["norm-layer_norm"], feed_forward=DenseFeedForwardConfig())
    dropped = dataclasses.replace(plain, **change)
    model, tokens = make_model(dropped), random_tokens(dropped, 2)
    expected = make_model(plain)(tokens)
    assert torch.equal(model(tokens), expected)
    assert_close(model(tokens, model.new_state(2)), expected, **CLOSE)
    model.train()
    assert (model(tokens) - expected).abs().max() > 0.1
    assert (model(tokens) - model(tokens)).abs().max() > 0.1


def test_position_dropout_leaves_the_embedding_alone() -> None:
    """As in the reference: features of the positions are dropped, for all tokens of a sequence alike."""
    config = dataclasses.replace(VARIANTS["position-learned"], dropout=0.5)
    model, tokens = make_model(config).train(), random_tokens(config, 3)
    seen: list[Tensor] = []
    model.embedding_dropout.rate = 0.0
    hook = model.blocks[0].attention_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens)
    hook.remove()
    added = seen[0] - model.embedding(tokens)
    positions = model.position.weight.expand_as(added)
    kept = added / positions
    visible = positions.abs() > 0.1
    for row in range(3):
        for feature in range(config.hidden_size):
            values = kept[row, visible[row, :, feature], feature]
            assert_close(values, values[:1].round().expand_as(values), atol=1e-3, rtol=0)  # 0 or 2 at all places
    assert set(kept[visible].round().tolist()) == {0.0, 2.0}


# ------------------------------------------------------------------------------------------- others


def test_a_tied_head_shares_the_embeddings_storage() -> None:
    model = make_model(VARIANTS["head-tied"])
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    tokens = random_tokens(model.config, 2)
    hidden = model.hidden(tokens)
    assert_close(model(tokens), hidden @ model.embedding.weight.t(), **CLOSE)
    names = [name for name, _ in model.named_parameters()]
    assert not any(name.startswith("head") for name in names)
    model.embedding.weight.add_(1.0)
    assert_close(model.head(hidden), hidden @ model.embedding.weight.t(), **CLOSE)


@every_variant
def test_a_block_adds_its_sublayers_to_the_residual_stream(config: ModelConfig) -> None:
    model, x = make_model(config), torch.randn(2, 5, config.hidden_size)
    block, chunk = model.blocks[0], Chunk(torch.arange(5).expand(2, -1), end=5)
    assert isinstance(block, Block)
    middle = x + block.attention(block.attention_norm(x), chunk)
    expected = middle + block.feed_forward(block.feed_forward_norm(middle))
    if config.sru.num_layers:
        assert block.recurrent is not None
        expected = expected + block.recurrent(block.recurrent_norm(middle), chunk)
    assert_close(block(x, chunk), expected, **CLOSE)


@distinct_variants
def test_logits_are_the_head_of_the_normalised_hidden_vectors(config: ModelConfig) -> None:
    model, tokens = make_model(config), random_tokens(config, 2)
    hidden = model.hidden(tokens)
    assert_close(model.head(hidden), model(tokens), **CLOSE)
    if config.norm == "layer_norm":
        unscaled = (hidden - model.norm.bias) / model.norm.weight
        assert_close(unscaled.mean(-1), torch.zeros(2, MAX_POSITION), atol=1e-4, rtol=0)
    else:
        unscaled = hidden / model.norm.weight
    assert_close(unscaled.square().mean(-1), torch.ones(2, MAX_POSITION), atol=1e-3, rtol=0)


@distinct_variants
def test_the_same_seed_gives_the_same_model(config: ModelConfig) -> None:
    one, same, other = make_model(config, 0), make_model(config, 0), make_model(config, 1)
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


@distinct_variants
def test_a_state_holds_no_graph_and_can_be_cloned_where_gradients_are_taken(config: ModelConfig) -> None:
    model, tokens = make_model(config), random_tokens(config, 2)
    with torch.enable_grad():
        state = model.new_state(2)
        assert model(tokens[:, :5], state).requires_grad
        assert_same_state(state.clone(), state)
