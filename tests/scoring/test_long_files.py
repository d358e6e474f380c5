"""Files of any size: memory does not grow with them; and what a run says of its progress."""

import json
import multiprocessing

from scoring_cases import Constants, check, run, write

from yojo.scoring.progress import Progress, clock_text

ROWS = 100_000
ROOM = 30 * 2**20  # bytes: of the places of so many rows, and of what a first run loads


def write_rows(path, count):
    with open(path, "w") as file:
        for n in range(count):
            file.write(json.dumps({"prompt": f"question {n} of many?", "responses": [f"answer {n}", "another"]}) + "\n")
    return path


def peak(path, out):
    """Bytes by which the most memory that a process had is above what it began with, and the rows it scored."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def measured():
        before = resident("VmRSS")
        found = run(path, out)
        sender.send((resident("VmHWM") - before, found.scored, found.kept))

    process = multiprocessing.get_context("fork").Process(target=measured)
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def resident(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def test_memory_does_not_grow_with_the_file(tmp_path):
    run(write_rows(tmp_path / "few.jsonl", 10), tmp_path / "few")  # what is loaded once is loaded
    path = write_rows(tmp_path / "in.jsonl", ROWS)
    used, scored, kept = peak(path, tmp_path / "out")
    assert (scored, kept) == (ROWS, 0) and used < ROOM
    with open(path, "a") as file:
        file.write('{"prompt": "one more?", "responses": ["yes"]}\n')
    used, scored, kept = peak(path, tmp_path / "out")
    assert (scored, kept) == (1, ROWS) and used < ROOM


# ---- progress ----


def test_rates_and_the_time_that_is_left():
    now = [0.0]
    progress = Progress(1000, clock=lambda: now[0])
    assert progress.rate == 0.0 and progress.left() is None
    for _ in range(100):
        now[0] += 1.0
        progress.add(1, tokens=50, filled=10.0)
    assert abs(progress.rate - 1.0) < 1e-9 and abs(progress.left() - 900) < 1e-6
    for _ in range(400):
        now[0] += 1.0
        progress.add(1, bad=1, tokens=50)
    assert abs(progress.rate - 2.0) < 0.01  # of the last five minutes
    assert progress.padding == 1000 / (500 * 50 + 1000)
    assert progress.text() == "0:00:50 left, 1.8 rows/s (5 min: 2), 50 tokens/s, 3.8% padding, 400 bad"
    assert clock_text(3723.4) == "1:02:03"


def test_a_bar_shows_them(tmp_path, capsys):
    run(write(tmp_path / "in.jsonl", [{"prompt": "p", "responses": ["a"]}] * 30), tmp_path / "out", progress=True)
    shown = capsys.readouterr().err
    assert "scoring: 100%" in shown and "30/30" in shown and "rows/s (5 min:" in shown


def test_the_end_says_what_was_done(tmp_path):
    records = [{"prompt": "p", "responses": [f"a{n}"]} for n in range(20)] + [{"prompt": "q", "responses": []}]
    found = run(write(tmp_path / "in.jsonl", records), tmp_path / "o.jsonl", Constants(0.001))
    first, last = found.lines()
    assert (
        first.startswith(f"{tmp_path / 'o.jsonl'}: 20 of 21 rows have scores: 20 new in {clock_text(found.seconds)}, ")
        and "rows/s" in first
    )
    assert last == f"1 rows are bad ({found.folder}/bad-*.jsonl says why); the next run tries them first"
    assert json.loads(json.dumps(found.to_dict()))["bad"] == 1
    check(tmp_path / "o.jsonl", records, tmp_path / "in.jsonl", bad=[20])
