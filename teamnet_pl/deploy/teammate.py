"""A Teammate on its own, with its preprocessing and classes; saved as files or on the Hub."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model

from teamnet_pl.backbones import create_backbone
from teamnet_pl.checkpoints import (
    check_finite,
    count_weights,
    limit_parameters,
    weights_digest,
)
from teamnet_pl.cooperation import TeammateConfig
from teamnet_pl.cooperation.restoring import check_task, load_weights, restore_member
from teamnet_pl.data.preprocessing import PreprocessingConfig
from teamnet_pl.deploy.checkpoint import SavedTeam, check_classes, restore_preprocessing
from teamnet_pl.elastic import ElasticNet, depth_costs
from teamnet_pl.elastic.depths import format_stages
from teamnet_pl.errors import TeamNetError
from teamnet_pl.trust import Trust, errors_naming

_REPOSITORY = re.compile(r"[\w.-]+/(?!.*\.(ckpt|pt|pth|safetensors)$)[\w.-]+")
"""Names of repositories on the Hub, as opposed to those of files."""

CARD = """\
---
{{ card_data }}
---

# {{ backbone }} at {{ depths }} depths

An image classifier with one set of weights that runs at any of these depths:

{{ table }}

It distinguishes {{ num_classes }} classes{{ classes }}. Its input is a batch of images of shape
{{ input_shape }} (channels, height, width) with pixels in [0, 1]{{ normalization }}.

```python
from teamnet_pl.deploy import Teammate

net = Teammate.from_pretrained("...")  # the name of this repository, or a folder

with net.at("{{ shallowest }}"):  # or any other of net.depths
    logits = net(images)  # shape (N, {{ num_classes }})

small = net.extract("{{ shallowest }}")  # a plain net without the skipped blocks
```

