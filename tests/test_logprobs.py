"""Log-probs against a plain log-softmax in float64: chunked, packed or padded, and float32 whatever the weights are."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import HF_CONFIG, logps_fn, pack, random_pairs, small_model, small_params

from dpo_jax.batch import pad_pairs
from dpo_jax.config import LossConfig
from dpo_jax.logprobs import TargetStats, TokenLogps, make_logps_fn, make_padded_logps_fn, pair_logps, target_logps
from dpo_jax.losses import mean_loss, preference_loss
from dpo_jax.models.decoder import plain_batch

VOCABULARY, WIDTH = HF_CONFIG["vocab_size"], 16
PAIRS = random_pairs(5)
BATCH = pack(PAIRS, rows=2)


def random_model(dtype, seed=0):
    """Hidden states of the batch and an unembedding, in a type; every fifth target is likely."""
    draw = np.random.Generator(np.random.Philox(seed))
    hidden = draw.normal(0, 1, (*BATCH.tokens.shape, WIDTH))
    unembedding = draw.normal(0, 1, (VOCABULARY, WIDTH))
    for row, (sources, labels) in enumerate(zip(BATCH.target_sources, BATCH.target_tokens, strict=True)):
        hidden[row, sources[::5]] = unembedding[labels[::5]]
    return jnp.asarray(hidden, dtype), jnp.asarray(unembedding, dtype)


def oracle(hidden, unembedding):
    """Of every target in float64: log-prob, entropy, mean score, whether it is the largest."""
    hidden, unembedding = (np.asarray(x).astype(np.float64) for x in (hidden, unembedding))
    scores = np.take_along_axis(hidden, BATCH.target_sources[..., None], axis=1) @ unembedding.T
    largest = scores.max(-1, keepdims=True)
    logps = scores - largest - np.log(np.exp(scores - largest).sum(-1, keepdims=True))
    label = BATCH.target_tokens[..., None]
    logp = np.take_along_axis(logps, label, -1)[..., 0]
    top1 = scores.argmax(-1) == BATCH.target_tokens
    return logp, -(np.exp(logps) * logps).sum(-1), scores.mean(-1), top1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [7, 10_000])
def test_targets_have_their_log_softmax_in_float32(dtype, chunk):
    """Of bfloat16 states too: the products are summed and normalized in float32."""
    hidden, unembedding = random_model(dtype)
    found = jax.jit(lambda h, u: target_logps(h, u, BATCH, chunk=chunk, stats=True))(hidden, unembedding)
    logp, entropy, mean, top1 = oracle(hidden, unembedding)
    assert found.logp.dtype == jnp.float32
    used = BATCH.target_mask
    np.testing.assert_allclose(found.logp[used], logp[used], rtol=2e-6, atol=2e-5)
    for ours, expected in zip(found.stats, (entropy, mean, top1), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours[used], expected[used], rtol=2e-6, atol=1e-4)  # of scores around 20
    assert 0 < top1[used].sum() < used.sum()


def test_statistics_change_no_gradient():
    hidden, unembedding = random_model("float32")

    def total(hidden, stats):
        return pair_logps(target_logps(hidden, unembedding, BATCH, chunk=64, stats=stats), BATCH).sum.sum()

    with_stats, without = (jax.jit(jax.grad(total), static_argnums=1)(hidden, stats) for stats in (True, False))
    np.testing.assert_allclose(with_stats, without, rtol=1e-6, atol=1e-7)
    leak = lambda hidden: sum(  # noqa: E731
        x.sum() for x in target_logps(hidden, unembedding, BATCH, chunk=64, stats=True).stats
    )
    assert not np.any(jax.jit(jax.grad(leak))(hidden))


def test_answers_are_summed_by_their_slots():
    """Against a loop over targets; long answers keep their digits, and empty slots are 0."""
    batch = pack([*PAIRS, *random_pairs(2, seed=3)], rows=2, valid=5)
    draw = np.random.Generator(np.random.Philox(1))
    values = (draw.normal(-50, 30, batch.target_mask.shape)).astype(np.float32)
    values[~batch.target_mask] = np.nan  # unused targets are not looked at
    on_device = jnp.asarray(values)
    found = jax.jit(pair_logps)(TokenLogps(on_device, on_device, stats=TargetStats(*[on_device] * 3)), batch)
    expected, counts = np.zeros((2, 7, 2))
    for row, target in np.argwhere(batch.target_mask):
        slot = row * batch.answers_per_row + batch.target_answers[row, target]
        (pair,) = [tuple(at) for at in np.argwhere(batch.answer_slots[:5] == slot)]
        expected[pair] += np.float64(values[row, target])
        counts[pair] += 1
    assert found.sum.dtype == found.count.dtype == jnp.float32
    np.testing.assert_allclose(found.sum, expected, rtol=2e-6)
    np.testing.assert_array_equal(found.count, counts)
    assert counts[:5].tolist() == [[len(answer) for answer in answers] for _, answers, _ in PAIRS]
    np.testing.assert_allclose(found.stats.top1, expected, rtol=2e-6)
    assert found.valid.tolist() == [True] * 5 + [False] * 2


def test_scores_of_all_targets_never_exist():
    """No buffer of the compiled gradient holds targets x vocabulary; without chunks one does."""
    hidden, _ = random_model("float32")
    unembedding = jnp.ones((1031, WIDTH))
    rows, targets = BATCH.target_tokens.shape

    def largest(chunk):
        fn = make_logps_fn(lambda params, batch: params["hidden"], lambda params: params["unembed"], chunk=chunk)

        def loss(params):
            policy = fn(params, BATCH)
            return mean_loss(preference_loss(policy, None, LossConfig()), policy)

        text = jax.jit(jax.grad(loss)).lower({"hidden": hidden, "unembed": unembedding}).compile().as_text()
        shapes = (tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", text))
        return max(int(np.prod(shape)) for shape in shapes if 1031 in shape)

    assert largest(10_000) >= rows * targets * 1031
    assert largest(16) <= rows * 16 * 1031


def test_the_precision_asked_for_is_that_of_every_product():
    """Forward and backward, attention and the vocabulary's scores too."""
    model = small_model(matmul_precision="highest")
    fn = make_logps_fn(model.hidden, model.unembedding, chunk=64, precision=model.precision)
    program = str(jax.make_jaxpr(jax.grad(lambda params: fn(params, BATCH).sum.sum()))(small_params()))
    products = re.findall(r"dot_general\[(.*?)\n\s*\] ", program, re.S)
    assert len(products) > 20
    assert all("precision=(Precision.HIGHEST, Precision.HIGHEST)" in one for one in products)


