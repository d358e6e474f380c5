"""Eval mode of a model that several threads score with."""

import contextlib
import operator
import threading


class EvalMode:
    """Eval mode of one model while threads score with it: the first one in sets it, the last one out undoes it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.inside = []  # modules of each pass under way, in eval mode: the model's, or those of what wraps it, too
        self.disturbed = 0  # how often training mode was set under a pass
        self.training = []  # modules that go back to training mode

    def __reduce__(self):  # a copy of the model is not being scored with
        return EvalMode, ()

    @contextlib.contextmanager
    def of(self, model, kept=None):
        """Within it, the model is in eval mode.

        Args:
            model: the model, or what wraps it.
            kept: the `Modules` of the calls before, where one thread makes several of them.

        Raises:
            RuntimeError: somebody else has set training mode meanwhile.
        """
        modules = (kept or Modules()).of(model)
        disturbed = self._enter(model, modules)
        try:
            yield
        finally:
            disturbed = self._leave(model, modules) != disturbed
        if disturbed:
            raise RuntimeError(
                "the model was put into training mode while it scored, so that the scores may hold dropout: train and "
                "score one after the other, or score with a copy of the model"
            )

    def _enter(self, model, modules):
        with self.lock:
            self._set(model, modules)
            self.inside.append(modules)
            return self.disturbed

    def _leave(self, model, modules):
        with self.lock:
            self._set(model, modules)
            del self.inside[next(n for n, one in enumerate(self.inside) if one is modules)]
            if not self.inside:
                for module in self.training:
                    module.training = True
                self.training = []
            return self.disturbed

    def _set(self, model, modules):
        training = [module for module in modules if module.training]
        if training:
            scored = {id(module) for one in self.inside for module in one}
            self.disturbed += any(id(module) in scored for module in training)
            self.training += training
            model.eval()


class Modules:
    """The modules of a model from row to row: walked again only where the tree is not what it was.

    Who looks at a list that lacks a module leaves the dropout in it on. torch tells of modules that are registered, but not
    of those that `ModuleList.insert` and others write into `_modules`: every row therefore compares all children with those
    of the last walk, which takes a third of a walk's time.
    """

    def __init__(self):
        self.found, self.children = [], []

    def of(self, model):
        """As `list(model.modules())`, in any order; the same list as before where nothing has changed."""
        if not (self.found and self.found[0] is model and self._unchanged()):
            self.found, self.children = _modules_of(model)
        return self.found

    def _unchanged(self):
        # Where each listed module's children are listed, none is missing, whichever parent has got them by now.
        children = []
        for own in map(_children, self.found):
            if own:
                children += own.values()
        return len(children) == len(self.children) and all(map(operator.is_, children, self.children))


_children = operator.attrgetter("_modules")


def _modules_of(model):
    """(the modules, each once and the model first; the children of each, one behind the other)."""
    found, children, seen, left = [], [], set(), [model]
    while left:
        module = left.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            found.append(module)
            if module._modules:
                own = list(module._modules.values())  # read once: another thread may add one meanwhile
                children += own
                left += own
    return found, children
