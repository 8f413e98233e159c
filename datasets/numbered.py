"""Sequences whose items are made when they are asked for, by their number."""

from abc import abstractmethod
from collections.abc import Sequence
from operator import index
from typing import Any, ClassVar, TypeVar, overload

Item = TypeVar("Item", covariant=True)


class Numbered(Sequence[Item]):
    """A sequence of which a subclass makes the k-th item; a slice gives a list of them."""

    noun: ClassVar[str]
    """What an item is called in an error."""

    @abstractmethod
    def item(self, k: int) -> Item:
        """Make item k, from 0 to below the length."""

    @overload
    def __getitem__(self, item: int) -> Item: ...
    @overload
    def __getitem__(self, item: slice) -> list[Item]: ...
    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, slice):
            return [self[k] for k in range(*item.indices(len(self)))]
        k = index(item)
        if k < 0:
            k += len(self)
        if not 0 <= k < len(self):
            raise IndexError(f"{self.noun} {item} does not exist; there are {len(self)}.")
        return self.item(k)
