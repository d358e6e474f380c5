"""Functions on the modules of one model, in place of its class's methods: they copy and pickle with the model.

A bound method would be pickled as the attribute of its name, which a module that is only being made does not have yet.
"""

import functools


def put(module, name, function):
    """Give one module `function`, which takes the module first, in place of its class's method of this name."""
    module.__dict__[name] = functools.partial(function, module)


def on(module, name="forward"):
    """The function that stands on a module itself under this name: what `put` was given, another's, or None."""
    found = module.__dict__.get(name)
    return getattr(found, "func", getattr(found, "__func__", found))
