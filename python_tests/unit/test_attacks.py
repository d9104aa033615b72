"""What bad workers send: exact definitions, reproducibility, and no harm to the input."""

import math

import pytest
import torch

from draco_ext.testing.attacks import ATTACKS, LittleIsEnough, make_attack

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bits(tensor):
    return tensor.view(INTEGERS[tensor.element_size()])


def message_of(d=1000, dtype=torch.float32, seed=1):
    return torch.randn(d, generator=seeded(seed)).to(dtype)


def send(attack, message, seed=0, honest=None):
    return attack(message, generator=seeded(seed), honest=honest)


def flipped(sent, message):
    """For each element the flipped bits as a string of 0 and 1, the highest first."""
    width = 8 * message.element_size()
    differences = torch.bitwise_xor(bits(sent), bits(message)).tolist()
    return [format(x & (1 << width) - 1, f"0{width}b") for x in differences]


def test_names():
    assert set(ATTACKS) == {
        "reversed",
        "constant",
        "gaussian",
        "sign-flip",
        "little-is-enough",
        "inner-product",
        "bit-flip",
        "nan",
        "inf",
        "zeroed-run",
        "multi-bit-flip",
        "small-bias",
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ATTACKS)
def test_contract(name, dtype):
    message = message_of(dtype=dtype)
    honest = torch.stack([message_of(dtype=dtype, seed=seed) for seed in range(5)])
    before, honest_before = message.clone(), honest.clone()

    for known in (None, honest, honest[:1]):
        sent = send(ATTACKS[name], message, honest=known)
        assert sent.shape == message.shape
        assert sent.dtype == dtype
        assert sent.data_ptr() != message.data_ptr()
        assert torch.equal(bits(message), bits(before))
        assert torch.equal(honest, honest_before)
        assert torch.equal(bits(sent), bits(send(ATTACKS[name], message, honest=known)))
        unnoticed = name == "small-bias" and dtype == torch.bfloat16
        assert torch.equal(bits(sent), bits(message)) == unnoticed


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("d", [0, 1, 2, 33])
def test_any_length(name, d):
    assert send(ATTACKS[name], message_of(d)).shape == (d,)


@pytest.mark.parametrize("name", ATTACKS)
def test_strided_message(name):
    message = message_of(200)[::2]
    sent = send(ATTACKS[name], message)
    assert torch.equal(bits(sent), bits(send(ATTACKS[name], message.contiguous())))


@pytest.mark.parametrize("name", ["gaussian", "bit-flip", "zeroed-run", "multi-bit-flip"])
def test_other_seed_sends_something_else(name):
    message = message_of()
    one, other = (send(ATTACKS[name], message, seed=seed) for seed in (0, 1))
    assert not torch.equal(bits(one), bits(other))


def test_definitions():
    message = message_of()
    assert torch.equal(send(ATTACKS["reversed"], message), -100 * message)
    assert torch.equal(send(make_attack("reversed", scale=3.0), message), -3 * message)
    assert torch.equal(send(ATTACKS["sign-flip"], message), -message)
    assert torch.equal(send(ATTACKS["constant"], message), torch.full_like(message, -100))
    assert send(ATTACKS["nan"], message).isnan().all()
    assert (send(ATTACKS["inf"], message) == math.inf).all()
    torch.testing.assert_close(send(ATTACKS["small-bias"], message), message * 1.0005)
    assert not torch.equal(send(ATTACKS["small-bias"], message), message)


def test_gaussian_has_its_standard_deviation_and_ignores_the_message():
    sent = send(ATTACKS["gaussian"], message_of(100_000))
    assert sent.std().item() == pytest.approx(200, rel=0.02)
    assert abs(sent.mean().item()) < 4
    assert torch.equal(sent, send(ATTACKS["gaussian"], message_of(100_000, seed=7)))


@pytest.mark.parametrize(
    ("workers", "adversaries", "below"),
    # By hand: s = floor(n / 2 + 1) - m, then (n - m - s) / (n - m).
    [(50, 24, 24 / 26), (50, 12, 24 / 38), (15, 3, 7 / 12), (7, 3, 3 / 4), (3, 1, 1 / 2)],
)
def test_little_is_enough_takes_the_largest_hidden_shift(workers, adversaries, below):
    scipy_stats = pytest.importorskip("scipy.stats")
    attack = make_attack("little-is-enough", workers=workers, adversaries=adversaries)
    assert attack.largest_shift() == pytest.approx(scipy_stats.norm.ppf(below), abs=1e-12)


