"""Every family of trained routers by its name. Knows nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from composer.routing.families.blend import Blend
from composer.routing.families.category import Category
from composer.routing.families.clusters import Clusters
from composer.routing.families.kernel import Kernel
from composer.routing.families.margin import Margin
from composer.routing.families.neighbours import Neighbours
from composer.routing.families.predictor import Predictor
from composer.routing.families.skills import Skills
from composer.routing.family import Family

FAMILIES: Mapping[str, type[Family]] = {
    family.name: family
    for family in (Neighbours, Clusters, Predictor, Kernel, Category, Skills, Margin, Blend)
}
