"""Fuzzing of every entrance that reads a file, with a canary for code that runs.

Checkpoints, Hub folders, profiles and ``per_depth.json`` are mutated: bytes are flipped or missing,
and values are swapped, missing, of another type, huge, or hostile: import paths, class paths,
addresses, pipes, file names, options of backbones that read files or the Hub. Nothing that a file
names may run; the file must be taken, or refused by one sentence that names it. An audit hook
notices processes, sockets, files outside the run's folder, and imports of modules that only the
input names. Limits of memory and time catch everything else. All cases run in one process, since
the hook does not see others. Example::

    python benchmarks/fuzz.py --seconds 600 --out benchmarks/results/fuzz.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import TINY, Result, ResultFile, Row, argument_parser, markdown, with_source

from teamnet_pl import Team
from teamnet_pl.cli import main as teamnet
from teamnet_pl.deploy import Predictor, Teammate
from teamnet_pl.deploy.runtime.profile import Profile
from teamnet_pl.deploy.serving import server as serving

CANARY = "import pathlib\nSPRUNG = True\ndef spring(*_, **__): pathlib.Path('PWNED').touch()\n"
TOUCH = {"cmd": "touch PWNED"}
NAMES = [
    "subprocess.getoutput",
    "os.system",
    "builtins.exec",
    "canary.spring",
    "torch.hub.load",
    "torchvision.transforms.v2.Lambda",
    "torchvision/resnet18",
    "torchvision/swin_t",
    "timm/resnet10t",
    "timm/vit_tiny_patch16_224",
    "timm/hf-hub:someone/net",
    "timm/local-dir:.",
    "cifar/wrn100000_1",
    "cifar/wrn28_100000",
    "cifar/resnet110",
]
CLASSES = [{"class_path": name, "init_args": TOUCH} for name in NAMES[:5]]
TEXTS = [
    *NAMES,
    "",
    "pipe:touch PWNED",
    "{pipe:touch PWNED,x}",
    "http://127.0.0.1:9/x",
    "s3://bucket/x",
    "file:///etc/hostname",
    "/etc/hostname",
    "canary.yaml",
    "canary.json",
    "canary.py",
    "!!python/object/apply:os.system ['touch PWNED']",
    "{class_path: canary.spring}",
    "[{class_path: canary.spring}]",
    "&a [*a, *a]",
    "${oc.env:HOME}",
    "{{ 7 * 7 }}",
    "\x00",
    "ä" * 10_000,
]
NUMBERS: list[Any] = [
    0, -1, 1, 2, 1.5, 10**5, 10**9, 2**63, 10**40, 1e308, float("nan"), float("inf"), True, None,
]  # fmt: skip
OPTIONS = [
    {"weights": "DEFAULT"},
    {"weights_backbone": "DEFAULT"},
    {"pretrained": True},
    {"checkpoint_path": "canary.pkl"},
    {"pretrained_cfg": {"file": "canary.pkl", "hf_hub_id": "someone/net"}, "pretrained": True},
    {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x"}, "pretrained": True},
    {"cache_dir": "/canary"},
    {"features_only": True},
    {"scriptable": True},
    {"exportable": True},
    {"norm_layer": "canary.spring"},
    {"act_layer": {"class_path": "canary.spring"}},
    {"width": 10**6},
    {"depth": 10**6},
    {"progress": True},
]
SECTIONS = [
    {"trainer": {"callbacks": CLASSES, "default_root_dir": "/canary"}},
    {"config": "canary.yaml"},
    {"_class_path": "canary.spring", "_instantiator": "canary.spring"},
    {"callbacks": {"canary": {}}, "lr_schedulers": [{}], "loops": {"fit_loop": {}}},
]
DATA = [
    {"class_path": name, "init_args": arguments}
    for name in ("teamnet_pl.data.Shards", "teamnet_pl.data.ImageFolder", "teamnet_pl.data.LitData")
    for arguments in (
        {"num_classes": 10, "train_images": 9, "train": "pipe:touch PWNED", "val": "a.tar"},
        {"root": "http://127.0.0.1:9/x"},
        {"train": "s3://bucket/x"},
        {"root": "canary.yaml"},
    )
]
TRAPPED = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "os.forkpty", "pty.spawn", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname",
    "socket.sendto", "ftplib.connect", "smtplib.connect", "urllib.Request", "webbrowser.open",
}  # fmt: skip
CHANGING = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.symlink", "os.link"}
ALLOWED = ("taken", "refused")
REFUSALS = (FileNotFoundError, ModuleNotFoundError, ValueError)


class Sprung(BaseException):
    """Something that the input names ran."""


class Hung(BaseException):
    """A case took too long."""


class Canary:
    """Notices everything that a case does besides reading its files.

    Args:
        folder: Where it may write.
    """

    def __init__(self, folder: Path) -> None:
        self.hits: list[str] = []
        self.armed = False
        self._writable = [str(folder), "/dev/null"]
        libraries = {sys.prefix, sys.base_prefix, *filter(None, sys.path), "/proc", "/sys", "/usr"}
        libraries |= {str(Path(__file__).resolve().parent.parent), "/etc/mime.types", "/dev"}
        self._readable = [*self._writable, *map(os.path.realpath, libraries), *libraries]
        sys.addaudithook(self._notice)

    def _notice(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        # The command line gives this address to `serve`.
        bad = event in TRAPPED and arguments[:2] != ("127.0.0.1", 0)
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            bad = not self._within(arguments[0], self._writable if writes else self._readable)
        elif event in CHANGING:
            bad = not self._within(arguments[0], self._writable)
        elif event == "import":
            bad = arguments[0].split(".")[0] == "canary"
        if bad:
            self.hits.append(f"{event}{arguments[:2]}"[:200])
            raise Sprung(self.hits[-1])

    @staticmethod
    def _within(path: Any, folders: list[str]) -> bool:
        path = os.path.abspath(os.fsdecode(path))
        return any(path == folder or path.startswith(f"{folder}/") for folder in folders)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Notices everything within the context."""
        self.hits.clear()
        self.armed = True
        try:
            yield
        finally:
            self.armed = False
            if Path("PWNED").exists():
                self.hits.append("PWNED")
                Path("PWNED").unlink()


