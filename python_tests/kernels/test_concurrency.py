"""Decoding from several threads, after a fork or a spawn, in a DataLoader's workers, and beside autograd."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import SEED, attacked, honest_messages

import draco_ext
from draco_ext import CyclicCode, RepetitionCode, ops

PATIENCE = 60  # seconds until something is taken to wait for ever
THREADS = 8
CODES = [RepetitionCode(9, 1), RepetitionCode(7, 3), RepetitionCode(10, 2), RepetitionCode(3, 1)]
CODES += [CyclicCode(9, 1), CyclicCode(7, 3), CyclicCode(10, 2), CyclicCode(8, 0)]
LENGTH = 3 * ops.TILE + 6  # so that each decode has work for several of torch's threads


def work(code, length=LENGTH):
    """Messages with as many bad workers as the code corrects."""
    generator = torch.Generator().manual_seed(SEED)
    messages = honest_messages(code, torch.randn(code.parts, length, generator=generator))
    return attacked(messages, range(code.adversaries), "gaussian", generator)


def answer(code, messages):
    """Everything that comes of one round: decoding, encoding, digest. The same bits for the same messages."""
    if isinstance(code, CyclicCode):
        decoded = ops.cyclic_decode(messages, code.adversaries, seed=1)
        encoded = code.encode(1, messages[: code.redundancy])
        projected = ops.cyclic_project(messages, 2)
        return *decoded, encoded, *projected
    out = draco_ext.decode(messages, code)
    digest, stats = ops.digest_and_stats(messages[0], 3)
    return out.gradient, out.suspects, out.failed, ops.digest(messages[0], 3), digest, stats


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_threads_do_not_disturb_each_other():
    inputs = [work(code) for code in CODES]
    alone = [answer(code, messages) for code, messages in zip(CODES, inputs, strict=True)]
    assert not any(out[2] for out in alone)
    start = threading.Barrier(THREADS)

    def thread(first):
        start.wait(PATIENCE)
        order = [(first + i) % len(CODES) for i in range(2 * len(CODES))]
        return [(i, answer(CODES[i], inputs[i])) for i in order]

    with ThreadPoolExecutor(THREADS) as pool:
        results = [result for thread_results in pool.map(thread, range(THREADS)) for result in thread_results]
    assert len(results) == 2 * THREADS * len(CODES)
    assert all(same(result, alone[i]) for i, result in results)


def test_threads_beside_backward():
    """The hooks of DistributedDataParallel decode while autograd runs."""
    code = CODES[4]
    messages = work(code)
    expected = answer(code, messages)
    torch.manual_seed(SEED)
    net = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.ReLU(), torch.nn.Linear(300, 300))
    x = torch.randn(64, 300)

    def gradients():
        return torch.autograd.grad(net(x).square().sum(), list(net.parameters()))

    wanted, stop, backwards = gradients(), threading.Event(), []

    def backward():
        while not stop.is_set() or not backwards:
            backwards.append(same(gradients(), wanted))

    thread = threading.Thread(target=backward)
    thread.start()
    try:
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(lambda _: answer(code, messages), range(12)))
    finally:
        stop.set()
        thread.join(PATIENCE)
    assert not thread.is_alive()
    assert all(same(result, expected) for result in results)
    assert all(backwards)


def decode_all(inputs, results):
    """In a child: the answers, as numpy arrays, since a forked child's torch must not be used for more than this."""
    results.put([[t.numpy() for t in answer(code, messages)] for code, messages in inputs])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_decode_after_the_parent_did(method):
    inputs = [(code, work(code)) for code in (CODES[1], CODES[5])]
    expected = [answer(code, messages) for code, messages in inputs]  # and torch's threads have been started
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    child = context.Process(target=decode_all, args=(inputs, results), daemon=True)
    child.start()
    try:
        assert results._reader.poll(PATIENCE), f"the {method}ed child gave no answer"
        answers = results.get()
        child.join(PATIENCE)
        assert child.exitcode == 0
    finally:
        child.kill()
    for given, wanted in zip(answers, expected, strict=True):
        assert same([torch.from_numpy(array) for array in given], wanted)


