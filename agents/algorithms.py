"""The learning algorithms, by name, with defaults for episodes of 5-60 steps that are paid once, at the end.

What a search of 200 episodes needs is not what a million steps of control need; these choices were measured:

- **Actions are relative to the even share** (see `view`): 0 spends what is left evenly, so an untrained actor, whose
  last layer starts at zero, *is* the uniform plan, and noise in one group is paid for by all later groups alike.
- **The first episodes are known plans**: uniform, the error curves' knapsack, global threshold, first-and-last.
- **The rest of the warm-up is half random plans, half the best plan so far disturbed** in a few groups with AMC's
  truncated normal noise. **After it, every second episode is the learner's own**, with the same noise, and the others
  go on disturbing the best. The width falls geometrically over the run, and varies from episode to episode. The
  record says for each episode where its actions came from.
- **Credit**: the dynamics are deterministic, gamma is 1 and only the last step pays, so every transition is stored
  with its episode's return and as final. The critic is a regression on returns: nothing is bootstrapped, hence nothing
  is counted twice (AMC writes the final reward to each transition *and* bootstraps).
- **Returns are normalised by hand**: 0 is the uniform plan, 1 the dense network. What a shaper pays (`--shape`) is
  added in these units: all that it pays from a step on, or in PPO and AMC step by step.
- **Imitation**: after each round the actor also takes a few steps toward the actions of the best episodes
  (self-imitation, Oh et al. 2018), so that the deterministic policy ends where the search found its best plans.

`td3_surrogate` is `td3` in all but this: what is neither a known plan nor the learner's own is not disturbed or random,
but what a Gaussian process over all episodes so far expects the largest improvement of (`baselines.surrogate`).

None of this holds for `amc` and `amc_paper`, which are a published baseline: see `baselines.amc`.
"""

from __future__ import annotations

from functools import partial

from sb3_contrib import TQC
from stable_baselines3 import DDPG, PPO, SAC, TD3

from agents.amc import amc_of
from agents.exploration import Guided, Surrogated
from agents.learner import Algorithm, OnPolicy
from baselines import amc

OFF_POLICY = {"learning_rate": 1e-3, "batch_size": 64, "gamma": 1.0, "tau": 0.02}
SMALL = {"net_arch": [64, 64]}

ALGORITHMS: dict[str, Algorithm] = {
    "ddpg": Algorithm(DDPG, settings=OFF_POLICY, policy=SMALL),
    "td3": Algorithm(TD3, settings=OFF_POLICY, policy=SMALL),
    "td3_surrogate": Algorithm(TD3, explorer=Surrogated, settings=OFF_POLICY, policy=SMALL),
    "sac": Algorithm(SAC, settings=OFF_POLICY | {"ent_coef": 0.002}, policy=SMALL),
    "tqc": Algorithm(TQC, settings=OFF_POLICY | {"ent_coef": 0.002}, policy=SMALL | {"n_quantiles": 11}),
    "ppo": Algorithm(
        PPO,
        learner=OnPolicy,
        explorer=partial(Guided, own_noise=True),
        settings={"learning_rate": 1e-3, "batch_size": 32, "gamma": 1.0, "gae_lambda": 1.0, "n_epochs": 5},
        policy=SMALL | {"log_std_init": -1.8},
        batch_episodes=5,
    ),
    "amc": amc_of(amc.SMALL),
    "amc_paper": amc_of(amc.PAPER),
}
