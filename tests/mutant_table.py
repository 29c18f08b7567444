"""The bugs that `python -m tests.mutants` plants: one changed place each, and the tests that must notice it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Mutant(NamedTuple):
    """A bug to plant.

    Attributes:
        name: what goes wrong.
        file: path of the file to change, from the root of the tree.
        old: the text to replace, which occurs once in the file.
        new: what takes its place.
        tests: the tests that must notice, as pytest takes them, without the folder tests/.
    """

    name: str
    file: str
    old: str
    new: str
    tests: Sequence[str]


REACH = "upge/train/test_settings_reach.py::"
STAGES = "upge/train/test_stages.py::"
EVALUATE = "upge/evaluation/test_train_evaluate.py::"
UPDATES = "upge/train/test_update_columns.py::"
PARTS = "upge/components/test_components.py::"
REDUCTIONS = "upge/test_gates_reductions.py::"

MUTANTS = (
    # Settings that do not reach the place where they act.
    Mutant(
        "temperature-not-in-loss",
        "upge/train/engine.py",
        "packed, temperature=self.temperature, **arguments",
        "packed, **arguments",
        [REACH + "test_the_loss_is_that_of_the_policy_at_its_temperature"],
    ),
    Mutant(
        "temperature-not-in-logprobs",
        "upge/train/engine.py",
        "packed, temperature=self.temperature, **arguments",
        "packed, **arguments",
        [REACH + "test_logprobs_are_those_of_the_policy_at_its_temperature"],
    ),
    Mutant(
        "temperature-not-handed-to-policy",
        "experiments/run/train.py",
        "config.optimizer, world, temperature, seed",
        "config.optimizer, world, seed",
        [REACH + "test_the_policy_and_the_reference_policy_get_the_temperature_of_rollouts"],
    ),
    Mutant(
        "temperature-not-handed-to-reference-policy",
        "experiments/run/train.py",
        "(one.model, world, temperature, key=",
        "(one.model, world, key=",
        [REACH + "test_the_policy_and_the_reference_policy_get_the_temperature_of_rollouts"],
    ),
    Mutant(
        "temperature-not-handed-to-sampler",
        "upge/train/collect.py",
        "Sampling(config.rollout.temperature,",
        "Sampling(1.0,",
        [REACH + "test_rollouts_are_sampled_as_the_run_says"],
    ),
    Mutant(
        "clipping-dropped",
        "upge/train/deepspeed_module.py",
        "settings(dtype, world, deepspeed_config, optimizer.max_grad_norm)",
        "settings(dtype, world, deepspeed_config)",
        [REACH + "test_adamw_and_clipping_get_their_settings"],
    ),
    Mutant(
        "weight-decay-dropped",
        "upge/train/deepspeed_module.py",
        "weight_decay=optimizer.weight_decay",
        "weight_decay=0.0",
        [REACH + "test_adamw_and_clipping_get_their_settings"],
    ),
    # The whole step, its updates and their micro-batches.
    Mutant(
        "statistics-per-mini-batch",
        "upge/algorithm.py",
        "return plan_updates(",
        "return [self.plan(batch.select(u, row=u.new_tensor(range(len(u))))) for u in updates] "
        "if len(updates) > 1 else plan_updates(",
        [UPDATES + "test_whitening_and_gates_see_the_whole_step"],
    ),
    Mutant(
        "statistics-per-mini-batch-in-updater",
        "upge/train/update.py",
        "self.algorithm.plans(batch.columns, rows)",
        "[self.algorithm.plan(batch.select(some).columns) for some in rows]",
        [UPDATES + "test_whitening_and_gates_see_the_whole_step"],
    ),
    Mutant(
        "behavior-logprobs-from-current-policy",
        "upge/train/update.py",
        "behavior=number != first)",
        "behavior=False)",
        [UPDATES + "test_updates_are_those_with_all_columns[grpo-2-1]"],
    ),
    Mutant(
        "one-epoch-only",
        "upge/train/update.py",
        "* self.config.epochs:",
        "* 1:",
        [UPDATES + "test_updates_are_those_with_all_columns[grpo-1-3]"],
    ),
    Mutant(
        "token-budget-exceeded",
        "upge/train/micro_batches.py",
        "if joined.tokens <= self.budget:",
        "if True:",
        ["upge/train/test_micro_batches.py::test_plan_of_micro_batches"],
    ),
    Mutant(
        "packed-predictor-off-by-one",
        "upge/train/packing.py",
        "[last, *range(following, following",
        "[last - 1, *range(following, following",
        ["upge/train/test_packing.py::test_layout_of_a_small_row"],
    ),
    # Learning rates, stages, checkpoints.
    Mutant(
        "schedule-not-anew",
        "upge/train/lr_schedule.py",
        "step_in_stage, steps = step - span.first,",
        "step_in_stage, steps = step,",
        [STAGES + "test_the_schedule_begins_anew_with_each_stage"],
    ),
    Mutant(
        "schedule-too-long-in-later-stage",
        "upge/train/lr_schedule.py",
        "max(1, steps - critic_only)",
        "max(1, span.end - critic_only)",
        [STAGES + "test_the_schedule_begins_anew_with_each_stage"],
    ),
    Mutant(
        "critic-warm-up-off-by-one",
        "upge/train/lr_schedule.py",
        "None if step_in_stage < critic_only",
        "None if step_in_stage <= critic_only",
        [STAGES + "test_the_critic_learns_alone_for_exactly_its_warm_up"],
    ),
    Mutant(
        "critic-warm-up-in-schedule",
        "upge/train/lr_schedule.py",
        "max(0, step_in_stage - critic_only)",
        "step_in_stage",
        [STAGES + "test_the_critic_learns_alone_for_exactly_its_warm_up"],
    ),
    Mutant(
        "warm-up-starts-at-zero",
        "upge/train/lr_schedule.py",
        "config.lr * (step + 1) / config",
        "config.lr * step / config",
        ["upge/train/test_train_parts.py::test_learning_rate"],
    ),
    Mutant(
        "moments-kept-across-stages",
        "upge/train/trainer.py",
        "self.parts.models.policy.reset_optimizer(everything=True)",
        "pass",
        [STAGES + "test_a_later_stage_starts_with_fresh_moments"],
    ),
    Mutant(
        "moments-of-critic-kept-across-stages",
        "upge/train/trainer.py",
        "self.parts.models.critic.reset_optimizer(everything=True)",
        "pass",
        [STAGES + "test_a_later_stage_starts_with_fresh_moments"],
    ),
    Mutant(
        "idle-moments-kept-across-stages",
        "upge/train/moments.py",
        "if everything:",
        "if False:",
        [STAGES + "test_a_later_stage_starts_with_fresh_moments"],
    ),
    Mutant(
        "resume-forgets-moments-in-use",
        "upge/train/moments.py",
        "self.in_use = in_use",
        "self.in_use = FIRST",
        ["upge/train/test_moments.py"],
    ),
    Mutant(
        "resume-forgets-idle-moments",
        "upge/train/moments.py",
        "for k, v in state.items()",
        "for k, v in state.items() if k == 'step'",
        ["upge/train/test_moments.py"],
    ),
    Mutant(
        "other-ranks-forget-idle-moments",
        "upge/train/deepspeed_module.py",
        'return deepspeed_part(shards, before, now, rank), of_ranks[0]["in_use"], idle',
        'return deepspeed_part(shards, before, now, rank), of_ranks[0]["in_use"], {}',
        ["upge/train/test_resharding.py::test_everything_is_taken_over_exactly"],
    ),
    Mutant(
        "other-ranks-forget-the-number-of-steps",
        "upge/train/deepspeed_module.py",
        "setattr(engine, counter, model[counter])",
        "pass",
        ["upge/train/test_resharding.py::test_everything_is_taken_over_exactly"],
    ),
    Mutant(
        "other-ranks-forget-the-padding",
        "upge/train/resharding.py",
        "offset += before.part(size)",
        "offset += size // before.ranks",
        ["upge/train/test_resharding.py::test_parts_of_three_ranks"],
    ),
    Mutant(
        "other-ranks-forget-adamw-steps",
        "upge/train/resharding.py",
        '{"step": states[0]["step"].clone(),',
        '{"step": torch.zeros(()),',
        ["upge/train/test_resharding.py::test_states_keep_their_step_count"],
    ),
    Mutant(
        "resume-keeps-a-dropped-step",
        "upge/train/folder.py",
        'line["step"] <= step]',
        'line["step"] <= step + 1]',
        ["upge/train/test_train_parts.py::test_rewind_drops_what_will_be_recorded_again"],
    ),
    # Sampling, verification, evaluation.
    Mutant(
        "rollout-seeds-follow-the-rank",
        "upge/train/collect.py",
        "stream_seed(config.seed, *seeds, group) for group in groups",
        "stream_seed(config.seed, *seeds, group) for group in range(len(groups))",
        ["upge/train/test_collect.py::test_ranks_agree_with_one_process"],
    ),
    Mutant(
        "a-rank-gets-another-ranks-rollouts",
        "upge/rollout/shared_engine.py",
        "return rollouts[first : first + len(prompts)]",
        "return rollouts[: len(prompts)]",
        ["upge/rollout/test_shared_engine.py::test_every_rank_gets_its_own_prompts_rollouts"],
    ),
    Mutant(
        "an-engine-of-several-ranks-is-not-interrupted",
        "upge/rollout/shared_engine.py",
        "                    deliver()\n",
        "",
        ["upge/rollout/test_shared_engine.py::test_an_error_on_one_rank_ends_the_call_on_its_engine"],
    ),
    Mutant(
        "ranks-of-an-engine-out-of-step",
        "upge/rollout/shared_engine.py",
        "if len(set(digests)) > 1:",
        "if False:",
        ["upge/rollout/test_shared_engine.py::test_ranks_that_sample_different_responses_are_an_error"],
    ),
    Mutant(
        "verdict-of-another-response",
        "upge/rollout/verified_sampling.py",
        "pending[index, copy].result()",
        "pending[index, 0].result()",
        ["upge/train/test_collect.py::test_without_redraws_a_step_is_what_it_was"],
    ),
    Mutant(
        "evaluation-seeds-follow-the-rank",
        "upge/evaluation/evaluator.py",
        '"evaluation", i) for i in own',
        '"evaluation", i, world.rank) for i in own',
        [EVALUATE + "test_seeds_and_figures_do_not_depend_on_the_ranks"],
    ),
    Mutant(
        "mean-at-k-leaves-out-a-sample",
        "upge/evaluation/evaluator.py",
        "counts.double() / k",
        "correct[:, 1:].sum(dim=1).double() / k",
        [EVALUATE + "test_figures_by_hand"],
    ),
    Mutant(
        "mean-at-k-divides-by-one-more",
        "upge/evaluation/evaluator.py",
        "counts.double() / k",
        "counts.double() / (k + 1)",
        [EVALUATE + "test_figures_by_hand"],
    ),
    Mutant(
        "pass-at-k-with-replacement",
        "upge/evaluation/scores.py",
        "c / (n - drawn)",
        "c / n",
        ["upge/evaluation/test_passk.py::test_every_subset_is_counted"],
    ),
    # The mathematics.
    Mutant(
        "entropy-bonus-on-demonstrations",
        "upge/plan.py",
        "in_any_term.of(batch, regularizer.source)",
        "in_any_term",
        ["upge/test_regularizers.py"],
    ),
    Mutant(
        "divisor-counts-tokens-of-other-sources",
        "upge/plan.py",
        "batch.response_mask & (counting.tokens | ~counting.rows[:, None])",
        "batch.response_mask",
        ["upge/test_demonstration_tokens.py"],
    ),
    Mutant(
        "kl-reversed",
        "upge/regularizers.py",
        "batch.reference_logprobs.detach() - batch.logprobs",
        "batch.logprobs - batch.reference_logprobs.detach()",
        [PARTS + "test_kl_penalty"],
    ),
    Mutant(
        "mask-not-in-product",
        "upge/estimator.py",
        "signed = mask * advantages",
        "signed = advantages",
        [PARTS + "test_the_product_is_one_number_per_token"],
    ),
    Mutant(
        "clip-on-the-wrong-side",
        "upge/components/mask.py",
        "(advantages < 0) & (log_ratio < log_low)",
        "(advantages < 0) & (log_ratio > log_low)",
        [PARTS + "test_ppo_clip_at_its_borders"],
    ),
    Mutant(
        "truncation-without-lower-bound",
        "upge/components/denominator.py",
        "log_ratio.clamp(min=log_low, max=log_high)",
        "log_ratio.clamp(max=log_high)",
        [PARTS + "test_denominator", "upge/components/test_components_more.py::test_denominator"],
    ),
    Mutant(
        "deviation-biased",
        "upge/components/advantage.py",
        "self.baseline) - int(self.unbiased)",
        "self.baseline)",
        [PARTS + "test_group_relative_baseline_and_deviation"],
    ),
    Mutant(
        "baseline-with-own-reward",
        "upge/components/advantage.py",
        "(batch.group_sum(rewards) - rewards * is_rollout)",
        "batch.group_sum(rewards)",
        [PARTS + "test_leave_one_out"],
    ),
    Mutant(
        "gae-without-lambda",
        "upge/components/returns.py",
        "self.discount * self.lam * following",
        "self.discount * following",
        [PARTS + "test_gae_skips_the_hole_and_the_padding"],
    ),
    Mutant(
        "token-mean-over-all",
        "upge/reduction.py",
        "(batch.lengths * active).sum()",
        "batch.lengths.sum()",
        [REDUCTIONS + "test_reduction"],
    ),
    Mutant(
        "question-mean-without-questions",
        "upge/reduction.py",
        "(questions * number.clamp(min=1))",
        "number.clamp(min=1)",
        [REDUCTIONS + "test_reduction"],
    ),
    Mutant(
        "divisor-always-of-the-term",
        "upge/plan.py",
        'own if reduction.over == "term" else in_any',
        "own",
        [REDUCTIONS + "test_over_says_whose_count_divides"],
    ),
    Mutant(
        "threshold-inclusive-above",
        "upge/gates.py",
        "rate > self.threshold + _TOLERANCE",
        "rate >= self.threshold",
        [REDUCTIONS + "test_thresholds_are_exclusive_above_and_inclusive_below"],
    ),
    Mutant(
        "maximum-drops-nan",
        "upge/train/metrics.py",
        "float(torch.tensor([0.0, *(part.gap_max for part in parts)], dtype=torch.float64).max())",
        "max((part.gap_max for part in parts), default=0.0)",
        ["faults/test_nonfinite.py::test_sums_of_metrics_keep_nan"],
    ),
)
