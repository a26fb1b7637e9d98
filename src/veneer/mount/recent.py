"""A bounded map that keeps what was used recently, at no cost for a hit."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Two generations: what is used moves to the young one; when that is full, the old one is dropped whole.

    Holds between ``limit`` and ``2 * limit`` of the entries used last. Callers in a hurry read ``young`` themselves, one
    dictionary lookup without a lock, and call ``get`` when that misses. Values are dropped, never closed: whoever still
    uses one keeps it alive, and it closes itself with its last reference.
    """

    __slots__ = ("_limit", "_lock", "_old", "young")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self.young: dict[K, V] = {}
        self._old: dict[K, V] = {}

    def get(self, key: K) -> V | None:
        value = self.young.get(key)
        if value is None:
            value = self._old.get(key)
            if value is not None:
                self.put(key, value)
        return value

    def __contains__(self, key: K) -> bool:
        return self.get(key) is not None

    def put(self, key: K, value: V) -> None:
        with self._lock:
            if len(self.young) >= self._limit and key not in self.young:
                self._old, self.young = self.young, {}
            self.young[key] = value

    def drop(self, key: K) -> None:
        with self._lock:
            self.young.pop(key, None)
            self._old.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self.young, self._old = {}, {}

    def values(self) -> list[V]:
        with self._lock:
            return [*self.young.values(), *self._old.values()]

    def keys(self) -> list[K]:
        with self._lock:
            return [*self.young, *(k for k in self._old if k not in self.young)]
