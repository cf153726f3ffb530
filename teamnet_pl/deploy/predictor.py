"""One set of weights that answers within a budget."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from teamnet_pl.checkpoints import check_finite
from teamnet_pl.deploy.controller import WINDOW, DepthController
from teamnet_pl.deploy.hub import Teammate
from teamnet_pl.deploy.images import Images, Preprocessing
from teamnet_pl.deploy.profile import Profile, profile_depths, run_timed
from teamnet_pl.elastic import ElasticNet, depth_costs
from teamnet_pl.elastic.evaluation import example_images
from teamnet_pl.errors import TeamNetError
from teamnet_pl.trust import Trust, errors_naming

CALIBRATION_RUNS = 10
"""Runs of each depth that tell its latency where no profile does."""


class NonFiniteError(ArithmeticError):
    """The net gave a number that is infinite or NaN."""


@dataclass(frozen=True)
class Prediction:
    """What a net says of a batch.

    Attributes:
        probabilities: Of each class, shape ``(N, classes)``.
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
        """The class predicted for each image, shape ``(N,)``."""
        return self.probabilities.argmax(dim=-1)

    @property
    def names(self) -> list[str]:
        """The name of the class predicted for each image.

        Raises:
            ValueError: If the names of the classes are not known.
        """
        if self.classes is None:
            raise TeamNetError("The names of the classes are not known: use the labels.")
        return [self.classes[label] for label in self.labels.tolist()]


