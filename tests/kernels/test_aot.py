"""Every kernel compiles for every chip, and keeps to registers and shared memory."""

import itertools
import json
import pathlib
import re

import pytest
import torch
import triton

from bench import tiles
from yojo_kernels import aot, attention, launch, tuning

ROOT = pathlib.Path(__file__).parents[2]
RECORDED = aot.recorded_spills()


def test_there_is_a_record_of_the_triton_of_the_constraints():
    (constrained,) = re.findall(r"^triton==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    records = json.loads(aot.RECORD.read_text())
    names = {" ".join(f"{k} sm_{c} {d} {n} {f}".split()) for k, c, d, n, f in _named_configurations()}
    assert constrained in records
    for record in records.values():
        assert set(record) <= names and all(spills > 0 for spills in record.values())


def _named_configurations():
    for kernel, chip, dtype, head_dim, features in aot.configurations():
        yield kernel, chip, str(dtype).removeprefix("torch."), head_dim, features


# The head dim that most models have: on Hopper in every variant, and with everything on a chip that multiplies as 80 does and
# on one that does as 100 does. Other head dims on Hopper with everything. The rest soaks.
ALWAYS = {(80, 128, "all"), (90, 64, "all"), (90, 128, "all"), (90, 128, "others"), (90, 256, "all"), (100, 128, "all")}


@pytest.mark.parametrize(
    "chip, head_dim, features",
    [
        pytest.param(*case, marks=[pytest.mark.soak] * (case not in ALWAYS))
        for case in itertools.product(tuning.CHIPS, (64, 128, 256), ("all", "others"))
    ],
)
@pytest.mark.parametrize("kernel", ["forward", "query_grad", "key_grad", "value_grad"])
def test_a_16_bit_kernel_stays_in_registers(kernel, chip, head_dim, features):
    found = aot.configurations((chip,), (torch.bfloat16,), (head_dim,), (kernel,))
    found = [arguments for arguments in found if (arguments[-1] == "all") == (features == "all")]
    assert bool(found) == (kernel != "value_grad" or head_dim == 256)  # which key_grad writes where it has room
    for arguments in found:
        assert aot.compile_kernel(*arguments).problems(RECORDED) == []


@pytest.mark.parametrize(
    "chip, dtype, head_dim",
    [
        pytest.param(80, torch.bfloat16, 80, marks=pytest.mark.soak),
        (90, torch.float16, 96),
        pytest.param(120, torch.bfloat16, 32, marks=pytest.mark.soak),
        (80, torch.float32, 128),
        (90, torch.float32, 256),
    ],
)
@pytest.mark.parametrize("kernel", aot.ATTENTION_KERNELS)
def test_other_dtypes_and_head_dims_do_too(kernel, chip, dtype, head_dim):
    """A sample of the rest, those that once spilled; `make kernels` compiles all."""
    assert aot.compile_kernel(kernel, chip, dtype, head_dim).problems(RECORDED) == []


@pytest.mark.parametrize("chip", [pytest.param(chip, marks=[pytest.mark.soak] * (chip != 90)) for chip in tuning.CHIPS])
@pytest.mark.parametrize("kernel", ["head_forward", "head_backward"])
def test_the_value_head_stays_in_registers(kernel, chip):
    for features in ("silu-16", "gelu-64", "gelu-512"):
        report = aot.compile_kernel(kernel, chip, torch.bfloat16, features=features)
        assert report.problems(RECORDED) == [] and report.wgmma + report.mma > 0
    assert aot.compile_kernel(kernel, chip, torch.float32, features="silu-64").problems(RECORDED) == []


@pytest.mark.parametrize(
    "chip", [pytest.param(chip, marks=[pytest.mark.soak] * (chip in (80, 100))) for chip in tuning.CHIPS]
)
@pytest.mark.parametrize("kernel", ["head_merge", "linear_forward", "linear_backward", "loss"])
def test_the_small_kernels_do_too(kernel, chip):
    wanted = ("512", "bradley_terry-64", "plackett_luce-32", "best-512", "soft-16")
    for arguments in aot.configurations((chip,), (torch.float32,), kernels=(kernel,), features=wanted):
        report = aot.compile_kernel(*arguments)
        assert report.problems(RECORDED) == [] and report.spills == 0


@pytest.mark.parametrize(
    "activation", [*(pytest.param(name, marks=pytest.mark.soak) for name in ("relu", "tanh")), "selu"]
)
def test_the_other_activations_compile(activation):
    for kernel in ("head_forward", "head_backward"):
        report = aot.compile_kernel(kernel, 90, torch.bfloat16, features=f"{activation}-512")
        assert report.problems({}) == [] and report.wgmma > 0


def test_every_tile_is_among_what_is_compiled():
    """Head dims between those compiled are padded to the same size, and launched with the same tile."""
    for kernel in ("forward", "query_grad", "key_grad"):
        for chip in tuning.CHIPS:
            for dtype in launch.DTYPES:
                key = kernel, dtype.itemsize * 8, chip
                for capped, table in (
                    (False, tuning.TILES[key]),
                    (True, tuning.TILES[key] | tuning.CAPPED.get(key, {})),
                ):
                    compiled = {tuning.tile(kernel, dim, dtype, chip, capped) for dim in aot.HEAD_DIMS}
                    assert compiled == set(table.values()) and max(table) == attention.MAX_HEAD_DIM


def test_a_spill_at_every_step_is_seen():
    report = aot.compile_kernel("key_grad", 90, torch.bfloat16, 128, "all", tuning.Tile(64, 128, 8, 2))
    assert report.spills >= report.loop_spills >= report.step_spills > 0
    assert any("spill instructions at every step" in problem for problem in report.problems())


LOOP = """.L_x_1:
/*0010*/ LDS R2, [R4] ;
/*0020*/ @!P0 BRA `(.L_x_2) ;
/*0030*/ {mask} ;
/*0040*/ FSEL R2, R2, RZ, P1 ;
/*0050*/ BRA `(.L_x_2) ;
.L_x_2:
/*0060*/ {step} ;
/*0070*/ FFMA R3, R2, R2, R3 ;
/*0080*/ @P3 BRA `(.L_x_1) ;""".replace("\n/", "\n        /")


@pytest.mark.parametrize("tile, passes", [((64, 128, 8, 2), True), ((128, 128, 8, 2), False)])
def test_a_timed_tile_is_judged_by_what_it_would_be_launched_with(tile, passes):
    """Keys at head dim 128 on Hopper have another tile where scores are capped: what spills there does not count."""
    used = tuning.TILES["key_grad", 16, 90][128]
    choice = tiles.Chosen("key_grad", 90, "bfloat16", 128, used, tuning.Tile(*tile), 1.1)
    assert tiles.passes_the_gate(choice) == passes


@pytest.mark.parametrize(
    "mask, step, spilled",
    [("LDL R5, [R1]", "NOP", 0), ("NOP", "STL [R1], R5", 1), ("LDL R5, [R1]", "@P2 LDL R5, [R1]", 1)],
)
def test_what_a_full_step_branches_over_is_not_at_every_step(mask, step, spilled):
    (loop,) = aot._inner_loops(aot.instructions_of(LOOP.format(mask=mask, step=step)))
    full = aot._full_step(loop)
    assert len(full) == 5 and sum(map(aot._is_spill, full)) == spilled


def test_a_loop_without_a_way_through_it_counts_as_a_whole():
    """A step that goes on elsewhere and comes back."""
    lines = LOOP.format(mask="LDL R5, [R1]", step="NOP").replace("@!P0 BRA `(.L_x_2)", "BRA `(.L_x_9)")
    (loop,) = aot._inner_loops(aot.instructions_of(lines))
    assert aot._full_step(loop) == loop


def test_products_that_are_waited_for_one_by_one_are_seen():
    report = aot.compile_kernel("forward", 90, torch.bfloat16, 64, tile=tuning.Tile(128, 64, 4, 3))
    (problem,) = report.problems()
    assert "ptxas serialised them" in problem and report.waits > report.waits_wanted > 0
    report = aot.compile_kernel("forward", 90, torch.bfloat16, 64)
    assert report.waits == report.waits_wanted


def test_spills_may_not_grow():
    report = aot.compile_kernel("query_grad", 80, torch.bfloat16, 64, "uncapped")
    assert report.spills > 0 == report.loop_spills  # outside the loops
    (problem,) = report.problems({report.name: report.spills - 1})
    assert problem == f"{report.spills} spill instructions, {report.spills - 1} are recorded"
    assert report.problems({}) and not report.problems({report.name: report.spills + 1})


def test_a_record_is_of_one_version(monkeypatch, tmp_path):
    record = {triton.__version__: {"forward sm_90 bfloat16 128 plain": 1}, "3.0.0": {}}
    monkeypatch.setattr(aot, "RECORD", tmp_path / "spills.json")
    aot.RECORD.write_text(json.dumps(record))
    assert aot.recorded_spills() == record[triton.__version__]
    aot.RECORD.write_text(json.dumps({"3.0.0": {}}))
    assert aot.recorded_spills() is None


def test_too_much_shared_memory_and_missing_tensor_cores_are_seen():
    report = aot.compile_kernel("forward", 90, torch.float32, 64)
    as_half = aot.dataclasses.replace(report, dtype="float16", shared=228 * 1024)
    assert report.problems() == []
    assert [problem.split(";")[0] for problem in as_half.problems()] == [
        f"{228 * 1024} bytes of shared memory",
        "no wgmma instruction",
        "no tensor-core instruction",
    ]


def test_the_table_is_printed_and_written(tmp_path, capsys):
    file = tmp_path / "kernels.jsonl"
    chosen = ["--chips", "90", "--head-dims", "64", "--dtypes", "bfloat16", "--features", "plain", "--jobs", "1"]
    assert aot.main([*chosen, "--kernels", "forward", "--json", str(file)]) == 0
    (line,) = [json.loads(text) for text in file.read_text().splitlines()]
    assert line["kernel"] == "forward" and line["wgmma"] > 0 and line["spills"] == 0 and line["triton"]
    assert "1 configurations with Triton" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        aot.main([*chosen, "--record"])
