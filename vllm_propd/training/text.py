"""What heads are trained and measured on: what is read, and what the target writes.

All of it lies in a training's folder. A run that was killed goes on with what is missing.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from vllm_propd.resume import LOCK, changes, write_whole
from vllm_propd.training.data.batches import check_enough, prepare, save_written
from vllm_propd.training.data.documents import DataError, special_before
from vllm_propd.training.data.writing import (
    TOKENS_PER_ANSWER,
    Ids,
    answers,
    own_questions,
)
from vllm_propd.training.measure import check_measurable
from vllm_propd.training.model.target import check_output_layer
from vllm_propd.training.model.trainee import check_early_layers, check_early_rank
from vllm_propd.training.settings import TrainSettings

if TYPE_CHECKING:
    from vllm_propd.engine.target_text import TargetWriter

INPUTS, QUESTIONS, CONTINUATIONS = "inputs.json", "questions.json", "continuations.json"
TRAINED_ON, MEASURED, SPOKEN = "distilled", "measured", ("prompts", "texts")
MEASURED_PROMPTS, NEW_TOKENS = 64, 128


@dataclass(frozen=True)
class Inputs:
    """What to train on.

    Attributes:
        model: Hugging Face folder or name of the target.
        data: files or folders: text, JSON rows, Parquet; none, with ``self_distill``: the
            target asks itself.
        held_out: files or folders to measure with; none: a share of ``data``.
        most_tokens: the most tokens of ``data``; what is beyond is not read.
        self_distill: train on what the target writes itself, greedily, on prompts from
            ``data``.
        distill_tokens: about how many tokens the target writes for that.
        own_share: the share of questions that the target asks itself; None: none beside
            ``data``.
    """

    model: str
    data: list[Path] = field(default_factory=list)
    held_out: list[Path] = field(default_factory=list)
    most_tokens: int = 100_000_000
    self_distill: bool = False
    distill_tokens: int = 1_000_000
    own_share: float | None = None

    def share_asked(self) -> float:
        """Returns the share of questions that the target asks itself, 0 to 1."""
        if self.own_share is None or not self.data:
            return 0.0 if self.data else 1.0
        return self.own_share

    @property
    def more(self) -> str:
        """The option that gives more to train on."""
        return "--data" if self.data else "--distill-tokens"

    @property
    def more_held_out(self) -> str:
        """The option that gives more to measure with."""
        return "--held-out" if self.held_out else self.more

    def dump(self, settings: TrainSettings) -> str:
        """Returns what decides the text, as JSON, to be compared with a resumed run's."""
        decide = {"length": settings.length, "seed": settings.seed}
        return json.dumps(vars(self) | decide, default=str, indent=1)


def training_data(inputs: Inputs) -> str:
    """Returns the name of the data in a work folder that heads are trained on."""
    return TRAINED_ON if inputs.self_distill else "train"


def write_inputs(inputs: Inputs, settings: TrainSettings, work: Path) -> None:
    """Reads the data, and lets the target write what it is trained and measured on.

    Args:
        inputs: target and data.
        settings: how long sequences are, and the seed.
        work: the training's folder; where it has all of that already, nothing is done.

    Raises:
        ValueError: data or model are impossible (DataError for the data), or the folder is
            of a training with other inputs.
        Exception: whatever model or engine fail with. Where this call began the training
            and the target has written nothing yet, the folder is gone then.
    """
    _check_same(work, inputs, settings)
    if (work / CONTINUATIONS).exists():
        return
    begins = not (work / INPUTS).exists()
    if begins:
        if work.exists() and any(file.name != LOCK for file in work.iterdir()):
            raise ValueError(
                f"{work} has files that are no training's: move them away, or give another "
                "--out"
            )
        work.mkdir(parents=True, exist_ok=True)
        write_whole(work / INPUTS, inputs.dump(settings))
    try:
        _write(inputs, settings, work)
    except Exception as error:
        # Of impossible inputs there is nothing to go on with, whatever the target wrote.
        if begins and (isinstance(error, ValueError) or not _has_written(work, inputs)):
            shutil.rmtree(work, ignore_errors=True)  # the error is what matters
        raise


