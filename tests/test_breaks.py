"""The tests can fail: one line broken for each invariant, and exactly the tests named for it notice.

Each row breaks one line of a copy of the program. Of the tests that any row names, those in the same files are run: the
row's own must fail, by noticing it and not by some crash, and the others pass. The line must be found once, so that a
row cannot fall silent when the code is changed. The first row of each invariant runs with ``-m slow``, the others with
``-m weekly``.
"""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Break(NamedTuple):
    """One line gone wrong."""

    invariant: int
    what: str
    file: str  # in the package
    old: str
    new: str
    tests: tuple[str, ...]


BREAKS = [
    # 1: step 0 is proven
    Break(1, "the proof of the start accepts any difference", "methods/start_check.py",
          "if not difference <= bound:", "if difference < 0:",
          ("test_reference::test_a_start_that_is_its_own_reference_is_proven_bit_for_bit",
           "test_reference::test_a_cached_start_is_proven_within_a_bound")),
    Break(1, "the first loss is not checked", "methods/start_check.py",
          "if not abs(values[\"loss\"] - expected) <= tolerance:", "if False:",
          ("test_reference::test_the_first_step_has_the_loss_of_margin_0[hinge]",)),
    Break(1, "margins of the first step are not checked", "methods/start_check.py",
          "if not tied(values, agreement(setup)):", "if False:",
          ("test_reference::test_the_first_step_has_margins_of_0_within_the_bound_of_its_arithmetic[wpo-float32-1e-05]",)),
    Break(1, "a run begins without its proof", "methods/offline.py",
          "return prove_start(self.setup, *logps)", "return None",
          ("test_start::test_a_stale_cache_is_refused_before_the_first_step",)),
    # 2: layout changes nothing
    Break(2, "the rejected answer begins where the chosen ends", "batching/packing.py",
          "sources[0] = start + len(prompt) - 1", "pass",
          ("test_packing::test_both_answers_begin_at_the_prompts_last_token",
           "test_packing::test_every_token_is_laid_once_and_predicted_from_its_place[shared]",
           "test_layout::test_layouts_agree[shared in one row]")),
    Break(2, "the rejected answer sees the chosen one", "ops/attention.py",
          "visible &= (branch_s == 0) | (branch_s == branch_q)", "visible &= segment_s > 0",
          ("test_attention::test_attention_is_the_rule[plain-blocks]",
           "test_attention::test_attention_is_the_rule[grouped-xla]",
           "test_layout::test_layouts_agree[shared in one row]")),
    Break(2, "a token does not see itself", "ops/attention.py",
          "visible &= position_s <= position_q", "visible &= position_s < position_q",
          ("test_attention::test_attention_is_the_rule[plain-blocks]",
           "test_attention::test_attention_is_the_rule[grouped-xla]")),
    Break(2, "a pair of blocks is left out", "batching/packing.py",
          "np.argwhere(np.tril(is_visible))", "np.argwhere(np.tril(is_visible))[:-1]",
          ("test_packing::test_visited_blocks_are_those_in_which_something_is_seen[2]",
           "test_layout::test_layouts_agree[shared in one row]")),
    Break(2, "an accumulated gradient is divided by slots", "step.py",
          "x / jnp.maximum(policy.valid.sum(), 1)", "x / policy.valid.size",
          ("test_step::test_a_ragged_step_in_parts_is_the_whole[live-separable]",
           "test_step::test_a_ragged_step_in_parts_is_the_whole[cached-coupled]")),
    Break(2, "a loss that couples pairs is accumulated part by part", "step.py",
          "_two_pass_gradient if is_coupled else _one_pass_gradient", "_one_pass_gradient",
          ("test_step::test_a_ragged_step_in_parts_is_the_whole[cached-coupled]",)),
    # 3: a batch is a pure function of (data, seed, step)
    Break(3, "the seed is not heeded", "batching/order.py",
          "_fold(seed, group)", "_fold(0, group)",
          ("test_order::test_seeds_and_sources_have_orders_of_their_own",
           "test_order::test_permutation_never_changes",
           "test_batches::test_a_seed_changes_the_order")),
    Break(3, "the last step is filled up", "batching/order.py",
          "min((step + 1) * self.batch, self.num_draws)", "(step + 1) * self.batch",
          ("test_order::test_every_example_once_an_epoch_and_the_last_step_is_ragged[4]",
           "test_batches::test_a_step_holds_its_pairs_in_every_layout[{}]")),
    Break(3, "batches come in another order from ahead", "batching/batches.py",
          "pending.pop(step)", "pending.popitem()[1]",
          ("test_batches::test_a_step_is_the_same_from_any_thread_in_any_order",)),
    Break(3, "means are over slots", "losses.py",
          "(losses * policy.weight).sum() / jnp.maximum(policy.valid.sum(), 1)",
          "(losses * policy.weight).sum() / policy.valid.size",
          ("test_losses::test_empty_slots_count_for_nothing[hinge]",
           "test_step::test_the_gradient_is_the_weighted_sum_over_pairs_divided_by_their_number",
           "test_step::test_a_ragged_step_in_parts_is_the_whole[live-separable]",
           "test_step::test_a_ragged_step_in_parts_is_the_whole[cached-coupled]")),
    Break(3, "the weights of pairs are dropped", "losses.py",
          "(losses * policy.weight).sum()", "losses.sum()",
          ("test_losses::test_empty_slots_count_for_nothing[hinge]",
           "test_step::test_the_gradient_is_the_weighted_sum_over_pairs_divided_by_their_number",
           "test_step::test_a_ragged_step_in_parts_is_the_whole[live-separable]",
           "test_step::test_a_ragged_step_in_parts_is_the_whole[cached-coupled]",
           "test_step::test_what_is_not_finite_leaves_the_state_and_holds_it[nan]")),
    # 4: resume is exact
    Break(4, "a resumed run keeps the lines after its save", "runs/session.py",
          "truncate_logs(self.run, manifest[\"offsets\"])", "pass",
          ("test_start::test_the_steps_after_the_last_save_are_done_again_to_the_same_bytes",)),
    Break(4, "logs are not cut", "runs/directory.py",
          "_truncate(path, offset)", "pass",
          ("test_directory::test_logs_are_cut_back_to_the_byte",)),
    Break(4, "an edited log is resumed on", "runs/directory.py",
          "if digest != offsets[path.name][\"digest\"]:", "if False:",
          ("test_directory::test_a_log_that_was_changed",)),
    Break(4, "a manifest without a field is taken", "runs/restore.py",
          "        check_shape(manifest)\n", "",
          ("test_checkpoint::test_every_edit_of_a_manifest_damages_its_step",)),
    Break(4, "checksums of what is restored are not compared", "runs/restore.py",
          "if corrupted:", "if False:",
          ("test_checkpoint::test_a_damaged_step_is_set_aside_and_the_one_before_taken[flip_a_byte]",)),
    Break(4, "a harmed step changes the state", "step.py",
          "old_state = replace(state, healthy=healthy)", "old_state = replace(new_state, healthy=healthy)",
          ("test_step::test_what_is_not_finite_leaves_the_state_and_holds_it[nan]",)),
    # 5: nothing is silently changed or dropped
    Break(5, "unknown options are passed over", "config/file.py",
          "if unknown_key is None:", "if True:",
          ("test_config::test_what_is_wrong_is_one_line[batch.pair: unknown option: did you mean]",)),
    Break(5, "an option that would not be heeded is taken", "config/__init__.py",
          "mode != \"live\", f\"only reference.mode", "False, f\"only reference.mode",
          ("test_config::test_what_is_wrong_is_one_line[reference.dtype: 'bfloat16' cannot be us0]",)),
    Break(5, "a truncated example is not counted", "data/tokenize.py",
          "notes=(*pieces.notes, too_long)", "notes=pieces.notes",
          ("test_tokenize::test_truncation[keep_start-9-True-expected1]",)),
    # 6: the reference is never updated, donated or aliased
    Break(6, "the reference is the policy's own arrays", "inference/reference.py",
          "jnp.copy(x if dtype is None else x.astype(dtype))", "(x if dtype is None else x.astype(dtype))",
          ("test_reference::test_a_copy_shares_no_memory_and_outlives_what_it_copies[None]",
           "test_reference::test_a_live_reference_is_a_copy_of_the_start")),
    Break(6, "the reference is given away", "step.py",
          "donate_argnums=0,", "donate_argnums=(0, 1),",
          ("test_step::test_the_compiled_step_takes_the_old_state_and_never_the_reference",)),
    Break(6, "a gradient flows into the reference", "losses.py",
          "logps - jax.lax.stop_gradient(sequence_logps(reference, loss))", "logps - sequence_logps(reference, loss)",
          ("test_losses::test_no_gradient_reaches_the_reference[hinge]",)),
    # 7: log-probs are float32
    Break(7, "scores are normalized in bfloat16", "logprobs.py",
          "logits = logits.astype(jnp.float32)", "logits = logits.astype(jnp.bfloat16)",
          ("test_logprobs::test_the_mask_is_of_places_and_not_of_the_pad_id",
           "test_logprobs::test_padded_is_packed")),
    Break(7, "packed scores are normalized in bfloat16", "ops/token_logps.py",
          "normalizer = log_total + sums.largest",
          "normalizer = (log_total + sums.largest).astype(jnp.bfloat16).astype(jnp.float32)",
          ("test_logprobs::test_targets_have_their_log_softmax_in_float32[7-bfloat16]",
           "test_logprobs::test_padded_is_packed")),
    Break(7, "scores are rounded before they are normalized", "ops/token_logps.py",
          "jnp.einsum(spec, x, y, preferred_element_type=jnp.float32, precision", "jnp.einsum(spec, x, y, precision",
          ("test_logprobs::test_scores_of_bfloat16_states_are_float32",
           "test_logprobs::test_targets_have_their_log_softmax_in_float32[7-bfloat16]")),
    Break(7, "answers are summed in bfloat16", "logprobs.py",
          "sum=per_answer(token_logps.logp),",
          "sum=per_answer(token_logps.logp.astype(jnp.bfloat16)).astype(jnp.float32),",
          ("test_logprobs::test_answers_are_summed_by_their_slots",
           "test_logprobs::test_padded_is_packed")),
    # 8: masks come from the boundary between prompt and answer
    Break(8, "the boundary is that of the chosen answer alone", "data/tokenize.py",
          "min(common_prefix(prompt_ids, ids) for ids in sequences)", "common_prefix(prompt_ids, sequences[0])",
          ("test_tokenize::test_a_token_that_straddles_belongs_to_both_answers",)),
    Break(8, "no answer ends with EOS", "data/tokenize.py",
          "sequences_with_eos = [_with_eos(encoder, ids, row) for ids in sequences]", "sequences_with_eos = sequences",
          ("test_tokenize::test_bos_that_is_eos_too",
           "test_tokenize::test_a_token_that_straddles_belongs_to_both_answers",
           "test_tokenize::test_truncation[keep_start-9-True-expected1]")),
    Break(8, "the mask is of the pad id", "batch.py",
          "mask[i, k, len(prompt) : end] = True", "mask[i, k, len(prompt) :] = tokens[i, k, len(prompt) :] != pad_id",
          ("test_logprobs::test_the_mask_is_of_places_and_not_of_the_pad_id",)),
    Break(8, "the first answer token is not learned", "batch.py",
          "mask[i, k, len(prompt) : end] = True", "mask[i, k, len(prompt) + 1 : end] = True",
          ("test_logprobs::test_the_mask_is_of_places_and_not_of_the_pad_id",
           "test_logprobs::test_padded_is_packed")),
    # 9: a reward model scores whole answers, and learns by Bradley-Terry
    Break(9, "a score is read one token early", "models/heads.py",
          "max(indices, mode=\"drop\")", "max(indices - 1, mode=\"drop\")",
          ("test_heads::test_scores_are_read_at_the_last_token_of_each_answer[shared]",
           "test_heads::test_scores_are_read_at_the_last_token_of_each_answer[padded]")),
    Break(9, "a prompt has a slot, too", "models/heads.py",
          "jnp.where(batch.branches > 0, slots", "jnp.where(batch.branches >= 0, slots",
          ("test_heads::test_scores_are_read_at_the_last_token_of_each_answer[shared]",
           "test_heads::test_scores_are_read_at_the_last_token_of_each_answer[padded]",
           "test_heads::test_scores_do_not_depend_on_the_layout")),
    Break(9, "centering drives the scores away from 0", "losses.py",
          "loss + c.center *", "loss - c.center *",
          ("test_reward::test_the_loss_is_bradley_terry_with_centering",)),
    Break(9, "centering shrinks the difference", "losses.py",
          "(c.beta * (r.chosen + r.rejected)) ** 2", "(c.beta * (r.chosen - r.rejected)) ** 2",
          ("test_reward::test_the_loss_is_bradley_terry_with_centering",)),
    Break(9, "a margin is added", "losses.py",
          "c.beta * r.margin - r.target", "c.beta * r.margin + r.target",
          ("test_reward::test_the_loss_is_bradley_terry_with_centering",)),
    Break(9, "margins are left out of the batch", "batching/packing.py",
          "batch.weight[:], batch.margin[:] = weight, margin", "batch.weight[:] = weight",
          ("test_batches::test_a_step_holds_its_pairs_in_every_layout[{}]",)),
    Break(9, "padding may be what an answer ends with", "methods/reward.py",
          "if token is not None and token not in end_ids:", "if token is not None:",
          ("test_reward::test_padding_is_a_token_that_ends_no_answer",
           "test_reward::test_all_special_tokens_at_ends_are_refused")),
    Break(9, "the ends of answers are looked for in the data one token early", "methods/reward.py",
          "np.cumsum(store.lengths, axis=1) - 1", "np.cumsum(store.lengths, axis=1) - 2",
          ("test_reward::test_all_special_tokens_at_ends_are_refused",)),
    Break(9, "adapters begin with a head of 0", "models/adapters.py",
          "return head.astype(leaf.dtype)", "return 0 * head.astype(leaf.dtype)",
          ("test_reward::test_adapters_of_a_reward_model_start_from_its_head",)),
    # 10: a policy gradient follows the score minus the KL penalty, token by token
    Break(10, "advantages are whitened by microbatch", "policy_gradient.py",
          "Targets(logps, whiten(advantages, mask),", "Targets(logps, jax.vmap(whiten)(advantages, mask),",
          ("test_policy_gradient::test_targets_are_the_whitened_advantages_of_all_microbatches_and_the_returns",
           "test_policy_gradient::test_microbatches_change_nothing[options0]")),
    Break(10, "advantages are not whitened", "policy_gradient.py",
          "Targets(logps, whiten(advantages, mask),", "Targets(logps, advantages,",
          ("test_policy_gradient::test_targets_are_the_whitened_advantages_of_all_microbatches_and_the_returns",)),
    Break(10, "padding is whitened, too", "policy_gradient.py",
          "(jnp.var(x, where=mask) + 1e-8)", "(jnp.var(x) + 1e-8)",
          ("test_policy_gradient::test_whitened_values_have_mean_0_and_variance_1_over_the_real_tokens",
           "test_policy_gradient::test_targets_are_the_whitened_advantages_of_all_microbatches_and_the_returns")),
    Break(10, "the KL is a bonus", "policy_gradient.py",
          "scores[..., None] - kl_coef * log_ratios", "scores[..., None] + kl_coef * log_ratios",
          ("test_policy_gradient::test_scores_are_placed_at_the_last_token_and_keep_their_fractions",)),
    Break(10, "the score is given to every token", "policy_gradient.py",
          "is_last * scores[..., None] - kl_coef", "scores[..., None] - kl_coef",
          ("test_policy_gradient::test_scores_are_placed_at_the_last_token_and_keep_their_fractions",
           "test_policy_gradient::test_an_answer_without_end_is_penalized")),
    Break(10, "values of padding leak into advantages", "policy_gradient.py",
          "values = jnp.where(mask, values, 0.0)\n    later_values", "later_values",
          ("test_policy_gradient::test_advantages_are_the_double_sum_of_their_definition",)),
    Break(10, "advantages of padding leak into those before", "policy_gradient.py",
          "deltas = jnp.where(mask, rewards + later_values - values, 0.0)", "deltas = rewards + later_values - values",
          ("test_policy_gradient::test_advantages_are_the_double_sum_of_their_definition",)),
    Break(10, "an answer without end pays nothing", "policy_gradient.py",
          "rollout.scores - options.missing_eos_penalty * ~rollout.ended", "rollout.scores",
          ("test_policy_gradient::test_an_answer_without_end_is_penalized",)),
    Break(10, "an answer with an end pays", "policy_gradient.py",
          "options.missing_eos_penalty * ~rollout.ended", "options.missing_eos_penalty * rollout.ended",
          ("test_policy_gradient::test_an_answer_without_end_is_penalized",)),
    Break(10, "the value is clipped to the wrong side", "policy_gradient.py",
          "jnp.clip(values, old_values - clip, old_values + clip)",
          "jnp.clip(values, old_values + clip, old_values - clip)",
          ("test_policy_gradient::test_a_value_earns_nothing_by_a_move_beyond_the_clip[0.1-1-0.81--0.9]",
           "test_policy_gradient::test_a_value_earns_nothing_by_a_move_beyond_the_clip[0.5-1-0.64-0]")),
    Break(10, "the smaller value loss counts", "policy_gradient.py",
          "0.5 * jnp.maximum((values", "0.5 * jnp.minimum((values",
          ("test_policy_gradient::test_a_value_earns_nothing_by_a_move_beyond_the_clip[0.5-1-0.64-0]",)),
    Break(10, "the surrogate is not clipped", "policy_gradient.py",
          "jnp.clip(ratio, 1 - clip, 1 + clip)", "ratio",
          ("test_policy_gradient::test_the_surrogate_earns_nothing_beyond_the_clip[1.3-1-0]",)),
    Break(10, "an answer is in its own baseline", "policy_gradient.py",
          "(rewards.sum(-1, keepdims=True) - rewards) / num_others", "rewards.mean(-1, keepdims=True)",
          ("test_policy_gradient::test_the_baseline_of_an_answer_is_the_mean_of_the_others",)),
    Break(10, "the value's loss does not reach the policy's layers", "methods/value_model.py",
          "head_values(value.model.head(weights.value), hidden,",
          "head_values(value.model.head(weights.value), jax.lax.stop_gradient(hidden),",
          ("test_value_model::test_a_shared_value_model_is_a_head_on_the_policy_s_hidden_states",)),
    Break(10, "a value knows the token that it is to predict", "methods/value_model.py",
          "jnp.take_along_axis(hidden, batch.target_sources[..., None], axis=1)",
          "jnp.take_along_axis(hidden, batch.target_sources[..., None] + 1, axis=1)",
          ("test_value_model::test_a_value_is_the_reward_model_s_score_of_the_answer_so_far",)),
    Break(10, "the value model starts from the policy in any case", "methods/value_model.py",
          "if reward is not None:", "if False:",
          ("test_value_model::test_the_value_model_starts_as_the_reward_model_or_as_a_head_of_zeros",)),
    # 11: what is sampled is trained on at its own place, and paired by the judge
    Break(11, "the worst answer is chosen", "methods/online_dpo.py",
          "jnp.stack([best, worst], axis=1)", "jnp.stack([worst, best], axis=1)",
          ("test_online_dpo::test_best_and_worst_are_paired_and_labeled_by_the_difference_of_their_scores",
           "test_online_dpo::test_the_gradient_is_that_of_padded_pairs_in_both_orders[shared]")),
    Break(11, "soft labels are hard", "methods/online_dpo.py",
          "if labels == \"soft\" else", "if labels == \"none\" else",
          ("test_online_dpo::test_best_and_worst_are_paired_and_labeled_by_the_difference_of_their_scores",
           "test_online_dpo::test_the_gradient_is_that_of_padded_pairs_in_both_orders[shared]")),
    Break(11, "labels do not reach the batch", "methods/online_dpo.py",
          "label=in_slots(ids, label).reshape(shape)", "label=np.ones(shape, np.float32)",
          ("test_online_dpo::test_the_gradient_is_that_of_padded_pairs_in_both_orders[shared]",)),
    Break(11, "a label is not heeded by the loss", "losses.py",
          "policy.label * losses + (1 - policy.label) * swapped_losses", "losses",
          ("test_losses::test_a_label_mixes_the_losses_of_both_orders[sigmoid]",
           "test_online_dpo::test_the_gradient_is_that_of_padded_pairs_in_both_orders[shared]")),
    Break(11, "an answer without end is judged like the others", "methods/online_dpo.py",
          "graded.scores - np.float32(self.options.missing_eos_penalty) * ~graded.ended", "graded.scores",
          ("test_online_dpo::test_an_answer_without_end_pays_the_penalty_before_it_is_judged",)),
    Break(11, "sampled log-probs are those of the token before", "inference/generate.py",
          "log_softmax(logits), token[:, None]", "log_softmax(logits), state[1][:, None]",
          ("test_generate::test_log_probs_of_drawn_tokens_are_those_of_a_full_forward_pass",)),
    Break(11, "sampled log-probs are at temperature", "inference/generate.py",
          "log_softmax(logits), token[:, None]", "log_softmax(logits / (options.temperature or 1.0)), token[:, None]",
          ("test_generate::test_log_probs_of_drawn_tokens_are_those_of_a_full_forward_pass",)),
    Break(11, "sampled log-probs lie one token late", "methods/rollouts.py",
          "logps[index][: len(values)] = values", "logps[index][1 : len(values)] = values[:-1]",
          ("test_rollouts::test_a_rollout_has_each_token_s_log_prob_at_its_place_and_nothing_in_empty_slots",)),
    Break(11, "answers are trained on in another slot", "methods/rollouts.py",
          "slots[ids >= 0] = values", "slots[np.flatnonzero(ids >= 0)[::-1]] = values",
          ("test_rollouts::test_a_rollout_has_each_token_s_log_prob_at_its_place_and_nothing_in_empty_slots",)),
    Break(11, "log-probs are gathered one token late", "batch.py",
          "self.target_answers, self.target_offsets]", "self.target_answers, self.target_offsets + 1]",
          ("test_packing::test_values_of_targets_are_gathered_by_pair_answer_and_token[shared]",)),
    # 12: a model computes the logits of transformers, and the gradient of torch
    Break(12, "the slope of a cap is left out of the gradient", "ops/token_logps.py",
          "grads *= 1 - (scores / options.softcap) ** 2", "pass",
          ("test_families::test_logits_and_gradient_are_those_of_transformers[gemma2]",)),
    Break(12, "learned positions are not trained", "models/decoder.py",
          "self.weight(\"position_embed\", \"PD\")[positions]",
          "jax.lax.stop_gradient(self.weight(\"position_embed\", \"PD\"))[positions]",
          ("test_families::test_logits_and_gradient_are_those_of_transformers[gpt2]",)),
    Break(12, "biases of experts are not trained", "ops/experts.py",
          "grouped.spread_experts(layer.bias, groups) * bias_scale",
          "jax.lax.stop_gradient(grouped.spread_experts(layer.bias, groups)) * bias_scale",
          ("test_families::test_logits_and_gradient_are_those_of_transformers[gpt_oss]",)),
]  # fmt: skip

