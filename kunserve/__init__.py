"""kunserve: an LLM server that answers memory overload by dropping replicated parameters."""

from kunserve.version import VERSION

__version__ = VERSION

__all__ = ["__version__"]
