"""Mutated files of the official structure, read under the eyes of the interpreter.

    python tests/fuzz_convert.py 100000 [seed]

Each file has to be converted, or refused with a ConvertError; nothing else may be raised, and nothing imported,
compiled, executed or opened. What is converted has the same tensors as before, except where the changed bytes were a
tensor's own numbers, which pickles do not protect.
"""

import io
import pickletools
import random
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from diffusers_edm2.convert import Checkpoint, ConvertError, interpret
from official_pickles import dumps, save_training_state, tiny_content, training_state

# What the interpreter reports of a reading that does only what it should: torch.load looks up its caller's frame, ...
HARMLESS = ("sys._getframe", "builtins.id", "object.__getattr__", "object.__setattr__")
_events: list[str] | None = None


def _hook(event: str, args: tuple) -> None:
    if _events is not None and not event.startswith(HARMLESS):
        _events.append(f"{event} {str(args)[:100]}")


sys.addaudithook(_hook)  # cannot be removed; it looks at nothing outside of `watch`


@contextmanager
def watch() -> Iterator[list[str]]:
    """Collect what Python's audit events tell of this block: imports, compiled or executed code, opened files, ..."""
    global _events
    _events = found = []
    try:
        yield found
    finally:
        _events = None


@contextmanager
def watch_memory() -> Iterator[list[float]]:
    """Say how far the memory of this block went above what was in use before, in MiB."""

    def status(name: str) -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[name].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, starts from what is in use now
    before, found = status("VmRSS"), []
    yield found
    found.append((status("VmHWM") - before) / 1024)


# As pieces of programs: what an attacker writes, and single instructions with absurd arguments.
SNIPPETS = [
    b"cos\nsystem\n(X\x09\x00\x00\x00echo owned\x85R",
    b"cbuiltins\neval\n(X\x03\x00\x00\x001+1\x85R",
    b"c__builtin__\nexec\n",
    b"\x8c\x08builtins\x8c\x06getattr\x93",
    b"(i__main__\nX\n",
    b"(cos\nsystem\no",
    b"\x82\x01",
    b"P0\n",
    b"Q",
    b"\x81",
    b"\x92",
    b"R",
    b"b",
    b"}",
    b"]",
    b")",
    b"(",
    b"t",
    b"u",
    b"s",
    b"a",
    b"e",
    b"N",
    b"\x88",
    b"0",
    b"1",
    b"2",
    b".",
    b"\x94",
    b"h\x00",
    b"h\x05",
    b"h\x20",
    b"q\x03",
    b"j\xff\xff\xff\xff",
    b"r\xff\xff\xff\xff",
    b"B\xff\xff\xff\xff",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x96\x00\x00\x00\x00\x00\x01\x00\x00",
    b"\x8d\x00\x00\x00\x00\x40\x00\x00\x00",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8a\xff",
    b"J\xff\xff\xff\xff",
    b"G\x7f\xf0\x00\x00\x00\x00\x00\x00",
    b"\x80\x00",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\xff",
]


def mutate(data: bytes, starts: list[int], dice: random.Random) -> bytes:
    """One of: bytes changed, truncated, parts copied or cut out, instructions inserted, doubled or removed."""
    kind = dice.randrange(7)
    changed = bytearray(data)
    if kind == 0:
        for _ in range(dice.choice((1, 1, 1, 2, 8))):
            changed[dice.randrange(len(data))] = dice.randrange(256)
    elif kind == 1:  # within instructions, not within numbers
        position = dice.choice(starts) + dice.randrange(4)
        changed[min(position, len(data) - 1)] ^= 1 << dice.randrange(8)
    elif kind == 2:
        del changed[dice.randrange(len(data)) :]
    elif kind == 3:
        start, length, target = dice.randrange(len(data)), dice.randrange(1, 400), dice.randrange(len(data))
        changed[target : target + dice.choice((0, length))] = data[start : start + length]
    elif kind == 4:
        start = dice.randrange(len(data))
        del changed[start : start + dice.randrange(1, 400)]
    elif kind == 5:
        changed[(at := dice.choice(starts)) : at] = dice.choice(SNIPPETS)
    else:
        first = dice.randrange(len(starts) - 1)
        instruction = data[starts[first] : starts[min(first + dice.randrange(1, 6), len(starts) - 1)]]
        at = dice.choice(starts)
        changed[at : at + dice.choice((0, len(instruction)))] = instruction
    return bytes(changed)