Trained with [TeamNet](https://arxiv.org/abs/2312.08532), in which several such nets learn together.
"""


@dataclass(frozen=True)
class DepthRecord:
    """Size, cost and accuracy of one depth.

    Attributes:
        name: Name of the depth, such as ``d9``.
        num_blocks: Number of skippable blocks kept.
        blocks_per_stage: Number of skippable blocks kept in each stage.
        macs: Multiply-accumulates for one image.
        parameters: Number of parameters.
        accuracy: Top-1 accuracy as a share from 0 to 1; None if it is not known.
    """

    name: str
    num_blocks: int
    blocks_per_stage: list[int]
    macs: int
    parameters: int
    accuracy: float | None


class Teammate(
    ElasticNet,
    PyTorchModelHubMixin,
    library_name="teamnet_pl",
    pipeline_tag="image-classification",
    tags=["elastic-depth"],
    model_card_template=CARD,
):
    """An elastic net that knows its backbone's name, its preprocessing and its classes.

    Besides the methods of an `ElasticNet` it has ``save_pretrained``, ``from_pretrained`` and
    ``push_to_hub`` of `huggingface_hub.PyTorchModelHubMixin`: weights as ``model.safetensors``,
    arguments as ``config.json``, and a model card. Loading runs no code from these files.

    Args:
        num_classes: Number of classes.
        input_shape: Shape of one image, ``(channels, height, width)``.
        net: The backbone and its depths. Pretrained weights that it names are not loaded.
        preprocessing: How images become the input of the net; None if it is not known.
        classes: Names of the classes, in the order of the labels; None if they are not known.
        accuracy: Top-1 accuracy by the depth's name, as a share from 0 to 1.
        split: The split on which the accuracy was measured, such as ``test``.

    Raises:
        TeamNetError: If there is no such backbone, it cannot be made elastic or has no such
            depths, or there is not one name for each class.

    Examples:
        >>> net = Teammate(10, (1, 8, 8), TeammateConfig(depths=[7, 3]))
        >>> [(record.name, record.macs) for record in net.records()]
        [('d7', 2532992), ('d3', 1353344)]
    """

    # Annotations are not strings in this file: the mixin reads them to restore a config.
    def __init__(
        self,
        num_classes: int,
        input_shape: Sequence[int],
        net: TeammateConfig,
        preprocessing: PreprocessingConfig | None = None,
        classes: list[str] | None = None,
        accuracy: dict[str, float] | None = None,
        split: str | None = None,
    ) -> None:
        if classes is not None and len(classes) != num_classes:
            raise TeamNetError(
                f"There must be a name for each of {num_classes} classes, found {len(classes)}."
            )
        if net.net_class() is not ElasticNet:
            raise TeamNetError(
                f"Only an elastic net can be deployed, and this Teammate is a {net.net}: take a "
                "depth of it as a plain net, team.elastic_nets[name].extract(depth)."
            )
        super().__init__(
            create_backbone(net.without_weights(), num_classes, input_shape[0]),
            input_shape,
            **net.elastic_options(),
        )
        self.num_classes = num_classes
        self.config = net
        self.preprocessing = preprocessing
        self.classes = classes
        self.accuracy = accuracy or {}
        self.split = split

    @classmethod
    def load(
        cls,
        source: str | Path,
        name: str = "a",
        *,
        device: str | torch.device = "cpu",
        trust_import: bool = False,
    ) -> "Teammate":
        """Loads a Teammate from a checkpoint, a folder or the Hub.

        Args:
            source: The checkpoint of a training run, a folder that ``save_pretrained`` wrote, or
                the name of a repository on the Hub, such as ``me/net``.
            name: Name of the Teammate in a checkpoint, such as ``a``. A folder or repository holds
                one, without a name.
            device: The device to put it on.
            trust_import: Whether the file may name a backbone by import path, which runs code.
                Allow this only for a file that you trust as you trust code.

        Returns:
            The Teammate, in evaluation mode.

        Raises:
            FileNotFoundError: If there is no such file.
            TeamNetError: As in `from_checkpoint` and `from_pretrained`.
        """
        path = Path(source)
        is_repository = not path.exists() and _REPOSITORY.fullmatch(str(source))
        if not (path.is_dir() or is_repository):
            return cls.from_checkpoint(source, name, device=device, trust_import=trust_import)
        if name != "a":
            raise TeamNetError(f"{source} holds one Teammate, which has no name; found {name}.")
        try:
            teammate = cls.from_pretrained(source, trust_import=trust_import)
        except TeamNetError as error:
            if not is_repository:
                raise
            raise TeamNetError(
                f"There is no file or folder {source}, and as a repository on the Hub: {error}"
            ) from error
        return _moved(teammate, device)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        name: str = "a",
        *,
        device: str | torch.device = "cpu",
        trust_import: bool = False,
    ) -> "Teammate":
        """Takes one Teammate out of the checkpoint of a training run.

        Its preprocessing and class names come from the checkpoint. Its accuracy comes from
        ``per_depth.json`` beside the checkpoint, if that file is about the same weights.

        Args:
            path: The checkpoint.
            name: Name of the Teammate, such as ``a``.
            device: The device to put it on.
            trust_import: Whether the checkpoint may name a backbone by import path, which runs
                code. Allow this only for a file that you trust as you trust code.

        Returns:
            The Teammate, in evaluation mode.

        Raises:
            FileNotFoundError: If there is no such file.
            TeamNetError: If the file is not a checkpoint of a team, is damaged, or names something
                that is not trusted; if the team has no such Teammate; if a weight is infinite or
                NaN; or if there is no such device.
        """
        return cls.from_saved(SavedTeam.read(path, trust_import), name, device)

    @classmethod
    def from_saved(
        cls, saved: SavedTeam, name: str = "a", device: str | torch.device = "cpu"
    ) -> "Teammate":
        """Takes one Teammate out of a checkpoint that has been read.

        Args:
            saved: The checkpoint.
            name: Name of the Teammate, such as ``a``.
            device: The device to put it on.

        Returns:
            The Teammate, in evaluation mode.

        Raises:
            TeamNetError: As in `from_checkpoint`.
        """
        config = saved.teammate(name)
        accuracy, split = saved.accuracies(name)
        prefix = f"teammates.{name}."
        weights = {
            key.removeprefix(prefix): weight
            for key, weight in saved.weights.items()
            if key.startswith(prefix)
        }
        with errors_naming(saved.path), limit_parameters(count_weights(weights), saved.path):
            teammate = cls(
                saved.hyper_parameters["num_classes"],
                saved.hyper_parameters["input_shape"],
                config,
                preprocessing=saved.preprocessing,
                classes=saved.classes,
                accuracy=accuracy,
                split=split,
            )
        load_weights(teammate, weights, saved.path)
        check_finite(weights, saved.path)
        return _moved(teammate.eval(), device)

    def records(self) -> list[DepthRecord]:
        """Lists size, cost and accuracy of each depth, the deepest first."""
        costs = depth_costs(self, self.input_shape)
        return [
            DepthRecord(
                depth.name,
                depth.num_blocks,
                list(depth.per_stage),
                costs[depth.name].macs,
                costs[depth.name].parameters,
                self.accuracy.get(depth.name),
            )
            for depth in self.depths
        ]

    def generate_model_card(self, **kwargs: Any) -> ModelCard:
        """Fills in the template of the model card."""
        records = self.records()
        header = ["depth", "blocks per stage", "MACs", "parameters"]
        rows = [
            [r.name, format_stages(r.blocks_per_stage), f"{r.macs:,}", f"{r.parameters:,}"]
            for r in records
        ]
        if self.accuracy:
            header.append(f"accuracy, {self.split} split")
            for row, record in zip(rows, records, strict=True):
                row.append("" if record.accuracy is None else f"{record.accuracy:.2%}")
        lines = [header, ["---"] * len(header), *rows]
        normalization, classes = "", ""
        if self.preprocessing is not None:
            mean, std = self.preprocessing.mean, self.preprocessing.std
            normalization = f", normalized with mean {mean} and standard deviation {std}"
        if self.classes is not None:
            classes = f": {', '.join(self.classes)}"
        return super().generate_model_card(
            backbone=self.config.name,
            depths=len(self.depths),
            table="\n".join("| " + " | ".join(line) + " |" for line in lines),
            num_classes=self.num_classes,
            classes=classes,
            input_shape=list(self.input_shape),
            normalization=normalization,
            shallowest=self.depths[-1].name,
            **kwargs,
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, trust_import: bool = False, **kwargs: Any
    ) -> "Teammate":
        """Restores a Teammate from a folder or the Hub without running any code from its files.

        Args:
            pretrained_model_name_or_path: A folder that ``save_pretrained`` wrote, or the name of a
                repository on the Hub.
            trust_import: Whether the config may name a backbone by import path, which runs code.
                Allow this only for files that you trust as you trust code.
            **kwargs: Arguments of `huggingface_hub.ModelHubMixin.from_pretrained`.

        Returns:
            The Teammate, in evaluation mode.

        Raises:
            TeamNetError: If the config or the weights are missing, damaged, not finite or do not
                fit each other, or the config names something that is not trusted.
        """
        with errors_naming(pretrained_model_name_or_path):
            try:
                teammate: Teammate = super().from_pretrained(
                    pretrained_model_name_or_path, trust_import=trust_import, **kwargs
                )
            except (AttributeError, KeyError, TypeError, RuntimeError) as error:
                raise TeamNetError(
                    f"{pretrained_model_name_or_path} does not hold a Teammate, or is damaged: "
                    f"{error}"
                ) from error
        return teammate

    @classmethod
    def _from_pretrained(cls, *, trust_import: bool = False, **kwargs: Any) -> "Teammate":
        """Builds the net and loads its weights."""
        source = kwargs["model_id"]
        if "net" not in kwargs:
            raise TeamNetError(f"{source} has no config.json of a Teammate.")
        trust = Trust(source, trust_import)
        # The mixin has not checked the types of the values.
        net = restore_member(TeammateConfig, "net", vars(kwargs["net"]), trust)
        if (preprocessing := kwargs.get("preprocessing")) is not None:
            preprocessing = restore_preprocessing(vars(preprocessing), trust)
        check_task(source, kwargs.get("num_classes"), kwargs.get("input_shape"))
        check_classes(source, kwargs.get("classes"), kwargs["num_classes"])
        changes = {"net": net, "preprocessing": preprocessing, "strict": True}
        weights = Path(source) / constants.SAFETENSORS_SINGLE_FILE
        if not weights.is_file():  # on the Hub, where the mixin makes the net before the download
            teammate: Teammate = super()._from_pretrained(**kwargs | changes)
            return teammate
        with limit_parameters(weights.stat().st_size, source):  # a weight takes at least a byte
            teammate = super()._from_pretrained(**kwargs | changes)
        return teammate

    def _save_pretrained(self, save_directory: Path) -> None:
        """Saves the weights together with their digest."""
        path = save_directory / constants.SAFETENSORS_SINGLE_FILE
        save_model(self, str(path), {"weights": weights_digest(self.state_dict())})

    @classmethod
    def _load_as_safetensor(  # type: ignore[override]
        cls, model: "Teammate", model_file: str, map_location: str, strict: bool
    ) -> "Teammate":
        """Loads the weights and checks their digest."""
        try:
            load_model(model, model_file, strict=strict, device=map_location)
            with safe_open(model_file, framework="pt") as file:
                digest = (file.metadata() or {}).get("weights")
        except (OSError, SafetensorError) as error:
            raise TeamNetError(f"{model_file} cannot be read as safetensors: {error}") from error
        if digest is not None and digest != weights_digest(model.state_dict()):
            raise TeamNetError(
                f"{model_file} is damaged: the checksum of its weights is wrong. Use another copy "
                "of the file."
            )
        check_finite(model.state_dict(), model_file)
        return model.eval()

    @classmethod
    def _load_as_pickle(cls, *_: Any) -> NoReturn:
        """Refuses files that are not safetensors."""
        raise TeamNetError(
            "There is no model.safetensors; other files with weights are not loaded."
        )


def _moved(teammate: Teammate, device: str | torch.device) -> Teammate:
    """Moves a Teammate to a device.

    Raises:
        TeamNetError: If there is no such device.
    """
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("tensors there have no values")
        return teammate.to(device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        # A torch without CUDA raises an AssertionError. The first line of torch's text is enough.
        reason = str(error).partition("\n")[0]
        raise TeamNetError(f"The net cannot be put on {str(device)!r}: {reason}") from error
