import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teamnet_pl.data import RandomImages


@settings(max_examples=15)
@given(
    classes=st.integers(2, 5),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    images=st.integers(50, 90),
)
def test_any_shape(classes, shape, images):
    data = RandomImages(
        num_classes=classes, input_shape=shape, train_images=images, test_images=images
    )
    data.setup("fit")
    data.setup("test")
    assert len(data.train_set) + len(data.val_set) == len(data.test_set) == images
    batch, labels = next(iter(data.test_dataloader()))
    assert batch.shape[1:] == shape
    assert batch.dtype == torch.uint8
    assert set(labels.tolist()) == set(range(classes))


def test_statistics_of_the_pixels():
    data = RandomImages()
    data.setup("fit")
    images = torch.stack([data.train_set[i][0] for i in range(len(data.train_set))])
    images = data.normalize(images)
    assert images.mean() == pytest.approx(0, abs=0.01)
    assert images.std() == pytest.approx(1, abs=0.01)
    data.setup("test")
    assert not torch.equal(data.test_set[0][0], data.val_set[0][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_images": 0}, "train_images must be at least 1, found 0"),
        ({"test_images": -1}, "test_images must be at least 1, found -1"),
        ({"input_shape": (3, 0, 8)}, "height must be at least 1, found 0"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomImages(**arguments)
