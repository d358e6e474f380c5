"""Tile tables made by the collator: those a model asks for, no others, and only where its attention runs in kernels."""

import contextlib
import multiprocessing
import pickle

import pytest
import torch
from family_cases import batch_of, parametrize_families, patched, samples_of

import yojo
from yojo.patching import attention as patched_attention
from yojo.patching import decoders, graphs, tables
from yojo_kernels import Layout, tuning
from yojo_kernels.tables import tables_for

HOPPER = tuning.Machine(90, 132)


@pytest.fixture()
def on_hopper(monkeypatch):
    """A model on the CPU is taken for one on a Hopper GPU, when tables are foreseen."""
    monkeypatch.setattr(tables, "choose_attention", lambda call: ("triton", "it is pretended"))
    monkeypatch.setattr(tuning, "machine_of", lambda device: HOPPER)


@contextlib.contextmanager
def asked(monkeypatch):
    """What attention is called with within it."""
    module, calls = patched_attention, []
    attend = module.multi_response_attention

    def watch(query, key, value, layout, **options):
        if options.get("query_rows") is None:
            calls.append(
                (
                    query.shape[-1],
                    query.shape[1],
                    key.shape[1],
                    options.get("window"),
                    query.dtype,
                    bool(options.get("softcap")),
                )
            )
        return attend(query, key, value, layout, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "multi_response_attention", watch)
        yield calls


@parametrize_families
def test_a_model_asks_for_what_was_foreseen(family, on_hopper, monkeypatch):
    model, collator = patched(family, mode="isolated")
    model.yojo.whole_last_layer = "all layers are to call attention with all rows"
    batch = batch_of(family, collator)
    facts = collator.tables.facts
    with asked(monkeypatch) as calls:
        model(**batch)
    foreseen = {
        (kind.head_dim, kind.num_heads, kind.num_key_heads, kind.window, facts.dtype, kind.capped)
        for kind in facts.layers
    }
    assert foreseen == set(calls) and facts.trains
    made = set(batch["layout"]._tables)
    layout = Layout.build([9], [[3, 4]])
    assert made == {
        key
        for head_dim, *heads, window, dtype, capped in set(calls)
        for key in tables_for(layout, HOPPER, dtype, head_dim, *heads, window, True, capped)
    }


def test_what_is_only_scored_has_no_tables_of_a_backward(on_hopper):
    model, collator = patched("llama", mode="isolated")
    ranked = batch_of("llama", collator)["layout"]
    scored = collator.pack([collator.from_processed(*samples_of("llama")["text"])])["layout"]
    assert sorted(name for name, _ in scored._tables) == ["query_tiles"]
    assert {name for name, _ in ranked._tables} == {"key_tiles", "query_tiles"}
    model.requires_grad_(False)
    frozen = yojo.Collator(collator.processor, model)
    assert sorted(name for name, _ in batch_of("llama", frozen)["layout"]._tables) == ["query_tiles"]


def test_tables_are_those_that_would_have_been_made(on_hopper):
    """And what they are made from stays behind: it is larger than they are."""
    _, collator = patched("gemma3", mode="isolated")
    layout = batch_of("gemma3", collator)["layout"]
    kept = dict(layout._tables)
    layout._tables.clear()
    assert any(settings[-1] for _, settings in kept) and all(name != "position_extremes" for name, _ in kept)
    for key, made in kept.items():
        anew = layout.table(key)
        for one, other in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (made, anew)), strict=True):
            assert one.dtype == torch.int32 and torch.equal(one, other)


def test_a_pass_finds_them_and_makes_none(on_hopper, monkeypatch):
    _, collator = patched("gemma3", mode="isolated")
    layout = batch_of("gemma3", collator)["layout"]
    for name in ("query_tiles", "key_tiles", "position_extremes"):
        monkeypatch.setattr(torch.ops.yojo, name, None)  # nothing is made anew from here on
    for there in (layout, layout.for_one_pass(), pickle.loads(pickle.dumps(layout)), layout.to("meta")):
        for kind in collator.tables.facts.layers:
            heads = kind.num_heads, kind.num_key_heads
            for key in tables_for(there, HOPPER, torch.float32, kind.head_dim, *heads, kind.window, True, kind.capped):
                there.table(key)
    with_pass = layout.for_one_pass()
    for key in layout._tables:
        with_pass.table(key)
    assert set(with_pass.tables_of_pass) == set(layout._tables)  # noted, too


