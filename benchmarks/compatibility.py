"""Which architectures can be made elastic: every family of torchvision and every module of timm.

Of each the smallest model is taken (without those that timm has for its own tests). A model works
when all of this holds; otherwise it is refused with a reason, or something is wrong:

- packed = separate: in training mode, dropout off, outputs and gradients of the packed forward are
  those of one forward for each depth of a plain copy whose skipped blocks hand their input on;
- extracted = set depth: in evaluation mode, the extracted net gives the same outputs;
- one training step leaves no output infinite or NaN, at any depth.

In float64 where the model takes it and has fewer than 100 million parameters.

Example::

    python benchmarks/compatibility.py --out benchmarks/results/compatibility.json
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any

import timm
import timm.layers
import torch
import torchvision
from results_file import save_results
from torch import Tensor, nn

from teamnet_pl.backbones import BackboneConfig, create_backbone, default_input_shape
from teamnet_pl.elastic import ElasticNet

CLASSES = 10
RANDOM = (nn.modules.dropout._DropoutNd, torchvision.ops.StochasticDepth, timm.layers.DropPath)


def families() -> dict[str, list[str]]:
    """Names of the models of each family."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in torchvision.models.list_models(module=torchvision.models):
        module = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        found[f"torchvision/{module}"].append(f"torchvision/{name}")
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        found[f"timm/{module}"] = [f"timm/{n}" for n in names if not n.startswith("test_")]
    return dict(sorted(found.items()))


def parameters(name: str) -> int:
    """Number of parameters of a model."""
    library, _, model = name.partition("/")
    if library == "torchvision":
        return int(torchvision.models.get_model_weights(model).DEFAULT.meta["num_params"])
    with torch.device("meta"):  # does not fill it with numbers
        return sum(p.numel() for p in timm.create_model(model).parameters())


def check(name: str) -> dict[str, Any]:
    """A row of the table."""
    begin = time.perf_counter()
    row: dict[str, Any] = {"model": name, "result": "wrong"}
    try:
        row |= examine(name)
    except Exception:
        row["reason"] = traceback.format_exc().strip()
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def examine(name: str) -> dict[str, Any]:
    """Makes a model elastic and holds it against plain copies of itself."""
    torch.manual_seed(0)
    backbone, shape = create(name)
    row: dict[str, Any] = {
        "class": type(backbone).__name__,
        "input_shape": shape,
        "parameters": sum(p.numel() for p in backbone.parameters()),
    }
    images = torch.rand(2, *shape)
    exact = row["parameters"] < 1e8 and takes(backbone.double(), images.double())
    plain, images = (backbone, images.double()) if exact else (backbone.float(), images)
    for module in plain.modules():
        if isinstance(module, RANDOM):
            module.p = module.drop_prob = 0.0
        if hasattr(module, "drop_rate"):  # of dropout by a function
            module.drop_rate = 0.0
    try:
        net = ElasticNet(copy.deepcopy(plain), shape, depths=2)
    except ValueError as error:
        return row | {"result": "refused", "reason": str(error)}
    if len(net.blocks) > 1:
        net = ElasticNet(copy.deepcopy(plain), shape, depths=3, policy="round_robin")
    row |= {"stages": net.stages, "blocks": [block.name for block in net.blocks]}
    row["dtype"] = str(images.dtype).rpartition(".")[2]
    row["packed"], row["gradient"] = packed_differs(net.train(), plain.train(), images)
    row["finite"] = stays_finite(net, images)
    limit = 1e-6 if exact else 1e-2
    if max(row["packed"], row["gradient"]) > limit or not row["finite"]:
        return row | {"result": "wrong"}
    try:
        row["extracted"] = extracted_differs(net.eval(), images)
    except ValueError as error:
        return row | {"result": "not extracted", "reason": str(error)}
    return row | {"result": "works" if row["extracted"] < limit else "wrong"}


