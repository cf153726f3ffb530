"""Compatibility of every family of torchvision and every module of timm with elastic nets.

The smallest model of each is examined (except for those that timm has for its tests). A model works
if all of this holds; otherwise it is refused with a reason, or it is wrong:

- packed = separate: in training mode without dropout, outputs and gradients of the packed forward
  are those of one forward for each depth of a plain copy whose skipped blocks return their input;
- extracted = set depth: in evaluation mode, the extracted net gives the same outputs;
- one training step leaves no output infinite or NaN, at any depth.

The precision is float64 where the model takes it and has fewer than 100 million parameters. Each
row is written when its model has been examined. A later call skips the families that the file has.
Example::

    python benchmarks/compatibility.py --out benchmarks/results/compatibility.json
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import timm
import timm.layers
import torch
import torchvision
from harness import Result, ResultFile, Row, argument_parser, markdown, with_source
from torch import Tensor, nn

from teamnet_pl.backbones import BackboneConfig, create_backbone, default_input_shape
from teamnet_pl.elastic import ElasticNet
from teamnet_pl.elastic.plan import pass_through

CLASSES = 10
RANDOM = (nn.modules.dropout._DropoutNd, torchvision.ops.StochasticDepth, timm.layers.DropPath)


def families() -> dict[str, list[str]]:
    """Lists the names of the models of each family."""
    names: dict[str, list[str]] = defaultdict(list)
    for name in torchvision.models.list_models(module=torchvision.models):
        module = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        names[f"torchvision/{module}"].append(f"torchvision/{name}")
    for module in timm.list_modules():
        models = timm.list_models(module=module)
        names[f"timm/{module}"] = [f"timm/{n}" for n in models if not n.startswith("test_")]
    return dict(sorted(names.items()))


def parameters(name: str) -> int:
    """Counts the parameters of a model."""
    library, _, model = name.partition("/")
    if library == "torchvision":
        return int(torchvision.models.get_model_weights(model).DEFAULT.meta["num_params"])
    with torch.device("meta"):  # without memory for them
        return sum(p.numel() for p in timm.create_model(model).parameters())


def check(name: str) -> Row:
    """Examines a model; an error is a wrong result."""
    begin = time.perf_counter()
    row: Row = {"model": name, "result": "wrong"}
    try:
        row |= examine(name)
    except Exception:
        row["reason"] = traceback.format_exc().strip()
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def examine(name: str) -> Row:
    """Makes a model elastic and compares it with plain copies of itself."""
    torch.manual_seed(0)
    backbone, shape = create(name)
    row: Row = {
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
        if hasattr(module, "drop_rate"):  # of functional dropout
            module.drop_rate = 0.0
    try:
        net = ElasticNet(copy.deepcopy(plain), shape, depths=2)
    except ValueError as error:
        return row | {"result": "refused", "reason": str(error)}
    if len(net.blocks) > 1:
        net = ElasticNet(copy.deepcopy(plain), shape, depths=3, policy="round_robin")
    row |= {"stages": net.stages, "blocks": [block.name for block in net.blocks]}
    row["dtype"] = str(images.dtype).rpartition(".")[2]
    row["packed"], row["gradient"] = packed_differences(net.train(), plain.train(), images)
    row["finite"] = stays_finite(net, images)
    limit = 1e-6 if exact else 1e-2
    if max(row["packed"], row["gradient"]) > limit or not row["finite"]:
        return row | {"result": "wrong"}
    try:
        row["extracted"] = extracted_difference(net.eval(), images)
    except ValueError as error:
        return row | {"result": "not extracted", "reason": str(error)}
    return row | {"result": "works" if row["extracted"] < limit else "wrong"}


def create(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """Makes a model, and finds the smallest images that it takes."""
    default_shape = default_input_shape(BackboneConfig(name))
    for size in (64, 128, 224, None):
        options = {"img_size": size} if size else {}
        try:
            backbone = create_backbone(BackboneConfig(name, options), CLASSES, 3)
        except (AssertionError, RuntimeError, ValueError):
            backbone = create_backbone(BackboneConfig(name), CLASSES, 3)
        shape = (3, size, size) if size else default_shape
        if takes(backbone, torch.rand(2, *shape)):
            return backbone, shape
    raise ValueError(f"{name} does not take images of {default_shape}.")


@torch.no_grad()
def takes(backbone: nn.Module, images: Tensor) -> bool:
    """Returns whether a backbone takes images without an error."""
    try:
        backbone.eval()(images)
    except Exception:
        return False
    return True


def packed_differences(net: ElasticNet, plain: nn.Module, images: Tensor) -> tuple[float, float]:
    """Compares outputs and gradients of the packed forward with those of plain copies."""
    logits = net.packed(images)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    (logits * weights).sum().backward()
    outputs: list[Tensor] = []
    gradients: dict[str, Tensor] = {}
    for depth, depth_weights in zip(net.depths, weights, strict=True):
        twin = copy.deepcopy(plain)
        for block, kept in zip(net.blocks, depth.kept, strict=True):
            if not kept:
                twin.get_submodule(block.name).forward = skipped(block.passthrough)
        output = twin(images)
        (output * depth_weights).sum().backward()
        outputs.append(output.detach())
        for key, parameter in twin.named_parameters():
            if parameter.grad is not None:
                gradients[key] = gradients.get(key, 0) + parameter.grad
    packed = {k: p.grad for k, p in net.backbone.named_parameters() if p.grad is not None}
    if packed.keys() != gradients.keys():
        raise AssertionError(f"Gradients differ in {packed.keys() ^ gradients.keys()}.")
    net.zero_grad()
    gradient = max((distance(packed[key], gradients[key]) for key in packed), default=0.0)
    return distance(logits.detach(), torch.stack(outputs)), gradient


def skipped(passthrough: int) -> Callable[..., Any]:
    """Makes the forward of a skipped block."""
    return lambda *args, **_: pass_through(passthrough, args)


@torch.no_grad()
def extracted_difference(net: ElasticNet, images: Tensor) -> float:
    """Compares the outputs of extracted nets with those of the net at their depth."""
    differences = []
    for depth in net.depths:
        with net.at(depth):
            differences.append(distance(net(images), net.extract(depth).eval()(images)))
    return max(differences)


def stays_finite(net: ElasticNet, images: Tensor) -> bool:
    """Takes a training step, and checks whether the outputs of all depths are finite."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    logits = net.packed(images)
    labels = torch.arange(len(images)).repeat(len(net.depths))
    nn.functional.cross_entropy(logits.flatten(0, 1), labels).backward()
    optimizer.step()
    with torch.no_grad():
        return bool(net.packed(images).isfinite().all())


