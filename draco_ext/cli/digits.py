"""Real data and a real net: scikit-learn's handwritten digits and a small convolutional net."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from draco_ext.distributed.batches import GlobalBatches

TRAIN_SAMPLES = 1437
TEST_SAMPLES = 360


def make_net() -> nn.Sequential:
    """A convolutional net for 8 x 8 images, drawn from torch's global generator.

    All its operations are smooth: a ReLU would turn a difference in the last bit into a step, and
    with it the comparison of two runs into chance.
    """
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
    """The digits and a net on them, as one rank holds them; a ``distributed.server.Replica``.

    Args:
        seed: Seed of the split, of the shuffles and of the net.
        batch_size: Size of the global batch.

    Attributes:
        net: The net.
    """

    def __init__(self, seed: int, batch_size: int) -> None:
        images, labels = load_digits(return_X_y=True)
        # Brightness 0 to 16, made to have about zero mean and unit variance.
        images = (torch.from_numpy(images).float().view(-1, 1, 8, 8) - 4.9) / 6.0
        labels = torch.from_numpy(labels)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        train, test = order.split([TRAIN_SAMPLES, TEST_SAMPLES])
        self._train = images[train], labels[train]
        self._test = images[test], labels[test]
        self._batches = GlobalBatches(TRAIN_SAMPLES, batch_size, seed)
        torch.manual_seed(seed)
        self.net = make_net()
        self._parameters = list(self.net.parameters())
        self._initial = parameters_to_vector(self._parameters).detach().clone()

    def initial_parameters(self) -> Tensor:
        """A copy of the flat parameter vector that training starts from."""
        return self._initial.clone()

    def load(self, parameters: Tensor) -> None:
        """Take the flat parameter vector as the net's."""
        vector_to_parameters(parameters, self._parameters)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and labels of a step's global batch."""
        samples = self._batches.indices(step)
        images, labels = self._train
        return images[samples], labels[samples]

    def gradient(self, step: int, part: int, parts: int) -> tuple[float, Tensor]:
        """Mean loss of one part of a step's batch, and its flat gradient, scaled to the batch."""
        samples = self._batches.part(step, part, parts)
        images, labels = self._train
        loss = cross_entropy(self.net(images[samples]), labels[samples], reduction="sum")
        # Parts may differ by one sample: divide by their mean size, not by their own.
        scaled = loss * (parts / self._batches.batch_size)
        gradients = torch.autograd.grad(scaled, self._parameters)
        return loss.item() / len(samples), parameters_to_vector(gradients)

    @torch.no_grad()
    def evaluate(self, parameters: Tensor) -> tuple[float, float]:
        """Accuracy and mean loss on the test samples."""
        self.load(parameters)
        images, labels = self._test
        outputs = self.net(images)
        accuracy = (outputs.argmax(1) == labels).float().mean().item()
        return accuracy, cross_entropy(outputs, labels).item()
