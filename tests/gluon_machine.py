"""Runs the Gluon forward's own code without a GPU: partitions as threads, barriers, copies and products as on Hopper.

Gluon has no interpreter. Here its kernel functions are run as the Python they are written in, with a language of
stand-ins on torch tensors. What is asynchronous is so here: a copy may arrive, and a product may read its operands, at
any time between its start and the wait for it; what is copied into holds garbage meanwhile. Which partition goes on, and
what completes, is drawn by a seed. Fails on a deadlock, on a barrier that more arrive at than it counts, on values used
before they are waited for, and on a copy that is still on the way when the program ends.
"""

import functools
import random
import threading
import types

import torch
import triton

from yojo_kernels import gluon_forward

KERNEL = gluon_forward.gluon_forward_kernel


def garbage(shape):
    """What memory holds that nothing was written to. Not NaN: sums that are NaN are made once more."""
    return 9 * torch.randn(shape)


class Fault(Exception):
    """The program would hang or read what is not there."""


class Barrier:
    """An mbarrier: a phase ends once `count` have arrived and all expected bytes are there."""

    def __init__(self):
        self.count = None

    def begin(self, count):
        self.count = self.missing = count
        self.bytes = self.phase = 0

    def change(self, arrivals=0, bytes=0):
        if self.count is None:
            raise Fault("a barrier is used before it is initialised")
        self.missing -= arrivals
        self.bytes += bytes
        if self.missing < 0:
            raise Fault("more arrive at a barrier than it counts")
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.count

    def passed(self, parity):
        if self.count is None:
            raise Fault("a barrier is waited for before it is initialised")
        return self.phase % 2 != int(parity)


class Shared:
    """A view of shared memory."""

    def __init__(self, data):
        self.data = data
        self.dtype = data.dtype

    def index(self, i):
        return Shared(self.data[int(i)])

    def reshape(self, shape):
        return Shared(self.data.view(shape))

    def permute(self, order):
        return Shared(self.data.permute(order))

    def store(self, value):
        assert value.dtype == self.dtype and value.shape == self.data.shape
        self.data.copy_(value)

    def load(self, layout):
        return self.data.clone()


class Barriers:
    """Several barriers in shared memory."""

    def __init__(self, count):
        self.all = [Barrier() for _ in range(count)]

    def index(self, i):
        return self.all[int(i)]


class Product:
    """A matrix product on its way; `value` is None until it is done."""

    def __init__(self, a, b, acc):
        self.a, self.b, self.acc, self.value = a, b, acc, None

    def finish(self):
        a, b = (x.data if isinstance(x, Shared) else x for x in (self.a, self.b))
        acc = self.acc.value if isinstance(self.acc, Product) else self.acc
        self.value = a.float() @ b.float() if acc is None else acc + a.float() @ b.float()


class Pointer:
    def __init__(self, data, offset=0):
        self.data, self.offset = data, offset

    def __add__(self, more):
        return Pointer(self.data, self.offset + more)


class Partition(threading.Thread):
    """The code of some warps. It runs only between `resume` and its next `pause`."""

    def __init__(self, machine, function, arguments):
        super().__init__(daemon=True)
        self.machine, self.function, self.arguments = machine, function, arguments
        self.go, self.ready = threading.Semaphore(0), None
        self.products, self.error, self.done = [], None, False

    def run(self):
        self.go.acquire()
        try:
            if not self.machine.stopped:
                self.function(*self.arguments)
        except BaseException as error:  # handed to the one who waits for this partition
            self.error = error
        self.done = True
        self.machine.back.release()

    def pause(self, ready=None):
        self.ready = ready
        self.machine.back.release()
        self.go.acquire()
        if self.machine.stopped:
            raise Fault("stopped")

    def resume(self):
        self.go.release()
        self.machine.back.acquire()
        if self.error is not None:
            raise self.error


