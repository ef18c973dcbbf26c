"""Attributes computed when first read."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

T = TypeVar("T")


class cached_property(functools.cached_property[T]):  # noqa: N801  as the one it stands for
    """`functools.cached_property` as it is from Python 3.12 on: without a lock.

    The lock of 3.11 is one for all instances, and a fork while another thread computes leaves it
    held in the child for ever. Without it two threads may compute one value twice, which must do
    no harm.
    """

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
        if instance is None:
            return self
        assert self.attrname is not None
        value = instance.__dict__[self.attrname] = self.func(instance)
        return value
