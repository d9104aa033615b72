"""`out=`: the same bits, written into a vector that is given, and into nothing else."""

import functools

import pytest
import torch
from conftest import attacked, erasure_cases, honest_messages, named

import draco_ext
from draco_ext import CyclicCode, RepetitionCode, ops

TILE = ops.TILE
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Around the kernels' own units (vectors, chunks, pieces, tiles), an early end of the search included.
LENGTHS = (0, 1, 2, 15, 64, 1023, 1024, 8193, TILE - 1, 2 * TILE, 17 * TILE + 5)


def bits(x):
    return x.view(BITS[x.element_size()])


class Frame:
    """A vector for a result, with guards on both sides; `offset` elements after memory that is aligned."""

    def __init__(self, length, dtype, device, offset=0):
        self.memory = torch.full((length + 128,), 7.0, dtype=dtype, device=device)
        self.out = self.memory[64 + offset : 64 + offset + length]
        self.out.fill_(torch.nan)

    def guards_hold(self):
        begin = self.out.storage_offset()
        rest = torch.cat([self.memory[:begin], self.memory[begin + len(self.out) :]])
        return bool((rest == 7).all())


def check(function, *arguments, length, frame_at=0, **options):
    """Return what the function returns, after it has returned the same with `out=`."""
    like = arguments[0]
    frame = Frame(length, like.dtype, like.device, frame_at)
    plain, with_out = function(*arguments, **options), function(*arguments, **options, out=frame.out)
    if isinstance(plain, torch.Tensor):
        plain, with_out = (plain,), (with_out,)
    assert with_out[0] is frame.out
    assert torch.equal(bits(with_out[0]), bits(plain[0]))
    assert frame.guards_hold()
    assert all(torch.equal(a, b) for a, b in zip(plain[1:], with_out[1:], strict=True))
    return plain


def lengths(simt):
    return [d for d in LENGTHS if d < 10_000] if simt else LENGTHS


@pytest.mark.parametrize("dtype", ops.VOTE_DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(3,), (4, 3), (5, 5, 6)], ids=str)
def test_vote(dtype, sizes, device, simt, generator):
    for i, d in enumerate(lengths(simt)):
        rows = torch.randn(len(sizes), d, generator=generator).to(dtype)
        messages = rows.repeat_interleave(torch.tensor(sizes), 0)
        messages[1] = -messages[1]
        messages = messages.to(device)
        for offset, options in ((0, {}), (i % 7, {"mean": False}), (1, {"atol": 1e-3})):
            check(ops.majority_vote, messages, sizes, 1, length=d, frame_at=offset, **options)


@pytest.mark.parametrize("dtype", ops.CYCLIC_DTYPES, ids=str)
def test_cyclic(dtype, device, simt, generator):
    code = CyclicCode(7, 2)
    for i, d in enumerate(lengths(simt)):
        gradients = torch.randn(7, d, generator=generator, dtype=dtype)
        messages = honest_messages(code, gradients)
        length, offset = messages.size(1), i % 5
        check(ops.cyclic_encode, gradients[:5].to(device), 7, 2, 3, length=length, frame_at=offset)
        weights = torch.randn(7, dtype=torch.complex128, generator=generator).to(device)
        for bad in ((), (0, 4)):
            sent = attacked(messages, bad, "gaussian", generator).to(device)
            for size in {d, length}:
                frame = {"frame_at": offset, "length": size}
                _, suspects, failed, _ = check(
                    functools.partial(ops.cyclic_decode, length=size), sent, 2, seed=5, **frame
                )
                assert named(suspects) == (set(bad) if d > 0 else set())
                assert not failed
                check(functools.partial(ops.cyclic_combine, length=size), sent, weights, **frame)


def test_many_parts(device, generator):
    """More than the CUDA kernel encodes at once."""
    gradients = torch.randn(99, 37, generator=generator).to(device)
    check(ops.cyclic_encode, gradients, 120, 49, 3, length=38, frame_at=1)


