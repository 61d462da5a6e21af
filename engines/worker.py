"""One rank of a worker group: `python -m engines.worker --run-dir DIR`, started by torchrun or alone.

The composition root of the right-hand side. It reads launch.json, joins the mesh, loads its share of the
model, agrees on the size of the K/V, warms up; then rank 0 leads and the others follow.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import msgspec
import torch

from engines import modeldir, registry
from engines.base import BadCheckpoint, Engine, KVSpec, ReportProgress, UnsupportedModel
from engines.config import ConfigError, ModelConfig
from engines.garbage import settle
from engines.runtime import kv_cache, warmup
from engines.runtime.channel import LoadReport, Pipe, PlanSender, ReadAhead, connect
from engines.runtime.grammar import Grammars
from engines.runtime.inbox import Inbox
from engines.runtime.leader import Leader
from engines.runtime.mesh import Mesh, join
from engines.runtime.pace import ByStepTime, InProportion, Pace
from engines.runtime.plan import StepPlan
from engines.runtime.prompt_lookup import PromptLookup
from engines.runtime.runner import NO_MEMORY, ModelRunner
from engines.runtime.scheduler import ContinuousScheduler, Scheduler
from engines.runtime.shared_memory import SharedGroup, is_supported, path_for
from engines.runtime.shared_pipe import SharedPipe
from engines.runtime.stage_clock import StageClocks
from engines.runtime.static import StaticScheduler
from engines.wire import Failed, Progress, Ready

log = logging.getLogger("sluice.worker")

PERMANENT = (UnsupportedModel, BadCheckpoint, ConfigError, modeldir.BadModelDir, kv_cache.TooLittleMemory)
"""Errors that a restart would meet again."""

CLOCKS = "stage-clocks"
_MEASURE = b"measure"
_MIN_PROMPT_TOKENS = {"cpu": 32, "cuda": 256}  # as many as cost about what a decoding micro-batch does
_PR_SET_PDEATHSIG = 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="engines.worker")
    parser.add_argument("--run-dir", type=Path, required=True)
    run_dir: Path = parser.parse_args().run_dir
    _die_with_parent()
    config = ModelConfig.model_validate_json((run_dir / "launch.json").read_text())
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(levelname)s %(message)s")
    torch.set_num_threads(config.omp_threads)
    if rank == 0:
        _lead(config, run_dir)
    else:
        _follow(config, run_dir, rank)


def _die_with_parent() -> None:
    """SIGKILL for this process when torchrun dies, however it dies, even if it just has."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        _exit(1)


def _lead(config: ModelConfig, run_dir: Path) -> None:
    inbox = Inbox(run_dir / "gateway.sock")
    try:
        leader = _prepare_leader(config, run_dir, inbox)
        leader.run()
    except Exception as error:
        log.exception("the group ends")
        inbox.send(Failed(_one_line(error), isinstance(error, PERMANENT)))
        inbox.close()
        _exit(1)
    _exit(0)


def _prepare_leader(config: ModelConfig, run_dir: Path, inbox: Inbox) -> Leader:
    started = time.monotonic()
    inbox.send(Progress("connect", 0.0))
    sender = PlanSender(run_dir / "plans.sock", config.world_size - 1) if config.world_size > 1 else None
    mesh = _join_mesh(config, run_dir, rank=0)
    config = _with_fallback(config)
    engine = _load(config, mesh, lambda fraction, phase="load": inbox.send(Progress(phase, fraction)))
    if sender is not None:
        sender.accept(config.startup_timeout)
    reports = _reports(sender)
    if _measures_a_step(engine, mesh):
        inbox.send(Progress("compile", 0.0))  # kernels, at the first start on a machine
        if sender is not None:
            sender.send(_MEASURE)
        _run_largest_step(config, engine, mesh)
        reports = _reports(sender)
    inbox.send(Progress("allocate", 0.0))
    num_blocks = min([_num_blocks(config, engine), *(report.num_blocks for report in reports)])
    if sender is not None:
        sender.send(num_blocks.to_bytes(8, "little"))
    runner = _runner(config, engine, mesh, num_blocks, sender)
    if engine.kv_spec is None:
        warmup.run_static(runner, config.batch_size, _max_model_len(config, engine))
    else:
        warmup.run(runner, num_blocks, config, lambda fraction: inbox.send(Progress("warmup", fraction)))
    ready = _ready(config, engine, runner, mesh, num_blocks, time.monotonic() - started, reports)
    scheduler = _scheduler(config, ready, engine)
    settle()
    inbox.send(ready)
    log.info("ready: %s", ready)
    if mesh.pp_size == 1 or mesh.device.type != "cpu":
        return Leader(scheduler, runner, inbox, _plans_in_flight(engine))
    stages = StageClocks(run_dir / CLOCKS, config.world_size).of_stages(mesh.tp_size)
    return Leader(scheduler, runner, inbox, engine.plans_in_flight, stages)


