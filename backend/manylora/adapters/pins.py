"""Which adapters are pinned on both levels, and which are to be pinned as soon as possible."""

from __future__ import annotations

from manylora.adapters.adapter import Adapter, Stage
from manylora.adapters.reasons import quote
from manylora.adapters.versions import Versions
from manylora.errors import InvalidArgumentError, UnavailableError


class Pins:
    """A pin belongs to a name: it passes from one version to the next. Pins leave room for others."""

    def __init__(self, versions: Versions) -> None:
        self._versions = versions
        self._host = versions.host
        self._residents = versions.residents
        self.due = versions.pins_due
        """Adapters to be pinned as soon as they are loaded and the device has room."""

    @property
    def count(self) -> int:
        """Pins in force and due."""
        return self._host.num_pinned + len(self.due)

    def leave_slot_for(self, name: str) -> bool:
        """Whether an absent adapter can ever get a host slot."""
        # Pins that are due count as well: whoever waits for their slot could wait for ever.
        return name in self.due or self.count < self._host.max_entries

    def pin(self, name: str) -> None:
        """See `Registry.pin`."""
        adapter = self._versions.current.get(name)
        if adapter is None or adapter.stage is not Stage.READY:
            raise UnavailableError(f"adapter {quote(name)} is not loaded: it cannot be pinned")
        if adapter.is_pinned:
            return
        assert adapter.weights is not None, f"{adapter} is ready without its weights"
        if self.count + 1 >= self._host.max_entries or not self._residents.leaves_room_beside_pinned(
            adapter.weights
        ):
            num_pages = self._residents.pool.largest_pages[0]
            raise UnavailableError(
                f"adapter {name!r} cannot be pinned: others need a host slot and {num_pages} device pages of "
                "each kind beside the pinned ones"
            )
        if not self._try_pin(adapter):
            raise UnavailableError(f"adapter {name!r} cannot be pinned now: the device pool is in use")

    def unpin(self, name: str) -> None:
        """See `Registry.unpin`."""
        if name in self.due:
            self.due.remove(name)
            return
        adapter = self._versions.current.get(name)
        if adapter is None or not adapter.is_pinned:
            raise InvalidArgumentError(f"adapter {quote(name)} is not pinned")
        adapter.is_pinned = False

    def try_due(self, name: str) -> None:
        """Bring a pin into force, if its adapter is loaded and the device has room."""
        adapter = self._versions.current.get(name)
        if adapter is None or adapter.stage is not Stage.READY or not self._try_pin(adapter):
            return
        self.due.remove(name)
        # Those that no longer fit would wait for ever. None is active, or the pinned one had not found room.
        for other in list(self._versions):
            if (
                other.weights is not None
                and not other.is_pinned
                and not self._residents.fits_beside_pinned(other.weights)
            ):
                self._versions.expel(other)

    def _try_pin(self, adapter: Adapter) -> bool:
        adapter.is_pinned = adapter.is_pinned or self._residents.try_place(adapter)
        return adapter.is_pinned
