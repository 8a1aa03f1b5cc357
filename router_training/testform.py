"""Which tests can be run apart from the code that they test. Reads their source alone: what an
answer does must not decide how it is judged."""

from __future__ import annotations

import ast
import builtins

INSIDE = frozenset({"asyncio", "inspect", "mock", "patch", "redirect_stdout", "issubclass", "vars"})
"""Names of what needs the code itself: its coroutines, source, printed output, modules to patch."""

ATTRIBUTES = frozenset({"stdout", "stdin", "__class__", "__dict__"})


def why_together(tests: str) -> str | None:
    """Why these tests have to run in the process of the code, None where they need not. They are
    Python."""
    tree = ast.parse(tests)
    own: set[str] = set()
    bases: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.AsyncFunctionDef() | ast.Await() | ast.AsyncFor() | ast.AsyncWith():
                return "they await"
            case ast.Name(id=name) if name in INSIDE:
                return f"they use {name}"
            case ast.Attribute(attr=name) if name in ATTRIBUTES | INSIDE:
                return f"they use {name}"
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                for one in names:
                    if INSIDE & set(one.name.split(".")):
                        return f"they use {one.name}"
                    own.add((one.asname or one.name).partition(".")[0])
            case ast.ClassDef(name=name):
                own.add(name)
                bases |= {base.id for base in node.bases if isinstance(base, ast.Name)}
    if others := sorted(bases - own - set(dir(builtins))):
        return f"they derive a class from {others[0]}"
    return None
