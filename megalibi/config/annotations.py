"""What a field's type says of it besides the type: ``steps: Said[int]``; identity.py collects it from all fields.

Every field of a section carries one of Fixed, Said and Free. A field that is not Free decides the weights, unless a
second annotation says more: ``seq_length: Annotated[Fixed[int], Decides.SAMPLES]``.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, TypeVar

_T = TypeVar("_T")


class OnResume(Enum):
    """What happens when a run resumes from a checkpoint with another value of a field."""

    FREE = "may change"
    """No step after the resume depends on the field. Which checkpoint that is, and whether its data may be other than
    this run's, is what ``checkpoint.resume`` and ``checkpoint.accept_other_data`` say."""
    SAID = "may change, and a line says so"
    """The losses change, in their last digits or by more, and that is what the user asks for."""
    FIXED = "may not change"
    """With another value the optimizer's state, the order of the data or the model would be another one."""


class Decides(Enum):
    """What the value of a field decides.

    The program asks for NO_WEIGHT alone: results of a study may differ in such fields. SAMPLES and TOPOLOGY say how a
    field decides the weights; tests read them and hold the fields to it. The topology of a manifest is another matter:
    it has the sizes of the groups, which no field of the configuration has, beside the stage of ZeRO.
    """

    NO_WEIGHT = "no weight"
    """Two runs that differ in the field alone have the same weights, bit for bit, if they began alike: both anew, or
    both from one checkpoint and on the same data. ``checkpoint.resume`` and ``checkpoint.accept_other_data`` choose
    that beginning; no step after it asks for them."""
    WEIGHTS = "the weights"
    """The field decides the network, its initial weights, or how a step changes them."""
    SAMPLES = "the samples of each step"
    """The field decides which samples of the training data each step reads, and with them the weights."""
    TOPOLOGY = "how ranks share the work"
    """The field decides what each rank holds and in which order sums are made: the weights' last digits alone."""


class Files(Enum):
    """How a field that names files is compared with another run's."""

    BY_CONTENT = "by content"
    """What the files hold is compared; where they stand may differ between hosts and runs."""


Fixed = Annotated[_T, OnResume.FIXED]
"""The type of a field that may not change when a run resumes."""
Said = Annotated[_T, OnResume.SAID]
"""The type of a field that may change when a run resumes; a line of the log names both values."""
Free = Annotated[_T, OnResume.FREE, Decides.NO_WEIGHT]
"""The type of a field that may change when a run resumes, and on which no step after the resume depends."""