def test_without_kernels_none_are_made():
    model, collator = patched("llama", mode="isolated")
    assert collator.tables.facts is None and not batch_of("llama", collator)["layout"]._tables


def test_rows_that_flash_attention_takes_need_none(monkeypatch):
    monkeypatch.setattr(tuning, "machine_of", lambda device: HOPPER)
    monkeypatch.setattr(tables, "choose_attention", lambda call: ("flash" if call.causal else "triton", ""))
    for family, expected in (("llama", 0), ("mistral", 1)):  # the second slides
        _, collator = patched(family)
        row = collator.pack([collator.from_processed(*samples_of(family)["text"])])
        assert row["layout"].causal and len(row["layout"]._tables) == expected
    _, collator = patched("llama", mode="isolated")
    row = collator.pack([collator.from_processed(*samples_of("llama")["text"])])
    assert not row["layout"].causal and len(row["layout"]._tables) == 1


def test_facts_follow_the_model(on_hopper, monkeypatch):
    model, collator = patched("llama", mode="isolated")
    assert collator.tables.facts.dtype == torch.float32
    model.to(torch.bfloat16)
    collator.tables.look()
    assert collator.tables.facts.dtype == torch.bfloat16
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        collator.tables.look()
    assert collator.tables.facts.dtype == torch.bfloat16
    batch_of("llama", collator)
    assert collator.tables.facts.dtype == torch.float32
    collator.tables.look(torch.float16)  # a trainer's precision: it is not set yet, when loaders are made
    batch_of("llama", collator)
    assert collator.tables.facts.dtype == torch.float16


def test_a_copy_keeps_the_facts_and_a_model_of_its_own_is_asked(on_hopper):
    model, collator = patched("llama", mode="isolated")
    twin = pickle.loads(pickle.dumps(collator))
    model.to(torch.bfloat16)
    assert batch_of("llama", twin)["layout"]._tables.keys() and twin.tables.facts.dtype == torch.float32
    assert twin.tables._base is None
    twin.tables.follow(model)
    twin.tables.look()
    assert twin.tables.facts.dtype == torch.bfloat16


def made_in_a_worker(collator, results):
    def refuse(*arguments):
        raise AssertionError("a worker has no device to ask")

    tables.facts_of = refuse
    results.put(sorted(batch_of("llama", collator)["layout"]._tables))


def test_a_forked_worker_does_not_ask_the_device(on_hopper):
    model, collator = patched("llama", mode="isolated")
    expected = sorted(batch_of("llama", collator)["layout"]._tables)
    model.to(torch.bfloat16)  # it would notice
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    worker = context.Process(target=made_in_a_worker, args=(collator, results))
    worker.start()
    assert results.get(timeout=60) == expected
    worker.join()


def test_every_family_says_whether_it_slides():
    """`asking` reads the window where the attention module has it."""
    model, _ = patched("gemma3")
    windows = {tables.asking(module).window for module in decoders.attention_modules(model)}
    assert None in windows and len(windows) == 2


def test_rows_that_ask_for_other_tables_have_other_graphs(on_hopper, monkeypatch):
    """A kernel may be launched with other tiles where a row's lengths are others: its scores are to be the same again."""
    model, collator = patched("llama", mode="isolated", graphs=256)
    monkeypatch.setattr(graphs, "BUCKET", 64)
    monkeypatch.setattr(model.yojo.fusion.graphs, "capture", lambda call: call)
    batch = collator.pack([collator.from_processed(*samples_of("llama")["text"])], pad_to_multiple_of=64)
    with torch.no_grad():
        model(**batch)
        with tuning.forced(forward=tuning.Tile(64, 32, 4, 1)):
            model(**batch)
        model(**batch)
    asked = [key[-1] for key in model.yojo.fusion.graphs.frames]
    packed = 2  # heads of the group
    assert asked == [(("query_tiles", (32 // packed, 16, 0)),), (("query_tiles", (64 // packed, 32, 0)),)]
