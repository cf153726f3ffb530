"""The packed forward, compared with one forward and backward of a plain net for each depth."""

import copy
import functools
from dataclasses import dataclass
from typing import get_args

import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from teamnet_pl.elastic import DepthPolicy, ElasticNet, depth_costs
from tests.helpers.nets import (
    basic_resnet,
    block_names,
    make_backbone,
    make_elastic,
    plain_at,
    resnet,
    swin,
    torchvision_vit,
    train,
)
from tests.helpers.strategies import depth_specs

SHAPE = (3, 8, 8)
POLICIES = get_args(DepthPolicy)
RATE = 0.01


def close(actual, expected, name=""):
    torch.testing.assert_close(
        actual, expected, rtol=1e-10, atol=1e-10, msg=lambda message: f"{name}: {message}"
    )


class Separate:
    """The truth: a plain net for each depth, trained as if they shared weights."""

    def __init__(self, backbone, net, per_depth_affine=False):
        self.nets = [plain_at(backbone, net, depth) for depth in net.depths]
        self.kept = [depth.kept for depth in net.depths]
        self.blocks = [block.name for block in net.blocks]
        norms = [name for name, m in backbone.named_modules() if isinstance(m, nn.BatchNorm2d)]
        self.norms = norms if per_depth_affine else []
        # The modules of these backbones are registered in the order in which they run.
        self.order = [name for name, _ in backbone.named_modules()]

    def owner(self, depth, name):
        """The key of the weights of a depth, which differ if other blocks run before them."""
        layer = name.rpartition(".")[0]
        if layer not in self.norms:
            return name, ()
        before = [
            self.order.index(block) < self.order.index(layer) and not layer.startswith(f"{block}.")
            for block in self.blocks
        ]
        return name, self.kept[depth][: sum(before)]

    def step(self, images, gradients):
        """Takes a step of plain gradient descent; returns logits and gradients."""
        logits, summed = [], {}
        for depth, (net, gradient) in enumerate(zip(self.nets, gradients, strict=True)):
            net.zero_grad()
            logits.append(net(images))
            logits[-1].backward(gradient)
            for name, parameter in net.named_parameters():
                owner = self.owner(depth, name)
                summed[owner] = summed.get(owner, 0) + parameter.grad
        with torch.no_grad():
            for depth, net in enumerate(self.nets):
                for name, parameter in net.named_parameters():
                    parameter -= RATE * summed[self.owner(depth, name)]
        return logits, summed


def gradients_of(net):
    """The gradients by parameter name, those of several copies with the deepest stream first."""
    parameters = {name: [parameter] for name, parameter in net.backbone.named_parameters()}
    for layer, copies in net.norms.items():
        for copied in copies:
            for name, parameter in copied.named_parameters():
                same_name = parameters[f"{layer.replace('-', '.')}.{name}"]
                if parameter is not same_name[0]:
                    same_name.append(parameter)
    return {name: [p.grad for p in same_name] for name, same_name in parameters.items()}


@dataclass
class Case:
    kind: str
    stages: list
    norm: str
    depths: object
    policy: str


@st.composite
def cases(draw, kinds=("residual", "preactivation", "transformer"), norms=None):
    kind = draw(st.sampled_from(kinds))
    stage = st.tuples(st.integers(1, 4), st.booleans())
    stages = draw(st.lists(stage, min_size=1, max_size=3))
    counts = [blocks - down for blocks, down in stages if blocks > down]
    if kind == "transformer":
        counts = [sum(blocks for blocks, _ in stages)]
    assume(counts)
    assume(len(counts) == 1 or max(counts) > 1)  # or blocks of one shape are one stage
    norm = draw(st.sampled_from(norms or ["batch", "batch", "group", "layer"]))
    return Case(kind, stages, norm, draw(depth_specs(counts)), draw(st.sampled_from(POLICIES)))