# Mutations


def containers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields every mapping and list in a value, with its path."""
    if isinstance(value, dict | list):
        yield path, value
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from containers(inner, (*path, key))


def hostile(draw: random.Random, path: tuple[Any, ...]) -> Any:
    """Draws a value that does not belong there."""
    kinds: list[Callable[[], Any]] = [
        lambda: draw.choice(TEXTS),
        lambda: draw.choice(NUMBERS),
        lambda: copy.deepcopy(draw.choice(CLASSES)),
        lambda: copy.deepcopy(draw.choice([*SECTIONS, *OPTIONS, [], {}, [[]], {"": None}])),
        lambda: functools.reduce(lambda inner, _: [inner], range(draw.choice([20, 200])), 0),
        lambda: [draw.choice([*TEXTS, *NUMBERS, *CLASSES]) for _ in range(3)],
    ]
    last = path[-1] if path else ""
    if last in ("leader", "a", "b") and draw.random() < 0.5:
        return {"name": draw.choice(NAMES[:5]), "options": dict(TOUCH)}
    if last == "data" and draw.random() < 0.6:
        return copy.deepcopy(draw.choice(DATA))
    if last == "options" and draw.random() < 0.6:
        return {**draw.choice(OPTIONS)}
    if last == "name" and draw.random() < 0.6:
        return draw.choice(NAMES)
    value = draw.choice(kinds)()
    # The data may name a folder to read.
    return "canary.yaml" if "data" in path and str(value).startswith("/") else value


def mutate(draw: random.Random, content: dict[str, Any]) -> Any:
    """Changes a few values anywhere in a nested dictionary."""
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        # There are many weights, so the first-level entry is drawn first.
        top = draw.choice(list(content)) if content else None
        choices = list(containers(content.get(top), (top,))) or [((), content)]
        path, holder = draw.choice([*choices, ((), content)])
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        action = draw.choice(["replace"] * 5 + ["remove", "add", "swap", "rename", "wrap"])
        if not keys or action == "add":
            extra = draw.choice([*SECTIONS, *OPTIONS, {"class_path": draw.choice(NAMES)}])
            if isinstance(holder, dict):
                holder.update(copy.deepcopy(extra))
            else:
                holder.append(hostile(draw, path))
            continue
        key, other = draw.choice(keys), draw.choice(keys)
        if action == "replace":
            holder[key] = hostile(draw, (*path, key))
        elif action == "remove":
            del holder[key]
        elif action == "swap":
            holder[key], holder[other] = holder[other], holder[key]
        elif action == "rename" and isinstance(holder, dict):
            holder[draw.choice([*TEXTS[:6], 1, None])] = holder.pop(key)
        else:
            holder[key] = draw.choice(
                [[holder[key]], {"value": holder[key]}, str(holder[key])[:99]]
            )
    return content


def damage(draw: random.Random, data: bytes) -> bytes:
    """Flips, cuts or repeats bytes."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 5, 50])):
        at = draw.randrange(len(changed) or 1)
        match draw.choice(["flip", "flip", "cut", "zero", "repeat"]):
            case "flip" if changed:
                changed[at] ^= 1 << draw.randrange(8)
            case "cut":
                del changed[at:]
            case "zero":
                changed[at : at + 8] = bytes(8)
            case _:
                changed[at:at] = changed[at : at + 16]
    return bytes(changed)


