"""Bad input, one by one: the right exception, naming the argument, what came and what was expected."""

import pytest
import torch

import draco_ext
from draco_ext import CyclicCode, RepetitionCode, decode, ops

R, C = RepetitionCode(6, 1), CyclicCode(7, 2)
GOOD = {R: torch.zeros(6, 8), C: torch.zeros(7, 8)}
CODES = [pytest.param(R, id="repetition"), pytest.param(C, id="cyclic")]


@pytest.mark.parametrize(
    "call", [lambda seed: ops.digest(torch.ones(3), seed), lambda seed: ops.cyclic_project(torch.ones(3, 4), seed)]
)
def test_seeds_in_a_tensor(call):
    with pytest.raises(TypeError, match="seed must have dtype int64, got float32"):
        call(torch.ones(1))
    with pytest.raises(ValueError, match="seed must have 1 dimension"):
        call(torch.ones(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="seed must be contiguous"):
        call(torch.ones(4, dtype=torch.int64)[::2])
    with pytest.raises(ValueError, match="seed must have 1 element"):
        ops.cyclic_project(torch.ones(3, 4), torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize("make", [RepetitionCode, CyclicCode])
@pytest.mark.parametrize(
    ("workers", "adversaries", "error", "message"),
    [
        (2, 1, ValueError, r"workers must be at least 2 \* adversaries \+ 1 = 3, got 2"),
        (3, -1, ValueError, "adversaries must be at least 0, got -1"),
        (0, 0, ValueError, "workers must be from 1 to 32767, got 0"),
        (40000, 1, ValueError, "workers must be from 1 to 32767, got 40000"),
        (3.0, 1, TypeError, "workers must be an int, got float"),
        (3, "1", TypeError, "adversaries must be an int, got str"),
        (True, 0, TypeError, "workers must be an int, got bool"),
    ],
)
def test_codes(make, workers, adversaries, error, message):
    with pytest.raises(error, match=message):
        make(workers, adversaries)


def test_groups_that_are_too_large():
    with pytest.raises(ValueError, match=r"groups of at most 511, got 600"):
        RepetitionCode(600, 200)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("worker", "error"), [(-1, ValueError), (7, ValueError), (1.5, TypeError), (None, TypeError)])
def test_worker(code, worker, error):
    with pytest.raises(error, match="worker must be"):
        code.assignment(worker)
    with pytest.raises(error, match="worker must be"):
        code.encode(worker, torch.zeros(len(code.assignment(0)), 4))


@pytest.mark.parametrize("code", CODES)
def test_message_length(code):
    assert code.message_length(0) == 0
    for d, error in [(-1, ValueError), (2.0, TypeError)]:
        with pytest.raises(error, match="d must be"):
            code.message_length(d)


@pytest.mark.parametrize("code", CODES)
def test_gradients(code):
    rows = len(code.assignment(0))
    with pytest.raises(ValueError, match=f"gradients must have .*{rows} row.*got {rows + 1}"):
        code.encode(0, torch.zeros(rows + 1, 4))
    with pytest.raises(ValueError, match=r"gradients must have 2 dimension\(s\), got shape \(4,\)"):
        code.encode(0, torch.zeros(4))
    with pytest.raises(TypeError, match="gradients must be a Tensor, got list"):
        code.encode(0, [[1.0]])
    with pytest.raises(TypeError, match=r"gradients must have dtype .*, got int64"):
        code.encode(0, torch.zeros(rows, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="gradients must have contiguous rows"):
        code.encode(0, torch.zeros(4, rows + 1).T[:rows])
    with pytest.raises(ValueError, match="gradients must not require grad"):
        code.encode(0, torch.zeros(rows, 4, requires_grad=True))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda m: m[:-1],
            ValueError,
            r"messages must have a row for each of the \d workers, got shape",
        ),
        (lambda m: m[:0], ValueError, "messages must have a row for each"),
        (lambda m: m[0], ValueError, r"messages must have 2 dimension\(s\), got shape \(8,\)"),
        (lambda m: m[None], ValueError, r"messages must have 2 dimension\(s\)"),
        (lambda m: m.tolist(), TypeError, "messages must be a Tensor, got list"),
        (lambda m: None, TypeError, "messages must be a Tensor, got NoneType"),
        (lambda m: m.int(), TypeError, "messages must have dtype float32, float64.*, got int32"),
        (lambda m: m.bool(), TypeError, "messages must have dtype .*, got bool"),
        (lambda m: m.to(torch.complex64), TypeError, "messages must have dtype .*, got complex64"),
        (
            lambda m: m.requires_grad_(),
            ValueError,
            "messages must not require grad .*: detach it first",
        ),
        (
            lambda m: m.T.contiguous().T,
            ValueError,
            r"messages must have contiguous rows .*got strides \(1, \d\)",
        ),
        (
            lambda m: m.to("meta"),
            ValueError,
            "messages must be on the CPU or a CUDA device, got meta",
        ),
        (
            lambda m: m.to_sparse(),
            ValueError,
            "messages must be a dense tensor, got layout torch.sparse_coo",
        ),
    ],
)
def test_messages(code, spoil, error, message):
    with pytest.raises(error, match=message):
        decode(spoil(GOOD[code].clone()), code)


