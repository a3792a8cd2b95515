"""Named errors. Every message says what is wrong and what to do next."""

from __future__ import annotations


class KunserveError(Exception):
    """Base of all errors that kunserve raises on purpose."""


class ConfigError(KunserveError):
    """A flag or a combination of flags cannot work. The command line exits with 2."""


class ModelNotSupportedError(KunserveError):
    """The checkpoint uses an architecture or an option that is not implemented."""


class ModelLoadError(KunserveError):
    """The checkpoint is missing, unreadable, incomplete or of another shape than its config."""


class InvalidRequestError(KunserveError):
    """A request can never be served as it stands (HTTP 400).

    Attributes:
        param: name of the offending request field, or None.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestTooLargeError(InvalidRequestError):
    """The request can never fit the model's context or the KVCache of a whole instance."""


class QueueFullError(KunserveError):
    """The bounded queue is full (HTTP 503 with Retry-After)."""


class ServiceUnavailableError(KunserveError):
    """No instance can take the request now: starting, draining or dead (HTTP 503)."""


class InstanceFailedError(KunserveError):
    """An instance process failed to start or died."""


class LayoutError(KunserveError):
    """A layout breaks one of its laws."""


class AccountingError(KunserveError):
    """Pages, blocks or leases no longer add up: a defect of kunserve, never of its input."""
