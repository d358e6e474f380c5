"""A worker's handler that does as it is told; a module of its own, which its process loads in no time."""

import os
import signal
import time


class Told:
    """Does what `begin` is given: ("say", x), ("later", x), ("raise", text), ("die", signal), ("exit", code), ("sleep", s)."""

    def __init__(self, *args):
        self.args, self.later = args, []
        if "fail" in args:
            raise ValueError("there is no such model")

    def hello(self):
        return {"pid": os.getpid(), "args": self.args}

    def begin(self, ident, data):
        what, value = data
        if what == "die":
            os.kill(os.getpid(), value)
        elif what == "exit":
            os._exit(value)
        elif what == "sleep":
            time.sleep(value)
        elif what == "raise":
            yield ident, KeyError(value)
        elif what == "later":
            self.later.append((ident, value))
            return
        yield ident, (value, signal.getsignal(signal.SIGTERM) == signal.SIG_IGN)

    def rest(self):
        later, self.later = self.later, []
        yield from later
