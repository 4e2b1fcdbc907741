"""Pickles of official EDM2 networks as plain data and tensors, with nothing in the file called, imported or compiled.

A pickle is a program for a small stack machine; Python's own reader runs it, and its instructions GLOBAL and REDUCE
import and call whatever the file names. This reader is another machine for the same programs: a name is only a string
that has to be in `CALLS` or `CLASSES`, and to call it means to make one of the inert records below. All that a file
can do is to make lists, tuples, dicts, sets, numbers, strings, bytes and these records.

It cannot do too much of that either. Every length is compared with what is left of the file before memory is taken,
the number of instructions and the size of text are limited, keys of dicts are strings and small integers (the hash of
nested tuples can take for ever), and nothing here descends into nested data. Large byte strings stay in the file.
"""

import io
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

Buffer = bytes | memoryview

# The largest official network takes about 3 · 10^4 instructions; a training state 10^3 tensors, too.
MAX_INSTRUCTIONS = 500_000
MAX_TENSORS = 10_000
MAX_TEXT = 16 * 2**20
MAX_ZIP_DIRECTORY = 2**20
_IN_FILE = 2**16  # byte strings from this size on are not copied out of the file

_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001  # of torch's format before the zip files
_ZIP_MAGIC = b"PK\x03\x04"


class ConvertError(ValueError):
    """A file cannot be converted; the message says what was found in it."""


def show(value: Any) -> str:
    """Text or a number from a file for an error message: short, without control characters; else only its kind."""
    if isinstance(value, str):
        return ascii(value[:80]) + ("…" if len(value) > 80 else "")
    return ascii(value) if value is None or isinstance(value, (bool, int, float)) else f"a {type(value).__name__}"


# ---- Records -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Global:
    """The name of a class or function that is expected in these files. It stands for nothing but itself."""

    name: str


@dataclass(eq=False)
class Object:
    """An instance of the class called `kind`, as its `__dict__`: a persistent object or a `torch.nn.ModuleDict`."""

    kind: str
    state: dict[str, Any] | None = None


@dataclass(eq=False)
class Dtype:
    """A numpy type: "f4", and "<" for its byte order."""

    code: str
    order: str = "="


@dataclass(eq=False)
class Array:
    """A numpy array or scalar, not decoded."""

    dtype: Any = None
    shape: Any = None
    raw: Any = None

    def tolist(self) -> Any:
        """A number or nested lists of them.

        Raises:
            ConvertError: it is large, or not made of numbers, or its parts contradict each other.
        """
        code = self.dtype.code if isinstance(self.dtype, Dtype) else None
        shape, raw = self.shape, self.raw
        if code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
            raise ConvertError(f"a numpy array has the type {show(code)}; only numbers are read.")
        if not _is_shape(shape) or not isinstance(raw, (bytes, bytearray, memoryview)):
            raise ConvertError("a numpy array among the settings is damaged.")
        # An axis of 0 leaves no numbers, but the axes before it still become lists.
        if math.prod(max(size, 1) for size in shape) > 4096:
            raise ConvertError("a numpy array among the settings has more than 4096 numbers or lists of them.")
        if len(raw) != math.prod(shape) * int(code[1]):
            raise ConvertError(f"a numpy array of shape {shape} and type {code} has {len(raw)} bytes.")
        return np.frombuffer(raw, np.dtype(self.dtype.order + code)).reshape(shape).tolist()


@dataclass(eq=False)
class Storage:
    """The numbers behind a tensor: the bytes of an inner file by torch, or of a zip member with `dtype` and `crc`."""

    data: Buffer
    dtype: torch.dtype | None = None
    crc: int = 0

    def header(self) -> tuple[torch.dtype, int]:
        """Type and count of the numbers, from the inner file's own pickles, all of which is checked."""
        if self.dtype is not None:
            return self.dtype, len(self.data) // self.dtype.itemsize
        return _read_legacy_header(self.data)

    def load(self) -> torch.Tensor:
        """All numbers, as a new tensor [N].

        Raises:
            ConvertError: the bytes are damaged.
        """
        dtype, count = self.header()
        if self.dtype is not None:
            if zlib.crc32(self.data) != self.crc:
                raise ConvertError("its checksum in the zip file is wrong: it is damaged.")
            # torch refuses an empty buffer
            return torch.frombuffer(bytearray(self.data), dtype=dtype) if count else torch.empty(0, dtype=dtype)
        try:
            storage = torch.load(io.BytesIO(self.data), map_location="cpu", weights_only=True)
        except Exception as error:  # whatever it is, it advises to load the file with less care
            raise ConvertError("the bytes of a tensor are not as torch writes them.") from error
        return torch.empty(0, dtype=dtype).set_(storage, 0, (count,), (1,))


