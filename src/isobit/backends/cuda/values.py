"""Where the values of a program lie: in slots, which are free again when nothing reads them.

A :class:`Slot` says how many words it needs for a row; it becomes an address when the plan
(programs.py) has found what all of them take.
"""

from collections.abc import Mapping

import numpy as np

from isobit.backends.base.workspace import BATCH, Slots
from isobit.backends.cuda.device.protocol import Gpu
from isobit.backends.cuda.workspace import BufferView, Slot
from isobit.model.graph import Value


class Values(Slots[Slot]):
    """The values of one program that have been made so far, and the memory of all."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(Slot)
        self.gpu = gpu
        self.places: dict[Value, BufferView] = {}
        self.lasting = (0, 0)
        """Where the slots begin that last, and how many bytes they take."""
        self._forms: dict[tuple[Value, str], Slot] = {}

    def fixed(
        self,
        name: str,
        words: int,
        rows: str = BATCH,
        *,
        zero: bool = False,
        lasting: bool = False,
    ) -> Slot:
        """Memory that nothing else ever uses; see :class:`Slot`."""
        slot = super().fixed(name, words, rows)
        slot.zero, slot.lasting, slot.own = zero, lasting, True
        return slot

    def put(self, value: Value, place: BufferView) -> None:
        """A value lies there."""
        self.places[value] = place
        self.keep(value, place.slot)

    def new(self, value: Value) -> Slot:
        """A slot for a value alone."""
        shape = value.shape
        slot = self.slot(value.name or "value", shape.width, shape.rows)
        self.put(value, BufferView(slot, shape.width, shape.row[-1]))
        return slot

    def new_lasting(self, value: Value) -> Slot:
        """A slot for a value alone, which nothing else ever uses."""
        shape = value.shape
        slot = self.fixed(value.name or "value", shape.width, shape.rows, lasting=True)
        self.put(value, BufferView(slot, shape.width, shape.row[-1]))
        return slot

    def form(self, of: Value, name: str, words: int = 0, more: int = 0) -> Slot:
        """Another form of a value, which lasts as long: what a launch leaves there."""
        slot = self.slot(name, words, of.shape.rows, more)
        self._forms[of, name] = slot
        self.keep(of, slot)
        return slot

    def formed(self, of: Value, name: str) -> Slot | None:
        """A form of a value, if it was made."""
        return self._forms.get((of, name))

    def same(self, value: Value, of: Value) -> None:
        """A value is another one, in all its forms."""
        self.put(value, self.places[of])
        for (other, name), slot in list(self._forms.items()):
            if other is of:
                self._forms[value, name] = slot
                self.keep(value, slot)

    def nbytes(self, rows: Mapping[str, int], *, own: bool) -> int:
        """Of the slots that keep something between passes, or of all others, with so many rows of
        each kind."""
        return sum(slot.nbytes(rows) for slot in self.slots if slot.own == own)

    def allocate(self, rows: Mapping[str, int], shared: int) -> None:
        """Give every slot its address; ``shared``: where those begin that keep nothing between
        passes, so that other programs may use the same memory."""
        own = self.gpu.allocate(self.nbytes(rows, own=True))
        lasting = sum(slot.nbytes(rows) for slot in self.slots if slot.lasting)
        self.lasting = own, lasting
        for slot in sorted(self.slots, key=lambda slot: not slot.lasting):
            if slot.own:
                slot.address, own = own, own + slot.nbytes(rows)
            else:
                slot.address, shared = shared, shared + slot.nbytes(rows)
            if slot.zero:
                self.gpu.upload(slot.address, np.zeros(slot.nbytes(rows) // 4, np.int32))
