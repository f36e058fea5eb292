"""RLHF training on one set of weights: supervised fine-tuning, reward model, PPO."""
