"""Names that may have been meant by a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def close_names(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Finds the names that are most like a given one, whatever the case of their letters.

    Args:
        name: The name as given.
        names: All names that there are.
        count: Largest number of names to return.

    Returns:
        The names that differ in case alone; if there are none, those that are spelt alike or
        contain the given one, the most similar first.

    Examples:
        >>> close_names("cifar10", ["CIFAR10", "CIFAR100"])
        ['CIFAR10']
        >>> close_names("colour", ["colors", "flavor"])
        ['colors']
    """
    known = list(dict.fromkeys(names))
    if same := [each for each in known if each.lower() == name.lower()]:
        return same[:count]
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=count)
    containing = [each for each in by_lower if len(name) > 2 and name.lower() in each]
    return [by_lower[each] for each in close or containing[:count]]


def did_you_mean(name: str, names: Iterable[str], count: int = 3) -> str:
    """Writes a question about the names that may have been meant; empty if there are none.

    Args:
        name: The name as given.
        names: All names that there are.
        count: Largest number of names in the question.

    Examples:
        >>> did_you_mean("fti", ["fit", "test"])
        'Did you mean fit?'
    """
    close = close_names(name, names, count)
    return f"Did you mean {' or '.join(close)}?" if close else ""