def compare_with_plain_nets(
    case, training, batch, size, steps=3, per_depth_affine=False, grad_checkpointing=False
):
    backbone = make_backbone(case.kind, case.stages, case.norm)
    pristine = copy.deepcopy(backbone).train(training)
    net = ElasticNet(
        backbone,
        SHAPE,
        depths=case.depths,
        policy=case.policy,
        per_depth_affine=per_depth_affine,
        grad_checkpointing=grad_checkpointing,
    ).train(training)
    assert [block.name for block in net.blocks] == block_names(case.kind, case.stages)
    truth = Separate(pristine, net, per_depth_affine)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        images = torch.randn(batch, 3, *size, dtype=torch.float64, generator=generator)
        gradients = torch.randn(
            len(net.depths), batch, 5, dtype=torch.float64, generator=generator
        ) / (batch * len(net.depths))
        optimizer.zero_grad()
        logits = net.packed(images)
        logits.backward(gradients)
        expected, summed = truth.step(images, gradients)
        close(logits, torch.stack(expected), "logits")
        by_name = {}
        for (name, _), gradient in summed.items():  # the deepest depth's first
            by_name.setdefault(name, []).append(gradient)
        close(gradients_of(net), by_name, "gradients")
        optimizer.step()

    for depth, plain in zip(net.depths, truth.nets, strict=True):
        extracted = net.extract(depth)
        # The names in an extracted net move up, the order stays.
        close(list(extracted.buffers()), list(plain.buffers()), f"statistics of {depth}")
        close(list(extracted.parameters()), list(plain.parameters()), f"weights of {depth}")
        with net.eval().at(depth), torch.no_grad():
            close(net(images), plain.eval()(images), f"{depth} in eval mode")
    return net, pristine


sizes = st.tuples(st.integers(9, 14), st.integers(9, 14))


@given(case=cases(), training=st.booleans(), batch=st.integers(1, 5), size=sizes)
@settings(max_examples=60)
def test_packed_equals_one_forward_per_depth(case, training, batch, size):
    net, pristine = compare_with_plain_nets(case, training, batch, size)
    assert len(list(net.parameters())) == len(list(pristine.parameters()))  # all are shared
    changed = [
        not torch.equal(*pair)
        for pair in zip(net.backbone.buffers(), pristine.buffers(), strict=True)
    ]
    assert changed == [training] * len(changed)


@given(case=cases(kinds=["residual", "preactivation"], norms=["batch"]), training=st.booleans())
@settings(max_examples=30)
def test_packed_with_affine_weights_per_depth(case, training):
    net, pristine = compare_with_plain_nets(
        case, training, batch=3, size=(9, 11), per_depth_affine=True
    )
    num_copies = sum(len(copies) for copies in net.norms.values())
    assert len(list(net.parameters())) == len(list(pristine.parameters())) + 2 * num_copies


@given(case=cases(), per_depth_affine=st.booleans())
@settings(max_examples=30)
def test_gradient_checkpointing_changes_no_result(case, per_depth_affine):
    per_depth_affine &= case.norm == "batch"
    compare_with_plain_nets(
        case,
        training=True,
        batch=3,
        size=(9, 11),
        per_depth_affine=per_depth_affine,
        grad_checkpointing=True,
    )


