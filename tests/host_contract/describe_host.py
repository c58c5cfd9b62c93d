"""Prints what a host's modules offer, as JSON: signatures, dataclass fields with defaults.

    python describe_host.py ROOT MODULE ...

ROOT is put on the path; the modules are imported from there.
"""

import contextlib
import dataclasses
import importlib
import inspect
import json
import sys


def describe(module):
    """{name: what it is} of the functions and classes of the host that `module` offers.

    `own` says whether it is defined there, and not only imported.
    """
    found = {}
    for name, value in vars(module).items():
        home = getattr(value, "__module__", None) or ""
        if name.startswith("_") or home.split(".")[0] not in ("lingua", "apps"):
            continue
        own = home == module.__name__
        if dataclasses.is_dataclass(value):
            found[name] = {"own": own, "fields": fields_of(value)}
        elif inspect.isclass(value):
            found[name] = {"own": own, "methods": methods_of(value)}
        elif callable(value):
            found[name] = {"own": own, "inputs": inputs_of(value)}
    return found


def fields_of(dataclass):
    """Fields with defaults; those of nested dataclasses inside."""
    try:
        return plain(dataclasses.asdict(dataclass()))
    except TypeError:  # fields without a default
        return [field.name for field in dataclasses.fields(dataclass)]


def methods_of(cls):
    return {
        name: inputs_of(method)
        for name, method in vars(cls).items()
        if callable(method) and (name == "__init__" or not name.startswith("_"))
    }


def inputs_of(function):
    """Names and defaults, in their order; decorators looked through."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return None
    return [
        [p.name, None if p.default is p.empty else plain(p.default)]
        for p in parameters
        if p.name not in ("self", "cls")
    ]


def plain(value):
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(type(value))


if __name__ == "__main__":
    root, *modules = sys.argv[1:]
    sys.path[0] = root
    if root.endswith("_host"):
        sys.path.append(root)
    import torch

    # On builds of torch without flash attention; the checkout looks it up when imported.
    with contextlib.suppress(RuntimeError):
        torch.library.define("xformers_flash::flash_fwd", "(Tensor x) -> Tensor")
    print(json.dumps({name: describe(importlib.import_module(name)) for name in modules}))
