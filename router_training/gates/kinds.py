"""Every kind of gate by its name. Knows nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from router_training.gates.base import GateKind
from router_training.gates.phatgoose import Glider, Phatgoose
from router_training.gates.softmax import Softmax
from router_training.gates.untrained import Arrow, Fixed
from router_training.gates.xlora import Xlora

KINDS: Mapping[str, type[GateKind]] = {
    kind.name: kind for kind in (Arrow, Fixed, Phatgoose, Glider, Softmax, Xlora)
}