class Seed(NamedTuple):
    """A file to begin with: where its instructions start, and the ranges of the tensors' numbers."""

    name: str
    data: bytes
    starts: list[int]
    numbers: list[tuple[int, int]]
    rezip: Callable[[bytes], bytes] | None = None


def seeds() -> list[Seed]:
    found = []
    for protocol in (2, 4):
        data = dumps(tiny_content(), protocol)
        found.append(Seed(f"protocol {protocol}", data, *anatomy(data)))
    buffer = io.BytesIO()
    save_training_state(training_state(objects=True), buffer)
    with zipfile.ZipFile(buffer) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}

    def rezip(pickled: bytes) -> bytes:
        """The archive with another data.pkl and a checksum that fits."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, pickled if name.endswith("data.pkl") else content)
        return buffer.getvalue()

    pickled = next(content for name, content in members.items() if name.endswith("data.pkl"))
    found.append(Seed("zip, data.pkl", pickled, anatomy(pickled)[0], [], rezip))
    return [*found, Seed("zip", buffer.getvalue(), list(range(0, len(buffer.getvalue()), 16)), [])]


def anatomy(data: bytes) -> tuple[list[int], list[tuple[int, int]]]:
    found = list(pickletools.genops(data))
    starts = [position for _, _, position in found if position is not None]
    numbers = []
    for i, (_, argument, _) in enumerate(found):
        text = argument.encode("latin1", "replace") if isinstance(argument, str) else argument
        if isinstance(text, bytes) and b"torch\nHalfStorage" in text:  # the inner file of a tensor
            numbers.append((starts[i], starts[i + 1]))
    return starts, numbers


def common(a: bytes, b: bytes) -> int:
    """How many bytes are the same at the beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def spares(data: bytes, mutated: bytes, numbers: list[tuple[int, int]]) -> bool:
    """Whether the bytes that differ are outside of `numbers`, ranges of `data`."""
    if len(data) == len(mutated):
        differs = [i for i, (x, y) in enumerate(zip(mutated, data, strict=True)) if x != y]
        return not any(a <= i < b for i in differs for a, b in numbers)
    first = common(data, mutated)
    tail = common(data[first:][::-1], mutated[first:][::-1])
    return not any(first < b and a < len(data) - tail for a, b in numbers)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fuzz(count: int, seed: int = 0) -> dict[str, float]:
    """Convert `count` mutated files. Raises at the first that breaks a promise; returns figures."""
    dice = random.Random(seed)
    files = seeds()
    originals = [seed.rezip(seed.data) if seed.rezip else seed.data for seed in files]
    whole = [interpret(data, "original").load_unet().state_dict() for data in originals]
    "".encode("cp437")  # Python's own codec for the names in zip files is loaded when it is first needed
    converted, compared, slowest, began = 0, 0, 0.0, time.perf_counter()
    for number in range(count):
        name, data, starts, numbers, rezip = files[number % len(files)]
        expected = whole[number % len(files)]
        mutated = mutate(data, starts, dice)
        changed = rezip(mutated) if rezip else mutated
        start = time.perf_counter()
        with watch() as events:
            try:
                checkpoint: Checkpoint | None = interpret(changed, name)
                tensors = checkpoint.load_unet().state_dict()
            except ConvertError as error:
                checkpoint, tensors, message = None, {}, str(error)
        slowest = max(slowest, time.perf_counter() - start)
        assert not events, (number, events)
        if checkpoint is None:
            assert message.isprintable() and 20 < len(message) < 3000, (number, message)
            continue
        converted += 1
        if spares(data, mutated, numbers):
            compared += len(mutated) != len(data)
            assert same(tensors, expected), (number, name)
        assert tensors.keys() == expected.keys(), number
    return {
        "files": count,
        "converted": converted,
        "of another length": compared,
        "seconds": time.perf_counter() - began,
        "slowest": slowest,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with watch_memory() as more:
        figures = fuzz(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    figures["MiB more"] = more[0]
    print(", ".join(f"{name} {value:.6g}" for name, value in figures.items()))
