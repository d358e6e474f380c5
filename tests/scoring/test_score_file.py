"""`yojo.score_file`: every row once, the same scores as one by one, and folders that are another's are refused."""

import errno
import json
import os
import resource
import time
from concurrent import futures

import datasets
import pytest
import torch
from PIL import Image
from scoring_cases import Constants, bad_of, candidates, check, lines_of, picture, run, score_of, write

import yojo
from yojo.scoring import job, parts
from yojo.scoring import run as runs
from yojo.scoring.done import Done


@pytest.fixture()
def input_(tmp_path):
    return write(tmp_path / "in.jsonl", candidates(60, tmp_path / "images"))


@pytest.mark.parametrize("name, parquet", [("out", False), ("out", True), ("o.jsonl", False), ("o.parquet", False)])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_has_its_scores_once(input_, tmp_path, name, parquet, workers):
    records, out = candidates(60, tmp_path / "images"), tmp_path / name
    found = run(input_, out, workers=workers, parquet=parquet)
    assert (found.rows, found.scored, found.kept, found.bad, found.exit_code) == (60, 60, 0, 0, 0)
    check(out, records, input_)
    again = run(input_, out, workers=workers, parquet=parquet)
    assert (again.scored, again.kept, again.stale, again.dropped) == (0, 60, 0, 0)
    check(out, records, input_)


@pytest.mark.parametrize("name", ["out", "o.jsonl", "o.parquet"])
def test_an_input_that_has_grown_anywhere(tmp_path, name):
    records, out = candidates(50), tmp_path / name
    run(write(tmp_path / "in.jsonl", records), out)
    more = [{"prompt": "new", "responses": ["x"]}, *records[:20], records[19], *records[20:], *candidates(12, seed=1)]
    found = run(write(tmp_path / "in.jsonl", more), out)
    assert (found.rows, found.scored, found.kept) == (64, 14, 50)
    check(out, more, tmp_path / "in.jsonl")
    shuffled = more[::-1]
    found = run(write(tmp_path / "in.jsonl", shuffled), out)
    assert (found.scored, found.kept) == (0, 64)
    check(out, shuffled, tmp_path / "in.jsonl")


@pytest.mark.parametrize("name, parquet", [("out", False), ("out", True), ("o.jsonl", False), ("o.parquet", False)])
def test_records_that_show_the_same_and_say_something_else(tmp_path, name, parquet):
    one = {"prompt": "a question", "responses": ["x", "y"]}
    path, out = tmp_path / "in.jsonl", tmp_path / name
    for ids, scored in (("ab", 2), ("ba", 0), ("b", 0), ("c", 0), ("dcc", 1), ("cdce", 1), ("fghi", 0)):
        records = [one | {"id": id} for id in ids]
        found = run(write(path, records), out, parquet=parquet)
        assert (found.scored, found.kept, found.replaced) == (scored, len(ids) - scored, 0)
        if out.suffix or not found.stale:
            check(out, records, path)
            assert sorted(line["id"] for line in lines_of(out)) == sorted(ids)


def test_rows_that_are_gone_from_the_input_are_said(tmp_path):
    records = candidates(20)
    for out in (tmp_path / "out", tmp_path / "o.jsonl"):
        run(write(tmp_path / "in.jsonl", records), out)
        found = run(write(tmp_path / "in.jsonl", records[5:]), out)
        assert (found.scored, found.kept, found.stale) == (0, 15, 5)
        assert "5 scores are of rows that are no longer in the input" in list(found.lines())
    check(tmp_path / "o.jsonl", records[5:], tmp_path / "in.jsonl")


