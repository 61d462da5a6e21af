"""Which models are served, by what names, and which group gets the next sequence."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engines.wire import PoolingMethod, Ready, Stats
from gateway.answer.answer import AUTO, AnswerFormat, answer_format
from gateway.prompt.model_files import file_in
from gateway.prompt.renderer import Renderer
from gateway.prompt.template import load_chat_template
from gateway.prompt.tokenizer import Tokenizer
from gateway.prompt.tokenizer_info import load_tokenizer_info
from gateway.workers import progress
from gateway.workers.protocol import GroupState, QueueFull, WorkerGroup, WorkerUnavailable

QUEUE_RETRY_SECONDS = 1
LOADING_RETRY_SECONDS = 5
RECOVERY_WAIT_SECONDS = 60.0


class ModelNotFound(ValueError):  # noqa: N818
    def __init__(self, model: str) -> None:
        super().__init__(f"The model '{model[:200]}' does not exist or you do not have access to it.")


class ShuttingDown(WorkerUnavailable):
    """The server ends what runs and takes nothing new."""


class ModelFailed(Exception):  # noqa: N818
    """Every group of the model has failed for good: asking again does not help."""


class ModelChanged(Exception):  # noqa: N818
    """The groups that are ready serve other weights, or in another way, than those before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatus:
    """One group as /readyz and /health show it: `phase` and `percent` of the whole start while it is
    starting, else None. `failure` is for those who hold a key."""

    name: str
    state: str
    phase: str | None
    percent: int | None
    restarts: int
    failure: str | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServedModel:
    """A model under its names, with everything the gateway needs of it.

    `groups` are its replicas. `max_queued`: sequences that may wait per group, beyond those that run.
    `recovery_wait`: seconds that a sequence waits for a group to go on in when its own has died. `pooling`:
    how its embeddings are made, if it serves them.
    """

    name: str
    groups: Sequence[WorkerGroup]
    tokenizer: Tokenizer
    template: Renderer | None
    created: int  # seconds since the epoch
    aliases: tuple[str, ...] = ()
    owned_by: str = "sluice"
    max_queued: int = 1_024
    recovery_wait: float = RECOVERY_WAIT_SECONDS
    answer: AnswerFormat
    tokenizer_info: Mapping[str, object] = field(default_factory=dict)
    pooling: PoolingMethod | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def is_ready(self) -> bool:
        return any(group.state is GroupState.READY for group in self.groups)

    @property
    def has_failed(self) -> bool:
        """For good: none of its groups is started again."""
        return bool(self.groups) and all(group.state is GroupState.FAILED for group in self.groups)

    @property
    def is_draining(self) -> bool:
        return any(group.state in (GroupState.DRAINING, GroupState.STOPPED) for group in self.groups)

    def statuses(self) -> list[GroupStatus]:
        return [_status(group) for group in self.groups]

    def stats(self) -> list[tuple[str, Stats | None, int, Ready | None]]:
        """(replica, heartbeat, restarts, info) of every group."""
        return [
            (str(replica), group.stats, group.num_restarts, group.info)
            for replica, group in enumerate(self.groups)
        ]


def load_served_model(
    model_dir: Path,
    *,
    name: str,
    groups: Sequence[WorkerGroup],
    created: int,
    aliases: tuple[str, ...] = (),
    owned_by: str = "sluice",
    max_queued: int = 1_024,
    recovery_wait: float = RECOVERY_WAIT_SECONDS,
    chat_template: Path | None = None,
    tool_format: str = AUTO,
    reasoning_format: str = AUTO,
    pooling: PoolingMethod | None = None,
) -> ServedModel:
    """Reads the model directory's tokenizer.json and chat template (`chat_template` replaces it).

    How the model calls tools and thinks is seen from the template, or said by the two formats.

    Raises FileNotFoundError, BadModelFile, BadTemplate.
    """
    path = file_in(model_dir, "tokenizer.json")
    if path is None:
        raise FileNotFoundError(
            f"{model_dir / 'tokenizer.json'}: not found; the gateway needs the fast tokenizer"
            " (save it with save_pretrained; `sluice convert` makes it of the tokenizer.model beside the"
            " weights, or of what --tokenizer names)"
        )
    template = load_chat_template(model_dir, chat_template)
    tokenizer = Tokenizer(path)
    return ServedModel(
        name=name,
        groups=groups,
        tokenizer=tokenizer,
        answer=answer_format(
            tokenizer,
            template.source if template else "",
            tool_format=tool_format,
            reasoning_format=reasoning_format,
        ),
        template=None if template is None else Renderer(template),
        created=created,
        aliases=aliases,
        owned_by=owned_by,
        max_queued=max_queued,
        recovery_wait=recovery_wait,
        tokenizer_info=load_tokenizer_info(model_dir, template),
        pooling=pooling,
    )


