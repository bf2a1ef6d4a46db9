"""Audit of a run's data: contents, and problems that hurt learning, as JSON-compatible data and as text."""

from collections.abc import Iterable, Sequence, Set
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.batching.sets import DataSets
from dpo_jax.data.store import Store
from dpo_jax.errors import UserError
from dpo_jax.reports.duplicates import content_hashes, contradictions, exact_duplicates, near_duplicates, plain_words

MAX_LISTED = 10  # examples named for each finding
MAX_COMPARED = 100_000  # examples that are searched for near duplicates
QUANTILES = {"min": 0.0, "10%": 0.1, "median": 0.5, "90%": 0.9, "99%": 0.99, "max": 1.0}
ACTIONS = {"too_long": "truncated", "template_not_prefix": "repaired", "equal_answers": "kept"}
END_TOKENS = 3  # last tokens of an answer that should include a stop token; chat templates add a newline after it
HEAD_CHARS = 60  # characters of each text that --step shows


def _origin(store: Store, i: int) -> dict[str, Any]:
    return {"source": store.report[store.sources[i]]["source"], "row": int(store.rows[i])}


def _groups(store: Store, groups: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Summarize groups of examples: the numbers of groups and examples, and the rows of the first groups."""
    return {
        "groups": len(groups),
        "examples": sum(map(len, groups)),
        "first": [[_origin(store, i) for i in group[:MAX_LISTED]] for group in groups[:MAX_LISTED]],
    }


def _quantiles(lengths: np.ndarray) -> dict[str, float]:
    values = np.quantile(lengths, list(QUANTILES.values()), method="lower").tolist()
    return dict(zip(QUANTILES, values, strict=True)) | {"mean": float(lengths.mean())}


def _branches(num_answers: int) -> tuple[str, ...]:
    return (("prompt",), ("prompt", "answer"), ("prompt", "chosen", "rejected"))[num_answers]


def _lengths(store: Store, ids: np.ndarray) -> dict[str, Any]:
    """Return token quantiles and shares of all tokens for prompts and answers; a prompt counts once per example."""
    lengths = store.lengths[ids].astype(np.int64)
    totals, num_answers = lengths.sum(0), lengths.shape[1] - 1
    branches = _branches(num_answers)
    return {
        "tokens": {branch: _quantiles(lengths[:, column]) for column, branch in enumerate(branches)},
        "share": {branch: float(totals[column] / totals.sum()) for column, branch in enumerate(branches)},
        "sharing_saves": float((num_answers * totals[0] + totals[1:].sum()) / totals.sum()),
    }


def _length_bias(store: Store, ids: np.ndarray) -> dict[str, Any]:
    """Return how often the longer answer is chosen, among pairs whose answers differ in length."""
    chosen, rejected = store.lengths[ids, 1], store.lengths[ids, 2]
    num_unequal = int((chosen != rejected).sum())
    return {
        "pairs": num_unequal,
        "longer_wins": float((chosen > rejected).sum() / num_unequal) if num_unequal else None,
        "mean_chosen": float(chosen.mean()),
        "mean_rejected": float(rejected.mean()),
    }


def _unterminated(store: Store, ids: np.ndarray, tokenizer: Any, ends: Set[int]) -> dict[str, Any]:
    """Return the examples with an answer that lacks a stop token, and how the first of them ends."""
    unterminated = []
    for i in ids.tolist():
        endings = [answer[-END_TOKENS:].tolist() for answer in store.example(i)[1]]
        unterminated += [(i, ending) for ending in endings if not ends & set(ending)][:1]
    return {
        "ends": [tokenizer.decode([token]) for token in sorted(ends)],
        "examples": len(unterminated),
        "first": [_origin(store, i) for i, _ in unterminated[:MAX_LISTED]],
        "first_ends": tokenizer.decode(unterminated[0][1]) if unterminated else None,
    }


def _set_audit(
    store: Store, ids: np.ndarray, tokenizer: Any, ends: Set[int], report: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    compared_ids = ids[:MAX_COMPARED]
    contents, opposites = content_hashes(store)
    near = _groups(store, near_duplicates(store, contents, opposites, compared_ids, plain_words(tokenizer)))
    set_audit = {
        "sources": report,
        "examples": len(ids),
        "duplicates": _groups(store, exact_duplicates(contents, ids)),
        "near_duplicates": near | {"compared": len(compared_ids)},
        "lengths": _lengths(store, ids),
    }
    if store.lengths.shape[1] > 1:
        set_audit["unterminated"] = _unterminated(store, compared_ids, tokenizer, ends)
    if store.lengths.shape[1] == 3:
        set_audit["both_labels"] = _groups(store, contradictions(contents, opposites, ids))
        set_audit["length_bias"] = _length_bias(store, ids)
    return set_audit


def _shared_prompts(sets: DataSets) -> dict[str, Any]:
    """Return the examples of each evaluation set whose prompt is also in the training set."""
    train_prompts, first = np.unique(sets.train.prompts[sets.train_ids], return_index=True)
    overlaps = {}
    for name, eval_set in sets.evals.items():
        prompts = eval_set.store.prompts[eval_set.ids]
        index = np.minimum(np.searchsorted(train_prompts, prompts), len(train_prompts) - 1)
        shared = np.flatnonzero(train_prompts[index] == prompts)
        listed = zip(eval_set.ids[shared[:MAX_LISTED]], sets.train_ids[first[index[shared[:MAX_LISTED]]]], strict=True)
        overlaps[name] = {
            "examples": len(shared),
            "first": [[_origin(eval_set.store, i), _origin(sets.train, j)] for i, j in listed],
        }
    return overlaps


def _rendered(store: Store, i: int, tokenizer: Any) -> dict[str, Any]:
    """Return one example as the model reads it: texts with special tokens, and the tokens where each answer starts."""
    prompt, answers, targets = store.example(i)
    boundary = [tokenizer.convert_ids_to_tokens(part.tolist()) for part in (prompt[-4:], *(a[:4] for a in answers))]
    rendered = _origin(store, i) | {
        "prompt": tokenizer.decode(prompt),
        "answers": [tokenizer.decode(answer) for answer in answers],
        "boundary": {"prompt_ends": boundary[0], "answers_begin": boundary[1:]},
    }
    if targets is not None and not targets.all():
        edges = [0, *(np.flatnonzero(np.diff(targets)) + 1).tolist(), len(targets)]
        runs = [slice(start, end) for start, end in pairwise(edges)]
        rendered["learned"] = [tokenizer.decode(answers[0][run]) for run in runs if targets[run][0]]
    return rendered


def audit(
    sets: DataSets,
    tokenizer: Any,
    *,
    ends: Set[int] | None = None,
    max_length: int = 0,
    max_positions: Any = None,
    num_sampled: int = 0,
) -> dict[str, Any]:
    """Audit all data sets of a run; return counts, findings, lengths and one example as JSON-compatible data.

    ``ends``: ids of the model's stop tokens; None: the tokenizer's EOS. ``max_length`` is reported if it exceeds
    ``max_positions``, the model's ``max_position_embeddings``. ``num_sampled``: most tokens of an answer that the run
    will sample to each prompt.
    """
    order, train = sets.order, sets.train
    ends = frozenset({tokenizer.eos_token_id} - {None} if ends is None else ends)
    evals = {}
    for name, eval_set in sets.evals.items():
        report = [] if eval_set.store is train else eval_set.store.report
        evals[name] = _set_audit(eval_set.store, eval_set.ids, tokenizer, ends, report)
    result = {
        "stage": sets.stage,
        "train": _set_audit(train, sets.train_ids, tokenizer, ends, train.report),
        "evals": evals,
        "shared_prompts": _shared_prompts(sets),
        "run": {"steps": order.num_steps, "batch": order.batch, "epochs": order.epoch(order.num_steps)},
        "example": _rendered(train, int(order.step_ids(0)[0]), tokenizer),
    }
    if isinstance(max_positions, int) and max_length > max_positions:
        longest = train.lengths[:, 0] + train.lengths[:, 1:].max(1, initial=num_sampled)
        num_longer = int((longest > max_positions).sum())
        result["positions"] = {"max_length": max_length, "made_for": max_positions, "longer": num_longer}
    return result


def _table(rows: Iterable[Sequence[object]]) -> list[str]:
    """Return rows as lines of aligned columns; the first column is aligned left, the others right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ([first.ljust(widths[0]), *map(str.rjust, values, widths[1:])] for first, *values in cells)
    return [f"  {'  '.join(row)}".rstrip() for row in padded]


def _rows_text(names: Sequence[dict[str, Any]], with_source: bool) -> str:
    source = lambda name: f"{Path(name['source']).name}:" if with_source else ""  # noqa: E731
    return ", ".join(f"{source(name)}{name['row']}" for name in names)


def _cause_lines(report: dict[str, Any]) -> list[str]:
    lines = []
    for kind in ("dropped", "notes"):
        for cause, problems in report[kind].items():
            action = "dropped" if kind == "dropped" else ACTIONS.get(cause, "noted")
            more_note = ", ..." if problems["count"] > len(problems["first"]) else ""
            rows_text = ", ".join(str(problem["row"]) for problem in problems["first"])
            lines.append(f"    {action:9} {cause:20} {problems['count']:7}  rows {rows_text}{more_note}")
            lines.append(f"    {'':30} first: {problems['first'][0]['detail']}")
    return lines


def _unterminated_lines(unterminated: dict[str, Any], with_source: bool) -> list[str]:
    title = f"answers without a stop token ({' '.join(unterminated['ends']) or 'the model has none'})"
    rows_text = _rows_text(unterminated["first"][:5], with_source)
    if not unterminated["examples"]:
        return [f"  {title}: none"]
    remedy = "add its last token to eos_token_id in the model's generation_config.json: generation would not stop there"
    return [
        f"  {title}: in {unterminated['examples']} examples, the first: {rows_text}",
        f"    the first ends with {unterminated['first_ends']!r}; unless it was truncated, {remedy}",
    ]


def _length_lines(set_audit: dict[str, Any]) -> list[str]:
    lengths = set_audit["lengths"]
    header = ["tokens", *QUANTILES, "mean", "share of all"]
    body = [
        [part, *(round(sizes[name]) for name in QUANTILES), f"{sizes['mean']:.1f}", f"{lengths['share'][part]:.1%}"]
        for part, sizes in lengths["tokens"].items()
    ]
    lines = _table([header, *body])
    if "length_bias" in set_audit:
        bias = set_audit["length_bias"]
        lines.append(f"  a prompt stored once for both answers saves {lengths['sharing_saves']:.2f}x of the tokens")
        if bias["longer_wins"] is not None:
            means_note = f"(mean tokens: chosen {bias['mean_chosen']:.1f}, rejected {bias['mean_rejected']:.1f})"
            wins_text = f"{bias['longer_wins']:.1%} of {bias['pairs']} pairs {means_note}"
            lines.append(f"  length bias: the longer answer is chosen in {wins_text}")
    return lines


def _set_lines(name: str, set_audit: dict[str, Any]) -> list[str]:
    lines = [f"{name}: {set_audit['examples']} examples{'' if set_audit['sources'] else ' of the training sets'}"]
    for report in set_audit["sources"]:
        lines.append(f"  {report['source']}: {report['rows']} rows, {report['kept']} kept")
        lines += [f"    {hint}" for hint in report["hints"]]
        lines += _cause_lines(report)
    with_source = len(set_audit["sources"]) != 1
    near = set_audit["near_duplicates"]
    compared_note = "" if near["compared"] == set_audit["examples"] else f" (among the first {near['compared']})"
    findings = {"exact duplicates": set_audit["duplicates"], f"near duplicates{compared_note}": near}
    if "both_labels" in set_audit:
        findings["same pair with both labels"] = set_audit["both_labels"]
    for title, finding in findings.items():
        rows_text = "; ".join(_rows_text(group, with_source) for group in finding["first"][:5])
        count_text = f"{finding['examples']} examples in {finding['groups']} groups, the first: {rows_text}"
        lines.append(f"  {title}: {count_text if finding['groups'] else 'none'}")
    if "unterminated" in set_audit:
        lines += _unterminated_lines(set_audit["unterminated"], with_source)
    return lines + _length_lines(set_audit) + [""]


def _text_lines(text: str) -> list[str]:
    """Return the lines of a text, each marked with a bar, with control characters escaped."""
    printable = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return [f"  | {line}" for line in printable.split("\n")]


def _example_lines(example: dict[str, Any], branches: Sequence[str]) -> list[str]:
    title = f"first example of step 0: {example['source']}, row {example['row']}"
    lines = [title, "prompt", *_text_lines(example["prompt"])]
    ends_text = " ".join(map(repr, example["boundary"]["prompt_ends"]))
    for branch, answer, begins in zip(branches, example["answers"], example["boundary"]["answers_begin"], strict=True):
        boundary_text = f"{ends_text} || {' '.join(map(repr, begins))}"
        lines += [f"{branch}, whose tokens begin at ||: {boundary_text}", *_text_lines(answer)]
    if "learned" in example:
        lines.append("learned")
        for learned in example["learned"]:
            lines += [*_text_lines(learned), "  ..."]
        lines.pop()
    return lines


def render(result: dict[str, Any]) -> str:
    """Return an audit as text for a terminal."""
    lines = _set_lines("train", result["train"])
    for name, set_audit in result["evals"].items():
        lines += _set_lines(f"eval {name}", set_audit)
        shared = result["shared_prompts"][name]
        pairs_text = "; ".join(f"{_rows_text(pair, True)}" for pair in shared["first"][:5])
        count_text = f"{shared['examples'] or 'none'}{f', {pairs_text}' if pairs_text else ''}"
        lines[-1:] = [f"  prompts also in the training set: {count_text}", ""]
    run = result["run"]
    lines += [f"run: {run['steps']} steps of {run['batch']}, {run['epochs']:.2f} epochs"]
    if "positions" in result:
        positions = result["positions"]
        limit_note = f"but the model supports {positions['made_for']} (max_position_embeddings)"
        longer_note = f"{positions['longer']} examples are longer: lower it"
        lines.append(f"note: data.max_length is {positions['max_length']}, {limit_note}; {longer_note}")
    lines += ["", *_example_lines(result["example"], _branches(len(result["example"]["answers"]))[1:])]
    return "\n".join(lines)


def _text_head(tokenizer: Any, tokens: np.ndarray, last: bool = False) -> str:
    text = tokenizer.decode(tokens[-HEAD_CHARS:] if last else tokens[:HEAD_CHARS])
    return repr(text[-HEAD_CHARS:] if last else text[:HEAD_CHARS])


def show_step(sets: DataSets, step: int, tokenizer: Any) -> str:
    """Return text that lists the examples of step ``step``, counted from 1 as in metrics.jsonl."""
    if not 1 <= step <= sets.order.num_steps:
        raise UserError(f"--step must be from 1 to {sets.order.num_steps}, the run's last step, got {step}")
    lines = [f"step {step} of {sets.order.num_steps}, epoch {sets.order.epoch(step):.4f} at its end"]
    for slot, i in enumerate(sets.order.step_ids(step - 1).tolist()):
        if i < 0:
            lines.append(f"slot {slot}: empty, the data ends here")
            continue
        prompt, answers, _ = sets.train.example(i)
        origin = _origin(sets.train, i)
        sizes_text = "+".join(map(str, sets.train.lengths[i].tolist()))
        lines.append(f"slot {slot}: example {i}, {origin['source']} row {origin['row']}, {sizes_text} tokens")
        lines.append(f"  prompt    ...{_text_head(tokenizer, prompt, last=True)}")
        for branch, answer in zip(_branches(len(answers))[1:], answers, strict=True):
            lines.append(f"  {branch:9} {_text_head(tokenizer, answer)}")
    return "\n".join(lines)
