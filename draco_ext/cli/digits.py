"""The data and the model of ``draco train``: scikit-learn's handwritten digits and a small convolutional net."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

TRAIN_SAMPLES = 1437
TEST_SAMPLES = 360


def make_net(seed: int) -> nn.Sequential:
    """Return a convolutional net for 8 x 8 images.

    All its operations are smooth. A ReLU could turn a difference in the last bit into a jump, and
    two runs could not be compared.
    """
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )


class Digits:
    """The digits, on one device.

    Args:
        seed: the seed of the split.
        device: the device of the tensors.

    Attributes:
        train: images and labels for training.
        test: images and labels for evaluation.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        images, labels = load_digits(return_X_y=True)
        # Brightness is 0 to 16; scale it to about zero mean and unit variance.
        images = (torch.from_numpy(images).float().view(-1, 1, 8, 8) - 4.9) / 6.0
        labels = torch.from_numpy(labels)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        train, test = order.split([TRAIN_SAMPLES, TEST_SAMPLES])
        self.train = TensorDataset(images[train].to(device), labels[train].to(device))
        self.test = TensorDataset(images[test].to(device), labels[test].to(device))

    @torch.no_grad()
    def evaluate(self, net: nn.Module) -> tuple[float, float]:
        """Return the accuracy and mean loss of a net on the test samples."""
        images, labels = self.test.tensors
        outputs = net(images)
        accuracy = (outputs.argmax(1) == labels).float().mean().item()
        return accuracy, cross_entropy(outputs, labels).item()