def _has_written(work: Path, inputs: Inputs) -> bool:
    """Whether the target has written any of a training's questions and answers."""
    asks = inputs.self_distill and inputs.share_asked() > 0
    if asks and (work / QUESTIONS).exists():
        return True
    files = [work / f"{name}.jsonl" for name in (MEASURED, TRAINED_ON)]
    return any(file.exists() and file.stat().st_size for file in files)


def _write(inputs: Inputs, settings: TrainSettings, work: Path) -> None:
    from vllm_propd.engine.target_text import TargetWriter, check_trainable

    check_trainable(inputs.model, settings.early_layers)
    config = AutoConfig.from_pretrained(inputs.model).get_text_config()
    check_early_layers(settings.early_layers, config.num_hidden_layers)
    check_early_rank(settings.early_rank, config)
    room = max(settings.length, settings.longest_prompt + NEW_TOKENS)
    _check_positions(config, settings.length, room)
    if not inputs.data and not inputs.self_distill:
        raise DataError(
            "no --data: give files to train on, or --self-distill: the model asks itself"
        )
    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    length, questions = settings.length, work / QUESTIONS
    if known := questions.exists():
        asked, held_out = json.loads(questions.read_text())
    else:
        asked, held_out = _read(inputs, settings, work, tokenizer, config.vocab_size)
    check_output_layer(inputs.model)
    with TargetWriter(inputs.model, room, settings.seed) as it:
        if not known:
            if inputs.self_distill and inputs.share_asked():
                asked, held_out = _ask(inputs, settings, it, tokenizer, asked, held_out)
            write_whole(questions, json.dumps([asked, held_out]))
        file = work / f"{MEASURED}.jsonl"
        spoken = answers(it, held_out, file, "held-out text", NEW_TOKENS)
        # Now, and not at the end of hours of writing and training.
        check_measurable(spoken[1], settings.num_heads)
        what = "that the target wrote to measure with"
        measured = save_written(work, MEASURED, *spoken, length)
        check_enough(measured, length, what, inputs.more_held_out)
        if inputs.self_distill:
            it.longest = length  # what is learnt fits in a window
            file, most = work / f"{TRAINED_ON}.jsonl", inputs.distill_tokens
            written = answers(it, asked, file, "training text", None, most)
            data = save_written(work, TRAINED_ON, *written, length)
            check_enough(data, length, "that the target wrote", inputs.more)
    write_whole(work / CONTINUATIONS, json.dumps(dict(zip(SPOKEN, spoken, strict=True))))