def test_little_is_enough_never_helps():
    for workers in range(3, 30):
        for adversaries in range(1, (workers - 1) // 2 + 1):
            shift = LittleIsEnough(workers=workers, adversaries=adversaries).largest_shift()
            assert 0 <= shift < 3


def test_omniscient_attacks_use_the_honest_messages():
    message = message_of()
    honest = torch.stack([message_of(seed=seed) for seed in range(2, 12)])
    mean, std = honest.mean(0), honest.std(0, correction=0)
    sent = send(make_attack("little-is-enough", z=0.7), message, honest=honest)
    torch.testing.assert_close(sent, mean - 0.7 * std)
    sent = send(make_attack("inner-product", epsilon=2.0), message, honest=honest)
    torch.testing.assert_close(sent, -2 * mean)
    assert {name for name, attack in ATTACKS.items() if attack.omniscient} == {
        "little-is-enough",
        "inner-product",
    }


def test_omniscient_attacks_estimate_from_their_own_message():
    message = message_of()
    sent = send(make_attack("little-is-enough", z=2.0), message)
    torch.testing.assert_close(sent, message - 2 * message.std(correction=0))
    sent = send(make_attack("inner-product", epsilon=0.1), message)
    torch.testing.assert_close(sent, -0.1 * message)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_flip_flips_exactly_one_bit(dtype):
    message = message_of(dtype=dtype)
    width = 8 * message.element_size()
    for bit in [None, *range(width)]:
        changed = [x for x in flipped(send(make_attack("bit-flip", bit=bit), message), message) if "1" in x]
        expected = width - 2 if bit is None else bit
        assert changed == [format(1 << expected, f"0{width}b")], f"bit {bit}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 16])
def test_multi_bit_flip_repeats_every_32_elements(dtype, count):
    message = message_of(dtype=dtype)
    for seed in range(20):
        sent = send(make_attack("multi-bit-flip", bits=count), message, seed=seed)
        changed = {i: x for i, x in enumerate(flipped(sent, message)) if "1" in x}
        first = min(changed)
        assert list(changed) == list(range(first, 1000, 32)), f"seed {seed}"
        assert first < 32
        assert len(set(changed.values())) == 1
        assert changed[first].count("1") == count


def test_zeroed_run():
    message = message_of()
    sent = send(make_attack("zeroed-run", runs=1, length=100), message)
    zeros = (sent == 0).nonzero().flatten()
    assert zeros.tolist() == list(range(zeros[0], zeros[0] + 100))
    kept = sent != 0
    assert torch.equal(sent[kept], message[kept])
    assert not send(ATTACKS["zeroed-run"], message_of(10)).any()


def test_unknown_names_and_settings():
    with pytest.raises(ValueError, match=r"name must be one of reversed, .*, got 'nonsense'"):
        make_attack("nonsense")
    with pytest.raises(TypeError, match="reversed has the settings scale, got 'size'"):
        make_attack("reversed", size=3)


@pytest.mark.parametrize(
    ("name", "settings", "error", "words"),
    [
        ("small-bias", {"bias": 1e-2}, ValueError, "bias must be below 1e-3"),
        ("small-bias", {"bias": 0.0}, ValueError, "bias must be below 1e-3"),
        ("zeroed-run", {"runs": 0}, ValueError, "runs must be at least 1"),
        ("zeroed-run", {"length": 1.5}, TypeError, "length must be an int"),
        ("multi-bit-flip", {"bits": 17}, ValueError, "bits must be from 1 to 16"),
        ("multi-bit-flip", {"period": 0}, ValueError, "period must be at least 1"),
        ("little-is-enough", {"workers": 5}, ValueError, "must be given together"),
        ("little-is-enough", {"workers": 4, "adversaries": 2}, ValueError, "workers must be"),
        ("little-is-enough", {"workers": 4, "adversaries": 0}, ValueError, "adversaries must be"),
    ],
)
def test_bad_settings(name, settings, error, words):
    with pytest.raises(error, match=words):
        make_attack(name, **settings)


def test_bad_calls():
    message, attack = message_of(8), ATTACKS["reversed"]
    with pytest.raises(TypeError, match="message must be a Tensor, got list"):
        send(attack, [1.0])
    with pytest.raises(TypeError, match="message must have dtype"):
        send(attack, torch.arange(8))
    with pytest.raises(ValueError, match="message must have 1 dimension"):
        send(attack, message[None])
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, got int"):
        attack(message, generator=3)
    with pytest.raises(ValueError, match=r"honest must be of shape \(m, 8\)"):
        send(attack, message, honest=torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"honest must be of shape \(m, 8\)"):
        send(attack, message, honest=torch.zeros(0, 8))
    with pytest.raises(ValueError, match="bit must be from 0 to 31, got 32"):
        send(make_attack("bit-flip", bit=32), message)
