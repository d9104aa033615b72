"""``draco report``: what it says of ledgers, as a table, as JSON and as a picture."""

import json
from dataclasses import asdict

import matplotlib.image
import numpy as np
import pytest
from click.testing import CliRunner

from draco_ext import Finding
from draco_ext.cli import ledger_report
from draco_ext.cli.commands import draco

NOON = 1_764_072_000.0  # 2025-11-25, UTC


def finding(step, rank=7, *, host="node-7", bucket=0, kind="gradient", failed=False, largest=None, time=None):
    return Finding(
        time=NOON + 60 * step if time is None else time,
        step=step,
        bucket=bucket,
        worker=rank // 2,
        rank=rank,
        host=host,
        elements=None,
        first=None,
        largest=largest,
        failed=failed,
        missing=kind == "missing",
        kind=kind,
    )


def write(path, findings):
    path.write_text("".join(json.dumps(asdict(found)) + "\n" for found in findings))
    return str(path)


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "100"}).invoke(draco, ["report", *map(str, arguments)])


def as_json(*arguments):
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


STORY = [
    # Rank 7: every second step from 10 to 18, two buckets each; rank 3, on a host and then on another.
    *(finding(step, bucket=bucket, largest=float(step)) for step in range(10, 20, 2) for bucket in (0, 1)),
    finding(12, 3, host="node-3", kind="data"),
    finding(20, 3, host="node-4", kind="state", bucket=-1),
    finding(21, 5, host="node-5", kind="missing"),
    finding(22, 5, host="node-5", kind="missing"),
    finding(15, 0, host="node-0", failed=True),
]


def test_who_where_how_often_since_when_and_last_clean(tmp_path):
    report = as_json(write(tmp_path / "bad.jsonl", STORY))
    assert [(r["rank"], r["worker"], r["host"]) for r in report["ranks"]] == [
        (7, 3, "node-7"),  # most wrong messages first; those that were only missing come last
        (0, 0, "node-0"),
        (3, 1, "node-3"),
        (3, 1, "node-4"),
        (5, 2, "node-5"),
    ]
    assert report["ranks"][0] == {
        "rank": 7,
        "worker": 3,
        "host": "node-7",
        "kinds": {"gradient": 10},
        "messages": 10,
        "steps": 5,
        "messages_in_failed_steps": 0,
        "since": {"step": 10, "time": "2025-11-25T12:10:00+00:00"},
        "last_seen": {"step": 18, "time": "2025-11-25T12:18:00+00:00"},
        "last_clean_step": 22,  # other findings show that the job went on
        "largest_deviation": 18.0,
    }
    assert [r["kinds"] for r in report["ranks"][1:]] == [{"gradient": 1}, {"data": 1}, {"state": 1}, {"missing": 2}]
    assert [r["last_clean_step"] for r in report["ranks"]] == [22, 22, 22, 22, 20]
    assert report["ranks"][1]["messages_in_failed_steps"] == 1
    assert report["failed_steps"] == [15]
    assert report["first"] == {"step": 10, "time": "2025-11-25T12:10:00+00:00"}
    assert report["last"] == {"step": 22, "time": "2025-11-25T12:22:00+00:00"}


@pytest.mark.parametrize(
    ("steps", "clean"), [([0, 1, 2], None), ([5], 4), ([1, 3, 5, 6], 4), ([3, 9], 8), ([0, 2, 1, 9], 8)]
)
def test_last_clean_step(tmp_path, steps, clean):
    (rank,) = as_json(write(tmp_path / "bad.jsonl", map(finding, steps)))["ranks"]
    assert rank["last_clean_step"] == clean


def test_findings_of_an_audit(tmp_path):
    found = [finding(4, 2, kind="transient", bucket=-1), finding(9, 2, kind="persistent", bucket=-1)]
    ledger = write(tmp_path / "bad.jsonl", found)
    (rank,) = as_json(ledger)["ranks"]
    assert rank["kinds"] == {"persistent": 1, "transient": 1}
    assert (rank["steps"], rank["since"]["step"], rank["last_seen"]["step"]) == (2, 4, 9)
    words = invoke(ledger).output.split()
    assert {"persistent", "transient"} <= set(words)


def test_a_finding_in_the_files_of_several_ranks_counts_once(tmp_path):
    # Each rank writes down the same, at its own time; rank 2 was killed before the last ones.
    for rank, count in (0, len(STORY)), (1, len(STORY)), (2, 4):
        shifted = [finding(f.step, f.rank, host=f.host, bucket=f.bucket, kind=f.kind, failed=f.failed,
                           largest=f.largest, time=f.time + rank) for f in STORY[:count]]  # fmt: skip
        write(tmp_path / f"bad-{rank}.jsonl", shifted)
    alone = as_json(tmp_path / "bad-0.jsonl")
    together = as_json(*(tmp_path / f"bad-{rank}.jsonl" for rank in range(3)))
    assert as_json(tmp_path / "bad-{rank}.jsonl") == together
    assert together["ranks"][0]["last_seen"] == {"step": 18, "time": "2025-11-25T12:18:01+00:00"}
    for report in (alone, together):
        report.pop("last")
        for rank in report["ranks"]:
            del rank["last_seen"]
    assert together == alone


