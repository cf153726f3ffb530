"""One set of weights that answers within a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from teamnet_pl.checkpoints import check_finite
from teamnet_pl.deploy.runtime.controller import DepthController, OverheadEstimator
from teamnet_pl.deploy.runtime.measuring import profile_depths, run_timed
from teamnet_pl.deploy.runtime.preprocessing import MAX_PIXELS, Images, Preprocessing
from teamnet_pl.deploy.runtime.profile import Profile
from teamnet_pl.deploy.teammate import Teammate
from teamnet_pl.elastic import ElasticNet, depth_costs
from teamnet_pl.elastic.evaluation import example_images
from teamnet_pl.errors import TeamNetError
from teamnet_pl.trust import Trust, errors_naming

CALIBRATION_RUNS = 10
"""Number of runs of each depth and batch size that replace a profile."""


class NonFiniteError(ArithmeticError):
    """An output of the net is infinite or NaN."""


@dataclass(frozen=True)
class Prediction:
    """The prediction of a net for a batch.

    Attributes:
        probabilities: Class probabilities, shape ``(N, classes)``.
        depth: Name of the depth that ran.
        latency_ms: Milliseconds from the call to the answer.
        classes: Names of the classes, in the order of the labels; None if they are not known.
    """

    probabilities: Tensor
    depth: str
    latency_ms: float
    classes: Sequence[str] | None = None

    @property
    def labels(self) -> Tensor:
        """The predicted class of each image, shape ``(N,)``."""
        return self.probabilities.argmax(dim=-1)

    @property
    def names(self) -> list[str]:
        """The name of the predicted class of each image.

        Raises:
            TeamNetError: If the names of the classes are not known.
        """
        if self.classes is None:
            raise TeamNetError("The names of the classes are not known: use the labels.")
        return [self.classes[label] for label in self.labels.tolist()]


class Predictor:
    """Runs a trained net at the deepest depth that a budget allows.

    The weights are in memory once and each depth is a view of them, so that changing the depth
    costs a lookup. Any number of threads may predict at once, each with its own budget.

    Args:
        net: The net, on its device. It is put into evaluation mode.
        preprocessing: How images become the input of the net; see `Preprocessing`.
        classes: Names of the classes, in the order of the labels, if they are known.
        profile: Profile of the net on this machine; by default a few runs are timed instead.
        depths: Names of the depths to choose from; by default all.
        batch_sizes: Numbers of images in these runs. Latencies between two of them are
            interpolated; those of larger batches are taken to be proportional to the batch size,
            which mostly overestimates them.
        clock: Returns the time in seconds.
        cpu_clock: Returns the seconds for which the current thread has used the CPU.

    Attributes:
        preprocessing: How images become the input of the net.
        classes: Names of the classes; None if they are not known.
        depths: Names of the depths to choose from, the deepest first.
        macs: Multiply-accumulates of each depth for one image, by the depth's name.
        controller: Chooses a depth for a budget of time.
        last_is_finite: Whether the whole output of the last run was finite.

    Raises:
        TeamNetError: If the net has no such depth, its weights or outputs are not finite, the
            profile is of another net or device, or a batch size is not positive.

    Examples:
        >>> import torchvision
        >>> net = ElasticNet(torchvision.models.resnet18(num_classes=10), (3, 32, 32), depths=3)
        >>> predictor = Predictor(net, Preprocessing((3, 32, 32), [0.5] * 3, [0.25] * 3))
        >>> images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        >>> predictor.predict(images, budget_ms=1000).labels.shape
        torch.Size([4])
        >>> predictor.predict(images, depth="d2").depth
        'd2'
        >>> predictor.predict(images, macs=25_000_000).depth
        'd2'
    """

    def __init__(
        self,
        net: ElasticNet,
        preprocessing: Preprocessing,
        *,
        classes: Sequence[str] | None = None,
        profile: Profile | None = None,
        depths: Sequence[str] | None = None,
        batch_sizes: Sequence[int] = (1, 8),
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        check_finite(net.state_dict(), "The net")
        net.eval()
        chosen = [net.depth(depth) for depth in (net.depths if depths is None else depths)]
        views = {depth.name: net.view(depth) for depth in net.depths if depth in chosen}
        if not views:
            raise TeamNetError("There must be at least one depth to choose from, found none.")
        self._views = views
        self.preprocessing = preprocessing
        self.classes = classes
        self.depths = tuple(views)
        costs = depth_costs(net, net.input_shape)
        self.macs = {depth: costs[depth].macs for depth in views}
        if profile is None:
            profile = profile_depths(net, views, batch_sizes, CALIBRATION_RUNS)
        self._check_profile(profile, next(net.parameters()).device)
        self._clock, self._cpu_clock = clock, cpu_clock
        self.controller = DepthController(self.depths, profile.expected_ms, clock=clock)
        self._overhead = OverheadEstimator()
        self.last_is_finite = True
        self._try_each_depth(example_images(torch.nn.Module(), 1, net.input_shape))

    def _check_profile(self, profile: Profile, device: torch.device) -> None:
        if missing := [depth for depth in self.depths if depth not in profile.depths]:
            raise TeamNetError(
                f"The profile is of depths {', '.join(profile.depths)} and lacks "
                f"{', '.join(missing)}: profile this net with `teamnet profile`."
            )
        if profile.device != device.type:
            raise TeamNetError(
                f"The profile was taken on {profile.device}, the net is on {device.type}: profile "
                "it there with `teamnet profile --device`."
            )

    def _try_each_depth(self, image: Tensor) -> None:
        """Checks the outputs, and shows the controller how fast the machine is now."""
        self.warm_up()
        for depth in self.depths:
            self.run(image, depth)
            if not self.last_is_finite:
                raise TeamNetError(
                    f"The net's output at {depth} is not finite, though its weights are: they are "
                    "not those of a trained net. Use another checkpoint."
                )

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path,
        teammate: str = "a",
        *,
        device: str | torch.device = "cpu",
        profile: Profile | str | Path | None = None,
        depths: Sequence[str] | None = None,
        batch_sizes: Sequence[int] = (1, 8),
        trust_import: bool = False,
    ) -> Predictor:
        """Loads a Teammate, its preprocessing and the names of its classes.

        Args:
            source: The checkpoint, a folder that ``save_pretrained`` wrote, or the name of a
                repository on the Hub, such as ``me/net``.
            teammate: Name of the Teammate in a checkpoint, such as ``a``.
            device: The device to run it on.
            profile: Profile of the net on this machine, or the file that ``teamnet profile`` wrote;
                by default a few runs are timed instead.
            depths: Names of the depths to choose from; by default all.
            batch_sizes: Numbers of images in these runs.
            trust_import: Whether the checkpoint may name a backbone or a transform by import path,
                which runs code. Allow this only for a file that you trust as you trust code.

        Raises:
            FileNotFoundError: If there is no such file.
            TeamNetError: If the source does not hold a Teammate, is damaged, names something that
                is not trusted, has no such Teammate or depth, or does not hold the preprocessing;
                if the profile is not a profile, or is of another net or device; or if a batch size
                is not positive.
        """
        if isinstance(profile, str | Path):
            profile = Profile.load(profile)
        net = Teammate.load(source, teammate, device=device, trust_import=trust_import)
        if net.preprocessing is None:
            raise TeamNetError(
                f"{source} does not hold how images become the input of the net, since the team "
                "was not trained on an ImageDataModule. Make a Predictor with a Preprocessing of "
                "your own."
            )
        with errors_naming(source):
            trust = Trust(source, trust_import)
            preprocessing = Preprocessing.from_config(net.preprocessing, trust)
        return cls(
            net,
            preprocessing,
            classes=net.classes,
            profile=profile,
            depths=depths,
            batch_sizes=batch_sizes,
        )

    def warm_up(self, max_batch_size: int = 1) -> None:
        """Runs each depth at each batch size once, since the first run of a thread is slower.

        Args:
            max_batch_size: Largest number of images that will run at once.
        """
        for batch_size in range(1, max_batch_size + 1):
            images = example_images(torch.nn.Module(), batch_size, self.preprocessing.input_shape)
            for view in self._views.values():
                run_timed(view, images)

    def class_name(self, label: int) -> str | None:
        """Returns the name of a class, or None if the names are not known."""
        return None if self.classes is None else self.classes[label]

    def predict(
        self,
        images: Images,
        *,
        budget_ms: float | None = None,
        macs: int | None = None,
        depth: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> Prediction:
        """Predicts at the deepest depth that fits.

        Args:
            images: One image or several.
            budget_ms: Milliseconds that the call may take. If no depth fits, the shallowest runs:
                compare the prediction's latency with the budget.
            macs: Multiply-accumulates that each image may take.
            depth: Name of the depth.
            max_pixels: Files with more pixels are refused before they are decoded.

        Raises:
            FileNotFoundError: If there is no such file.
            TeamNetError: If more than one budget is given, the budget is not positive, there is no
                such depth or all take more arithmetic, or an image is not one or has the wrong
                shape.
            NonFiniteError: If the output for an image is not finite.
        """
        begin, cpu_begin = self._clock(), self._cpu_clock()
        if sum(budget is not None for budget in (budget_ms, macs, depth)) > 1:
            raise TeamNetError("Pass one of budget_ms, macs and depth, found more.")
        fixed = self.depth_for(macs, depth)
        if budget_ms is not None:
            check_budget(budget_ms)
        batch = self.preprocessing(images, max_pixels)
        overhead_ms, delay_ms = self._overhead.split(
            elapsed_ms=1000 * (self._clock() - begin), cpu_ms=1000 * (self._cpu_clock() - cpu_begin)
        )
        if budget_ms is None:
            chosen = fixed or self.depths[0]
        else:
            chosen = self.controller.choose(budget_ms - overhead_ms, len(batch))
        probabilities = self.run(batch, chosen, delay_ms)
        for output in probabilities:
            check_output(output, chosen)
        return Prediction(probabilities, chosen, 1000 * (self._clock() - begin), self.classes)

    def depth_for(self, macs: int | None = None, depth: str | None = None) -> str | None:
        """Returns the depth for a budget of arithmetic or a name; None if neither is given.

        Raises:
            TeamNetError: If there is no such depth, or all take more arithmetic.
        """
        if depth is not None and depth not in self.depths:
            raise TeamNetError(f"There are the depths {', '.join(self.depths)}; found {depth}.")
        if macs is None:
            return depth
        for name, depth_macs in self.macs.items():
            if depth_macs <= macs:
                return name
        raise TeamNetError(
            f"The shallowest depth takes {min(self.macs.values()):,} multiply-accumulates, more "
            f"than {macs:,}."
        )

    def run(self, batch: Tensor, depth: str, delay_ms: float = 0.0) -> Tensor:
        """Runs one depth, and reports its latency to the controller.

        Args:
            batch: Preprocessed images, shape ``(N, channels, height, width)``.
            depth: Name of the depth.
            delay_ms: Milliseconds by which load on the machine delayed the call before.

        Returns:
            Class probabilities, shape ``(N, classes)``; see `check_output`.
        """
        probabilities, latency_ms = run_timed(self._views[depth], batch)
        self.controller.observe(depth, len(batch), delay_ms + latency_ms)
        self.last_is_finite = bool(probabilities.isfinite().all())
        return probabilities


def check_output(probabilities: Tensor, depth: str) -> None:
    """Checks that the output for an image is finite.

    Args:
        probabilities: Class probabilities, shape ``(classes,)``.
        depth: Name of the depth that ran.

    Raises:
        NonFiniteError: If a probability is infinite or NaN.
    """
    if not probabilities.isfinite().all():
        raise NonFiniteError(f"The net's output at {depth} is not finite.")


def check_budget(budget_ms: float) -> None:
    """Checks a budget of time.

    Raises:
        TeamNetError: If it is not a positive number.
    """
    if not 0 < budget_ms < math.inf:
        raise TeamNetError(
            f"budget_ms must be a positive number of milliseconds, found {budget_ms}."
        )
