"""Accuracy per depth of a team, of its ablations and of the other ways, over several seeds.

A method is ``team`` or a config of the package, such as ``ablation/peer`` or
``baseline/early_exits``. All train on the same images with the same epochs, augmentation, optimizer
and schedule. Team and data are made by the parser of the command line, as in `teamnet fit --config
data/DATASET --config METHOD`. Each row has accuracy and negative log-likelihood on the validation
split, which is for choosing (a learning rate, a default), and on the test split, which is for
reporting.

With ``--leader-epochs`` the Leader is trained first, once for each seed, and kept beside the result
file; each method that has a Leader is then taught by this very one.

Each run is written when it ends. A later call skips the runs that the file has. With several
learning rates a method runs with each of them; with ``--best-lr`` it runs with the one whose mean
accuracy on the validation split is the best so far. Example::

    python benchmarks/accuracy.py --methods team baseline/apart --lr 0.05 0.1 0.2 --seeds 0 \
        --out accuracy.json
    python benchmarks/accuracy.py --methods team baseline/apart --best-lr --seeds 1 2 3 4 \
        --out accuracy.json
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import yaml
from harness import (
    Result,
    ResultFile,
    Row,
    argument_parser,
    load_result,
    markdown,
    mean_and_deviation,
    with_source,
)
from lightning.pytorch import Trainer
from matplotlib.figure import Figure

from teamnet_pl.callbacks.depth_report import team_report
from teamnet_pl.cli.training import TeamArgumentParser, TeamCLI
from teamnet_pl.config_files import config_names, config_path
from teamnet_pl.cooperation import Team
from teamnet_pl.data import ImageDataModule
from teamnet_pl.pictures import add_legend, label_macs, series_style

CONFIGS = config_names()
DATASETS = [name.removeprefix("data/") for name in CONFIGS if name.startswith("data/")]
METHODS = ["team", *(name for name in CONFIGS if name.startswith(("ablation/", "baseline/")))]
CONFIGS_WIDTH = 16
"""Width of the Teammates for which the configs are written."""


# Team and data


def command_line(
    args: argparse.Namespace, method: str, seed: int, lr: float, first: bool = False
) -> list[str]:
    """Lists the words that make the team and the data of a method, as after `teamnet fit`.

    Args:
        args: The arguments of the script.
        method: The method.
        seed: The seed.
        lr: The learning rate.
        first: Whether the Leader is yet to be trained, where it is trained first.
    """
    data = {
        "batch_size": args.batch_size,
        "path": args.path,
        "root": args.root,
        "train_size": args.train_size,
    }
    width = {"width": args.width} if args.width else {}
    leader_width = {"width": args.leader_width} if args.leader_width else {}
    teammate = {"name": args.backbone, "options": width, "depths": args.depths}
    settings = {
        "seed_everything": seed,
        "data": {"init_args": {name: value for name, value in data.items() if value is not None}},
        "model": {
            "leader": {"name": args.backbone, "options": leader_width},
            "a": teammate,
            "b": teammate,
            "optimizer": {"lr": lr},
        },
        "trainer": {
            "accelerator": args.accelerator,
            "enable_checkpointing": False,
            "logger": False,
        },
    }
    configs = [str(config_path(f"data/{args.dataset}")), yaml.safe_dump(settings)]
    if method != "team":
        configs.append(method_config(method, args.width or CONFIGS_WIDTH))
    configs += [str(config_path(name)) for name in args.config]
    if args.leader_epochs and not first and has_leader(method):
        taught = {"leader": {"checkpoint": str(leader_file(args, seed)), "frozen": True}}
        taught["cooperation"] = {"leader": {"ramp": 0.0}}
        configs.append(yaml.safe_dump({"model": taught}))
    return [word for config in configs for word in ("--config", config)]


def has_leader(method: str) -> bool:
    """Tells whether the teams of a method have a Leader."""
    config = {} if method == "team" else yaml.safe_load(config_path(method).read_text())["model"]
    return config.get("leader", {}) is not None


def method_config(name: str, width: int) -> str:
    """Reads the config of a method, with the widths in it scaled to Teammates of a width."""
    config = yaml.safe_load(config_path(name).read_text())
    for member in config["model"].values():
        if isinstance(member, dict) and "width" in member.get("options", {}):
            member["options"]["width"] = member["options"]["width"] * width // CONFIGS_WIDTH
    return yaml.safe_dump(config)


def team_and_data(words: list[str]) -> tuple[Team, ImageDataModule]:
    """Makes a team and a data module by the parser of the command line."""
    cli = TeamCLI(
        Team,
        ImageDataModule,
        subclass_mode_data=True,
        parser_class=TeamArgumentParser,
        save_config_callback=None,
        auto_configure_optimizers=False,
        args=words,
        run=False,
    )
    return cli.model, cli.datamodule


# Training


def make_trainer(args: argparse.Namespace, epochs: int, folder: str) -> Trainer:
    """Makes a trainer that evaluates at the end."""
    return Trainer(
        max_epochs=epochs,
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=epochs,
    )


def be_quiet() -> None:
    """Sets a process up: one thread, no messages."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def leader_file(args: argparse.Namespace, seed: int) -> Path:
    """Returns the file of the Leader that is trained first with a seed."""
    return Path(args.out).with_suffix(f".leader-{seed}.pt").absolute()


