"""What images are compared by: the features of a small classifier trained here, or Inception's from its weights."""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

_BATCH = 500


@dataclass(frozen=True)
class Features:
    """A feature extractor, and what its distances are called.

    Attributes:
        name: ``"FD-CNN"`` of the classifier; ``"FID"`` of Inception alone, since only that is comparable with papers.
        sha256: of the weights: distances of different weights cannot be compared.
        extract: images ``(N, C, H, W)`` in [-1, 1] -> ``(N, D)``.
        accuracy: of the classifier on test images; None for Inception.
    """

    name: str
    sha256: str
    extract: Callable[[Tensor], Tensor]
    accuracy: float | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of all images, float64 ``(N, D)``."""
        return torch.cat([self.extract(part).double() for part in images.split(_BATCH)])


class Classifier(nn.Module):
    """Three strided convolutions and two linear layers; its features are the 128 values before the last layer.

    Args:
        channels: of the images.
        classes: how many labels.
        width: of the first convolution.
    """

    def __init__(self, channels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((channels, width, 2 * width, 4 * width)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.hidden = nn.Linear(16 * width, 128)
        self.head = nn.Linear(128, classes)

    def features(self, images: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, 128)``.

        Raises:
            ValueError: images of other channels.
        """
        if images.dim() != 4 or images.shape[1] != self.body[0].in_channels:
            raise ValueError(
                f"this classifier takes images (N, {self.body[0].in_channels}, H, W), got {tuple(images.shape)}: train "
                "one on images like these"
            )
        return F.relu(self.hidden(self.body(images)))

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``, logits."""
        return self.head(self.features(images))


def train_classifier(
    images: Tensor, labels: Tensor, *, epochs: int = 4, batch: int = 128, seed: int = 0, progress: bool = True
) -> Classifier:
    """Train a :class:`Classifier` on the training images alone, reproducibly on one machine.

    Args:
        images: ``(N, C, H, W)`` in [-1, 1].
        labels: ``(N,)`` int64 from 0.

    Raises:
        ValueError: images and labels of different counts, fewer than one batch, or fewer than two classes.
    """
    if len(images) != len(labels) or len(images) < batch:
        raise ValueError(f"need at least {batch} images with one label each, got {len(images)} and {len(labels)}")
    classes = int(labels.max()) + 1
    if classes < 2:
        raise ValueError("a classifier needs labels of at least two classes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(images.shape[1], classes)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    with tqdm(total=steps, desc="classifier", unit="step", disable=not progress, leave=False) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for chosen in order[: len(images) // batch * batch].split(batch):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
                schedule.step()
                bar.update(1)
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of images that get their label."""
    right = [
        (model(part).argmax(1) == label).sum().item()
        for part, label in zip(images.split(_BATCH), labels.split(_BATCH), strict=True)
    ]
    return sum(right) / len(images)


def weights_sha256(model: nn.Module) -> str:
    """What tells the weights of one model from another's, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def classifier_features(model: Classifier, test: tuple[Tensor, Tensor] | None = None) -> Features:
    """Wrap a trained classifier; ``test`` is images and labels to report its accuracy on."""
    score = None if test is None else accuracy(model, *test)
    return Features("FD-CNN", weights_sha256(model), model.features, score)


def save_classifier(model: Classifier, path: Path) -> None:
    """Write the weights as safetensors."""
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


def load_classifier(path: Path) -> Classifier:
    """Read what :func:`save_classifier` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds another network.
    """
    state = load_file(path)
    try:
        model = Classifier(
            state["body.0.weight"].shape[1], len(state["head.weight"]), width=len(state["body.0.weight"])
        )
        model.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is no classifier of this package: {error}") from error
    return model.eval()


def inception_features(weights: Path, device: torch.device | str = "cpu") -> Features:
    """Inception-v3's 2,048 pool features, those of the FID, from a weights file that the user has; nothing is fetched.

    Network and resizing are torch-fidelity's, which repeat TensorFlow's original: torchmetrics resizes in another way
    unless told not to, and its FIDs are then not those of papers.

    Args:
        weights: torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``.
        device: to compute on; features come back to the CPU.

    Raises:
        ImportError: torch-fidelity is missing.
        OSError: there is no such file.
        ValueError: it holds something else than the weights of this network.
    """
    if not weights.is_file():
        raise FileNotFoundError(f"Inception weights {weights} do not exist; leave them out to use the small classifier")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision, which it imports, is of another torch
        raise ImportError(f"Inception features need torch-fidelity ({error}): pip install torch-fidelity") from error
    try:
        torch.load(weights, weights_only=True, map_location="meta")  # torch-fidelity would unpickle whatever it holds
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    except Exception as error:  # torch.load and unpickling raise what they like
        raise ValueError(
            f"{weights} does not hold the weights of torch-fidelity's Inception-v3, which come as "
            f"weights-inception-2015-12-05-6726825d.pth: {error}"
        ) from error
    network.to(device)

    def extract(images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"Inception takes images of 1 or 3 channels, got {tuple(images.shape)}")
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(device, torch.uint8)
        return network(pixels.expand(-1, 3, -1, -1))[0].cpu()

    return Features("FID", hashlib.sha256(weights.read_bytes()).hexdigest(), extract)
