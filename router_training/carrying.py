"""Values and objects between two processes that do not trust each other alike: plain values as
copies, all else as stand-ins that ask. Run as text by a bare interpreter: knows the standard
library alone, and no verdict.

What the candidate sends is read as JSON with tags of a closed list, never unpickled, so that
reading it runs nothing of its choice.
"""

from __future__ import annotations

import base64
import builtins
import collections
import datetime
import decimal
import fractions
import json
import operator
import socket
import types
from collections.abc import Callable
from typing import Any

LONGEST = 32 << 20
"""Bytes of one message; in it everything but this is cut off."""


class Gone(BaseException):
    """The candidate has ended."""


class Uncarried(BaseException):
    """A test hands over what cannot be carried to another process."""


# --- values ----------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """What carries a value as JSON: itself, or [tag, …]; None is [“?”] where it cannot be."""
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if abs(value) < 1 << 53 else ["int", hex(value)]
    if kind in (bytes, bytearray):
        return [kind.__name__, base64.b64encode(value).decode()]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind in (decimal.Decimal, fractions.Fraction):
        return [kind.__name__, str(value)]
    if kind in (datetime.date, datetime.time, datetime.datetime):
        return [kind.__name__, value.isoformat()]
    if kind is datetime.timedelta:
        return ["timedelta", value.days, value.seconds, value.microseconds]
    if kind is range:
        return ["range", value.start, value.stop, value.step]
    return ["?"]


READ: dict[str, Callable[..., Any]] = {
    "int": lambda text: int(text, 16),
    "bytes": base64.b64decode,
    "bytearray": lambda text: bytearray(base64.b64decode(text)),
    "complex": complex,
    "Decimal": decimal.Decimal,
    "Fraction": fractions.Fraction,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "datetime": datetime.datetime.fromisoformat,
    "timedelta": datetime.timedelta,
    "range": range,
}
GROUPS: dict[str, Callable[..., Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
}
MAPS: dict[str, Callable[..., Any]] = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "Counter": collections.Counter,
    "defaultdict": dict,
}
BASES: tuple[Any, ...] = (int, float, str, list, tuple, dict, set, frozenset, bytes)