def test_half_is_for_the_repetition_code():
    for dtype in (torch.float16, torch.bfloat16):
        assert not decode(GOOD[R].to(dtype), R).failed
        with pytest.raises(TypeError, match="messages must have dtype float32, float64, got"):
            decode(GOOD[C].to(dtype), C)


def test_odd_cyclic_messages():
    with pytest.raises(ValueError, match=r"messages must have an even number of columns .*, got 7"):
        decode(torch.zeros(7, 7), C)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("name", ["missing", "expected"])
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(5, dtype=torch.bool), ValueError, "must have [67] entries, got 5"),
        (torch.zeros(7), TypeError, "must have dtype bool, got float32"),
        (torch.zeros(7, 1, dtype=torch.bool), ValueError, r"must have 1 dimension\(s\)"),
        ([False] * 7, TypeError, "must be a Tensor, got list"),
        (torch.zeros(7, dtype=torch.bool, device="meta"), ValueError, "must be on cpu, got meta"),
    ],
)
def test_masks(code, name, mask, error, message):
    with pytest.raises(error, match=f"{name} {message}"):
        decode(GOOD[code], code, **{name: mask})


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("name", ["atol", "rtol"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1e-9, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("1", TypeError),
        (None, TypeError),
    ],
)
def test_tolerances(code, name, value, error):
    with pytest.raises(error, match=f"{name} must be"):
        decode(GOOD[code], code, **{name: value})


def test_reduction_and_code():
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'max'"):
        decode(GOOD[R], R, reduction="max")
    with pytest.raises(TypeError, match="code must be a RepetitionCode, CyclicCode or SolonCode, got str"):
        decode(GOOD[R], "repetition")


@pytest.mark.parametrize(
    ("code", "length", "error"),
    [
        (R, 7, ValueError),
        (R, 9, ValueError),
        (C, 6, ValueError),
        (C, 9, ValueError),
        (C, -1, ValueError),
        (C, 7.0, TypeError),
        (R, "8", TypeError),
    ],
)
def test_length(code, length, error):
    with pytest.raises(error, match="length must be"):
        decode(GOOD[code], code, length=length)


def test_seeds_have_64_bits():
    x = torch.zeros(3, 8)
    for function in (
        lambda seed: ops.digest(x[0], seed),
        lambda seed: ops.digest_and_stats(x[0], seed),
        lambda seed: ops.digest_stats_and_scale_(x[0], seed, 1),
        lambda seed: ops.cyclic_project(x, seed),
        lambda seed: ops.cyclic_decode(x, 1, seed=seed),
    ):
        for seed in (-(2**63), 2**63 - 1):
            function(seed)
        for seed in (-(2**63) - 1, 2**63):
            with pytest.raises(ValueError, match="seed must be from -9223372036854775808 to 9223372036854775807, got"):
                function(seed)


def test_sequences_of_seeds():
    values = torch.zeros(8)
    assert ops.digest(values, []).shape == (0, 2)
    assert torch.equal(ops.digest(values, seed=(3,))[0], ops.digest(values, seed=3))
    with pytest.raises(ValueError, match=r"seed\[1\] must be from -9223372036854775808 to .*, got 9223372036854775808"):
        ops.digest(values, [0, 2**63])
    with pytest.raises(TypeError, match=r"seed\[0\] must be an int, got float"):
        ops.digest(values, [1.0])
    with pytest.raises(TypeError, match="seed must be an int, got NoneType"):
        ops.digest(values, None)


