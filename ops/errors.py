"""Errors a person can act on: every message names what is wrong and what to do."""


class Error(Exception):
    """Base of all errors this package raises on purpose; the CLI prints them as one line."""


class OpError(Error, ValueError):
    """An op was given shapes, types or attributes it cannot take."""


class FileError(Error, ValueError):
    """A model file is damaged, truncated, or not what it claims to be."""


class ModelError(Error, ValueError):
    """A model needs something this package does not have, or contradicts itself."""


class TextError(Error, ValueError):
    """A vocabulary, chat template or sampling option cannot be used."""


class MemoryLimitError(Error, ValueError):
    """A context, batch or cache does not fit."""


class BackendError(Error, RuntimeError):
    """A device, kernel or instruction set is missing or failed."""


class OptionError(Error, ValueError):
    """An option or environment variable has a value that cannot be used."""
