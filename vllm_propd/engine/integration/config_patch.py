"""How users turn ProPD on: the places where vLLM reads a speculative config.

Four small patches, each applied once and inert unless the method is ``propd``:

- ``EngineArgs.add_cli_args``: ``--speculative-config`` takes the word ``propd`` beside
  JSON, and ``--spec-method`` knows it.
- ``EngineArgs.create_engine_config``: a config of method ``propd`` becomes what vLLM
  supports for third parties: ``custom_class`` plus our worker. One door for
  ``vllm serve``, ``LLM(...)`` and ``--spec-method``.
- ``LoggingStatLogger.log``: vLLM's periodic log gets a line of ProPD's.
- ``SamplingParams._validate_spec_decode``: vLLM refuses ``min_p`` and ``logit_bias`` with
  any speculation, because its rejection sampler ignores them; ours does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from vllm.config import AttentionConfig, SpeculativeConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.metrics.loggers import LoggingStatLogger

from vllm_propd.config import METHOD, ProPDConfig, parse_config
from vllm_propd.engine.integration.find_heads import GIVEN, NoHeadsError, find_heads
from vllm_propd.engine.integration.patches import Patch
from vllm_propd.engine.integration.support_matrix import check_engine, choose_early_layer
from vllm_propd.engine.metrics import cut_depths, log_line, read_totals, show_metrics

logger = init_logger("vllm.propd.doors")

PROPOSER = "vllm_propd.engine.step.propose.MedusaTreeProposer"
CPU_WORKER = "vllm_propd.engine.cpu_worker.ProPDCPUWorker"
CUDA_WORKER = "vllm_propd.engine.cuda_worker.ProPDCUDAWorker"

REWRITTEN = (
    "worker_cls", "speculative_config", "spec_method", "spec_model", "spec_tokens",
    "attention_backend",
)  # fmt: skip
"""Fields of EngineArgs that vLLM is to see otherwise than the user gave them."""


def is_propd(config: SpeculativeConfig | None) -> bool:
    """Whether an engine's speculative config is ProPD's."""
    return config is not None and config.model == PROPOSER


def _teach_cli(original: Any) -> Any:
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        for action in parser._actions:
            if "--speculative-config" in action.option_strings:
                action.type = _speculative_config_type(action.type)
            if "--spec-method" in action.option_strings and action.choices:
                action.choices = [*action.choices, METHOD]
        return parser

    return add_cli_args


def _speculative_config_type(original: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return {"method": METHOD} if text == METHOD else original(text)

    return parse


def _teach_engine_args(original: Any) -> Any:
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        keys = _requested(self)
        if keys is None:
            return original(self, *args, **kwargs)
        given = parse_config(keys)
        asked = {name: getattr(self, name) for name in REWRITTEN}
        try:
            config = _enable(self, given)
            vllm_config = original(self, *args, **kwargs)
        finally:  # Ray asks the same arguments for a config twice
            for name, value in asked.items():
                setattr(self, name, value)
        config = check_engine(vllm_config, config)
        _pad_no_request(vllm_config)
        additional = {
            METHOD: config.model_dump_json(exclude_unset=True),
            GIVEN: given.model,
        }
        vllm_config.additional_config = {**vllm_config.additional_config, **additional}
        logger.info("ProPD: %s", config.model_dump_json())
        show_metrics(vllm_config)
        return vllm_config

    return create_engine_config


def _requested(args: EngineArgs) -> dict[str, Any] | None:
    """Returns the user's keys without ``method``; None where ProPD is not asked for."""
    config: Any = args.speculative_config
    if config == METHOD:
        config = {"method": METHOD}
    if isinstance(config, str) or not isinstance(config, dict | None):
        return None
    keys = {key.replace("-", "_"): value for key, value in (config or {}).items()}
    method = keys.pop("method", None)
    if METHOD not in (method, args.spec_method):
        return None
    for flag, key, value in (
        ("--spec-method", "method", args.spec_method),
        ("--spec-model", "model", args.spec_model),
        ("--spec-tokens", "num_speculative_tokens", args.spec_tokens),
    ):
        if value is None:
            continue
        if key in keys or (key == "method" and method is not None):
            raise ValueError(
                f"{flag} and --speculative-config['{key}'] are mutually exclusive"
            )
        if key != "method":
            keys[key] = value
    return keys