def create(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """Makes a model for small images, if it is made for one size, and finds one that it takes."""
    own = default_input_shape(BackboneConfig(name))
    for size in (64, 128, 224, None):
        options = {"img_size": size} if size else {}
        try:
            backbone = create_backbone(BackboneConfig(name, options), CLASSES, 3)
        except (AssertionError, RuntimeError, ValueError):
            backbone = create_backbone(BackboneConfig(name), CLASSES, 3)
        shape = (3, size, size) if size else own
        if takes(backbone, torch.rand(2, *shape)):
            return backbone, shape
    raise ValueError(f"{name} does not take images of {own}.")


@torch.no_grad()
def takes(backbone: nn.Module, images: Tensor) -> bool:
    """Whether a backbone takes images without failing."""
    try:
        backbone.eval()(images)
    except Exception:
        return False
    return True


def packed_differs(net: ElasticNet, plain: nn.Module, images: Tensor) -> tuple[float, float]:
    """How far outputs and gradients of the packed forward are from those of plain copies."""
    logits = net.packed(images)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    (logits * weights).sum().backward()
    outputs, gradients = [], {}
    for depth, own in zip(net.depths, weights, strict=True):
        twin = copy.deepcopy(plain)
        for block, kept in zip(net.blocks, depth.kept, strict=True):
            if not kept:
                twin.get_submodule(block.name).forward = partial(skip, block.passthrough)
        output = twin(images)
        (output * own).sum().backward()
        outputs.append(output.detach())
        for key, parameter in twin.named_parameters():
            if parameter.grad is not None:
                gradients[key] = gradients.get(key, 0) + parameter.grad
    found = {k: p.grad for k, p in net.backbone.named_parameters() if p.grad is not None}
    if found.keys() != gradients.keys():
        raise AssertionError(f"Gradients differ in {found.keys() ^ gradients.keys()}.")
    net.zero_grad()
    apart = max((distance(found[key], gradients[key]) for key in found), default=0.0)
    return distance(logits.detach(), torch.stack(outputs)), apart


def skip(passthrough: int, *args: Any, **_: Any) -> Any:
    """What a skipped block returns."""
    return args[:passthrough] if passthrough else args[0]


@torch.no_grad()
def extracted_differs(net: ElasticNet, images: Tensor) -> float:
    """How far the outputs of extracted nets are from those of the net at their depth."""
    apart = []
    for depth in net.depths:
        with net.at(depth):
            apart.append(distance(net(images), net.extract(depth).eval()(images)))
    return max(apart)


def stays_finite(net: ElasticNet, images: Tensor) -> bool:
    """Takes a step and looks at all depths."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    logits = net.packed(images)
    labels = torch.arange(len(images)).repeat(len(net.depths))
    nn.functional.cross_entropy(logits.flatten(0, 1), labels).backward()
    optimizer.step()
    with torch.no_grad():
        return bool(net.packed(images).isfinite().all())


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-3))


def checked(names: Iterable[tuple[str, str]], jobs: int) -> Iterable[dict[str, Any]]:
    """Rows of some models, each examined in a process of its own, for its memory's sake."""
    torch.set_num_threads(1)
    work = list(names)
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        rows = pool.imap(check, [name for _, name in work], chunksize=1)
        for (family, _), row in zip(work, rows, strict=True):
            yield {"family": family} | row


def main() -> None:
    """Checks all families and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", help="only these, such as timm/convnext")
    parser.add_argument(
        "--max-parameters", type=int, default=200_000_000, help="leave larger models out"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    found = families()
    if unknown := set(args.families or ()) - set(found):
        parser.error(f"There is no {', '.join(unknown)}. There are {', '.join(found)}.")
    work = [(family, min(found[family], key=parameters)) for family in args.families or found]
    work = [(family, name) for family, name in work if parameters(name) <= args.max_parameters]
    rows = []
    for row in checked(work, args.jobs):
        rows.append(row)
        reason = row.get("reason", "").strip().splitlines()[-1:]
        print(
            f"{row['family']:40} {row['model']:48} {row['result']:8} {row.get('stages', '')} "
            f"{row['seconds']} s {''.join(reason)[:150]}",
            flush=True,
        )
    save_results(args, rows, f"timm {timm.__version__}, torchvision {torchvision.__version__}")
    wrong = [row["model"] for row in rows if row["result"] == "wrong"]
    if wrong:
        sys.exit(f"Wrong: {', '.join(wrong)}.")


if __name__ == "__main__":
    main()
