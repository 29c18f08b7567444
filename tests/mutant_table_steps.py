"""More bugs for `python -m tests.mutants`: in what runs remember, replay and measure from step to step."""

from __future__ import annotations

from tests.mutant_table import Mutant

MEMORY = "upge/train/test_prompt_memory.py::"
REPLAY = "upge/train/test_replay.py::"
LAG = "upge/train/test_lag.py::"
OFF_POLICY = "upge/train/test_off_policy.py::"
NOISE = "upge/rollout/test_noise.py::"
REWARDS = "upge/theory/test_theory_rewards.py::"
GRADIENTS = "upge/test_gradient_noise.py::"
LEARNER = "upge/train/test_learner.py::"

MUTANTS = (
    Mutant(
        "memory-weight-without-decay",
        "upge/prompt_memory.py",
        "rho * weight + len(rewards)",
        "weight + len(rewards)",
        [MEMORY + "test_the_mean_is_that_of_a_beta_distribution_with_decay"],
    ),
    Mutant(
        "decay-grows-with-drift",
        "upge/prompt_memory.py",
        "2.0 ** (-drift / self.half_life)",
        "2.0 ** (drift / self.half_life)",
        [MEMORY + "test_the_decay_follows_the_drift"],
    ),
    Mutant(
        "guided-rollouts-are-remembered",
        "upge/train/prompt_records.py",
        "if not one.guiding_tokens:",
        "if one is not None:",
        [MEMORY + "test_prompts_are_told_apart_by_data_set_and_guided_rollouts_do_not_count"],
    ),
    Mutant(
        "drift-of-the-new-response",
        "upge/train/prompt_records.py",
        "again, logprobs[len(seen) :], strict=True",
        "again, logprobs[: len(again)], strict=True",
        [MEMORY + "test_the_drift_compares_the_remembered_response_with_itself"],
    ),
    Mutant(
        "newest-replayed-prompt-leaves",
        "upge/train/replay.py",
        "self._prompts.pop(next(iter(self._prompts)))",
        "self._prompts.pop(next(reversed(self._prompts)))",
        [REPLAY + "test_the_prompts_without_new_rollouts_leave_first"],
    ),
    Mutant(
        "replayed-rollouts-enter-again",
        "upge/train/replay.py",
        "if trajectories[row].passed and trajectories[row].is_fresh]",
        "if trajectories[row].passed]",
        [REPLAY + "test_replayed_rollouts_count_in_their_group_and_do_not_enter_again"],
    ),
    Mutant(
        "successes-of-a-prompt-stay",
        "upge/train/replay.py",
        "self._prompts[example] = replace(before, successes=successes)",
        "pass",
        [REPLAY + "test_a_group_without_a_new_success_updates_the_number_by_which_it_is_drawn"],
    ),
    Mutant(
        "start-of-replay-not-restored",
        "upge/train/replay.py",
        'self._has_started = state["has_started"]',
        "pass",
        [REPLAY + "test_saved_and_loaded"],
    ),
    Mutant(
        "lag-one-step-short",
        "upge/train/lag.py",
        "max(0, step - self.lag)]",
        "max(0, step - self.lag + 1)]",
        [LAG + "test_a_step_samples_with_the_weights_of_exactly_lag_steps_ago"],
    ),
    Mutant(
        "checkpoint-lacks-earliest-weights",
        "upge/train/lag.py",
        "if step - self.lag <= s < step}",
        "if step - self.lag < s < step}",
        [LAG + "test_a_checkpoint_is_read_by_any_number_of_ranks"],
    ),
    Mutant(
        "earlier-weights-stay",
        "upge/train/lag.py",
        "        _fill(zero, present)",
        "        pass",
        [LAG + "test_weights_are_exchanged_and_come_back"],
    ),
    Mutant(
        "mass-that-masks-keep",
        "upge/train/off_policy.py",
        "mass * (1 - factors.mask)",
        "mass * factors.mask",
        [OFF_POLICY + "test_the_mass_that_a_mask_removes"],
    ),
    Mutant(
        "rounding-to-another-grid",
        "upge/rollout/noise.py",
        "(2 ** (bits - 1) - 1)",
        "(2 ** (bits - 1))",
        [NOISE + "test_rounding_is_its_formula"],
    ),
    Mutant(
        "rewards-without-weights",
        "upge/components/rewards.py",
        "batch.reward_weights.get(name, 1.0)",
        "1.0",
        [REWARDS + "test_gdpo_climbs_what_its_formula_says"],
    ),
    Mutant(
        "noise-of-the-other-rows",
        "upge/gradient_noise.py",
        "tokens)[~expert, 0]",
        "tokens)[:, 0]",
        [GRADIENTS + "test_the_signals_are_their_formulas"],
    ),
    Mutant(
        "noise-without-trimming",
        "upge/gradient_noise.py",
        "left_out = int(TRIM * len(values))",
        "left_out = 0",
        [GRADIENTS + "test_a_tenth_of_the_demonstrations_is_left_out_at_each_end"],
    ),
    Mutant(
        "share-of-the-other-noise",
        "upge/stateful.py",
        "(self.target * apart + noise) / total",
        "(self.target * apart + of_demonstrations) / total",
        [GRADIENTS + "test_the_best_share_has_the_least_mean_squared_error"],
    ),
    Mutant(
        "measurements-replace-each-other",
        "upge/train/learner.py",
        '.tracked(memory.variables.get(f"{name}_{signal}"), value)',
        ".tracked(None, value)",
        [LEARNER + "test_the_noise_of_the_present_policy_is_measured_and_averaged"],
    ),
    Mutant(
        "noise-of-an-earlier-policy",
        "upge/train/learner.py",
        "dataclasses.replace(one, behavior_logprobs=None)",
        "one",
        [LEARNER + "test_the_noise_of_the_present_policy_is_measured_and_averaged"],
    ),
)
