"""The collectives of a compiled program, read from its text (HLO after all of the compiler's passes).

The compiler's own cost analysis counts the body of a loop once and a kernel as nothing. Here an operation counts as
often as the loops around it run, and once where the compiler spread one collective over several places.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BITS = {"pred": 8, "token": 0}  # other types name their bits, as f32 and bf16 do

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COLLECTIVE = re.compile(rf"(\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")
# Between slices of TPUs a collective is handed to the hosts, piece by piece; each slice has a program of its own.
_HANDED = re.compile(r'\((.*?\]\S*), .*\) send\(.*_xla_megascale_transfer_type="(\w+)"')
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_ROLES = "calls|body|condition|to_apply|branch_computations|called_computations"
_CALLED = re.compile(rf"({_ROLES})=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """One collective operation."""

    kind: str  # one of KINDS
    num_bytes: int  # of its result on a device
    groups: np.ndarray  # [groups, members] of devices that exchange; of a permute [pairs, 2], from and to
    times: int  # a run of the program
    source: str  # the operation of the traced program that it serves
    at_least: bool = False  # it stands in a loop of unknown length, which counts once

    @property
    def moved(self) -> float:
        """Bytes that a device sends, each time, if it goes round a ring."""
        members = self.groups.shape[1]
        share = (members - 1) / members
        ring = {"all-gather": share, "all-to-all": share, "all-reduce": 2 * share, "reduce-scatter": members - 1}
        return ring.get(self.kind, 1.0) * self.num_bytes  # a permute sends all of it, once

    def slices(self, devices_per_slice: int) -> int:
        """How many slices it spans."""
        return max(len(np.unique(group // devices_per_slice)) for group in self.groups)


def collectives(text: str, num_devices: int) -> list[Collective]:
    """The collective operations of a program for ``num_devices`` devices, numbered as in its mesh, row by row.

    The text may be that of one of several slices, which do the same.
    """
    computations, entry = _computations(text)
    header = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    in_slice = int(header[1]) if header else num_devices
    like = np.arange(num_devices).reshape(-1, in_slice).T  # each device, and those like it in the other slices
    times, unclear = _times(computations, entry)
    unique: dict[str, Collective] = {}
    for name, lines in computations.items():
        for line in lines.values():
            collective = (_inside(line, in_slice) or _between(line, like)) if times[name] else None
            if collective is None:
                continue
            kind, num_bytes, groups = collective
            channel = re.search(r"channel_id=(\d+)", line)
            operation = re.search(r'op_name="([^"]*)"', line)
            op = Collective(kind, num_bytes, groups, times[name], operation[1] if operation else "", name in unclear)
            # one that runs beside other work stands, with the same channel, in each piece of that work
            key = f"{channel[1]} {kind} {op.num_bytes} {op.source}" if channel else f"{name} {line}"
            if key not in unique or op.times > unique[key].times:
                unique[key] = op
    return list(unique.values())


def _inside(line: str, num_devices: int) -> tuple[str, int, np.ndarray] | None:
    """Kind, bytes and groups of a collective between devices of one program."""
    match = _COLLECTIVE.match(line)
    if match is None:
        return None
    result, kind, start = match.groups()
    return kind, _num_bytes(result, kind, bool(start)), _groups(line, kind, num_devices)


def _between(line: str, groups: np.ndarray) -> tuple[str, int, np.ndarray] | None:
    """The same of what is handed to the hosts; the line has what a device sends, not the result."""
    match = _HANDED.match(line)
    if match is None:
        return None
    sent, kind = match[1], match[2].lower().replace("_", "-")
    if kind not in KINDS:  # from one slice to another
        kind = "collective-permute"
    members = groups.shape[1]
    share = {"all-gather": members, "reduce-scatter": 1 / members}.get(kind, 1)
    return kind, int(_num_bytes(sent, kind, start=False) * share), groups


Computation = dict[str, str]  # instruction by name; that of the result also as ROOT


def _computations(text: str) -> tuple[dict[str, Computation], str]:
    """All computations by name, and the name of the one that is run."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name = header[2]
            computations[name] = {}
            entry = name if header[1] else entry
        elif (instruction := _INSTRUCTION.match(line)) and name:
            computations[name][instruction[2]] = instruction[3]
            if instruction[1]:
                computations[name]["ROOT"] = instruction[3]
    return computations, entry


