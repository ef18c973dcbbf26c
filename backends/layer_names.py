"""Which layer a weight is of, by the name that files give it: for options that count layers.

How tensors are split is never decided by names; see backends/meta.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_LAYER = re.compile(r"blk\.(\d+)\.")


def layer_of(names: Iterable[str]) -> int | None:
    """The last layer that any of these weights is of; None: of none."""
    found = map(_LAYER.match, names)
    return max((int(match[1]) for match in found if match), default=None)
