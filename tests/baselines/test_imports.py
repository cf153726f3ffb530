from tests.helpers.imports import packages_after


def test_the_front_door_loads_no_torch():
    assert "torch" not in packages_after("import teamnet_pl.baselines")


def test_the_nets_need_neither_lightning_nor_timm():
    names = "EarlyExitNet, LayerDropNet, SeparateNets, SlimmableNet"
    loaded = packages_after(f"from teamnet_pl.baselines import {names}")
    assert "torch" in loaded
    assert not loaded & {"lightning", "matplotlib", "rich", "timm", "torchmetrics", "wandb"}
