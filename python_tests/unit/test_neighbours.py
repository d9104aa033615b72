"""Worker momentum, PDMM and weights by accumulated loss, each against what its paper states."""

import math

import pytest
import torch

from draco_ext import CyclicCode, RepetitionCode, decode
from draco_ext.baselines import AccumulatedLoss, PDMMClient, WorkerMomentum, gradient_steps, mean, pdmm_server


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ worker momentum


def test_momentum_is_that_of_torch():
    parameter = torch.zeros(7, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.9)
    momentum = WorkerMomentum(0.9)
    point = torch.zeros(7)
    for step in range(6):
        gradient = normal(7, seed=step).float()
        parameter.grad = gradient.clone()
        optimizer.step()
        point = point - momentum(gradient)
        assert torch.equal(parameter.detach(), point)


def test_momentum_returns_what_nobody_changes():
    momentum = WorkerMomentum(0.5)
    gradient = torch.ones(3)
    momentum(gradient).fill_(9)
    assert gradient.tolist() == [1, 1, 1]
    momentum(gradient).fill_(9)
    assert momentum(gradient).tolist() == [1.75] * 3
    assert momentum(gradient, key="another part").tolist() == [1.0] * 3
    assert WorkerMomentum(0)(gradient).tolist() == [1.0] * 3


def test_momentum_lowers_the_ratio_of_deviation_to_norm_as_the_paper_states():
    """One vector plus independent noise: in the limit the ratio falls by sqrt((1 - m) / (1 + m))."""
    workers, d, factor = 400, 50, 0.9
    direction = normal(d, seed=1)
    momenta = [WorkerMomentum(factor) for _ in range(workers)]
    for step in range(120):
        gradients = direction + 0.7 * normal(workers, d, seed=100 + step)
        sent = torch.stack([m(g) for m, g in zip(momenta, gradients, strict=True)])

    def ratio(messages):
        return (messages.var(0).sum().sqrt() / messages.mean(0).norm()).item()

    assert ratio(sent) / ratio(gradients) == pytest.approx(math.sqrt((1 - factor) / (1 + factor)), rel=0.05)


