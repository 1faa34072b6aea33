"""An adapter in host memory, in the layout of the device pool.

Shape key: L layers of a kind, P pages, E elements of the buffer, W inputs or outputs of one linear.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from manylora.adapters.layout import AdapterLayout
from manylora.model.parts import PAGE_ROWS, PAGINGS, PagedBy, Part, Spans
from manylora.model.spec import LinearSpec, SiteKind, page_groups

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class KindWeights:
    """What one adapter has at one kind of site, ready to be copied page by page.

    Rank row j of a linear lies in page j // 16, row j % 16. Rows past a linear's own rank, and all rows
    of a linear that the adapter does not target, are zero.
    """

    rank: int
    """The highest rank among the kind's targeted linears: 1 .. 16 * P; 0 where it has vectors only."""
    has_vectors: bool = False
    """Whether it has the parts that are one per adapter. Where a linear has none, they change nothing."""
    parts: Mapping[str, torch.Tensor]
    """By name, [L, P, ...] with the shape of a page as the table says: contiguous views of the adapter's
    buffer. `b` is times (module / adapter scaling)."""

    def num_pages(self, paged_by: PagedBy) -> int:
        """P of the parts that are paged so."""
        return _num_pages(paged_by, self.rank, self.has_vectors)

    def rows_of(self, part: Part, kind: SiteKind, linear: LinearSpec) -> torch.Tensor:
        """A linear's rows of a part, a view of `parts`: [P, 16, W]; of one that is one per adapter [1, W]."""
        layer = self.parts[part.name][linear.row]
        if part.spans is Spans.INPUTS:
            return layer[:, linear.slice]
        column = sum(kind.out_features[: linear.slice])
        return layer[..., column : column + linear.out_features]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWeights:
    """One version of one adapter."""

    version: str
    """Content hash: 32 hex digits of the SHA-256 of adapter_config.json, then adapter_model.safetensors."""
    scale: float
    """The scaling (alpha / r, or alpha / sqrt(r) with rsLoRA) that the kernels apply per row. Where modules
    differ (`alpha_pattern`, `rank_pattern`), the first module's that is not 0; the others' ratio to it is
    folded into `b`."""
    max_rank: int
    buffer: torch.Tensor
    """[E], the pool's dtype, as `AdapterLayout` says; page-locked when the device is CUDA, so that one
    transfer takes all of it there. What lies between the tensors is never read."""
    kinds: tuple[KindWeights | None, ...]
    """In the order of `ModelSpec.kinds`; None where the adapter targets nothing of the kind."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, host or device. The buffer has less than 256 more for each."""
        return sum(t.numel() * t.element_size() for kind in self.kinds if kind for t in kind.parts.values())

    @property
    def has_vectors(self) -> bool:
        """Whether it scales or offsets outputs anywhere."""
        return any(kind.has_vectors for kind in self.kinds if kind)

    @property
    def num_pages(self) -> tuple[int, ...]:
        """Pages that the adapter takes, by `page_groups`."""
        return tuple(kind.num_pages(by) if kind else 0 for by in PAGINGS for kind in self.kinds)


def allocate(
    kinds: Sequence[SiteKind],
    ranks: Sequence[int],
    dtype: torch.dtype,
    *,
    pin: bool,
    has_vectors: Sequence[bool] = (),
) -> tuple[torch.Tensor, tuple[KindWeights | None, ...]]:
    """Memory for an adapter that changes nothing: all zeros, but for scales, which are ones.

    Args:
        kinds: of the base model.
        ranks: the adapter's highest rank by kind; 0 where it has no A and B.
        dtype: the pool's.
        pin: page-lock the memory, for copies to a CUDA device. Where that fails the memory is ordinary, with
            a warning: its copies are slower, and the thread that queues them waits for them.
        has_vectors: by kind, whether the adapter has scale and offset; empty: in none.

    Returns:
        The buffer [E], and its tensors by kind.
    """
    groups = page_groups(kinds)
    held = list(zip(ranks, has_vectors or [False] * len(kinds), strict=True))
    num_pages = [_num_pages(by, *mine) for by in PAGINGS for mine in held]
    layout = AdapterLayout.of(groups, num_pages, dtype)
    buffer = _zeros(layout.num_elements, dtype, pin)
    parts: list[dict[str, torch.Tensor]] = [{} for _ in kinds]
    for index, places in enumerate(layout.groups):
        parts[index % len(kinds)].update((name, place.of(buffer)) for name, place in places.items())
    for mine in parts:
        if "scale" in mine:
            mine["scale"].fill_(1.0)
    return buffer, tuple(
        KindWeights(rank=rank, has_vectors=vectors, parts=mine) if mine else None
        for (rank, vectors), mine in zip(held, parts, strict=True)
    )


def _num_pages(paged_by: PagedBy, rank: int, has_vectors: bool) -> int:
    has_it = has_vectors if paged_by is PagedBy.ADAPTER else rank > 0
    return paged_by.num_pages(rank) if has_it else 0


def fill_linear(
    weights: KindWeights,
    kind: SiteKind,
    linear: LinearSpec,
    tensors: Mapping[str, torch.Tensor],
    base_bias: torch.Tensor | None = None,
) -> None:
    """Write one linear's parts into an adapter's memory, so that it computes what the formula says.

    `y = scale * (W x + B A x) + offset + bias`: the factors do not reach the base's bias. The kernels
    multiply the base's whole output, so (1 - scale) * bias goes into the offset that they add.

    Args:
        weights: the adapter's, of the linear's kind, with room for all of these.
        kind: of the linear.
        linear: where it lies.
        tensors: by the part's name, each of its `file_shape`, B times (module / adapter scaling). What is
            absent changes nothing.
        base_bias: [N], of the base's linear; None where it has none.
    """
    tensors = dict(tensors)
    if "scale" in tensors and base_bias is not None:
        scale, bias = tensors["scale"].double(), base_bias.double()
        folded = (1.0 - scale) * bias
        tensors["offset"] = folded + tensors["offset"].double() if "offset" in tensors else folded
    for part in (part for part in kind.parts if part.name in tensors):
        fill_rows(weights.rows_of(part, kind, linear), part, tensors[part.name])


def fill_rows(into: torch.Tensor, part: Part, tensor: torch.Tensor) -> None:
    """Write a linear's tensor of a part, of its `file_shape`, into the linear's rows of `rows_of`."""
    if part.paged_by is PagedBy.ADAPTER:
        into[0] = tensor
        return
    rows_RW = tensor if part.spans is Spans.INPUTS else tensor.T
    for page, some in enumerate(torch.split(rows_RW, PAGE_ROWS)):
        into[page, : len(some)] = some


def _zeros(num_elements: int, dtype: torch.dtype, pin: bool) -> torch.Tensor:
    if pin:
        # Freed and reused by torch behind the copies that read it: each `copy_(non_blocking=True)` notes its
        # stream on the whole block, by the storage, so that views count as well.
        try:
            return torch.zeros(num_elements, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            log.warning(
                "%d bytes for an adapter could not be page-locked; steps will wait while it is copied to the "
                "device: %s",
                num_elements * dtype.itemsize,
                error,
            )
    return torch.zeros(num_elements, dtype=dtype)