def test_vectors_are_alike():
    x = torch.zeros(2, 8)
    for vectors, error, message in (
        (x, TypeError, "vectors must be a tuple or list of Tensors, got Tensor"),
        ([], ValueError, "vectors must be from 1 to 32767, got 0"),
        ([x[0], 3], TypeError, r"vectors\[1\] must be a Tensor, got int"),
        ([x[0], x[1].double()], TypeError, r"vectors\[1\] must have dtype float32, got float64"),
        ([x[0], x[1, :7]], ValueError, r"vectors\[1\] must have 8 elements as vectors\[0\], got 7"),
        ([x[0], x], ValueError, r"vectors\[1\] must have 1 dimension"),
        ([x[:, 0], x[:, 1]], ValueError, r"vectors\[0\] must be contiguous"),
        ([x[0].int()], TypeError, r"vectors\[0\] must have dtype .*, got int32"),
    ):
        with pytest.raises(error, match=message):
            ops.vector_mean(vectors)
    buffer = torch.zeros(12)
    with pytest.raises(ValueError, match=r"out must not share memory with vectors\[1\]"):
        ops.vector_mean([torch.zeros(8), buffer[1:9]], out=buffer[:8])
    with pytest.raises(ValueError, match="out must have 8 elements"):
        ops.vector_mean([x[0]], out=torch.zeros(9))


def test_factor_is_a_number():
    values = torch.ones(8)
    for bad in ("1", None, True, values):
        with pytest.raises(TypeError, match=f"factor must be a number, got {type(bad).__name__}"):
            ops.digest_stats_and_scale_(values, 1, bad)
    assert torch.equal(values, torch.ones(8))


