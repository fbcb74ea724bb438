"""pymoo's problem class: in a module of its own, so that workers that are fresh interpreters find it by name."""

from __future__ import annotations

from typing import Any

from pymoo.core.problem import ElementwiseProblem

from compat.consumers.tasks import sphere


class Sphere(ElementwiseProblem):  # type: ignore[misc]
    """Two variables, one objective."""

    def __init__(self, **options: Any) -> None:
        super().__init__(n_var=2, n_obj=1, xl=-5, xu=5, **options)

    def _evaluate(self, x: Any, out: Any, *_: Any, **__: Any) -> None:
        out["F"] = sphere(x)