class Predictor:
    """Runs a trained net at the deepest depth that a budget allows.

    The weights are in memory once; each depth is a view of them, so that choosing another one costs
    a lookup. Any number of threads may predict at once, each with a budget of its own.

    Args:
        net: The net, on its device. It is put into evaluation mode.
        preprocessing: How images become the input of the net; see `Preprocessing`.
        classes: Names of the classes, in the order of the labels, if they are known.
        profile: What the depths take on this machine; by default a few runs tell.
        depths: Names of the depths to choose from; by default all.
        batch_sizes: Numbers of images of those few runs. What lies between is known from them;
            larger batches are taken to be slower in proportion, which they mostly are not.

    Attributes:
        depths: Names of the depths to choose from, the deepest first.
        macs: Multiply-accumulates of each for one image, by name.
        controller: What chooses a depth for a budget of time.
        last_is_finite: Whether all that the last run gave is finite.

    Raises:
        ValueError: If the net has no such depth, its weights or what it gives are not finite, the
            profile is that of another net or device, or a batch size is not positive.

    Example:
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
    ) -> None:
        check_finite(net.state_dict(), "The net")
        net.eval()
        chosen = [net.depth(depth) for depth in (net.depths if depths is None else depths)]
        views = {own.name: net.view(own) for own in net.depths if own in chosen}
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
        self._check(profile, next(net.parameters()).device)
        self.controller = DepthController(self.depths, profile.expected_ms)
        self.last_is_finite = True
        self._waits: deque[float] = deque(maxlen=WINDOW)  # of the last calls, while images are read
        # Whatever the profile says, what the machine does now is not known without a run.
        image = example_images(torch.nn.Module(), 1, net.input_shape)
        for view in views.values():
            run_timed(view, image)  # warms up
        for depth in views:
            self.run(image, depth)
            if not self.last_is_finite:
                raise TeamNetError(
                    f"The net's output at {depth} is not finite, though its weights are: they are "
                    "not those of a trained net. Use another checkpoint."
                )

    def _check(self, profile: Profile, device: torch.device) -> None:
        if missing := [depth for depth in self.depths if depth not in profile.depths]:
            raise TeamNetError(
                f"The profile is of depths {', '.join(profile.depths)} and lacks "
                f"{', '.join(missing)}: profile this net by `teamnet profile`."
            )
        if profile.device != device.type:
            raise TeamNetError(
                f"The profile was taken on {profile.device}, the net is on {device.type}: profile "
                "it there by `teamnet profile --device`."
            )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        teammate: str = "a",
        *,
        device: str | torch.device = "cpu",
        profile: Profile | str | Path | None = None,
        depths: Sequence[str] | None = None,
        batch_sizes: Sequence[int] = (1, 8),
        trust_import: bool = False,
    ) -> Predictor:
        """Loads a Teammate of a checkpoint, its preprocessing and the names of its classes.

        Args:
            path: The checkpoint.
            teammate: ``a`` or ``b``.
            device: Where to run it.
            profile: What the depths take on this machine, or the file that ``teamnet profile``
                wrote; by default a few runs tell.
            depths: Names of the depths to choose from; by default all.
            batch_sizes: Numbers of images of those few runs.
            trust_import: Whether the checkpoint may name a backbone or a transform by import path,
                which runs code: only for a file that you trust as you do code.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a checkpoint of a team, is damaged, names what is not trusted,
                has no such Teammate or depth, or does not hold the preprocessing; if the profile is
                not a profile, or of another net or device; or if a batch size is not positive.
        """
        if isinstance(profile, str | Path):
            profile = Profile.load(profile)
        net = Teammate.from_checkpoint(path, teammate, device=device, trust_import=trust_import)
        if net.preprocessing is None:
            raise TeamNetError(
                f"{path} does not hold how images become the input of the net, since the team was "
                "not trained on an ImageDataModule. Make a Predictor with a Preprocessing of your "
                "own."
            )
        with errors_naming(path):
            preprocessing = Preprocessing.from_config(net.preprocessing, Trust(path, trust_import))
        return cls(
            net,
            preprocessing,
            classes=net.classes,
            profile=profile,
            depths=depths,
            batch_sizes=batch_sizes,
        )

    def class_name(self, label: int) -> str | None:
        """The name of a class; None if the names are not known."""
        return None if self.classes is None else self.classes[label]

    def predict(
        self,
        images: Images,
        *,
        budget_ms: float | None = None,
        macs: int | None = None,
        depth: str | None = None,
    ) -> Prediction:
        """Predicts at the deepest depth that fits.

        Args:
            images: One image or several.
            budget_ms: Milliseconds that the call may take. The shallowest depth runs where none
                fits: whether it did is in the prediction's latency.
            macs: Multiply-accumulates that each image may take.
            depth: Name of the depth.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If more than one budget is given, it is not positive, there is no such depth
                or none takes so little arithmetic, or an image is none or has the wrong shape.
            NonFiniteError: If what the net gives for an image is not finite.
        """
        begin, worked = time.perf_counter(), time.thread_time()
        if sum(budget is not None for budget in (budget_ms, macs, depth)) > 1:
            raise TeamNetError("Pass one of budget_ms, macs and depth, found more.")
        fixed = self.depth_for(macs, depth)
        if budget_ms is not None:
            check_budget(budget_ms)
        batch = self.preprocessing(images)
        work_ms = 1000 * (time.thread_time() - worked)
        waited_ms = 1000 * (time.perf_counter() - begin) - work_ms
        self._waits.append(waited_ms)
        # Waiting for a disk is part of each call. More than that is the machine's load, which the
        # controller holds: else whether it hits the reading or the run would change the depth.
        least_ms = min([*self._waits])
        if budget_ms is None:
            chosen = fixed or self.depths[0]
        else:
            chosen = self.controller.choose(budget_ms - work_ms - least_ms, len(batch))
        probabilities = self.run(batch, chosen, waited_ms - least_ms)
        for output in probabilities:
            check_output(output, chosen)
        taken_ms = 1000 * (time.perf_counter() - begin)
        return Prediction(probabilities, chosen, taken_ms, self.classes)

    def depth_for(self, macs: int | None = None, depth: str | None = None) -> str | None:
        """The depth that a budget of arithmetic or a name asks for; None if neither is given.

        Raises:
            ValueError: If there is no such depth, or none takes so little arithmetic.
        """
        if depth is not None and depth not in self.depths:
            raise TeamNetError(f"There are the depths {', '.join(self.depths)}; found {depth}.")
        if macs is None:
            return depth
        for name, own in self.macs.items():
            if own <= macs:
                return name
        raise TeamNetError(
            f"The shallowest depth takes {min(self.macs.values()):,} multiply-accumulates, more "
            f"than {macs:,}."
        )

    def run(self, batch: Tensor, depth: str, lost_ms: float = 0.0) -> Tensor:
        """Runs one depth, and lets the controller know what it took.

        Args:
            batch: Preprocessed images, shape ``(N, channels, height, width)``.
            depth: Name of the depth.
            lost_ms: Milliseconds that the machine's load has cost the call before.

        Returns:
            Class probabilities, shape ``(N, classes)``; see `check_output`.
        """
        probabilities, taken_ms = run_timed(self._views[depth], batch)
        self.controller.observe(depth, len(batch), lost_ms + taken_ms)
        self.last_is_finite = bool(probabilities.isfinite().all())
        return probabilities


def check_output(probabilities: Tensor, depth: str) -> None:
    """Refuses what a net gave for an image, if it is not finite.

    Args:
        probabilities: Of each class, shape ``(classes,)``.
        depth: Name of the depth that ran.

    Raises:
        NonFiniteError: If one is not finite.
    """
    if not probabilities.isfinite().all():
        raise NonFiniteError(f"The net's output at {depth} is not finite.")


def check_budget(budget_ms: float) -> None:
    """Checks a budget of time.

    Raises:
        ValueError: If it is not a positive number.
    """
    if not 0 < budget_ms < math.inf:
        raise TeamNetError(
            f"budget_ms must be a positive number of milliseconds, found {budget_ms}."
        )
