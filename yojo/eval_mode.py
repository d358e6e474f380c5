"""Eval mode of a model that several threads score with."""

import contextlib
import threading


class EvalMode:
    """Eval mode of one model while threads score with it: the first one in sets it, the last one out undoes it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.inside = 0
        self.disturbed = 0  # how often training mode was set under a pass
        self.training = []  # modules that go back to training mode
        self.kept = set()  # ids of the modules that were in eval mode: of the model, or of what wraps it, too

    def __reduce__(self):  # a copy of the model is not being scored with
        return EvalMode, ()

    @contextlib.contextmanager
    def of(self, model):
        """Within it, the model is in eval mode.

        Raises:
            RuntimeError: somebody else has set training mode meanwhile.
        """
        modules = _modules_of(model)
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
            self.kept.update(map(id, modules))
            self.inside += 1
            return self.disturbed

    def _leave(self, model, modules):
        with self.lock:
            self._set(model, modules)
            self.inside -= 1
            if self.inside == 0:
                for module in self.training:
                    module.training = True
                self.training, self.kept = [], set()
            return self.disturbed

    def _set(self, model, modules):
        training = [module for module in modules if module.training]
        if training:
            self.disturbed += any(id(module) in self.kept for module in training)
            self.training += training
            model.eval()


def _modules_of(model):
    """As `model.modules()`, in any order; it is asked for in every pass, and takes half as long."""
    found, seen, left = [], set(), [model]
    while left:
        module = left.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            found.append(module)
            left.extend(module._modules.values())
    return found
