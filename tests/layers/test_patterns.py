"""Patterns for long inputs against slow twins, and what all of them promise: causality, padding, linear cost."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from oracles import detached
from terseformer.layers.favor import FavorAttention, causal_linear_attention, linear_attention, orthogonal_gaussian
from terseformer.layers.local import LocalAttention
from terseformer.layers.lsh import LSHAttention, MixedLSHAttention, bucket_factors, hash_buckets, shared_qk_attention

close = functools.partial(assert_close, atol=1e-5, rtol=1e-5)
causal_or_not = pytest.mark.parametrize("causal", [True, False])


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def real_only(y: Tensor, num_real: Tensor | None) -> Tensor:
    """Outputs [B, H, T, K] with zeros for those of padding."""
    return y if num_real is None else y * (torch.arange(y.shape[2]) < num_real[:, None])[:, None, :, None]


def scores(qk: Tensor, at_q: int, seen: list[int], hidden: Callable[[int], bool]) -> list[float]:
    """Scores of one query of qk [T, K], term by term."""
    result = []
    for at_k in seen:
        key = qk[at_k] / math.sqrt(float((qk[at_k] ** 2).mean()) + 1e-6) / math.sqrt(qk.shape[1])
        score = float((qk[at_q] * key).sum())
        result.append(score - 1e5 * (at_k == at_q) - 1e9 * hidden(at_k))
    return result


def weighted(scores: list[float], values: Tensor) -> tuple[Tensor, float]:
    """Softmax-weighted sum of the values, and the scores' logsumexp."""
    largest = max(scores)
    powers = [math.exp(score - largest) for score in scores]
    return sum(p / sum(powers) * v for p, v in zip(powers, values, strict=True)), largest + math.log(sum(powers))


@detached
def shared_qk_loop(qk: Tensor, v: Tensor, causal: bool, real: int) -> Tensor:
    """One head, real tokens only: [real, K]."""
    every = list(range(len(qk)))
    rows = [scores(qk, t, every, lambda s, t=t: s >= real or (causal and s > t)) for t in range(real)]
    return torch.stack([weighted(row, v)[0] for row in rows])


