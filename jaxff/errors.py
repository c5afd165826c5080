"""What jaxff raises when the input is at fault. Each message says what was expected and what came.

All are ValueErrors; the command line turns any of them into one line and exit code 2.
"""


class JaxffError(ValueError):
    """Base of all errors that bad input causes."""


class StructureError(JaxffError):
    """A structure that the model can't or must not evaluate."""


class CheckpointError(JaxffError):
    """A file that isn't a usable checkpoint."""


class HostileCheckpointError(CheckpointError):
    """A file whose pickle asks for something that acts; nothing in it was run."""


class ConfigError(JaxffError):
    """A setting that is unknown, missing or out of range."""


class SimulationError(JaxffError):
    """A simulation that can't go on: it exploded, gave NaN, or its output folder is taken."""


class DataError(JaxffError):
    """Training data that can't be used: unreadable, of wrong shapes or units, or with labels that aren't plausible."""


class LabelError(DataError):
    """A label that the teacher couldn't make: its SCF didn't converge, atoms lie on each other, it gave NaN."""


class TrainingError(JaxffError):
    """A training run that can't start, go on or be resumed: its folder is taken, it diverged, the model is another."""
