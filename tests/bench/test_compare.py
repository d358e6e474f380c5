"""The comparison of two sets of result lines, on lines made up."""

import json

import pytest
from report_lines import H100, H200, change, make, score_lines

from bench import compare


@pytest.fixture()
def compared(tmp_path, capsys):
    """Function (new lines, old lines, *options) -> (exit status, output, errors) of `bench.compare`."""

    def run(new, old, *options):
        for name, lines in (("new", new), ("old", old)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        status = compare.main([str(tmp_path / "new"), "--against", str(tmp_path / "old"), *options])
        return status, *capsys.readouterr()

    return run


def rows_of(printed):
    """Cells of the rows of a printed table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:2] == "| "][1:]  # fmt: skip


def test_slower_lines_come_first_and_make_it_fail(compared):
    old = score_lines(H200, 4)
    new = change(old, variant="flex", seconds_=1.5)
    new = change(new, variant="prefix_cache", seconds_=2.0)
    new = change(new, variant="released", seconds_=0.5)
    new = [line | {"commit": "eee5555", "date": "2026-12-01", "torch": "2.14.0"} for line in new]
    status, printed, _ = compared(new, old)
    rows = rows_of(printed)
    assert status == 1 and printed.isascii() and len(rows) == len(old)
    assert rows[0][0].startswith("score prefix cache sdpa") and rows[0][4:] == ["2.00x", "1.00x", "slower"]
    assert rows[0][2:4] == ["104 ms (103 ms to 105 ms)", "208 ms (206 ms to 210 ms)"]
    assert rows[1][0].startswith("score FlexAttention sdpa") and rows[1][4:] == ["1.50x", "1.00x", "slower"]
    assert rows[-1][0].startswith("score released code") and rows[-1][4:] == ["0.500x", "1.00x", "faster"]
    assert [row[6] for row in rows[2:-1]] == [""] * (len(old) - 3)
    assert f"{len(old)} lines compared: 2 slower, 1 faster, 0 with more memory (beyond 1.10x)" in printed


def test_rounds_that_overlap_are_no_change(compared):
    old = [make(1.0, spread=0.2, bench="loss", impl="triton", responses=4)]
    new = [make(1.3, spread=0.1, bench="loss", impl="triton", responses=4)]  # from 1.17, below the 1.2 of the old one
    status, printed, _ = compared(new, old)
    assert status == 0 and rows_of(printed)[0][4:] == ["1.30x", "", ""]
    new = [make(1.3, spread=0.05, bench="loss", impl="triton", responses=4)]  # from 1.235
    assert compared(new, old)[0] == 1 and compared(new, old, "--slower", "1.4")[0] == 0


def test_a_change_within_the_threshold_has_no_flag(compared):
    for change_of in (1.05, 0.95):
        old, new = (make(value, spread=1e-4, bench="loss", impl="triton", responses=4) for value in (1.0, change_of))
        status, printed, _ = compared([new], [old])
        assert status == 0 and rows_of(printed)[0][6] == "" and ": 0 slower, 0 faster" in printed


def test_more_memory_fails(compared):
    old = score_lines(H200, 4)
    status, printed, _ = compared(change(old, variant="released", peak=1.2), old)
    first = rows_of(printed)[0]
    assert status == 1 and first[0].startswith("score released code") and first[6] == "more memory"
    assert first[5] == "1.20x (514 MiB to 616 MiB)"
    assert compared(change(old, variant="released", peak=0.5), old)[0] == 0
    nothing = change(old, variant="released", peak=0)
    assert compared(old, nothing)[0] == 1 and compared(nothing, nothing)[0] == 0


def test_other_gpus_are_not_compared(compared, tmp_path):
    status, _, error = compared(score_lines(H100, 4), score_lines(H200, 4, slow=0.1))
    assert status == 2 and "nothing can be compared" in error
    assert "13 lines of NVIDIA H100 80GB HBM3" in error and "13 lines of NVIDIA H200" in error
    status, printed, _ = compared(
        score_lines(H100, 4) + score_lines(H200, 4), score_lines(H200, 4) + score_lines(H200, 8)
    )
    assert status == 0 and len(rows_of(printed)) == 13
    assert f"without a counterpart: 13 of {tmp_path / 'new'}, 13 of {tmp_path / 'old'}" in printed


def test_nothing_to_compare_is_an_error_of_its_own(compared, tmp_path, capsys):
    assert compared([], score_lines(H200, 4))[0] == 2
    assert compare.main([str(tmp_path / "missing")]) == 2
    assert f"error: {tmp_path / 'missing'}: no such file or folder" in capsys.readouterr().err
    (tmp_path / "broken.jsonl").write_text("{\n")
    assert compare.main([str(tmp_path / "broken.jsonl"), "--against", str(tmp_path / "old")]) == 2
    assert f"error: {tmp_path / 'broken.jsonl'}:1: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "new"), "--slower", "0.9"])
