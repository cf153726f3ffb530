import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

from teamnet_pl.data import Digits, FashionMNIST, ImageDataModule, SplitDataModule
from teamnet_pl.data.loading import EpochSampler
from tests.helpers.datasets import BatchRecorder, flat, make_data_trainer, same_tensors

CLASSES = 4
HEIGHT, WIDTH = 5, 6
MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.25, 0.2)


def toy_pixels(index: int, label: int) -> np.ndarray:
    """Red encodes the class, green the sample, and blue the left half."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[..., 0] = label * 85
    pixels[..., 1] = index
    pixels[:, : WIDTH // 2, 2] = 255
    return pixels


class ToyImages(Dataset):
    """PIL images made on demand, as a folder of files would give them."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(toy_pixels(index, self.labels[index])), self.labels[index]


class Toy(SplitDataModule):
    num_classes = CLASSES
    input_shape = (3, HEIGHT, WIDTH)
    mean = MEAN
    std = STD

    def __init__(
        self,
        counts: tuple[int, ...] = (40, 20, 60, 80),
        test_labels: tuple[int, ...] = (3, 0, 1, 2, 2),
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.train_labels = np.repeat(np.arange(len(counts)), counts).tolist()
        self.test_labels = list(test_labels)

    def load_split(self, split):
        labels = self.train_labels if split == "train" else self.test_labels
        return ToyImages(labels), labels


def toy(stage: str = "fit", seed: int = 0, **kwargs) -> Toy:
    pl.seed_everything(seed, workers=True, verbose=False)
    data = Toy(**kwargs)
    data.setup(stage)
    return data


def pixels(images: torch.Tensor) -> np.ndarray:
    """The images of a loader in 0..255."""
    return images.numpy() * (1 if images.dtype == torch.uint8 else 255.0)


def unnormalized(images: torch.Tensor) -> torch.Tensor:
    """The input of a net in [0, 1]."""
    assert images.dtype == torch.float32
    return images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def served(loader) -> list[tuple[int, int]]:
    """(sample, label) of every image that a loader serves, in order."""
    pairs = []
    for images, labels in loader:
        assert labels.dtype == torch.int64
        assert images.shape == (len(labels), 3, HEIGHT, WIDTH)
        samples = pixels(images)[:, 1, 0, 0].round().astype(int)
        pairs += zip(samples.tolist(), labels.tolist(), strict=True)
    return pairs


# Batches


@pytest.mark.parametrize("loader", ["test_dataloader", "predict_dataloader"])
def test_evaluation_batches_are_the_normalized_images_in_order(loader):
    data = toy("test", batch_size=2)
    batches = list(getattr(data, loader)())
    assert [len(labels) for _, labels in batches] == [2, 2, 1]
    images = torch.cat([images for images, _ in batches])
    assert torch.cat([labels for _, labels in batches]).tolist() == [3, 0, 1, 2, 2]
    truth = np.stack([toy_pixels(i, y) for i, y in enumerate([3, 0, 1, 2, 2])]).transpose(
        0, 3, 1, 2
    )
    np.testing.assert_allclose(pixels(images), truth, atol=1e-3)


@settings(max_examples=25)
@given(
    batch_size=st.integers(1, 250),
    val_fraction=st.floats(0.05, 0.9),
    split_seed=st.integers(0, 2**32 - 1),
)
def test_train_and_val_divide_the_training_split_by_label(batch_size, val_fraction, split_seed):
    data = toy(batch_size=batch_size, val_fraction=val_fraction, split_seed=split_seed)
    val = served(data.val_dataloader())
    train = served(data.train_dataloader())
    truth = dict(enumerate(data.train_labels))
    assert dict(train + val).items() <= truth.items()
    samples = [sample for sample, _ in train + val]
    assert len(samples) == len(set(samples))
    counts = np.bincount([label for _, label in val], minlength=CLASSES)
    assert np.all(np.abs(counts - val_fraction * np.array([40, 20, 60, 80])) <= 1)
    # Only whole batches, unless there is just the one.
    images = 200 - len(val)
    whole = images - images % batch_size if images > batch_size else images
    assert len(train) == whole


def test_only_split_seed_changes_the_split():
    def val(**kwargs):
        return served(toy(**kwargs).val_dataloader())

    assert val(split_seed=1) == val(split_seed=1, seed=5, batch_size=7)
    assert set(val(split_seed=1)) != set(val(split_seed=2))


def test_train_size_takes_a_stratified_subset_and_keeps_the_validation_split():
    whole, part = toy(val_fraction=0.1), toy(val_fraction=0.1, train_size=45)
    subset = served(part.train_dataloader())
    assert len(set(subset)) == 45
    assert {sample for sample, _ in subset} < set(whole.train_set.indices)
    counts = np.bincount([label for _, label in subset])
    assert np.all(np.abs(counts - np.array([9, 4.5, 13.5, 18])) < 1)
    assert served(part.val_dataloader()) == served(whole.val_dataloader())
    assert len(toy(val_fraction=0.1, train_size=180).train_set) == 180


class ToyWithValidation(Toy):
    has_val = True

    def load_split(self, split):
        if split == "val":
            return ToyImages([2, 2, 1]), [2, 2, 1]
        return super().load_split(split)


@pytest.mark.parametrize("train_size", [None, 40])
def test_a_dataset_may_have_a_validation_split(train_size):
    pl.seed_everything(0, verbose=False)
    data = ToyWithValidation(train_size=train_size)
    data.setup("fit")
    assert served(data.val_dataloader()) == [(0, 2), (1, 2), (2, 1)]
    assert len(data.train_set) == (train_size or 200)
    cut = ToyWithValidation(val_fraction=0.1)
    cut.setup("fit")
    assert (len(cut.train_set), len(cut.val_set)) == (180, 20)


# Order and reproducibility


def test_each_epoch_is_shuffled_anew_and_each_seed_differently():
    data = toy(batch_size=180)
    loader = data.train_dataloader()
    first, second, reloaded = served(loader), served(loader), served(data.train_dataloader())
    other = served(toy(batch_size=180, seed=1).train_dataloader())
    assert reloaded == first
    orders = {tuple(order) for order in (first, second, other, sorted(first))}
    assert len(orders) == 4
    assert {frozenset(order) for order in orders} == {frozenset(first)}


def two_epochs(draws: int = 0, **kwargs) -> list[torch.Tensor]:
    """Two epochs of digits; not every worker process could import the classes of this file."""
    pl.seed_everything(0, workers=True, verbose=False)
    data = Digits(batch_size=50, train_size=300, **kwargs)
    data.setup("fit")
    torch.rand(draws)
    loader = data.train_dataloader()
    return flat(batch for _ in range(2) for batch in loader)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("num_workers", "draws"), [(0, 100), (1, 0), (2, 10)])
