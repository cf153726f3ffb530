from tests.helpers.imports import packages_after

HEAVY = {"lightning", "matplotlib", "rich", "timm", "torchmetrics", "torchvision", "wandb"}


def test_elastic_needs_nothing_but_torch():
    loaded = packages_after("import teamnet_pl.elastic")
    assert "torch" in loaded
    assert not loaded & HEAVY