class Malicious:
    """Runs a command when unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch PWNED",)


# Cases


class Fuzzer:
    """Makes and runs cases.

    Args:
        folder: The current folder, empty.
        seed: Seed of all cases.
        limit_s: Seconds that a case may take.
    """

    def __init__(self, folder: Path, seed: int, limit_s: float) -> None:
        self.folder, self.seed, self.limit_s = folder, seed, limit_s
        for name, text in {
            "canary.py": CANARY,
            "canary.yaml": "class_path: canary.spring\n",
            "canary.json": '{"class_path": "canary.spring"}',
        }.items():
            (folder / name).write_text(text)
        (folder / "canary.pkl").write_bytes(pickle.dumps(Malicious()))
        sys.path.insert(0, str(folder))
        self.good = folder / "good"
        fit = ["fit", "--config", str(TINY), "--test_after_fit", "true"]
        self.quietly(lambda: teamnet(fit))
        shutil.copytree("logs/version_0/checkpoints", self.good)
        self.best = self.good / "best.ckpt"
        self.quietly(lambda: teamnet(["profile", "--ckpt_path", str(self.best), "--runs", "1"]))
        Teammate.from_checkpoint(self.best).save_pretrained(self.good / "hub")
        serving.run = lambda server, _: server.load()  # type: ignore[assignment]
        self.canary = Canary(folder)

    @staticmethod
    def quietly(call: Callable[[], Any]) -> str:
        """Makes a call, and returns the errors that it printed."""
        errors = io.StringIO()
        with (
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):
            try:
                call()
            except SystemExit:
                if "error: " not in errors.getvalue():
                    raise
        return errors.getvalue()

    def checkpoint(self, draw: random.Random) -> str:
        """Replaces the checkpoint by a mutated one; returns the kind of mutation."""
        path, good = Path("case/best.ckpt"), self.best.read_bytes()
        kind = draw.choice(["values"] * 7 + ["bytes", "pickle", "code"])
        if kind == "values":
            torch.save(mutate(draw, torch.load(self.best, weights_only=True)), path)
        elif kind == "bytes":
            path.write_bytes(damage(draw, good))
        elif kind == "pickle":  # with correct checksums
            with zipfile.ZipFile(self.best) as old, zipfile.ZipFile(path, "w") as new:
                for name in old.namelist():
                    data = old.read(name)
                    new.writestr(name, damage(draw, data) if name.endswith(".pkl") else data)
        else:
            path.write_bytes(b"")
            torch.save(torch.load(self.best, weights_only=True) | {"x": Malicious()}, path)
        return kind

    def hub(self, draw: random.Random) -> str:
        """Replaces a file of the Hub folder by a mutated one; returns the kind of mutation."""
        config, weights = Path("case/hub/config.json"), Path("case/hub/model.safetensors")
        kind = draw.choice(["values"] * 5 + ["bytes", "weights"])
        if kind == "values":
            config.write_text(json.dumps(mutate(draw, json.loads(config.read_text()))))
        else:
            path = config if kind == "bytes" else weights
            path.write_bytes(damage(draw, path.read_bytes()))
        return kind

    def text(self, draw: random.Random, name: str) -> str:
        """Replaces a JSON file by a mutated one; returns the kind of mutation."""
        path = Path("case") / name
        if draw.random() < 0.1:
            path.write_text("[" * 100_000 + "]" * 100_000)
            return "nested"
        if draw.random() < 0.3:
            path.write_bytes(damage(draw, path.read_bytes()))
            return "bytes"
        whole = {"whole": json.loads(path.read_text())}
        path.write_text(json.dumps(mutate(draw, whole).get("whole")))
        return "values"

    def entrances(self) -> dict[str, tuple[Callable[[], Any], str]]:
        """Returns each entrance as a call, and the file that a refusal must name."""
        best, profile = "case/best.ckpt", "case/profile_a_cpu.json"
        short = ["--trainer.enable_progress_bar", "false", "--trainer.limit_test_batches", "1"]
        short += ["--trainer.limit_predict_batches", "1", "--trainer.logger", "false"]
        words = {
            "test": ["test", *short],
            "predict": ["predict", *short],
            "fit": ["fit", "--trainer.fast_dev_run", "1"],
            "profile": ["profile", "--runs", "1", "--batch_sizes", "[1]"],
            "export": ["export", "--out", "out", "--formats", "[safetensors,hub]"],
            "serve": ["serve", "--port", "0"],
        }
        calls: dict[str, tuple[Callable[[], Any], str]] = {
            f"teamnet {name}": (functools.partial(teamnet, [*line, "--ckpt_path", best]), best)
            for name, line in words.items()
        }
        served = ["serve", "--port", "0", "--ckpt_path", best, "--profile", profile]
        return calls | {
            "Team.load_from_checkpoint": (lambda: Team.load_from_checkpoint(best), best),
            "Teammate.from_checkpoint": (lambda: Teammate.from_checkpoint(best), best),
            "Predictor.from_checkpoint": (lambda: Predictor.from_checkpoint(best), best),
            "Teammate.from_pretrained": (lambda: Teammate.from_pretrained("case/hub"), "case/hub"),
            "Profile.load": (lambda: Profile.load(profile), profile),
            "Predictor with profile": (
                lambda: Predictor.from_checkpoint(best, profile=profile),
                profile,
            ),
            "teamnet serve --profile": (functools.partial(teamnet, served), profile),
        }

    def prepare(self, draw: random.Random) -> tuple[str, str]:
        """Makes the files of a case; returns its mutation and its entrance."""
        shutil.rmtree("case", ignore_errors=True)
        shutil.copytree(self.good, "case")
        names = list(self.entrances())
        file = draw.choice(["checkpoint"] * 6 + ["hub", "hub", "profile", "per_depth"])
        if file == "checkpoint":
            return f"{file}, {self.checkpoint(draw)}", draw.choice(names[:9])
        if file == "hub":
            return f"{file}, {self.hub(draw)}", "Teammate.from_pretrained"
        if file == "profile":
            return f"{file}, {self.text(draw, 'profile_a_cpu.json')}", draw.choice(names[-3:])
        readers = ["teamnet profile", "teamnet export", "teamnet serve", *names[7:9]]
        return f"{file}, {self.text(draw, 'per_depth.json')}", draw.choice(readers)

    def case(self, number: int) -> Row:
        """Runs one case."""
        draw = random.Random(f"{self.seed} {number}")
        mutation, entrance = self.prepare(draw)
        outcome, message = self.outcome(entrance, mutation)
        row = {"case": number, "mutation": mutation, "entrance": entrance, "outcome": outcome}
        return row | {"message": message[-500:]}

    def outcome(self, entrance: str, mutation: str) -> tuple[str, str]:
        """Calls an entrance; returns the outcome, and the message if there is one."""
        call, file = self.entrances()[entrance]
        kind = mutation.split(",")[0]  # a message may say "the profile" for the given one
        named = {"per_depth": "per_depth.json", "profile": "profile"}.get(kind, file)
        signal.setitimer(signal.ITIMER_REAL, self.limit_s)
        try:
            with self.canary.watch():
                message = self.quietly(call)
            outcome = "refused" if "error: " in message else "taken"
            message = message.rpartition("error: ")[2] if outcome == "refused" else ""
        except REFUSALS as error:
            outcome, message = "refused", str(error)
            if entrance.startswith("teamnet"):
                outcome = "traceback"
        except BaseException as error:
            outcome, message = type(error).__name__, f"{error}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self.canary.hits:
            return "canary", "; ".join(self.canary.hits)
        flat = "".join(message.split())
        if outcome == "refused" and "Traceback" in message:
            return "traceback", message
        if outcome == "refused" and not any(part in flat for part in (named, Path(named).name)):
            return "unnamed", message
        return outcome, message


def hang(*_: Any) -> None:
    """Ends a case that takes too long."""
    raise Hung


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Makes a temporary folder the working folder."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


def check_whole_files(fuzzer: Fuzzer) -> None:
    """Checks that every entrance takes whole files without an alarm."""
    Path("case").mkdir()
    for entrance in fuzzer.entrances():
        shutil.rmtree("case")
        shutil.copytree(fuzzer.good, "case")
        fuzzer.outcome(entrance, "none")  # imports and caches
        outcome, message = fuzzer.outcome(entrance, "none")
        if outcome != "taken":
            sys.exit(f"{entrance} does not take whole files: {outcome}, {message}")


def limit_memory(gib: float) -> None:
    """Limits the memory of this process to that of now and some more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def measure(args: argparse.Namespace) -> list[Row]:
    """Runs cases until the time is over; returns a row for each."""
    rows: list[Row] = []
    with temporary_folder() as folder:
        fuzzer = Fuzzer(folder, args.seed, args.limit_s)
        check_whole_files(fuzzer)
        limit_memory(args.limit_gib)
        until = time.monotonic() + args.seconds
        for number in args.cases or itertools.count():
            if time.monotonic() > until:
                break
            rows.append(fuzzer.case(number))
            if rows[-1]["outcome"] not in ALLOWED:
                print(json.dumps(rows[-1]), flush=True)
    return rows


