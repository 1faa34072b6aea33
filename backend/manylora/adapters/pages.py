"""Which pages of one group are free. Plain Python: the tensors are pool_tensors.py's."""

from __future__ import annotations

from collections.abc import Sequence

from manylora.model.spec import SiteKind, page_groups


def largest_pages(kinds: Sequence[SiteKind], max_lora_rank: int) -> tuple[int, ...]:
    """Pages by group of the largest adapter admitted: of `max_lora_rank` on every kind of site."""
    return tuple(group.paged_by.num_pages(max_lora_rank) for group in page_groups(kinds))


class PageAllocator:
    """Pages 0 .. num_pages - 1.

    Consecutive pages are preferred, since kernels on a CPU use them as one view: of the free runs that are
    long enough the shortest is used, so that long ones last; where none is, the longest runs are joined.

    >>> pages = PageAllocator(4)
    >>> pages.allocate(2), pages.allocate(1)
    ((0, 1), (2,))
    >>> pages.free((0, 1))
    >>> pages.allocate(3)
    (0, 1, 3)
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._is_free = [True] * num_pages
        self.num_free = num_pages

    def allocate(self, count: int) -> tuple[int, ...]:
        """Take `count` pages, in ascending order. The caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} pages asked for, {self.num_free} free"
        if count == 0:
            return ()
        runs = self._free_runs()
        fitting = min((run for run in runs if len(run) >= count), key=len, default=None)
        taken: list[int] = []
        if fitting is not None:
            taken = list(fitting[:count])
        else:
            for run in sorted(runs, key=len, reverse=True):
                taken += run[: count - len(taken)]
        for page in taken:
            self._is_free[page] = False
        self.num_free -= count
        return tuple(sorted(taken))

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back."""
        for page in pages:
            assert not self._is_free[page], f"page {page} was freed twice"
            self._is_free[page] = True
        self.num_free += len(pages)

    def check(self, used: Sequence[int]) -> list[str]:
        """Broken invariants, given the pages that are in use."""
        wrong = []
        if len(set(used)) != len(used):
            wrong.append(f"a page is used twice: {sorted(used)}")
        taken = {page for page, is_free in enumerate(self._is_free) if not is_free}
        if taken != set(used):
            wrong.append(f"pages {sorted(taken)} are taken, but {sorted(set(used))} are used")
        if self.num_free != self.num_pages - len(taken):
            wrong.append(f"{self.num_free} pages counted free, found {self.num_pages - len(taken)}")
        return wrong

    def _free_runs(self) -> list[range]:
        runs = []
        first = None
        for page, is_free in enumerate([*self._is_free, False]):
            if is_free and first is None:
                first = page
            elif not is_free and first is not None:
                runs.append(range(first, page))
                first = None
        return runs