def _times(computations: dict[str, Computation], entry: str) -> tuple[dict[str, int], set[str]]:
    """How often each computation runs, and those of which that is not known. Callers stand behind what they call."""
    times: dict[str, int] = defaultdict(int)
    times[entry] = 1
    unclear: set[str] = set()
    for name in reversed(computations):
        for called, often in _calls(name, computations) if times[name] else ():
            times[called] += (often or 1) * times[name]
            if often is None or name in unclear:
                unclear.add(called)
    return times, unclear


def _calls(name: str, computations: dict[str, Computation]) -> Iterator[tuple[str, int | None]]:
    """Computations that this one runs, and how often; None: a loop of unknown length."""
    for instruction, line in computations[name].items():
        if instruction == "ROOT":  # it stands under its name, too
            continue
        matches = _CALLED.findall(line)
        called = {role: (several or single).replace("%", "").split(", ") for role, several, single in matches}
        for role, names in called.items():
            for inner in names:
                looped = role == "body"
                yield inner, _trips(line, computations[called["condition"][0]], computations[inner]) if looped else 1


def _trips(line: str, condition: Computation, body: Computation) -> int | None:
    """How often a loop runs: as the compiler says, or from 0 to the condition's constant by the body's steps."""
    if match := _TRIPS.search(line):
        return int(match[1])
    compared = re.search(r"compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", condition["ROOT"])
    if compared is None:
        return None
    index = re.search(r"get-tuple-element\(.*?\), index=(\d+)", condition[compared[1]])
    limit = _constant(condition, compared[2])
    results = re.search(r" tuple\((.*?)\)", body["ROOT"])
    if index is None or limit is None or results is None:
        return None
    counter = body.get(results[1].replace("%", "").split(", ")[int(index[1])], "")
    added = re.search(r" add\(%?[\w.\-]+, %?([\w.\-]+)\)", counter)
    step = _constant(body, added[1]) if added else None
    return None if step is None else -(-limit // step)


def _constant(computation: Computation, name: str) -> int | None:
    match = re.search(r" constant\((\d+)\)", computation.get(name, ""))
    return int(match[1]) if match else None


def _num_bytes(result: str, kind: str, start: bool) -> int:
    arrays = _ARRAY.findall(result)
    if start and kind != "all-reduce":  # (operands, results, contexts)
        arrays = arrays[1:2]
    return sum(_item_bits(dtype) * int(np.prod([int(n) for n in dims.split(",") if n])) for dtype, dims in arrays) // 8


def _item_bits(dtype: str) -> int:
    if dtype in ITEM_BITS:
        return ITEM_BITS[dtype]
    bits = re.search(r"\d+", dtype)
    assert bits, f"type {dtype} of unknown size"
    return int(bits[0])


def _groups(line: str, kind: str, num_devices: int) -> np.ndarray:
    """[groups, members]; the ways of writing them are those of XLA's printer."""
    if kind == "collective-permute":
        return _listed(re.search(r"source_target_pairs=\{(\{.*?\})\}", line))
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        axes = re.findall(r"'(\w+)'", named[3])
        grid = np.arange(num_devices).reshape(tuple(sizes.values()))
        inside = [list(sizes).index(axis) for axis in axes]
        outside = [i for i in range(grid.ndim) if i not in inside]
        return grid.transpose(*outside, *inside).reshape(-1, int(np.prod([grid.shape[i] for i in inside])))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
        grid = np.arange(num_devices).reshape(numbers(iota[2]))
        return grid.transpose(numbers(iota[3]) if iota[3] else range(grid.ndim)).reshape(numbers(iota[1]))
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    return _listed(listed) if listed else np.arange(num_devices)[None]


def _listed(match: re.Match | None) -> np.ndarray:
    assert match, "a collective without devices"
    return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])])
