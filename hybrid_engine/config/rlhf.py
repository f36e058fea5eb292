"""Step 3: rollouts, rewards, KL penalty, PPO."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_engine.config.model import OptimizerConfig
from hybrid_engine.config.options import Options, option, require, section


@dataclass(frozen=True)
class GenerationConfig(Options):
    """How rollouts are sampled."""

    max_new_tokens: int = option(128, "longest answer in tokens", within="[1, inf)")
    temperature: float = option(
        1.0,
        "sampling temperature; the same one divides logits when scoring",
        within="[1e-6, inf)",
    )
    top_k: int = option(
        0,
        "sample from the k most likely tokens only; 0 from all. With this or top_p, training uses "
        "the truncated distributions, too",
        within="[0, inf)",
    )
    top_p: float = option(
        1.0,
        "sample from the smallest set of most likely tokens with this probability; 1 from all",
        within="(0, 1]",
    )
    samples_per_prompt: int = option(
        1,
        "answers to each prompt; group-relative advantages need 2 or more",
        within="[1, inf)",
    )
    max_batch: int = option(64, "sequences decoded at once", within="[1, inf)")
    kv_bytes: int = option(
        0,
        "most bytes of the key-value cache, for which sequences wait if need be; 0 takes what "
        "max_batch sequences can use",
        within="[0, inf)",
    )
    weight_bytes: int = option(
        0,
        "most bytes of gathered weights on a rank, under ZeRO-3: layers beyond are streamed from "
        "the other ranks in every pass; 0 takes half of the memory that is free",
        within="[0, inf)",
    )
    reuse_responses: bool = option(
        False,
        "when a prompt comes back, draw from the same random stream and try the last answer as a "
        "draft: fewer decoding steps for the same result, but answers that vary less over epochs",
    )
    merge_adapters: bool = option(
        False,
        "add LoRA adapters into the weights while generating, and restore the weights' bits "
        "afterwards: faster decoding, and a first_log_ratio that is small instead of 0",
    )
    inference_tp: int = option(
        1,
        "consecutive ranks of one host that generate together, each with a slice of every layer; "
        "the same answers as with 1",
        within="[1, inf)",
        flag="--inference-tp",
    )
    stop_token_ids: tuple[int, ...] = option(
        (), "further token ids that end an answer, besides the model's own", within="[0, inf)"
    )

    @property
    def truncated(self) -> bool:
        """Whether top-k or top-p may leave tokens out."""
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True)
class RewardShapingConfig(Options):
    """From the reward model's score to the number that PPO maximises; applied in this order."""

    normalize: str = option(
        "none", "divide scores by running moments", choices=("none", "scale", "standardize")
    )
    missing_eos_penalty: float = option(
        0.0, "subtracted when an answer did not end by itself", within="[0, inf)"
    )
    overlong_buffer: int = option(
        0,
        "tokens before the limit over which a length penalty grows (DAPO); 0 is off",
        within="[0, inf)",
    )
    overlong_factor: float = option(1.0, "penalty at the limit", within="[0, inf)")
    clip: float = option(10.0, "scores are clamped to +-clip; 0 does not clamp", within="[0, inf)")


@dataclass(frozen=True)
class KLConfig(Options):
    """Penalty for leaving the reference policy, as k1 in the per-token reward."""

    coef: float = option(0.05, "weight of the per-token penalty", within="[0, inf)")
    target: float = option(
        0.0,
        "KL a sequence (nats) that an adaptive coefficient aims at; 0 keeps it fixed",
        within="[0, inf)",
    )
    horizon: int = option(
        10000,
        "samples over which the adaptive coefficient moves; no fewer than an iteration has",
        within="[1, inf)",
    )