def test_scores_of_bfloat16_states_are_float32():
    """By the program, not by its figures: a compiler may keep what the program rounds."""
    hidden, unembedding = random_model("bfloat16")
    program = str(jax.make_jaxpr(lambda h, u: target_logps(h, u, BATCH, chunk=64).logp)(hidden, unembedding))
    products = re.findall(r"dot_general\[(.*?)\n\s*\] ", program, re.S)
    assert len(products) == 1
    assert "preferred_element_type=float32" in products[0]


def test_a_batch_without_targets_has_no_log_probs():
    hidden, unembedding = random_model("float32")
    bare = plain_batch(jnp.ones((2, 8), jnp.int32), jnp.full(2, 8))
    assert target_logps(hidden[:2, :8], unembedding, bare, chunk=4).logp.shape == (2, 0)


def apply(params, tokens):
    """The small model as a function from tokens to next-token scores."""
    model = small_model(attention="xla")
    batch = plain_batch(tokens, jnp.full(len(tokens), tokens.shape[1]))
    return model.hidden(params, batch) @ model.unembedding(params).T


def test_padded_is_packed():
    prompts, chosen, rejected = zip(*((prompt, *answers) for prompt, answers, _ in PAIRS), strict=True)
    padded = jax.jit(make_padded_logps_fn(apply))(small_params(), pad_pairs(prompts, chosen, rejected))
    packed = jax.jit(logps_fn())(small_params(), BATCH)
    np.testing.assert_allclose(padded.sum, packed.sum, rtol=2e-6)
    np.testing.assert_array_equal(padded.count, packed.count)
    np.testing.assert_array_equal(padded.weight, packed.weight)
    assert padded.valid.all()


def test_the_mask_is_of_places_and_not_of_the_pad_id():
    """Tokens equal to the pad id count where they are the answer's, and amount or kind of padding counts nowhere."""
    prompts, chosen, rejected = [[5, 9], [9, 9, 9, 6]], [[9, 7, 9], [9]], [[8, 9], [4, 9, 9]]
    batches = [pad_pairs(prompts, chosen, rejected, pad_id=pad) for pad in (9, 3)]
    assert batches[0].mask.sum(-1).tolist() == [[3, 2], [1, 3]]
    np.testing.assert_array_equal(batches[0].mask, batches[1].mask)
    fn = jax.jit(make_padded_logps_fn(lambda table, tokens: table[tokens]))  # scores follow from one token back
    table = jax.random.normal(jax.random.key(0), (12, 12))
    logps = jax.nn.log_softmax(table)
    expected = [[logps[9, 9] + logps[9, 7] + logps[7, 9], logps[9, 8] + logps[8, 9]],
                [logps[6, 9], logps[6, 4] + logps[4, 9] + logps[9, 9]]]  # fmt: skip
    for batch in batches:
        np.testing.assert_allclose(fn(table, batch).sum, expected, rtol=2e-6)


def test_empty_slots_of_padded_pairs_are_zero():
    batch = pad_pairs([[1], [1]], [[2, 3], [2]], [[3], [3, 4]])
    batch = batch.replace(valid=np.array([True, False]))
    found = jax.jit(make_padded_logps_fn(lambda table, tokens: table[tokens]))(jnp.ones((5, 5)), batch)
    np.testing.assert_allclose(found.sum, [[-2 * np.log(5), -np.log(5)], [0, 0]], rtol=1e-6)
    assert found.count.tolist() == [[2, 1], [0, 0]]


def test_lists_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match=r"2 prompts, but \[2, 3\] answers"):
        pad_pairs([[1], [2]], [[1], [2]], [[1], [2], [3]])
    with pytest.raises(ValueError, match="pair 1 has an empty prompt or answer"):
        pad_pairs([[1], []], [[1], [2]], [[1], [2]])