def kept_for_backward(net, step):
    """The bytes that autograd keeps besides the weights, and the result of a step."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # so that the memory is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = step()
    for parameter in net.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), logits


@pytest.mark.parametrize("packed", [True, False])
def test_gradient_checkpointing_keeps_less_and_runs_blocks_again(packed):
    images = torch.randn(4, *SHAPE)
    kept, runs, gradients = {}, {}, {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        # With stochastic depth, a block that runs again must draw the same random numbers.
        options = {"num_classes": 5, "img_size": 8, "patch_size": 2, "drop_path_rate": 0.5}
        backbone = timm.create_model("test_vit", **options)
        net = ElasticNet(backbone, SHAPE, depths=3, grad_checkpointing=checkpointing)
        calls = []
        for block in net.blocks:
            module = net.backbone.get_submodule(block.name)
            module.attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with net.at(net.depths[1]):
            step = functools.partial(net.packed if packed else net, images)
            kept[checkpointing], logits = kept_for_backward(net, step)
        before = len(calls)
        logits.square().sum().backward()  # outside all scopes
        runs[checkpointing] = len(calls) / before
        trained = [parameter for parameter in net.parameters() if parameter.grad is not None]
        gradients[checkpointing] = [parameter.grad for parameter in trained]
    assert runs == {False: 1, True: 2}
    assert kept[True] < 0.25 * kept[False]
    assert all(map(torch.equal, *gradients.values()))


def test_modules_of_a_blocks_class_run_again_too():
    """The first block of each stage of a ResNet, which changes the shape, cannot be skipped."""
    backbone = timm.create_model("resnet18", num_classes=5)
    net = ElasticNet(backbone, SHAPE, depths=3, grad_checkpointing=True)
    calls = []
    for stage in range(1, 5):
        conv = net.backbone.get_submodule(f"layer{stage}.0.conv1")
        conv.register_forward_hook(lambda *_, stage=stage: calls.append(stage))
    net.packed(torch.randn(2, *SHAPE)).sum().backward()
    assert calls == [1, 2, 3, 4, 4, 3, 2, 1]


def test_nothing_runs_again_in_evaluation():
    backbone = timm.create_model("resnet18", num_classes=5)
    net = ElasticNet(backbone, SHAPE, depths=3, grad_checkpointing=True).eval()
    calls = []
    net.backbone.layer1[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    net.packed(torch.randn(2, *SHAPE)).sum().backward()
    assert len(calls) == 1


@given(case=cases(), training=st.booleans(), data=st.data())
@settings(max_examples=30)
def test_one_depth_equals_a_plain_net(case, training, data):
    backbone = make_backbone(case.kind, case.stages, case.norm)
    pristine = copy.deepcopy(backbone).train(training)
    net = ElasticNet(backbone, SHAPE, depths=case.depths, policy=case.policy).train(training)
    depth = data.draw(st.sampled_from(net.depths), label="depth")
    plain = plain_at(pristine, net, depth)
    optimizers = [torch.optim.SGD(model.parameters(), lr=RATE) for model in (net, plain)]
    for _ in range(2):
        images = torch.randn(3, 3, 9, 12, dtype=torch.float64)
        with net.at(depth):
            logits = net(images)
        expected = plain(images)
        close(logits, expected, "logits")
        for outputs in (logits, expected):
            outputs.square().mean().backward()
        run = {id(p) for p in net.extract(depth).parameters()}
        assert run.isdisjoint(id(p) for p in net.parameters())
        named = backbone.named_parameters()
        trained = {name: p.grad for name, p in named if p.grad is not None}
        close(trained, {name: p.grad for name, p in plain.named_parameters()}, "gradients")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    close(list(net.extract(depth).buffers()), list(plain.buffers()), "statistics")


def test_one_depth_leaves_the_statistics_of_others_unchanged():
    net = ElasticNet(make_backbone(), SHAPE, depths=4).train()
    before = {depth: copy.deepcopy(net.extract(depth).last_norm) for depth in net.depths}
    with net.at(net.depths[2]):
        net(torch.randn(2, 3, 8, 8).double())
    for depth, norm in before.items():
        same = torch.equal(net.extract(depth).last_norm.running_mean, norm.running_mean)
        assert same == (depth != net.depths[2])


def test_the_deepest_depths_statistics_stay_in_the_backbone():
    net = ElasticNet(make_backbone(), SHAPE, depths=3)
    train(net)
    close(list(net.backbone.buffers()), list(net.extract(net.depths[0]).buffers()))


def test_single_pixel_and_single_image_fails_as_in_a_plain_net():
    net = ElasticNet(make_backbone(stages=[(2, True)] * 3), SHAPE, depths=2).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net.packed(torch.randn(1, 3, 4, 4).double())


# Real nets


REAL = {
    "torchvision_resnet": lambda: basic_resnet([2, 2, 1, 1]),
    "torchvision_resnext": lambda: resnet([2, 2, 1, 1]),
    "torchvision_vit": lambda: torchvision_vit(3),
    "torchvision_swin": lambda: swin([2, 2], stochastic_depth_prob=0.0),
    "timm_mobilenet": lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),
    "timm_vit": lambda: timm.create_model("test_vit", num_classes=5, img_size=32),
    "timm_convnext": lambda: timm.create_model("test_convnext", num_classes=5),
    # A class token and a distillation token.
    "timm_deit": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SMALL_VIT),
    # Class tokens are added late.
    "timm_cait": lambda: timm.create_model("cait_xxs24_224", **SMALL_VIT),
    # Relative and rotary positions.
    "timm_beit": lambda: timm.create_model("beit_base_patch16_224", **SMALL_VIT),
    "timm_eva": lambda: timm.create_model("eva02_tiny_patch14_224", **SMALL_VIT | {"img_size": 28}),
    # Windows that every other block shifts.
    "timm_swin": lambda: timm.create_model(
        "swinv2_tiny_window8_256",
        img_size=32,
        window_size=4,
        embed_dim=8,
        depths=(2, 3, 2, 1),
        num_heads=(1, 2, 2, 4),
        drop_path_rate=0.0,
        num_classes=5,
    ),
}
SMALL_VIT = {"img_size": 32, "depth": 3, "embed_dim": 16, "num_heads": 2, "num_classes": 5}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in REAL.items()])
@pytest.mark.parametrize("training", [True, False])
def test_real_nets(make, training):
    torch.manual_seed(0)
    backbone = make().double()
    pristine = copy.deepcopy(backbone).train(training)
    size = 28 if isinstance(backbone, timm.models.Eva) else 32
    total = len(ElasticNet(copy.deepcopy(backbone), (3, size, size), depths=2).blocks)
    net = ElasticNet(backbone, (3, size, size), depths=min(4, total + 1)).train(training)
    truth = Separate(pristine, net)
    images = torch.randn(3, 3, size, size).double()
    gradients = torch.randn(len(net.depths), 3, 5).double()
    logits = net.packed(images)
    logits.backward(gradients)
    expected, summed = truth.step(images, gradients)
    close(logits, torch.stack(expected), "logits")
    named = backbone.named_parameters()
    trained = {(name, ()): p.grad for name, p in named if p.grad is not None}
    torch.testing.assert_close(trained, summed, rtol=1e-8, atol=1e-8)
    for depth, plain in zip(net.depths, truth.nets, strict=True):
        close(list(net.extract(depth).buffers()), list(plain.buffers()), f"statistics of {depth}")


@pytest.mark.parametrize("size", [(32, 32), (64, 40), (57, 90)])
@pytest.mark.parametrize(
    "name", ["torchvision_resnet", "torchvision_swin", "timm_convnext", "timm_mobilenet"]
)
def test_any_size_of_image(name, size):
    """The blocks were found with another size."""
    torch.manual_seed(0)
    net = ElasticNet(REAL[name]().double(), (3, 32, 32), depths=3).eval()
    images = torch.randn(2, 3, *size).double()
    for depth, logits in zip(net.depths, net.packed(images), strict=True):
        close(logits, net.extract(depth)(images))


def test_blocks_with_tied_weights():
    backbone = make_backbone(stages=[(3, False)])
    first, second, _ = backbone.stages[0]
    second.conv.weight = first.conv.weight
    pristine = copy.deepcopy(backbone)
    net = ElasticNet(backbone, SHAPE, depths=4)
    images = torch.randn(2, 3, 8, 8).double()
    plain = [plain_at(pristine, net, depth) for depth in net.depths]
    expected = torch.stack([plain_net(images) for plain_net in plain])
    packed = net.packed(images)
    close(packed, expected)
    packed.square().sum().backward()
    expected.square().sum().backward()
    tied = [plain_net.stages[0][0].conv.weight.grad for plain_net in plain[:3]]
    close(first.conv.weight.grad, sum(tied))
    costs = depth_costs(net, SHAPE)
    for depth, plain_net in zip(net.depths, plain, strict=True):
        assert costs[depth.name].parameters == sum(p.numel() for p in plain_net.parameters())
        close(net.eval().extract(depth)(images), plain_net.eval()(images))


def test_norm_with_parameters_of_its_own_activation():
    """As in timm, where norms include the activation."""
    backbone = make_backbone(stages=[(3, False)])
    for name in ("stages.0.1.norm", "last_norm"):
        norm = timm.layers.BatchNormAct2d(4, act_layer=nn.PReLU, act_kwargs={"init": 0.3})
        backbone.set_submodule(name, norm.double())
    net = ElasticNet(backbone, SHAPE, depths=3)
    assert len(list(net.parameters())) == len(list(backbone.parameters()))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_without_running_statistics(training):
    backbone = make_backbone()
    for name, module in list(backbone.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            norm = nn.BatchNorm2d(module.num_features, track_running_stats=False)
            backbone.set_submodule(name, norm.double())
    pristine = copy.deepcopy(backbone).train(training)
    net = ElasticNet(backbone, SHAPE, depths=4).train(training)
    images = torch.randn(3, 3, 8, 8).double()
    expected = [plain_at(pristine, net, depth)(images) for depth in net.depths]
    close(net.packed(images), torch.stack(expected))


class Concatenates(nn.Module):
    """As in CSPNet: the features before the blocks are joined with those after them."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage
        self.norm = nn.BatchNorm2d(8)
        self.merge = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.merge(self.norm(torch.cat([x, self.stage(x)], 1)))


