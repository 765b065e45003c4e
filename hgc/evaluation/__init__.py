"""How good a plan is: fidelity to the condition, distance to the uncached picture, work, time.

:func:`evaluate` makes pictures of held-out scenes, or of a folder of pictures with another
checkpoint (:class:`Folder`), with the pipeline as it is and with each plan, from the same noise,
and measures them. ``hgc demo`` and ``hgc eval`` are both made of it.
"""

from __future__ import annotations

from hgc.evaluation.candidate import Candidate, candidates
from hgc.evaluation.folder import DataError, Folder
from hgc.evaluation.measure import Batch, evaluate
from hgc.evaluation.metrics import flip, relative_l2
from hgc.evaluation.models import ModelError, ModelShapes, load_folder, load_shapes
from hgc.evaluation.pictures import AMPLIFIED, FLIP_LIGHTEST, difference, visible
from hgc.evaluation.rows import Row
from hgc.evaluation.settings import Settings
from hgc.evaluation.subject import SCHEDULERS, Subject, Testbed, make_scheduler
from hgc.evaluation.tables import COLUMNS, caption, columns, to_csv, to_json, to_markdown

__all__ = [
    "AMPLIFIED",
    "COLUMNS",
    "FLIP_LIGHTEST",
    "SCHEDULERS",
    "Batch",
    "Candidate",
    "DataError",
    "Folder",
    "ModelError",
    "ModelShapes",
    "Row",
    "Settings",
    "Subject",
    "Testbed",
    "candidates",
    "caption",
    "columns",
    "difference",
    "evaluate",
    "flip",
    "load_folder",
    "load_shapes",
    "make_scheduler",
    "relative_l2",
    "to_csv",
    "to_json",
    "to_markdown",
    "visible",
]
