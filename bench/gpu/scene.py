"""One step on the device: its rows, the pools of a few layers, and the right answer.

Shape key: T rows, D adapters, P pages, S linears, K inputs, N outputs of all S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from manylora_kernels import PAGE_ROWS, SitePool

from bench.gpu import floors
from bench.gpu.clock import Run
from bench.gpu.shapes import Layer, Point

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Of the norm of the adapters' term: sums in another order, factors and the sum with y rounded to the dtype.
The sum's rounding alone is 5e-3 in bfloat16 at rank 8, whose terms are a third of y."""
CACHE_BYTES = 128 << 20
"""What the layers of one graph read must be more than this, or they would be read from a cache."""
SCALE = 0.5
"""Of every row: exact in every dtype, for the peers that fold it into weights."""
_MAX_LAYERS = 64
_MAX_PREFILL_LAYERS = 4
_CHECKED_ROWS = 48

Term = Callable[[torch.Tensor, torch.Tensor, SitePool], Run]
"""Of y, x and the pool of a site, what adds the adapters' terms to y."""


class Scene:
    """Everything of one point on the device.

    Args:
        point: the step.
        layer: the sites.
        num_layers: pools of different weights; 0: so many that no cache holds them.
    """

    def __init__(
        self, point: Point, layer: Layer, device: torch.device, dtype: torch.dtype, num_layers: int = 0
    ) -> None:
        from manylora_kernels.lora.routed import RoutedMix  # imports triton, after the interpreter was chosen

        self.point, self.layer, self.device, self.dtype = point, layer, device, dtype
        self.slots, self.pages = point.slots(), point.pages()
        self.scales = np.full(point.num_rows, SCALE, dtype=np.float32)
        self.max_pages = -(-point.pool_rank // PAGE_ROWS)
        mix = RoutedMix.build(
            self.slots, self.scales, [self.pages], point.num_adapters, self.max_pages, device
        )
        # Measured side by side; a captured graph would never take the vendor's products by itself.
        self.mix, self.one_adapter = replace(mix, one_adapter=None), mix.one_adapter
        torch.manual_seed(0)
        self.x = {name: self.randn(point.num_rows, site.num_inputs) for name, site in layer.items()}
        self.y = {name: self.randn(point.num_rows, site.num_outputs) for name, site in layer.items()}
        # What is timed adds up here, so that y stays what the right answer was computed from.
        self.sums = {name: y.clone() for name, y in self.y.items()}
        if device.type != "cuda":
            num_layers = 1
        self.layers = [self._pools() for _ in range(num_layers or self._enough_layers())]
        self.picks = np.unique(np.linspace(0, point.num_rows - 1, _CHECKED_ROWS).astype(np.int64))
        self._terms: dict[str, torch.Tensor] = {}

    def _enough_layers(self) -> int:
        # A prompt's rows alone are more than the caches hold.
        most = _MAX_PREFILL_LAYERS if self.point.is_prefill else _MAX_LAYERS
        read = floors.weight_bytes(self.point, self.layer, self.dtype.itemsize)
        return min(most, -(-CACHE_BYTES // read))

    def randn(self, *shape: int) -> torch.Tensor:
        """Normal numbers on the device."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def _pools(self) -> dict[str, SitePool]:
        pools = {}
        for name, site in self.layer.items():
            num_pages = sum(map(len, self.pages))
            a = self.randn(num_pages, site.num_linears, PAGE_ROWS, site.num_inputs) / site.num_inputs**0.5
            b = self.randn(num_pages, PAGE_ROWS, site.num_outputs) / 4
            for d, mine in enumerate(self.pages):
                # The last page of a rank that is no multiple of 16 ends with zeros.
                over = len(mine) * PAGE_ROWS - self.point.rank(d)
                if over:
                    a[mine[-1], :, PAGE_ROWS - over :] = 0
                    b[mine[-1], PAGE_ROWS - over :] = 0
            pools[name] = SitePool(a, b, site.widths)
        return pools

    def ranks(self) -> list[int]:
        """Of each adapter."""
        return [self.point.rank(d) for d in range(self.point.num_adapters)]

    def stacked_a(self, pool: SitePool, adapter: int) -> torch.Tensor:
        """A of one adapter with its true rank: [S, r, K]."""
        rows = pool.a[list(self.pages[adapter])].transpose(0, 1).flatten(1, 2)
        return rows[:, : self.point.rank(adapter)]

    def stacked_b(self, pool: SitePool, adapter: int) -> torch.Tensor:
        """B of one adapter with its true rank: [r, N]."""
        return pool.b[list(self.pages[adapter])].flatten(0, 1)[: self.point.rank(adapter)]

    def all_layers(self, term: Term) -> Run:
        """One form over all layers, one after the other, into `sums`."""
        runs = [
            term(self.sums[site], self.x[site], pool) for pools in self.layers for site, pool in pools.items()
        ]

        def run() -> None:
            for mine in runs:
                mine()

        return run

    def check(self, term: Term) -> float:
        """Compare the first layer with float64.

        Returns:
            The norm of the term's error as a share of the term's, of the worst site.

        Raises:
            AssertionError: an error above the tolerance, or a row without an adapter that has changed.
        """
        worst = 0.0
        for name, pool in self.layers[0].items():
            y = self.y[name].clone()
            term(y, self.x[name], pool)()
            found = y[torch.from_numpy(self.picks).to(self.device)]
            worst = max(worst, self.error(name, found))
        return worst

    def check_replay(self, run: Run, replay: Run) -> None:
        """Compare what `replay` leaves in `sums` with what `run` does, which it is the graph of.

        Raises:
            AssertionError: they lie further apart than sums in another order can.
        """
        results = []
        for form in (run, replay):
            for name, y in self.y.items():
                self.sums[name].copy_(y)
            form()
            results.append({name: y.clone() for name, y in self.sums.items()})
        allowed = TOLERANCE[self.dtype]
        for name, wanted in results[0].items():
            wrong, change = (results[1][name] - wanted).float().norm(), (wanted - self.y[name]).float().norm()
            assert wrong <= allowed * change, (
                f"{name}: replayed from a graph, {wrong / change:.2e} of the change is another, "
                f"allowed {allowed}"
            )

    def error(self, name: str, found: torch.Tensor) -> float:
        """Of the picked rows of a site's y, [number of picks, N]: the norm of the term's error, as a share of
        the term's own.

        Raises:
            AssertionError: as of `check`.
        """
        picks = torch.from_numpy(self.picks).to(self.device)
        untouched = [i for i, t in enumerate(self.picks.tolist()) if self.slots[t] < 0]
        before = self.y[name][picks]
        assert torch.equal(found[untouched], before[untouched]), (
            f"{name}: a row without an adapter has changed"
        )
        return self.share(name, found.double() - before.double() - self.term(name), self.term(name))

    def share(self, name: str, wrong: torch.Tensor, term: torch.Tensor) -> float:
        """The norm of what is wrong as a share of the norm of the term.

        Raises:
            AssertionError: it is above the tolerance, or no number.
        """
        found = (wrong.norm() / term.norm()).item() if wrong.any() else 0.0
        allowed = TOLERANCE[self.dtype]
        assert found <= allowed, f"{name}: error {found:.2e} of the term, allowed {allowed}"
        return found

    def term(self, name: str) -> torch.Tensor:
        """What the adapters add at a site of the first layer to the picked rows: [number of picks, N],
        float64."""
        if name not in self._terms:
            self._terms[name] = self.term_of(name, self.layers[0][name])
        return self._terms[name]

    def term_of(self, name: str, pool: SitePool) -> torch.Tensor:
        """The same with a site's pool of any layer."""
        rows = []
        for t in self.picks.tolist():
            slot = int(self.slots[t])
            row = torch.zeros(pool.num_outputs, dtype=torch.float64, device=self.device)
            if slot >= 0:
                a, b = self.stacked_a(pool, slot).double(), self.stacked_b(pool, slot).double()
                h = torch.einsum("k,srk->sr", self.x[name][t].double(), a)
                parts = b.split(list(pool.widths), dim=1)
                row = SCALE * torch.cat([h[s] @ part for s, part in enumerate(parts)])
            rows.append(row)
        return torch.stack(rows)
