"""The error of a command line that cannot be carried out."""


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says what to change."""
