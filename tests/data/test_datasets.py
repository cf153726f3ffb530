"""The config of each dataset trains and tests a team, with files in the format of the dataset."""

import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from torchvision.transforms import v2

from teamnet_pl import data
from teamnet_pl.data.loading import SeededIndex
from teamnet_pl.deploy.checkpoint import SavedTeam
from tests.helpers.runs import BEST, LOGGED, error_of, logged_metrics, of_split

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")

# Options that make the runs small.
CASES = {
    "cifar10": [],
    "cifar100": [],
    "digits": ["--data.train_size", 50],
    "emnist": [],
    "fashion_mnist": [],
    "hugging_face": [],
    "image_folder": ["--data.image_size", 32],
    "imagenet": ["--data.image_size", 32, "--data.val_fraction", 0.25],
    "imagenette": ["--data.image_size", 32],
    "litdata": ["--data.num_classes", 3, "--data.image_size", 24],
    "medmnist": ["--data.val_fraction", "null"],  # it has a validation split
    "mnist": [],
    "random": ["--data.train_images", 100, "--data.test_images", 20],
    "shards": ["--data.num_classes", 3, "--data.train_images", 48, "--data.image_size", 24],
    "svhn": [],
    "tiny_imagenet": [],
}


# The first class names, as in the files or the publication of the dataset.
CLASSES = {
    "cifar10": ["class 0", "class 1", "class 2"],
    "cifar100": ["class 0", "class 1", "class 2"],
    "emnist": ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "A", "B"],
    "fashion_mnist": ["T-shirt/top", "Trouser", "Pullover"],
    "hugging_face": [],
    "image_folder": [],
    "imagenet": [],
    "imagenette": [],
    "medmnist": ["adipose", "background", "debris"],
    "tiny_imagenet": [],
}


def test_each_dataset_has_a_config():
    assert sorted(CASES) == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    public = {
        cls.__name__
        for cls in vars(data).values()
        if inspect.isclass(cls)
        and issubclass(cls, data.ImageDataModule)
        and not inspect.isabstract(cls)
    }
    configs = [yaml.safe_load(path.read_text()) for path in CONFIGS.glob("*.yaml")]
    assert {config["data"]["class_path"].rpartition(".")[2] for config in configs} == public


@pytest.mark.parametrize(("name", "config"), [("Shards", "shards"), ("LitData", "litdata")])
@pytest.mark.parametrize("option", ["val_fraction", "train_size", "split_seed"])
def test_data_modules_without_known_labels_have_no_options_of_splits(
    cli, capsys, tmp_path, name, config, option
):
    words = ["--config", CONFIGS / f"{config}.yaml", f"--data.{option}", 1]
    assert option in error_of(capsys, cli, tmp_path, "fit", *words)
    needed = {"num_classes": 3, "train": "a", "val": "b"}
    needed |= {"train_images": 9} if name == "Shards" else {}
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        getattr(data, name)(**needed, **{option: 1})


def test_importing_data_loads_no_library_that_only_some_datasets_need():
    """Libraries that Lightning itself loads do not count."""
    code = """
        import importlib.machinery, importlib.util, sys
        import lightning.pytorch, torchvision

        # The package alone, without what `import teamnet_pl` loads.
        package = importlib.util.module_from_spec(
            importlib.machinery.ModuleSpec("teamnet_pl", None, is_package=True)
        )
        package.__path__ = [sys.argv[1]]
        sys.modules["teamnet_pl"] = package
        before = set(sys.modules)
        import teamnet_pl.data
        heavy = "sklearn matplotlib timm rich wandb datasets webdataset litdata medmnist".split()
        print([name for name in heavy if name in set(sys.modules) - before])
    """
    folder = Path(data.__file__).parents[1]
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("cls", [data.CIFAR10, data.CIFAR100, data.SVHN, data.MNIST, data.EMNIST])
def test_small_images_are_scaled_last(on_disk, cls):
    def make(**kwargs):
        data_module = cls(root=root, val_fraction=0.25, **kwargs)
        data_module.prepare_data()
        for stage in ("fit", "test"):
            data_module.setup(stage)
        return data_module

    root = getattr(on_disk, cls.__name__.lower())()
    stored, scaled = make(), make(image_size=48)
    assert scaled.input_shape == (stored.input_shape[0], 48, 48)
    for name in ("train_set", "val_set", "test_set"):
        for item in (SeededIndex(i, seed=i) for i in range(5)):
            small, large = (getattr(data_module, name)[item][0] for data_module in (stored, scaled))
            assert torch.equal(v2.functional.resize(small, [48, 48]), large)
    with pytest.raises(ValueError, match="image_size must be at least 1, found 0"):
        make(image_size=0)


def train_and_test(cli, folder, *options):
    """Trains a tiny team for an epoch of the standard recipe, then tests its checkpoint alone."""
    common = ["--data.batch_size", 16, "--data.train_transform", "null"]
    common += ["--trainer.limit_train_batches", 1.0, "--test_after_fit", "true"]
    cli(folder, "fit", *options[:2], *common, *options[2:])
    cli(folder, "test", "--ckpt_path", folder / BEST, *LOGGED, tiny=False)
    fitted, tested = (logged_metrics(folder, version) for version in (0, 1))
    assert fitted["train/loss"] > 0
    assert len(of_split(fitted, "test")) > 20
    assert of_split(fitted, "test") == of_split(tested, "test")


@pytest.mark.parametrize("name", CASES)
def test_a_config_trains_and_its_checkpoint_tests(cli, on_disk, tmp_path, name):
    options = CASES[name]
    if name == "hugging_face":
        options = ["--data.path", on_disk.parquet(), *options]
    elif name == "litdata":
        for split, count in {"train": 50, "val": 10, "test": 12}.items():
            options = [f"--data.{split}", on_disk.litdata(range(count), split), *options]
    elif name == "shards":
        for split, sizes in {"train": [25, 25], "val": [10], "test": [7, 5]}.items():
            options = [f"--data.{split}", on_disk.shards(sizes, split), *options]
    elif write := getattr(on_disk, name, None):
        options = ["--data.root", write(), "--data.val_fraction", 0.25, *options]
    train_and_test(cli, tmp_path, "--config", CONFIGS / f"{name}.yaml", *options)
    classes = SavedTeam.read(tmp_path / BEST).classes
    if name in CLASSES:
        assert classes[: len(CLASSES[name])] == CLASSES[name]
    else:
        assert classes == [str(label) for label in range(len(classes))]


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_whole(cli, tmp_path):
    """On a smaller team, because there are 70,000 images."""
    options = ["--data.root", DEBIAN, "--data.batch_size", 256, "--data.train_transform", "null"]
    options += ["--model.leader", "null", "--model.b", "null", "--model.a.depths", 2]
    options += ["--trainer.limit_train_batches", 1.0, "--test_after_fit", "true"]
    cli(tmp_path, "fit", "--config", CONFIGS / "fashion_mnist.yaml", *options)
    assert logged_metrics(tmp_path)["test/accuracy/mean"] > 0.5