class Link:
    """One end of the talk between the two: each may ask the other while it waits for an answer.
    `mine` are objects that the other end knows by number."""

    def __init__(self, end: socket.socket, trusted: bool) -> None:
        self.read, self.write = end.makefile("rb"), end.makefile("wb")
        self.trusted = trusted
        self.mine: dict[int, Any] = {}
        self.number: dict[int, int] = {}
        self.mirrors: dict[int, type[BaseException]] = {}
        self.gone = False

    # --- messages ----------------------------------------------------------------------------

    def send(self, message: Any) -> None:
        try:
            self.write.write(json.dumps(message).encode() + b"\n")
            self.write.flush()
        except OSError:
            self.end()

    def receive(self) -> Any:
        line = self.read.readline(LONGEST)
        if not line.endswith(b"\n"):
            self.end()
        return json.loads(line)

    def end(self) -> None:
        self.gone = True
        raise Gone

    def ask(self, what: str, *args: Any) -> Any:
        """What the other end answers, once it has been served what it asks meanwhile. Raises what
        it raises."""
        if self.gone:
            raise Gone
        self.send([what, *args])
        while True:
            message = self.receive()
            if message[0] == "value":
                return self.decode(message[1])
            if message[0] == "raised":
                raise self.raised(*message[1:])
            self.serve(message)

    def call(self, number: int, how: str, args: Any, named: Any) -> Any:
        """Of an object of the other end; `args` that can change are brought up to date."""
        sent = [[self.encode(one) for one in args], {k: self.encode(v) for k, v in named.items()}]
        given = [*args, *named.values()]
        value, *after = self.ask("call", number, how, *sent)
        for mine, now in zip(given, after, strict=True):
            if isinstance(mine, list | bytearray) and mine != now:
                mine[:] = now
            elif isinstance(mine, dict | set) and mine != now:
                mine.clear()
                mine.update(now)
            elif isinstance(mine, collections.deque) and mine != now:
                mine.clear()
                mine.extend(now)
        return value

    def serve(self, message: Any) -> None:
        what, *rest = message
        try:
            answer = ["value", self.encode(getattr(self, "on_" + str(what))(*rest))]
        except Gone:
            raise
        except BaseException as error:  # not even Uncarried: the candidate must not choose that
            answer = ["raised", *self.told(error)]
        self.send(answer)

    def on_name(self, name: str) -> Any:
        value = self.mine[0][name]
        if isinstance(value, types.ModuleType) and value.__name__ == name:
            return Module
        return value

    def on_call(self, number: int, how: str, sent: Any, sent_named: Any) -> Any:
        """`how`: "" calls the object, else the name of an operation on it."""
        target = self.mine[number]
        args = [self.decode(one) for one in sent]
        named = {name: self.decode(one) for name, one in sent_named.items()}
        if self.trusted and not self.open_to(target, how, args):
            raise AttributeError(how)
        value = target(*args, **named) if how == "" else OPERATIONS[how](target, *args)
        return [value, *args, *named.values()]

    def open_to(self, target: Any, how: str, args: list[Any]) -> bool:
        """What the candidate may do with an object of the tests: call it, and all but touch what is
        private with instances of their own classes."""
        if how == "":
            return callable(target)
        private = how in ("getattr", "setattr") and str(args[0]).startswith("_")
        return type(target).__module__ == "tests" and not private

    # --- values ------------------------------------------------------------------------------

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if kind is Remote:
            return ["yours", object.__getattribute__(value, "_number")]
        if value is Module:
            return ["module"]
        if kind.__module__ == "numpy" and hasattr(value, "item") and not getattr(value, "ndim", 1):
            value = value.item()
            kind = type(value)
        simple = plain(value)
        if simple != ["?"]:
            return simple
        if kind.__name__ in GROUPS and kind is GROUPS[kind.__name__]:
            return [kind.__name__, [self.encode(one) for one in value]]
        if kind in (dict, collections.OrderedDict, collections.Counter, collections.defaultdict):
            return [kind.__name__, [[self.encode(k), self.encode(v)] for k, v in value.items()]]
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return ["fields", kind.__name__, list(kind._fields), [self.encode(v) for v in value]]
        return self.handle(value)

    def handle(self, value: Any) -> Any:
        if self.trusted and not (callable(value) or type(value).__module__ == "tests"):
            raise Uncarried(type(value).__name__)
        number = self.number.setdefault(id(value), len(self.mine))
        self.mine[number] = value  # and so its id is nobody else's
        if isinstance(value, type) and issubclass(value, BaseException):
            return ["exception", number, value.__name__, self.named(value)]
        base: Any = None
        for kind in BASES:
            if isinstance(value, kind) and type(value) is not kind:
                base = [self.encode(kind(value))]
                break
        return ["mine", number, base]

    def decode(self, sent: Any) -> Any:
        if not isinstance(sent, list):
            return sent
        tag, *rest = sent
        if tag in READ:
            return READ[tag](*rest)
        if tag in GROUPS:
            return GROUPS[tag](map(self.decode, rest[0]))
        if tag in MAPS:
            return MAPS[tag]({self.decode(k): self.decode(v) for k, v in rest[0]})
        if tag == "fields":
            name, fields, values = rest
            return collections.namedtuple(name, fields)(*map(self.decode, values))
        if tag == "yours":
            return self.mine[rest[0]]
        if tag == "exception":
            return self.mirror(*rest)
        if tag == "module":
            return Module
        number, base = rest
        return Remote(self, number, None if base is None else self.decode(base[0]))

    # --- exceptions ----------------------------------------------------------------------------

    def named(self, kind: type[BaseException]) -> str:
        """The nearest built-in exception."""
        return next(
            str(k.__name__) for k in kind.__mro__ if getattr(builtins, k.__name__, None) is k
        )

    def told(self, error: BaseException) -> list[Any]:
        kind = type(error)
        try:
            args = [plain(arg) for arg in error.args]
            about = {k: plain(v) for k, v in vars(error).items() if not k.startswith("_")}
            own = None if kind.__module__ == "builtins" else self.handle(kind)
        except BaseException:
            args, about, own = [], {}, None
        return [self.named(kind), [a for a in args if a != ["?"]], about, own]

    def raised(self, name: str, args: Any, about: Any, own: Any) -> BaseException:
        kind = getattr(builtins, name, RuntimeError)
        if own is not None:
            kind = self.mirror(*own[1:])
        given = [self.decode(arg) for arg in args]
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            return RuntimeError(name, *given)  # an exit is the answer's own, and no test's
        try:
            error: BaseException = kind(*given)
        except TypeError:
            error = RuntimeError(name, *given)
        for key, value in about.items():
            if value != ["?"]:
                error.__dict__[key] = self.decode(value)
        return error

    def mirror(self, number: int, name: str, base: str) -> type[BaseException]:
        if number not in self.mirrors:
            kind = getattr(builtins, base, Exception)
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                kind = Exception
            self.mirrors[number] = type(str(name), (kind,), {})
        return self.mirrors[number]


