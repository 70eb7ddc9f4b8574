"""The one exception for what a user got wrong."""


class ConfigError(ValueError):
    """A value the user gave cannot be used.

    The message is one line: field, value, what is allowed. The command line prints it and exits with code 2.
    """