def _reports(sender: PlanSender | None) -> list[LoadReport]:
    reports = sender.reports() if sender is not None else []
    for report in reports:
        if report.error is not None:
            raise (BadCheckpoint if report.is_permanent else RuntimeError)(report.error)
    return reports


def _follow(config: ModelConfig, run_dir: Path, rank: int) -> None:
    pipe = connect(run_dir / "plans.sock", config.startup_timeout)
    try:
        mesh = _join_mesh(config, run_dir, rank)
        config = _with_fallback(config)
        engine = _load(config, mesh, lambda *_: None)
        if _measures_a_step(engine, mesh):
            _report(pipe, LoadReport(rank=rank, pid=os.getpid()))
            pipe.receive()
            _run_largest_step_or_leave(config, engine, mesh)
        num_blocks = _num_blocks(config, engine)
    except Exception as error:
        log.exception("loading failed")
        permanent = isinstance(error, PERMANENT)
        _report(pipe, LoadReport(rank=rank, pid=os.getpid(), error=_one_line(error), is_permanent=permanent))
        _until_gone(pipe)
        _exit(1)
    _report(pipe, LoadReport(rank=rank, pid=os.getpid(), num_blocks=num_blocks))
    try:
        num_blocks = int.from_bytes(pipe.receive(), "little")
        runner = _runner(config, engine, mesh, num_blocks)
        plans = ReadAhead(pipe) if mesh.pp_size > 1 else pipe
        settle()
        while True:
            runner.execute(StepPlan.unpack(plans.receive()))
    except EOFError:
        log.info("the leader is gone")
        _exit(0)


def _report(pipe: Pipe, report: LoadReport) -> None:
    pipe.send(msgspec.msgpack.encode(report))


def _until_gone(pipe: Pipe) -> None:
    """Stay until the leader has read why: this rank's exit would end the group before that."""
    try:
        pipe.receive()
    except (EOFError, OSError):
        return


def _join_mesh(config: ModelConfig, run_dir: Path, rank: int) -> Mesh:
    device, tp_group = _device(config), None
    if config.world_size > 1:
        backend = (
            "nccl" if device.type == "cuda" and torch.cuda.device_count() >= config.world_size else "gloo"
        )
        file = run_dir / "group-init"
        tp_group = join(rank, config.tp_size, config.pp_size, backend, file, _patience(config))
    clock = StageClocks(run_dir / CLOCKS, config.world_size).of(rank)
    mesh = Mesh(rank, config.tp_size, config.pp_size, device, tp_group, clock)
    return _sharing_memory(mesh, run_dir, _patience(config)) if is_supported(device) else mesh


def _sharing_memory(mesh: Mesh, run_dir: Path, patience: float) -> Mesh:
    """With memory shared among the ranks of its stage, and with its neighbours in the stages around it."""

    def pipe(sender: int) -> SharedPipe:
        return SharedPipe(path_for(run_dir, f"from{sender}"), patience)

    group = None
    if mesh.tp_size > 1:
        path = path_for(run_dir, f"stage{mesh.stage}")
        group = SharedGroup(path, mesh.tp_rank, mesh.tp_size, patience)
    return replace(
        mesh,
        shared=group,
        from_previous=None if mesh.is_first_stage else pipe(mesh.previous_rank),
        to_next=None if mesh.is_last_stage else pipe(mesh.rank),
    )


def _patience(config: ModelConfig) -> float:
    """Seconds that a rank waits for another in a collective, whether the group starts or serves."""
    return max(config.startup_timeout, config.response_timeout)