def _check_positions(config: PretrainedConfig, length: int, room: int) -> None:
    """Refuses sequences for which the target has no positions.

    Raises:
        ValueError: it has fewer than ``room``; the message says how long they may be.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and room > positions:
        most = min(positions, (positions - NEW_TOKENS) * 4 // 3)
        raise ValueError(
            f"--length {length}: at most {most}, as the model has {positions} positions, "
            f"and is measured on {NEW_TOKENS} tokens after prompts of three quarters of it"
        )


def write_held_out(
    model: str,
    held_out: list[Path],
    settings: TrainSettings,
    work: Path,
    temperature: float = 0.0,
) -> tuple[Ids, Ids]:
    """Lets the target write what heads are measured on, and nothing else.

    Args:
        model: Hugging Face folder or name of the target.
        held_out: files or folders of prompts or text; none: the target asks itself.
        settings: how long sequences are, and the seed.
        work: a folder for what is read and written.
        temperature: of the target's answers; 0: greedy.

    Returns:
        Token ids of prompts and of their continuations.

    Raises:
        DataError: the files hold too little, or the target asks nothing.
    """
    from vllm_propd.engine.target_text import TargetWriter

    config = AutoConfig.from_pretrained(model).get_text_config()
    room = settings.longest_prompt + NEW_TOKENS
    _check_positions(config, settings.length, room)
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = Inputs(model, held_out=held_out, self_distill=True)
    _, prompts = _read(inputs, settings, work, tokenizer, config.vocab_size)
    check_output_layer(model)
    with TargetWriter(model, room, settings.seed) as writer:
        prompts = prompts or own_questions(
            writer,
            tokenizer,
            MEASURED_PROMPTS,
            settings.longest_prompt,
            "no --held-out",
            "give --held-out with questions, or with text",
        )
        file = work / f"{MEASURED}.jsonl"
        return answers(
            writer, prompts, file, "held-out text", NEW_TOKENS, temperature=temperature
        )


def _check_same(work: Path, inputs: Inputs, settings: TrainSettings) -> None:
    """Refuses to go on in the folder of a training with other inputs."""
    if not (file := work / INPUTS).exists():
        return
    then, now = json.loads(file.read_text()), json.loads(inputs.dump(settings))
    if what := changes(then, now):
        raise ValueError(
            f"{work}: the training began with other inputs ({what}); give those, or remove "
            "it to train anew"
        )


def _read(
    inputs: Inputs,
    settings: TrainSettings,
    work: Path,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
) -> tuple[Ids, Ids]:
    """Reads the data; returns questions in it, and prompts to measure with."""
    if not inputs.data and not inputs.held_out:
        return [], []
    length, longest = settings.length, settings.longest_prompt
    train, held_out = prepare(
        inputs.data or inputs.held_out,
        inputs.held_out,
        tokenizer,
        vocabulary,
        work,
        inputs.most_tokens,
        prompts_do=inputs.self_distill,
        option="--data" if inputs.data else "--held-out",
    )
    if not inputs.self_distill:
        check_enough(train, length, "to train on")
    begin = special_before(tokenizer)
    prompts = held_out.prompts(
        MEASURED_PROMPTS, longest, settings.seed, inputs.more_held_out, begin
    )
    if not inputs.self_distill or not inputs.data:
        return [], prompts
    # About as many windows as it takes: their mean length is half of the longest.
    count = len(train.chats) or inputs.distill_tokens // (length - longest // 2)
    measured = {tuple(prompt) for prompt in prompts}
    asked = train.prompts(max(1, count), longest, settings.seed, begin=begin)
    return [prompt for prompt in asked if tuple(prompt) not in measured], prompts


def _ask(
    inputs: Inputs,
    settings: TrainSettings,
    writer: TargetWriter,
    tokenizer: PreTrainedTokenizerBase,
    asked: Ids,
    held_out: Ids,
) -> tuple[Ids, Ids]:
    """Lets the target ask, too; returns all questions, and prompts to measure with."""
    share = inputs.share_asked()
    count = MEASURED_PROMPTS + inputs.distill_tokens // TOKENS_PER_ANSWER
    option, remedy = f"--own-share {share:g}", "leave it out"
    if not inputs.data:
        option, remedy = "--self-distill without --data", "give --data with questions"
    count = max(1, int(share * count))
    longest = settings.longest_prompt
    own = own_questions(writer, tokenizer, count, longest, option, remedy)
    if not held_out:
        held_out, own = split(own, MEASURED_PROMPTS)
    if share < 1:
        asked = own + asked[: int(len(own) * (1 - share) / share)]
        order = np.random.default_rng(settings.seed).permutation(len(asked))
        return [asked[i] for i in order], held_out
    return own, held_out


def split(rows: Ids, most: int) -> tuple[Ids, Ids]:
    """Splits rows into at most ``most``, and at most half of them, and the rest."""
    cut = min(most, len(rows) // 2)
    return rows[:cut], rows[cut:]
