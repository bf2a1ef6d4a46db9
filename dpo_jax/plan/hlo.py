"""Read the collectives of a compiled program from its text, which is HLO after all compiler passes.

The compiler's own cost analysis counts a loop body once and a kernel as nothing. Here an operation counts as often as
its enclosing loops run, and once if the compiler split one collective over several places.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BITS = {"pred": 8, "token": 0}  # other types have their bits in their name, such as f32 and bf16

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COLLECTIVE = re.compile(rf"(\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")
# A collective between TPU slices is sent through the hosts in pieces; each slice runs its own program.
_SEND = re.compile(r'\((.*?\]\S*), .*\) send\(.*_xla_megascale_transfer_type="(\w+)"')
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_ROLES = "calls|body|condition|to_apply|branch_computations|called_computations"
_CALLEES = re.compile(rf"({_ROLES})=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))")
_TRIP_COUNT = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """A collective operation, with its size, its groups of devices and how often it runs."""

    kind: str  # one of KINDS
    num_bytes: int  # bytes of its result, per device
    groups: np.ndarray  # [groups, members], device ids; for a permute [pairs, 2], source and target
    times: int  # executions per run of the program
    source: str  # name of the traced operation that it belongs to
    at_least: bool = False  # inside a loop of unknown length, which counts once

    @property
    def moved(self) -> float:
        """Bytes that a device sends per execution with a ring algorithm."""
        members = self.groups.shape[1]
        share = (members - 1) / members
        ring = {"all-gather": share, "all-to-all": share, "all-reduce": 2 * share, "reduce-scatter": members - 1}
        return ring.get(self.kind, 1.0) * self.num_bytes  # a permute sends everything once

    def slices(self, devices_per_slice: int) -> int:
        """Return the number of TPU slices that the collective spans."""
        return max(len(np.unique(group // devices_per_slice)) for group in self.groups)


def collectives(text: str, num_devices: int) -> list[Collective]:
    """Return the collectives of a program; its ``num_devices`` devices are numbered in the mesh's row-major order.

    The text may be that of one of several slices, which all run the same program.
    """
    computations, entry = _computations(text)
    header = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    devices_per_slice = int(header[1]) if header else num_devices
    peers = np.arange(num_devices).reshape(-1, devices_per_slice).T  # each device with its peers in the other slices
    times, uncertain_names = _times(computations, entry)
    unique: dict[str, Collective] = {}
    for name, lines in computations.items():
        for line in lines.values():
            collective = (_inside(line, devices_per_slice) or _between(line, peers)) if times[name] else None
            if collective is None:
                continue
            kind, num_bytes, groups = collective
            operation = re.search(r'op_name="([^"]*)"', line)
            op = Collective(
                kind, num_bytes, groups, times[name], operation[1] if operation else "", name in uncertain_names
            )
            # An overlapped collective appears, with the same chain or channel, in each piece of the overlapped work.
            # Without a chain, channel 1 identifies nothing: JAX gives it to all collectives of a `shard_map`.
            piece = re.search(r'chain_id="\d+"', line) or re.search(r"channel_id=(?!1\b)\d+", line)
            key = f"{piece[0]} {kind} {op.num_bytes} {op.source}" if piece else f"{name} {line}"
            if key not in unique or op.times > unique[key].times:
                unique[key] = op
    return list(unique.values())


def _inside(line: str, num_devices: int) -> tuple[str, int, np.ndarray] | None:
    """Return kind, bytes and groups of a collective inside one slice, or None for any other line."""
    match = _COLLECTIVE.match(line)
    if match is None:
        return None
    result, kind, start_suffix = match.groups()
    return kind, _num_bytes(result, kind, bool(start_suffix)), _groups(line, kind, num_devices)


def _between(line: str, groups: np.ndarray) -> tuple[str, int, np.ndarray] | None:
    """Return kind, bytes and groups of a collective between slices; its line has the operand sent, not the result."""
    match = _SEND.match(line)
    if match is None:
        return None
    operand, kind = match[1], match[2].lower().replace("_", "-")
    if kind not in KINDS:  # from one slice to another
        kind = "collective-permute"
    members = groups.shape[1]
    factor = {"all-gather": members, "reduce-scatter": 1 / members}.get(kind, 1)
    return kind, int(_num_bytes(operand, kind, start=False) * factor), groups


Computation = dict[str, str]  # name -> instruction; the result's instruction also as ROOT


def _computations(text: str) -> tuple[dict[str, Computation], str]:
    """Return all computations by name, and the name of the entry computation."""
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
    """Return how often each computation runs, and the computations for which that is only a lower bound."""
    times: dict[str, int] = defaultdict(int)
    times[entry] = 1
    uncertain_names: set[str] = set()
    for name in reversed(computations):  # in the text, callers come after callees
        for called, count in _calls(name, computations) if times[name] else ():
            times[called] += (count or 1) * times[name]
            if count is None or name in uncertain_names:
                uncertain_names.add(called)
    return times, uncertain_names


def _calls(name: str, computations: dict[str, Computation]) -> Iterator[tuple[str, int | None]]:
    """Yield each computation that the named one calls, with the number of times; None for a loop of unknown length."""
    for instruction, line in computations[name].items():
        if instruction == "ROOT":  # also listed under its name
            continue
        matches = _CALLEES.findall(line)
        roles = {role: (several or single).replace("%", "").split(", ") for role, several, single in matches}
        for role, names in roles.items():
            for callee in names:
                is_loop = role == "body"
                yield callee, _trips(line, computations[roles["condition"][0]], computations[callee]) if is_loop else 1


def _trips(line: str, condition: Computation, body: Computation) -> int | None:
    """Return a loop's trip count, as the compiler states it or as its counter shows, or None if it is unknown."""
    if match := _TRIP_COUNT.search(line):
        return int(match[1])
    comparison = re.search(r"compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", condition["ROOT"])
    if comparison is None:
        return None
    index = re.search(r"get-tuple-element\(.*?\), index=(\d+)", condition[comparison[1]])
    limit = _constant(condition, comparison[2])
    results = re.search(r" tuple\((.*?)\)", body["ROOT"])
    if index is None or limit is None or results is None:
        return None
    counter = body.get(results[1].replace("%", "").split(", ")[int(index[1])], "")
    increment = re.search(r" add\(%?[\w.\-]+, %?([\w.\-]+)\)", counter)
    step = _constant(body, increment[1]) if increment else None
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
    """Parse a line's device groups, in any of XLA's notations, into device ids [groups, members]."""
    if kind == "collective-permute":
        return _parse_groups(re.search(r"source_target_pairs=\{(\{.*?\})\}", line))
    if mesh_groups := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh_groups[1])}
        axes = re.findall(r"'(\w+)'", mesh_groups[3])
        grid = np.arange(num_devices).reshape(tuple(sizes.values()))
        group_axes = [list(sizes).index(axis) for axis in axes]
        batch_axes = [i for i in range(grid.ndim) if i not in group_axes]
        return grid.transpose(*batch_axes, *group_axes).reshape(-1, int(np.prod([grid.shape[i] for i in group_axes])))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
        grid = np.arange(num_devices).reshape(numbers(iota[2]))
        return grid.transpose(numbers(iota[3]) if iota[3] else range(grid.ndim)).reshape(numbers(iota[1]))
    group_list = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    return _parse_groups(group_list) if group_list else np.arange(num_devices)[None]


def _parse_groups(match: re.Match | None) -> np.ndarray:
    assert match, "a collective without devices"
    return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])])