@pytest.mark.parametrize("mixed", [{}, {"mixup_alpha": 1, "cutmix_alpha": 1}], ids=str)
def test_augmented_batches_depend_on_the_seed_alone(num_workers, draws, mixed):
    expected = two_epochs(**mixed)
    batches = two_epochs(num_workers=num_workers, draws=draws, **mixed)
    assert len(batches) == 2 * 6 * 2
    assert same_tensors(batches, expected)


def test_each_image_of_each_epoch_is_augmented_anew():
    data = toy(batch_size=180, train_transform=v2.ColorJitter(brightness=0.9))
    loader = data.train_dataloader()
    blue = []
    for _ in range(2):
        ((images, _),) = loader
        blue.append(pixels(images)[:, 2].max((1, 2)))
    for values in blue:
        assert len(set(values)) > 50
    assert sorted(blue[0]) != sorted(blue[1])


def test_serving_leaves_the_random_state_unchanged():
    data = toy(batch_size=7, train_transform=v2.ColorJitter(0.5), mixup_alpha=1)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    # Except for one draw of the loader: torch draws a seed for workers even without any.
    torch.set_rng_state(before)
    torch.empty((), dtype=torch.int64).random_()
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), after)


@settings(max_examples=50)
@given(
    images=st.integers(1, 50),
    processes=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 9),
)
def test_processes_take_turns_in_the_order_of_one(images, processes, seed, epoch):
    def order(number, rank):
        sampler = EpochSampler(range(images), seed, number, rank)
        sampler.set_epoch(epoch)
        return list(sampler)

    alone = order(1, 0)
    shares = [order(processes, rank) for rank in range(processes)]
    together = [drawn for turn in zip(*shares, strict=True) for drawn in turn]
    assert together[:images] == alone
    assert sorted(drawn.index for drawn in alone) == list(range(images))


