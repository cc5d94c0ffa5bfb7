"""The one exception that entry points turn into a single line instead of a traceback."""

import traceback


class UserError(ValueError):
    """Bad input or configuration. The message names the key, or the file and line, and what would be valid."""


def located(error: BaseException, path: str) -> str:
    """What happened, in one line; if in the file at `path`, where in it."""
    cause: BaseException | None = error
    while cause:
        lines = [frame.lineno for frame in traceback.extract_tb(cause.__traceback__) if frame.filename == path]
        if lines:
            return f"{path}:{lines[-1]}: {type(cause).__name__}: {' '.join(str(cause).split())}"
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())
