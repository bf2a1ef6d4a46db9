"""Options of ``compare --config``: what all methods share, the methods, and the config of each of their runs."""

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from dpo_jax.config import (
    AnyConfig,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DPOConfig,
    InvalidRowsConfig,
    JudgeConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OnlineConfig,
    OptimizerConfig,
    PairDataConfig,
    PolicyGradientConfig,
    PPOConfig,
    RewardConfig,
    RewardLossConfig,
    RolloutBatchConfig,
    RunConfig,
    SamplingConfig,
)
from dpo_jax.config.online import OnlinePairsConfig, PairJudgeConfig
from dpo_jax.config.run import RowsConfig
from dpo_jax.config.section import Section, ranged
from dpo_jax.errors import UserError, require

REWARD_MODEL = "reward_model"  # folder of the reward models' runs
NAME_PATTERN = r"[^\W_][\w+-]*"  # of a method, whose folder has the same name
RESERVED_NAMES = (REWARD_MODEL, "store", "Reference")


@dataclass(frozen=True, kw_only=True)
class ComparedJudgeConfig(JudgeConfig, name="judge"):
    """What scores the answers of every method: a reward model or a Python function."""


@dataclass(frozen=True, kw_only=True)
class LearnedRewardConfig(Section, name="learned_reward"):
    """The reward model that is trained on the pairs, for methods with `reward: learned`."""

    steps: int | None = ranged(None, above=0)
    """Length in steps; default: that of `run`."""
    loss: RewardLossConfig = field(default_factory=RewardLossConfig)
    optimizer: OptimizerConfig | None = None
    """The optimizer; null: that of the comparison."""


@dataclass(frozen=True, kw_only=True)
class ComparedMethodConfig(Section):
    """A method, under a name of your choice.

    Next to these options stand sections of `train` and `ppo`: `optimizer`, in place of the comparison's own; `loss`
    for dpo and online_dpo; `online`, which is `data.online` without its reward; and `ppo`.
    """

    method: Literal["dpo", "online_dpo", "ppo"]
    """dpo: train on the pairs, with any loss; online_dpo, ppo: train on sampled answers to the prompts of the pairs."""
    reward: Literal["judge", "learned"] = "judge"
    """What scores the answers sampled in training: the judge, or a reward model trained on the pairs."""
    betas: tuple[float, ...] = ranged((), above=0)
    """Train once with each of these as loss.beta or, for ppo, as ppo.kl_coef; default: once with its own value."""
    steps: int | None = ranged(None, above=0)
    """Length in steps; default: that of `run`."""
    optimizer: OptimizerConfig | None = None
    loss: LossConfig | None = None
    online: OnlinePairsConfig | None = None
    ppo: PolicyGradientConfig | None = None

    def __post_init__(self):
        super().__post_init__()
        method, is_sampled = self.method, self.method != "dpo"
        for option, methods in (("loss", ("dpo", "online_dpo")), ("online", ("online_dpo",)), ("ppo", ("ppo",))):
            if getattr(self, option) is not None and method not in methods:
                raise UserError(f"{option}: method {method} has no such section; remove it")
        self.refuse_idle("reward", not is_sampled, "method dpo trains on the pairs, which are labeled already")
        beta_texts = {f"{beta:g}" for beta in self.betas}  # as in folders and labels
        self.refuse("betas", len(beta_texts) < len(self.betas), "two of them are equal to six digits; give each once")
        option, value, default = (
            ("ppo.kl_coef", self.gradient.kl_coef, PolicyGradientConfig.kl_coef)
            if method == "ppo"
            else ("loss.beta", self.pair_loss.beta, LossConfig.beta)
        )
        self.refuse("betas", self.betas and value != default, f"{option} is {value:g}; give one of the two")
        has_beta = method == "ppo" or self._uses_beta
        self.refuse("betas", self.betas and not has_beta, f"loss {self.pair_loss.type} has no beta; remove betas")

    @property
    def pair_loss(self) -> LossConfig:
        """The section `loss`, or its defaults if it is not given."""
        return self.loss or LossConfig()

    @property
    def gradient(self) -> PolicyGradientConfig:
        """The section `ppo`, or its defaults if it is not given."""
        return self.ppo or PolicyGradientConfig()

    @property
    def _uses_beta(self) -> bool:
        return any(name != "sft" for name, _ in self.pair_loss.terms)

    @property
    def variants(self) -> Iterator[tuple[float | None, "ComparedMethodConfig"]]:
        """Each beta of the method, with the method's config at that beta; for a loss without one, beta is None."""
        for beta in self.betas:
            if self.method == "ppo":
                yield beta, replace(self, betas=(), ppo=replace(self.gradient, kl_coef=beta))
            else:
                yield beta, replace(self, betas=(), loss=replace(self.pair_loss, beta=beta))
        if not self.betas:
            loss_beta = self.pair_loss.beta if self._uses_beta else None
            yield self.gradient.kl_coef if self.method == "ppo" else loss_beta, self