def test_setup_leaves_the_random_state_unchanged():
    pl.seed_everything(3, verbose=False)
    expected = torch.rand(3)
    toy(seed=3, train_transform=v2.ColorJitter(0.5))
    assert torch.equal(torch.rand(3), expected)


def test_loaders_pickle_for_spawned_workers():
    data = toy(mixup_alpha=1)
    loader = data.train_dataloader()
    for part in (loader.dataset, loader.collate_fn):
        pickle.dumps(part)


# Transforms


def test_train_transform_augments_training_images_only():
    data = toy(train_transform=v2.RandomHorizontalFlip(p=1))
    train, _ = next(iter(data.train_dataloader()))
    val, _ = next(iter(data.val_dataloader()))
    assert np.allclose(pixels(train)[:, 2, :, WIDTH // 2 :], 255)
    assert np.allclose(pixels(train)[:, 2, :, : WIDTH // 2], 0, atol=1e-3)
    assert np.allclose(pixels(val)[:, 2, :, : WIDTH // 2], 255)


@pytest.mark.parametrize("kind", [list, lambda transforms: transforms[0]], ids=["list", "one"])
def test_extra_transform_follows_the_others(kind):
    half = v2.Lambda(lambda image: image // 2)
    shift = v2.Lambda(lambda image: image + 10)
    data = toy(batch_size=180, train_transform=half, extra_transform=kind([shift]))
    ((images, _),) = data.train_dataloader()
    assert set(pixels(images)[:, 2].ravel().tolist()) == {10, 255 // 2 + 10}
    ((images, _),) = data.val_dataloader()
    assert set(pixels(images)[:, 2].ravel().tolist()) == {0, 255}


def test_default_and_evaluation_transforms_of_a_subclass():
    class Changed(Toy):
        def default_train_transform(self):
            return [v2.RandomInvert(p=1)]

        def eval_transform(self):
            return [v2.RandomHorizontalFlip(p=1)]

    def ends(loader):
        images, labels = next(iter(loader))
        red, left, right = pixels(images)[0, [0, 2, 2], 0, [0, 0, -1]].round()
        return red - 85 * labels[0].item(), left, right

    data, plain = Changed(), Changed(train_transform=[])
    data.setup("test")
    for module in (data, plain):
        module.setup("fit")
        for loader in (module.val_dataloader(), data.test_dataloader()):
            assert ends(loader) == (0, 0, 255)
    assert ends(plain.train_dataloader()) == (0, 255, 0)
    assert ends(data.train_dataloader())[1:] == (0, 255)
    assert ends(data.train_dataloader())[0] != 0


def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(ImageDataModule, "data")
    return parser


@pytest.mark.parametrize(
    "yaml",
    [
        "{class_path: torchvision.transforms.v2.RandomInvert, init_args: {p: 1.0}}",
        """
        - class_path: torchvision.transforms.v2.RandomAffine
          init_args: {degrees: 0}
        - class_path: torchvision.transforms.v2.RandomCrop
          init_args: {size: 8, padding: 0}
        - class_path: torchvision.transforms.v2.RandomInvert
          init_args: {p: 1}
        """,
    ],
    ids=["one", "list"],
)
def test_train_transform_from_yaml(tmp_path, yaml):
    config = tmp_path / "config.yaml"
    config.write_text(
        "data:\n  class_path: teamnet_pl.data.Digits\n  init_args:\n    train_transform: " + yaml
    )
    data = parser().instantiate(parser().parse_args([f"--config={config}"])).data
    data.setup("fit")
    plain = Digits(train_transform=[])
    plain.setup("fit")
    image = data.train_set[0][0]
    torch.testing.assert_close(image, 1 - plain.train_set[0][0])


@pytest.mark.parametrize(("name", "cls"), [("digits", Digits), ("fashion_mnist", FashionMNIST)])
def test_shipped_configs(name, cls):
    config = Path(__file__).parents[2] / "configs" / "data" / f"{name}.yaml"
    data = parser().instantiate(parser().parse_args([f"--config={config}"])).data
    assert type(data) is cls


def test_attributes_link_to_the_model_before_setup():
    class Model:
        def __init__(self, num_classes: int, input_shape: tuple[int, int, int]) -> None:
            self.arguments = num_classes, input_shape

    linked = parser()
    linked.add_class_arguments(Model, "model")
    for name in ("num_classes", "input_shape"):
        linked.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
    for arguments, expected in (
        (["--data=Digits", "--data.image_size=12"], (10, (1, 12, 12))),
        (["--data=FashionMNIST"], (10, (1, 28, 28))),
    ):
        model = linked.instantiate(linked.parse_args(arguments)).model
        assert model.arguments == expected


# MixUp and CutMix


@pytest.mark.parametrize("alphas", [(0.5, 0), (0, 1), (1, 1)])
@settings(max_examples=5)
@given(seed=st.integers(0, 1000), batch_size=st.integers(2, 30))
def test_mixed_labels_are_the_shares_of_the_classes_in_the_images(alphas, seed, batch_size):
    mixup, cutmix = alphas
    data = toy(seed=seed, batch_size=batch_size, mixup_alpha=mixup, cutmix_alpha=cutmix)
    for images, labels in data.train_dataloader():
        assert labels.shape == (len(images), CLASSES)
        assert labels.dtype == torch.float32
        assert labels.min() >= 0
        torch.testing.assert_close(labels.sum(1), torch.ones(len(images)))
        red = pixels(images)[:, 0].mean((1, 2))
        np.testing.assert_allclose(red, labels.numpy() @ (np.arange(CLASSES) * 85), atol=0.01)
    _, labels = next(iter(data.val_dataloader()))
    assert labels.dtype == torch.int64


def test_each_batch_gets_mixup_or_cutmix():
    def cut(**kwargs):
        data = toy(batch_size=6, **kwargs)
        # CutMix keeps pixels, so that some images have two values of green; MixUp blends them.
        greens = [pixels(images)[:, 1] for images, _ in data.train_dataloader()]
        return [bool((green.max((1, 2)) - green.min((1, 2)) > 0.5).any()) for green in greens]

    assert not any(cut(mixup_alpha=1))
    assert any(cut(cutmix_alpha=1))
    both = cut(mixup_alpha=1, cutmix_alpha=1)
    assert any(both)
    assert not all(both)


# Lightning


@pytest.mark.filterwarnings("ignore")
def test_fit_and_predict():
    pl.seed_everything(0, verbose=False)
    data, model, trainer = Toy(batch_size=20), BatchRecorder(), make_data_trainer()
    trainer.fit(model, datamodule=data)
    seen = served((unnormalized(images), labels) for images, labels in model.seen)
    assert sorted(seen) == sorted(
        (sample, data.train_labels[sample]) for sample in data.train_set.indices.tolist()
    )
    assert torch.cat(trainer.predict(model, datamodule=data)).tolist() == [3, 0, 1, 2, 2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("64-true", torch.float64), ("bf16-true", torch.bfloat16)],
)
@pytest.mark.parametrize("mixup_alpha", [0, 1])
def test_the_net_receives_normalized_images_in_its_precision(precision, dtype, mixup_alpha):
    pl.seed_everything(0, verbose=False)
    data = Toy(batch_size=180, train_transform=[], mixup_alpha=mixup_alpha)
    model = BatchRecorder()
    make_data_trainer(precision=precision).fit(model, datamodule=data)
    ((images, _),) = model.seen
    assert images.dtype == dtype
    values = images.double().numpy()
    # The extremes of each channel, by hand; all are reached, mixed or not.
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        top = 199 / 255 if channel == 1 else 1
        assert values[:, channel].min() >= (0 - mean) / std - 0.01
        assert values[:, channel].max() <= (top - mean) / std + 0.02
    assert values[:, 2, :, 0].min() == pytest.approx((1 - 0.125) / 0.2, rel=0.01)
    assert values[:, 2, :, -1].max() == pytest.approx((0 - 0.125) / 0.2, rel=0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore")
def test_two_processes_share_the_batches_of_one(tmp_path):
    jitter = v2.ColorJitter(0.5)
    pl.seed_everything(0, verbose=False)
    alone = BatchRecorder()
    make_data_trainer(max_epochs=3).fit(
        alone, datamodule=Toy(batch_size=60, train_transform=jitter)
    )
    pl.seed_everything(0, verbose=False)
    trainer = make_data_trainer(max_epochs=3, strategy="ddp_fork", devices=2)
    trainer.fit(BatchRecorder(tmp_path), datamodule=Toy(batch_size=30, train_transform=jitter))
    shares = [torch.load(tmp_path / f"{rank}.pt")[0] for rank in range(2)]
    assert [len(share) for share in (alone.seen, *shares)] == [9, 9, 9]
    for expected, *parts in zip(alone.seen, *shares, strict=True):
        for whole, first, second in zip(expected, *parts, strict=True):
            # They take turns.
            assert torch.equal(torch.stack([first, second], dim=1).flatten(0, 1), whole)


class ToySeededByProcess(Toy):
    """Has a different random state in each process."""

    def setup(self, stage):
        torch.manual_seed(self.trainer.global_rank)
        super().setup(stage)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore")
def test_two_processes_share_less_than_a_batch_each(tmp_path):
    """Nothing is dropped or seen twice, although their seeds differ."""
    trainer = make_data_trainer(strategy="ddp_fork", devices=2)
    data = ToySeededByProcess(batch_size=100, train_transform=[])
    trainer.fit(BatchRecorder(tmp_path), datamodule=data)
    seen = []
    for rank in range(2):
        ((images, labels),), _ = torch.load(tmp_path / f"{rank}.pt")
        assert len(labels) == 90
        seen += [sample for sample, _ in served([(unnormalized(images), labels)])]
    assert len(set(seen)) == 180


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [(0, 0), (0, 2), (2, 1)], ids=str)
@pytest.mark.parametrize(
    "checkpoint",
    [
        {"every_n_train_steps": 5},  # within the second epoch of 3 batches
        {"every_n_train_steps": 3},  # with the last batch of the first
        {"every_n_epochs": 1},
        {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    ],
    ids=str,
)
def test_a_resumed_run_continues_with_the_same_batches(tmp_path, checkpoint, workers):
    def run(num_workers, seed, **kwargs):
        pl.seed_everything(seed, verbose=False)
        data = Digits(batch_size=40, train_size=120, mixup_alpha=1, num_workers=num_workers)
        model = BatchRecorder()
        callback = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **checkpoint)
        trainer = make_data_trainer(
            tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=[callback]
        )
        trainer.fit(model, datamodule=data, **kwargs)
        return flat(model.seen)

    whole = run(workers[0], seed=0)
    assert len(whole) == 2 * 3 * 3
    first = min(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    step = int(first.stem.split("=")[1])
    resumed = run(workers[1], seed=1, ckpt_path=first)  # the seed is that of the checkpoint
    assert len(resumed) == len(whole) - 2 * step
    assert same_tensors(resumed, whole[2 * step :])


@pytest.mark.filterwarnings("ignore")
def test_a_run_of_part_of_each_epoch_resumes_with_the_next(tmp_path):
    def run(epochs, **kwargs):
        pl.seed_everything(0, verbose=False)
        model = BatchRecorder()
        trainer = make_data_trainer(tmp_path, max_epochs=epochs, limit_train_batches=2)
        trainer.fit(model, datamodule=Toy(batch_size=20), **kwargs)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        return [images for images, _ in model.seen]

    whole = run(2)
    run(1)
    resumed = run(2, ckpt_path=tmp_path / "end.ckpt")
    assert len(resumed) == 2
    assert same_tensors(resumed, whole[2:])


@pytest.mark.filterwarnings("ignore")
def test_overfitting_sees_the_same_few_batches(tmp_path):
    pl.seed_everything(0, verbose=False)
    data, model = Toy(batch_size=20, train_transform=[]), BatchRecorder()
    trainer = make_data_trainer(
        tmp_path, max_epochs=2, overfit_batches=2, enable_checkpointing=True
    )
    trainer.fit(model, datamodule=data)
    first, second, *again = (images for images, _ in model.seen)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)


def test_the_state_of_a_test_run(tmp_path):
    """So that a checkpoint can be saved during a test."""
    data = toy("test")
    other = Toy()
    other.load_state_dict(data.state_dict())
    assert other.state_dict() == data.state_dict()


def test_loader_processes():
    """There are none if the CPU trains; for GPUs as documented."""
    data = toy()
    assert data.train_dataloader().num_workers == data.val_dataloader().num_workers == 0
    data.trainer = SimpleNamespace(  # as on a GPU
        strategy=SimpleNamespace(root_device=torch.device("cuda")),
        num_devices=1,
        overfit_batches=0,
        world_size=1,
        global_rank=0,
        check_val_every_n_epoch=None,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    loader = data.train_dataloader()
    assert loader.num_workers == min(8, max(1, cores - 1))
    assert loader.pin_memory
    assert loader.persistent_workers


# Errors


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("batch_size", 0, "batch_size must be at least 1, found 0"),
        ("val_fraction", 0.0, "val_fraction must be strictly between 0 and 1, found 0.0"),
        ("val_fraction", 1.0, "val_fraction must be strictly between 0 and 1, found 1.0"),
        ("val_fraction", float("nan"), "val_fraction must be .* found nan"),
        ("train_size", 0, "train_size must be at least 1, found 0"),
        ("split_seed", -1, "split_seed must be in .* found -1"),
        ("num_workers", -1, "num_workers must be 0 or more, found -1"),
        ("mixup_alpha", -0.1, "mixup_alpha must be 0 .off. or positive, found -0.1"),
        ("cutmix_alpha", -1.0, "cutmix_alpha must be 0 .off. or positive, found -1.0"),
        ("mixup_alpha", float("inf"), "mixup_alpha must be .* found inf"),
    ],
)
def test_arguments_out_of_range(argument, value, message):
    with pytest.raises(ValueError, match=message):
        Toy(**{argument: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": (40, 1, 40, 40)}, r"1 in the smallest.*val_fraction=0.1"),
        ({"val_fraction": 0.01}, r"200 samples of 4 classes.*val_fraction=0.01"),
        ({"train_size": 3}, r"train_size must be between 4 .* and 180 .* found 3"),
        ({"train_size": 181}, r"train_size must be between 4 .* and 180 .* found 181"),
        ({"counts": (9, 9, 9, 9, 9, 9)}, r"training split: labels must be in 0..3, found \[4, 5\]"),
        ({"train_transform": v2.Pad(1)}, r"train_transform gives .*\(3, 7, 8\).*\(3, 5, 6\)"),
    ],
)
def test_data_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        toy(**arguments)


def test_test_labels_out_of_range():
    with pytest.raises(ValueError, match=r"test split: labels must be in 0..3, found \[-1\]"):
        toy("test", test_labels=(0, -1, 2))


def test_evaluation_images_of_another_shape():
    class Cropped(Toy):
        def eval_transform(self):
            return [v2.CenterCrop(4)]

    for stage in ("validate", "predict"):
        with pytest.raises(ValueError, match=r"evaluation transform gives .*\(3, 4, 4\)"):
            Cropped().setup(stage)


def test_count_of_images_and_labels_differ():
    class Short(Toy):
        def load_split(self, split):
            dataset, labels = super().load_split(split)
            return dataset, labels[:-1]

    with pytest.raises(ValueError, match="200 images but 199 labels"):
        Short().setup("fit")


@pytest.mark.parametrize(
    ("images", "processes", "expected"),
    [
        (64, 1, [32, 32]),
        (65, 1, [32, 32]),
        (65, 2, [32]),
        (66, 2, [32]),
        (63, 2, [32]),
        (20, 1, [20]),
    ],
)
def test_an_incomplete_last_batch_is_left_out(monkeypatch, images, processes, expected):
    """Batch norm fails on a single image. The share of each process is rounded up."""
    for rank in range(processes):
        monkeypatch.setattr(Digits, "_processes", lambda self, rank=rank: (processes, rank))
        data = Digits(batch_size=32, train_size=images, train_transform=[])
        data.setup("fit")
        assert [len(labels) for _, labels in data.train_dataloader()] == expected
