"""kunserve: an LLM server that answers memory overload by dropping replicated parameters."""

from kunserve.version import VERSION as __version__

__all__ = ["__version__"]