def test_tiles_of_a_length():
    """Also of an odd one, which a message does not have but a gradient does."""
    for length in (0, 1, 2, ops.TILE - 1, ops.TILE, ops.TILE + 1, 2 * ops.TILE, 2 * ops.TILE + 1):
        assert ops.projections_shape(length)[0] == -(-length // ops.TILE), length


def test_length_that_fits():
    assert decode(GOOD[C], C, length=7).gradient.shape == (7,)
    assert decode(GOOD[C], C, length=8).gradient.shape == (8,)
    assert decode(GOOD[R], R, length=8).gradient.shape == (8,)


@pytest.mark.parametrize("code", CODES)
def test_empty_gradient(code):
    out = decode(GOOD[code][:, :0], code)
    assert out.gradient.shape == (0,)
    assert not out.failed
    assert not out.suspects.any()
    assert code.encode(0, torch.zeros(len(code.assignment(0)), 0)).shape == (0,)


def test_nothing_is_changed_before_the_error():
    message, carry, gradient = torch.ones(8), torch.ones(8), torch.ones(8)
    for bad in ({"part": 3}, {"part": 99}, {"worker": -1}):
        args = {"workers": 7, "adversaries": 1, "worker": 0, "part": 0, **bad}
        with pytest.raises(ValueError, match=next(iter(bad))):
            ops.cyclic_encode_add_(message, carry, gradient, **args)
    assert torch.equal(message, torch.ones(8))
    assert torch.equal(carry, torch.ones(8))
    with pytest.raises(ValueError, match="message must have 6 elements, got 8"):
        ops.cyclic_encode_add_(message, carry, torch.ones(5), 7, 1, 0, 0)
    with pytest.raises(ValueError, match="carry must have 8 elements, got 6"):
        ops.cyclic_encode_add_(message, torch.ones(6), gradient, 7, 1, 0, 0)
    with pytest.raises(TypeError, match="carry must have dtype float32, got float64"):
        ops.cyclic_encode_add_(message, carry.double(), gradient, 7, 1, 0, 0)
    with pytest.raises(TypeError, match="gradient must have dtype float32, got float64"):
        ops.cyclic_encode_add_(message, carry, gradient.double(), 7, 1, 0, 0)
    with pytest.raises(ValueError, match="message must be contiguous"):
        ops.cyclic_encode_add_(torch.ones(16)[::2], carry, gradient, 7, 1, 0, 0)


def test_group_sizes():
    with pytest.raises(ValueError, match="group_sizes must add up to the 6 messages, got 5"):
        ops.majority_vote(GOOD[R], (5,), 1)
    with pytest.raises(ValueError, match="group_sizes must be from 3 to 511, got 2"):
        ops.majority_vote(GOOD[R], (2, 4), 1)
    with pytest.raises(TypeError, match="group_sizes must be an int, got float"):
        ops.majority_vote(GOOD[R], (3.0, 3), 1)


def test_locate_and_combine_arguments():
    projections, norms = ops.cyclic_project(GOOD[C], 0)
    with pytest.raises(ValueError, match="projections must be contiguous, of shape"):
        ops.cyclic_locate(projections, norms, 2, 100_000)
    with pytest.raises(ValueError, match="norms must be contiguous, of shape"):
        ops.cyclic_locate(projections, norms[:, :0], 2, 8)
    with pytest.raises(TypeError, match="dtype must be"):
        ops.cyclic_locate(projections, norms, 2, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="weights must be contiguous with 7 entries, got 3"):
        ops.cyclic_combine(GOOD[C], torch.zeros(3, dtype=torch.complex128))
    with pytest.raises(TypeError, match="weights must have dtype complex128, got float32"):
        ops.cyclic_combine(GOOD[C], torch.zeros(7))
    with pytest.raises(ValueError, match="seed must be from"):
        ops.cyclic_project(GOOD[C], 2**63)


def test_the_ops_themselves_keep_memory_safe():
    """Called around the Python checks they still refuse what would read out of bounds."""
    raw = torch.ops.draco_ext
    bad_calls = [
        lambda: raw.majority_vote(GOOD[R], None, [3, 4], 1, 0.0, 0.0, True),
        lambda: raw.majority_vote(GOOD[R].T, None, [4, 4], 1, 0.0, 0.0, True),
        lambda: raw.majority_vote(GOOD[R], torch.zeros(2, dtype=torch.bool), [3, 3], 1, 0.0, 0.0, True),
        lambda: raw.cyclic_decode(torch.zeros(7, 7), None, None, 2, 7, 0.0, 0.0, True, None),
        lambda: raw.cyclic_decode(GOOD[C], None, None, 4, 8, 0.0, 0.0, True, None),
        lambda: raw.cyclic_decode(GOOD[C], None, None, 2, 9, 0.0, 0.0, True, None),
        lambda: raw.cyclic_encode(torch.zeros(4, 8), 7, 2, 0),
        lambda: raw.cyclic_encode(torch.zeros(5, 8), 7, 2, 7),
        lambda: raw.cyclic_encode_add_(torch.zeros(7), torch.zeros(8), torch.zeros(8), 7, 2, 0, 0),
        lambda: raw.cyclic_encode_add_(torch.zeros(8), torch.zeros(7), torch.zeros(8), 7, 2, 0, 0),
        lambda: raw.cyclic_encode_add_(torch.zeros(8), torch.zeros(8).double(), torch.zeros(8), 7, 2, 0, 0),
        lambda: raw.majority_vote(torch.zeros(32768, 1), None, [512] * 64, 1, 0.0, 0.0, True),
        lambda: raw.majority_vote(torch.zeros(49056, 1), None, [511] * 96, 1, 0.0, 0.0, True),
        lambda: raw.cyclic_project(torch.zeros(3, 5), None, 0),
        lambda: raw.cyclic_combine(GOOD[C], torch.zeros(3, dtype=torch.complex128), 8),
        lambda: raw.cyclic_locate(
            torch.zeros(7, 2, 4, dtype=torch.complex128), torch.zeros(7, 2, dtype=torch.float64), None, 2, 8, False,
            0.0, 0.0, True,
        ),
    ]  # fmt: skip
    for call in bad_calls:
        with pytest.raises(RuntimeError):
            call()


def test_public_names():
    for name in draco_ext.__all__:
        assert getattr(draco_ext, name).__doc__


@pytest.mark.parametrize("value", [None, 1, "yes", torch.tensor(True)])
def test_mean(value):
    projections, norms = ops.cyclic_project(GOOD[C], 0)
    for call in (
        lambda: ops.majority_vote(GOOD[R], (3, 3), 1, mean=value),
        lambda: ops.cyclic_locate(projections, norms, 2, 8, mean=value),
        lambda: ops.cyclic_decode(GOOD[C], 2, mean=value),
    ):
        with pytest.raises(TypeError, match="mean must be a bool, got"):
            call()


def test_what_fuzzing_found():
    with pytest.raises(ValueError, match="atol must be finite and at least 0"):
        decode(GOOD[R], R, atol=10**400)
    assert not decode(GOOD[C], C, rtol=10**99).failed
    with pytest.raises(TypeError, match="group_sizes must be a tuple or list of ints, got int"):
        ops.majority_vote(GOOD[R], 6, 1)
    with pytest.raises(TypeError, match="group_sizes must be a tuple or list of ints, got generator"):
        ops.majority_vote(GOOD[R], (size for size in (3, 3)), 1)
    with pytest.raises(ValueError, match="messages must be a dense tensor, got a nested tensor"):
        decode(torch.nested.nested_tensor([torch.zeros(8)] * 6), R)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum'"):
        decode(GOOD[R], R, reduction=torch.zeros(2))
    with pytest.raises(ValueError, match="messages' rows must be at least 2 \\* adversaries \\+ 1 = 9, got 7"):
        ops.cyclic_decode(GOOD[C], 4)
    with pytest.raises(TypeError, match="length must be an int, got str"):
        ops.projections_shape("8")
    projections, norms = ops.cyclic_project(GOOD[C], 0)
    with pytest.raises(TypeError, match="dtype must be float32, float64"):
        ops.cyclic_locate(projections, norms, 2, 8, dtype=projections.numpy())


@pytest.mark.parametrize("first", [0, 1, 7])
@pytest.mark.parametrize(("inner", "outer"), [("gradient", "message"), ("carry", "message"), ("gradient", "carry")])
def test_what_is_encoded_lies_apart(inner, outer, first):
    memory = torch.ones(40)
    apart = {name: memory[at : at + 8] for name, at in (("message", 0), ("carry", 16), ("gradient", 32))}
    at = apart[outer].storage_offset() + first
    with pytest.raises(ValueError, match=f"{inner} must not share memory with {outer}"):
        ops.cyclic_encode_add_(**{**apart, inner: memory[at : at + 8]}, workers=7, adversaries=1, worker=0, part=0)
    ops.cyclic_encode_add_(memory[8:16], memory[16:24], memory[:8], 7, 1, 0, 0)
    ops.cyclic_encode_add_(memory[16:24], memory[8:16], memory[24:32], 7, 1, 0, 0)
    assert (memory[:8] == 1).all()
    assert (memory[24:] == 1).all()


@pytest.mark.parametrize("name", ["message", "carry"])
def test_negated(name):
    negated = torch.zeros(0, dtype=torch.complex64).conj().imag
    vectors = {"message": torch.zeros(0), "carry": torch.zeros(0), name: negated}
    with pytest.raises(ValueError, match=f"{name} must not be a negated view"):
        ops.cyclic_encode_add_(**vectors, gradient=torch.zeros(0), workers=7, adversaries=1, worker=0, part=0)


def test_the_ops_themselves_cannot_overflow():
    raw, huge = torch.ops.draco_ext, 2**62 + 3  # twice that is 6, where it wraps around
    projections, norms = ops.cyclic_project(GOOD[C][:, :0], 0)
    for call in (
        lambda: raw.majority_vote(GOOD[R], None, [3, 3], huge, 0.0, 0.0, True),
        lambda: raw.cyclic_decode(GOOD[C], None, None, huge, 8, 0.0, 0.0, True, None),
        lambda: raw.cyclic_encode(torch.zeros(7, 8), 7, huge, 0),
        lambda: raw.cyclic_encode(torch.zeros(5, 8), 7, 2, -(2**63)),
        lambda: raw.cyclic_locate(projections, norms, None, 2, 2**63 - 1, False, 0.0, 0.0, True),
    ):
        with pytest.raises(RuntimeError):
            call()


@pytest.mark.parametrize("code", CODES)
def test_masks_of_other_bytes(code):
    """True is any byte but 0: a mask may be a view of uint8."""
    for byte in (1, 2, 255):
        mask = torch.tensor([0, byte, 0, 0, 0, 0, 0][: code.workers], dtype=torch.uint8).view(torch.bool)
        out = decode(GOOD[code], code, missing=mask)
        assert not out.failed
        assert not out.suspects.any()