class Rounds(torch.utils.data.Dataset):
    """A data set that decodes what it gives out."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        code = CODES[index]
        out = draco_ext.decode(work(code), code).raise_if_failed()
        return out.gradient.double().sum(), out.suspects.sum()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_decode(method):
    expected = [Rounds()[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(
        Rounds(), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=PATIENCE
    )
    assert [tuple(map(float, item)) for item in loader] == [tuple(map(float, item)) for item in expected]


SMALL_STACK = 192 * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threads_with_small_stacks(dtype):
    """Nothing large lies on the stack: groups of hundreds of members, tolerances, columns that are no whole vectors."""
    votes = torch.randn(511, 20_003, dtype=torch.float64)[:1].repeat(1022, 1).to(dtype)
    rounds = torch.randn(9, 100_002, dtype=torch.float64).to(dtype)

    def everything():
        for atol in (0.0, 1e-3):
            yield ops.majority_vote(votes, [511, 511], 1, atol=atol)
            yield ops.majority_vote(votes[:, :3], [511, 511], 1, atol=atol)
            yield ops.majority_vote(votes[:9], [4, 5], 1, atol=atol)
        yield ops.vector_mean(list(votes[:9]))
        yield ops.digest(votes[0], 1)
        yield ops.digest(votes[0], [1, 2, 3])
        yield ops.digest_and_stats(votes[0], 1)
        yield ops.digest_stats_and_scale_(votes[0].clone(), 1, 0.5)
        sent = honest_messages(CyclicCode(9, 2), rounds)
        for bad in (0, 1, 2):
            sent[:bad, -5:] = 7
            yield ops.cyclic_decode(sent, 2, seed=1)
        yield ops.cyclic_combine(*[sent, torch.ones(9, dtype=torch.complex128)])

    results, before = [], threading.stack_size(SMALL_STACK)
    try:
        thread = threading.Thread(target=lambda: results.extend(everything()))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join(PATIENCE)
    expected = list(everything())
    assert len(results) == len(expected)
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else same(one, other)


@pytest.mark.parametrize("threads", [1, 2])
def test_flush_denormal_changes_nothing(threads, generator):
    """Kernels set the floating-point mode that they need, on every thread, and leave the caller's as it was."""
    code, repetition = CyclicCode(7, 2), RepetitionCode(6, 1)
    parts, sent, tiny = [], [], []
    for exponent in (-36, -38, -39, -40, -41):
        parts.append((torch.randn(7, LENGTH, generator=generator, dtype=torch.float64) * 10.0**exponent).float())
        sent.append(honest_messages(code, parts[-1]))
        sent.append(sent[-1].clone())
        sent[-1][3] *= 2
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        rows = torch.randn(2, LENGTH, generator=generator).repeat_interleave(3, 0).to(dtype)
        tiny.append(rows * torch.finfo(dtype).smallest_normal / 4)

    def everything():
        for gradients in parts:
            yield honest_messages(code, gradients)
        for messages in sent:
            out = ops.cyclic_decode(messages, 2, seed=1)
            yield from (*out, *ops.cyclic_project(messages, 1))
        for rows in tiny:
            yield draco_ext.decode(rows, repetition).gradient
            yield draco_ext.decode(rows, repetition, atol=1e-30).gradient
            yield from ops.digest_and_stats(rows[0], 1)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        wanted = list(everything())
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush denormal numbers")
        got = list(everything())
        half = torch.tensor([torch.finfo(torch.float32).smallest_normal]) / 2
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert not any(out.any() for out in wanted[len(parts) + 1 : len(parts) + 60 : 12])  # clean rounds name nobody
    assert half.item() == 0, "the caller's own mode was changed"
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", ops.VOTE_DTYPES, ids=str)
def test_statistics_do_not_depend_on_threads(dtype):
    generator = torch.Generator().manual_seed(SEED)
    values = torch.randn(21 * ops.TILE + 17, generator=generator, dtype=torch.float64).to(dtype)
    values[3::1000] = torch.inf
    results, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(ops.digest_and_stats(values, 3))
    finally:
        torch.set_num_threads(before)
    assert results[0][1].shape == (22, 4)
    assert all(same(result, results[0]) for result in results[1:])