def train_leader(args: argparse.Namespace, seed: int) -> None:
    """Trains the Leader alone and writes its weights."""
    be_quiet()
    alone = {"model": {"schedule": {"leader_alone": 1 - 1e-6, "leader_finish": 1.0}}}
    words = command_line(args, "team", seed, args.leader_lr, first=True)
    team, data = team_and_data([*words, "--config", yaml.safe_dump(alone)])
    if args.channels_last:
        team.to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(args, args.leader_epochs, folder).fit(team, datamodule=data)
    assert team.leader is not None
    torch.save(team.leader.state_dict(), leader_file(args, seed))


def measure(args: argparse.Namespace, method: str, seed: int, lr: float) -> list[Row]:
    """Trains one method with one seed; returns a row for each net and depth."""
    be_quiet()
    team, data = team_and_data(command_line(args, method, seed, lr))
    if args.channels_last:
        team.to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, args.epochs, folder)
        start = time.perf_counter()
        trainer.fit(team, datamodule=data)
        seconds = time.perf_counter() - start
        val = team_report(team, trainer, "val")
        trainer.test(team, datamodule=data, verbose=False)
        test = team_report(team, trainer, "test")
    return [
        {
            "method": method,
            "seed": seed,
            "lr": lr,
            "seconds": round(seconds, 1),
            "net": on_val.net,
            "depth": on_val.depth,
            "macs": on_val.macs,
            "val": on_val.accuracy,
            "test": on_test.accuracy,
            "val_nll": on_val.loss,
            "test_nll": on_test.loss,
        }
        for on_val, on_test in zip(val.rows, test.rows, strict=True)
    ]


# Choosing


def mean_of(rows: Iterable[Row], value: str, net: str = "a") -> float:
    """Returns the mean of a value over the depths of a net, and over all seeds in the rows."""
    return statistics.mean(row[value] for row in rows if row["net"] == net)