class Machine:
    """One program at a time."""

    def __init__(self, seed=0):
        self.random = random.Random(seed)
        self.back, self.stopped, self.copies, self.steps = threading.Semaphore(0), False, [], 0
        self.of_thread = {}

    def warp_specialize(self, functions_and_args, worker_num_warps, worker_num_regs):
        assert len(functions_and_args) == len(worker_num_warps) + 1 == len(worker_num_regs) + 1
        partitions = [Partition(self, *each) for each in functions_and_args]
        for partition in partitions:
            partition.start()
            self.of_thread[partition.ident] = partition
        try:
            # Who goes first is drawn anew for each program: partitions one by one, copies, products.
            rank = self.random.sample(range(len(partitions) + 2), len(partitions) + 2)
            while open_ := [partition for partition in partitions if not partition.done]:
                able = [
                    (rank[partitions.index(each)], each.resume) for each in open_ if each.ready is None or each.ready()
                ]
                if self.copies:
                    able.append((rank[-1], functools.partial(self.arrive, self.random.choice(self.copies))))
                if not able:
                    raise Fault("deadlock: all partitions wait, and nothing is on the way")
                started = [each.products[0] for each in open_ if each.products and each.products[0].value is None]
                able += [(rank[-2], product.finish) for product in started]
                self.steps += 1
                best = min(able, key=lambda each: each[0])
                (best if self.random.random() < 0.9 else self.random.choice(able))[1]()
        finally:
            self.stopped = True
            for partition in partitions:
                partition.go.release()
                partition.join()
            self.stopped = False
            self.back = threading.Semaphore(0)
        if self.copies:
            raise Fault("a copy is on the way to shared memory when the program ends")

    def arrive(self, copy):
        barrier, target, data = copy
        self.copies.remove(copy)
        target.data.copy_(data.view(target.data.shape))
        barrier.change(bytes=-data.numel() * data.element_size())

    def pause(self, ready=None):
        self.of_thread[threading.get_ident()].pause(ready)

    # ---- mbarrier, tma and matrix instructions ----

    def wait(self, barrier, phase, pred=True):
        if pred:
            self.pause(lambda: barrier.passed(phase))

    def arrive_at(self, barrier, pred=True):
        self.pause()
        if pred:
            barrier.change(arrivals=1)

    def expect(self, barrier, bytes, pred=True):
        if pred:
            barrier.change(arrivals=1, bytes=bytes)

    def copy(self, descriptor, where, barrier, target, pred=True):
        self.pause()
        if not pred:
            return
        head, row, column = map(int, where)
        assert column == 0 and 0 <= head < descriptor.shape[0]
        assert list(target.data.shape) == list(descriptor.block_shape)
        source = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
        data = torch.zeros(descriptor.block_shape, dtype=source.dtype)
        there = source[head, row : row + descriptor.block_shape[1]]
        data[0, : there.shape[0]] = there
        target.data.copy_(garbage(target.data.shape))
        self.copies.append((barrier, target, data))

    def multiply(self, a, b, acc, use_acc=True, is_async=False):
        self.pause()
        own = self.of_thread[threading.get_ident()]
        assert is_async and (isinstance(a, Shared) or a.dtype == b.dtype)
        own.products.append(Product(a, b, acc if use_acc else None))
        return own.products[-1]

    def multiply_wait(self, num_outstanding, deps):
        self.pause()
        products = self.of_thread[threading.get_ident()].products
        while len(products) > num_outstanding:
            product = products.pop(0)
            if product.value is None:
                product.finish()
        found = [each if each in products else each.value for each in deps]
        return found[0] if len(found) == 1 else found


def _load(pointer, mask=None, other=None):
    if mask is None:
        return pointer.data[pointer.offset]
    return torch.where(mask, pointer.data[torch.where(mask, pointer.offset, 0)], other)