class Module:
    """Stands for a module under its own name, which the examiner imports itself."""


class Remote:
    """An object of the other process. `base`: the plain value of one that is also an int, a str, a
    list …, by which it is compared with plain values here."""

    __slots__ = ("_base", "_link", "_number")

    def __init__(self, link: Link, number: int, base: Any) -> None:
        for name, value in (("_link", link), ("_number", number), ("_base", base)):
            object.__setattr__(self, name, value)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return _of(self, "", args, named)

    def __getattr__(self, name: str) -> Any:
        return _of(self, "getattr", (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        _of(self, "setattr", (name, value))

    def __eq__(self, other: object) -> Any:
        if type(other) is Remote:
            return _of(self, "__eq__", (other,))
        base = object.__getattribute__(self, "_base")
        return base is not None and base == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return int(_of(self, "__hash__", ()))

    def __str__(self) -> str:
        return str(_of(self, "__str__", ()))

    def __repr__(self) -> str:
        return str(_of(self, "__repr__", ()))

    def __bool__(self) -> bool:
        return bool(_of(self, "__bool__", ()))

    def __enter__(self) -> Any:
        return _of(self, "__enter__", ())

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        return _of(self, "__exit__", (None, None, None))

    def __instancecheck__(self, value: Any) -> bool:
        return type(value) is Remote and bool(_of(value, "isinstance", (self,)))


def _of(remote: Remote, how: str, args: Any, named: Any = types.MappingProxyType({})) -> Any:
    link = object.__getattribute__(remote, "_link")
    return link.call(object.__getattribute__(remote, "_number"), how, args, named)


def _reflected(name: str) -> Callable[[Any, Any], Any]:
    forward = getattr(operator, f"__{name}__")
    return lambda mine, other: forward(other, mine)


BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")
OPERATIONS: dict[str, Callable[..., Any]] = {
    "getattr": getattr,
    "setattr": setattr,
    "isinstance": isinstance,
    "__eq__": operator.eq,
    "__hash__": hash,
    "__str__": str,
    "__repr__": repr,
    "__bool__": bool,
    "__len__": len,
    "__iter__": iter,
    "__next__": next,
    "__reversed__": reversed,
    "__int__": int,
    "__float__": float,
    "__index__": operator.index,
    "__round__": round,
    "__abs__": abs,
    "__neg__": operator.neg,
    "__pos__": operator.pos,
    "__invert__": operator.invert,
    "__contains__": operator.contains,
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__delitem__": operator.delitem,
    "__lt__": operator.lt,
    "__le__": operator.le,
    "__gt__": operator.gt,
    "__ge__": operator.ge,
    "__enter__": lambda one: type(one).__enter__(one),
    "__exit__": lambda one, *how: type(one).__exit__(one, *how),
    **{f"__{name}__": getattr(operator, f"__{name}__") for name in BINARY},
    **{f"__r{name}__": _reflected(name) for name in BINARY},
}


def _forwarded(name: str) -> Callable[..., Any]:
    return lambda self, *args: _of(self, name, args)


for _name in OPERATIONS:
    if _name.startswith("__") and _name not in Remote.__dict__:
        setattr(Remote, _name, _forwarded(_name))