def _device(config: ModelConfig) -> torch.device:
    if config.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.device_count():
        raise UnsupportedModel(
            "deviceType is gpu, but the workers see no CUDA device: check the driver (nvidia-smi) and "
            "deviceIds, or write deviceType: cpu"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _with_fallback(config: ModelConfig) -> ModelConfig:
    """An engine may name another for what it cannot serve (`instead`), where the user allowed that."""
    instead = getattr(registry.load(config.engine), "instead", None)
    other = instead(config) if instead is not None else None
    return config if other is None else config.model_copy(update={"engine": other})


def _load(config: ModelConfig, mesh: Mesh, report: ReportProgress) -> Engine:
    engine: Engine = registry.load(config.engine)(config, mesh, report)
    if config.max_model_len is not None and config.max_model_len > engine.max_model_len:
        raise UnsupportedModel(
            f"maxModelLen is {config.max_model_len}, but the model was made for {engine.max_model_len} "
            f"positions (max_position_embeddings); set maxModelLen to {engine.max_model_len} or less"
        )
    return engine


def _measures_a_step(engine: Engine, mesh: Mesh) -> bool:
    """Whether a step's memory is measured before K/V takes what is left."""
    return mesh.device.type == "cuda" and engine.kv_spec is not None


def _run_largest_step(config: ModelConfig, engine: Engine, mesh: Mesh) -> None:
    """On every rank at once: as many tokens and rows of logits as a step may have."""
    assert engine.kv_spec is not None
    caches = kv_cache.allocate(engine.kv_spec, 1, config.kv_block_size)
    runner = ModelRunner(engine, mesh, caches, config.max_num_seqs)
    num_tokens, most = config.max_num_batched_tokens, _max_model_len(config, engine)
    num_seqs = min(config.max_num_seqs, num_tokens)
    plan = warmup.largest_plan(num_seqs, min(num_tokens, num_seqs * most), config.kv_block_size)
    result = runner.execute(plan)
    errors = [] if result is None else [error.message for error in result.errors.values()]
    refused = [message for message in errors if message.startswith(NO_MEMORY)]
    if refused:
        raise kv_cache.TooLittleMemory(
            f"a step of {plan.num_tokens} tokens does not fit beside the weights ({refused[0]}): "
            "set maxNumBatchedTokens or maxNumSeqs lower"
        )


def _run_largest_step_or_leave(config: ModelConfig, engine: Engine, mesh: Mesh) -> None:
    """On a follower: the leader is in the step's collectives, and would read no report."""
    try:
        _run_largest_step(config, engine, mesh)
    except Exception:
        log.exception("the largest step failed")
        _exit(1)


def _plans_in_flight(engine: Engine) -> int:
    """One more than the engine asks for where plans run ahead: the device works on it meanwhile."""
    return engine.plans_in_flight + _runs_ahead(engine)


def _runs_ahead(engine: Engine) -> bool:
    return bool(getattr(engine, "runs_ahead", False))


def _num_blocks(config: ModelConfig, engine: Engine) -> int:
    """K/V blocks for the memory of this rank's devices, and no more than every slot could fill."""
    spec = engine.kv_spec
    if spec is None:
        return config.batch_size  # rows: the engine keeps its K/V itself
    most = config.max_num_seqs * -(-_max_model_len(config, engine) // config.kv_block_size)
    return min(most, *(_num_blocks_on(device, config, spec) for device in set(spec.devices)))


def _num_blocks_on(device: torch.device, config: ModelConfig, spec: KVSpec) -> int:
    """As many as one device holds of the layers that are on it."""
    layers = tuple(each for each in spec.devices if each == device)
    is_cuda = device.type == "cuda"
    budget = kv_cache.cuda_budget_of(device, config.gpu_memory_share) if is_cuda else config.kv_cache_memory
    return kv_cache.num_blocks_for(replace(spec, devices=layers), budget, config.kv_block_size)


def _max_model_len(config: ModelConfig, engine: Engine) -> int:
    return config.max_model_len or engine.max_model_len


def _runner(
    config: ModelConfig, engine: Engine, mesh: Mesh, num_blocks: int, sender: PlanSender | None = None
) -> ModelRunner:
    if engine.kv_spec is None:
        return ModelRunner(engine, mesh, (), config.batch_size, sender)
    is_recorded = bool(getattr(engine, "is_recordable", False))
    caches = kv_cache.allocate(engine.kv_spec, num_blocks + is_recorded, config.kv_block_size)
    pages = kv_cache.pages_ahead(caches)
    runs_ahead = _runs_ahead(engine)
    runner = ModelRunner(engine, mesh, caches, config.max_num_seqs, sender, pages, runs_ahead=runs_ahead)
    if is_recorded:
        _record(runner, mesh, num_blocks, _max_model_len(config, engine))
    return runner


def _record(runner: ModelRunner, mesh: Mesh, num_blocks: int, max_context: int) -> None:
    """Have it replay steps that decode; without, they are as exact, and slower."""
    stream = torch.cuda.current_stream()
    try:
        runner.record_graphs(num_blocks, max_context)
    except Exception as error:  # of torch, Triton or CUDA: what they raise has no common type
        torch.cuda.set_stream(stream)  # which a recording that failed has left
        if mesh.world_size > 1:  # the others replay, and wait in its collectives
            raise
        log.warning("decoding steps are not recorded as CUDA graphs: %s", _one_line(error))


def _ready(
    config: ModelConfig,
    engine: Engine,
    runner: ModelRunner,
    mesh: Mesh,
    num_blocks: int,
    seconds: float,
    reports: list[LoadReport],
) -> Ready:
    spec = engine.kv_spec
    served = getattr(engine, "dtype", config.dtype) if spec is None else spec.dtype
    dtype = str(served).removeprefix("torch.")
    block_size = config.kv_block_size if spec is not None else _max_model_len(config, engine)
    layout = f"{config.engine}-tp{mesh.tp_size}-pp{mesh.pp_size}-{dtype}"
    return Ready(
        engine=config.engine,
        dtype=dtype,
        device=mesh.device.type,
        tp_size=mesh.tp_size,
        pp_size=mesh.pp_size,
        max_model_len=min(_max_model_len(config, engine), num_blocks * block_size),
        max_num_seqs=config.max_num_seqs if spec is not None else config.batch_size,
        vocab_size=engine.vocab_size,
        hidden_size=runner.hidden_size,
        num_blocks=num_blocks,
        block_size=block_size,
        eos_token_ids=sorted(modeldir.eos_token_ids(Path(config.model_path))),
        fingerprint=f"{layout}-{modeldir.fingerprint(config.model_path)}",
        load_seconds=seconds,
        pids=[os.getpid(), *(report.pid for report in reports)],
    )


def _scheduler(config: ModelConfig, ready: Ready, engine: Engine) -> Scheduler:
    grammars = Grammars(Path(config.model_path) / "tokenizer.json", ready.vocab_size, ready.eos_token_ids)
    if engine.kv_spec is None:
        return StaticScheduler(
            batch_size=config.batch_size,
            max_batch_delay=config.max_batch_delay,
            max_model_len=ready.max_model_len,
            eos_token_ids=ready.eos_token_ids,
            now=time.monotonic,
            min_prompt_len=getattr(engine, "min_prompt_len", 1),
            vocab_size=ready.vocab_size,
            grammars=grammars,
        )
    return ContinuousScheduler(
        num_blocks=ready.num_blocks,
        block_size=ready.block_size,
        max_num_seqs=ready.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=ready.max_model_len,
        eos_token_ids=ready.eos_token_ids,
        prefix_cache=config.prefix_cache,
        max_plans_in_flight=_plans_in_flight(engine),
        run_ahead=_runs_ahead(engine),
        pace=_pace(config, ready, engine),
        drafter=PromptLookup() if config.prompt_lookup else None,
        max_draft_tokens=config.prompt_lookup,
        vocab_size=ready.vocab_size,
        grammars=grammars,
    )


def _pace(config: ModelConfig, ready: Ready, engine: Engine) -> Pace | None:
    if engine.plans_in_flight > 1:
        return InProportion(_MIN_PROMPT_TOKENS[ready.device], engine.plans_in_flight)
    return ByStepTime(config.max_prompt_slowdown) if config.max_prompt_slowdown else None


def _one_line(error: BaseException) -> str:
    """The error as the supervisor shows it."""
    text = " ".join(str(error).split())
    known = isinstance(error, (*PERMANENT, OSError))
    return text if known and text else f"{type(error).__name__}: {text}"


def _exit(code: int) -> NoReturn:
    """Leave at once: interpreter shutdown would wait for collectives that nobody answers any more."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
