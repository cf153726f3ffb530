import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from teamnet_pl.cooperation import OptimizerConfig, ScheduleConfig
from tests.helpers.teams import Recorder, make_digits, make_team, make_trainer

STEPS = 10


def rates_of_torch(peak, warmup, steps, final):
    """The same schedule, made of the schedulers of torch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    cosine = CosineAnnealingLR(optimizer, steps - warmup, eta_min=final * peak)
    schedule = cosine
    if warmup > 1:
        # torch begins with the factor of the first step and reaches the peak in the others.
        linear = LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
        schedule = SequentialLR(optimizer, [linear, cosine], [warmup])
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("warmup", "final"), [(0.0, 0.0), (0.4, 0.0), (0.3, 0.05)])
def test_the_learning_rate_follows_the_schedulers_of_torch(tmp_path, warmup, final):
    recorder = Recorder()
    team = make_team(
        b=None,
        optimizer=OptimizerConfig(lr=0.05),
        schedule=ScheduleConfig(warmup=warmup, final=final),
    )
    trainer = make_trainer(
        tmp_path, callbacks=[recorder], limit_train_batches=STEPS // 2, max_epochs=2
    )
    trainer.fit(team, make_digits())
    expected = rates_of_torch(0.05, round(warmup * STEPS), STEPS, final)
    assert recorder.rates == pytest.approx(expected)


def test_the_schedule_counts_optimizer_steps_not_batches(tmp_path):
    recorder = Recorder()
    team = make_team(b=None, schedule=ScheduleConfig(warmup=0.0))
    trainer = make_trainer(
        tmp_path, accumulate_grad_batches=2, callbacks=[recorder], limit_train_batches=8
    )
    trainer.fit(team, make_digits())
    assert recorder.rates[::2] == pytest.approx(rates_of_torch(0.1, 0, 4, 0.0))


@given(st.floats(0, 0.99), st.floats(0, 1), st.integers(1, 50))
def test_the_factor_stays_between_final_and_one(warmup, final, steps):
    config = ScheduleConfig(warmup, final)
    factors = [config.factor(step, steps) for step in range(steps + 1)]
    after = [f for step, f in enumerate(factors) if step >= warmup * steps]
    assert all(0 < factor <= 1 for factor in factors[:-1])
    assert after == sorted(after, reverse=True)
    assert factors[-1] == pytest.approx(final)
    # A run that takes more steps than planned stays at the final factor.
    assert config.factor(2 * steps, steps) == pytest.approx(final)


@pytest.mark.parametrize("warmup", [-0.1, 1.0])
def test_warmup_must_be_a_share(warmup):
    with pytest.raises(ValueError, match="warmup"):
        ScheduleConfig(warmup=warmup)


@pytest.mark.parametrize(
    ("name", "expected", "values"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ("momentum", torch.optim.SGD, {"momentum": 0.8, "nesterov": False}),
        ("adamw", torch.optim.AdamW, {"betas": (0.9, 0.95)}),
        ("AdamW", torch.optim.AdamW, {}),
        ("rmsprop", torch.optim.RMSprop, {"momentum": 0.8}),
    ],
)
def test_optimizers_by_name(name, expected, values):
    options = {"betas": (0.9, 0.95)} if "betas" in values else {}
    config = OptimizerConfig(name, lr=0.3, weight_decay=0.2, momentum=0.8, options=options)
    optimizer = config.create(torch.nn.Linear(2, 2))
    assert type(optimizer) is expected
    assert all(group["lr"] == 0.3 for group in optimizer.param_groups)
    for key, value in values.items():
        assert all(group[key] == value for group in optimizer.param_groups)


@pytest.mark.parametrize(("name", "meant"), [("adamv", "adamw"), ("sgdd", "sgd"), ("x", "sgd")])
def test_unknown_optimizers_get_suggestions(name, meant):
    with pytest.raises(
        ValueError, match=f"no optimizer '{name}'. (Did you mean|There are) .*{meant}"
    ) as error:
        OptimizerConfig(name)
    assert (", rmsprop," in str(error.value)) == (name == "x")


def test_unknown_options_of_an_optimizer_are_refused():
    with pytest.raises(ValueError, match=r"sgd does not take the options.*moment"):
        OptimizerConfig("sgd", options={"moment": 0.9}).create(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "options", "ignored"),
    [
        ("sgd", {"betas": (0.9, 0.95)}, "betas"),
        ("SGD", {"dampening": 0.1, "eps": 1e-6}, "eps"),
        ("lion", {"betas": (0.9, 0.95), "eps": 1e-6}, "eps"),
    ],
)
def test_options_that_timm_would_ignore_are_refused(name, options, ignored):
    with pytest.raises(ValueError, match=f"{name} has no option '{ignored}'"):
        OptimizerConfig(name, options=options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_an_optimizer_that_needs_cuda_is_refused_without_it():
    with pytest.raises(ValueError, match="bnbadamw cannot run here: CUDA"):
        OptimizerConfig("bnbadamw")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("per_depth_affine", [False, True])
def test_norms_and_biases_do_not_decay(frozen, per_depth_affine):
    team = make_team(
        leader={"frozen": frozen},
        a={"per_depth_affine": per_depth_affine},
        b={"name": "timm/test_vit", "options": {"img_size": 8, "patch_size": 4}},
    )
    optimizer = OptimizerConfig(weight_decay=0.01).create(team, team.backbones())
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    norms = torch.nn.BatchNorm2d, torch.nn.LayerNorm
    exempted = team.elastic_nets["b"].backbone.no_weight_decay()
    assert {"pos_embed", "cls_token"} <= exempted
    of_norms = {id(p) for m in team.modules() if isinstance(m, norms) for p in m.parameters()}
    trained = {
        id(p): (name, p)
        for name, p in team.named_parameters()
        if not (frozen and name.startswith("leader."))
    }
    assert decay.keys() == trained.keys()
    for key, (name, _) in trained.items():
        exempt = key in of_norms or name.endswith("bias")
        exempt |= name.removeprefix("teammates.b.backbone.") in exempted
        assert decay[key] == (0.0 if exempt else 0.01), name
    assert len(set(decay.values())) == 2


@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.7}], ids=["decay", "layer decay"])
@pytest.mark.parametrize(
    "backbone",
    [
        ("timm/test_vit", {"img_size": 32, "patch_size": 8}),
        (
            "timm/beit_base_patch16_224",
            {"img_size": 32, "embed_dim": 24, "num_heads": 2, "depth": 3},
        ),
        ("timm/test_convnext", {}),
        ("timm/resnet18", {}),
        ("torchvision/resnet18", {}),
    ],
    ids=lambda value: value[0],
)
def test_parameter_groups_match_those_of_timm(backbone, options):
    """Each parameter has the same rate and weight decay."""
    name, arguments = backbone
    config = {"name": name, "options": arguments}
    team = make_team(
        input_shape=(3, 32, 32),
        leader=config,
        a=config | {"per_depth_affine": True},
        b=config,
        optimizer=OptimizerConfig("adamw", 0.01, weight_decay=0.05, options=options),
    )
    optimizer = team.configure_optimizers()["optimizer"]
    assert len(optimizer.param_groups) <= 44
    for part, net in zip(("leader", "a", "b"), team.backbones(), strict=True):
        truth = create_optimizer_v2(net, "adamw", lr=0.01, weight_decay=0.05, **options)
        expected = values_by_parameter(truth, scaled=True)
        assert expected.keys() == {id(parameter) for parameter in net.parameters()}
        values = values_by_parameter(optimizer)
        for key, value in expected.items():
            assert values[key] == pytest.approx(value), part
    for copied, original in team.elastic_nets["a"].copied_parameters():
        assert values[id(copied)] == values[id(original)]
    everything = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(everything) == len(set(everything))
    assert set(everything) == {id(parameter) for parameter in team.parameters()}
    if options and "timm" in name:
        rates = {rate for rate, _ in values.values()}
        assert len(rates) > 2


def values_by_parameter(optimizer, scaled=False):
    """The learning rate and weight decay of each parameter.

    Scaled rates are those that the schedules of timm make of ``lr_scale``.
    """
    return {
        id(parameter): (
            group["lr"] * (group.get("lr_scale", 1) if scaled else 1),
            group["weight_decay"],
        )
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_a_run_of_unknown_length_has_the_peak_rate_and_full_transfers(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        callbacks=[recorder],
        limit_train_batches=2,
        max_epochs=-1,
        max_time={"seconds": 1},
    )
    trainer.fit(make_team(b=None), make_digits())
    assert set(recorder.rates) == {0.1}
    assert trainer.callback_metrics["train/ramp/leader"] == 1.0