def _status(group: WorkerGroup) -> GroupStatus:
    phase = progress.phase(group)
    return GroupStatus(
        name=group.name,
        state=group.state.value,
        phase=phase,
        percent=None if phase is None else progress.overall_percent(group),
        restarts=group.num_restarts,
        failure=group.failure,
    )


class Router:
    """The served models. Raises ValueError at names given twice."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self.models = tuple(models)
        self._by_name: dict[str, ServedModel] = {}
        for model in models:
            for name in model.names:
                if name in self._by_name:
                    raise ValueError(f"two models are to be served as {name!r}: give one another name")
                self._by_name[name] = model

    def find(self, name: str) -> ServedModel:
        """Raises ModelNotFound."""
        model = self._by_name.get(name)
        if model is None:
            raise ModelNotFound(name)
        return model


def ready_groups(model: ServedModel) -> list[WorkerGroup]:
    """Never empty. Raises WorkerUnavailable (ShuttingDown while the server ends), ModelFailed."""
    groups = [group for group in model.groups if group.state is GroupState.READY]
    if groups:
        return groups
    if model.is_draining:
        raise ShuttingDown("The server is shutting down and takes no new requests.", LOADING_RETRY_SECONDS)
    if model.has_failed:
        raise ModelFailed(f"The model '{model.name}' cannot be served: its workers have failed.")
    raise WorkerUnavailable(f"The model '{model.name}' is not ready.", LOADING_RETRY_SECONDS)


def pick(
    model: ServedModel,
    planned: Mapping[str, int],
    num_sequences: int,
    fingerprint: str | None = None,
    cache_key: str = "",
) -> WorkerGroup:
    """The ready group with the least outstanding work, with room for the sequences; with a `cache_key` the
    one that has this key's prefixes, unless that has much more to do than another.

    `planned`: sequences about to be sent, by group name. `fingerprint`: of a group that has begun them; only
    such groups go on with them. Raises WorkerUnavailable, ModelFailed, QueueFull, ModelChanged.
    """
    groups = ready_groups(model)
    if fingerprint is not None:
        groups = [group for group in groups if group.info and group.info.fingerprint == fingerprint]
        if not groups:
            raise ModelChanged(f"The model '{model.name}' is not the one that was served before.")
    group = min(groups, key=lambda group: _load(group, planned))
    if cache_key:
        warm = max(groups, key=lambda group: _affinity(cache_key, group))
        if _load(warm, planned) <= _load(group, planned) + _most_ahead(warm):
            group = warm
    room = model.max_queued + (group.info.max_num_seqs if group.info else 0)
    if _load(group, planned) + num_sequences > room:
        raise QueueFull(f"The model '{model.name}' has too many requests waiting.", QUEUE_RETRY_SECONDS)
    return group


def _affinity(cache_key: str, group: WorkerGroup) -> bytes:
    """Each key has its own order of the groups, and keeps it when others come or go."""
    return hashlib.blake2b(f"{group.name} {cache_key}".encode(errors="replace"), digest_size=8).digest()


def _most_ahead(group: WorkerGroup) -> int:
    """Sequences that a warm cache is worth waiting behind: an eighth of what runs at once."""
    return max(1, group.info.max_num_seqs // 8) if group.info else 0


def _load(group: WorkerGroup, planned: Mapping[str, int]) -> int:
    return group.num_outstanding + planned.get(group.name, 0)
