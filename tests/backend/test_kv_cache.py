"""Blocks: nothing is lost, nothing is shared that should not be."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from manylora.engine.kv_cache import BlockPool, Key


def fill(pool: BlockPool, namespace: str, tokens: list[int]) -> tuple[list[int], int, list[Key]]:
    keys = pool.prefix_keys(namespace, tokens, [])
    taken = pool.try_allocate(len(tokens), keys)
    assert taken is not None
    return (*taken, keys)


def test_a_shared_prefix_is_found_again_under_the_same_version_only() -> None:
    pool = BlockPool(16, 4)
    tokens = list(range(10))
    table, covered, keys = fill(pool, "v1", tokens)
    assert covered == 0
    pool.mark_computed(table, keys, 10, 10)
    again, covered, _ = fill(pool, "v1", [*tokens[:8], 77, 78])
    assert covered == 8
    assert again[:2] == table[:2]
    other, covered, _ = fill(pool, "v2", tokens)
    assert covered == 0
    assert not set(other) & set(table)
    assert pool.check([table, again, other]) == []


def test_a_whole_shared_prompt_leaves_one_token_to_compute() -> None:
    pool = BlockPool(8, 4)
    tokens = list(range(8))
    table, _, keys = fill(pool, "", tokens)
    pool.mark_computed(table, keys, 8, 8)
    _, covered, _ = fill(pool, "", tokens)
    assert covered == 4


def test_a_block_that_is_not_computed_yet_is_not_shared() -> None:
    pool = BlockPool(8, 4)
    tokens = list(range(8))
    table, _, keys = fill(pool, "", tokens)
    pool.mark_computed(table, keys, 3, 3)
    _, covered, _ = fill(pool, "", tokens)
    assert covered == 0


def test_released_prefixes_survive_until_their_blocks_are_needed() -> None:
    pool = BlockPool(4, 4)
    first = list(range(8))
    table, _, keys = fill(pool, "", first)
    pool.mark_computed(table, keys, 8, 8)
    pool.release(table)
    table, covered, _ = fill(pool, "", [*first, 1])
    assert covered == 8
    pool.release(table)
    big, _, _ = fill(pool, "", [9] * 16)
    pool.release(big)
    _, covered, _ = fill(pool, "", [*first, 1])
    assert covered == 0


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(3, 4)
    assert pool.try_allocate(13, []) is None
    assert pool.num_free == 3
    taken = pool.try_allocate(9, [])
    assert taken is not None
    assert not pool.try_grow(taken[0], 13)
    assert pool.num_free == 0
    assert len(taken[0]) == 3


class Blocks(RuleBasedStateMachine):
    """Random sequences of few distinct tokens, so that prefixes collide often."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, 2)
        self.live: list[tuple[str, list[int], list[int], list[Key]]] = []
        self.truth: dict[int, tuple[str, tuple[int, ...]]] = {}

    @rule(namespace=st.sampled_from(["", "a"]), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def start(self, namespace: str, tokens: list[int]) -> None:
        keys = self.pool.prefix_keys(namespace, tokens, [])
        taken = self.pool.try_allocate(len(tokens), keys)
        if taken is None:
            return
        table, covered = taken
        for i in range(covered // 2):
            assert self.truth[table[i]] == (namespace, tuple(tokens[: 2 * i + 2]))
        assert covered < len(tokens)
        for i, index in enumerate(table[covered // 2 :], covered // 2):
            self.truth[index] = (namespace, tuple(tokens[: 2 * i + 2]))
        self.pool.mark_computed(table, keys, len(tokens) - covered, len(tokens))
        self.live.append((namespace, tokens, table, keys))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), token=st.integers(0, 1))
    def grow(self, which: int, token: int) -> None:
        namespace, tokens, table, keys = self.live[which % len(self.live)]
        if not self.pool.try_grow(table, len(tokens) + 1):
            return
        tokens.append(token)
        self.truth[table[-1]] = (namespace, tuple(tokens))
        self.pool.prefix_keys(namespace, tokens, keys)
        self.pool.mark_computed(table, keys, 1, len(tokens))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        _, _, table, _ = self.live.pop(which % len(self.live))
        self.pool.release(table)

    @invariant()
    def nothing_is_broken(self) -> None:
        assert self.pool.check([table for _, _, table, _ in self.live]) == []


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
