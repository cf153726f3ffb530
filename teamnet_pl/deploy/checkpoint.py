"""The one reader of a team's checkpoint: all that a trained net needs, read once.

Lightning is imported only for what belongs to training: the arguments of the team, and the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from teamnet_pl import data as data_modules
from teamnet_pl.checkpoints import load_checkpoint, weights_digest
from teamnet_pl.cooperation.configs import TeammateConfig
from teamnet_pl.cooperation.report import Report, report_files
from teamnet_pl.cooperation.restoring import (
    RUN_KEY,
    checked_extra_teammates,
    restore_arguments,
    restore_config,
    restore_member,
    team_content,
)
from teamnet_pl.data.preprocessing import PreprocessingConfig
from teamnet_pl.errors import TeamNetError, underlying_error
from teamnet_pl.settings import check_settings
from teamnet_pl.trust import Trust, errors_naming

if TYPE_CHECKING:
    from teamnet_pl.data import ImageDataModule


def restore_preprocessing(values: object, trust: Trust) -> PreprocessingConfig:
    """Restores the preprocessing from the plain values in a file.

    Args:
        values: The fields of `PreprocessingConfig`.
        trust: Whether the values may name transforms that are not torchvision's.

    Raises:
        TeamNetError: If the values do not fit the fields or are not trusted.
    """
    transform: Any = None
    if isinstance(values, Mapping):
        # Checked apart from the others, since it names classes.
        transform = values.get("transform")
        trust.check_transforms("preprocessing.transform", transform)
        values = {name: value for name, value in values.items() if name != "transform"}
    config = restore_config(PreprocessingConfig, "preprocessing", values, trust)
    with errors_naming(trust.source):
        return replace(config, transform=transform)


def check_classes(source: object, classes: object, num_classes: int) -> None:
    """Checks the names of the classes in a file.

    Args:
        source: The file, for messages.
        classes: None, or a list with the name of each class.
        num_classes: Number of classes.

    Raises:
        TeamNetError: If it is neither.
    """
    if classes is None:
        return
    if (
        not isinstance(classes, list)
        or not all(isinstance(name, str) for name in classes)
        or len(classes) != num_classes
    ):
        raise TeamNetError(
            f"{source}: classes must be the names of {num_classes} classes, found {classes!r}."
        )


def make_data_module(config: Mapping[str, Any], source: object) -> ImageDataModule:
    """Makes a data module, without reading any data yet.

    Args:
        config: Its ``class_path`` and ``init_args``.
        source: The file of the config, for messages.

    Raises:
        TeamNetError: If it cannot be made.
    """
    from teamnet_pl.data import ImageDataModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data", required=True)
    try:
        module: ImageDataModule = parser.instantiate(parser.parse_object({"data": config})).data
    except (ArgumentError, ValueError) as error:
        reason = underlying_error(error) or error
        raise TeamNetError(
            f"The data module that {source} names cannot be made: {reason}"
        ) from error
    return module


@dataclass(frozen=True)
class SavedTeam:
    """The content of a checkpoint.

    Attributes:
        path: The file.
        trust: What the values in the file may name.
        hyper_parameters: The arguments of the `Team`, as plain values.
        weights: The weights by name, on the CPU.
        preprocessing: How images become the input of the nets; None if the file does not say.
        classes: Names of the classes, in the order of the labels; None if the file does not say.
        run: The other values about the run in the file, unchecked.
    """

    path: Path
    trust: Trust
    hyper_parameters: dict[str, Any]
    weights: dict[str, Tensor]
    preprocessing: PreprocessingConfig | None
    classes: list[str] | None
    run: Mapping[str, Any]

    @classmethod
    def read(
        cls,
        path: str | Path,
        trust_import: bool = False,
        given: Mapping[str, Any] | None = None,
        map_location: str = "cpu",
    ) -> SavedTeam:
        """Reads a checkpoint without running any code in it.

        Args:
            path: The file.
            trust_import: Whether its values may name code and addresses. Allow this only for a file
                that you trust as you trust code.
            given: Values that the user gave, by their dotted name. The same values in the file are
                trusted.
            map_location: Device that the weights are loaded to.

        Raises:
            FileNotFoundError: If there is no such file.
            TeamNetError: If the file is not a checkpoint of a team, or is damaged.
        """
        trust = Trust(path, trust_import, given)
        checkpoint = load_checkpoint(path, map_location)
        values, weights = team_content(path, checkpoint)
        run = checkpoint.get(RUN_KEY, {})
        if not isinstance(run, Mapping):
            raise TeamNetError(f"{path}: {RUN_KEY} must be a mapping, found {run!r}.")
        preprocessing = run.get("preprocessing")
        if preprocessing is not None:
            preprocessing = restore_preprocessing(preprocessing, trust)
        classes = run.get("classes")
        check_classes(path, classes, values["num_classes"])
        return cls(Path(path), trust, values, weights, preprocessing, classes, run)

    def arguments(self) -> dict[str, Any]:
        """Restores the arguments of the `Team`, without the files of pretrained weights.

        Raises:
            TeamNetError: If a value does not fit or is not trusted.
        """
        from teamnet_pl.cooperation.team import Team

        return restore_arguments(Team, self.hyper_parameters, self.trust)

    @property
    def teammates(self) -> dict[str, Any]:
        """The plain values of each Teammate's config, by the Teammate's name.

        Raises:
            TeamNetError: If ``extra_teammates`` in the file is not a mapping.
        """
        first_two = {"a": self.hyper_parameters["a"], "b": self.hyper_parameters["b"]}
        teammates = first_two | self._extra_teammates
        return {name: values for name, values in teammates.items() if values}

    @property
    def _extra_teammates(self) -> dict[str, Any]:
        return checked_extra_teammates(self.path, self.hyper_parameters.get("extra_teammates"))

    def teammate(self, name: str) -> TeammateConfig:
        """Restores the config of a Teammate, without the file of pretrained weights.

        Args:
            name: Name of the Teammate, such as ``a``.

        Raises:
            TeamNetError: If there is no such Teammate, or a value does not fit or is not trusted.
        """
        teammates = self.teammates
        if name not in teammates:
            names = ", ".join(map(str, teammates))
            raise TeamNetError(f"The team in {self.path} has the Teammates {names}; found {name}.")
        group = "model.extra_teammates" if name in self._extra_teammates else "model"
        return restore_member(TeammateConfig, f"{group}.{name}", teammates[name], self.trust)

    def data(self) -> dict[str, Any] | None:
        """Returns the data module as ``class_path`` and ``init_args``; None if the file has none.

        The data is downloaded only if the user trusts the file or gave ``download`` themselves.

        Raises:
            TeamNetError: If the entry does not have this form, or names something that is not
                trusted.
        """
        from teamnet_pl.data.downloads import DownloadedImages
        from teamnet_pl.data.hugging_face import HuggingFace

        data = self.run.get("data")
        if data is None:
            return None
        self.trust.check_data(data)
        arguments = dict(data.get("init_args", {}))
        kind = getattr(data_modules, data["class_path"].rpartition(".")[2], None)
        downloads = isinstance(kind, type) and issubclass(kind, DownloadedImages | HuggingFace)
        asked = self.trust.given.get("data.init_args.download") is True
        if downloads and not self.trust.trust_import and not asked:
            arguments["download"] = False
        return {"class_path": data["class_path"], "init_args": arguments}

    def settings(self) -> dict[str, Any]:
        """Returns the settings of the run as in a config of the command line; may be empty.

        Raises:
            TeamNetError: If a setting is not a number, a switch or a word, or is not one that a
                checkpoint may hold.
        """
        settings = self.run.get("settings")
        return {} if settings is None else check_settings(self.path, settings)

    def data_module(self) -> ImageDataModule | None:
        """Makes the data module that the team was trained on, without reading any data yet.

        Returns:
            The data module, or None if the file does not name one.

        Raises:
            TeamNetError: If the data module cannot be made or is not trusted.
        """
        data = self.data()
        if data is None:
            return None
        return make_data_module(data, self.path)

    def accuracies(self, teammate: str) -> tuple[dict[str, float], str | None]:
        """Reads the accuracies beside the file, in ``per_depth*.json``, if they are of its weights.

        Those of the first test count; without any, those of the first validation.

        Args:
            teammate: Name of the Teammate.

        Returns:
            The accuracies by the name of the depth, and the split that they were measured on; None
            for the split if there are no accuracies.

        Raises:
            TeamNetError: If such a file is not a report of a team.
        """
        weights: str | None = None
        for path in report_files(self.path.parent):
            weights = weights or weights_digest(self.weights)
            rows = [
                row
                for row in Report.load(path).of_net(teammate)
                if row.weights == weights and not math.isnan(row.accuracy)
            ]
            if rows:
                return {str(row.depth): row.accuracy for row in rows}, rows[0].split
        return {}, None
