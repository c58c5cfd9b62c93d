"""Which calls in Python source could run what a file says: found by reading, not by running."""

import ast
from collections.abc import Iterator

# Of a module: all that it has for reading; of a name alone: that call.
UNPICKLING = {
    "pickle": {"load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"},
    "dill": {"load", "loads"},
    "cloudpickle": {"load", "loads"},
    "joblib": {"load"},
    "marshal": {"load", "loads"},
    "shelve": {"open"},
    "pandas": {"read_pickle"},
    "yaml": {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"},
    "os": {"system", "popen"},
    "runpy": {"run_path", "run_module"},
}
CODE = {"eval", "exec", "compile", "__import__"}
# The argument that makes a call safe, and what it must be.
SAFE_BY = {
    ("torch", "load"): ("weights_only", True),
    ("numpy", "load"): ("allow_pickle", False),
    ("torch.distributed.checkpoint", "load"): ("storage_reader", "Reader"),
}
ALIASES = {"np": "numpy", "dcp": "torch.distributed.checkpoint", "pd": "pandas"}
READERS = {"FileSystemReader"}  # torch's own, which unpickle an index without a limit


def unsafe_loads(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of each, whatever the module was imported as."""
    tree = ast.parse(source)
    modules, names = _imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            calls = [(base, ()) for base in node.bases]
        elif isinstance(node, ast.Call):
            calls = [(node.func, node.keywords)]
            yield from ((node.lineno, one) for one in _flags(node))
        else:
            continue
        for function, keywords in calls:
            module, name = _called(function, modules, names)
            if _is_unsafe(module, name, keywords, isinstance(node, ast.ClassDef)):
                yield node.lineno, f"{module}.{name}" if module else name


def _imported(tree: ast.AST) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """Local names of modules, and of what is imported from them."""
    modules, names = dict(ALIASES), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                modules[one.asname or one.name] = one.name
        elif isinstance(node, ast.ImportFrom):
            for one in node.names:
                names[one.asname or one.name] = (node.module or "", one.name)
    return modules, names


def _called(function: ast.expr, modules, names) -> tuple[str, str]:
    if isinstance(function, ast.Name):
        return names.get(function.id, ("", function.id))
    if isinstance(function, ast.Attribute):
        owner = ast.unparse(function.value)
        if owner in names:  # from torch.distributed import checkpoint
            return ".".join(names[owner]), function.attr
        return modules.get(owner, owner), function.attr
    return "", ""


def _is_unsafe(module: str, name: str, keywords, is_base: bool) -> bool:
    if (module, name) in SAFE_BY:
        keyword, wanted = SAFE_BY[module, name]
        given = [one.value for one in keywords if one.arg == keyword]
        return not given or wanted not in (_constant(given[0]), _called_name(given[0]))
    if name in UNPICKLING.get(module, ()) or (not is_base and not module and name in CODE):
        return True
    return not is_base and name in READERS


def _flags(call: ast.Call) -> Iterator[str]:
    """Arguments that allow code, in any call."""
    for one in call.keywords:
        allows = one.arg in ("shell", "trust_remote_code", "allow_pickle")
        if allows and _constant(one.value) is not False:
            yield f"{one.arg}="


def _constant(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def _called_name(node: ast.expr) -> str | None:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else None
