"""A Teammate on its own, with what it takes to use it; the Hugging Face Hub."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import ModelCard, PyTorchModelHubMixin

from teamnet_pl.backbones import create_backbone
from teamnet_pl.checkpoints import load_checkpoint, weights_digest
from teamnet_pl.cooperation import TeammateConfig
from teamnet_pl.deploy.checkpointed import checkpointed_data
from teamnet_pl.elastic import ElasticNet, depth_costs

CARD = """\
---
{{ card_data }}
---

# {{ backbone }} at {{ depths }} depths

An image classifier that runs at any of these depths, by one set of weights:

{{ table }}

It tells {{ num_classes }} classes apart and takes images of shape {{ input_shape }}, their pixels
in [0, 1]{{ normalisation }}.

```python
from teamnet_pl.deploy import Teammate

net = Teammate.from_pretrained("...")  # the name of this repository, or a folder

with net.at("{{ shallowest }}"):  # or any of net.depths
    logits = net(images)  # (N, {{ num_classes }})

small = net.extract("{{ shallowest }}")  # a plain net without the skipped blocks
```

Trained with [TeamNet](https://arxiv.org/abs/2312.08532), where two such nets learn together.
"""


@dataclass(frozen=True)
class DepthRecord:
    """What is known of one depth.

    Attributes:
        name: ``d`` followed by the number of skippable blocks kept.
        blocks: That number.
        blocks_per_stage: The same in each stage.
        macs: Multiply-accumulates for one image.
        parameters: Number of parameters.
        accuracy: Share of the images whose label is predicted first, if known.
    """

    name: str
    blocks: int
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
    """An elastic net by the name of its backbone, with what it takes to use it.

    Beside what an `ElasticNet` can, it has ``save_pretrained``, ``from_pretrained`` and
    ``push_to_hub`` of `huggingface_hub.PyTorchModelHubMixin`: weights as ``model.safetensors``, the
    arguments as ``config.json``, and a model card. Nothing that is loaded is run as code.

    Args:
        num_classes: Number of classes.
        input_shape: Shape of one image, ``(channels, height, width)``.
        net: The backbone and its depths. Weights to start from are left out.
        mean: Mean of each channel, to be subtracted from pixels in [0, 1].
        std: Standard deviation of each channel, by which they are to be divided then.
        accuracy: Share of the images whose label is predicted first, by the depth's name.
        split: The images that the accuracy was measured on, such as ``test``.

    Raises:
        ValueError: If there is no such backbone, it cannot be elastic, or has no such depths.

    Example:
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
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        accuracy: dict[str, float] | None = None,
        split: str | None = None,
    ) -> None:
        super().__init__(
            create_backbone(net.without_weights(), num_classes, input_shape[0]),
            input_shape,
            **net.elastic_options(),
        )
        self.num_classes = num_classes
        self.config = net
        self.mean = mean
        self.std = std
        self.accuracy = accuracy or {}
        self.split = split

    @classmethod
    def from_checkpoint(cls, path: str | Path, name: str = "a") -> "Teammate":
        """Takes one Teammate out of the checkpoint of a training.

        Its normalisation is that of the data in the checkpoint, and its accuracy is what
        ``per_depth.json`` beside the checkpoint says, if it is there and of these very weights.

        Args:
            path: The checkpoint.
            name: ``a`` or ``b``.

        Returns:
            The Teammate, in evaluation mode.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no checkpoint of a training, or its team has no such Teammate.
        """
        checkpoint = load_checkpoint(path)
        hparams, state = checkpoint.get("hyper_parameters", {}), checkpoint.get("state_dict")
        if state is None or not {"num_classes", "input_shape", "a", "b"} <= hparams.keys():
            raise ValueError(
                f"{path} is no checkpoint of a team: it holds {', '.join(map(str, checkpoint))}. "
                "Give one that teamnet fit saved."
            )
        if not hparams.get(name):
            there = ", ".join(mate for mate in ("a", "b") if hparams[mate])
            raise ValueError(f"The team in {path} has the Teammates {there}; found {name}.")
        data = checkpointed_data(checkpoint)
        report = Path(path).parent / "per_depth.json"
        rows = []
        if report.is_file():
            weights = weights_digest(state)
            rows = json.loads(report.read_text())
            rows = [row for row in rows if row["net"] == name and row.get("weights") == weights]
        teammate = cls(
            hparams["num_classes"],
            hparams["input_shape"],
            TeammateConfig(**hparams[name]),
            mean=None if data is None else list(data.mean),
            std=None if data is None else list(data.std),
            accuracy={row["depth"]: row["accuracy"] for row in rows},
            split=rows[0]["split"] if rows else None,
        )
        prefix = f"teammates.{name}."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        try:
            teammate.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f"The weights in {path} are not those of its team: {error}") from error
        return teammate.eval()

    def records(self) -> list[DepthRecord]:
        """What is known of each depth, the deepest first."""
        costs = depth_costs(self, self.input_shape)
        return [
            DepthRecord(
                depth.name,
                depth.blocks,
                list(depth.per_stage),
                costs[depth.name].macs,
                costs[depth.name].parameters,
                self.accuracy.get(depth.name),
            )
            for depth in self.depths
        ]

    def generate_model_card(self, **kwargs: Any) -> ModelCard:
        """Fills in the model card."""
        records = self.records()
        header = ["depth", "blocks per stage", "MACs", "parameters"]
        rows = [
            [r.name, "-".join(map(str, r.blocks_per_stage)), f"{r.macs:,}", f"{r.parameters:,}"]
            for r in records
        ]
        if self.accuracy:
            header.append(f"accuracy, {self.split} split")
            for row, record in zip(rows, records, strict=True):
                row.append("" if record.accuracy is None else f"{record.accuracy:.2%}")
        lines = [header, ["---"] * len(header), *rows]
        known = self.mean is not None
        normalisation = f", less {self.mean}, divided by {self.std}" if known else ""
        return super().generate_model_card(
            backbone=self.config.name,
            depths=len(self.depths),
            table="\n".join("| " + " | ".join(line) + " |" for line in lines),
            num_classes=self.num_classes,
            input_shape=list(self.input_shape),
            normalisation=normalisation,
            shallowest=self.depths[-1].name,
            **kwargs,
        )

    @classmethod
    def _from_pretrained(cls, *, trust_import: bool = False, **kwargs: Any) -> "Teammate":
        """Builds the net and loads its weights.

        Args:
            trust_import: Whether the backbone may be one of an import path, which is called with
                what the config says: only for a config that you trust as you do code.
            **kwargs: Arguments of the mixin's own and of the class.

        Raises:
            ValueError: If there is no config, or the backbone is not to be trusted.
        """
        net = kwargs.get("net")
        if net is None:
            raise ValueError(f"{kwargs['model_id']} has no config.json of a Teammate.")
        if "/" not in net.name and not trust_import:
            raise ValueError(
                f"The backbone of {kwargs['model_id']}, {net.name}, is neither of torchvision nor "
                "of timm: to load it runs code of that name. If you trust it, pass "
                "trust_import=True."
            )
        teammate: Teammate = super()._from_pretrained(**kwargs | {"strict": True})
        return teammate

    @classmethod
    def _load_as_pickle(cls, *_: Any) -> NoReturn:
        """Refuses what is not safetensors."""
        raise ValueError("There is no model.safetensors; other files with weights are not loaded.")
