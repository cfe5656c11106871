"""The prefix cache changes what is read, never what is written."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from served import PROMPT, ServerProcess
from terseformer.engine import Engine
from terseformer.sampling import GenerationError, SamplingConfig
from terseformer.serve.cache import PrefixCache
from terseformer.serve.disk import DiskCache, Key
from terseformer.session import Snapshot

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=8)


def read(engine: Engine, cache: PrefixCache | None, tokens: list[int]) -> tuple[list[int], int]:
    """What is written after a prompt, and how many of its tokens the cache knew."""
    snapshot = cache.find("m", tokens) if cache else None
    session = engine.restore(snapshot) if snapshot else engine.new_session()
    known = session.length
    engine.read(session, tokens[known:])
    if cache:
        cache.remember("m", session)
    written = engine.write([engine.start(session, [], GREEDY)])[0]
    session.tokens += written
    if cache:
        cache.remember("m", session)
    return written, known


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    prompts=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=30), min_size=2, max_size=6),
    repeated=st.lists(st.integers(0, 5), max_size=6),
    max_bytes=st.sampled_from([1 << 14, 1 << 20]),
)
def test_any_order_of_prompts_gives_the_same_texts(
    prompts: list[list[int]],
    repeated: list[int],
    max_bytes: int,
    engine: Engine,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    disk = DiskCache(tmp_path_factory.mktemp("prefixes"), 1 << 16)
    cache = PrefixCache(max_bytes, disk, min_tokens=2)
    for tokens in [*prompts, *(prompts[i % len(prompts)] for i in repeated)]:
        expected, _ = read(engine, None, tokens)
        assert read(engine, cache, tokens)[0] == expected
        longer, _ = read(engine, cache, [*tokens, *expected[:-1], 5])
        assert longer == read(engine, None, [*tokens, *expected[:-1], 5])[0]
        assert cache.num_bytes <= max_bytes
    cache.close()
    assert disk.num_bytes <= 1 << 16


def test_the_longest_beginning_is_found(engine: Engine) -> None:
    cache = PrefixCache(1 << 20, min_tokens=4)
    tokens = list(range(1, 20))
    assert read(engine, cache, tokens)[1] == 0
    assert read(engine, cache, tokens)[1] == 19
    assert read(engine, cache, [*tokens, 30, 31])[1] == 19
    assert read(engine, cache, [*tokens, 30, 31, 32])[1] == 21
    assert read(engine, cache, tokens[:10])[1] == 0
    assert cache.find("another model", tokens) is None
    assert cache.parting("m", tokens) == 0
    assert cache.parting("m", [*tokens[:7], 40, 41]) == 7
    assert cache.parting("m", [*tokens[:3], 40, 41]) == 0


def test_nobody_finds_what_another_one_has_asked(engine: Engine, tmp_path: Path) -> None:
    tokens = list(range(1, 20))
    session = engine.new_session()
    engine.read(session, tokens)
    cache = PrefixCache(1 << 20, DiskCache(tmp_path, 1 << 20), min_tokens=4)
    cache.remember("m", session, b"one")
    cache.parting("m", tokens, b"one")
    cache.close()
    for known in (cache, PrefixCache(1 << 20, DiskCache(tmp_path, 1 << 20), min_tokens=4)):
        assert known.find("m", tokens, b"two") is None
        assert known.find("m", tokens) is None
        assert known.find("m", tokens, b"one") is not None
        assert known.parting("m", tokens, b"two") == 0
    known.close()


def test_the_least_used_makes_room(engine: Engine) -> None:
    def snapshot(first: int) -> Snapshot:
        session = engine.new_session()
        engine.read(session, [first, 2, 3, 4])
        return session.snapshot()

    size = snapshot(1).state.nbytes + 32
    cache = PrefixCache(2 * size, min_tokens=4)
    for first in (1, 5, 1, 6):
        session = engine.new_session()
        engine.read(session, [first, 2, 3, 4])
        if cache.find("m", session.tokens) is None:
            cache.remember("m", session)
    assert [cache.find("m", [first, 2, 3, 4]) is not None for first in (1, 5, 6)] == [True, False, True]


def test_a_snapshot_of_another_model_is_refused(engine: Engine) -> None:
    session = engine.new_session()
    engine.read(session, [1, 2, 3])
    short = dataclasses.replace(session.snapshot(), tokens=(1, 2))
    with pytest.raises(GenerationError, match="saved from another model"):
        engine.restore(short)
    with pytest.raises(GenerationError, match="does not fit a capacity of 2"):
        engine.restore(session.snapshot(), 2)


# On disk.


@pytest.fixture
def kept(engine: Engine, tmp_path: Path) -> tuple[Key, Snapshot, Path]:
    """A snapshot in a folder, and its file."""
    session = engine.new_session()
    engine.read(session, [1, 2, 3, 4, 5])
    key, snapshot = Key("m", 5, "0" * 32), session.snapshot()
    disk = DiskCache(tmp_path, 1 << 20)
    disk.store(key, snapshot)
    disk.close()
    return key, snapshot, tmp_path / "m" / f"5-{'0' * 32}.safetensors"


def test_a_snapshot_comes_back(kept: tuple[Key, Snapshot, Path], tmp_path: Path) -> None:
    key, snapshot, path = kept
    disk = DiskCache(tmp_path, 1 << 20)
    assert disk.lengths("m") == {5}
    loaded = disk.load(key)
    assert loaded is not None
    assert loaded.tokens == snapshot.tokens
    np.testing.assert_array_equal(loaded.state, snapshot.state)
    assert disk.num_bytes == path.stat().st_size
    assert disk.load(key._replace(digest="1" * 32)) is None
    assert oct(path.parent.stat().st_mode)[-3:] == "700"
    disk.close()


def test_a_damaged_or_foreign_file_is_left_out(kept: tuple[Key, Snapshot, Path], tmp_path: Path) -> None:
    key, _, path = kept
    whole = path.read_bytes()
    for place in (0, 9, len(whole) // 2, len(whole) - 1):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
            path.write_bytes(damaged)
            disk = DiskCache(tmp_path, 1 << 20)
            assert disk.load(key) is None, place
            assert not path.exists()
            assert disk.lengths("m") == set()
            disk.close()
    other = tmp_path / "other" / path.name
    other.parent.mkdir()
    other.write_bytes(whole)
    disk = DiskCache(tmp_path, 1 << 20)
    assert disk.load(key._replace(model="other")) is None
    disk.close()


def test_old_files_make_room_and_half_written_ones_go(kept: tuple[Key, Snapshot, Path], tmp_path: Path) -> None:
    key, snapshot, path = kept
    stale, fresh = path.with_name(".stale.1"), path.with_name(".fresh.1")
    stale.write_bytes(b"half")
    os.utime(stale, (0, 0))
    fresh.write_bytes(b"half")
    disk = DiskCache(tmp_path, 3 * path.stat().st_size)
    assert not stale.exists()
    assert fresh.exists()
    for digit in "123":
        disk.store(key._replace(digest=digit * 32), snapshot)
    disk.close()
    assert sorted(p.name[2] for p in path.parent.glob("5-*")) == ["1", "2", "3"]


# In a server.


@pytest.mark.slow
def test_what_is_known_is_not_read_again_and_survives_a_restart(runs: Path, tmp_path: Path) -> None:
    drawn = {"model": "small", "max_tokens": 20, "seed": 5}
    with ServerProcess(runs / "small", cache=tmp_path) as server:
        create = server.client().completions.create
        first = create(prompt=PROMPT, **drawn)
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        again = create(prompt=PROMPT, **drawn)
        assert again.choices[0].text == first.choices[0].text
        assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens
        scored = create(prompt=PROMPT, echo=True, logprobs=1, **drawn)
        assert scored.usage.prompt_tokens_details.cached_tokens == 0
        assert scored.choices[0].text == PROMPT + first.choices[0].text
        create(prompt=PROMPT + " one", **drawn)
        create(prompt=PROMPT[:-8] + " two", **drawn)
        shared = create(prompt=PROMPT[:-8] + " three", **drawn)
        assert 0 < shared.usage.prompt_tokens_details.cached_tokens < shared.usage.prompt_tokens
        assert server.metric("terse_cached_tokens_total") > 0
        assert server.metric("terse_cache_memory_bytes") > 0
    for how in (signal.SIGKILL, signal.SIGTERM):
        with ServerProcess(runs / "small", cache=tmp_path) as server:
            after = server.client().completions.create(prompt=PROMPT, **drawn)
            assert after.usage.prompt_tokens_details.cached_tokens == after.usage.prompt_tokens
            assert after.choices[0].text == first.choices[0].text
            server.stop(how)


def test_a_conversation_goes_on_from_its_instructions(runs: Path) -> None:
    system = {"role": "system", "content": PROMPT}
    with ServerProcess(runs / "small") as server:
        create = server.client().chat.completions.create
        create(model="small", messages=[system, {"role": "user", "content": "abc"}], max_tokens=4)
        other = create(model="small", messages=[system, {"role": "user", "content": "jab"}], max_tokens=4)
        assert other.usage.prompt_tokens_details.cached_tokens >= 16


def test_a_key_has_a_cache_of_its_own(runs: Path) -> None:
    with ServerProcess(runs / "small", "--api-key", "one", "two") as server:
        for key, known in (("one", False), ("two", False), ("one", True), ("two", True)):
            usage = server.client(key).completions.create(model="small", prompt=PROMPT, max_tokens=2).usage
            assert bool(usage.prompt_tokens_details.cached_tokens) == known


def test_it_can_be_turned_off(runs: Path) -> None:
    with ServerProcess(runs / "small", "--cache-memory", 0) as server:
        for _ in range(2):
            done = server.client().completions.create(model="small", prompt=PROMPT, max_tokens=2)
            assert done.usage.prompt_tokens_details.cached_tokens == 0
