"""Accuracy per depth: a team, its ablations, and each depth trained alone, over several seeds.

All methods train on the same images with the same epochs, augmentation, optimiser and schedule.
Each row has the accuracy on the validation split, which is for choosing (a method's learning rate,
a default), and on the test split, which is for reporting. Example::

    python benchmarks/accuracy.py --methods team joint alone --seeds 0 1 2 --out accuracy.json
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from results_file import save_results
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from teamnet_pl.backbones import create_backbone
from teamnet_pl.cooperation import (
    Cooperation,
    Edge,
    KLDivergence,
    LeaderConfig,
    OptimizerConfig,
    ScheduleConfig,
    Team,
    TeammateConfig,
)
from teamnet_pl.cooperation.optimization import configure
from teamnet_pl.cooperation.report import Report
from teamnet_pl.data import Digits, FashionMNIST
from teamnet_pl.elastic import ElasticNet, cost

NO = Edge(weight=0.0)
T1, T4 = (Edge(kind=KLDivergence(temperature)) for temperature in (1.0, 4.0))


def team(args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Arguments of a team whose nets are all alike, with changes to them or to the team."""
    net, wider = (
        {"name": args.backbone, "options": {"width": width} if width else {}}
        for width in (args.width, changes.pop("leader_width", 1) * args.width)
    )
    mate = {"depths": args.depths} | {
        key: changes.pop(key) for key in ("policy", "per_depth_affine") if key in changes
    }
    both = {
        "leader": LeaderConfig(**wider),
        "a": TeammateConfig(**net, **mate),
        "b": TeammateConfig(**net, **mate, interleaved=True),
    }
    return both | changes


METHODS: dict[str, dict[str, Any]] = {
    "team": {},
    "no_leader": {"leader": None},
    "no_peer": {"cooperation": Cooperation(peer=NO)},
    "no_sub_networks": {"cooperation": Cooperation(sub_networks=NO)},
    "one_teammate": {"b": None},
    "wide_leader": {"leader_width": 2},
    "self_distilled": {"leader": None, "b": None},
    "joint": {"leader": None, "b": None, "cooperation": Cooperation(NO, NO, NO)},
    "round_robin": {"policy": "round_robin"},
    "evenly_spread": {"policy": "evenly_spread"},
    "first_stage_first": {"policy": "first_stage_first"},
    "per_depth_affine": {"per_depth_affine": True},
    "no_ramp": {"cooperation": Cooperation(ramp=0.0)},
    "weight_1": {"cooperation": Cooperation(Edge(1.0), Edge(1.0), Edge(1.0))},
    "weight_2": {"cooperation": Cooperation(Edge(2.0), Edge(2.0), Edge(2.0))},
    "temperature_4": {"cooperation": Cooperation(T4, T4, T4)},
    "temperature_1": {"cooperation": Cooperation(T1, T1, T1)},
}


class Alone(LightningModule):
    """A plain net, trained on labels."""

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


def data_module(args: argparse.Namespace) -> LightningDataModule:
    """The dataset."""
    if args.dataset == "digits":
        return Digits(batch_size=args.batch_size)
    root, size = args.root, args.train_size
    return FashionMNIST(root=root, download=False, train_size=size, batch_size=args.batch_size)


def train(args: argparse.Namespace, module: LightningModule) -> dict[str, float]:
    """Trains a module and returns its metrics on both splits."""
    data = data_module(args)
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
        found = {}
        trainer.fit(module, datamodule=data)
        found.update(trainer.callback_metrics)
        trainer.test(module, datamodule=data, verbose=False)
        found.update(trainer.callback_metrics)
        return {name: float(value) for name, value in found.items()}


def run(args: argparse.Namespace, method: str, seed: int) -> list[dict[str, Any]]:
    """One method with one seed: a row for each net and depth."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(seed, workers=True, verbose=False)
    data = data_module(args)
    classes, shape = data.num_classes, data.input_shape
    lr = dict(args.method_lr).get(method, args.lr)
    optimizer, schedule = OptimizerConfig(lr=lr), ScheduleConfig()
    if method == "alone":
        config = team(args)["a"]
        net = ElasticNet(create_backbone(config, classes, shape[0]), shape, depths=args.depths)
        rows = []
        for depth in net.depths:
            seed_everything(seed, workers=True, verbose=False)
            backbone = create_backbone(config, classes, shape[0])
            plain = ElasticNet(backbone, shape, depths=args.depths).extract(depth)
            found = train(args, Alone(plain, optimizer, schedule, classes))
            row = {"net": "alone", "depth": depth.name, "macs": cost(plain, shape).macs}
            rows.append(row | {split: found[f"{split}/accuracy"] for split in ("val", "test")})
    else:
        arguments = team(args, **METHODS[method])
        module = Team(classes, shape, optimizer=optimizer, schedule=schedule, **arguments)
        found = train(args, module)
        val, test = (report(module, found, split).rows for split in ("val", "test"))
        rows = [
            {"net": v.net, "depth": v.depth, "macs": v.macs, "val": v.accuracy, "test": t.accuracy}
            for v, t in zip(val, test, strict=True)
        ]
    return [{"method": method, "seed": seed, "lr": lr, **row} for row in rows]


def report(module: Team, metrics: dict[str, float], split: str) -> Report:
    """The report of one split, from the metrics of both."""
    prefix = f"{split}/"
    values = {
        name.removeprefix(prefix): value
        for name, value in metrics.items()
        if name.startswith(prefix)
    }
    nets = module.elastic_nets
    return Report.of(nets, module.leader, module.input_shape, values, split=split)


def method_lr(text: str) -> tuple[str, float]:
    """Reads ``METHOD=LR``."""
    method, _, lr = text.partition("=")
    return method, float(lr)


def main() -> None:
    """Runs all methods with all seeds and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("fashion_mnist", "digits"), default="fashion_mnist")
    parser.add_argument("--root", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--train-size", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--method-lr", nargs="+", type=method_lr, default=[], metavar="METHOD=LR")
    parser.add_argument("--backbone", default="cifar/resnet20")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--depths", type=int, default=4)
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, "alone"), default=["team"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.jobs) as pool:
        jobs = {
            pool.submit(run, args, method, seed): (method, seed)
            for seed in args.seeds
            for method in args.methods
        }
        for job in as_completed(jobs):
            rows += job.result()
            rows.sort(key=lambda r: (r["method"], r["seed"], r["net"], -r["macs"]))
            save_results(args, rows)
            print(*jobs[job], "done", flush=True)


if __name__ == "__main__":
    main()