@pytest.mark.parametrize("code", [RepetitionCode(5, 2), RepetitionCode(7, 1), CyclicCode(5, 2)], ids=repr)
def test_every_set_of_missing_workers(code, device, simt, generator):
    """NaN everywhere where decoding fails, and the same gradient where it does not."""
    messages = honest_messages(code, torch.randn(code.parts, 21, generator=generator))
    if code.message_is_gradient:
        messages = messages[:, :21].contiguous()
    failures = 0
    for i, (_, _, mask, sent) in enumerate(erasure_cases(code, messages, generator)):
        if simt and i % 7:
            continue
        mask, sent = mask.to(device), sent.to(device)
        plain = code.decode(sent, missing=mask, length=21, seed=3)
        frame = Frame(21, torch.float32, device, i % 3)
        out = code.decode(sent, missing=mask, length=21, seed=3, out=frame.out)
        assert out.gradient is frame.out
        assert torch.equal(bits(out.gradient), bits(plain.gradient))
        assert torch.equal(out.suspects, plain.suspects)
        assert bool(out.failed) == bool(plain.failed)
        assert not out.failed or out.gradient.isnan().all()
        assert frame.guards_hold()
        failures += bool(out.failed)
    assert failures > 0


def test_overflow(device, generator):
    """More non-finite messages than can be put right."""
    code = CyclicCode(5, 1)
    sent = attacked(honest_messages(code, torch.randn(5, 40, generator=generator)), (0, 2), "one-nan", generator)
    frame = Frame(39, torch.float32, device, 1)
    out = draco_ext.decode(sent.to(device), code, length=39, out=frame.out)
    assert frame.out.isnan().all()
    assert frame.guards_hold()
    assert not out.failed


@pytest.mark.parametrize("code", [RepetitionCode(6, 1), CyclicCode(6, 1)], ids=repr)
def test_public_functions(code, device, generator):
    gradients = torch.randn(code.parts, 31, generator=generator).to(device)
    messages = torch.full((6, code.message_length(31)), torch.nan, device=device)
    for j in range(6):  # into the rows of one matrix, as a server would
        message = code.encode(j, gradients[list(code.assignment(j))], out=messages[j])
        assert message.data_ptr() == messages[j].data_ptr()
        assert torch.equal(message, code.encode(j, gradients[list(code.assignment(j))]))
    gradient = torch.full((31,), torch.nan, device=device)
    for reduction, right in (("mean", gradients.mean(0)), ("sum", gradients.sum(0))):
        out = draco_ext.decode(messages, code, reduction=reduction, length=31, out=gradient)
        assert out.gradient is gradient
        assert out.raise_if_failed() is out
        torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-5)


def test_combine_in_shares(device, generator):
    code = CyclicCode(5, 1)
    messages = honest_messages(code, torch.randn(5, 40, generator=generator)).to(device)
    weights = torch.full((5,), 0.2, dtype=torch.complex128, device=device)
    total = torch.zeros(40, device=device)
    for j in range(5):
        total += code.combine(messages[j, None], weights[j, None], out=torch.empty(40, device=device))
    torch.testing.assert_close(total, code.decode(messages).gradient)


# ------------------------------------------------------------------------------------------------ what torch does


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked, real_device):
    code, d = CyclicCode(7, 2), 50
    messages = honest_messages(code, torch.randn(7, d)).to(real_device)
    mask = torch.tensor([True] + [False] * 6, device=real_device) if masked else None
    weights = torch.randn(7, dtype=torch.complex128, device=real_device)
    out, odd = (torch.empty(length, device=real_device) for length in (d, d - 1))
    op, check = torch.ops.draco_ext, torch.library.opcheck
    check(op.majority_vote_out.default, (messages, mask, [7], 2, 0.0, 0.0, True, out))
    check(op.cyclic_encode_out.default, (torch.randn(5, d, device=real_device), 7, 2, 1, out))
    for result in (out, odd):
        check(op.cyclic_combine_out.default, (messages, weights, result))
        check(op.cyclic_decode_out.default, (messages, mask, mask, 2, 0.0, 0.0, True, 3, result))


@pytest.mark.parametrize("code", [RepetitionCode(6, 1), CyclicCode(7, 2)], ids=repr)
def test_compiled(code, real_device, generator):
    """The graph writes into the caller's vector."""
    messages = honest_messages(code, torch.randn(code.parts, 300, generator=generator)).to(real_device)

    def step(messages, gradient):
        out = draco_ext.decode(messages, code, out=gradient)
        return out.suspects, gradient * 2

    gradient = torch.zeros(300, device=real_device)
    suspects, double = torch.compile(step, fullgraph=True)(messages, gradient)
    right = draco_ext.decode(messages, code).gradient
    torch.testing.assert_close(gradient, right, rtol=0, atol=1e-6)
    torch.testing.assert_close(double, 2 * right, rtol=0, atol=2e-6)
    assert not suspects.any()


# ------------------------------------------------------------------------------------------------ bad arguments

