"""Pictures in bulk: a table of conditions and texts in, a data set out.

:func:`hgc.generate` is the whole of it; ``hgc generate`` is the same on the command line. The unit
is a shard, a fixed slice of the table: one file of the output, made by one worker, there whole or
not at all. What is finished is what a run need not do again, whichever engine made it.
"""

from __future__ import annotations

from hgc.generation.api import Progress, Summary, generate
from hgc.generation.items import GenerateError

__all__ = ["GenerateError", "Progress", "Summary", "generate"]