def best_lr(rows: Iterable[Row], method: str) -> float:
    """Returns the learning rate with which a method's Teammate a was best in validation.

    Rates are compared on the seeds that all of them have.
    """
    by_lr: dict[float, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["method"] == method:
            by_lr[row["lr"]][row["seed"]].append(row)
    if not by_lr:
        raise SystemExit(
            f"There is no run of {method} to choose the learning rate from: give --lr."
        )
    seeds = set.intersection(*(set(by_seed) for by_seed in by_lr.values()))
    return max(
        by_lr, key=lambda lr: statistics.mean(mean_of(by_lr[lr][seed], "val") for seed in seeds)
    )


def chosen_rows(result: Result) -> list[Row]:
    """Selects the rows of each method at its best learning rate."""
    rows = result["rows"]
    best = {method: best_lr(rows, method) for method in dict.fromkeys(r["method"] for r in rows)}
    return [row for row in rows if row["lr"] == best[row["method"]]]


# Tables


def table(result: Result) -> str:
    """Makes the table of a result: accuracy per depth, and the mean beside that of nets apart."""
    rows = chosen_rows(result)
    seeds_of: dict[tuple[str, str], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["net"] != "leader":
            seeds_of[row["method"], row["net"]][row["seed"]].append(row)
    reference = seeds_of.get(("baseline/apart", "a"), {})
    lines = []
    for (method, net), by_seed in seeds_of.items():
        by_rank: dict[int, list[float]] = defaultdict(list)
        means, differences, losses = [], [], []
        for seed, depths in sorted(by_seed.items()):
            depths = sorted(depths, key=lambda row: -row["macs"])
            for rank, row in enumerate(depths):
                by_rank[rank].append(100 * row["test"])
            means.append(100 * statistics.mean(row["test"] for row in depths))
            losses.append(statistics.mean(row["test_nll"] for row in depths))
            if seed in reference and net != "ensemble":
                apart = statistics.mean(row["test"] for row in reference[seed])
                differences.append(means[-1] - 100 * apart)
        cells = [mean_and_deviation(by_rank.get(rank, [])) for rank in range(4)]
        lr = next(iter(by_seed.values()))[0]["lr"]
        lines.append(
            [
                method,
                net,
                f"{lr:g}",
                *cells,
                mean_and_deviation(means),
                mean_and_deviation(differences, "+.1f"),
                f"{statistics.mean(losses):.3f}",
                f"{statistics.mean(depths[0]['seconds'] for depths in by_seed.values()) / 60:.1f}",
                str(len(by_seed)),
            ]
        )
    header = ["method", "net", "learning rate", "deepest", "2nd", "3rd", "4th", "mean"]
    header += ["from nets apart", "NLL", "minutes", "seeds"]
    return with_source(markdown(header, lines), result)


def summary(result: Result) -> str:
    """Makes a short table: accuracy per depth of Teammate a, or of the only net."""
    by_method: dict[str, list[list[Row]]] = defaultdict(list)
    rows = [row for row in chosen_rows(result) if row["net"] == "a"]
    for method, seed in dict.fromkeys((row["method"], row["seed"]) for row in rows):
        depths = [row for row in rows if (row["method"], row["seed"]) == (method, seed)]
        by_method[method].append(sorted(depths, key=lambda row: -row["macs"]))
    lines = []
    for method, runs in by_method.items():
        by_rank = [[100 * row["test"] for row in depth] for depth in zip(*runs, strict=True)]
        cells = [mean_and_deviation(values) for values in by_rank] + [""] * (4 - len(by_rank))
        mean = mean_and_deviation([100 * mean_of(run, "test") for run in runs])
        nll = statistics.mean(mean_of(run, "test_nll") for run in runs)
        lines.append([title(method), *cells, mean, f"{nll:.2f}"])
    header = ["method", "deepest", "2nd", "3rd", "4th", "mean", "NLL"]
    return with_source(markdown(header, lines), result)


def title(method: str) -> str:
    """Writes the name of a method for readers."""
    return method.removeprefix("baseline/").replace("_", " ")


def draw(result: Result, nets: Sequence[str] = ("a",)) -> Figure:
    """Draws accuracy against MACs of all methods, with the deviation over the seeds.

    Args:
        result: The result.
        nets: The nets to draw of each method.
    """
    points: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in chosen_rows(result):
        if row["net"] in nets:
            points[row["method"]][row["macs"]].append(100 * row["test"])
    picture = Figure(figsize=(8, 6), layout="constrained")
    axes = picture.add_subplot()
    for index, (method, by_macs) in enumerate(points.items()):
        macs = sorted(by_macs)
        values = [by_macs[each] for each in macs]
        axes.errorbar(
            macs,
            [statistics.mean(each) for each in values],
            [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values],
            linewidth=2.5 if method == "team" else 1.2,
            capsize=3,
            label=title(method),
            **series_style(index),
        )
    label_macs(axes)
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    add_legend(picture, axes)
    return picture


def main() -> None:
    """Trains all methods with all seeds, except for the runs that the file has."""
    parser = argument_parser(__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="fashion_mnist", metavar="DATASET", help=f"of {', '.join(DATASETS)}")  # fmt: skip # noqa: E501
    parser.add_argument("--root", help="folder of the data, by default that of the config")
    parser.add_argument("--path", help="dataset or folder of `hugging_face`")
    parser.add_argument("--train-size", type=int, help="training images, by default 10 000 of fashion_mnist and all of others")  # fmt: skip # noqa: E501
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.1])
    parser.add_argument("--best-lr", action="store_true", help="the best one so far instead of --lr")  # fmt: skip # noqa: E501
    parser.add_argument("--backbone", default="cifar/resnet20")
    parser.add_argument("--width", type=int, default=8, help="of the Teammates; 0 if they have none")  # fmt: skip # noqa: E501
    parser.add_argument("--leader-width", type=int, default=16)
    parser.add_argument("--leader-epochs", type=int, default=0, help="train the Leader first, for so many epochs")  # fmt: skip # noqa: E501
    parser.add_argument("--leader-lr", type=float, default=0.1)
    parser.add_argument("--depths", type=int, default=4)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["team"], metavar="METHOD")  # fmt: skip # noqa: E501
    parser.add_argument("--config", nargs="+", default=[], help="configs for all methods, such as recipe/ema")  # fmt: skip # noqa: E501
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--figure", help="also draw the file's rows, as this picture")
    args = parser.parse_args()
    if args.train_size is None and args.dataset == "fashion_mnist":
        args.train_size = 10_000

    file = ResultFile(
        args,
        resume=True,
        selecting=("methods", "seeds", "lr"),
        ignored=("jobs", "root", "path", "best_lr", "figure"),
    )
    done = {(row["method"], row["seed"], row["lr"]) for row in file.rows}
    wanted = [
        (method, seed, lr)
        for seed in args.seeds
        for method in args.methods
        for lr in ([best_lr(file.rows, method)] if args.best_lr else args.lr)
    ]
    runs_to_do = [run for run in dict.fromkeys(wanted) if run not in done]
    with ProcessPoolExecutor(args.jobs) as pool:
        taught = {
            seed for method, seed, _ in runs_to_do if args.leader_epochs and has_leader(method)
        }
        untrained = [seed for seed in sorted(taught) if not leader_file(args, seed).exists()]
        list(pool.map(train_leader, [args] * len(untrained), untrained))
        runs = {pool.submit(measure, args, *run): run for run in runs_to_do}
        for run in as_completed(runs):
            file.add(run.result())
            print(*runs[run], "done", flush=True)
    if args.figure:
        draw(load_result(args.out)).savefig(args.figure, dpi=130)


if __name__ == "__main__":
    main()
