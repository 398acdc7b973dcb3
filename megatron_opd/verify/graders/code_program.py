"""The program of one test: a model's code behind the names that LiveCodeBench gives it.

Released, code stands behind `from ... import *` of these modules. Their imports would take longer
than most solutions, so only names that the code uses are bound.
"""

import builtins
import functools
import importlib
import re

RECURSION_LIMIT = 50_000
MOST_DIGITS = 50_000

# In the order of their star imports, of which the last one wins.
MODULES = (
    "string",
    "re",
    "datetime",
    "collections",
    "heapq",
    "bisect",
    "copy",
    "math",
    "random",
    "statistics",
    "itertools",
    "functools",
    "operator",
    "io",
    "sys",
    "json",
    "builtins",
    "typing",
)

# What is run before the model's code has names that it will hardly use.
_START = """
def _opd_names(code):
    names = set(code.co_names)
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            names |= _opd_names(constant)
    return names

def _opd_ready(source, of_names, modules, own_name):
    import builtins, sys
    # those that `site` adds
    builtins.exit = builtins.quit = sys.exit
    sys.setrecursionlimit({recursion})
    sys.set_int_max_str_digits({digits})
    code = compile(source, "solution.py", "exec", dont_inherit=True)
    space = {{"__name__": own_name, "__builtins__": __builtins__}}
    used = _opd_names(code)
    for name in used & of_names.keys():
        module = __import__(of_names[name])
        # the grader's own process may have more names, such as sys.last_value
        if hasattr(module, name):
            space[name] = getattr(module, name)
    for name in used.intersection(modules):
        space[name] = __import__(name)
    sys.modules[own_name].__dict__.update(space)
    return code, sys.modules[own_name].__dict__
"""

_READS_STDIN = """
_opd_code, _opd_space = _opd_ready({source!r}, {of_names!r}, {modules!r}, "__main__")
try:
    exec(_opd_code, _opd_space)
except SystemExit:
    pass
"""

_IS_CALLED = """
def _opd_call():
    import json, os, sys, types
    dumps, write = json.dumps, os.write
    nonce, *lines = sys.stdin.read().split("\\n")
    arguments = [json.loads(line) for line in lines]
    sys.modules["solution"] = types.ModuleType("solution")
    code, space = _opd_ready({source!r}, {of_names!r}, {modules!r}, "solution")
    exec(code, space)
    holder = space["Solution"]() if "Solution" in space else None
    function = getattr(holder, {function!r}) if holder is not None else space[{function!r}]
    value = function(*arguments)
    if isinstance(value, tuple):
        value = list(value)
    numpy_scalar = getattr(sys.modules.get("numpy"), "generic", ())
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, numpy_scalar):
            part = part.item()
        if isinstance(part, list):
            waiting.extend(part)
        elif isinstance(part, dict) and all(isinstance(key, str) for key in part):
            waiting.extend(part.values())
        elif not isinstance(part, (int, float, str, bool, type(None))):
            raise TypeError(f"the value has a part of the type {{type(part).__name__}}")
    rest = (nonce + "\\n" + dumps(value, default=lambda part: part.item()) + "\\n").encode()
    while rest:
        rest = rest[write(3, rest):]

_opd_call()
"""


@functools.cache
def names_by_module() -> dict[str, str]:
    """The module that each name of a star import is from; not those that every program has."""
    of_names: dict[str, str] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        public = [public_name for public_name in vars(module) if not public_name.startswith("_")]
        of_names.update(dict.fromkeys(getattr(module, "__all__", public), name))
    return {name: module for name, module in of_names.items() if not hasattr(builtins, name)}


def program_of(code: str, function: str) -> str:
    """A program that reads stdin, or calls `function`, by name or as a method of `Solution`.

    Such a call reads a nonce and then an argument a line, in JSON. It writes the nonce and the
    value, in JSON, to descriptor 3; no value that is not of plain types, their
    subclasses or numpy's scalars.
    """
    words = set(re.findall(r"\w+", code))
    of_names = names_by_module()
    start = _START.format(recursion=RECURSION_LIMIT, digits=MOST_DIGITS)
    template = _IS_CALLED if function else _READS_STDIN
    return start + template.format(
        source=code,
        of_names={name: of_names[name] for name in sorted(words & of_names.keys())},
        modules=sorted(words.intersection(MODULES)),
        function=function,
    )
