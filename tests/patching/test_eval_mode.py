"""Eval mode from row to row: the modules are listed once a call, and anew wherever the tree is another.

A list that lacks a module leaves its dropout on, and the scores are wrong without a word. Threads: tests/patching/test_pickle.py.
"""

import concurrent.futures

import pytest
from family_cases import PARITY, patched
from torch import nn

import yojo
from yojo.patching import eval_mode
from yojo.patching.eval_mode import EvalMode, Modules

EXAMPLES = [yojo.Example("w1 w2", ["w3 w4", "w5"]), yojo.Example("w6", ["w7", "w8 w9", "w1"])] * 3
ROWS = 5


@pytest.fixture()
def walks(monkeypatch):
    """The models that were walked, in order."""
    walked, walk = [], eval_mode._modules_of
    monkeypatch.setattr(eval_mode, "_modules_of", lambda model: walked.append(model) or walk(model))
    return walked


def reward_model_of(family="llama"):
    model, collator = patched(family, mode="isolated")
    return yojo.RewardModel(model, collator.processor)


def scored(reward_model, between=None):
    """Scores of `ROWS` rows of one call; `between`: place -> what is done before that
    example is given; the row before it is begun behind that."""

    def given():
        for place, example in enumerate(EXAMPLES[:ROWS]):
            if between and place in between:
                between[place]()
            yield example

    return reward_model.score_many(given(), token_budget=1)


def same(found, expected):
    return all((one - other).abs().max() <= PARITY for one, other in zip(found, expected, strict=True))


def test_the_rows_of_a_call_are_walked_once(walks):
    reward_model = reward_model_of()
    expected = [reward_model.score_many([example])[0] for example in EXAMPLES[:ROWS]]
    assert len(walks) == ROWS
    walks.clear()
    assert same(scored(reward_model), expected)
    assert walks == [reward_model.model]
    walks.clear()
    scored(reward_model)
    assert walks == [reward_model.model]  # nothing is kept, or kept alive, behind a call


def with_dropout(layer):
    return nn.Sequential(layer, nn.Dropout(0.5)).train()


def inserted(mlp):
    parts = nn.ModuleList([mlp.down_proj]).eval()
    mlp.down_proj = nn.Sequential(nn.Identity(), *parts).eval()
    mlp.down_proj.insert(0, nn.Dropout(0.5))


REPLACED = {
    "attribute": lambda mlp: setattr(mlp, "down_proj", with_dropout(mlp.down_proj)),
    "add_module": lambda mlp: mlp.add_module("down_proj", with_dropout(mlp.down_proj)),
    "set_submodule": lambda mlp: mlp.set_submodule("down_proj", with_dropout(mlp.down_proj)),
    "the dict": lambda mlp: mlp._modules.__setitem__("down_proj", with_dropout(mlp.down_proj)),
    "another dict": lambda mlp: setattr(mlp, "_modules", {**mlp._modules, "down_proj": with_dropout(mlp.down_proj)}),
    "insert": inserted,
    "as many": lambda mlp: setattr(mlp, "act_fn", nn.Dropout(0.5)),
}


@pytest.mark.parametrize("how", REPLACED)
def test_dropout_that_comes_between_rows_is_off(how, walks):
    """Three rows in, one module becomes another, in training mode: whoever changes a model while it is scored."""
    reward_model = reward_model_of()
    before, mlp = scored(reward_model), reward_model.model.get_decoder().layers[0].mlp
    walks.clear()
    found = scored(reward_model, {3: lambda: REPLACED[how](mlp)})
    assert 2 <= len(walks) <= 3
    assert any(isinstance(module, nn.Dropout) and module.training for module in mlp.modules())  # as it was given
    after = scored(reward_model)
    assert same(found[:3], before[:3]) and same(found[3:], after[3:])
    assert same(found, before) == (how != "as many")


def test_an_adapter_that_comes_between_rows_has_no_dropout(walks):
    from peft import LoraConfig, get_peft_model

    reward_model = reward_model_of()
    before, settings = scored(reward_model), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)  # fmt: skip
    walks.clear()
    found = scored(reward_model, {3: lambda: get_peft_model(reward_model.model, settings)})
    assert len(walks) == 2
    after = scored(reward_model)
    assert same(found[:3], before[:3]) and same(found[3:], after[3:]) and not same(after, before)


