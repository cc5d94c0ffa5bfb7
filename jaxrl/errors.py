"""The one exception that entry points turn into a single line instead of a traceback."""

import traceback


class UserError(ValueError):
    """Bad input or configuration. The message names the key, or the file and line, and what would be valid."""


def located(error: BaseException, path: str) -> str:
    """The error in one line; with file and line number if it was raised in the file at `path`."""
    cause: BaseException | None = error
    while cause:
        lines = [frame.lineno for frame in traceback.extract_tb(cause.__traceback__) if frame.filename == path]
        if lines:
            return f"{path}:{lines[-1]}: {type(cause).__name__}: {' '.join(str(cause).split())}"
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())
