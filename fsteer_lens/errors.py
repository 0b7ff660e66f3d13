"""Everything that `fsteer_lens` raises on purpose.

    FsteerError
    ├── InputError            a value that cannot be used as given (also a ValueError)
    │   ├── ShapeError        a tensor of the wrong width or rank
    │   ├── NonFiniteError    NaN or infinity where numbers are needed
    │   ├── DataError         a contrast set or data file that cannot be read or fitted
    │   └── ContextLengthError  a prompt (or prompt and answer) longer than the model's context
    ├── SiteError             a layer or hook point that the model does not have
    ├── TokenizerError        a tokenizer that lacks what is asked of it
    ├── HookError             a hook that never fired, fired on something ambiguous, or was used twice
    ├── MismatchError         an artefact that belongs to another model
    ├── FileFormatError       a file that is not one of ours, or is damaged
    └── MissingDependencyError  an optional package or model class that is not installed

Each message says what was expected, what came, and how to mend it.
"""

from typing import Any


class FsteerError(Exception):
    """Base of all errors of this package.

    The message reads "{problem}: expected {expected}, got {got}. {fix}"; parts that are not given are left out.
    """

    def __init__(self, problem: str, *, expected: Any = None, got: Any = None, fix: str | None = None) -> None:
        parts = [f"{word} {value}" for word, value in (("expected", expected), ("got", got)) if value is not None]
        message = f"{problem}: {', '.join(parts)}" if parts else problem
        super().__init__(f"{message.rstrip('.')}. {fix}" if fix else message)
        self.problem, self.expected, self.got, self.fix = problem, expected, got, fix


class InputError(FsteerError, ValueError):
    """A value that cannot be used as given."""


class ShapeError(InputError):
    """A tensor of the wrong width or rank."""


class NonFiniteError(InputError):
    """NaN or infinity where numbers are needed."""


class DataError(InputError):
    """A contrast set or a data file that cannot be read or fitted."""


class ContextLengthError(InputError):
    """A prompt, or a prompt with its answer, that is longer than the model's context."""


class SiteError(FsteerError):
    """A layer or a hook point that the model does not have."""


class TokenizerError(FsteerError):
    """A tokenizer that lacks what is asked of it."""


class HookError(FsteerError):
    """A hook that never fired, met an ambiguous forward pass, or was used out of order."""


class MismatchError(FsteerError):
    """An artefact that was fitted on another model, layer or site."""


class FileFormatError(FsteerError):
    """A file that this package did not write, or that is damaged."""


class MissingDependencyError(FsteerError):
    """An optional package, or a model class, that is not installed."""