def test_bad_rows_are_kept_with_their_reason_and_tried_first(tmp_path):
    records, out = candidates(40, tmp_path / "images"), tmp_path / "o.jsonl"
    records[30] = records[30] | {"responses": []}
    records[31] = records[31] | {"image": "images/none.png"}
    records[32] = records[32] | {"image": "images/broken.png"}
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    path = write(tmp_path / "in.jsonl", records)
    path.write_text(path.read_text() + '{"prompt": "torn\n')
    tried = []

    class Judge(Constants):
        def score_many(self, examples):
            tried.extend(e.responses[0] for e in examples)
            if any("a20" in e.responses for e in examples):
                raise ValueError(f"example {examples[0].id!r}: cannot be judged")
            return super().score_many(examples)

    found = run(path, out, Judge())
    # A broken image is only found by a judge that looks at it: this one does not.
    assert (found.rows, found.scored, found.bad, found.exit_code) == (41, 37, 4, 1)
    bad = bad_of(out)
    assert list(bad) == [30, 31, 40, 20] and "no such file" in bad[31] and "not JSON" in bad[40]
    assert bad[20] == "cannot be judged" and bad[30] == "no responses: at least one is needed"
    lines = [json.loads(line) for line in next(found.folder.glob("bad-*")).read_text().splitlines()]
    assert [(line["id"], line["line"], line["file"]) for line in lines][0] == ("q2", 31, str(path))
    picture(tmp_path / "images", 500)
    (tmp_path / "images" / "500.png").rename(tmp_path / "images" / "none.png")
    tried.clear()
    found = run(path, out, Judge())
    assert tried[0] == "a31" and (found.scored, found.kept, found.bad) == (1, 37, 3)
    assert set(bad_of(out)) == {30, 20, 40}
    assert [line["row"] for line in lines_of(out)] == [n for n in range(41) if n not in (20, 30, 40)]


def test_scores_stay_when_an_image_is_removed_and_go_when_it_is_another(tmp_path):
    records, out = candidates(20, tmp_path / "images"), tmp_path / "out"
    path = write(tmp_path / "in.jsonl", records)
    run(path, out)
    (tmp_path / "images" / "3.png").unlink()
    found = run(path, out)
    assert (found.kept, found.gone, found.scored, found.bad) == (20, 1, 0, 0)
    (tmp_path / "images" / "4.png").replace(tmp_path / "images" / "3.png")  # row 4 has none now, row 3 another
    found = run(path, out)
    assert (found.kept, found.gone, found.scored, found.replaced, found.stale) == (19, 1, 1, 1, 0)


