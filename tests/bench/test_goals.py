"""What result lines say of the goals, on lines made up."""

import pytest
import report_lines
from report_lines import CPU, H100, H200, all_lines, attention_lines, change, score_lines, section, verdicts

from bench import goals, report

SCORING = "Scoring, N = 4, image prompt of 2k tokens, responses of 100"
HOST = "Host time of a layer's attention"
TO_64 = "The same at every N to 64: speed-up / FLOPs ratio"

REPLAYED = (
    "Head, and loss, forward and backward, replayed from a graph: time / 15 us, "
    "or / 1.5 x what its bytes and products take at least, where that is longer"
)


@pytest.fixture(name="everything", scope="module")
def all_machines():
    """Lines of every kind and three machines."""
    return report_lines.everything()


def test_goals_that_are_reached():
    found = verdicts(all_lines(H200))
    # ours takes 0.909 of the released code's memory in these lines, and must take 0.6
    missed = [goal for goal, (_, verdict) in found.items() if verdict == "MISSED"]
    assert missed == ["The same: peak memory / that of the released code"] and len(found) == len(goals.GOALS)
    assert set(verdict for _, verdict in found.values()) == {"MISSED", "reached"}
    assert found[f"{SCORING}: faster than N single passes"][0] == (
        "6.62x on NVIDIA H200 (YOJO comparative, liger; FLOPs ratio 3.51x; over single passes with liger 5.31x)"
    )
    assert found[missed[0]][0] == "0.909x on NVIDIA H200 (YOJO comparative, liger)"
    share = (2148 * 8e9 / 200e12 + 1e-3) / (2148 * 8e9 / 380e12 + 1e-3)
    assert found[TO_64][0].startswith(f"{share:.2f}x on NVIDIA H200 (least at N = 1, of N = 1 to 64")
    rate = found["Isolated attention, forward, on H200: rate of visible area"][0]
    assert rate.startswith("500 TFLOP/s on NVIDIA H200 (worst of 4,")  # head dim 64 and short rows do not count
    beyond = 64 * (12288 * 128) / (64 * 8256 * 4096)
    memory_of = found["Isolated attention, forward: memory beyond inputs and output / that of keys gathered"][0]
    assert memory_of.startswith(f"{beyond:.4f}/N on NVIDIA H200 (worst of 3, at 8,192 + 64 x 64;")
    assert found["Training step: samples/s / those of the released loop"][0].startswith(
        "2.50x on NVIDIA H200 (samples in a row: 8"
    )
    assert found["Training step: peak memory / that of the released loop"][0].startswith("0.450x on NVIDIA H200 (samples in a row of both: 1")  # fmt: skip
    assert found[REPLAYED][0] == (
        "0.800x on NVIDIA H200 (worst of 4, loss of 4 responses: 12.0 us, 15.0 us allowed; 12.0 to 12.0 us)"
    )


@pytest.mark.parametrize(
    "goal, measured, which",
    [
        (f"{SCORING}: faster than N single passes", "3.31x", dict(bench="score", variant="yojo_comparative", seconds_=2)),
        (TO_64, "0.940x", dict(variant="yojo_comparative", responses=1, seconds_=2)),
        (f"{SCORING}: faster than the released code", "0.941x", dict(variant="released", seconds_=0.5)),
        (f"{SCORING}: faster than a prefix cache", "0.990x", dict(variant="prefix_cache", seconds_=0.5)),
        ("Isolated attention, forward: faster than tuned FlexAttention", "0.833x", dict(impl="flex_tuned", head_dim=128, responses=64, seconds_=0.5)),
        ("Isolated attention, backward, on H200: rate of visible area", "175 TFLOP/s", {"bench": "attention", "variant": "yojo_isolated", "pass": "backward", "seconds_": 2}),
        ("Isolated attention, backward: faster than keys gathered + varlen", "0.625x", dict(variant="kv_gather", seconds_=0.5)),
        ("Training step: samples/s / those of the released loop", "1.25x", dict(bench="train", variant="released", seconds_=0.5)),
        ("Training step: peak memory / that of the released loop", "0.675x", dict(bench="train", samples=1, variant="yojo_comparative", peak=1.5)),
        ("Head + loss, forward and backward: faster than PyTorch eager", "3.33x", dict(bench="loss", responses=512, impl="triton", seconds_=2)),
        (REPLAYED, "1.22x", dict(bench="head", responses=4, impl="triton_graph", seconds_=2)),
        ("Whole pass at 8k packed tokens: share of the measured matmul peak", "43.5 %", dict(bench="forward", part=None, seconds_=2)),
        (f"{HOST}, scoring / that of x.add(1)", "26.0x", {"bench": "host", "impl": "triton", "pass": "forward", "seconds_": 1.3}),
        (f"{HOST}, forward and backward / that of x.add(1)", "200x", {"bench": "host", "impl": "add", "pass": "both", "seconds_": 0.5}),
    ],
)  # fmt: skip
def test_goals_that_are_missed(goal, measured, which):
    lines = change(all_lines(H200), **which)
    words, verdict = verdicts(lines)[goal]
    assert verdict == "MISSED" and words.startswith(f"{measured} on NVIDIA H200 (")