NOTICED = (
    "AssertionError",
    "assert ",
    "Failed: DID NOT RAISE",
    "UserWarning: Some donated buffers were not usable",  # an error in these tests
    "AttributeError: 'Problem' object has no attribute 'prompt'",  # a good pair was refused
)
NAMED = sorted({test for row in BREAKS for test in row.tests})


@pytest.fixture(scope="module")
def copy(shared, tmp_path_factory) -> Path:
    """A checkout of its own, whose package stands before any installed one."""
    copy = tmp_path_factory.mktemp("breaks") / "checkout"
    for folder in ("dpo_jax", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def outcomes(copy: Path, tests: list[str], shared: Path) -> dict[str, str]:
    """First line of why each test failed; the empty text where it passed."""
    report = copy / "report.xml"
    paths = {path.stem: path for path in (copy / "tests").rglob("test_*.py")}
    ids = [f"{paths[file]}::{name}" for file, name in (test.split("::") for test in tests)]
    environment = os.environ | {
        "DPO_JAX_SHARED": str(shared),
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--junitxml", str(report), *ids]
    ran = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    found = {}
    for case in ET.parse(report).iter("testcase"):
        assert case.find("error") is None, ran.stdout
        assert case.find("skipped") is None, ran.stdout
        failure = case.find("failure")
        name = f"{case.attrib['classname'].rpartition('.')[2]}::{case.attrib['name']}"
        found[name] = "" if failure is None else failure.attrib["message"].splitlines()[0]
    report.unlink()
    assert set(found) == set(tests), ran.stdout
    return found


FIRST = {row.invariant: row for row in reversed(BREAKS)}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=pytest.mark.slow if row is FIRST[row.invariant] else pytest.mark.weekly)
        for row in BREAKS
    ],
    ids=[f"{row.invariant}: {row.what}" for row in BREAKS],
)
def test_a_broken_line_is_noticed_by_its_tests(row, copy, shared):
    path = copy / "dpo_jax" / row.file
    whole = path.read_text()
    assert whole.count(row.old) == 1, f"{row.old!r} is to be found once in {row.file}"
    files = {test.split("::")[0] for test in row.tests}
    path.write_text(whole.replace(row.old, row.new))
    try:
        found = outcomes(copy, [test for test in NAMED if test.split("::")[0] in files], shared)
    finally:
        path.write_text(whole)
    failed = {test: why for test, why in found.items() if why}
    assert set(failed) == set(row.tests)
    for why in failed.values():
        assert why.startswith(NOTICED), failed


def test_every_line_to_be_broken_is_in_the_code():
    for row in BREAKS:
        assert (ROOT / "dpo_jax" / row.file).read_text().count(row.old) == 1, row


def test_every_invariant_is_broken_at_least_twice():
    for invariant in range(1, 12):
        assert sum(row.invariant == invariant for row in BREAKS) >= 2