@pytest.mark.parametrize("name, parquet", [("out", False), ("out", True), ("o.jsonl", False)])
@pytest.mark.parametrize("is_killed", [False, True])
def test_scores_of_an_image_that_was_replaced_stand_nowhere(tmp_path, monkeypatch, name, parquet, is_killed):
    """Beside the new ones, of the same record, nobody could tell them apart."""
    records, out = candidates(20, tmp_path / "images"), tmp_path / name
    path = write(tmp_path / "in.jsonl", records)
    run(path, out, parquet=parquet)
    old = {line["row"]: line["key"] for line in lines_of(out)}
    before = os.stat(tmp_path / "images" / "8.png")
    (tmp_path / "images" / "8.png").write_bytes((tmp_path / "images" / "3.png").read_bytes())  # which rows 8 and 9 show
    os.utime(tmp_path / "images" / "8.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    if is_killed:  # in front of the last thing that it does
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(parts.Lines, "drop", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            run(path, out, parquet=parquet)
    found = run(path, out, parquet=parquet)
    assert (found.scored, found.kept, found.replaced) == ((0, 20, 2) if is_killed else (2, 18, 2))
    check(out, records, path)
    new = {line["row"]: line["key"] for line in lines_of(out)}
    assert {row for row in new if new[row] != old[row]} == {8, 9}
    assert run(path, out, parquet=parquet).replaced == 0


@pytest.mark.parametrize("parquet", [False, True])
def test_shards_remove_scores_from_the_same_part_meanwhile(tmp_path, parquet):
    records, out = candidates(60, tmp_path / "images"), tmp_path / "out"
    path = write(tmp_path / "in.jsonl", records)
    run(path, out, parquet=parquet)
    for number in range(0, 40, 2):
        image = tmp_path / "images" / f"{number}.png"
        if image.exists():
            image.unlink()
            picture(tmp_path / "other", number + 1000)
            os.rename(tmp_path / "other" / f"{number + 1000}.png", image)

    class Meanwhile(Constants):
        def score_many(self, examples):
            if not found:
                found.append(run(path, out, shard=(0, 2), parquet=parquet))
            return super().score_many(examples)

    found = []
    found.append(run(path, out, Meanwhile(), shard=(1, 2), parquet=parquet))
    assert len(found) == 2 and all(one.replaced for one in found)
    check(out, records, path)


def test_shards_are_disjoint_and_any_number_of_them_can_go_on(tmp_path):
    records, out = candidates(80), tmp_path / "out"
    path = write(tmp_path / "in.jsonl", records)
    found = [run(path, out, shard=(n, 3)) for n in (0, 2)]
    assert all(10 < one.scored < 50 for one in found) and all(one.rows == one.scored for one in found)
    rest = run(path, out)
    assert rest.kept == sum(one.scored for one in found) and rest.scored == 80 - rest.kept
    check(out, records, path)
    assert run(path, out, shard=(1, 5)).scored == 0


@pytest.mark.parametrize("parquet", [False, True])
def test_shards_of_several_threads_begin_and_end_at_the_same_time(tmp_path, parquet):
    records = candidates(60)
    path = write(tmp_path / "in.jsonl", records)
    for n in range(8):
        out = tmp_path / f"out{n}"
        with futures.ThreadPoolExecutor(6) as pool:
            assert (
                sum(pool.map(lambda i, out=out: run(path, out, shard=(i, 6), parquet=parquet).scored, range(6))) == 60
            )
        check(out, records, path)


def test_shards_leave_the_bad_rows_of_others_listed(tmp_path):
    records, out = candidates(30), tmp_path / "out"
    bad = [3, 11, 14, 17, 25]
    for n in bad:
        records[n] = {"prompt": "a question", "responses": [n]}
    path = write(tmp_path / "in.jsonl", records)
    for shard in ((0, 2), (1, 2), (0, 2)):
        run(path, out, shard=shard)
    check(out, records, path, bad=bad)
    write(path, [records[0], *records])  # every bad row has another number
    for shard in ((0, 2), (1, 2)):
        run(path, out, shard=shard)
    check(out, [records[0], *records], path, bad=[n + 1 for n in bad])
    write(path, candidates(30))
    run(path, out)
    assert bad_of(out) == {}


def test_shards_in_the_input_order_of_a_list_or_a_dataset(tmp_path):
    records = candidates(30)
    for n, data in enumerate((records, datasets.Dataset.from_list(records))):
        for shard in range(2):
            run(data, tmp_path / f"{n}", shard=(shard, 2))
        check(tmp_path / f"{n}", records, records)


def test_scores_of_a_model_are_those_of_each_row_alone(make_reward_model, samples, tmp_path):
    reward_model = make_reward_model(layers=2, mode="isolated")
    (tmp_path / "images").mkdir()
    records = []
    for n in range(14):
        samples[n % 5][0].save(tmp_path / "images" / f"{n % 5}.png")
        image = {"image": f"images/{n % 5}.png"} if n % 4 else {}
        texts = [f"it is a {k}" for k in range(1 + n % 4)]
        records.append({"prompt": "which digit is shown " + "? " * (n % 3 + 1), "responses": texts, **image})
    path = write(tmp_path / "in.jsonl", records)
    alone = [reward_model.score_many([example])[0].tolist() for example in yojo.data.load(path, ranked=False)]
    settings = [{"token_budget": 40}, {"workers": 2}, {"token_budget": 10**6, "parquet": True}]
    for n, options in enumerate(settings):
        out = tmp_path / f"out{n}"
        found = [run(path, out, reward_model, shard=(k, 2), **options) for k in range(2)]
        assert sum(one.scored for one in found) == 14 and sum(one.tokens for one in found) > 14 * 5
        for line in lines_of(out):
            expected = torch.tensor(alone[line["row"]])
            assert torch.allclose(torch.tensor(line["scores"]), expected, rtol=0, atol=2e-6)
    reversed_ = write(tmp_path / "back.jsonl", records[::-1])
    run(reversed_, tmp_path / "back.parquet", reward_model, workers=1)
    for line, expected in zip(lines_of(tmp_path / "back.parquet"), alone[::-1], strict=True):
        assert torch.allclose(torch.tensor(line["scores"]), torch.tensor(expected), rtol=0, atol=2e-6)


def test_scores_that_are_not_finite_are_bad_rows(tmp_path):
    class Judge(Constants):
        def score_many(self, examples):
            found = super().score_many(examples)
            found[3][1] = float("nan")
            return found

    found = run(write(tmp_path / "in.jsonl", candidates(10)), tmp_path / "o.jsonl", Judge())
    assert found.bad == 1 and "responses 1 are not finite (nan)" in bad_of(tmp_path / "o.jsonl")[3]


def test_a_judge_that_loses_scores_is_stopped(tmp_path):
    class Judge(Constants):
        def score_many(self, examples):
            return super().score_many(examples)[1:]

    with pytest.raises(ValueError, match="the judge gave scores for 9 examples, it was asked for 10"):
        run(write(tmp_path / "in.jsonl", candidates(10)), tmp_path / "out", Judge())


# ---- what is another's ----


def test_another_job_is_refused_with_what_differs(input_, tmp_path):
    run(input_, tmp_path / "out")
    run(input_, tmp_path / "o.jsonl")
    for out in (tmp_path / "out", tmp_path / "o.jsonl"):
        with pytest.raises(
            ValueError, match="another job, which differs in judge.shift: 0.0 there, 1.0 here: name another"
        ):
            run(input_, out, Constants(shift=1.0))
        with pytest.raises(ValueError, match="differs in reading.literal_tags: false there, true here"):
            run(input_, out, literal_tags=True)
        found = run(input_, out, Constants(shift=1.0), resume=False)
        assert (found.scored, found.kept) == (60, 0)
        check(out, candidates(60, tmp_path / "images"), input_, score=lambda text: score_of(text) + 1.0)


def test_what_is_no_job_is_left_alone(input_, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    (tmp_path / "s.jsonl").write_text("{}\n")
    (tmp_path / "s.txt").write_text("x")
    for name, message in {
        "mine": "holds notes.txt and is not the folder of a scoring job",
        "s.jsonl": "exists and was not written by a scoring job",
        "s.txt": "is a file: --out is a folder, or a file that ends with .jsonl or .parquet",
    }.items():
        with pytest.raises(ValueError, match=message):
            run(input_, tmp_path / name)
    assert (tmp_path / "s.jsonl").read_text() == "{}\n"


def test_scores_do_not_lie_among_the_candidates(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "in.jsonl", candidates(5))
    for out in ("data", "data/scores.jsonl", "data/more/scores"):
        with pytest.raises(ValueError, match="whose files are the input|is not the folder of a scoring job"):
            run(tmp_path / "data", tmp_path / out)
    assert run(tmp_path / "data", tmp_path / "data-scores").scored == 5


def test_one_process_at_a_time_writes_a_shard(input_, tmp_path):
    class Judge(Constants):
        def score_many(self, examples):
            with pytest.raises(ValueError, match="is writing shard 0/1 of it already"):
                run(input_, tmp_path / "out")
            with pytest.raises(ValueError, match="is writing shard 0/1 of it already"):
                run(input_, tmp_path / "out", shard=(1, 3))
            return super().score_many(examples)

    assert run(input_, tmp_path / "out", Judge()).scored == 60


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shard": (3, 2)}, "shard must be number/count with the number from 0 below the count, got 3/2"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"token_budget": 0}, "token_budget must be at least 1"),
        ({"judge": object()}, "object has no fingerprint"),
        ({"columns": {"prompt": "ask"}}, "there is no column 'ask'"),
        ({"devices": "all"}, "every process loads the judge: pass its name"),
        ({"judge": "length", "devices": "cpu", "fingerprint": {"a": 1}}, "fingerprint is given with devices"),
        ({"judge": "length", "ray": "local", "fingerprint": {"a": 1}}, "fingerprint is given with ray"),
        ({"judge": "length", "devices": "cpu", "device": "cpu"}, "device='cpu' is given with devices"),
        ({"judge": "length", "ray": "local", "device": "cpu"}, "device='cpu' is given with ray"),
        ({"judge": "length", "ray": "local", "devices": "cpu"}, "devices and ray are given"),
        ({"setup": print}, "setup is for the processes of devices"),
    ],
)
def test_wrong_arguments(input_, tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run(input_, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_shards_need_a_folder(input_, tmp_path):
    with pytest.raises(ValueError, match="shards write into one folder: name a folder instead of"):
        run(input_, tmp_path / "o.jsonl", shard=(0, 2))


def test_the_end_of_a_run_is_one_step_to_others(tmp_path, monkeypatch):
    """Who began while the file is made, or while old scores are removed, would read places that mean nothing a moment later."""
    records, out = candidates(20, tmp_path / "images"), tmp_path / "o.jsonl"
    path = write(tmp_path / "in.jsonl", records)
    folder = run(path, out).folder
    (tmp_path / "images" / "8.png").write_bytes((tmp_path / "images" / "3.png").read_bytes())
    seen = []

    def watched(name, function):
        def call(*args):
            pid = os.fork()
            if not pid:  # another process, to which alone locks of this one say something
                with open(folder / ".lock", "ab") as file:
                    os._exit(0 if job._lock(file, wait=False) else 7)
            seen.append((name, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), len(job._open)))
            return function(*args)

        return call

    monkeypatch.setattr(runs, "assemble", watched("assemble", runs.assemble))
    monkeypatch.setattr(parts.Lines, "drop", watched("drop", parts.Lines.drop))
    assert run(path, out).replaced == 2
    assert seen == [("assemble", 7, 1), ("drop", 7, 1)] and not job._open
    check(out, records, path)


# ---- what is not whole ----


def test_a_line_that_is_torn_is_scored_again(input_, tmp_path):
    records = candidates(60, tmp_path / "images")
    for out in (tmp_path / "out", tmp_path / "o.jsonl"):
        folder = run(input_, out).folder
        (part,) = folder.glob("scores-*")
        whole = part.read_bytes()
        for cut in (whole[:-9], whole[:-1], whole[: len(whole) // 2], b""):
            part.write_bytes(cut)
            if out.suffix:
                out.write_bytes(out.read_bytes()[:-20])
            found = run(input_, out)
            assert found.scored == 60 - cut.count(b"\n") and found.kept == 60 - found.scored
            assert found.dropped == (cut[-1:] not in (b"\n", b""))
            check(out, records, input_)
            for path in folder.glob("scores-*"):
                path.unlink()
            part.write_bytes(whole)


def test_a_part_that_is_damaged_is_named(input_, tmp_path):
    folder = run(input_, tmp_path / "out", parquet=True).folder
    (part,) = folder.glob("scores-*")
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"parquet is damaged .*: remove it, and its rows are scored again"):
        run(input_, tmp_path / "out")
    part.unlink()
    assert run(input_, tmp_path / "out").scored == 60
    for damaged in (b"{", b"\xff\xfe", b"null", b""):
        (folder / "job.json").write_bytes(damaged)
        with pytest.raises(ValueError, match="job.json cannot be read"):
            run(input_, tmp_path / "out")


@pytest.mark.parametrize("name", ["o.jsonl", "o.parquet"])
def test_a_file_that_is_half_written_when_the_run_is_killed_is_removed_by_the_next_one(
    input_, tmp_path, monkeypatch, name
):
    before = sorted(os.listdir(tmp_path))
    with monkeypatch.context() as patch:  # as a kill leaves it: nothing is tidied up
        patch.setattr(os, "replace", lambda *_: os._exit(9) if str(_[1]).endswith(name) else os.rename(*_))
        pid = os.fork()
        if not pid:
            run(input_, tmp_path / name)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert sorted(os.listdir(tmp_path)) == sorted([*before, f".{name}.job"])
    assert any(entry.startswith(parts.ASIDE) for entry in os.listdir(tmp_path / f".{name}.job"))
    assert run(input_, tmp_path / name).kept == 60
    check(tmp_path / name, candidates(60, tmp_path / "images"), input_)


@pytest.mark.parametrize("line", ["{}", "5", '{"row": 5}', '{"row": 5, "key": "zz", "record": "zz", "media": ""}'])
def test_a_whole_line_that_is_no_row_is_named(input_, tmp_path, line):
    (part,) = run(input_, tmp_path / "out").folder.glob("scores-*")
    size = part.stat().st_size
    with open(part, "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=rf"jsonl: a line at byte {size} is no row of scores: remove the line"):
        run(input_, tmp_path / "out")


@pytest.mark.parametrize("name", ["out", "o.jsonl"])
def test_of_records_that_say_the_same_an_image_that_is_gone_takes_no_other_ones_scores(tmp_path, name):
    class Red(Constants):
        def score_many(self, examples):
            return [torch.tensor([float(Image.open(e.images[0]).getpixel((0, 0))[0])]) for e in examples]

    record = {"id": "x", "prompt": "q", "responses": ["a"], "image": "0.png"}
    data, images = [], []
    for red in (100, 200):
        (tmp_path / str(red)).mkdir()
        images.append(tmp_path / str(red) / "0.png")
        Image.new("RGB", (8, 8), (red, 0, 0)).save(images[-1])
        data.append(write(tmp_path / str(red) / "in.jsonl", [record]))

    def scores(data):
        found = run(data, tmp_path / name, Red())
        return found.gone, found.bad, sorted(line["scores"][0] for line in lines_of(tmp_path / name))

    assert scores(data[::-1]) == (0, 0, [100, 200])
    content = images[0].read_bytes()
    images[0].unlink()
    assert scores(data) == (1, 0, [100, 200])
    if name == "o.jsonl":
        assert [line["scores"] for line in lines_of(tmp_path / name)] == [[100], [200]]
    images[1].unlink()
    gone = scores(data)  # nobody knows whose is whose: neither is taken, neither is lost
    assert gone == (0, 2, [] if "." in name else [100, 200])
    images[0].write_bytes(content)
    assert scores(data) == (1, 0, [100, 200])


def test_many_records_that_say_the_same_are_found_at_once():
    count, row = 20_000, {"key": "ab" * 16, "record": "cd" * 16, "media": ""}
    done = Done((n, row) for n in range(count))
    start = time.process_time()
    assert all(done.take(row["key"], row["record"]) is not None for _ in range(count))
    assert done.take(row["key"], row["record"]) is None and time.process_time() - start < 20  # half an hour, one by one


@pytest.mark.parametrize("parquet", [False, True])
def test_scores_that_somebody_took_from_another_job_are_refused(input_, tmp_path, parquet):
    (part,) = run(input_, tmp_path / "other", Constants(shift=1.0), parquet=parquet).folder.glob("scores-*")
    folder = run(input_, tmp_path / "out", shard=(0, 2)).folder
    part.rename(folder / part.name)
    with pytest.raises(ValueError, match="has scores of the job .* cannot be told apart any more; move the file away"):
        run(input_, tmp_path / "out")
    (folder / part.name).unlink()
    run(input_, tmp_path / "out")
    check(tmp_path / "out", candidates(60, tmp_path / "images"), input_)


def test_a_list_of_bad_rows_that_somebody_has_written_in(tmp_path):
    records = candidates(10)
    folder = run(write(tmp_path / "in.jsonl", records), tmp_path / "out").folder
    (folder / "bad-00000-of-00001.jsonl").write_text('{"row": true}\n{"row": -3}\n{"row": 99}\n{"row": 1}\nx\n')
    assert run(tmp_path / "in.jsonl", tmp_path / "out").kept == 10
    check(tmp_path / "out", records, tmp_path / "in.jsonl")


def test_columns_that_are_left_out_have_no_order(tmp_path):
    path = write(tmp_path / "in.jsonl", [record | {"xa": 1, "xb": 2, "xc": 3} for record in candidates(10)])
    for columns in (["xa", "xb", "xc"], ["xc", "xa", "xb"], ["xb", "xa", "xc", "xa"], {"xa", "xb", "xc"}):
        found = run(path, tmp_path / "out", ignore_columns=columns)
    assert (found.scored, found.kept) == (0, 10)


def test_a_full_disk_ends_the_run_and_nothing_else(input_, tmp_path):
    """A limit on the size of files does to a write what a full disk does: a part of it, and then an error."""
    records, before = candidates(60, tmp_path / "images"), resource.getrlimit(resource.RLIMIT_FSIZE)
    for out in (tmp_path / "out", tmp_path / "o.parquet"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
        try:
            with pytest.raises(OSError, match="what was written before is kept; make room and run the same command"):
                run(input_, out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        found = run(input_, out)
        assert 5 < found.kept < 20 and found.kept + found.scored == 60
        check(out, records, input_)


def test_a_disk_that_is_full_when_the_file_is_made(input_, tmp_path, monkeypatch):
    def full(path, lines, *rest):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name, function in (("o.jsonl", "write_lines"), ("o.parquet", "write_parquet")):
        with monkeypatch.context() as patch:
            patch.setattr(parts, function, full)
            with pytest.raises(OSError, match="No space left on device: what was written before is kept"):
                run(input_, tmp_path / name)
        assert not (tmp_path / name).exists()
        assert run(input_, tmp_path / name).scored == 0
        check(tmp_path / name, candidates(60, tmp_path / "images"), input_)
