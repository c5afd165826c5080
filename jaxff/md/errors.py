"""What stops a simulation that has begun."""

from jaxff.errors import JaxffError


class SimulationError(JaxffError):
    """A simulation that can't go on: it exploded, gave NaN, or its output folder is taken."""
