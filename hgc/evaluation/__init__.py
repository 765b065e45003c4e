"""How good a plan is: fidelity to the condition, distance to the uncached picture, work, time.

:func:`evaluate` makes pictures of held-out scenes with the pipeline as it is and with each plan,
from the same noise, and measures them. ``hgc demo`` and ``hgc eval`` are both made of it.
"""

from __future__ import annotations

from hgc.evaluation.candidate import Candidate, candidates
from hgc.evaluation.measure import Batch, Row, Settings, evaluate
from hgc.evaluation.models import ModelError, ModelShapes, load_shapes
from hgc.evaluation.tables import COLUMNS, to_csv, to_json, to_markdown

__all__ = [
    "COLUMNS",
    "Batch",
    "Candidate",
    "ModelError",
    "ModelShapes",
    "Row",
    "Settings",
    "candidates",
    "evaluate",
    "load_shapes",
    "to_csv",
    "to_json",
    "to_markdown",
]
