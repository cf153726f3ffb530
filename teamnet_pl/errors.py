"""The error that a user of the package can cause and mend."""


class TeamNetError(ValueError):
    """Something that the user gave is wrong; the message says what, and what to do about it.

    The command line prints the message alone. Any other error is a defect, and keeps its traceback,
    but for those of the operating system, such as of a file that is missing.
    """