def test_a_missed_goal_has_its_reasons_below():
    lines = change(all_lines(H200), bench="score", variant="yojo_comparative", seconds_=2)
    page = section(report.page(lines), "## Goals")
    before = f"- {SCORING}: faster than N single passes, on NVIDIA H200: "
    assert before + "The FLOPs ratio there is 3.51x, below the goal" in page
    parts = (
        "MLP 40.0 % at 100 TFLOP/s, projections (q, k, v, o) 20.0 % at 100 TFLOP/s, attention 12.0 % at 100 TFLOP/s."
    )
    assert before + f"Largest parts of a pass of 2,048 + 4 x 100, image (YOJO comparative, fuse none): {parts}" in page


def test_goals_speak_of_gpus_and_rates_of_an_h200():
    on_cpu = verdicts(all_lines(CPU))
    of_host = [goal for goal in on_cpu if goal.startswith(HOST)]
    assert len(of_host) == 2 and all(on_cpu[goal][1] == "reached" for goal in of_host)
    assert on_cpu[of_host[0]][0].endswith("(30.0 us, kernels launched into nothing)")
    assert {verdict for goal, (_, verdict) in on_cpu.items() if goal not in of_host} == {"not measured"}
    found = verdicts(attention_lines(H100))
    assert found["Isolated attention, forward, on H200: rate of visible area"][1] == "not measured"
    assert found["Isolated attention, forward: faster than tuned FlexAttention"][1] == "reached"


def test_goals_of_attention_leave_out_short_rows_and_other_head_dims():
    goal = "Isolated attention, forward, on H200: rate of visible area"
    lines = attention_lines(H200)
    for which in ({"head_dim": 64}, {"prompt_tokens": 2048}, {"variant": "yojo_comparative"}, {"pass": "backward"}):
        assert verdicts(change(lines, seconds_=2, **which))[goal][0].startswith("500 TFLOP/s")
    assert verdicts(change(lines, seconds_=2, prompt_tokens=32768))[goal][0].startswith("250 TFLOP/s")
    assert verdicts([line | {"dtype": "float16"} for line in lines])[goal][1] == "not measured"


def test_a_goal_stands_once_for_each_gpu(everything):
    text = section(report.page(everything), "## Goals")
    rows = [line for line in text.splitlines() if line.startswith(f"| {SCORING}: faster than N single passes |")]
    assert [("H100" in row, "H200" in row) for row in rows] == [(True, False), (False, True)]


def test_a_replayed_head_may_take_what_its_bytes_or_products_do():
    def worst(lines):
        return verdicts(lines)[REPLAYED][0].split("(", 1)[1].split("; ")[0]

    heads = [line for line in all_lines(H200) if line["bench"] == "head" or line["impl"] == "matmul"]
    few = [line for line in heads if line["responses"] != 512]
    # Rows and their gradients, 8,196 x 2,560 of bfloat16; weights and their gradients, 2 x (2,560 x 1,024 + 2 x 1,024 + 1).
    (line,) = [
        line for line in few if line["bench"] == "head" and (line["impl"], line["pass"]) == ("triton_graph", "both")
    ]
    assert goals.head_bytes(line) == 8196 * 2560 * 2 + 4 * (2 * (2560 * 1024 + 2049) + 2 * 4) == 62_951_464
    bytes_alone = "12.0 us, 19.7 us allowed (1.5 x 63.0 MB at 4.8 TB/s)"
    assert worst(few) == f"worst of 1, head of 4 responses: {bytes_alone}"
    many = [line for line in heads if line["responses"] != 4]
    assert (
        worst(many) == "worst of 1, head of 512 responses: 12.0 us, 51.8 us allowed (1.5 x 24.2 GFLOP at 700 TFLOP/s)"
    )
    unknown = [line | {"gpu": "NVIDIA L4"} for line in few]
    assert verdicts(unknown)[REPLAYED][0].startswith("0.800x on NVIDIA L4 (worst of 1, head of 4 responses: 12.0 us, 15.0 us allowed;")  # fmt: skip
    without_tokens = [line | {"prompt_tokens": None} for line in few]
    assert worst(without_tokens) == "worst of 1, head of 4 responses: 12.0 us, 15.0 us allowed"


def test_every_n_is_not_reached_before_64_is_measured():
    lines = [line for count in (1, 4, 16) for line in score_lines(H200, count)]
    words, verdict = verdicts(lines)[TO_64]
    assert verdict == "not measured" and "of N = 1 to 16" in words
    assert verdicts(change(lines, variant="yojo_comparative", seconds_=4))[TO_64][1] == "MISSED"


def test_a_value_that_misses_does_not_look_like_its_threshold():
    goal = goals.GOALS[0]
    assert (goal.shown(3.8996), goal.shown(3.9), goal.shown(3.5)) == ("3.8996x", "3.90x", "3.50x")
