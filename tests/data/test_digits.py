import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from teamnet_pl.data import Digits

PIXELS, LABELS = load_digits(return_X_y=True)


def digits(**kwargs) -> Digits:
    pl.seed_everything(0, workers=True, verbose=False)
    data = Digits(**kwargs)
    for stage in ("fit", "test"):
        data.setup(stage)
    return data


def served(loader) -> list[tuple[tuple[int, ...], int]]:
    """(the 64 values 0..16, label) of every image that a loader serves."""
    pairs = []
    for images, labels in loader:
        assert images.shape[1:] == (1, 8, 8)
        values = images.numpy() * 16
        assert np.abs(values - values.round()).max() < 1e-3
        rows = values.round().astype(int).reshape(len(labels), 64).tolist()
        pairs += zip(map(tuple, rows), labels.tolist(), strict=True)
    return pairs


def test_the_three_splits_are_scikit_learns_digits():
    data = digits(train_transform=[], batch_size=1)
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    train, val, test = map(served, loaders)
    truth = zip(map(tuple, PIXELS.astype(int).tolist()), LABELS.tolist(), strict=True)
    assert sorted(train + val + test) == sorted(truth)  # all images differ: disjoint too
    assert (len(train), len(val), len(test)) == (1293, 144, 360)


@settings(max_examples=10)
@given(split_seed=st.integers(1, 2**32 - 1), val_fraction=st.floats(0.05, 0.5))
def test_the_test_split_never_changes(split_seed, val_fraction):
    expected = digits()
    data = digits(split_seed=split_seed, val_fraction=val_fraction)
    test = served(data.test_dataloader())
    assert test == served(expected.test_dataloader())
    assert not set(test) & set(served(data.val_dataloader()))
    assert len(data.train_set) + len(data.val_set) + len(test) == 1797


def test_split_seed_changes_validation():
    first, second = (served(digits(split_seed=seed).val_dataloader()) for seed in (0, 1))
    assert set(first) != set(second)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_the_test_split_is_stratified(fraction):
    test = served(digits(test_fraction=fraction).test_dataloader())
    counts = np.bincount([label for _, label in test])
    assert np.all(np.abs(counts - fraction * np.bincount(LABELS)) <= 1)


def test_mean_and_std_are_those_of_the_pixels():
    assert Digits.mean[0] == pytest.approx((PIXELS / 16).mean(), abs=1e-4)
    assert Digits.std[0] == pytest.approx((PIXELS / 16).std(), abs=1e-4)


def test_image_size_enlarges_bilinearly():
    small, large = digits(), digits(image_size=20)
    assert large.input_shape == (1, 20, 20)
    images, labels = next(iter(large.test_dataloader()))
    originals, same_labels = next(iter(small.test_dataloader()))
    assert images.shape[1:] == (1, 20, 20)
    assert torch.equal(labels, same_labels)
    for image, original in zip(images[:5], originals[:5], strict=True):
        pillow = Image.fromarray(original[0].numpy()).resize((20, 20), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(image[0].numpy(), np.asarray(pillow), atol=1e-4)
    assert next(iter(large.train_dataloader()))[0].shape[1:] == (1, 20, 20)


def test_standard_augmentation_moves_the_digits_a_little():
    data, plain = digits(), digits(train_transform=[])
    rows, columns = np.mgrid[:8, :8]

    def center(image):
        weights = image[0].numpy()
        return np.array([(rows * weights).sum(), (columns * weights).sum()]) / weights.sum()

    def similarity(a, b):
        return np.corrcoef(a.ravel(), b.ravel())[0, 1]

    pairs = [(plain.train_set[i][0], data.train_set[i][0]) for i in range(300)]
    assert not any(torch.equal(before, after) for before, after in pairs)
    shifts = np.array([center(after) - center(before) for before, after in pairs])
    assert np.abs(shifts).max() < 2
    assert 0.4 < shifts.std() < 1
    assert np.abs(shifts.mean(0)).max() < 0.2
    # None is flipped: if half of them were, both means would be the same.
    same = np.mean([similarity(before, after) for before, after in pairs])
    for axis in (1, 2):
        flipped = np.mean([similarity(before.flip(axis), after) for before, after in pairs])
        assert same > flipped + 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 7}, "image_size must be at least 8, found 7"),
        ({"test_fraction": 0.0}, "test_fraction must be strictly between 0 and 1, found 0.0"),
        ({"test_fraction": 1.5}, "test_fraction must be strictly between 0 and 1, found 1.5"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)


def test_a_test_split_that_is_too_small():
    with pytest.raises(ValueError, match=r"1797 samples of 10 classes.*test_fraction=0.001"):
        Digits(test_fraction=0.001).setup("test")
