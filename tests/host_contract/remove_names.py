"""Takes names that apps.topk needs from the host's modules, one by one, and says what follows.

    python remove_names.py REPORT

REPORT becomes a JSON object; the functions below say what is in it. Which names there are is
seen from what the seam replaces and read from the imports of apps.topk.
"""

import ast
import importlib
import json
import pkgutil
import sys
from functools import partial
from pathlib import Path

import apps.topk
from apps.topk.model import TopKTrainArgs
from apps.topk.seam import install

HOST = ("lingua.", "apps.main.")


def import_everything():
    """So that no module of the host is imported late, in the middle of a comparison."""
    for module in pkgutil.walk_packages(apps.topk.__path__, "apps.topk."):
        importlib.import_module(module.name)
    importlib.import_module("apps.main.eval")


def snapshot():
    """{(module, name): object} of all that the host's modules hold."""
    modules = [name for name in sys.modules if f"{name}.".startswith(HOST)]
    return {
        (module, name): value
        for module in modules
        for name, value in vars(sys.modules[module]).items()
        if not name.startswith("__")
    }


def changed(before):
    """(module, name) of what is gone, new, or another object since then."""
    after = snapshot()
    return sorted(
        key
        for key in before.keys() | after.keys()
        if key not in before or key not in after or before[key] is not after[key]
    )


def error_of(function):
    """[class, text] of what `function` raises, or None."""
    try:
        function()
    except Exception as error:
        return [type(error).__name__, str(error)]


def enter(then=lambda: None):
    with install(TopKTrainArgs()):
        then()


def replaced_names(pristine):
    """(module, name) of what is another object within the seam."""
    within = []
    enter(lambda: within.extend(changed(pristine)))
    return within


def without_replaced_names(pristine):
    """For each of them: the error of `install` without it, and what had changed afterwards."""
    found = []
    for key in replaced_names(pristine):
        module, name = sys.modules[key[0]], key[1]
        delattr(module, name)
        error = error_of(enter)
        rest = {other: value for other, value in pristine.items() if other != key}
        found.append({"module": key[0], "name": name, "error": error, "changed": changed(rest)})
        setattr(module, name, pristine[key])
    return found


def fail():
    raise ZeroDivisionError("in the loop")


def afterwards(pristine):
    """{how the `with` ended: what it raised, and what had changed afterwards}."""
    return {
        end: {"error": error_of(partial(enter, then)), "changed": changed(pristine)}
        for end, then in (("as usual", lambda: None), ("with an exception", fail))
    }


def imported_from_host():
    """(importing module of apps.topk, module of the host, name, whether as it is imported).

    Each `from host import name`, those in functions included.
    """
    root = Path(apps.topk.__path__[0])
    for path in sorted(root.rglob("*.py")):
        importer = ".".join(("apps", "topk", *path.relative_to(root).with_suffix("").parts))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        early = set(run_at_import(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and is_host(node):
                for alias in node.names:
                    yield importer, node.module, alias.name, node in early


def run_at_import(node):
    """The nodes below that are not in a function."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from run_at_import(child)


def is_host(node):
    """Whether a `from` names a module of the host."""
    return node.level == 0 and f"{node.module}.".startswith(HOST)


def without_imported_names():
    """{"importer: module.name": the error of importing it without that name}.

    A name that is imported in a function only has to be there.
    """
    found = {}
    for importer, module_name, name, is_early in imported_from_host():
        module = importlib.import_module(module_name)
        original = getattr(module, name)
        if is_early:
            importlib.import_module(importer)
            delattr(module, name)
            found[f"{importer}: {module_name}.{name}"] = error_of(partial(import_anew, importer))
            setattr(module, name, original)
    return found


def import_anew(name):
    """Run a module's import again; afterwards it is the one that was there."""
    imported = sys.modules.pop(name)
    try:
        importlib.import_module(name)
    finally:
        sys.modules[name] = imported


if __name__ == "__main__":
    import_everything()
    pristine = snapshot()
    report = {
        "afterwards": afterwards(pristine),
        "replaced": without_replaced_names(pristine),
        "imported": without_imported_names(),
    }
    Path(sys.argv[1]).write_text(json.dumps(report), encoding="utf-8")