MESSAGES = torch.arange(9 * 50.0).view(9, 50)
WEIGHTS = torch.ones(9, dtype=torch.complex128)
CALLS = {
    "majority_vote": lambda out: ops.majority_vote(MESSAGES, (9,), 1, out=out),
    "cyclic_encode": lambda out: ops.cyclic_encode(MESSAGES, 9, 4, 0, out=out),
    "cyclic_combine": lambda out: ops.cyclic_combine(MESSAGES, WEIGHTS, out=out),
    "cyclic_decode": lambda out: ops.cyclic_decode(MESSAGES, 2, out=out),
    "encode, repetition": lambda out: RepetitionCode(9, 4).encode(0, MESSAGES[:1], out=out),
    "decode, repetition": lambda out: draco_ext.decode(MESSAGES, RepetitionCode(9, 4), out=out),
    "decode, cyclic": lambda out: draco_ext.decode(MESSAGES, CyclicCode(9, 4), out=out),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: [0.0] * 50, TypeError, "out must be a Tensor, got list"),
        (lambda: torch.zeros(50, dtype=torch.float64), TypeError, "out must have dtype float32, got float64"),
        (lambda: torch.zeros(1, 50), ValueError, r"out must have 1 dimension\(s\), got shape \(1, 50\)"),
        (lambda: torch.zeros(49), ValueError, "out must have 50 elements, got 49"),
        (lambda: torch.zeros(51), ValueError, "out must have 50 elements, got 51"),
        (lambda: torch.zeros(100)[::2], ValueError, "out must be contiguous, got stride 2"),
        (lambda: torch.zeros(50, device="meta"), ValueError, "out must be on cpu, got meta"),
        (lambda: torch.zeros(50, requires_grad=True), ValueError, "out must not require grad"),
        (lambda: torch.zeros(50).to_sparse(), ValueError, "out must be a dense tensor"),
        (lambda: torch._neg_view(torch.zeros(50)), ValueError, "out must not be a negated view"),
        (lambda: MESSAGES[0], ValueError, "out must not share memory with (messages|gradients)"),
        (lambda: MESSAGES.view(-1)[25:75], ValueError, "out must not share memory with (messages|gradients)"),
    ],
)
def test_bad_out(call, make, error, message):
    before = MESSAGES.clone()
    with pytest.raises(error, match=message):
        call(make())
    assert torch.equal(MESSAGES, before)  # also where out is a part of it


def test_sharing_memory():
    """Everything between the rows and around them may be written; what touches a row may not: all places, by hand."""
    rows, width, stride, begin, d = 3, 4, 11, 13, 4
    memory = torch.zeros(60)
    messages = memory.as_strided((rows, width), (stride, 1), begin)
    taken = {begin + j * stride + c for j in range(rows) for c in range(width)}
    for at in range(60 - d):
        out = memory[at : at + d]
        if taken & set(range(at, at + d)):
            with pytest.raises(ValueError, match="out must not share memory with messages"):
                ops.majority_vote(messages, (3,), 1, out=out)
        else:
            ops.majority_vote(messages, (3,), 1, out=out)
    same = memory[:4].expand(3, 4)
    with pytest.raises(ValueError, match="share memory"):
        ops.majority_vote(same, (3,), 1, out=memory[2:6])
    ops.majority_vote(same, (3,), 1, out=memory[4:8])
    ops.majority_vote(memory[:4].view(1, 4), (1,), 0, out=memory[8:12])


def test_raw_ops_keep_memory_safe(device):
    """Whoever calls torch.ops alone: worded errors, and nothing written."""
    raw = torch.ops.draco_ext
    messages, weights = MESSAGES.to(device), WEIGHTS.to(device)
    calls = {
        "majority_vote": lambda out: raw.majority_vote_out(messages, None, [9], 1, 0.0, 0.0, True, out),
        "cyclic_encode": lambda out: raw.cyclic_encode_out(messages, 9, 4, 0, out),
        "cyclic_combine": lambda out: raw.cyclic_combine_out(messages, weights, out),
        "cyclic_decode": lambda out: raw.cyclic_decode_out(messages, None, None, 2, 0.0, 0.0, True, 1, out),
    }
    for name, call in calls.items():
        for out in (torch.zeros(52), torch.zeros(100)[::2], torch.zeros(50, dtype=torch.float64), torch.zeros(5, 10)):
            out = out.to(device)
            with pytest.raises(RuntimeError, match=f"{name}: (out|length) must be"):
                call(out)
            assert not out.any()
    for name in ("cyclic_combine", "cyclic_decode"):  # a beginning of the result
        frame = Frame(7, torch.float32, device)
        calls[name](frame.out)
        assert frame.guards_hold()
