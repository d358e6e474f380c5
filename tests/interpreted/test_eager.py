"""Direct calls of the operators: the same results and errors as through the dispatcher, which is asked wherever it is needed."""

import contextlib

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from yojo_kernels import Layout, attention, eager, head, listwise_loss, loss, multi_response_attention, score_head

LAYOUT = Layout.build([5], [[3, 2]])
OPERATORS = {
    "attention": (attention.attention, attention.attention_backward),
    "head": (head._score_head, head._score_head_backward),
    "loss": (loss._listwise_loss,),
}


def case(name):
    """(function of its differentiable inputs, those inputs, gradient of its output)."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    if name == "attention":
        run = lambda q, k, v: multi_response_attention(q, k, v, LAYOUT, scale=0.3, impl="triton")  # noqa: E731
        return run, [make(10, 2, 16), make(10, 1, 16), make(10, 1, 16)], make(10, 2, 16)
    if name == "head":
        rows = torch.tensor([7, 9, 7])
        run = lambda hidden, *weights: score_head(hidden, rows, *weights, scale=2.0, impl="triton")  # noqa: E731
        return run, [make(10, 8), make(12, 8), make(12), make(1, 12), make(1)], make(3)
    rankings, offsets = torch.tensor([2, 1, 3]), torch.tensor([0, 3])
    return lambda scores: listwise_loss(scores, rankings, offsets, impl="triton"), [make(3)], make(())


@pytest.fixture()
def asked(monkeypatch):
    """The operators that went through the dispatcher since, by name."""
    names = []

    def spy(operator):
        dispatched = operator._dispatched
        monkeypatch.setattr(
            operator, "_dispatched", lambda *args: names.append(dispatched.__name__) or dispatched(*args)
        )

    for operators in OPERATORS.values():
        for operator in operators:
            spy(operator)
    return names


def both_ways(monkeypatch, make):
    """What `make()` gives, directly and through the dispatcher; an error as its type and first line."""

    def outcome():
        try:
            return make()
        except (RuntimeError, NotImplementedError) as error:
            return [type(error), str(error).split("\n")[0]]

    direct = outcome()
    with monkeypatch.context() as patch:
        patch.setattr(eager, "passes_by", lambda *arguments: False)
        return direct, outcome()


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


def leaves(inputs, wanted=None):
    return [x.clone().requires_grad_(wanted is None or i in wanted) for i, x in enumerate(inputs)]


# ---- where it is direct ----


@pytest.mark.parametrize("name", OPERATORS)
def test_plain_calls_are_direct(name, asked):
    run, inputs, grad = case(name)
    with torch.no_grad():
        run(*inputs)
    with torch.inference_mode():
        assert run(*inputs).is_inference()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(*inputs)
    output = run(*[torch.nn.Parameter(x) for x in inputs])
    assert output.requires_grad
    output.backward(grad)
    assert not asked


class Seen(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "mode",
    [
        Seen,
        lambda: FlopCounterMode(display=False),
        torch.profiler.profile,
        torch.autograd.forward_ad.dual_level,
        torch._C._AutoDispatchBelowAutograd,
    ],
)
@pytest.mark.parametrize("name", OPERATORS)
def test_what_looks_at_calls_sees_them(name, mode, asked, monkeypatch):
    run, inputs, _ = case(name)

    def make():
        with mode():
            output = run(*leaves(inputs))
        return [output, output.requires_grad]

    direct, dispatched = both_ways(monkeypatch, make)
    same(direct, dispatched)
    assert len(asked) == 2


def test_a_profile_names_the_operators():
    run, inputs, grad = case("attention")
    with torch.profiler.profile() as profile:
        run(*leaves(inputs)).backward(grad)
    assert {"yojo::attention", "yojo::attention_backward"} <= {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("trace", [torch.jit.trace, lambda f, x: make_fx(f)(*x), lambda f, x: make_fx(f, pre_dispatch=True)(*x)])  # fmt: skip
def test_tracers_see_operators(trace, asked):
    run, inputs, _ = case("attention")
    graph = trace(run, tuple(inputs))
    assert "yojo" in str(graph.graph) and "attention" in asked
    assert torch.equal(graph(*inputs), run(*inputs))


def test_a_subclass_is_dispatched(asked):
    run, inputs, _ = case("head")
    output = run(inputs[0].as_subclass(Subclass), *inputs[1:])
    assert isinstance(output, Subclass) and asked == ["score_head"]


def test_a_tensor_that_is_negated_when_it_is_read(asked):
    run, inputs, grad = case("attention")
    query = torch.complex(inputs[0], -inputs[0]).conj().imag
    assert query.is_neg() and torch.equal(query, inputs[0])
    assert torch.equal(run(query, *inputs[1:]), run(*inputs)) and asked == ["attention"]
    asked.clear()
    tensors = leaves(inputs)
    output = run(*tensors)
    negated = torch.complex(grad, -grad).conj().imag
    expected = torch.autograd.grad(output, tensors, grad, retain_graph=True)
    same(torch.autograd.grad(output, tensors, negated, retain_graph=True), expected)
    assert asked == ["attention_backward"]
    nothing = torch.autograd.grad(output, tensors, torch._efficientzerotensor(grad.shape))
    assert not any(x.any() for x in nothing) and len(asked) == 2


# ---- the same results, the same errors ----


@pytest.mark.parametrize("name", OPERATORS)
def test_results_and_every_choice_of_gradients(name, monkeypatch):
    run, inputs, grad = case(name)
    for wanted in ({i} for i in range(len(inputs))):

        def make(wanted=wanted):
            tensors = leaves(inputs, wanted)
            output = run(*tensors)
            output.backward(grad, retain_graph=True)
            first = [x.grad.clone() for i, x in enumerate(tensors) if i in wanted]
            output.backward(grad)
            return [output, *first, *(x.grad for i, x in enumerate(tensors) if i in wanted), *(x.grad is None for x in tensors)]  # fmt: skip

        same(*both_ways(monkeypatch, make))


def freed(run, inputs, grad):
    output = run(*inputs)
    output.backward(grad)
    output.backward(grad)


def changed(run, inputs, grad):
    """An input that the backward needs is written to."""
    output = run(*inputs)
    with torch.no_grad():
        inputs[0].add_(1)
    return torch.autograd.grad(output, inputs, grad)


def second_derivative(run, inputs, grad):
    first = torch.autograd.grad(run(*inputs), inputs, grad.requires_grad_(), create_graph=True)
    return torch.autograd.grad(sum(x.sum() for x in first), inputs)


def under_hooks(run, inputs, grad):
    packed = []

    def pack(x):
        packed.append(list(x.shape))
        return x.double() if x.is_floating_point() else x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.float() if x.is_floating_point() else x):
        output = run(*inputs)
    return [*torch.autograd.grad(output, inputs, grad), packed]


def under_anomaly_detection(run, inputs, grad):
    with torch.autograd.detect_anomaly(check_nan=True):
        return torch.autograd.grad(run(*inputs), inputs, grad)


USES = {
    "freed": freed,
    "changed": changed,
    "second derivative": second_derivative,
    "create_graph": lambda run, inputs, grad: torch.autograd.grad(run(*inputs), inputs, grad, create_graph=True),
    "hooks": under_hooks,
    "anomaly": under_anomaly_detection,
    "checkpoint": lambda run, inputs, grad: torch.autograd.grad(checkpoint(run, *inputs, use_reentrant=False), inputs, grad),
    "reentrant": lambda run, inputs, grad: checkpoint(run, *inputs, use_reentrant=True).backward(grad)
    or [x.grad for x in inputs],
    "func.grad": lambda run, inputs, grad: [torch.func.grad(lambda x: (run(x, *inputs[1:]) * grad).sum())(inputs[0].detach())],
    "vjp": lambda run, inputs, grad: torch.func.vjp(run, *[x.detach() for x in inputs])[1](grad),
    "vmap": lambda run, inputs, grad: [torch.vmap(lambda x: run(x, *inputs[1:]))(torch.stack([inputs[0]] * 2))],
    "jvp": lambda run, inputs, grad: torch.func.jvp(run, tuple(inputs), tuple(inputs)),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", OPERATORS)
def test_uses_of_autograd(name, use, monkeypatch):
    def make():
        run, inputs, grad = case(name)
        return USES[use](run, leaves(inputs), grad)

    direct, dispatched = both_ways(monkeypatch, make)
    same(direct, dispatched)
    if use in ("freed", "second derivative"):
        assert direct[0] is RuntimeError, direct


def test_the_gradient_of_the_log_sum_exp_alone(monkeypatch):
    _, inputs, _ = case("attention")

    def make():
        tensors = leaves(inputs)
        lse = multi_response_attention(*tensors, LAYOUT, return_lse=True, impl="triton")[1]
        return torch.autograd.grad(lse.sum(), tensors)

    same(*both_ways(monkeypatch, make))


def test_what_runs_eagerly_within_a_compiled_function_is_dispatched(asked):
    run, inputs, _ = case("attention")
    graphs = []

    @torch.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    def step(q, k, v):
        q = q + 1
        torch._dynamo.graph_break()
        return run(q, k, v) * 2

    assert torch.equal(step(*inputs), run(inputs[0] + 1, *inputs[1:]) * 2)
    assert any("attention" in str(node.target) for graph in graphs for node in graph.graph.nodes)
    assert not any("kernel" in str(node.target) for graph in graphs for node in graph.graph.nodes)


def test_each_thread_for_itself(asked):
    """A mode of one thread is not one of another."""
    import threading

    run, inputs, _ = case("loss")
    found = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(FlopCounterMode(display=False))
        thread = threading.Thread(target=lambda: found.append(run(*inputs)))
        thread.start()
        thread.join()
        assert not asked
        assert torch.equal(run(*inputs), found[0]) and asked == ["listwise_loss"]
