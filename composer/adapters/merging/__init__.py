"""Every way of merging adapters by its name. Knows nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from composer.adapters.merging.arithmetic import Arithmetic
from composer.adapters.merging.base import Method
from composer.adapters.merging.cat import Cat
from composer.adapters.merging.lego import Lego
from composer.adapters.merging.svd import Svd
from composer.adapters.merging.twin import Twin

METHODS: Mapping[str, type[Method]] = {
    method.name: method for method in (Cat, Svd, Arithmetic, Lego, Twin)
}
