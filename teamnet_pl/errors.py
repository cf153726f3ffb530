"""The error that a user of the package can cause and mend."""


class TeamNetError(ValueError):
    """Something that the user gave is wrong; the message says what, and what to do about it.

    The command line prints the message alone. Any other error is a defect, and keeps its traceback,
    but for those of the operating system, such as of a file that is missing.
    """


def underlying_error(error: BaseException | None) -> BaseException | None:
    """Finds the error that jsonargparse wrapped in a longer one.

    It is an error of this package, that of a file that is missing, or that of a library that is not
    installed.
    """
    kinds = (FileNotFoundError, ModuleNotFoundError, TeamNetError)
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__
    return error