def test_files_of_which_each_holds_something_of_its_own_are_added_up(tmp_path):
    first = write(tmp_path / "0.jsonl", [finding(1), finding(2)])
    second = write(tmp_path / "1.jsonl", [finding(2), finding(2, bucket=1), finding(3), finding(9, 1, host="node-1")])
    seven, one = as_json(first, second)["ranks"]
    assert (seven["messages"], seven["steps"], seven["since"]["step"], seven["last_seen"]["step"]) == (4, 3, 1, 3)
    assert (one["messages"], one["host"]) == (1, "node-1")


def test_table(tmp_path):
    result = invoke(write(tmp_path / "bad.jsonl", STORY))
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    for said in (
        "Findings in steps 10 to 22, 2025-11-25 12:10 to 2025-11-25 12:22 UTC",
        "7 node-7 10 gradient 5 10 18 22 11-25 12:10 11-25 12:18",
        "0 node-0 1 gradient 1 15 15 22 (1 uncertain) 11-25 12:15 11-25 12:15",
        "5 node-5 2 missing 2 21 22 20",
    ):
        assert said in words
    assert "…" not in result.output


def test_a_host_name_is_no_markup(tmp_path):
    assert "[red]x" in invoke(write(tmp_path / "bad.jsonl", [finding(1, host="[red]x")])).output


def test_nothing_was_found(tmp_path):
    empty = write(tmp_path / "bad.jsonl", [])
    result = invoke(empty, "--picture", tmp_path / "bad.png")
    assert (result.exit_code, result.output) == (0, "Nothing was found of any rank.\n")
    assert not (tmp_path / "bad.png").exists()
    assert as_json(empty) == {"first": None, "last": None, "failed_steps": [], "ranks": []}


def colours(path):
    pixels = matplotlib.image.imread(path)[..., :3]
    return {tuple(np.round(255 * pixel).astype(int)) for pixel in np.unique(pixels.reshape(-1, 3), axis=0)}


def test_picture(tmp_path):
    others = [finding(14, 2, kind="transient", bucket=-1), finding(16, 2, kind="persistent", bucket=-1)]
    ledger = write(tmp_path / "bad.jsonl", [*STORY, *others, finding(17, 4, kind="undecided")])
    result = invoke(ledger, "--picture", tmp_path / "bad.png")
    assert result.exit_code == 0
    assert "node-7" in result.output  # the table, too
    found = colours(tmp_path / "bad.png")
    for colour in ledger_report.COLOURS.values():
        assert tuple(bytes.fromhex(colour[1:])) in found
    invoke(write(tmp_path / "one.jsonl", [finding(0)]), "--picture", tmp_path / "one.svg")
    assert "<svg" in (tmp_path / "one.svg").read_text()


def test_marks_of_a_picture_cover_the_steps_in_which_something_was_found():
    def shares(steps, first, last):
        edges = ledger_report._bin_edges(first, last)
        assert edges[0] == first
        assert edges[-1] > last
        assert len(edges) <= ledger_report.BINS + 1
        return ledger_report._marks(dict.fromkeys(steps, 9), edges, "#000000")[0, :, 3]

    few = shares([0, 3], 0, 9)
    assert few.nonzero()[0].tolist() == [0, 3]
    assert set(few[few > 0]) == {1.0}
    many = shares([*range(1000, 1010), 3005], 1000, 4999)  # ten steps to a mark
    assert many.nonzero()[0].tolist() == [0, 200]
    assert many[0] == 1.0
    assert 0.4 < many[200] < 0.6


def test_a_picture_of_many_ranks_shows_the_worst_and_says_so(tmp_path):
    ranks = ledger_report.MOST_DRAWN + 5
    report = ledger_report.read([write(tmp_path / "bad.jsonl", [finding(1, rank) for rank in range(ranks)])])
    ledger_report.draw(tmp_path / "bad.svg", report)
    assert len(report.ranks) == ranks
    assert "and 5 more ranks" in (tmp_path / "bad.svg").read_text()


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        (None, [], "Error: cannot read {path}: No such file or directory"),
        ('{"step": 1}\n', [], "Error: path must be a ledger, got {path} with line 1: "),
        ("", ["{path}-{{rank}}"], "Error: path must be a ledger, got {path}-{{rank}}, for which no rank has a file"),
        ("good", ["--picture", "{path}.pigeon"], "Error: --picture {path}.pigeon: Format 'pigeon' is not supported"),
        ("good", ["--picture", "/dev/null/a.png"], "Error: --picture /dev/null/a.png: Not a directory"),
    ],
)
def test_bad_arguments_get_one_line(tmp_path, text, arguments, said):
    path = tmp_path / "bad"
    if text == "good":
        write(path, [finding(1)])
    elif text is not None:
        path.write_text(text)
    result = invoke(path, *(argument.format(path=path) for argument in arguments))
    assert result.exit_code in (1, 2)
    assert said.format(path=path) in result.output.splitlines()[-1]
    assert not isinstance(result.exception, (OSError, ValueError))


def test_a_line_that_was_cut_off_is_named_and_left_out(tmp_path, caplog):
    path = tmp_path / "bad.jsonl"
    write(path, [finding(1)])
    path.write_text(path.read_text() + '{"time": 1')
    assert as_json(path)["ranks"][0]["messages"] == 1
    assert "line 2 was cut off" in caplog.text