@detached
def lsh_loop(qk: Tensor, v: Tensor, buckets: Tensor, pattern: LSHAttention, real: int) -> Tensor:
    """One head, real tokens only: [real, K]; buckets are [rounds, T]."""
    length, size = len(qk), pattern.chunk_length
    num_chunks = math.ceil(length / size)
    outputs = torch.zeros(real, len(buckets), v.shape[1], dtype=torch.float64)
    logs = torch.zeros(real, len(buckets), dtype=torch.float64)
    for r, bucket in enumerate(buckets.tolist()):
        order = sorted(range(length), key=lambda t: (bucket[t], t))
        for slot, t in enumerate(order):
            if t >= real:
                continue
            offsets = range(-pattern.chunks_before, pattern.chunks_after + 1)
            chunks = {(slot // size + offset) % num_chunks for offset in offsets}
            seen = [s for chunk in chunks for s in order[chunk * size : (chunk + 1) * size]]
            row = scores(qk, t, seen, lambda s, t=t: s >= real or (pattern.causal and s > t))
            outputs[t, r], logs[t, r] = weighted(row, v[seen])
    return (outputs * logs.softmax(1)[..., None]).sum(1)


@causal_or_not
@pytest.mark.parametrize(("length", "num_real"), [(1, None), (2, [2, 1]), (9, None), (9, [9, 4])])
def test_shared_qk_attention(causal: bool, length: int, num_real: list[int] | None) -> None:
    qk, v = (randn(2, 3, length, 6, dtype=torch.float64) * 2 for _ in range(2))
    y = shared_qk_attention(qk, v, causal, None if num_real is None else torch.tensor(num_real))
    for b, real in enumerate(num_real or [length, length]):
        for h in range(3):
            assert_close(y[b, h, :real], shared_qk_loop(qk[b, h], v[b, h], causal, real))


@causal_or_not
@pytest.mark.parametrize("window", [(4, 1, 0), (4, 0, 0), (3, 1, 1), (5, 2, 0), (1, 2, 1)])
@pytest.mark.parametrize(("length", "num_real"), [(1, None), (3, None), (16, None), (23, None), (23, [23, 6])])
def test_lsh_attention(causal: bool, window: tuple[int, int, int], length: int, num_real: list[int] | None) -> None:
    size, before, after = window
    if 1 < math.ceil(length / size) < 1 + before + after:
        after = 0  # a window longer than the sequence: see the next test
    pattern = LSHAttention(size, 3, before, after, causal=causal)
    qk, v = (randn(2, 2, length, 6, dtype=torch.float64) * 2 for _ in range(2))
    sizes = None if num_real is None else torch.tensor(num_real)
    buckets = pattern.hash(qk, sizes)
    y = pattern(qk, v, sizes, buckets)
    for b, real in enumerate(num_real or [length, length]):
        for h in range(2):
            assert_close(y[b, h, :real], lsh_loop(qk[b, h], v[b, h], buckets[:, b, h], pattern, real))


@causal_or_not
@pytest.mark.parametrize("window", [(16, 0, 0), (13, 1, 0), (4, 3, 0), (5, 1, 1), (6, 5, 5), (1, 0, 12)])
@pytest.mark.parametrize("num_real", [None, [13, 1, 7]])
def test_a_window_over_everything_is_exact(
    causal: bool, window: tuple[int, int, int], num_real: list[int] | None
) -> None:
    size, before, after = window
    qk, v = (randn(3, 2, 13, 5).requires_grad_() for _ in range(2))
    sizes = None if num_real is None else torch.tensor(num_real)
    y = LSHAttention(size, 3, before, after, causal=causal)(qk, v, sizes)
    exact = shared_qk_attention(qk, v, causal, sizes)
    y, exact = real_only(y, sizes), real_only(exact, sizes)
    close(y, exact)
    upstream = torch.randn_like(y)
    for got, expected in zip(*(torch.autograd.grad(out, (qk, v), upstream) for out in (y, exact)), strict=True):
        close(got, expected)


def test_mixed_attention_is_exact_up_to_its_length() -> None:
    lsh = LSHAttention(4, causal=False)
    pattern = MixedLSHAttention(9, lsh)
    qk, v = randn(2, 1, 10, 4), randn(2, 1, 10, 4)
    num_real = torch.tensor([9, 5])
    short_qk, short_v = qk[:, :, :9], v[:, :, :9]
    assert pattern.hash(short_qk) is None
    seen = (torch.arange(9) < num_real[:, None])[:, None, None]
    close(pattern(short_qk, short_v, num_real), F.scaled_dot_product_attention(short_qk, short_qk, short_v, seen))
    lsh.causal = True
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    close(pattern(short_qk, short_v), F.scaled_dot_product_attention(short_qk, short_qk, short_v, seen))
    lsh.causal = False
    buckets = pattern.hash(qk, num_real)
    close(pattern(qk, v, num_real, buckets), lsh(qk, v, num_real, buckets), atol=0, rtol=0)


@pytest.mark.parametrize("num_real", [None, torch.tensor([40, 17])])
def test_buckets_handed_in_reproduce_the_output(num_real: Tensor | None) -> None:
    pattern = LSHAttention(4)
    qk, v = randn(2, 3, 40, 8), randn(2, 3, 40, 8)
    torch.manual_seed(1)
    y = pattern(qk, v, num_real)
    torch.manual_seed(1)
    buckets = pattern.hash(qk, num_real)
    assert torch.equal(pattern(qk, v, num_real, buckets), y)
    assert not torch.equal(pattern(qk, v, num_real), y)
    torch.manual_seed(1)
    assert torch.equal(pattern(qk, v, num_real), y)


def test_lsh_attention_approaches_exact_attention() -> None:
    length, clusters = 192, 12
    centres = F.normalize(randn(clusters, 16), dim=-1) * 8
    qk = centres[torch.randint(clusters, (1, 2, length))] + randn(1, 2, length, 16) * 0.3
    v = randn(1, 2, length, 16)
    exact = shared_qk_attention(qk, v, False)
    errors = []
    for num_hashes in (1, 4, 16):
        y = LSHAttention(16, num_hashes, 1, 1, causal=False)(qk, v)
        errors.append(float((y - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 2
    local = LocalAttention(16, 1, 1, causal=False)(qk, qk, v)  # which sees as many tokens, but not the alike ones
    assert errors[0] < float((local - exact).norm() / exact.norm())


def test_hash_buckets() -> None:
    x = randn(1, 1, 300, 8)
    x = torch.cat([x, x * 7, -x, x + randn(1, 1, 300, 8) * 0.05], dim=2)
    buckets = hash_buckets(x, 5, 16)
    assert buckets.shape == (5, 1, 1, 1200)
    same, longer, opposite, near = buckets.view(5, 4, 300).unbind(1)
    assert torch.equal(same, longer)
    assert torch.equal((same + 8) % 16, opposite)
    assert (near == same).float().mean() > 0.8
    assert sorted(same.unique().tolist()) == list(range(16))
    assert (same[0] != same[1]).any()  # each round has rotations of its own


def test_padding_has_a_bucket_of_its_own() -> None:
    for num_buckets, last in ((6, 6), (256, 256)):
        buckets = hash_buckets(randn(3, 2, 50, 8), 2, num_buckets, torch.tensor([50, 20, 0]))
        padding = (torch.arange(50) >= torch.tensor([50, 20, 0])[:, None])[None, :, None].expand_as(buckets)
        assert (buckets[padding] == last).all()
        assert (buckets[~padding] < last).all()


@pytest.mark.parametrize(
    ("num_buckets", "factors"),
    [(2, [2]), (128, [128]), (130, [16, 8]), (256, [16, 16]), (300, [32, 8]), (512, [32, 16]), (1024, [32, 32])],
)
def test_many_buckets_are_pairs_of_few(num_buckets: int, factors: list[int]) -> None:
    assert bucket_factors(num_buckets) == factors


def test_pairs_of_hashes_count_as_buckets() -> None:
    buckets = hash_buckets(randn(1, 1, 9000, 32), 1, 512).flatten()
    assert buckets.max() < 32 * 16
    assert len((buckets % 32).unique()) == 32
    assert len((buckets // 32).unique()) == 16
    assert len(buckets.unique()) > 400  # the two hashes are two rotations


@pytest.mark.parametrize(("length", "num_buckets"), [(1, 2), (7, 2), (8, 4), (15, 6), (16, 8)])
def test_a_bucket_holds_half_a_chunk_unless_told(length: int, num_buckets: int) -> None:
    qk = randn(8, 8, length, 32)
    assert LSHAttention(4, 8).hash(qk).unique().tolist() == list(range(num_buckets))
    assert LSHAttention(4, 8, num_buckets=10).hash(qk).unique().tolist() == list(range(10))


def test_chunks_share_their_dropout() -> None:
    pattern = LSHAttention(4, 1, 0, 0, causal=False, dropout=0.5)
    qk, v = (randn(2, 2, 4, 8).repeat(1, 1, 3, 1) for _ in range(2))
    buckets = (torch.arange(12) // 4).expand(1, 2, 2, 12)  # sorted order is the given one
    kept = pattern.eval()(qk, v, None, buckets)
    close(kept, LSHAttention(4, 1, 0, 0, causal=False)(qk, v, None, buckets))
    pattern.train()
    draws = torch.stack([pattern(qk, v, None, buckets) for _ in range(400)])
    first, second, third = draws.unflatten(3, (3, 4)).unbind(3)
    close(first, second)
    close(first, third)
    assert not torch.allclose(draws[0], draws[1])
    assert (draws.mean(0) - kept).abs().max() < 0.4
    mixed = MixedLSHAttention(12, pattern).train()
    assert not torch.allclose(mixed(qk, v), mixed(qk, v))
    close(mixed.eval()(qk, v), F.scaled_dot_product_attention(qk, qk, v))


def test_lsh_attention_in_half_precision() -> None:
    pattern = LSHAttention(8)
    qk, v = randn(1, 2, 40, 16), randn(1, 2, 40, 16)
    buckets = pattern.hash(qk)
    for dtype in (torch.bfloat16, torch.float16):
        y = pattern(qk.to(dtype), v.to(dtype), None, buckets)
        assert y.dtype == dtype
        assert_close(y.float(), pattern(qk, v, None, buckets), atol=5e-2, rtol=5e-2)
        exact = shared_qk_attention(qk.to(dtype), v.to(dtype), True)
        assert_close(exact.float(), shared_qk_attention(qk, v, True), atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("window", [(4, 1, 0), (4, 0, 0), (3, 1, 1), (5, 2, 4), (1, 2, 1), (16, 1, 0)])
@pytest.mark.parametrize(("length", "num_real"), [(1, None), (3, [3, 1]), (16, None), (23, None), (23, [19, 6])])
@causal_or_not
def test_local_attention(causal: bool, window: tuple[int, int, int], length: int, num_real: list[int] | None) -> None:
    size, before, after = window
    after = 0 if causal else after
    q, k, v = (randn(2, 3, length, 4).requires_grad_() for _ in range(3))
    sizes = None if num_real is None else torch.tensor(num_real)
    mask = torch.zeros(2, 1, length, length, dtype=torch.bool)
    for b, real in enumerate(num_real or [length, length]):
        for t in range(length):
            for s in range(length):
                in_window = -before <= s // size - t // size <= after
                mask[b, 0, t, s] = s == t or (in_window and s < real and not (causal and s > t))
    y = real_only(LocalAttention(size, before, after, causal)(q, k, v, sizes), sizes)
    dense = real_only(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), sizes)
    close(y, dense)
    upstream = torch.randn_like(y)
    for got, expected in zip(*(torch.autograd.grad(out, (q, k, v), upstream) for out in (y, dense)), strict=True):
        close(got, expected)


def test_local_attention_drops_weights_in_training() -> None:
    pattern = LocalAttention(4, dropout=0.5)
    q, v = torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4)
    assert {pattern.train()(q, q, v)[0, 0, 0, 0].item() for _ in range(50)} == {0.0, 2.0}
    close(pattern.eval()(q, q, v), v)


@detached
def kernel_loop(q: Tensor, k: Tensor, v: Tensor, causal: bool, real: int) -> Tensor:
    """One head's weighted means by a double loop over features q and k [T, M]: [real, K]."""
    y = torch.zeros(real, v.shape[1], dtype=torch.float64)
    for t in range(real):
        weights = [float((q[t] * k[s]).sum()) for s in range(t + 1 if causal else real)]
        for s, weight in enumerate(weights):
            y[t] += weight / sum(weights) * v[s].double()
    return y


@causal_or_not
@pytest.mark.parametrize("kernel", ["relu", "softmax"])
@pytest.mark.parametrize(("length", "num_real"), [(1, None), (3, [3, 1]), (13, None), (13, [11, 4])])
def test_favor_attention(causal: bool, kernel: str, length: int, num_real: list[int] | None) -> None:
    pattern = FavorAttention(4, kernel, causal, num_features=10)
    q, k, v = (randn(2, 2, length, 4) for _ in range(3))
    y = pattern(q, k, v, None if num_real is None else torch.tensor(num_real))
    for b, real in enumerate(num_real or [length, length]):
        q_features, k_features = pattern.features(q[b : b + 1, :, :real], k[b : b + 1, :, :real])
        for h in range(2):
            expected = kernel_loop(q_features[0, h], k_features[0, h], v[b, h], causal, real)
            close(y[b, h, :real], expected.float())


@causal_or_not
def test_linear_attention_has_the_quadratic_form_s_gradients(causal: bool) -> None:
    q, k = (torch.rand(2, 1, 11, 6, dtype=torch.float64).requires_grad_() for _ in range(2))
    v = randn(2, 1, 11, 3, dtype=torch.float64).requires_grad_()
    weights = q @ k.transpose(-1, -2)
    weights = weights.tril() if causal else weights
    quadratic = weights / weights.sum(-1, keepdim=True) @ v
    y = (causal_linear_attention if causal else linear_attention)(q, k, v)
    upstream = torch.randn_like(y)
    for got, expected in zip(*(torch.autograd.grad(out, (q, k, v), upstream) for out in (y, quadratic)), strict=True):
        assert_close(got, expected)


def test_relu_features() -> None:
    q, k = torch.tensor([[[[-1.0, 0.0, 2.0]]]]), torch.tensor([[[[3.0, -0.5, 0.25]]]])
    got = FavorAttention(3).features(q, k)
    close(got[0].flatten(), torch.tensor([0.001, 0.001, 2.001]))
    close(got[1].flatten(), torch.tensor([3.001, 0.001, 0.251]))


@causal_or_not
def test_random_features(causal: bool) -> None:
    pattern = FavorAttention(4, "softmax", causal, num_features=6)
    q, k = randn(1, 1, 3, 4), randn(1, 1, 3, 4)
    padding = torch.tensor([False, False, True])[None, None, :, None]
    got = pattern.features(q, k, padding)
    exponents = [
        [[float(w @ x) / 4**0.25 - float(x @ x) / 2 / 2 for w in pattern.projection] for x in rows[0, 0]]
        for rows in (q, k)
    ]
    largest_key = 0.0 if causal else max(max(row) for row in exponents[1][:2])
    for t in range(3):
        for m in range(6):
            expected_q = math.exp(exponents[0][t][m] - max(exponents[0][t])) + 1e-4
            expected_k = math.exp(exponents[1][t][m] - largest_key) + 1e-4 if t < 2 else 0.0
            assert got[0][0, 0, t, m].item() == pytest.approx(expected_q, rel=1e-5)
            assert got[1][0, 0, t, m].item() == pytest.approx(expected_k, rel=1e-5)


def test_projections_are_orthogonal_and_as_long_as_gaussian_vectors() -> None:
    rows = orthogonal_gaussian(20, 8, torch.Generator().manual_seed(3))
    assert rows.shape == (20, 8)
    for block in rows.split(8):
        products = block @ block.T
        close(products, products.diag().diag())
    many = orthogonal_gaussian(4000, 8, torch.Generator().manual_seed(3))
    assert_close(many.mean(0), torch.zeros(8), atol=0.06, rtol=0)
    squares = many.square().sum(-1)
    assert squares.mean().item() == pytest.approx(8, rel=0.05)  # chi-square with 8 degrees of freedom
    assert squares.var().item() == pytest.approx(16, rel=0.15)
    one, other = (FavorAttention(8, "softmax").projection for _ in range(2))
    assert torch.equal(one, other)
    assert one.shape == (256, 8)


@causal_or_not
def test_random_features_approximate_the_softmax(causal: bool) -> None:
    q, k, v = randn(1, 4, 20, 8) / 2, randn(1, 4, 20, 8) / 2, randn(1, 4, 20, 8)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    uniform = F.scaled_dot_product_attention(q * 0, k, v, is_causal=causal)
    few, default, many = (FavorAttention(8, "softmax", causal, m)(q, k, v) for m in (32, 256, 4096))
    error, worse, better, none = (float((y - exact).norm() / exact.norm()) for y in (default, few, many, uniform))
    assert error < 0.75 * min(worse, none)
    assert better < 0.45 * error  # 0.25 is due; a bias would remain


class SharedQK(nn.Module):
    """An LSH pattern with the arguments of the others, its buckets those of an untouched qk."""

    def __init__(self, pattern: nn.Module) -> None:
        super().__init__()
        self.pattern, self.buckets = pattern, None

    def forward(self, q: Tensor, _: Tensor, v: Tensor, num_real: Tensor | None = None) -> Tensor:
        if self.buckets is None:
            self.buckets = self.pattern.hash(q, num_real)
        return self.pattern(q, v, num_real, self.buckets)


PATTERNS: dict[str, Callable[[bool], nn.Module]] = {
    "lsh": lambda causal: SharedQK(LSHAttention(4, 2, 1, 1, causal=causal)),
    "mixed, exact": lambda causal: SharedQK(MixedLSHAttention(99, LSHAttention(4, causal=causal))),
    "local": lambda causal: LocalAttention(4, 1, 0 if causal else 1, causal),
    "favor, relu": lambda causal: FavorAttention(8, "relu", causal),
    "favor, softmax": lambda causal: FavorAttention(8, "softmax", causal),
}
every_pattern = pytest.mark.parametrize("name", PATTERNS)


@every_pattern
@causal_or_not
@pytest.mark.parametrize("length", [3, 18, 29])
def test_padding_is_not_seen(name: str, causal: bool, length: int) -> None:
    num_real = torch.tensor([length, length // 2, 1, 0])
    qkv = [randn(4, 2, length, 8) for _ in range(3)]
    padding = (torch.arange(length) >= num_real[:, None])[:, None, :, None]
    changed = [torch.where(padding, randn(*x.shape) * 20, x).requires_grad_() for x in qkv]
    torch.manual_seed(5)
    y = PATTERNS[name](causal)(*qkv, num_real)
    torch.manual_seed(5)  # other buckets would show that padding moves real tokens
    again = PATTERNS[name](causal)(*changed, num_real)
    assert again.isfinite().all()
    close(real_only(again, num_real), real_only(y, num_real))
    used = changed[::2] if isinstance(PATTERNS[name](causal), SharedQK) else changed
    for gradient in torch.autograd.grad((real_only(again, num_real) ** 2).sum(), used):
        assert gradient.isfinite().all()
        assert (gradient.masked_select(padding) == 0).all()


@every_pattern
@pytest.mark.parametrize("length", [3, 18, 29])
def test_a_token_sees_no_later_one(name: str, length: int) -> None:
    qkv = [randn(2, 2, length, 8) for _ in range(3)]
    causal, bidirectional = PATTERNS[name](True), PATTERNS[name](False)
    y, all_y = causal(*qkv), bidirectional(*qkv)
    for t in (1, length // 2, length - 1):
        changed = [torch.cat([x[:, :, :t], randn(2, 2, length - t, 8) * 3], dim=2) for x in qkv]
        close(causal(*changed)[:, :, :t], y[:, :, :t])
        assert not torch.allclose(causal(*changed)[:, :, t:], y[:, :, t:], atol=1e-3)
        assert not torch.allclose(bidirectional(*changed)[:, :, :t], all_y[:, :, :t], atol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["lsh", "local", "favor, relu", "favor, softmax"])
def test_cost_grows_with_the_length_and_not_with_its_square(name: str, causal: bool) -> None:
    patterns: dict[str, nn.Module] = {
        "lsh": SharedQK(LSHAttention(32, 2, causal=causal)),
        "local": LocalAttention(32, causal=causal),
        "favor, relu": FavorAttention(8, "relu", causal),
        "favor, softmax": FavorAttention(8, "softmax", causal, num_features=16),
    }
    counts = []
    for length in (2048, 8192):
        qkv = [randn(1, 1, length, 8) for _ in range(3)]
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            patterns[name](*qkv)
        counts.append(counter.get_total_flops())
        if isinstance(patterns[name], SharedQK):
            patterns[name].buckets = None
    assert 0 < counts[0] < counts[1] < 5 * counts[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalAttention(0), "chunk_length is 0"),
        (lambda: LocalAttention(4, -1), "chunks_before is -1"),
        (lambda: LocalAttention(4, 1, 1), "chunks_after is 1, but a causal token"),
        (lambda: LSHAttention(0), "chunk_length is 0"),
        (lambda: LSHAttention(chunks_after=-2), "chunks_after is -2"),
        (lambda: LSHAttention(num_hashes=0), "num_hashes is 0"),
        (lambda: LSHAttention(num_buckets=3), "num_buckets is 3"),
        (lambda: LSHAttention(num_buckets=0), "num_buckets is 0"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