class Exchanges(nn.Module):
    """As in HRNet: two branches, each with its blocks, that exchange their features."""

    def __init__(self, first, second):
        super().__init__()
        self.branches = nn.ModuleList([first, second])

    def forward(self, features):
        a, b = (branch(x) for branch, x in zip(self.branches, features, strict=True))
        return [b, a + b]


class Branches(nn.Module):
    def __init__(self, *stages):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = Exchanges(*stages[:2])
        self.second = Exchanges(*stages[2:])
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        a, b = self.second(self.first([x, x * 2]))
        return self.head((a + b).mean((2, 3)))


class Chain(nn.Module):
    def __init__(self, *stages):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class RemembersBatchSize(Chain):
    def forward(self, x):
        n = len(x)
        return self.head(self.stages(self.stem(x)).view(n, 4, -1).mean(2))


class AddsStem(Chain):
    """Adds the features before all blocks to those after them."""

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.stages(x)).mean((2, 3)))


def two_stages():
    return make_backbone(stages=[(2, False), (3, False)]).stages


class AddsToTwo(nn.Module):
    """As in transformers: features in, features out, by a norm that runs twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x, other):
        x = x + self.conv(other)
        return x, other + self.conv(x)


class Pairs(Chain):
    def forward(self, x):
        x = self.stem(x)
        pair = x, 2 * x
        for block in self.stages:
            pair = block(*pair)
        return self.head(sum(pair).mean((2, 3)))


def branched(kind):
    first, second = two_stages()
    if kind == "remembers":
        return RemembersBatchSize(first, second).double()
    if kind == "concatenates":
        return Chain(Concatenates(first), Concatenates(second)).double()
    if kind == "exchanges":
        return Branches(first, second, *two_stages()).double()
    if kind == "adds_stem":
        return AddsStem(first, second).double()
    if kind == "pairs":
        return Pairs(*(AddsToTwo() for _ in range(5))).double()
    return Chain(first, second).double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["chain", "remembers", "concatenates", "exchanges", "adds_stem"])
def test_branches_around_blocks(kind, policy, training):
    """All branches have the same streams; otherwise their outputs could not be joined."""
    torch.manual_seed(0)
    backbone = branched(kind).train(training)
    pristine = copy.deepcopy(backbone)
    net = ElasticNet(backbone, SHAPE, depths=4, policy=policy).train(training)
    assert len(net.blocks) in (5, 10)
    truth = Separate(pristine, net)
    for _ in range(2):
        images = torch.randn(2, 3, 9, 10).double()
        gradients = torch.randn(4, 2, 5)
        net.zero_grad()
        logits = net.packed(images)
        logits.backward(gradients.double())
        expected, summed = truth.step(images, gradients.double())
        close(logits, torch.stack(expected), "logits")
        named = {n: p for n, p in backbone.named_parameters() if p.grad is not None}
        close({(name, ()): p.grad for name, p in named.items()}, summed, "gradients")
        with torch.no_grad():
            for parameter in named.values():
                parameter -= RATE * parameter.grad
    for depth, plain in zip(net.depths, truth.nets, strict=True):
        with net.eval().at(depth):
            close(net(images), plain.eval()(images), f"{depth} in eval mode")
        close(list(net.extract(depth).buffers()), list(plain.buffers()), f"statistics of {depth}")


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("chain", [1, 2]),
        ("concatenates", [1, 2]),
        ("adds_stem", [4, 4]),
    ],
)
def test_streams_fork_no_earlier_than_necessary(kind, rows):
    backbone = branched(kind)
    net = ElasticNet(backbone, SHAPE, depths=[5, 4, 2, 0], policy="last_stage_first")
    num_rows = []
    for stage in backbone.stages:
        stage.register_forward_hook(lambda module, args, output: num_rows.append(len(args[0])))
    net.packed(torch.randn(1, 3, 8, 8).double())
    assert num_rows == rows


class Impossible(Chain):
    def forward(self, x):
        logits = super().forward(x)
        if len(logits) > 4:
            raise RuntimeError("too many")
        return logits


def test_backbone_that_cannot_run_its_depths_together():
    backbone = Impossible(*two_stages()).double()
    with pytest.raises(ValueError, match=r"Impossible cannot run its depths in one pass: too many"):
        ElasticNet(backbone, SHAPE, depths=4)
    assert not any("forward" in vars(module) for module in backbone.modules())


# Some of the depths


@st.composite
def subsets(draw, net):
    """Some depths of a net, the deepest first."""
    indices = draw(st.sets(st.integers(0, len(net.depths) - 1), min_size=1))
    return [net.depths[index] for index in sorted(indices)]


def compare_with_each_alone(net, depths, size=(9, 10)):
    """Compares a packed pass of some depths with a forward and backward of a copy for each."""
    copies = [copy.deepcopy(net) for _ in depths]
    before = copy.deepcopy(dict(net.named_buffers()))
    images = torch.randn(3, 3, *size).double()
    gradients = torch.randn(len(depths), 3, 5).double()
    logits = net.packed(images, depths)
    logits.backward(gradients)

    expected = []
    for alone, depth, gradient in zip(copies, depths, gradients, strict=True):
        with alone.at(depth):
            expected.append(alone(images))
        expected[-1].backward(gradient)
    close(logits, torch.stack(expected), "logits")
    for name, parameter in net.named_parameters():
        of_each = [alone.get_parameter(name).grad for alone in copies]
        of_each = [gradient for gradient in of_each if gradient is not None]
        close(parameter.grad, sum(of_each) if of_each else None, f"gradient of {name}")
    for name, buffer in net.named_buffers():
        of_each = [alone.get_buffer(name) for alone in copies]
        moved = [value for value in of_each if not torch.equal(value, before[name])]
        close(buffer, (moved or [before[name]])[0], f"{name} of the statistics")


@given(
    case=cases(),
    options=st.fixed_dictionaries({n: st.booleans() for n in ("affine", "checkpointing")}),
    training=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60)
def test_some_depths_equal_one_forward_for_each(case, options, training, data):
    net = make_elastic(
        make_backbone(case.kind, case.stages, case.norm),
        case.depths,
        SHAPE,
        policy=case.policy,
        per_depth_affine=options["affine"],
        grad_checkpointing=options["checkpointing"],
    ).train(training)
    net.zero_grad()
    for _ in range(2):  # of different depths, one after the other
        compare_with_each_alone(net, data.draw(subsets(net), label="depths"))
        net.zero_grad()


@given(
    kind=st.sampled_from(["remembers", "concatenates", "exchanges", "adds_stem", "pairs"]),
    policy=st.sampled_from(POLICIES),
    grad_checkpointing=st.booleans(),
    training=st.booleans(),
    data=st.data(),
)
@settings(max_examples=40)
def test_some_depths_where_features_branch(kind, policy, grad_checkpointing, training, data):
    options = {"policy": policy, "grad_checkpointing": grad_checkpointing}
    net = make_elastic(branched(kind), 4, SHAPE, **options).train(training)
    net.zero_grad()
    compare_with_each_alone(net, data.draw(subsets(net), label="depths"))


@pytest.mark.parametrize("training", [True, False])
def test_all_depths_by_name_equal_all_depths(training):
    net = make_elastic(make_backbone(), 4, SHAPE).train(training)
    other = copy.deepcopy(net)
    images = torch.randn(2, *SHAPE).double()
    first, second, third, last = net.depths
    named = other.packed(images, (first, second.name, third.num_blocks, last))
    assert torch.equal(named, net.packed(images))
    assert all(map(torch.equal, net.buffers(), other.buffers()))


# Work that is shared


@given(case=cases(kinds=["residual", "transformer"]), data=st.data())
@settings(max_examples=30)
def test_blocks_that_depths_have_in_common_run_once(case, data):
    backbone = make_backbone(case.kind, case.stages, case.norm)
    net = ElasticNet(backbone, SHAPE, depths=case.depths, policy=case.policy)
    depths = data.draw(subsets(net) | st.none(), label="depths")
    rows, images = {}, torch.randn(2, 3, 8, 8).double()

    def count(name):
        def hook(module, args):
            assert name not in rows, f"{name} runs twice"
            rows[name] = len(args[0])

        return hook

    inner = "conv" if case.kind == "residual" else "qkv"
    for block in net.blocks:
        layer = backbone.get_submodule(f"{block.name}.{inner}")
        layer.register_forward_pre_hook(count(block.name))
    backbone.head.register_forward_pre_hook(count("head"))
    net.packed(images, depths)
    depths = depths or net.depths
    expected = {
        block.name: 2 * len({depth.kept[:i] for depth in depths if depth.kept[i]})
        for i, block in enumerate(net.blocks)
    }
    run = {name: count for name, count in expected.items() if count}
    assert rows == {**run, "head": 2 * len(depths)}


# Precision and compilation


@pytest.fixture
def float_net(request):
    """A net in float32 and the plain net of each of its depths."""
    torch.compiler.reset()  # the number of graphs of a function is limited
    backbone = make_backbone(stages=[(3, False), (2, True)]).float()
    pristine = copy.deepcopy(backbone)
    net = ElasticNet(backbone, SHAPE, depths=3, **getattr(request, "param", {}))
    return net, nn.ModuleList(plain_at(pristine, net, depth) for depth in net.depths)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(float_net, training):
    net, plain = (model.train(training) for model in float_net)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        logits = net.packed(images)
        expected = torch.stack([plain_net(images) for plain_net in plain])
    assert logits.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected, rtol=0.03, atol=0.03)
    logits.float().square().mean().backward()
    expected.float().square().mean().backward()
    packed, summed = (torch.cat([g.flatten() for g in of]) for of in gradients(net, plain))
    assert (packed - summed).norm() < 0.05 * summed.norm()


def gradients(net, plain):
    """The gradients of the net, and the sums of those of the plain nets."""
    by_name = [dict(plain_net.named_parameters()) for plain_net in plain]
    names = [name for name, _ in net.backbone.named_parameters()]
    summed = [sum(named[name].grad for named in by_name if name in named) for name in names]
    return [parameter.grad for parameter in net.backbone.parameters()], summed


def compiles(net, plain, backend):
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([plain_net(images) for plain_net in plain])
    expected.square().mean().backward()
    packed = torch.compile(net.packed, fullgraph=True, backend=backend)
    logits = packed(images)
    logits.square().mean().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*gradients(net, plain), rtol=1e-3, atol=1e-4)
    for depth, plain_net in zip(net.depths, plain, strict=True):
        buffers = list(net.extract(depth).buffers())
        torch.testing.assert_close(buffers, list(plain_net.buffers()), rtol=1e-4, atol=1e-4)

    net.eval()
    single = torch.compile(net, fullgraph=True, backend=backend)
    for depth, plain_net in zip(net.depths, plain.eval(), strict=True):
        with net.at(depth):
            torch.testing.assert_close(single(images), plain_net(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        packed(images), torch.stack([plain_net(images) for plain_net in plain])
    )
    torch.testing.assert_close(net(images), plain[0](images))  # no scope is left open


@pytest.mark.parametrize(
    "float_net", [{}, {"grad_checkpointing": True}], indirect=True, ids=["", "checkpointing"]
)
def test_compiled_to_a_graph(float_net):
    compiles(*float_net, backend="aot_eager")


@pytest.mark.parametrize(
    "float_net", [{}, {"grad_checkpointing": True}], indirect=True, ids=["", "checkpointing"]
)
def test_each_choice_of_depths_is_compiled_once(float_net):
    net, _ = float_net
    eager = copy.deepcopy(net)
    graphs = CompileCounterWithBackend("aot_eager")
    packed = torch.compile(net.packed, fullgraph=True, backend=graphs)
    choices = [["d4", 2], [2], [net.depths[0], "d0"], [0]]
    for depths in choices * 2:
        images = torch.randn(4, *SHAPE)
        logits, expected = packed(images, depths), eager.packed(images, depths)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        for outputs in (logits, expected):
            outputs.square().mean().backward()
    assert graphs.frame_count == len(choices)
    for ours, theirs in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close([*net.buffers()], [*eager.buffers()], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "float_net", [{}, {"grad_checkpointing": True}], indirect=True, ids=["", "checkpointing"]
)
def test_compiled_to_code(float_net):
    compiles(*float_net, backend="inductor")
