"""What a device is asked to do in a piece of work, counted on the CPU."""
import collections

from torch.utils._python_dispatch import TorchDispatchMode

NOTHING_TO_DO = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias",
                 "lift_fresh", "scalar_tensor", "_record_function_enter_new", "_record_function_exit")
CAST = "_to_copy"       # to another type; autocast's casts of the weights among them


class Operations(TorchDispatchMode):
    """``with Operations() as seen:`` ``seen.count`` operations but casts, ``seen.casts`` casts, ``seen.names`` how many of each.

    Views and allocations don't count. A _foreach operation is one, though CUDA starts several kernels where shapes differ."""

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in NOTHING_TO_DO:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return self.names.total() - self.casts

    @property
    def casts(self) -> int:
        return self.names[CAST]
