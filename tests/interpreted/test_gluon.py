"""The Gluon forward on the machine of `gluon_machine`, and the interpreted kernels behind it: values and gradients."""

import importlib.util
import pathlib

import gluon_machine
import pytest
import torch
from attention_cases import check, check_apart, random_case, run

from yojo_kernels import Layout, gluon_attention, gluon_forward, reference, tuning

SMALL = tuning.Tile(32, 16, 4, 2)  # many steps even in short rows
GROUP = SMALL.block_m // 2
BACKWARD = {"query_grad": tuning.Tile(32, 32, 1, 1), "key_grad": tuning.Tile(32, 32, 1, 1)}


@pytest.fixture(autouse=True)
def poison():
    """Uninitialised memory is NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture()
def machine(monkeypatch):
    """Function that puts a machine in the kernel's place: seed, queries of a warp group -> `gluon_machine.Kernel`."""

    def put(seed=0, group_m=GROUP, module=gluon_forward):
        kernel = gluon_machine.Kernel(seed, group_m, module)
        monkeypatch.setattr(gluon_forward, "gluon_forward_kernel", kernel)
        return kernel

    return put


class _Graft(torch.autograd.Function):
    """One result with the gradient of another."""

    @staticmethod
    def forward(ctx, graded, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def forward_alone(query, key, value, layout, **options):
    """The Gluon forward with the reference's gradients."""
    graded = reference.multi_response_attention(query, key, value, layout, **options)
    with torch.no_grad():
        values = gluon_attention.multi_response_attention(query, key, value, layout, **options)
    return tuple(_Graft.apply(one, other) for one, other in zip(graded, values, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_results_are_as_exact_as_the_reference(seed, machine):
    kernel = machine(seed)
    with tuning.forced(gluon_forward=SMALL._replace(num_stages=2 + seed % 2), **BACKWARD):
        case = random_case(seed, longest=20, head_dims=(64, 128))
        check(gluon_attention.multi_response_attention, case, torch.float16)
    assert kernel.launches == 1 and kernel.machine.steps > 0


@pytest.mark.parametrize("dim", gluon_attention.HEAD_DIMS)
@pytest.mark.parametrize("dtype", gluon_attention.DTYPES)
def test_tiles_of_the_tables(dtype, dim, machine):
    machine(seed=1, group_m=None)
    tile = tuning.tile("gluon_forward", dim, dtype, 90)
    assert tile.block_m == gluon_forward.BLOCK_M == 2 * gluon_forward.GROUP_M.value
    blocks = [-1] * 690
    blocks[120:180] = [0] * 60
    for options, bidirectional in (({}, None), ({"window": 200, "softcap": 20.0}, blocks)):
        layout = Layout.build([290, 130], [[100, 60], [70, 40]], bidirectional=bidirectional)
        shapes = ((2, dim), (1, dim), (1, dim), (2, dim), (2,))
        case = {
            "layout": layout,
            "options": {"scale": dim**-0.5, "window": None, "softcap": None} | options,
            "tensors": [torch.randn(690, *shape, dtype=torch.float64) for shape in shapes],
        }
        with tuning.forced(gluon_forward=tile):
            check(forward_alone, case, dtype)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_number_of_steps(stages, machine):
    """0 to 9 steps, with queries for both warp groups and for one, under many orders of events."""
    generator = torch.Generator().manual_seed(stages)
    for count in range(10):
        for queries in (5, GROUP, 2 * GROUP):
            kernel = machine(100 * count + queries)
            rows = max(count * 16, 2 * GROUP)
            q, k, v = (torch.randn(rows, 1, 64, generator=generator).half() for _ in range(3))
            start = rows - queries
            lo = rows - count * 16
            full = max(0, (start + 1 - lo) // 16)
            table = torch.tensor([[start, rows, lo, rows, 0, full, rows, rows, 0, 0]], dtype=torch.int32)
            bounds = torch.zeros(2, rows, dtype=torch.int32)
            ids = torch.zeros(rows, dtype=torch.int32)
            with tuning.forced(gluon_forward=SMALL._replace(num_stages=stages)):
                output, lse = torch.ops.yojo.gluon_attention(
                    q, k, v, ids, ids, bounds, ids, None, table, None, None, None, 0.125, 0, 0.0
                )
            seen = (torch.arange(rows)[None, :] <= torch.arange(start, rows)[:, None]) & (torch.arange(rows) >= lo)
            s = (q[start:, 0].float() @ k[:, 0].float().t() * 0.125).masked_fill(~seen, float("-inf"))
            expected = s.softmax(-1).nan_to_num() @ v[:, 0].float()
            assert kernel.machine.steps > 0 and (output[start:, 0] - expected).abs().max() < 3e-3
            assert torch.allclose(lse[0, start:], s.logsumexp(-1), atol=1e-4)
            assert output[:start].isnan().all() and lse[0, :start].isnan().all()  # rows of other tiles are left alone


@pytest.mark.parametrize("seed", range(3))
def test_what_is_not_finite_stays_with_those_who_see_it(seed, machine):
    machine(seed)
    with tuning.forced(gluon_forward=SMALL, **BACKWARD):
        case = random_case(seed, longest=9, head_dims=(64,), heads=((1, 1), (1, 2)))
        check_apart(gluon_attention.multi_response_attention, case, torch.float16, 5e-3, seed)


def test_inputs_may_lie_in_memory_as_they_will(machine):
    layout = Layout.build([20, 9], [[6, 7], [11]])
    size, shapes = layout.num_tokens, (4, 2, 2)
    fused = torch.randn(size, sum(shapes), 64).half()
    views = list(fused.split(shapes, dim=1))
    kinds = {
        "views of one projection": (views, True),
        "heads first": ([view.transpose(0, 1).contiguous().transpose(0, 1) for view in views], True),
        "rows not 16 bytes apart": ([torch.nn.functional.pad(view, (0, 1))[..., :-1] for view in views], False),
        "entries apart": ([view.repeat_interleave(2, 2)[..., ::2] for view in views], False),
        "not aligned": ([torch.cat([view.new_zeros(1), view.flatten()])[1:].view(view.shape) for view in views], False),
    }
    with tuning.forced(gluon_forward=SMALL):
        machine()
        clones = [view.clone() for view in views]
        expected = gluon_attention.multi_response_attention(*clones, layout, scale=0.2)
        for name, (inputs, as_they_are) in kinds.items():
            assert all((gluon_attention.copyable(tensor) is tensor) == as_they_are for tensor in inputs), name
            assert all(map(torch.equal, gluon_attention.multi_response_attention(*inputs, layout, scale=0.2), expected))
        shared = views[1][:, :1].expand(size, 2, 64)  # heads on one another
        assert gluon_attention.copyable(shared) is not shared
        again = gluon_attention.multi_response_attention(clones[0], shared, clones[2], layout, scale=0.2)
        apart = gluon_attention.multi_response_attention(clones[0], shared.contiguous(), clones[2], layout, scale=0.2)
        assert all(map(torch.equal, again, apart))


def test_the_order_of_events_changes_no_bit(machine):
    case = random_case(3, longest=9, head_dims=(64,))
    results = []
    for seed in range(3):
        machine(seed)
        with tuning.forced(gluon_forward=SMALL, **BACKWARD):
            results.append(run(gluon_attention.multi_response_attention, case, torch.float16))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_registered_as_torch_expects(machine):
    machine()
    case = random_case(0, longest=4, head_dims=(64,), heads=((1, 1),))
    q, k, v = (tensor.half().requires_grad_() for tensor in case["tensors"][:3])
    row = case["layout"]
    with tuning.forced(gluon_forward=SMALL, **BACKWARD):
        tables = (row.query_tiles(32, 16), row.query_tiles(32, 32), *row.key_tiles(32, 32, 4))
        ids = (row.sample, row.branch, row.bounds, row.position, row.block)
        torch.library.opcheck(torch.ops.yojo.gluon_attention, (q, k, v, *ids, *tables, 0.3, 0, 0.0))


FAULTS = {
    "keys are let in too late": ("(((i + 1) // STAGES) & 1) ^ 1", "((i + 1) // STAGES) & 1"),
    "values are let in too late": ("((i // STAGES) & 1) ^ 1)", "(i // STAGES) & 1)"),
    "the phase of the keys is wrong": ("((i + 1) // STAGES) & 1, pred=i", "(i // STAGES) & 1, pred=i"),
    "the phase of the turns is wrong": ("(i + 1 - GROUP) & 1", "(i - GROUP) & 1"),
    "no turn is given": ("    mbarrier.arrive(turns.index(1 - GROUP))\n    s, acc", "    s, acc"),
    "values are not let go": ("    mbarrier.arrive(v_empty.index((i - 1) % STAGES))\n", ""),
    "keys are let go too early": (
        "    s, acc = warpgroup_mma_wait(1, deps=[s, acc])\n    mbarrier.arrive(k_empty.index(i % STAGES))\n",
        "    mbarrier.arrive(k_empty.index(i % STAGES))\n    s, acc = warpgroup_mma_wait(1, deps=[s, acc])\n",
    ),
    "keys are not waited for": (
        "    mbarrier.wait(k_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i + 1 < steps)\n",
        "",
    ),
    "values are not waited for": (
        "    mbarrier.wait(v_full.index(before % STAGES), (before // STAGES) & 1)\n",
        "",
    ),
    "the last values are not waited for": (
        "        mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)\n",
        "",
    ),
    "queries are not waited for": ("        mbarrier.wait(q_full.index(GROUP), 0)\n", ""),
    "products are not waited for": ("warpgroup_mma_wait(1, deps=[s, acc])", "warpgroup_mma_wait(2, deps=[s, acc])"),
    "one group alone lets go": ("init(k_empty.index(j), count=2)", "init(k_empty.index(j), count=1)"),
    "a group without queries is waited for": ("init(v_empty.index(j), count=1)", "init(v_empty.index(j), count=2)"),
    "values of another step": ("v = v_buffers.index(before % STAGES)", "v = v_buffers.index(i % STAGES)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_machine_sees_faults(name, machine, tmp_path):
    source, (right, wrong) = pathlib.Path(gluon_forward.__file__).read_text(), FAULTS[name]
    assert source.count(right) == 1
    file = tmp_path / "changed.py"
    file.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("changed", file)
    spec.loader.exec_module(changed := importlib.util.module_from_spec(spec))
    layout = Layout.build([60, 20], [[25, 11], [25]])
    q, k, v = (torch.randn(layout.num_tokens, 1, 64).half() for _ in range(3))
    exact, _ = reference.multi_response_attention(*(x.double() for x in (q, k, v)), layout, scale=0.125)

    def is_right(seed, module):
        machine(seed, module=module)
        output, _ = gluon_attention.multi_response_attention(q, k, v, layout, scale=0.125)
        return (output - exact).abs().max() < 3e-3

    with tuning.forced(gluon_forward=SMALL):
        assert is_right(0, gluon_forward)
        with pytest.raises((gluon_machine.Fault, AttributeError, TypeError, AssertionError)):
            for seed in range(8):
                assert is_right(seed, changed)