@dataclass(eq=False)
class Tensor:
    """A tensor that is still in the file.

    Args:
        position: where in the pickle it was made, for messages.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    position: int

    def check(self) -> int:
        """The bytes of its numbers, each of which lies in the storage and is no other's.

        Raises:
            ConvertError: the storage is damaged, or does not hold these numbers.
        """
        dtype, count = self.storage.header()
        # Dense in some order of the axes: what torch writes, and no number is read twice.
        expected = 1
        for stride, size in sorted(zip(self.stride, self.shape, strict=True)):
            if size != 1 and stride != expected:
                raise ConvertError(f"the tensor at byte {self.position} has shape {self.shape}, strides {self.stride}.")
            expected *= size
        if self.offset + math.prod(self.shape) > count:
            raise ConvertError(
                f"the tensor at byte {self.position} takes the numbers {self.offset} to "
                f"{self.offset + math.prod(self.shape)} of a storage of {count}."
            )
        return math.prod(self.shape) * dtype.itemsize

    def load(self) -> torch.Tensor:
        """The tensor, contiguous, sharing memory with no other."""
        self.check()
        tensor = torch.as_strided(self.storage.load(), self.shape, self.stride, self.offset)
        if not tensor.isfinite().all():
            raise ConvertError("it holds numbers that are not finite: the file is damaged, or the training diverged.")
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)


def _is_shape(value: Any) -> bool:
    """A tuple of a few sizes, none of them absurd: their product is an ordinary integer, too."""
    return type(value) is tuple and len(value) <= 8 and all(type(n) is int and 0 <= n < 2**40 for n in value)


# ---- What may be called, and what that makes -----------------------------------------------------


def _bytes_from_latin1(reader: "_Reader", text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if type(text) is not str or encoding != "latin1":
        raise ConvertError(f"_codecs.encode of {show(text)} to {show(encoding)}; bytes are written as latin1.")
    reader.charge_text(len(text))
    return text.encode("latin1")


def _persistent_object(reader: "_Reader", meta: Any) -> Object:
    """An object that brought its source text along, which is dropped."""
    state = meta.get("state") if type(meta) is dict else None
    if type(state) is not dict or meta.get("type") != "class" or type(meta.get("class_name")) is not str:
        raise ConvertError("a persistent object has no dict with type 'class', a class_name and a state.")
    return Object(meta["class_name"], state)


def _tensor(reader: "_Reader", storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage) or not _is_shape((offset,)) or not (_is_shape(shape) and _is_shape(stride)):
        raise ConvertError("a tensor is not made of a storage, an offset, a shape and strides.")
    if len(shape) != len(stride):
        raise ConvertError(f"a tensor has shape {shape} and strides {stride}.")
    tensor = Tensor(storage, offset, shape, stride, reader.position)
    reader.tensors.append(tensor)
    if len(reader.tensors) > MAX_TENSORS:
        raise ConvertError(f"there are more than {MAX_TENSORS} tensors; no network of these has so many.")
    return tensor


def _parameter(reader: "_Reader", data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise ConvertError(f"a parameter is made from {show(data)}, not from a tensor.")
    return data


def _storage(reader: "_Reader", data: Any) -> Storage:
    if not isinstance(data, (bytes, memoryview)):
        raise ConvertError(f"a storage is made from {show(data)}, not from bytes.")
    return Storage(data)


def _set(reader: "_Reader", items: Any) -> set:
    if type(items) is not list:
        raise ConvertError(f"a set is made from {show(items)}, not from a list.")
    return {_key(item) for item in items}


def _scalar(reader: "_Reader", dtype: Any, raw: Any) -> Array:
    return Array(dtype, (), raw)


_NUMPY = {
    "multiarray._reconstruct": lambda reader, kind, shape, code: Array(),
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": lambda reader, raw, dtype, shape, order: Array(dtype, shape, raw),
}
# Functions, with what takes their place; their names in other versions of numpy and of the protocol included.
CALLS: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "collections.OrderedDict": lambda reader: {},
    "numpy.dtype": lambda reader, code, align, copy: Dtype(code),
    **{f"numpy.{core}.{name}": make for core in ("core", "_core") for name, make in _NUMPY.items()},
    "_codecs.encode": _bytes_from_latin1,
    "builtins.set": _set,
    "__builtin__.set": _set,
}
# Classes of which empty instances are made.
CLASSES: dict[str, Callable[[], Any]] = {
    "dnnlib.util.EasyDict": dict,
    "torch.nn.modules.container.ModuleDict": lambda: Object("ModuleDict"),
}
_OTHER_NAMES = {"numpy.ndarray", *_STORAGES}


def _key(value: Any) -> str | int | None:
    """A dict's key or a set's item, whose hash is quick and does not collide on purpose."""
    if value is None or type(value) in (str, bool) or (type(value) is int and abs(value) < 2**60):
        return value
    raise ConvertError(f"{show(value)} is the key of a dict or in a set; only text and numbers are.")


# ---- The machine ---------------------------------------------------------------------------------


class _Mark:
    """Where a tuple, or the items of a list, begin on the stack."""


_MARK = _Mark()


@dataclass
class _Reader:
    """Reads one pickle of `data`, from `position` on.

    Args:
        find_storage: turns a persistent id into a storage; None where persistent ids do not belong.
    """

    data: Buffer
    position: int = 0
    find_storage: Callable[[Any], Any] | None = None
    max_instructions: int = MAX_INSTRUCTIONS
    protocols: tuple[int, ...] = (2, 3, 4, 5)
    text: int = 0
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)

    def run(self) -> Any:
        """The value that the pickle makes; `position` is then behind it.

        Raises:
            ConvertError: there is something in it that does not belong into these files, or it is damaged.
        """
        for _ in range(self.max_instructions):
            start = self.position
            code = self.take(1)[0]
            if code == ord("."):
                if len(self.stack) != 1 or self.stack[0] is _MARK:
                    raise ConvertError(f"it ends at byte {start} with {len(self.stack)} values in place of one.")
                return self.stack[0]
            name = _NAMES.get(code, f"{code:#04x}")
            try:
                if name in _PUSH:
                    self.stack.append(_PUSH[name](self))
                elif name in _CHANGE:
                    _CHANGE[name](self)
                else:
                    raise ConvertError(f"the instruction {name} at byte {start} does not belong into these files.")
            except (IndexError, KeyError, TypeError, AttributeError, UnicodeError) as error:
                # Of our own code here: an empty stack, an unknown memo, the wrong number of arguments, bad UTF-8.
                raise ConvertError(f"it is damaged: the instruction {name} at byte {start} makes no sense.") from error
        raise ConvertError(f"it has more than {self.max_instructions} instructions; no network of these needs so many.")

    # -- reading

    def take(self, size: int) -> Buffer:
        """The next bytes; large ones as a view of the file."""
        end = self.position + size
        if end > len(self.data):
            raise ConvertError(
                f"{size} bytes are wanted at byte {self.position}, but only {len(self.data) - self.position} are left: "
                "it is truncated or damaged."
            )
        part, self.position = self.data[self.position : end], end
        return part if size >= _IN_FILE else bytes(part)

    def integer(self, size: int, signed: bool = False) -> int:
        if size > 16:
            raise ConvertError(f"an integer of {size} bytes does not belong into these files.")
        return int.from_bytes(self.take(size), "little", signed=signed)

    def charge_text(self, size: int) -> None:
        self.text += size
        if self.text > MAX_TEXT:
            raise ConvertError(f"there are more than {MAX_TEXT} bytes of text; no network of these has so much.")

    def string(self, length_size: int) -> str:
        size = self.integer(length_size)
        self.charge_text(size)
        return str(self.take(size), "utf-8", "surrogatepass")

    def line(self) -> str:
        text, end, _ = bytes(self.data[self.position : self.position + 256]).partition(b"\n")
        if not end:
            raise ConvertError(f"the name at byte {self.position} has no end.")
        self.position += len(text) + 1
        return str(text, "utf-8")

    # -- the stack

    def pop_many(self) -> list[Any]:
        """Take all items above the last mark, and the mark."""
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                items = self.stack[start + 1 :]
                del self.stack[start:]
                return items
        raise IndexError("no mark")

    def pop(self, kind: type = object) -> Any:
        value = self.stack.pop()
        if value is _MARK or (kind is not object and type(value) is not kind):
            raise TypeError(f"{type(value).__name__} in place of {kind.__name__}")
        return value

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise TypeError(f"{type(self.stack[-1]).__name__} in place of {kind.__name__}")
        return self.stack[-1]

    def pop_tuple(self, size: int) -> tuple:
        return tuple([self.pop() for _ in range(size)][::-1])

    # -- the instructions with a meaning of their own

    def known(self, module: str, name: str) -> Global:
        full = f"{module}.{name}"
        if full not in CALLS and full not in CLASSES and full not in _OTHER_NAMES:
            raise ConvertError(
                f"it names {show(full)}, which does not belong into these files: it is not an EDM2 network, or it was "
                "made to run code. Nothing of it was run."
            )
        return Global(full)

    def stack_global(self) -> Global:
        name, module = self.pop(str), self.pop(str)
        return self.known(module, name)

    def reduce(self) -> Any:
        arguments, function = self.pop(tuple), self.pop(Global)
        if function.name not in CALLS:
            raise ConvertError(f"it calls {function.name}, which is not a function here.")
        return CALLS[function.name](self, *arguments)

    def new_object(self) -> Any:
        arguments, cls = self.pop(tuple), self.pop(Global)
        if cls.name not in CLASSES or arguments:
            raise ConvertError(f"it makes an object of {cls.name} with {len(arguments)} arguments.")
        return CLASSES[cls.name]()

    def persistent(self) -> Any:
        if self.find_storage is None:
            raise ConvertError("it has a persistent id, which does not belong into these files.")
        return self.find_storage(self.pop(tuple))

    def build(self) -> None:
        """Give the object on the stack its state; whose meaning is fixed by the kind of record."""
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Object) and target.state is None and type(state) is dict:
            target.state = state
        elif isinstance(target, Array) and target.shape is None and type(state) is tuple:
            _, target.shape, target.dtype, _, target.raw = _length(state, 5)
        elif isinstance(target, Dtype) and type(state) is tuple and _length(state, 8)[1] in ("<", ">", "|", "="):
            target.order = state[1]
        elif type(target) is dict and type(state) is dict:
            pass  # attributes of an OrderedDict, such as the module versions of a state_dict
        else:
            raise ConvertError(f"it sets the state of {show(target)} to {show(state)}.")

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        for i in range(0, len(items), 2):
            key, value = _key(items[i]), items[i + 1]
            if key in target:
                raise ConvertError(f"a dict has the key {show(key)} twice.")
            target[key] = value

    def remember(self, index: int) -> None:
        if self.stack[-1] is _MARK:
            raise TypeError("a mark")
        self.memo[index] = self.stack[-1]

    def protocol(self) -> None:
        if (version := self.integer(1)) not in self.protocols:
            raise ConvertError(f"pickle protocol {version} is not one of {', '.join(map(str, self.protocols))}.")


def _length(value: tuple, length: int) -> tuple:
    if len(value) != length:
        raise TypeError(f"{len(value)} items in place of {length}")
    return value


# What Python's own writer uses in protocols 2 to 5, and no more.
_PUSH: dict[str, Callable[[_Reader], Any]] = {
    "NONE": lambda r: None,
    "NEWTRUE": lambda r: True,
    "NEWFALSE": lambda r: False,
    "BININT": lambda r: r.integer(4, signed=True),
    "BININT1": lambda r: r.integer(1),
    "BININT2": lambda r: r.integer(2),
    "LONG1": lambda r: r.integer(r.integer(1), signed=True),
    "BINFLOAT": lambda r: struct.unpack(">d", r.take(8))[0],
    "SHORT_BINUNICODE": lambda r: r.string(1),
    "BINUNICODE": lambda r: r.string(4),
    "BINUNICODE8": lambda r: r.string(8),
    "SHORT_BINBYTES": lambda r: r.take(r.integer(1)),
    "BINBYTES": lambda r: r.take(r.integer(4)),
    "BINBYTES8": lambda r: r.take(r.integer(8)),
    "BYTEARRAY8": lambda r: r.take(r.integer(8)),
    "EMPTY_LIST": lambda r: [],
    "EMPTY_TUPLE": lambda r: (),
    "EMPTY_DICT": lambda r: {},
    "EMPTY_SET": lambda r: set(),
    "TUPLE": lambda r: tuple(r.pop_many()),
    "TUPLE1": lambda r: r.pop_tuple(1),
    "TUPLE2": lambda r: r.pop_tuple(2),
    "TUPLE3": lambda r: r.pop_tuple(3),
    "BINGET": lambda r: r.memo[r.integer(1)],
    "LONG_BINGET": lambda r: r.memo[r.integer(4)],
    "GLOBAL": lambda r: r.known(r.line(), r.line()),
    "STACK_GLOBAL": _Reader.stack_global,
    "REDUCE": _Reader.reduce,
    "NEWOBJ": _Reader.new_object,
    "BINPERSID": _Reader.persistent,
}
_CHANGE: dict[str, Callable[[_Reader], Any]] = {
    "PROTO": _Reader.protocol,
    "FRAME": lambda r: r.integer(8),
    "MARK": lambda r: r.stack.append(_MARK),
    "APPEND": lambda r: (lambda item: r.top(list).append(item))(r.pop()),
    "APPENDS": lambda r: (lambda items: r.top(list).extend(items))(r.pop_many()),
    "SETITEM": lambda r: r.set_items(list(r.pop_tuple(2))),
    "SETITEMS": lambda r: r.set_items(r.pop_many()),
    "ADDITEMS": lambda r: (lambda items: r.top(set).update(map(_key, items)))(r.pop_many()),
    "BUILD": _Reader.build,
    "BINPUT": lambda r: r.remember(r.integer(1)),
    "LONG_BINPUT": lambda r: r.remember(r.integer(4)),
    "MEMOIZE": lambda r: r.remember(len(r.memo)),
}


# ---- Whole files ---------------------------------------------------------------------------------


def read_pickle(data: Buffer) -> tuple[Any, list[Tensor]]:
    """What a pickle holds, and all of its tensors in their order; they stay in `data` until they are loaded.

    A zip file by `torch.save` (a training state) is read as well.

    Args:
        data: the whole file, best as a memory map.

    Raises:
        ConvertError: it is truncated, damaged, or holds anything that does not belong into these files.
    """
    view = memoryview(data)
    reader = _zip_reader(view) if view[:4] == _ZIP_MAGIC else _Reader(view)
    value = reader.run()
    if reader.position != len(reader.data):
        raise ConvertError(f"{len(reader.data) - reader.position} bytes follow its end: it is damaged.")
    return value, reader.tensors


class _StorageId(NamedTuple):
    dtype: torch.dtype
    key: str
    count: int


def _storage_id(persistent_id: Any) -> _StorageId:
    """What ("storage", torch.FloatStorage, key, device, count) says; None may follow, in place of a view's place."""
    if len(persistent_id) < 5 or persistent_id[0] != "storage" or not isinstance(persistent_id[1], Global):
        raise ConvertError("a persistent id is not that of a storage.")
    dtype, key, count = _STORAGES.get(persistent_id[1].name), persistent_id[2], persistent_id[4]
    if dtype is None or type(key) is not str or not _is_shape((count,)) or persistent_id[5:] not in ((), (None,)):
        raise ConvertError(f"a storage is of the unknown type {persistent_id[1].name}, or damaged.")
    return _StorageId(dtype, key, count)