def test_a_linear_rule_does_not_care_where_momentum_is():
    workers, server = [WorkerMomentum(0.9) for _ in range(5)], WorkerMomentum(0.9)
    for step in range(20):
        gradients = normal(5, 30, seed=step)
        there = mean(torch.stack([m(g) for m, g in zip(workers, gradients, strict=True)]))
        torch.testing.assert_close(there, server(mean(gradients)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("code", [RepetitionCode(9, 1), CyclicCode(9, 1)], ids=["repetition", "cyclic"])
def test_codes_give_the_same_with_momentum_at_workers_or_server(code):
    """Each worker has a momentum for each of its parts; one lies in every step, and both runs are the clean one."""
    d = 40
    workers, server, clean = [WorkerMomentum(0.9) for _ in range(9)], WorkerMomentum(0.9), WorkerMomentum(0.9)
    for step in range(12):
        parts = normal(code.parts, d, seed=step)
        plain = torch.stack([code.encode(j, parts[list(code.assignment(j))]) for j in range(9)])
        own = [torch.stack([workers[j](parts[k], key=k) for k in code.assignment(j)]) for j in range(9)]
        sent = torch.stack([code.encode(j, own[j]) for j in range(9)])
        plain[step % 9] *= -100
        sent[step % 9] *= -100
        there = decode(sent, code).raise_if_failed()
        here = server(decode(plain, code).raise_if_failed().gradient)
        expected = clean(parts.mean(0))
        assert there.suspects.nonzero().flatten().tolist() == [step % 9]
        torch.testing.assert_close(there.gradient, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(here, expected, rtol=1e-12, atol=1e-12)


def test_momentum_refuses_bad_arguments():
    with pytest.raises(ValueError, match=r"momentum must be from 0 to below 1, got 1\.0"):
        WorkerMomentum(1.0)
    with pytest.raises(ValueError, match="momentum"):
        WorkerMomentum(math.nan)
    with pytest.raises(TypeError, match="momentum must be a number, got str"):
        WorkerMomentum("0.9")
    momentum = WorkerMomentum(0.9)
    momentum(torch.zeros(3))
    with pytest.raises(ValueError, match=r"gradient must have the shape \(3,\) of the step before, got \(4,\)"):
        momentum(torch.zeros(4))
    with pytest.raises(TypeError, match="gradient must be a Tensor, got list"):
        momentum([1.0])
    with pytest.raises(TypeError, match="floating-point"):
        momentum(torch.zeros(3, dtype=torch.int64))


# ------------------------------------------------------------------------------------------------ PDMM


class Quadratics:
    """Losses (w - a_i)' H_i (w - a_i) / 2, whose Hessians have eigenvalues between `least` and `most`."""

    def __init__(self, clients=6, d=5, least=0.5, most=4.0):
        self.hessians, self.centres = [], normal(clients, d, seed=50)
        for i in range(clients):
            basis = torch.linalg.qr(normal(d, d, seed=i)).Q
            self.hessians.append(basis @ torch.diag(torch.linspace(least, most, d, dtype=torch.float64)) @ basis.T)
        self.optimum = torch.linalg.solve(
            sum(self.hessians), sum(h @ a for h, a in zip(self.hessians, self.centres, strict=True))
        )

    def gradient(self, i, w):
        return self.hessians[i] @ (w - self.centres[i])

    def solve(self, i, y, c):
        """The argmin of f_i(w) + c/2 |w - y|^2, in closed form."""
        eye = torch.eye(y.numel(), dtype=torch.float64)
        return torch.linalg.solve(self.hessians[i] + c * eye, self.hessians[i] @ self.centres[i] + c * y)


def rounds(clients, count):
    """Run PDMM; yield the server's model and what clients have received."""
    for _ in range(count):
        model, replies = pdmm_server(torch.stack([client.send() for client in clients]))
        for client, reply in zip(clients, replies, strict=True):
            client.receive(reply)
        yield model, replies


def test_pdmm_converges_linearly_to_the_consensus_optimum():
    """The distance of the vectors y from their limits shrinks by the factor of the theory in each round."""
    losses, least, most = Quadratics(), 0.5, 4.0
    c = math.sqrt(least * most)
    factor = (math.sqrt(most / least) - 1) / (math.sqrt(most / least) + 1)
    start = torch.zeros(5, dtype=torch.float64)
    clients = [PDMMClient(start, lambda y, i=i: losses.solve(i, y, c)) for i in range(6)]
    limit = torch.stack([losses.optimum + losses.gradient(i, losses.optimum) / c for i in range(6)])
    distance = (start - limit).norm().item()
    for model, received in rounds(clients, 40):  # noqa: B007
        now = (received - limit).norm().item()
        assert now <= factor * distance * (1 + 1e-9) + 1e-12
        distance = now
    torch.testing.assert_close(model, losses.optimum, rtol=1e-10, atol=1e-10)
    for client in clients:
        torch.testing.assert_close(client.model, losses.optimum, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 3])
def test_inexact_pdmm_converges_to_the_optimum_too(steps):
    losses, c = Quadratics(), 1.5
    start = torch.zeros(5, dtype=torch.float64)
    clients = []
    for i in range(6):

        def solve(y, i=i):
            gradient = lambda w: losses.gradient(i, w)  # noqa: E731
            return gradient_steps(gradient, y, clients[i].model, penalty=c, learning_rate=0.15, steps=steps)

        clients.append(PDMMClient(start, solve))
    *_, (model, _) = rounds(clients, 400)
    torch.testing.assert_close(model, losses.optimum, rtol=1e-8, atol=1e-8)


def test_pdmm_has_no_guarantee_against_one_bad_client():
    losses = Quadratics()
    clients = [
        PDMMClient(torch.zeros(5, dtype=torch.float64), lambda y, i=i: losses.solve(i, y, 1.0)) for i in range(6)
    ]
    messages = torch.stack([client.send() for client in clients])
    messages[0] = 1e6
    model, _ = pdmm_server(messages)
    assert (model - losses.optimum).norm() > 1e5


def test_pdmm_refuses_bad_arguments():
    with pytest.raises(TypeError, match="start must be a Tensor, got list"):
        PDMMClient([0.0], lambda y: y)
    with pytest.raises(TypeError, match="solve must be callable, got int"):
        PDMMClient(torch.zeros(2), 3)
    with pytest.raises(ValueError, match=r"vector must have shape \(2,\), got \(3,\)"):
        PDMMClient(torch.zeros(2), lambda y: y).receive(torch.zeros(3))
    with pytest.raises(ValueError, match="messages"):
        pdmm_server(torch.zeros(3))
    for name in ("penalty", "learning_rate"):
        settings = {"penalty": 1.0, "learning_rate": 1.0} | {name: 0.0}
        with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
            gradient_steps(lambda w: w, torch.zeros(2), torch.zeros(2), **settings)
    with pytest.raises(ValueError, match="steps"):
        gradient_steps(lambda w: w, torch.zeros(2), torch.zeros(2), penalty=1.0, learning_rate=1.0, steps=0)


# ------------------------------------------------------------------------------------------------ accumulated loss


def test_weights_are_inverse_to_accumulated_loss_and_worse_neighbours_get_none():
    weights = AccumulatedLoss(4, own=1, forgetting=1.0).weigh(torch.tensor([0.5, 1.0, 0.25, 1.5]))
    expected = torch.tensor([2.0, 1.0, 4.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(weights, expected / 7)


def test_losses_are_accumulated_with_forgetting():
    agent = AccumulatedLoss(2, own=0, forgetting=0.25, start=2.0)
    agent.weigh(torch.tensor([1.0, 4.0]))
    agent.weigh(torch.tensor([0.0, 8.0]))
    assert agent.accumulated.tolist() == [0.75 * (0.75 * 2 + 0.25), 0.75 * (0.75 * 2 + 1) + 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_neighbour_without_a_finite_loss_is_left_out_for_good(bad):
    agent = AccumulatedLoss(3, own=0)
    models = torch.tensor([[1.0], [3.0], [bad]])
    assert agent.combine(models, torch.tensor([0.5, 0.5, bad])).tolist() == [2.0]
    assert agent.combine(models, torch.tensor([0.5, 0.5, 0.0])).tolist() == [2.0]
    alone = AccumulatedLoss(2, own=1)
    assert alone.weigh(torch.tensor([0.1, bad])).tolist() == [0.0, 1.0]


def learn(cooperate, steps=300, batch=8):
    """Train ten agents, each for one of two linear targets; two of them send nonsense.

    Returns:
        The mean regret over steps and honest agents, and the last weights of agent 0.
    """
    agents, bad, d = 10, (3, 8), 4
    targets = torch.stack([normal(d, seed=70 + k // 5) for k in range(agents)])
    models = torch.zeros(agents, d, dtype=torch.float64)
    rules = [AccumulatedLoss(agents, own=k, forgetting=0.05) for k in range(agents)]
    honest = [k for k in range(agents) if k not in bad]
    regret, weights = 0.0, None
    for step in range(steps):
        inputs = normal(agents, batch, d, seed=1000 + step)
        outputs = (inputs * targets[:, None]).sum(2) + 0.5 * normal(agents, batch, seed=5000 + step)
        errors = (inputs * models[:, None]).sum(2) - outputs
        moved = models - 0.05 * (errors[:, :, None] * inputs).mean(1)
        moved[list(bad)] = 15.0
        if cooperate:
            # Of model l on the mini-batch of agent k: [l, k].
            losses = (torch.einsum("ld,kbd->lkb", moved, inputs) - outputs).square().mean(2)
            models = torch.stack([rules[k].combine(moved, losses[:, k]) for k in range(agents)])
        else:
            models = moved
        regret += (models - targets)[honest].square().sum(1).mean().item() / steps
    if cooperate:
        weights = rules[0].weigh(losses[:, 0])
    return regret, weights


def test_cooperation_is_no_worse_than_learning_alone_and_bad_neighbours_have_no_weight():
    """As the paper states: regret at most that without cooperation, with other tasks and bad agents as neighbours."""
    alone, _ = learn(cooperate=False)
    together, weights = learn(cooperate=True)
    assert together < 0.95 * alone
    assert weights[[3, 8]].tolist() == [0.0, 0.0]  # who sends nonsense
    assert weights[5:].tolist() == [0.0] * 5  # who has another task
    assert weights[0] > 0


def test_accumulated_loss_refuses_bad_arguments():
    with pytest.raises(ValueError, match="own must be from 0 to 2, got 3"):
        AccumulatedLoss(3, own=3)
    for forgetting in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"forgetting must be above 0 and at most 1"):
            AccumulatedLoss(3, own=0, forgetting=forgetting)
    with pytest.raises(ValueError, match="start must be above 0, got 0"):
        AccumulatedLoss(3, own=0, start=0.0)
    agent = AccumulatedLoss(3, own=0)
    with pytest.raises(ValueError, match="losses must have 3 entries, got 2"):
        agent.weigh(torch.zeros(2))
    with pytest.raises(ValueError, match="losses must be at least 0, got -1"):
        agent.weigh(torch.tensor([1.0, -1.0, 2.0]))
    with pytest.raises(ValueError, match=r"models must have 3 rows, got shape \(2, 4\)"):
        agent.combine(torch.zeros(2, 4), torch.ones(3))
    with pytest.raises(TypeError, match="losses must be a Tensor, got list"):
        agent.weigh([1.0, 2.0, 3.0])