def _store(pointer, value, mask):
    mask = mask.expand(value.shape)
    pointer.data[pointer.offset[mask]] = value[mask].to(pointer.data.dtype)


def _reduced(x, axis):
    return torch.where(x.isnan(), float("-inf"), x).amax(axis)  # a maximum on the device drops NaN


def _tensor(x):
    return x if isinstance(x, torch.Tensor) else torch.tensor(x)


def language(machine, program):
    """What `gl` is to the kernel's code."""
    layouts = ("SliceLayout", "NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout")

    def allocate(dtype, shape, layout):
        return Barriers(shape[0]) if dtype == torch.int64 else Shared(garbage(shape).to(dtype))

    return types.SimpleNamespace(
        **dict.fromkeys(layouts, lambda *arguments: None),
        float32=torch.float32, int64=torch.int64, uint32=torch.int64,
        program_id=lambda axis: torch.tensor(program),
        arange=lambda start, end, layout: torch.arange(start, end),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        convert_layout=lambda x, layout: x,
        where=lambda condition, x, y: torch.where(_tensor(condition), x, y),
        maximum=lambda x, y: torch.fmax(_tensor(x), _tensor(y)),
        minimum=lambda x, y: torch.fmin(_tensor(x), _tensor(y)),
        max=_reduced, sum=lambda x, axis: x.sum(axis), exp2=torch.exp2, log2=torch.log2, abs=torch.abs,
        load=_load, store=_store, static_range=range,
        allocate_shared_memory=allocate, warp_specialize=machine.warp_specialize,
    )  # fmt: skip


class Kernel:
    """Stands for `gluon_forward.gluon_forward_kernel`: launched alike, it runs all programs one after another.

    Args:
        seed: of what completes and goes on when.
        group_m: queries of a warp group; 64 by default, as on the device.
        module: a changed copy of `gluon_forward`.
    """

    def __init__(self, seed=0, group_m=None, module=gluon_forward):
        self.machine, self.group_m, self.launches = Machine(seed), group_m, 0
        self.functions = dict(vars(module))
        if module is gluon_forward:
            self.functions["gluon_forward_kernel"] = KERNEL
        for name, value in self.functions.items():
            if isinstance(value, triton.runtime.JITFunction):
                self.functions[name] = types.FunctionType(value.fn.__code__, self.functions, name)
            elif isinstance(value, triton.language.constexpr):
                self.functions[name] = value.value
        machine = self.machine
        self.functions |= {
            "mbarrier": types.SimpleNamespace(
                init=lambda barrier, count: barrier.begin(count),
                MBarrierLayout=lambda: None,
                wait=machine.wait,
                arrive=machine.arrive_at,
                expect=machine.expect,
            ),
            "tma": types.SimpleNamespace(async_copy_global_to_shared=machine.copy),
            "fence_async_shared": lambda: None,
            "warpgroup_mma": machine.multiply,
            "warpgroup_mma_wait": machine.multiply_wait,
        }
        if group_m is not None:
            self.functions["GROUP_M"] = group_m

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.run(grid, arguments, options)

    def run(self, grid, arguments, options):
        assert options.pop("num_warps") == 4
        self.launches += 1
        for program in range(grid[0]):
            self.functions["gl"] = language(self.machine, program)
            given = {name: self.argument(name, value) for name, value in zip(KERNEL.arg_names, arguments, strict=False)}
            self.functions["gluon_forward_kernel"](**given, **options)

    def argument(self, name, value):
        if name.endswith("_desc"):
            block = list(value.block_shape)
            if name == "q_desc" and self.group_m is not None:
                block[1] = self.group_m
            return types.SimpleNamespace(
                base=value.base, shape=value.shape, strides=value.strides, block_shape=block,
                dtype=value.base.dtype, layout=None,
            )  # fmt: skip
        if isinstance(value, torch.Tensor):
            assert value.is_contiguous()
            return Pointer(value.view(-1))
        return torch.tensor(value)