def _read_legacy_header(data: Buffer) -> tuple[torch.dtype, int]:
    """Type and count of the storage in a file of torch's old format, which is checked byte by byte.

    It is five pickles of protocol 2, each of a few plain values, then a count of 8 bytes, then the numbers.
    """
    found: list[Any] = []
    position = 0
    for _ in range(5):
        reader = _Reader(data, position, _storage_id, max_instructions=200, protocols=(2,))
        found.append(reader.run())
        position = reader.position
    magic, version, system, storage, keys = found
    if magic != _LEGACY_MAGIC or version != _LEGACY_VERSION or not isinstance(storage, _StorageId):
        raise ConvertError("the bytes of a tensor are not a storage as torch writes it.")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise ConvertError("the bytes of a tensor were not written on a little-endian machine.")
    dtype, key, count = storage
    size = struct.pack("<q", count)
    if type(keys) is not list or len(keys) != 1 or keys[0] != key or bytes(data[position : position + 8]) != size:
        raise ConvertError("the bytes of a tensor contradict themselves.")
    if len(data) - position - 8 != count * dtype.itemsize:
        raise ConvertError(
            f"a tensor of {count} numbers has {len(data) - position - 8} bytes in place of {count * dtype.itemsize}."
        )
    return dtype, count


class _DirectoryFile:
    """A buffer as the file that `zipfile` wants, for its table of contents only, which must not be large."""

    def __init__(self, data: Buffer):
        self.data, self.position = data, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        position = offset + (0, self.position, len(self.data))[whence]
        if position < 0:
            raise OSError("before the start")
        self.position = position
        return position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(len(self.data) - self.position, 0)
        size = left if size < 0 else min(size, left)
        if size > MAX_ZIP_DIRECTORY:
            raise ConvertError(f"its table of contents has {size} bytes; no training state has so much.")
        part = bytes(self.data[self.position : self.position + size])
        self.position += size
        return part