def find_config(
    keys: dict[str, Any], target: str, revision: str | None = None
) -> ProPDConfig:
    """Returns the settings behind a user's keys, with heads and early layer found.

    Raises:
        ValueError: something is wrong with the keys or with the heads; it says what.
    """
    return with_heads_found(parse_config(keys), target, revision)


def with_heads_found(
    config: ProPDConfig, target: str, revision: str | None = None
) -> ProPDConfig:
    """Returns the settings with heads and early layer found.

    Where nobody has named heads and the target has none, they are those without heads.

    Raises:
        ValueError: something is wrong with the heads; it says what.
    """
    if not config.heads:
        return config
    try:
        heads = find_heads(config.model, target, revision)
    except NoHeadsError as error:
        has_others = config.looks_up or config.recycles
        if config.model is not None or not has_others or config.has_rule:
            raise
        logger.warning("ProPD drafts without heads: %s", error)
        return config.without_heads()
    config = config.model_copy(update={"model": str(heads)})
    return choose_early_layer(config, heads)


def _enable(args: EngineArgs, given: ProPDConfig) -> ProPDConfig:
    """Rewrites engine arguments so that vLLM builds our worker and proposer."""
    config = with_heads_found(given, args.model, args.revision)
    if args.worker_cls != "auto":
        raise ValueError(
            f"speculative_config method '{METHOD}' brings its own worker: remove "
            f"--worker-cls {args.worker_cls}"
        )
    args.worker_cls = CPU_WORKER
    if current_platform.is_cuda():
        args.worker_cls = CUDA_WORKER
        _use_flash_attention(args)
    args.spec_method = args.spec_model = args.spec_tokens = None
    args.speculative_config = {
        "method": "custom_class",
        "model": PROPOSER,
        "num_speculative_tokens": config.num_speculative_tokens,
    }
    return config


def _pad_no_request(vllm_config: VllmConfig) -> None:
    """Lets a request join a batch with the one token that it has left to compute.

    vLLM pads it to a row for each speculative token, for CUDA graphs of whole uniform
    batches: here as many as the largest tree has nodes, which small token budgets do not
    hold (it would wait for ever) and prefill thresholds cut (the engine would die). It does
    not where the number of drafts depends on the batch's size: ours, once more, for all.
    Set when vLLM has checked its config: it refuses real schedules with data parallelism.
    """
    config, nodes = vllm_config.speculative_config, vllm_config.num_speculative_tokens
    batches = (1, vllm_config.scheduler_config.max_num_seqs, nodes)
    config.num_speculative_tokens_per_batch_size = [batches]


def _use_flash_attention(args: EngineArgs) -> None:
    """Selects FlashAttention, which our backend extends; vLLM may choose another."""
    ours = AttentionBackendEnum.FLASH_ATTN
    for flag, chosen in (
        ("--attention-backend", args.attention_backend),
        ("--attention-config", args.attention_config.backend),
    ):
        # From Python it may be a name.
        backend = AttentionConfig.validate_backend_before(chosen)
        if backend not in (None, ours):
            raise ValueError(
                f"speculative_config method '{METHOD}' needs the attention backend "
                f"{ours.name} on CUDA: remove {flag} {backend.name}"
            )
    args.attention_config.backend, args.attention_backend = ours, None


def _log_too(original: Any) -> Any:
    before: WeakKeyDictionary[LoggingStatLogger, dict[str, float]] = WeakKeyDictionary()

    def log(self: LoggingStatLogger) -> None:
        ours = is_propd(self.vllm_config.speculative_config)
        if ours:
            cut_depths(self.spec_decoding_logging)
        original(self)
        if ours:
            # One of several engines, or one logger for all of them.
            engines = getattr(self, "engine_indexes", [self.engine_index])
            now = read_totals(self.vllm_config, engines)
            if (line := log_line(now, before.get(self, {}))) is not None:
                logger.info(line)
            before[self] = now

    return log


def _allow_logit_fields(original: Any) -> Any:
    def _validate_spec_decode(
        self: SamplingParams, speculative_config: SpeculativeConfig | None
    ) -> None:
        if not is_propd(speculative_config):
            original(self, speculative_config)

    return _validate_spec_decode


PATCHES: tuple[Patch, ...] = (
    (EngineArgs, "add_cli_args", _teach_cli),
    (EngineArgs, "create_engine_config", _teach_engine_args),
    (LoggingStatLogger, "log", _log_too),
    (SamplingParams, "_validate_spec_decode", _allow_logit_fields),
)
