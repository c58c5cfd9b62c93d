"""Reading a distributed checkpoint without running what may be hidden in it.

Its index, .metadata, is a pickle, and so is each object among its data (the optimizer's
settings): torch reads both without a limit. Here an index is made of the names that torch
writes there and of no other, in the steps that making one takes, objects are those that
weights_only=True allows, and data are compared with the CRCs that torch.save wrote with them.
"""

import io
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

METADATA_NAME = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
}
# Of these an index has objects, whose fields alone it sets. What is named must stay as it is: a
# function or a class that is changed is changed for all that use it.
_WITH_FIELDS = {
    "_StorageInfo",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
}
# What pickle (protocol 4, by which torch writes) makes of numbers, text, lists and such objects.
_STEPS = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.MEMOIZE),
    *(pickle.BINGET, pickle.LONG_BINGET, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
    *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.EMPTY_LIST, pickle.APPEND),
    *(pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.EMPTY_TUPLE),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.STACK_GLOBAL, pickle.NEWOBJ, pickle.REDUCE, pickle.BUILD),
)


class UnlistedError(pickle.UnpicklingError):
    """An index names or does what is no part of one: code, or what another torch writes there."""


def _refuse_step(unpickler: Any) -> None:
    raise UnlistedError("it does what is no part of making an index")


class _Unpickler(pickle._Unpickler):  # the one in Python: that in C does not ask about its steps
    dispatch: ClassVar[dict[int, Any]] = {
        **dict.fromkeys(pickle._Unpickler.dispatch, _refuse_step),
        **{step[0]: pickle._Unpickler.dispatch[step[0]] for step in _STEPS},
    }

    def load(self) -> Any:
        try:
            return super().load()
        except (EOFError, LookupError):
            raise pickle.UnpicklingError("it is cut off, or no index") from None

    def load_build(self) -> None:
        changed = type(self.stack[-2])
        is_ours = (changed.__module__, changed.__name__) in _ALLOWED
        if not is_ours or changed.__name__ not in _WITH_FIELDS:
            raise UnlistedError(f"it changes a {changed.__name__}, which is no part of an index")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise UnlistedError(f"it names {module}.{name}, which is no part of an index")


@contextmanager
def _no_advice() -> Iterator[None]:
    """Within it, an object that is no data is called that; torch says how to run it."""
    try:
        yield
    except pickle.UnpicklingError:
        raise pickle.UnpicklingError("it holds more than plain data, which is not run") from None


class Reader(dcp.FileSystemReader):
    """torch's reader of a folder, for folders that anybody may have written."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        rank = kwargs.get("rank")
        name = METADATA_NAME if rank is None else f"__{rank}{METADATA_NAME}"
        with open(Path(self.path, name), "rb") as file:
            index = _Unpickler(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError("it is no index of a checkpoint")
        if not isinstance(getattr(index, "storage_meta", None), StorageMeta | None):
            raise pickle.UnpicklingError("its storage_meta is none")
        for place in (index.storage_data or {}).values():
            if Path(place.relative_path).name != place.relative_path:
                raise pickle.UnpicklingError(f"it names {place.relative_path!r}, no file of it")
        if getattr(index, "storage_meta", None) is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index

    def read_data(self, *args: Any, **kwargs: Any) -> Any:
        with _no_advice():
            return super().read_data(*args, **kwargs)

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        file.seek(sinfo.offset)
        part = io.BytesIO(file.read(sinfo.length))  # torch's own view cannot seek from the end
        if zipfile.ZipFile(part).testzip() is not None:
            raise zipfile.BadZipFile(f"{sinfo.relative_path} is not as it was written")
        part.seek(0)
        return part


def find_code(folder: Path) -> str | None:
    """What in a checkpoint would be more than data to a loader that unpickles without a limit.

    For a host that loads by torch's own reader: Meta Lingua. None where there is nothing.
    """
    if not Path(folder, METADATA_NAME).is_file():  # a pipe would be waited for
        return f"{METADATA_NAME} cannot be read (there is no such file)"
    try:
        reader = Reader(folder)
        index = reader.read_metadata()
        objects = [
            (at.fqn, place)
            for at, place in index.storage_data.items()
            if isinstance(index.state_dict_metadata.get(at.fqn), BytesStorageMetadata)
        ]
    except Exception as error:  # it is a pickle: broken ones raise anything
        return f"{METADATA_NAME} cannot be read ({error})"
    for name, place in objects:
        try:
            if getattr(place, "transform_descriptors", None):
                raise ValueError("it is compressed, and is not looked through")
            with open(Path(folder, place.relative_path), "rb") as file, _no_advice():
                torch.load(reader._slice_file(file, place), weights_only=True)
        except Exception as error:  # a damaged file raises a dozen kinds
            return f"{name} in {place.relative_path} cannot be read ({error})"
    return None


def find_unlisted(folder: Path) -> str | None:
    """What an index names that is no part of one; None also where it is merely broken."""
    try:
        Reader(folder).read_metadata()
    except UnlistedError as error:
        return f"{METADATA_NAME} cannot be read ({error})"
    except Exception:  # it is a pickle: broken ones raise anything
        return None
    return None


class Planner(DefaultLoadPlanner):
    """torch's planner; objects pass through weights_only=True."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        with _no_advice():
            content = torch.load(value, weights_only=True)
        torch.save(content, plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
