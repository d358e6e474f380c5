"""The checks that a new GPU begins with, on kernels that are interpreted."""

import torch

from bench import smoke

FEW = ("attention float32, 8:2 heads of 64", "attention, one response", "head of 4", "linear head", "loss")


def test_the_smoke_finds_nothing_wrong(tmp_path, capsys):
    place = smoke.Place(torch.device("cpu"), scale=30, bfloat16=False)
    assert smoke.main(["--json", str(tmp_path / "smoke.jsonl"), "--only", *FEW], place) == 0, capsys.readouterr().out
    lines = smoke.read(tmp_path / "smoke.jsonl").values()
    assert len(lines) >= 8 and all(line["ok"] and line["results"] for line in lines)