class ComparedRun(NamedTuple):
    """A training run of a comparison."""

    name: str  # of the method, or REWARD_MODEL
    beta: float | None
    seed: int
    reward_model: str | None  # folder, under ``run.dir``, of the learned reward of the answers that it samples
    folder: str  # under ``run.dir``
    config: AnyConfig

    @property
    def title(self) -> str:
        """Name of the run in messages, such as `dpo, beta 0.1, seed 0`."""
        beta = "" if self.beta is None else f", beta {self.beta:g}"
        return f"{self.name}{beta}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Section):
    """A comparison: the sections that all methods share, and the methods."""

    model: ModelConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig
    judge: ComparedJudgeConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    run: RunConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    methods: dict[str, ComparedMethodConfig]
    """What is compared, by name, next to the start itself; see `methods.NAME`."""
    learned_reward: LearnedRewardConfig | None = None
    best_of: tuple[int, ...] = ranged((), above=1)
    """Also compare the best, by the judge, of so many answers of the start, for each of these numbers."""
    seeds: int = ranged(1, above=0)
    """Runs of each method: with run.seed, run.seed + 1, and so on."""
    prompts: int = ranged(128, above=0)
    """Held-out prompts, from the start of the evaluation set, that every trained policy answers once."""

    def __post_init__(self):
        super().__post_init__()
        self.refuse("methods", not self.methods, "name at least one method")
        for name in self.methods:
            remedy = (
                "a method's name is also that of its folder: begin with a letter or digit, and use only these and + - _"
            )
            require(bool(re.fullmatch(NAME_PATTERN, name)) and name not in RESERVED_NAMES, "methods", name, remedy)
        remedy = "name one set of held-out pairs as data.eval; all methods are compared on its prompts"
        self.refuse("data.eval_fraction", self.data.eval_fraction, remedy)
        self.refuse("data.eval", len(self.data.eval) != 1, remedy)
        self.refuse_idle("checkpoint.keep_best", True, "the newest checkpoint of each run is compared")
        self.refuse("best_of", len(set(self.best_of)) < len(self.best_of), "give each number once")
        _ = self.judging, list(self.runs)  # a run that would be refused is refused now

    @property
    def held_out(self) -> str:
        """Name of the evaluation set."""
        return next(iter(self.data.eval))

    @property
    def judging(self) -> PPOConfig:
        """The config that evaluates a policy: prompts to answer, how answers are sampled, and what scores them."""
        base = self._shared(self.run.dir, 0, None, None) | {"lora": LoraConfig()}
        data, batch, sampling = self._prompt_data, self._prompt_batch, self.sampling
        return PPOConfig(**base, data=data, reward=self.judge, batch=batch, sampling=sampling)

    @property
    def runs(self) -> Iterator[ComparedRun]:
        """Every training run, in order: the reward models first, because other runs need them.

        Raises:
            UserError: the config of a run is refused.
        """
        methods = [(name, *variant) for name, method in self.methods.items() for variant in method.variants]
        if self.learned_reward is not None or any(method.reward == "learned" for _, _, method in methods):
            for seed in range(self.seeds):
                folder = self._reward_folder(seed)
                config = self._checked("learned_reward", self._reward_model_config, folder, seed)
                yield ComparedRun(REWARD_MODEL, None, self.run.seed + seed, None, folder, config)
        for name, beta, method in methods:
            method_folder = f"{name}/beta-{beta:g}" if self.methods[name].betas else name
            for seed in range(self.seeds):
                folder = f"{method_folder}/seed-{self.run.seed + seed}"
                config = self._checked(f"methods.{name}", partial(self._method_config, method), folder, seed)
                reward_model = self._reward_folder(seed) if method.reward == "learned" else None
                yield ComparedRun(name, beta, self.run.seed + seed, reward_model, folder, config)

    def _checked(self, option: str, config_of: Callable[[str, int], AnyConfig], folder: str, seed: int) -> AnyConfig:
        """Return the config of a run; if it is invalid, the error names ``option`` first."""
        try:
            return config_of(f"{self.run.dir}/{folder}", seed)
        except UserError as error:
            raise UserError(f"{option}: {error}") from None

    def _reward_folder(self, seed: int) -> str:
        """Return the folder of the reward model that is trained with a seed, relative to ``run.dir``."""
        return f"{REWARD_MODEL}/seed-{self.run.seed + seed}"

    def _reward_model_config(self, folder: str, seed: int) -> RewardConfig:
        options = self.learned_reward or LearnedRewardConfig()
        sections = self._shared(folder, seed, options.steps, options.optimizer)
        sections["run"] = replace(sections["run"], token_stats=RunConfig.token_stats)
        batch = replace(self.batch, target_chunk=BatchConfig.target_chunk)
        return RewardConfig(**sections, data=self._pair_data, loss=options.loss, batch=batch, sampling=self._samples)

    def _method_config(self, method: ComparedMethodConfig, folder: str, seed: int) -> AnyConfig:
        sections = self._shared(folder, seed, method.steps, method.optimizer)
        judge: dict[str, Any] = asdict(self.judge)
        if method.reward == "learned":
            judge = {"path": f"{self.run.dir}/{self._reward_folder(seed)}"}
        if method.method == "ppo":
            sections["run"] = replace(sections["run"], token_stats=RunConfig.token_stats)
            batch = self._prompt_batch
            options: dict[str, Any] = {"ppo": method.gradient, "reward": JudgeConfig(**judge)}
            return PPOConfig(**sections, **options, data=self._prompt_data, batch=batch, sampling=self.sampling)
        data, sampling = self._pair_data, self._samples
        if method.method == "online_dpo":
            pairs = asdict(method.online or OnlinePairsConfig())
            online = OnlineConfig(reward=PairJudgeConfig(**judge), **pairs)
            data, sampling = PairDataConfig(**_options(self._prompt_data), online=online), self.sampling
        sections["model"] = self.model
        return DPOConfig(**sections, data=data, loss=method.pair_loss, batch=self.batch, sampling=sampling)

    def _shared(self, folder: str, seed: int, steps: int | None, optimizer: OptimizerConfig | None) -> dict[str, Any]:
        """Return the config sections that all methods share, without the load-balancing loss, which only DPO has."""
        run = replace(self.run, dir=folder, seed=self.run.seed + seed)
        if steps is not None:
            run = replace(run, steps=steps, epochs=None)
        sections = {name: getattr(self, name) for name in ("lora", "mesh", "checkpoint")}
        sections["model"] = replace(self.model, router_aux_loss_coef=None)
        return sections | {"run": run, "optimizer": optimizer or self.optimizer}

    @property
    def _prompt_batch(self) -> RolloutBatchConfig:
        row_options = {option.name: getattr(self.batch, option.name) for option in fields(RowsConfig)}
        return RolloutBatchConfig(prompts=self.batch.pairs, **row_options)

    @property
    def _samples(self) -> SamplingConfig:
        """The section ``sampling`` of methods that sample answers only for ``run.samples``, not in training."""
        return self.sampling if self.run.samples else SamplingConfig()

    @property
    def _pair_data(self) -> DataConfig:
        return replace(self.data, store=self.data.store or f"{self.run.dir}/store")

    @property
    def _prompt_data(self) -> DataConfig:
        """The data config that reads only the prompts of the pairs; options for answers keep their defaults."""
        rules, defaults = self.data.invalid_rows, InvalidRowsConfig
        rules = replace(rules, equal_answers=defaults.equal_answers, template_not_prefix=defaults.template_not_prefix)
        limit = lambda source: min(self.prompts, source.limit or self.prompts)  # noqa: E731
        eval_sources = {name: replace(source, limit=limit(source)) for name, source in self.data.eval.items()}
        return replace(self._pair_data, eval=eval_sources, append_eos=True, invalid_rows=rules)


def _options(section: Section) -> dict[str, Any]:
    """Return a section's options by name; subsections stay objects."""
    return {option.name: getattr(section, option.name) for option in fields(section)}
