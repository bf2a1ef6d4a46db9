"""Search for duplicate examples, and for pairs that contradict each other."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from dpo_jax.batching.order import mix_words
from dpo_jax.data.store import Store

BLOCK = 2**14  # examples hashed at a time
SHINGLE = 4  # tokens in a shingle, the unit of comparison
NUM_HASHES, BAND = 32, 4  # 8 bands: two texts of similarity s become candidates with probability 1 - (1 - s**4)**8
MIN_SIMILARITY = 0.8  # share of common shingles (Jaccard similarity) from which two examples are near duplicates
MAX_COMPARED = 4  # bucket members that each later one is compared with, to keep the work linear


def _piece_hashes(store: Store) -> np.ndarray:
    """Return a 64-bit hash of each prompt and answer, uint64 [N, 1 + K]: a sum over hashes of (position, token)."""
    hashes = np.zeros(store.lengths.shape, np.uint64)
    for first in range(0, len(store), BLOCK):
        lengths = store.lengths[first : first + BLOCK].reshape(-1).astype(np.int64)
        ends = np.cumsum(lengths)
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        tokens = store.tokens[store.starts[first] : store.starts[first] + ends[-1]]
        words = (positions.astype(np.uint64) << np.uint64(32)) + tokens.astype(np.uint64) + np.uint64(1)
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mix_words(words))])  # modulo 2**64
        hashes[first : first + BLOCK] = (sums[ends] - sums[ends - lengths]).reshape(-1, store.lengths.shape[1])
    return hashes


def content_hashes(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Return 64-bit hashes of each example, uint64 [N]: with its answers in order, and with its answers reversed."""
    prompts, *answers = _piece_hashes(store).T

    def joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
        content = mix_words(prompts)
        for piece in pieces:
            content = mix_words(content ^ piece)
        return content

    return joined(answers), joined(answers[::-1])


def exact_duplicates(contents: np.ndarray, ids: np.ndarray) -> list[list[int]]:
    """Return groups of two or more examples with identical tokens, ordered by first member.

    ``contents``: the first of the `content_hashes`. ``ids`` are ascending.
    """
    _, group_of, sizes = np.unique(contents[ids], return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(sizes[group_of] > 1)
    groups: dict[int, list[int]] = {}
    for group, i in zip(group_of[repeated].tolist(), ids[repeated].tolist(), strict=True):
        groups.setdefault(group, []).append(i)
    return list(groups.values())


def contradictions(contents: np.ndarray, opposites: np.ndarray, ids: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs (i, j) of examples with the same prompt and answers but opposite labels, each contradiction once.

    ``contents``, ``opposites``: the `content_hashes`. ``ids`` are ascending.
    """
    unique, first = np.unique(contents[ids], return_index=True)
    wanted = opposites[ids][first]
    partner = np.minimum(np.searchsorted(unique, wanted), len(unique) - 1)
    is_later = (unique[partner] == wanted) & (first[partner] < first)
    pairs = sorted(zip(first[is_later].tolist(), first[partner[is_later]].tolist(), strict=True))
    return [(int(ids[earlier]), int(ids[later])) for later, earlier in pairs]


def plain_words(tokenizer) -> np.ndarray:
    """Return a word id per token, int64 [V], equal if only case and spaces differ; -1 for blank and special tokens."""
    numbers: dict[str, int] = {}
    words = np.full(len(tokenizer), -1, np.int64)
    special = set(tokenizer.all_special_ids)
    for token, text in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        word = "" if token in special or text is None else text.strip("\u0120\u010a\u2581 \n\t\r").lower()
        if word:
            words[token] = numbers.setdefault(word, len(numbers))
    return words


def _shingles(words: np.ndarray, sequences: Iterable[np.ndarray]) -> np.ndarray:
    """Return the sorted unique uint64 hashes of all runs of SHINGLE words in the sequences."""
    hashes = [np.zeros(0, np.uint64)]
    for sequence in sequences:
        numbers = words[sequence]
        numbers = numbers[numbers >= 0].astype(np.uint64)
        size = min(SHINGLE, len(numbers))
        shingle_hashes = np.zeros(len(numbers) - size + 1 if size else 0, np.uint64)
        for offset in range(size):
            shingle_hashes = mix_words(shingle_hashes + numbers[offset : offset + len(shingle_hashes)])
        hashes.append(shingle_hashes)
    return np.unique(np.concatenate(hashes))


def _alike(first: np.ndarray, second: np.ndarray) -> bool:
    num_common = len(np.intersect1d(first, second, assume_unique=True))
    return num_common >= MIN_SIMILARITY * (len(first) + len(second) - num_common)


def _candidates(members: Iterable[int], signature: Callable[[int], np.ndarray]) -> Iterator[tuple[int, int]]:
    """Yield pairs of members whose signatures, [NUM_HASHES] or empty, agree in at least one band."""
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for i in members:
        minhashes = signature(i)
        for band in range(0, len(minhashes), BAND):
            bucket = buckets.setdefault((band, minhashes[band : band + BAND].tobytes()), [])
            for j in bucket:
                yield i, j
            if len(bucket) < MAX_COMPARED:
                bucket.append(i)


def _grouped(
    members: Iterable[int], candidates: Iterable[tuple[int, int]], same: Callable[[int, int], bool]
) -> list[list[int]]:
    """Return groups of two or more members, joined by the candidate pairs for which ``same`` is true."""
    root = {i: i for i in members}

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    for i, j in candidates:
        if find(i) != find(j) and same(i, j):
            root[find(i)] = find(j)
    groups: dict[int, list[int]] = {}
    for i in root:
        groups.setdefault(find(i), []).append(i)
    return [group for group in groups.values() if len(group) > 1]


def near_duplicates(
    store: Store, contents: np.ndarray, opposites: np.ndarray, ids: np.ndarray, words: np.ndarray
) -> list[list[int]]:
    """Return groups of examples whose prompts and whose answers are similar, ordered by first member.

    Exact duplicates and pairs with both labels count as one example: the functions above find them. MinHash (Broder
    1997) with banding proposes candidates, whose shingles are then compared. ``contents`` and ``opposites`` are the
    `content_hashes`; ``words`` is made by ``plain_words``.
    """
    _, first = np.unique(np.minimum(contents, opposites)[ids], return_index=True)
    salts = mix_words(np.arange(1, NUM_HASHES + 1, dtype=np.uint64))[:, None]

    @lru_cache(maxsize=256)
    def shingles(i: int) -> tuple[np.ndarray, np.ndarray]:
        prompt, answers, _ = store.example(i)
        return _shingles(words, [prompt]), _shingles(words, answers)

    def signature(i: int) -> np.ndarray:
        hashes = np.union1d(*shingles(i))
        return mix_words(hashes ^ salts).min(1) if len(hashes) else hashes

    def same(i: int, j: int) -> bool:
        return all(map(_alike, shingles(i), shingles(j)))

    members = ids[np.sort(first)].tolist()
    return _grouped(members, _candidates(members, signature), same)
