"""The reader of pickles: what it makes, what it refuses, and that nothing in a file is ever executed."""

import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_edm2.convert import interpret
from diffusers_edm2.pickle_reader import MAX_INSTRUCTIONS, MAX_TENSORS, Array, ConvertError, Object, read_pickle
from fuzz_convert import spares, watch, watch_memory
from official_pickles import EasyDict, Persistent, dumps, tiny_content

# ---- Programs by hand ----------------------------------------------------------------------------


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def program(*parts: bytes, protocol: int = 4) -> bytes:
    return bytes([0x80, protocol]) + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def blob(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(full: str) -> bytes:
    module, _, attribute = full.rpartition(".")
    return text(module) + text(attribute) + b"\x93"


def items(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def sizes(*values: int) -> bytes:
    return items(*map(integer, values))


def inner(tensor: torch.Tensor) -> bytes:
    """A storage's own file, as torch writes it into a pickle."""
    return next(a for _, a, _ in pickletools.genops(pickle.dumps(tensor, 4)) if isinstance(a, bytes) and len(a) > 99)


def tensor(data: bytes, offset: int = 0, shape: tuple = (6,), stride: tuple = (1,)) -> bytes:
    storage = name("torch.storage._load_from_bytes") + items(blob(data)) + b"R"
    arguments = items(storage, integer(offset), sizes(*shape), sizes(*stride), b"\x89", b"N")
    return name("torch._utils._rebuild_tensor_v2") + arguments + b"R"


def array(dtype: bytes, shape: bytes, raw: bytes) -> bytes:
    make = name("numpy.core.multiarray._reconstruct") + items(name("numpy.ndarray"), sizes(0), blob(b"b")) + b"R"
    return make + items(integer(1), shape, dtype, b"\x89", blob(raw)) + b"b"


def dtype(code: str, order: str = "<") -> bytes:
    state = items(integer(3), text(order), b"N", b"N", b"N", integer(-1), integer(-1), integer(0))
    return name("numpy.dtype") + items(text(code), b"\x89", b"\x88") + b"R" + state + b"b"


def array_list(times: int) -> bytes:
    """A list of one array of 4096 numbers, again and again."""
    one = array(dtype("f8"), sizes(4096), struct.pack("<4096d", *range(4096))) + b"q\0"
    return b"](" + one + b"h\0" * (times - 1) + b"e"


def network(kwargs: bytes = b"}") -> bytes:
    """A network pickle without tensors whose constructor's arguments are `kwargs`."""
    state = b"}(" + text("_init_kwargs") + kwargs + text("_init_args") + b")u"
    meta = b"}(" + text("type") + text("class") + text("class_name") + text("Precond") + text("state") + state + b"u"
    return program(b"}", text("ema"), name("torch_utils.persistence._reconstruct_persistent_obj"), items(meta), b"Rs")


def arguments(channel_mult: bytes) -> bytes:
    """A whole set of the constructor's arguments, one of which is given."""
    required = b"".join(text(n) + integer(4) for n in ("img_resolution", "img_channels", "label_dim"))
    return b"}(" + required + text("channel_mult") + channel_mult + b"u"


def bomb(opening: bytes, doubling: bytes, times: int = 60) -> bytes:
    """A value that holds the one before twice, `times` times: 2^60 leaves to whoever walks through it."""
    return opening + b"q\0" + (doubling + b"q\0") * times


TUPLE_BOMB = bomb(b")", b"h\0\x86")
LIST_BOMB = items(bomb(b"]", b"](h\0h\0e"))


def zip_file(pickled: bytes, folder: str = "archive", compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(f"{folder}/data.pkl", pickled)
        for member, content in members.items():
            archive.writestr(f"{folder}/{member.replace('__', '/')}", content)
    return buffer.getvalue()


def storage_id(key: str = "0", count: int = 6, kind: str = "torch.FloatStorage") -> bytes:
    return items(text("storage"), name(kind), text(key), text("cpu"), integer(count)) + b"Q"


# ---- What belongs into these files ---------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_comes_back(protocol):
    value = {
        "numbers": [0, 1, -1, 255, 65536, -(2**31), 2**40, -(2**70), 1.5, float("inf"), True, False, None],
        "text": ["", "kimg", "σ\n", "x" * 300],
        "bytes": [b"\x00\xff", b"y" * 300],
        "nested": ([], {}, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {1, "a"}, OrderedDict(a=OrderedDict())),
        3: EasyDict(a=EasyDict(b=2)),
        None: list(range(3000)),
    }
    value["again"] = value["nested"]
    read, tensors = read_pickle(dumps(value, protocol))
    assert read == value and not tensors
    assert read["again"] is read["nested"]
    assert type(read[3]) is dict  # nothing but plain types


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_come_back(protocol):
    odd = torch.arange(24.0).reshape(2, 3, 4)
    value = {
        "half": torch.randn(3, 4).half(),
        "scalar": torch.tensor(0.25),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "large": torch.randn(200, 200),
        "view": odd[1],
        "transposed": odd.permute(2, 0, 1),
        "long": torch.arange(3),
        "bfloat16": torch.randn(3).bfloat16(),
    }
    read, tensors = read_pickle(dumps(value, protocol))
    assert list(read.values()) == tensors
    for key, expected in value.items():
        loaded = read[key].load()
        assert loaded.dtype == expected.dtype and loaded.equal(expected.detach()), key
        assert loaded.is_contiguous() and type(loaded) is torch.Tensor
        assert loaded.untyped_storage().nbytes() == loaded.numel() * loaded.element_size()  # not the view's whole


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_arrays_and_persistent_objects_come_back(protocol):
    values = [np.float32([[1.5, 2], [3, 4]]), np.arange(3), np.float64(2.5), np.float32(0.5), np.array([True])]
    values.append(np.arange(3, dtype=">i2"))
    read, _ = read_pickle(dumps([*values, Persistent("Thing", {"a": 1})], protocol))
    assert all(isinstance(found, Array) for found in read[:-1])
    assert [found.tolist() for found in read[:-1]] == [value.tolist() for value in values]
    assert isinstance(read[-1], Object) and (read[-1].kind, read[-1].state) == ("Thing", {"a": 1})


def test_both_names_of_numpy():
    new = dumps(np.float32([1, 2]))
    old = new.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    assert b"_core" in new and b"_core" not in old
    assert [read_pickle(data)[0].tolist() for data in (new, old)] == [[1, 2]] * 2


# ---- What does not -------------------------------------------------------------------------------

CALL = name("os.system") + items(text("touch owned")) + b"R"
STORAGE = inner(TENSOR := torch.arange(6.0))
GOOD = tensor(STORAGE)


def header(key: bytes = text("0"), view: bytes = b"N") -> bytes:
    """A storage's file whose own pickles are written otherwise than torch does."""
    values = [integer(0x1950A86A20F9469CFC6C), integer(1001), b"}" + text("little_endian") + b"\x88s"]
    floats = b"ctorch\nFloatStorage\n"
    values += [items(text("storage"), floats, key, text("cpu"), integer(6), view) + b"Q", b"]" + text("0") + b"a"]
    return b"".join(program(value, protocol=2) for value in values) + struct.pack("<q6f", 6, *range(6))


ATTACKS: dict[str, tuple[bytes, str]] = {
    # calls
    "os.system": (pickle.dumps(Calls(os.system, "touch owned")), "names 'posix.system'"),
    "os.system, protocol 2": (pickle.dumps(Calls(os.system, "touch owned"), 2), "names 'posix.system'"),
    "os.system, protocol 0": (pickle.dumps(Calls(os.system, "touch owned"), 0), "GLOBAL|names 'posix.system'"),
    "eval": (pickle.dumps(Calls(eval, "__import__('os').system('touch owned')")), "names 'builtins.eval'"),
    "exec": (pickle.dumps(Calls(exec, "open('owned', 'w')")), "names 'builtins.exec'"),
    "open": (pickle.dumps(Calls(open, "owned", "w")), "names '_?io.open'"),
    "import": (pickle.dumps(Calls(__import__, "antigravity")), "names 'builtins.__import__'"),
    "getattr": (pickle.dumps(Calls(getattr, [], "append")), "names 'builtins.getattr'"),
    "subprocess": (pickle.dumps(Calls(subprocess.Popen, ["touch", "owned"])), "names 'subprocess.Popen'"),
    "a nested pickle": (program(name("pickle.loads"), items(blob(program(CALL))), b"R"), "names 'pickle.loads'"),
    "torch.load": (program(name("torch.serialization.load"), items(text("x.pt")), b"R"), "'torch.serialization.load'"),
    "numpy.load": (program(name("numpy.load"), items(text("x.npy")), b"R"), "names 'numpy.load'"),
    "in a dict of a network": (program(b"}", text("ema"), CALL, b"s"), "names 'os.system'"),
    "in the state of an object": (program(b"}", text("ema"), b"}", text("state"), CALL, b"ss"), "'os.system'"),
    "a module's attribute": (program(name("torch._utils.os.system"), items(), b"R"), "'torch._utils.os.system'"),
    "a dotted name": (
        program(text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93"),
        "__globals__'",
    ),
    "a name with a line break": (program(text("os\nsystem") + text("x") + b"\x93"), r"'os\\nsystem.x'"),
    "a very long name": (program(text("a" * 10**6) + text("b") + b"\x93"), "names 'a{80}'…"),
    "a name without an end": (b"\x80\x02cos" + b"a" * 10**6, "has no end"),
    "names that are numbers": (program(integer(1), integer(2), b"\x93"), "STACK_GLOBAL.*makes no sense"),
    "a call of a class": (program(name("dnnlib.util.EasyDict"), b")R"), "calls dnnlib.util.EasyDict"),
    "a call of text": (program(text("os.system"), b")R"), "REDUCE.*makes no sense"),
    "a call of a tensor": (program(GOOD, b")R"), "REDUCE.*makes no sense"),
    "a call with a list": (program(name("builtins.set"), b"]R"), "REDUCE.*makes no sense"),
    "too many arguments": (program(name("numpy.dtype"), sizes(1, 2, 3, 4), b"R"), "REDUCE.*makes no sense"),
    "a new object of a function": (program(name("builtins.set"), b")\x81"), "makes an object of builtins.set"),
    "a new object with arguments": (program(name("dnnlib.util.EasyDict"), sizes(1), b"\x81"), "with 1 arguments"),
    "INST": (b"\x80\x02(S'touch owned'\nios\nsystem\n.", "instruction STRING"),
    "INST alone": (b"\x80\x02(ios\nsystem\n.", "instruction INST"),
    "OBJ": (b"\x80\x02(cbuiltins\nset\no.", "instruction OBJ"),
    "NEWOBJ_EX": (program(name("dnnlib.util.EasyDict"), b")}\x92"), "instruction NEWOBJ_EX"),
    "EXT1": (program(b"\x82\x01"), "instruction EXT1"),
    "EXT4": (program(b"\x84\x01\x00\x00\x00"), "instruction EXT4"),
    "PERSID": (b"\x80\x02Pos.system\n.", "instruction PERSID"),
    "BINPERSID": (program(storage_id()), "persistent id"),
    "out-of-band buffers": (program(b"\x97"), "instruction NEXT_BUFFER"),
    "an unknown instruction": (program(b"\xff"), "instruction 0xff"),
    # states
    "a state for a list": (program(b"]", b"}", text("__class__"), text("os"), b"sb"), "sets the state of a list"),
    "a state for a name": (program(name("collections.OrderedDict"), b"}b"), "sets the state of a Global"),
    "a state for a tensor": (program(GOOD, b"}b"), "sets the state of a Tensor"),
    "a second state": (program(name("torch.nn.modules.container.ModuleDict"), b")\x81}b}b"), "sets the state"),
    "a state with slots": (program(name("torch.nn.modules.container.ModuleDict"), b")\x81N}\x86b"), "sets the state"),
    "items for an object": (program(name("torch.nn.modules.container.ModuleDict"), b")\x81NNs"), "SETITEM.*no sense"),
    "items for a tuple": (program(b")Na"), "APPEND.*makes no sense"),
    "a persistent function": (
        program(name("torch_utils.persistence._reconstruct_persistent_obj"), items(b"}"), b"R"),
        "persistent object has no dict",
    ),
    # keys
    "a tuple bomb as a key": (program(b"}", TUPLE_BOMB, b"Ns"), "a tuple is the key"),
    "a tuple bomb in a set": (program(b"\x8f(", TUPLE_BOMB, b"\x90"), "a tuple is the key"),
    "a list as a key": (program(b"}]Ns"), "a list is the key"),
    "numbers of one hash": (
        program(b"\x8f(", b"".join(integer(i * (2**61 - 1)) for i in range(10**4)), b"\x90"),
        "key",
    ),
    "a key twice": (program(b"}(", text("a"), b"N", text("a"), b"Nu"), "key 'a' twice"),
    "a key without a value": (program(b"}(", text("a"), b"u"), "SETITEMS.*makes no sense"),
    # bombs
    "a tuple bomb": (program(TUPLE_BOMB), "holds a tuple"),
    "a list bomb": (program(LIST_BOMB), "holds a tuple"),
    "a bomb as the network": (program(b"}", text("ema"), TUPLE_BOMB, b"s"), "holds 'ema', but no network"),
    "a bomb as an argument": (network(b"}" + text("channel_mult") + TUPLE_BOMB + b"s"), "unknown none; missing"),
    "a bomb as an argument of a whole set": (network(arguments(TUPLE_BOMB)), "channel_mult is a tuple, not integers"),
    "an array 4096 times": (network(arguments(array_list(4096))), "channel_mult is a list, not integers"),
    "half precision of text": (
        network(arguments(b"](K\1e" + text("use_fp16") + text("yes"))),
        "use_fp16 is 'yes', not bool or integer",
    ),
    "itself as an item": (program(b"]q\0h\0a"), "holds a list"),
    "deep lists": (program(b"]" * 200_000, b"a" * 199_999), "holds a list"),
    "deep tuples": (program(b")", b"\x85" * 400_000), "holds a tuple"),
    "deep dicts": (program(b"}", b"K\0}" * 100_000, b"s" * 100_000), "holds 0, but no network"),
    "marks": (program(b"(" * 400_000), "with 400000 values"),
    "too many instructions": (program(b"N" * (MAX_INSTRUCTIONS + 1)), "instructions; no network"),
    "text again and again": (
        program(text("x" * 10**6) + b"q\1", (name("_codecs.encode") + items(b"h\1", text("latin1")) + b"R") * 100),
        "bytes of text",
    ),
    "much text": (program(text("x" * (17 * 2**20))), "bytes of text"),
    "too many tensors": (program(tensor(b"") * (MAX_TENSORS + 1)), "more than 10000 tensors"),
    # declared sizes
    "bytes of 2^63": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f", "only 0 are left"),
    "bytes of 2^64": (b"\x80\x04\x8e" + b"\xff" * 8, "only 0 are left"),
    "text of 2^46": (b"\x80\x04\x8d\x00\x00\x00\x00\x00\x40\x00\x00", "bytes of text"),
    "a bytearray of 2^40": (b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00", "only 0 are left"),
    "a frame of 2^64": (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "not the dict"),
    "an integer of 2^31 bytes": (b"\x80\x04\x8b\xff\xff\xff\x7f", "instruction LONG4"),
    "an integer of 255 bytes": (b"\x80\x04\x8a\xff" + b"\x7f" * 255 + b".", "integer of 255 bytes"),
    "a memo of 2^32": (program(b"Nr\xff\xff\xff\xffj\xff\xff\xff\xff\x86"), "holds a tuple"),
    "an unknown memo": (program(b"j\x00\x00\x00\x01"), "LONG_BINGET.*makes no sense"),
    # ends
    "nothing": (b"", "1 bytes are wanted at byte 0"),
    "no value": (b"\x80\x04.", "with 0 values"),
    "two values": (b"\x80\x04NN.", "with 2 values"),
    "a mark as the value": (b"\x80\x04(.", "with 1 values in place of one"),
    "something behind the end": (dumps(tiny_content()) + b"cos\nsystem\n", "11 bytes follow its end"),
    "truncated": (dumps(tiny_content())[:-5000], "truncated or damaged"),
    "protocol 0": (pickle.dumps({"ema": 1}, 0), "instruction"),
    "protocol 9": (b"\x80\x09N.", "protocol 9"),
    "other files": (b"<!DOCTYPE html><html>404</html>", "instruction 0x3c"),
    "bad UTF-8": (b"\x80\x04\x8c\x02\xff\xff.", "SHORT_BINUNICODE.*makes no sense"),
    "escapes for the terminal": (program(b"}", text("\x1b[2J\x1b]0;owned\x07"), b"Ns"), r"holds '\\x1b\[2J"),
}
TENSOR_ATTACKS: dict[str, tuple[bytes, str]] = {
    "an offset beyond": (tensor(STORAGE, offset=1), "takes the numbers 1 to 7 of a storage of 6"),
    "a shape beyond": (tensor(STORAGE, shape=(7,)), "takes the numbers 0 to 7"),
    "a giant shape": (tensor(STORAGE, shape=(2**39, 2**39), stride=(2**39, 1)), "of a storage of 6"),
    "a giant stride": (tensor(STORAGE, shape=(2, 3), stride=(2**39, 1)), "strides"),
    "a stride of 0": (tensor(STORAGE, shape=(2**39,), stride=(0,)), "strides"),
    "overlapping rows": (tensor(STORAGE, shape=(3, 3), stride=(1, 1)), "strides"),
    "a nested call": (tensor(program(CALL, protocol=2)), "names 'os.system'"),
    "a nested call behind the header": (
        tensor(STORAGE.replace(b"\x80\x02(", b"\x80\x02" + CALL + b"(")),
        "names 'os.system'",
    ),
    "a nested bomb": (tensor(program(b"}", TUPLE_BOMB, b"Ns", protocol=2)), "a tuple is the key"),
    "a storage cut short": (tensor(STORAGE[:-1]), "has 23 bytes in place of 24"),
    "a storage that is longer": (tensor(STORAGE + b"\0"), "has 25 bytes"),
    "a giant storage": (tensor(STORAGE.replace(b"K\x06N", b"J\xff\xff\xff\x7fN")), "contradict themselves"),
    "another count": (tensor(STORAGE[:-32] + struct.pack("<q", 2**40) + STORAGE[-24:]), "contradict themselves"),
    "another key": (tensor(STORAGE.replace(b"a.\x06", b"\x85.\x06")), "2 values in place of one"),
    "a zip file": (tensor(zip_file(b"N.")), "instruction 0x50|PERSID"),
    "another machine": (tensor(STORAGE.replace(b"\x88X", b"\x89X")), "little-endian"),
    "another type": (tensor(STORAGE.replace(b"torch\nFloatStorage", b"torch\nFloatStorages")), "FloatStorages'"),
    "another protocol": (tensor(STORAGE.replace(b"\x80\x02M", b"\x80\x03M")), "protocol 3 is not one of 2"),
    "many instructions": (tensor(b"\x80\x02" + b"N" * 300), "200 instructions"),
    "a place of a view": (tensor(header(view=b")")), "unknown type torch.FloatStorage, or damaged"),
    "a list as the place of a view": (tensor(header(view=b"]")), "unknown type torch.FloatStorage, or damaged"),
    "more behind the place of a view": (tensor(header(view=b"NN")), "unknown type torch.FloatStorage, or damaged"),
    "MEMOIZE in the header": (tensor(header(key=text("0") + b"\x94")), "not as torch writes them"),
    "short text in the header": (tensor(header(key=b"\x8c\x010")), "not as torch writes them"),
    "long text in the header": (tensor(header(key=b"\x8d\x01" + b"\0" * 7 + b"0")), "not as torch writes them"),
    "a frame in the header": (tensor(header(key=b"\x95" + b"\0" * 8 + text("0"))), "not as torch writes them"),
    "not finite": (tensor(inner(torch.tensor([1, 2, 3, 4, 5, float("nan")]))), "not finite"),
}
BAD_TENSORS: dict[str, tuple[bytes, str]] = {
    "a negative offset": (tensor(STORAGE, offset=-1), "not made of"),
    "a negative size": (tensor(STORAGE, shape=(-1,)), "not made of"),
    "2^80 numbers": (tensor(STORAGE, shape=(2**80,)), "not made of"),
    "100 axes": (tensor(STORAGE, shape=(1,) * 100, stride=(1,) * 100), "not made of"),
    "other strides": (tensor(STORAGE, shape=(6,), stride=(6, 1)), "has shape \\(6,\\) and strides"),
    "no storage": (
        name("torch._utils._rebuild_tensor_v2") + items(b"N", integer(0), sizes(6), sizes(1), b"\x89", b"N") + b"R",
        "not made of a storage",
    ),
    "a storage of a list": (name("torch.storage._load_from_bytes") + items(b"]") + b"R", "made from a list"),
    "a storage of text": (name("torch.storage._load_from_bytes") + items(text("x")) + b"R", "made from 'x'"),
    "a parameter of a name": (
        name("torch._utils._rebuild_parameter") + items(name("numpy.ndarray"), b"\x89", b"N") + b"R",
        "made from a Global",
    ),
}
BAD_ARRAYS: dict[str, tuple[bytes, str]] = {
    "objects": (array(dtype("O8", "|"), sizes(1), b"12345678"), "has the type 'O8'"),
    "text": (array(dtype("U4"), sizes(1), b"1234567890123456"), "has the type 'U4'"),
    "a structure": (array(dtype("f4,f4"), sizes(1), b"12345678"), "has the type"),
    "no type": (array(text("f4"), sizes(1), b"1234"), "has the type None"),
    "no numbers": (array(dtype("f4"), sizes(0, 7), b"1"), "has 1 bytes"),
    "lists without numbers": (array(dtype("f4"), sizes(2**25, 0), b""), "more than 4096 numbers or lists"),
    "many lists without numbers": (array(dtype("f4"), sizes(2**39, 0), b""), "more than 4096"),
    "a giant shape without numbers": (array(dtype("f4"), sizes(0, 2**39, 2**39), b""), "more than 4096"),
    "an array in place of bytes": (
        name("numpy.core.multiarray.scalar") + items(dtype("f4"), b"]") + b"R",
        "is damaged",
    ),
    "too few bytes": (array(dtype("f4"), sizes(2), b"1234"), "has 4 bytes"),
    "a giant shape": (array(dtype("f4"), sizes(2**39, 2**39), b""), "more than 4096"),
    "a negative shape": (array(dtype("f4"), sizes(-1, -1), b"1234"), "damaged"),
}


ZIPS: dict[str, tuple[bytes, str]] = {
    "compressed": (zip_file(b"\x80\x02" + b"N" * 10**6, compression=zipfile.ZIP_DEFLATED), "compressed"),
    "a path out": (zip_file(program(storage_id("../../../etc/passwd"))), "no member for the storage '../../../etc"),
    "a folder out": (zip_file(program(b"}"), folder=".."), "no network"),
    "a folder at the root": (zip_file(program(b"}"), folder="/etc"), "0 members called data.pkl"),
    "no storage": (zip_file(program(storage_id())), "no member for the storage '0'"),
    "a short storage": (zip_file(program(storage_id()), data__0=b"1234"), "has 4 bytes in the zip file"),
    "a giant storage": (zip_file(program(storage_id(count=2**39)), data__0=b"1234"), "of 549755813888 numbers"),
    "an odd storage": (zip_file(program(storage_id(kind="numpy.ndarray")), data__0=b"1234"), "unknown type numpy"),
    "another id": (zip_file(program(items(text("module"), text("os")), b"Q")), "not that of a storage"),
    "a call": (zip_file(program(CALL)), "names 'os.system'"),
    "no pickle": (zip_file(b"").replace(b"data.pkl", b"data.txt"), "0 members called data.pkl"),
    "another machine": (zip_file(program(b"}"), byteorder=b"big"), "little-endian"),
    "truncated": (zip_file(program(b"}"))[:-30], "damaged or truncated"),
    "a changed pickle": (zip_file(program(b"}")).replace(program(b"}"), program(b"]")), "checksum of data.pkl"),
    "many members": (zip_file(program(b"}"), **{f"m{i}": b"" for i in range(60_000)}), "table of contents"),
}
PARTS = {
    **{f"a tensor: {key}": attack for key, attack in TENSOR_ATTACKS.items()},
    **{f"no tensor: {key}": attack for key, attack in BAD_TENSORS.items()},
    **{f"an array: {key}": attack for key, attack in BAD_ARRAYS.items()},
}
HOSTILE = {
    **ATTACKS,
    **{f"a zip: {key}": attack for key, attack in ZIPS.items()},
    **{key: (program(value), match) for key, (value, match) in PARTS.items()},
}


@pytest.fixture(scope="module")
def warm() -> None:
    """Codecs and torch's own modules are loaded when they are first needed."""
    interpret(dumps(tiny_content()), "warm").load_unet()
    "".encode("cp437")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("attack", HOSTILE)
def test_attack_is_refused(attack, warm, tmp_path, monkeypatch):
    """Within seconds and 300 MiB, with the reason, and with nothing imported, executed, opened or written."""
    monkeypatch.chdir(tmp_path)
    data, message = HOSTILE[attack]
    with watch_memory() as more, watch() as events, pytest.raises(ConvertError, match=message) as caught:
        if attack in PARTS:
            value, tensors = read_pickle(data)
            [t.load() for t in tensors] or value.tolist()
        else:
            interpret(data, attack)
    assert not events
    assert not list(tmp_path.iterdir())
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert more[0] < 300


def test_header_by_hand_is_read():
    """So that what is refused in others like it is what they have more."""
    (found,) = read_pickle(program(tensor(header())))[1]
    assert found.load().equal(TENSOR)


def test_memory_of_a_block_is_seen():
    """Whatever was used before, and although it is free again."""
    for size in (400, 200):
        with watch_memory() as more:
            bytearray(b"x") * (size * 2**20)
        assert size - 5 < more[0] < size + 50


@pytest.mark.parametrize(
    ("mutated", "expected"),
    [
        (b"abcDEFghX", True),
        (b"abcDxFghi", False),
        (b"XabcDEFghi", True),
        (b"abcghi", False),
        (b"abcDEFghixx", True),
        (b"abcDEFhi", True),
        (b"abDEFghi", True),
        (b"abcDEghi", False),
        (b"abcDExFghi", False),
        (b"abcxDEFghi", True),
    ],
)
def test_which_changes_are_outside_of_the_numbers(mutated, expected):
    assert spares(b"abcDEFghi", mutated, [(3, 6)]) == expected


def test_watch_sees_what_an_attack_would_do(tmp_path):
    with watch() as events:
        eval("1 + 1")
        compile("1", "", "eval")
        open(tmp_path / "owned", "w").close()
        os.system("true")
    assert {event.partition(" ")[0] for event in events} >= {"exec", "compile", "open", "os.system"}


@pytest.mark.slow
def test_mutated_files_are_converted_or_refused():
    """2000 files in a process of its own; `tests/fuzz_convert.py` is what to run for more."""
    script = Path(__file__).with_name("fuzz_convert.py")
    result = subprocess.run([sys.executable, script, "2000"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = {k: float(v) for k, v in (part.rsplit(" ", 1) for part in result.stdout.strip().split(", "))}
    assert figures["files"] == 2000 and 20 < figures["converted"] < 1000  # it reaches the end, and it refuses
    assert figures["of another length"] > 5
    assert figures["slowest"] < 10 and figures["MiB more"] < 300