def distance(a: Tensor, b: Tensor) -> float:
    """Computes the largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-3))


def measure(work: Iterable[tuple[str, str]], jobs: int) -> Iterator[Row]:
    """Yields a row for each family and model, examined in a fresh process, which frees memory."""
    torch.set_num_threads(1)
    families_and_models = list(work)
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        rows = pool.imap(check, [model for _, model in families_and_models], chunksize=1)
        for (family, _), row in zip(families_and_models, rows, strict=True):
            yield {"family": family} | row


def line(row: Row) -> str:
    """Summarizes a row."""
    reason = row.get("reason", "").strip().splitlines()[-1:]
    return (
        f"{row['family']:40} {row['model']:48} {row['result']:8} {row.get('stages', '')} "
        f"{row['seconds']} s {''.join(reason)[:150]}"
    )


def table(result: Result) -> str:
    """Tabulates the families, below the counts of results by library."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    rows = []
    for row in sorted(result["rows"], key=lambda row: row["family"]):
        counts[row["family"].partition("/")[0]][row["result"]] += 1
        stages = "-".join(map(str, row.get("stages", [])))
        size = "x".join(map(str, row.get("input_shape", [])[1:]))
        reason = row.get("reason", "").partition(". ")[0]
        model = row["model"].partition("/")[2]
        rows.append([row["family"], model, size, row["result"], stages, reason])
    summary = " ".join(
        f"{library}: {', '.join(f'{count} {result}' for result, count in by_result.most_common())}."
        for library, by_result in counts.items()
    )
    header = ["family", "smallest model", "image size", "result", "blocks per stage", "reason"]
    return with_source(f"{summary}\n\n{markdown(header, rows)}", result)


def main() -> None:
    """Examines all families, except for those that the file has."""
    parser = argument_parser(__doc__)
    parser.add_argument("--families", nargs="+", help="only these, such as timm/convnext")
    parser.add_argument(
        "--max-parameters", type=int, default=200_000_000, help="leave larger models out"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    models = families()
    if unknown := set(args.families or ()) - set(models):
        parser.error(f"There is no {', '.join(unknown)}. There are {', '.join(models)}.")
    versions = f"timm {timm.__version__}, torchvision {torchvision.__version__}"
    file = ResultFile(args, versions, resume=True, selecting=["families"], ignored=["jobs"])
    done = {row["family"] for row in file.rows}
    names = [family for family in args.families or models if family not in done]
    work = [(family, min(models[family], key=parameters)) for family in names]
    work = [(family, name) for family, name in work if parameters(name) <= args.max_parameters]
    file.write(measure(work, args.jobs), line)
    if wrong := [row["model"] for row in file.rows if row["result"] == "wrong"]:
        sys.exit(f"Wrong: {', '.join(wrong)}.")


if __name__ == "__main__":
    main()
