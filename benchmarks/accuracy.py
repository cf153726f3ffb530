"""Accuracy per depth of a team, its ablations and nets trained for one depth, over several seeds.

All methods train on the same images with the same epochs, augmentation, optimizer and schedule.
The methods are ``team``, each config in teamnet_pl/configs/ablation/ by its name, and ``alone``: a
plain net for each depth, trained on labels. Team and data are made by the parser of the command
line, as in `teamnet fit --config data/DATASET --config ablation/METHOD`. Each row has the accuracy
on the validation split, which is for choosing (a learning rate, a default), and on the test split,
which is for reporting.

Each run is written when it ends. A later call skips the runs that the file has. Example::

    python benchmarks/accuracy.py --methods team joint alone --seeds 0 1 2 --out accuracy.json
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
import yaml
from harness import (
    RESULTS,
    Result,
    ResultFile,
    Row,
    argument_parser,
    load_result,
    markdown,
    mean_and_deviation,
    with_source,
)
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from teamnet_pl.callbacks.depth_report import team_report
from teamnet_pl.cli.training import TeamArgumentParser, TeamCLI
from teamnet_pl.config_files import config_names, config_path
from teamnet_pl.cooperation import OptimizerConfig, ScheduleConfig, Team
from teamnet_pl.cooperation.optimization import configure
from teamnet_pl.data import ImageDataModule
from teamnet_pl.elastic import cost

DATASETS = [name.removeprefix("data/") for name in config_names() if name.startswith("data/")]
ABLATIONS = [
    name.removeprefix("ablation/") for name in config_names() if name.startswith("ablation/")
]
METHODS = ["team", *ABLATIONS, "alone"]
ABLATIONS_WIDTH = 16
"""Width of the Teammates for which the ablations' configs are written."""
T = TypeVar("T")


# Team and data


def command_line(args: argparse.Namespace, method: str, seed: int) -> list[str]:
    """Lists the words that make the team and the data of a method, as after `teamnet fit`."""
    data = {"batch_size": args.batch_size, "root": args.root, "train_size": args.train_size}
    leader = {"name": args.backbone, "options": {"width": args.width} if args.width else {}}
    teammate = leader | {"depths": args.depths}
    lr = dict(args.method_lr).get(method, args.lr)
    settings = {
        "seed_everything": seed,
        "data": {"init_args": {name: value for name, value in data.items() if value is not None}},
        "model": {"leader": leader, "a": teammate, "b": teammate, "optimizer": {"lr": lr}},
        "trainer": {
            "accelerator": args.accelerator,
            "enable_checkpointing": False,
            "logger": False,
        },
    }
    configs = [str(config_path(f"data/{args.dataset}")), yaml.safe_dump(settings)]
    if method != "team":
        configs.append(ablation(method, args.width or ABLATIONS_WIDTH))
    return [word for config in configs for word in ("--config", config)]


def ablation(name: str, width: int) -> str:
    """Reads the config of an ablation, with the widths in it scaled to Teammates of a width."""
    config = yaml.safe_load(config_path(f"ablation/{name}").read_text())
    for member in config["model"].values():
        if member and "width" in member.get("options", {}):
            member["options"]["width"] = member["options"]["width"] * width // ABLATIONS_WIDTH
    return yaml.safe_dump(config)


def team_and_data(args: argparse.Namespace, method: str, seed: int) -> tuple[Team, ImageDataModule]:
    """Makes the team and the data module of a method by the parser of the command line."""
    cli = TeamCLI(
        Team,
        ImageDataModule,
        subclass_mode_data=True,
        parser_class=TeamArgumentParser,
        save_config_callback=None,
        auto_configure_optimizers=False,
        args=command_line(args, method, seed),
        run=False,
    )
    return cli.model, cli.datamodule


# Training


class PlainNet(LightningModule):
    """A net of one depth, trained on labels."""

    def __init__(
        self, net: nn.Module, optimizer: OptimizerConfig, schedule: ScheduleConfig, classes: int
    ) -> None:
        super().__init__()
        self.net, self.optimizer, self.schedule = net, optimizer, schedule
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> None:
        self.accuracy.update(self.net(batch[0]), batch[1])
        self.log(f"{split}/accuracy", self.accuracy)

    def configure_optimizers(self) -> Any:
        return configure(self, self.optimizer, self.schedule)


def train(
    args: argparse.Namespace,
    module: LightningModule,
    data: ImageDataModule,
    read: Callable[[Trainer, Any], T],
) -> tuple[T, T]:
    """Trains a module, and reads its accuracies on the validation and the test split."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=args.epochs,
            accelerator=args.accelerator,
            devices=1,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=args.epochs,
        )
        trainer.fit(module, datamodule=data)
        val = read(trainer, "val")
        trainer.test(module, datamodule=data, verbose=False)
        return val, read(trainer, "test")


def measure_team(args: argparse.Namespace, method: str, seed: int) -> Iterator[Row]:
    """Trains a team; yields a row for each net and depth."""
    team, data = team_and_data(args, method, seed)
    val, test = train(args, team, data, lambda trainer, split: team_report(team, trainer, split))
    for on_val, on_test in zip(val.rows, test.rows, strict=True):
        yield {
            "net": on_val.net,
            "depth": on_val.depth,
            "macs": on_val.macs,
            "val": on_val.accuracy,
            "test": on_test.accuracy,
        }


def measure_alone(args: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Trains a plain net for each depth of Teammate a; yields a row for each."""
    team, _ = team_and_data(args, "joint", seed)
    for depth in team.elastic_nets["a"].depths:
        team, data = team_and_data(args, "joint", seed)  # so that each depth starts alike
        net = team.elastic_nets["a"].extract(depth)
        module = PlainNet(net, team.optimizer_config, team.schedule_config, team.num_classes)
        val, test = train(args, module, data, plain_accuracy)
        macs = cost(net, team.input_shape).macs
        yield {"net": "alone", "depth": depth.name, "macs": macs, "val": val, "test": test}