def table(result: Result) -> str:
    """Tabulates the number of cases by mutation and outcome."""
    counts: Counter[tuple[str, str]] = Counter()
    for row in result["rows"]:
        counts[row["mutation"], row["outcome"]] += row["cases"]
    rows = [[*key, str(count)] for key, count in sorted(counts.items())]
    return with_source(markdown(["mutation", "outcome", "cases"], rows), result)


def main() -> None:
    """Runs cases, and writes how many had which outcome."""
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, nargs="+", help="numbers of the only cases to run")
    parser.add_argument("--limit-s", type=float, default=20, help="time of one case")
    parser.add_argument(
        "--limit-gib", type=float, default=4, help="memory beyond that at the start"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, hang)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    file = ResultFile(args)
    rows = measure(args)
    counts = Counter((row["mutation"], row["entrance"], row["outcome"]) for row in rows)
    failures = [row for row in rows if row["outcome"] not in ALLOWED]
    file.extra["failures"] = failures
    file.add(
        {"mutation": mutation, "entrance": entrance, "outcome": outcome, "cases": cases}
        for (mutation, entrance, outcome), cases in sorted(counts.items())
    )
    print(table(file.result))
    if failures:
        sys.exit(f"{len(failures)} of {len(rows)} cases were neither taken nor refused.")


if __name__ == "__main__":
    main()
