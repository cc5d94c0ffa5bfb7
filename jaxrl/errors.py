"""The one exception that entry points turn into a single line instead of a traceback."""


class UserError(ValueError):
    """Bad input or configuration. The message names the key, or the file and line, and what would be valid."""