def _zip_reader(data: Buffer) -> _Reader:
    """The reader of the `data.pkl` in a zip file by `torch.save`."""
    try:
        with zipfile.ZipFile(_DirectoryFile(data)) as file:  # pyright: ignore[reportArgumentType]
            members = {info.filename: info for info in file.infolist()}
    except (zipfile.BadZipFile, struct.error, OSError, ValueError, NotImplementedError) as error:
        reason = error if isinstance(error, ConvertError) else show(str(error))
        raise ConvertError(f"the zip file is damaged or truncated: {reason}") from error
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ConvertError(f"the zip file has {len(pickles)} members called data.pkl; torch.save writes one.")
    folder = pickles[0].removesuffix("data.pkl")

    storages: dict[str, Storage] = {}

    def find_storage(persistent_id: Any) -> Storage:
        dtype, key, count = _storage_id(persistent_id)
        if (known := storages.get(key)) is not None and known.dtype == dtype:
            return known
        if (info := members.get(f"{folder}data/{key}")) is None:
            raise ConvertError(f"the zip file has no member for the storage {show(key)}.")
        if info.file_size != count * dtype.itemsize:
            raise ConvertError(f"a storage of {count} numbers has {info.file_size} bytes in the zip file.")
        storages[key] = Storage(_member(data, info), dtype, info.CRC)
        return storages[key]

    order = members.get(f"{folder}byteorder")
    if order is not None and bytes(_member(data, order)) != b"little":
        raise ConvertError("the tensors were not written on a little-endian machine.")
    pickled = _member(data, members[pickles[0]])
    if zlib.crc32(pickled) != members[pickles[0]].CRC:
        raise ConvertError("the zip file is damaged: the checksum of data.pkl is wrong.")
    return _Reader(pickled, find_storage=find_storage)


def _member(data: Buffer, info: zipfile.ZipInfo) -> Buffer:
    """The bytes of an uncompressed member, as a view of the file."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise ConvertError(f"the member {show(info.filename)} of the zip file is compressed; torch.save stores it.")
    header = bytes(data[info.header_offset : info.header_offset + 30])
    if len(header) < 30 or header[:4] != _ZIP_MAGIC:
        raise ConvertError(f"the zip file is damaged: {show(info.filename)} is not where it should be.")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + info.file_size > len(data):
        raise ConvertError(f"the zip file is truncated within {show(info.filename)}.")
    return data[start : start + info.file_size]