@dataclass(frozen=True)
class PPOConfig(Options):
    """Step 3: clipped PPO on token-level rewards, or a group-relative method without a critic."""

    advantage: str = option(
        "gae",
        "advantage estimator; all but gae need samples_per_prompt >= 2 and train no critic",
        choices=("gae", "grpo", "dr_grpo", "rloo", "reinforce_baseline"),
    )
    iterations: int = option(
        0, "rollout-train rounds; 0 takes one pass over the prompts", within="[0, inf)"
    )
    prompts_per_iteration: int = option(64, "prompts a rollout, over all ranks", within="[1, inf)")
    epochs: int = option(4, "passes over each rollout", within="[1, inf)")
    minibatches: int = option(1, "optimizer steps a pass", within="[1, inf)")
    max_tokens_per_pass: int = option(
        4096, "most packed tokens in one forward pass", within="[1, inf)"
    )
    clip_low: float = option(0.2, "policy ratio is clipped below 1 - clip_low", within="(0, 1)")
    clip_high: float = option(0.2, "and above 1 + clip_high", within="(0, inf)")
    dual_clip: float = option(
        0.0,
        "bound on the loss of negative advantages (Ye et al., 2020), above 1; 0 is off",
        within="[0, inf)",
    )
    value_clip: float = option(
        0.2, "values may move this far from the rollout's; 0 does not clip", within="[0, inf)"
    )
    gamma: float = option(1.0, "discount of later rewards (gae alone)", within="[0, 1]")
    lam: float = option(0.95, "GAE lambda (gae alone)", within="[0, 1]")
    whiten_advantages: bool = option(
        True,
        "zero mean and unit variance of the advantages over the tokens of the whole batch (gae and "
        "reinforce_baseline; the others stay as they are)",
    )
    entropy_coef: float = option(0.0, "weight of the entropy bonus", within="[0, inf)")
    target_kl: float = option(
        0.0,
        "stop a rollout's epochs when approximate KL to the rollout policy exceeds it; 0 is off",
        within="[0, inf)",
    )
    ptx_coef: float = option(
        0.0,
        "weight of a language-modelling loss on step-1 rows mixed into each step; 0 is off",
        within="[0, inf)",
    )
    ema_decay: float = option(
        0.0,
        "exponential moving average of the actor, saved as actor_ema; 0 is off",
        within="[0, 1)",
    )
    critic_warmup: int = option(
        0,
        "iterations that train only the critic before the policy moves (gae alone)",
        within="[0, inf)",
    )
    frozen_models: str = option(
        "auto",
        "on a GPU, reference, reward and original model stay there (resident), or wait in the "
        "host's memory and come to score (offload); auto offloads them where the plan of memory "
        "does not fit otherwise",
        choices=("auto", "resident", "offload"),
    )
    eval_prompts: int = option(
        256, "held-out prompts sampled before and after, paired", within="[0, inf)"
    )
    eval_steps: int = option(
        0, "evaluate every so many iterations; 0 only before and after", within="[0, inf)"
    )
    save_steps: int = option(
        5, "write a resumable checkpoint every so many iterations; 0 never", within="[0, inf)"
    )
    sample_steps: int = option(
        5, "show a sample every so many iterations; 0 never", within="[0, inf)"
    )
    generation: GenerationConfig = section(GenerationConfig)
    shaping: RewardShapingConfig = section(RewardShapingConfig)
    kl: KLConfig = section(KLConfig)
    actor_optimizer: OptimizerConfig = section(OptimizerConfig)
    critic_optimizer: OptimizerConfig = section(OptimizerConfig)

    @property
    def uses_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def samples_per_iteration(self) -> int:
        return self.prompts_per_iteration * self.generation.samples_per_prompt

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.uses_critic or self.generation.samples_per_prompt >= 2,
            f"rlhf.advantage={self.advantage} compares answers to one prompt: "
            "set rlhf.generation.samples_per_prompt to 2 or more",
        )
        require(
            self.samples_per_iteration % self.minibatches == 0,
            f"rlhf.minibatches ({self.minibatches}) must divide the {self.samples_per_iteration} "
            "samples of an iteration",
        )
        require(
            self.dual_clip == 0 or self.dual_clip > 1,
            f"rlhf.dual_clip is {self.dual_clip}; give 0 (off) or a number above 1",
        )
        limit = self.generation.max_new_tokens
        require(
            self.shaping.overlong_buffer <= limit,
            f"rlhf.shaping.overlong_buffer ({self.shaping.overlong_buffer}) is longer than an "
            f"answer may be (rlhf.generation.max_new_tokens is {limit})",
        )
        require(
            self.kl.target == 0 or self.kl.horizon >= self.samples_per_iteration,
            f"rlhf.kl.horizon ({self.kl.horizon}) is below the {self.samples_per_iteration} "
            "samples of an iteration, so that the coefficient would swing; give more",
        )
        self._check_warmup()

    def _check_warmup(self) -> None:
        require(
            self.critic_warmup == 0 or self.uses_critic,
            f"rlhf.critic_warmup is {self.critic_warmup}, but rlhf.advantage={self.advantage} "
            "trains no critic; give 0",
        )
        if self.iterations:
            self.check_policy_trains(self.iterations)

    def check_policy_trains(self, iterations: int) -> None:
        """Refuses a warm-up of the critic that leaves the policy none of the iterations."""
        require(
            self.critic_warmup < iterations,
            f"rlhf.critic_warmup ({self.critic_warmup}) leaves none of the {iterations} iterations "
            "to the policy; give less",
        )


@dataclass(frozen=True)
class JudgeConfig(Options):
    """Who scores answers: in training the sum of the weighted rewards, afterwards a judge that
    training never saw.
    """

    rewards: tuple[str, ...] = option(
        ("model",),
        "rewards: 'model' (step 2), a directory of a reward model, file.py:function, or "
        "http://host/path; "
        "append *WEIGHT to weigh",
    )
    http_timeout: float = option(
        60.0, "seconds to wait for an HTTP reward's answer", within="(0, inf)"
    )
    http_retries: int = option(
        3,
        "further tries of an HTTP reward after a lost connection, a timeout or a busy server",
        within="[0, inf)",
    )
    unseen_judge: str = option(
        "none",
        "independent scorer of held-out answers, before and after",
        choices=("none", "imdb-tfidf", "vader"),
    )

    fluency: bool = option(
        False,
        "measure how likely held-out answers are to the model that the run started from, before "
        "and after",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.rewards) > 0,
            "judge.rewards is empty; give at least one reward, such as 'model'",
        )