def test_training_mode_between_rows_is_the_callers(walks):
    """A generator that trains what it scores with: each row is in eval mode, and what is between them is not."""
    reward_model, seen = reward_model_of(), []
    layers = reward_model.model.get_decoder().layers
    layers[0].mlp.down_proj = nn.Sequential(layers[0].mlp.down_proj, nn.Dropout(0.5))
    reward_model.model.eval()
    expected = scored(reward_model)
    walks.clear()

    def train():
        reward_model.model.train()
        layers[1].eval()

    def look():
        seen.append((reward_model.model.training, layers[0].mlp.down_proj[1].training, layers[1].training))

    assert same(scored(reward_model, {2: train, 3: look, 4: look}), expected)
    assert len(walks) == 1 and seen == [(True, True, False)] * 2
    look()
    assert seen[-1] == (True, True, False) and not reward_model.model.yojo.eval_mode.inside


def test_an_error_between_rows_leaves_nothing_behind():
    reward_model = reward_model_of()
    reward_model.model.train()
    with pytest.raises(ZeroDivisionError):
        scored(reward_model, {3: lambda: 1 // 0})
    assert all(module.training for module in reward_model.model.modules())
    assert not reward_model.model.yojo.eval_mode.inside


def test_threads_have_lists_of_their_own():
    reward_model = reward_model_of()
    mlp = reward_model.model.get_decoder().layers[0].mlp
    mlp.down_proj = with_dropout(mlp.down_proj)
    expected = scored(reward_model)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: scored(reward_model), range(12)):
            assert same(found, expected)
    assert mlp.down_proj[1].training and not reward_model.model.yojo.eval_mode.inside


# ---- the list ----


def tree():
    shared = nn.Linear(1, 1)
    model = nn.Sequential(
        nn.ModuleList([nn.Linear(1, 1), nn.Dropout()]), nn.ModuleDict({"a": nn.ReLU()}), shared, shared
    )
    model.register_module("none", None)
    return model


def insert(model):
    model[0].insert(1, nn.Dropout())


CHANGES = {
    "a leaf gets a child": lambda model: model[0][0].add_module("late", nn.Dropout()),
    "insert": insert,
    "append": lambda model: model[0].append(nn.Dropout()),
    "delete": lambda model: model[0].__delitem__(0),
    "pop": lambda model: model[1].pop("a"),
    "a dict's child": lambda model: model[1].update({"b": nn.Dropout()}),
    "in place of None": lambda model: setattr(model, "none", nn.Dropout()),
    "by None": lambda model: setattr(model, "2", None),
    "one of two places": lambda model: setattr(model, "3", nn.Dropout()),
    "for another": lambda model: setattr(model[0], "1", nn.Dropout()),
    "direct": lambda model: model[1]._modules.__setitem__("a", nn.Dropout()),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_tree_that_changes_is_walked_anew(how, walks):
    model, modules = tree(), Modules()
    first = modules.of(model)
    assert first[0] is model and len(first) == len(list(model.modules())) and set(first) == set(model.modules())
    assert modules.of(model) is first and len(walks) == 1
    CHANGES[how](model)
    found = modules.of(model)
    assert len(walks) == 2 and len(found) == len(list(model.modules())) and set(found) == set(model.modules())
    assert modules.of(model) is found and len(walks) == 2


def test_children_that_change_places_are_all_listed():
    model, modules = tree(), Modules()
    modules.of(model)
    first, second = model[0], model[1]
    first.add_module("moved", second._modules.pop("a"))
    assert set(modules.of(model)) == set(model.modules())
    model._modules["0"], model._modules["1"] = second, first
    assert set(modules.of(model)) == set(model.modules())


def test_another_model_is_walked_anew(walks):
    """A wrapper around the model that was scored with, or another model in its place."""
    model, modules, mode = tree(), Modules(), EvalMode()
    wrapper = nn.Sequential(model, nn.Dropout())
    for one in (model, wrapper, model):
        with mode.of(one, modules):
            assert not any(module.training for module in one.modules())
    assert walks == [model, wrapper, model] and all(module.training for module in wrapper.modules())


class Equal(nn.Module):
    """Modules that call each other equal: two adapters of the same settings."""

    def __eq__(self, other):
        return isinstance(other, Equal)

    __hash__ = nn.Module.__hash__


def test_a_module_that_equals_the_one_before_is_another():
    model, modules = nn.Sequential(Equal(), Equal()), Modules()
    modules.of(model)
    model[1] = Equal()
    assert any(module is model[1] for module in modules.of(model))
