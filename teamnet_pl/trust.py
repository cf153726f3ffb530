"""The rule for values that come from a file: none of them may name code or an address.

Checkpoints and Hub folders hold plain values: the backbone, the data and the transforms. Some
values would run code or reach the network when they are used: import paths, class paths, ``pipe:``
and remote addresses. Such a value is refused, unless the user trusts the file or gives the same
value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import yaml

from teamnet_pl.backbones.create import has_source
from teamnet_pl.errors import TeamNetError

_DATA_CLASS = re.compile(r"teamnet_pl\.data\.[A-Za-z]\w*")
_TRANSFER_KIND = re.compile(r"teamnet_pl\.cooperation\.(kinds\.)?[A-Za-z]\w*")
_NET = re.compile(r"teamnet_pl\.((elastic|baselines)\.([a-z_]+\.)?)?[A-Z]\w*")
_TRANSFORM_CLASS = re.compile(r"torchvision\.transforms\.v2\.[A-Za-z]\w*")
_TRANSFORM_FIELDS = ("train_transform", "extra_transform")
_WORD = re.compile(r"[\w-]*")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")  # of a path on Windows


@contextmanager
def errors_naming(source: object) -> Iterator[None]:
    """Makes each error name the file whose values are being used.

    Args:
        source: The file.

    Raises:
        TeamNetError: In place of any other error, since bad arguments make constructors raise
            errors of any class. The error of a missing module is kept, and so is an error that
            names the file already.
    """
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError | ValueError) and str(source) in str(error):
            raise
        kind = "" if isinstance(error, ValueError) else f" ({type(error).__name__})"
        raise TeamNetError(f"{source} cannot be used{kind}: {error}") from error


class Trust:
    """Decides which values of a file are allowed.

    Args:
        source: The file, for messages.
        trust_import: Whether its values may name code and addresses.
        given: Values given by the user, by their dotted name, such as ``model.a.name``: the same
            value in the file is allowed.
    """

    def __init__(
        self,
        source: object,
        trust_import: bool = False,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self.source = source
        self.trust_import = trust_import
        self.given = given or {}

    def check_backbone(self, key: str, name: object) -> None:
        """Refuses a backbone that does not belong to this package, torchvision or timm.

        Args:
            key: Dotted name of the value.
            name: Name of the backbone.

        Raises:
            TeamNetError: If the name is an import path that is not trusted, or not a text.
        """
        if not isinstance(name, str):
            raise TeamNetError(f"{self.source}: {key} must be a text, found {name!r}.")
        if not has_source(name):
            self._refuse(key, name, f"the backbone {name} by its import path, which runs code")

    def check_net(self, key: str, name: object) -> None:
        """Refuses a class of nets of several depths that does not belong to this package.

        Args:
            key: Dotted name of the value.
            name: Import path of the class; None for the default.

        Raises:
            TeamNetError: If it is an import path that is not trusted.
        """
        if name is not None and not (isinstance(name, str) and _NET.fullmatch(name)):
            self._refuse(key, name, f"the net {name} by its import path, which runs code")

    def check_plain(self, key: str, value: object) -> None:
        """Refuses values that would become objects.

        Args:
            key: Dotted name of the value.
            value: An argument of a team or a data module.

        Raises:
            TeamNetError: If a value is not plain, or is a mapping with a ``class_path`` or a text
                that parses as a list or a mapping.
        """
        if isinstance(value, Mapping):
            if "class_path" in value:
                name = value["class_path"]
                if not isinstance(name, str) or not _TRANSFER_KIND.fullmatch(name):
                    self._refuse(f"{key}.class_path", name, f"the class {name}, which runs code")
            for name, inner in value.items():
                if not isinstance(name, str):
                    raise TeamNetError(
                        f"{self.source}: {key} has a name that is not a text: {name}."
                    )
                self.check_plain(f"{key}.{name}", inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                self.check_plain(key, inner)
        elif isinstance(value, str):
            try:
                nested = isinstance(yaml.safe_load(value), list | dict)
            except yaml.YAMLError:
                nested = False
            if nested:
                self._refuse(key, value, f"a list or mapping as the text {value!r}")
        elif not isinstance(value, int | float | bool | None):
            raise TeamNetError(
                f"{self.source}: {key} must be a plain value, found a {type(value).__name__}."
            )

    def check_data(self, data: object) -> None:
        """Refuses a data module that is not of this package, and addresses in its arguments.

        Args:
            data: A mapping of ``class_path`` and ``init_args``.

        Raises:
            TeamNetError: If ``data`` is not of that form, or names something that is not trusted.
        """
        if not isinstance(data, Mapping) or not data.keys() <= {"class_path", "init_args"}:
            raise TeamNetError(
                f"{self.source}: data must be a mapping of class_path and init_args, found {data}."
            )
        name, arguments = data.get("class_path"), data.get("init_args", {})
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise TeamNetError(
                f"{self.source}: data must have a text as class_path and a mapping as init_args, "
                f"found {name!r} and {arguments!r}."
            )
        if not _DATA_CLASS.fullmatch(name):
            self._refuse("data.class_path", name, f"the data module {name}, which runs code")
        for field, value in arguments.items():
            key = f"data.init_args.{field}"
            if field in _TRANSFORM_FIELDS:
                self.check_transforms(key, value)
            else:
                self.check_plain(key, value)
                self._check_addresses(key, value)

    def check_transforms(self, key: str, value: object) -> None:
        """Refuses transforms other than torchvision's, and functions as their arguments.

        Args:
            key: Dotted name of the value.
            value: None, a transform as ``class_path`` and ``init_args``, or a list of them.

        Raises:
            TeamNetError: If ``value`` is not of that form, or names something that is not trusted.
        """
        if isinstance(value, Mapping):
            for name, inner in value.items():
                if name == "class_path" and isinstance(inner, str):
                    if not _TRANSFORM_CLASS.fullmatch(inner):
                        self._refuse(key, inner, f"the transform {inner}, which runs code")
                else:
                    self.check_transforms(f"{key}.{name}", inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                self.check_transforms(key, inner)
        elif isinstance(value, str) and not _WORD.fullmatch(value):
            # An import path of a function or class, or a file with one.
            self._refuse(key, value, f"{value!r} as an argument of a transform")
        elif not isinstance(value, str | int | float | bool | None):
            raise TeamNetError(
                f"{self.source}: {key} must be a plain value, found a {type(value).__name__}."
            )

    def _check_addresses(self, key: str, value: object) -> None:
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, Sequence) and not isinstance(value, str):
            for inner in value:
                self._check_addresses(key, inner)
        elif isinstance(value, str) and ":" in _DRIVE.sub("", value):
            self._refuse(key, value, f"the address {value}")

    def _refuse(self, key: str, value: object, name: str) -> None:
        if self.trust_import or (key in self.given and self.given[key] == value):
            return
        raise TeamNetError(
            f"{self.source} names {name} ({key}). If you trust the file as you trust code, pass "
            "--trust_import true (in Python: trust_import=True), or give the same value yourself."
        )