def plain_accuracy(trainer: Trainer, split: str) -> float:
    """Reads the accuracy of the last evaluation of a `PlainNet`."""
    return float(trainer.callback_metrics[f"{split}/accuracy"])


def measure(args: argparse.Namespace, method: str, seed: int) -> list[Row]:
    """Trains one method with one seed; returns a row for each net and depth."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = measure_alone(args, seed) if method == "alone" else measure_team(args, method, seed)
    lr = dict(args.method_lr).get(method, args.lr)
    return [{"method": method, "seed": seed, "lr": lr, **row} for row in rows]


# Tables


def table(result: Result) -> str:
    """Makes the table of a result: accuracies of the team, or differences of others from it."""
    if "team" in result["settings"]["methods"]:
        return accuracy_table(result)
    return difference_table(result, load_result(RESULTS / "accuracy_fashion_mnist.json"))


def accuracy_table(result: Result) -> str:
    """Tabulates the accuracy on the test split, mean and deviation over the seeds."""
    accuracies: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in sorted(result["rows"], key=lambda row: (row["method"], row["net"], -row["macs"])):
        net = accuracies[row["method"], row["net"]]
        net[row["depth"] or "single"].append(100 * row["test"])
    names = {row["depth"] for row in result["rows"] if row["depth"]}
    depths = sorted(names, key=lambda depth: -int(depth[1:]))
    rows = []
    for (method, net_name), by_depth in accuracies.items():
        # A net of one depth stands in the first column.
        by_depth.setdefault(depths[0], by_depth["single"])
        cells = [mean_and_deviation(by_depth.get(depth, [])) for depth in depths]
        rows.append([method, net_name, *cells])
    return with_source(markdown(["method", "net", *depths], rows), result)


def difference_table(result: Result, base: Result) -> str:
    """Tabulates means over depths, and their differences from the team in another result."""
    accuracies: dict[tuple[str, str, str, int], list[float]] = defaultdict(list)
    for row in base["rows"] + result["rows"]:
        for split in ("val", "test"):
            accuracies[row["method"], row["net"], split, row["seed"]].append(100 * row[split])

    def cells(method: str, net: str, split: str) -> list[str]:
        means, differences = [], []
        for seed in base["settings"]["seeds"]:
            if values := accuracies.get((method, net, split, seed)):
                means.append(statistics.mean(values))
                team = statistics.mean(accuracies["team", net, split, seed])
                differences.append(means[-1] - team)
        difference = "" if method == "team" else mean_and_deviation(differences, "+.1f")
        return [mean_and_deviation(means), difference]

    columns = {
        "a, validation": ("a", "val"),
        "a, test": ("a", "test"),
        "b, test": ("b", "test"),
        "ensemble, test": ("ensemble", "test"),
    }
    header = ["method", *(title for column in columns for title in (column, "difference"))]
    rows = [
        [method, *(cell for column in columns.values() for cell in cells(method, *column))]
        for method in ("team", *result["settings"]["methods"])
    ]
    return with_source(markdown(header, rows), result)


def method_lr(text: str) -> tuple[str, float]:
    """Reads ``METHOD=LR``."""
    method, _, lr = text.partition("=")
    return method, float(lr)


def main() -> None:
    """Trains all methods with all seeds, except for the runs that the file has."""
    parser = argument_parser(__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="fashion_mnist", metavar="DATASET", help=f"of {', '.join(DATASETS)}")  # fmt: skip # noqa: E501
    parser.add_argument("--root", help="folder of the data, by default that of the config")
    parser.add_argument("--train-size", type=int, help="training images, by default 10 000 of fashion_mnist and all of others")  # fmt: skip # noqa: E501
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--method-lr", nargs="+", type=method_lr, default=[], metavar="METHOD=LR")
    parser.add_argument("--backbone", default="cifar/resnet20")
    parser.add_argument("--width", type=int, default=8, help="of the backbone; 0 if it has none")
    parser.add_argument("--depths", type=int, default=4)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["team"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    args = parser.parse_args()
    if args.train_size is None and args.dataset == "fashion_mnist":
        args.train_size = 10_000

    file = ResultFile(args, resume=True, selecting=("methods", "seeds"), ignored=("jobs", "root"))
    done = {(row["method"], row["seed"]) for row in file.rows}
    with ProcessPoolExecutor(args.jobs) as pool:
        runs = {
            pool.submit(measure, args, method, seed): (method, seed)
            for seed in args.seeds
            for method in args.methods
            if (method, seed) not in done
        }
        for run in as_completed(runs):
            file.add(run.result())
            print(*runs[run], "done", flush=True)


if __name__ == "__main__":
    main()
