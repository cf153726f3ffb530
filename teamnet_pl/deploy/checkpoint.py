"""The one reader of a team's checkpoint: all that a trained net needs, read once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from teamnet_pl import data as data_modules
from teamnet_pl.checkpoints import load_checkpoint, weights_digest
from teamnet_pl.cooperation.configs import restore_arguments, restore_config
from teamnet_pl.cooperation.team import RUN_KEY, Team, team_content
from teamnet_pl.data import HuggingFace, ImageDataModule
from teamnet_pl.data.downloads import DownloadedImages
from teamnet_pl.data.preprocessing import PreprocessingConfig
from teamnet_pl.errors import TeamNetError
from teamnet_pl.settings import check_settings
from teamnet_pl.trust import Trust, errors_naming


def restore_preprocessing(values: object, trust: Trust) -> PreprocessingConfig:
    """Makes the preprocessing of the plain values in a file.

    Args:
        values: The fields of `PreprocessingConfig`.
        trust: Whether transforms that are not torchvision's may be named.

    Raises:
        ValueError: If the values do not fit the fields or are not trusted.
    """
    transform: Any = None
    if isinstance(values, Mapping):
        # Apart from the others, since it names classes.
        transform = values.get("transform")
        trust.check_transforms("preprocessing.transform", transform)
        values = {name: value for name, value in values.items() if name != "transform"}
    config = restore_config(PreprocessingConfig, "preprocessing", values, trust)
    with errors_naming(trust.source):
        return replace(config, transform=transform)


def check_classes(source: object, classes: object, num_classes: int) -> None:
    """Checks the names of classes that come from a file.

    Args:
        source: The file, for messages.
        classes: Should be None or as many texts.
        num_classes: Number of classes.

    Raises:
        ValueError: If they are not.
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


@dataclass(frozen=True)
class SavedTeam:
    """The content of a checkpoint.

    Attributes:
        path: The file.
        trust: What its values may name.
        hyper_parameters: The arguments of the `Team`, as plain values.
        weights: By name, on the CPU.
        preprocessing: How images become the input of its nets; None if the file does not say.
        classes: Names of the classes, in the order of the labels; None if the file does not say.
        run: What else the file says about the run, unchecked.
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
        """Reads a checkpoint; nothing in it is run.

        Args:
            path: The file.
            trust_import: Whether its values may name code and addresses: only for a file that you
                trust as you do code.
            given: Values that the user gave, by their dotted name: the same in the file are
                trusted.
            map_location: Device that the weights go to.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a checkpoint of a team, or is damaged.
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
        """The arguments of the `Team`, its members without weights to start from.

        Raises:
            ValueError: If a value does not fit or is not trusted.
        """
        return restore_arguments(Team, self.hyper_parameters, self.trust)

    def data(self) -> dict[str, Any] | None:
        """The data module as ``class_path`` and ``init_args``; None if the file does not say.

        One that could download its data does so only if the user trusts the file, or asks for it by
        a ``download`` of their own.

        Raises:
            ValueError: If it is not of that form, or names something that is not trusted.
        """
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
        """The settings of the run, as in a config of the command line; empty if there are none.

        Raises:
            ValueError: If one is not a number, a switch or a word, or no checkpoint may hold it.
        """
        settings = self.run.get("settings")
        return {} if settings is None else check_settings(self.path, settings)

    def data_module(self) -> ImageDataModule | None:
        """Makes the data module that the team was trained on; no data is read yet.

        Returns:
            The data module, or None if the file does not say.

        Raises:
            ValueError: If it cannot be made or is not trusted.
        """
        data = self.data()
        if data is None:
            return None
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(ImageDataModule, "data", required=True)
        try:
            made: ImageDataModule = parser.instantiate(parser.parse_object({"data": data})).data
        except ArgumentError as error:
            raise TeamNetError(
                f"The data that {self.path} names cannot be made: {error}"
            ) from error
        return made

    def accuracies(self, teammate: str) -> tuple[dict[str, float], str | None]:
        """The accuracies in ``per_depth.json`` beside the file, if they are of these very weights.

        Args:
            teammate: Name of the Teammate.

        Returns:
            The accuracies by the name of the depth, and the split that they were measured on; None
            for the split if there are no accuracies.

        Raises:
            ValueError: If ``per_depth.json`` is not a report of a team.
        """
        report = self.path.parent / "per_depth.json"
        if not report.is_file():
            return {}, None
        weights = weights_digest(self.weights)
        try:
            rows = [
                row
                for row in json.loads(report.read_text())
                if row["net"] == teammate and row.get("weights") == weights
            ]
            accuracies = {
                str(row["depth"]): float(row["accuracy"])
                for row in rows
                if row["accuracy"] is not None
            }
            split = str(rows[0]["split"]) if accuracies else None
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise TeamNetError(
                f"{report} is not a report of a team ({error!r}): delete it, or have `teamnet "
                "test` write it anew."
            ) from error
        return accuracies, split
