"""What makes calls cheap for the host changes nothing: checks, tiles, the device that is launched on."""

import itertools

import pytest
import torch

import yojo_kernels
from yojo_kernels import Layout, multi_response_attention, tuning

LAYOUT = Layout.build([4], [[2]])
GOOD = {"query": (6, 4, 8), "key": (6, 2, 8), "value": (6, 2, 8)}
WRONG = [
    {"query": (5, 4, 8)}, {"query": (6, 3, 8)}, {"query": (6, 4, 7)}, {"query": (6, 4)}, {"query": (6, 4, 8, 1)},
    {"key": (5, 2, 8)}, {"key": (6, 2, 7)}, {"key": (6, 0, 8)}, {"key": (6, 1, 8)}, {"key": (6, 2, 8, 1)}, {"key": (6, 2)},
    {"value": (7, 2, 8)}, {"value": (6, 1, 8)}, {"value": (6, 2, 9)}, {"value": (6, 2, 8, 1)},
    {"key": (6, 0, 8), "value": (6, 0, 8)}, {"key": (6, 3, 8), "value": (6, 3, 8)}, {"key": (6, 8, 8), "value": (6, 8, 8)},
    {"query": (6, 4, 0), "key": (6, 2, 0), "value": (6, 2, 0)}, {"query": (6,), "key": (6,), "value": (6,)},
    {"query": (5, 4, 8), "key": (5, 2, 8), "value": (5, 2, 8)}, {"query": (), "key": (), "value": ()},
]  # fmt: skip


def is_right(*arguments):
    try:
        yojo_kernels._check_attention(*arguments, False)
    except (TypeError, ValueError):
        return False
    return True


def tensors(shapes=GOOD, **others):
    """query, key, value and layout, some of them replaced."""
    made = {name: torch.zeros(shapes[name]) for name in GOOD} | {"layout": LAYOUT} | others
    return [made[name] for name in ("query", "key", "value", "layout")]


def test_the_short_check_lets_pass_what_the_long_one_does():
    """The long one says what is wrong, and is asked where the short one fails."""
    calls = [tensors(GOOD | wrong) for wrong in WRONG]
    odd = [torch.zeros(6, 2, 8, dtype=dtype) for dtype in (torch.float64, torch.int64, torch.bool, torch.cfloat)]
    odd += [torch.zeros(6, 2, 8, device="meta"), None, [[1.0]], 3]
    for name, one in itertools.product(GOOD, odd):
        calls.append(tensors(**{name: one}))
    calls += [tensors(layout=one) for one in (None, LAYOUT.sample, "a layout", Layout.build([3], [[2]]))]
    calls += [tensors(**dict.fromkeys(GOOD, one)) for one in odd[1:4]]
    for arguments in calls:
        assert not is_right(*arguments) and not yojo_kernels.fits(*arguments), arguments
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        right = [tensor.to(dtype) for tensor in tensors()[:3]]
        assert is_right(*right, LAYOUT) and yojo_kernels.fits(*right, LAYOUT)
    one_head = tensors(GOOD | {"key": (6, 1, 8), "value": (6, 1, 8)})
    assert is_right(*one_head) and yojo_kernels.fits(*one_head)


def test_wrong_calls_are_refused():
    for wrong in WRONG:
        with pytest.raises(ValueError):
            multi_response_attention(*tensors(GOOD | wrong))
    rows = torch.tensor([1, 5])
    multi_response_attention(*tensors(GOOD | {"query": (2, 4, 8)}), query_rows=rows)
    with pytest.raises(ValueError, match="query_rows must name the row of each of the 6 queries, got 2"):
        multi_response_attention(*tensors(), query_rows=rows)


def test_tiles_are_looked_up_once(monkeypatch):
    monkeypatch.setattr(tuning, "capability", lambda device: (9, 0))
    device = torch.device("cuda", 0)
    forced = tuning.Tile(16, 16, 1, 1)
    for kernel, head_dim in itertools.product(("forward", "query_grad", "key_grad"), (16, 72, 128, 256)):
        for _ in range(2):
            usual = tuning.attention(kernel, head_dim, torch.bfloat16, device)
            assert usual == tuning.tile(kernel, head_dim, torch.bfloat16, 90)
            with tuning.forced(**{kernel: forced}):
                assert tuning.attention(kernel, head_dim, torch.bfloat16, device) is forced
    monkeypatch.setattr(tuning, "capability", lambda device: (8, 0))  # another device
    assert tuning.attention("forward", 128, torch.bfloat16, device) == tuning.tile("forward", 128, torch.bfloat16, 80)


def test_a_device_is_asked_once_what_it_is(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    for cached in (tuning._capability, tuning._processors):
        assert cached.cache_info().currsize == 0  # there is no GPU here
    assert tuning.capability(torch.device("cuda")) == (9, 0)  # whichever is current: it is not kept
    assert tuning._capability.cache_info().currsize == 0 and asked == [torch.device("cuda")]


def test_launches_are_on_the_device_of_the_tensors(monkeypatch):
    launch = pytest.importorskip("yojo_kernels.launch")
    switched = []

    class Switch:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            switched.append(self.device.index)

        def __exit__(self, *error):
            switched.append(None)

    monkeypatch.setattr(torch.cuda, "device", Switch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for device in ("cpu", "cuda:1", "cuda:0"):
        with launch.on(torch.device(device)):
            pass
    assert switched == [0, None]
