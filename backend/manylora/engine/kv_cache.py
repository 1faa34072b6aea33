"""Blocks of the KV cache: who holds which, and which full blocks can be reused for a shared prefix.

Plain Python; the tensors are the runner's. A full block's key is the hash of the adapter version and scale
and of every token up to the block's end, so a prefix is shared only where the same weights computed it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Key = bytes


@dataclass(slots=True)
class Block:
    index: int
    num_users: int = 0
    key: Key | None = None
    """Set once the block is full and its tokens computed."""


class BlockPool:
    """Reference-counted blocks. One that nobody uses keeps its content, and can be found, until it is taken.

    Args:
        num_blocks: blocks in all.
        block_size: tokens of a block.
        reuse: whether prefixes are shared.
    """

    def __init__(self, num_blocks: int, block_size: int, *, reuse: bool = True) -> None:
        self.block_size = block_size
        self.reuse = reuse
        self.blocks = [Block(i) for i in range(num_blocks)]
        # Free blocks, the one to take next first: never used, then least recently used.
        self._free: OrderedDict[int, None] = OrderedDict((i, None) for i in range(num_blocks))
        self._by_key: dict[Key, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def prefix_keys(self, namespace: str, token_ids: Sequence[int], known: list[Key]) -> list[Key]:
        """Extend `known`, the keys of the first full blocks of `token_ids`, to all its full blocks.

        Args:
            namespace: all that decides keys and values besides the tokens: `Sequence.namespace`.
        """
        size = self.block_size
        if not self.reuse:
            return known
        while len(known) < len(token_ids) // size:
            start = len(known) * size
            parent = known[-1] if known else namespace.encode()
            tokens = b"".join(t.to_bytes(4, "little") for t in token_ids[start : start + size])
            known.append(hashlib.blake2b(parent + tokens, digest_size=16).digest())
        return known

    def try_allocate(self, num_tokens: int, prefix: Sequence[Key]) -> tuple[list[int], int] | None:
        """Take the blocks of a new sequence.

        Args:
            num_tokens: tokens to hold. At least one of them stays to be computed.
            prefix: keys of its full blocks, from `prefix_keys`.

        Returns:
            Block indices in order and how many tokens their content covers already; None when blocks lack.
        """
        usable = (num_tokens - 1) // self.block_size
        shared = []
        for key in prefix[:usable] if self.reuse else ():
            found = self._by_key.get(key)
            if found is None:
                break
            shared.append(found)
        num_new = self.num_needed(num_tokens) - len(shared)
        num_revived = sum(self.blocks[i].num_users == 0 for i in shared)
        if num_new > self.num_free - num_revived:
            return None
        for index in shared:
            self._use(index)
        return shared + [self._take() for _ in range(num_new)], len(shared) * self.block_size

    def try_grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend a sequence's blocks to hold `num_tokens`; False, and nothing taken, when blocks lack."""
        num_new = self.num_needed(num_tokens) - len(table)
        if num_new > self.num_free:
            return False
        table.extend(self._take() for _ in range(num_new))
        return True

    def mark_computed(
        self, table: Sequence[int], keys: Sequence[Key], num_new: int, num_computed: int
    ) -> None:
        """Make the blocks of a sequence findable that its last `num_new` computed tokens have filled."""
        if not self.reuse:
            return
        filled = slice((num_computed - num_new) // self.block_size, num_computed // self.block_size)
        for index, key in zip(table[filled], keys[filled], strict=True):
            block = self.blocks[index]
            if block.key is None and key not in self._by_key:
                block.key = key
                self._by_key[key] = index

    def release(self, table: list[int]) -> None:
        """Give a sequence's blocks back and empty its table. Its last ones are the first to be reused."""
        for index in reversed(table):
            block = self.blocks[index]
            assert block.num_users > 0, "released a block that nobody uses"
            block.num_users -= 1
            if block.num_users == 0:
                self._free[index] = None
                if block.key is None:
                    self._free.move_to_end(index, last=False)
        table.clear()

    def check(self, tables: Iterable[Sequence[int]]) -> list[str]:
        """Broken invariants, given the block tables of all live sequences."""
        users = [0] * len(self.blocks)
        for table in tables:
            for index in table:
                users[index] += 1
        wrong = [
            f"block {b.index}: {b.num_users} users counted, {users[b.index]} found"
            for b in self.blocks
            if b.num_users != users[b.index]
        ]
        wrong += [
            f"block {b.index} is used and free" for b in self.blocks if b.num_users and b.index in self._free
        ]
        wrong += [
            f"block {b.index} is neither used nor free"
            for b in self.blocks
            if not b.num_users and b.index not in self._free
        ]
        wrong += [
            f"key of block {i} is not its own" for k, i in self._by_key.items() if self.blocks[i].key != k
        ]
        return wrong

    def _use(self, index: int) -> None:
        block = self.blocks[index]
        if block.num_users == 0:
            del self._free[index]
        block.num_users += 1

    def _take(self) -> int:
        index, _ = self._free.popitem(last=False)
        block = self.blocks[index]
        if block.key is not None:
            del self._by_key[block.key]
            block.key = None
        block.num_users = 1
        return index
