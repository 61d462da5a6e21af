"""What the keys of a model-config.yaml do, in one sentence each, and what holds without them.

Types, bounds and choices are the schema's, as is the reason why a key is ignored or refused: those keys are
not in here. `python -m gateway.reference` makes docs/configuration.md of both.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Help:
    """Of one key that acts. `default`: what may as well be written; `otherwise`: in words, what holds without
    the key where that is no one value."""

    text: str
    default: bool | int | float | str | None = None
    otherwise: str = ""


def _same_as(key: str) -> Help:
    return Help(f"The same as `{key}`, which comes first where both are given.")


_MODEL = {
    "modelName": Help(
        "Names the groups (`NAME/0`, `NAME/1`, ...) and their logs, and the model itself unless "
        "`servedModelNames` does.",
        otherwise="the name of the YAML file's folder",
    ),
    "servedModelNames": Help(
        "The names that requests may use; answers tell the first.", otherwise="`modelName`"
    ),
    "modelPath": Help(
        "The model's directory, relative to the YAML file: config.json, tokenizer, safetensors.",
        otherwise="the YAML file's own directory",
    ),
    "handler.model_path": _same_as("modelPath"),
    "dtype": Help(
        "The type of weights and K/V.",
        "auto",
        otherwise="as the checkpoint says, or the DeepSpeed file",
    ),
    "maxModelLen": Help(
        "Tokens of a prompt and its answer together.",
        otherwise="what the model was made for; less where the K/V memory holds less",
    ),
    "handler.max_seq_len": _same_as("maxModelLen"),
    "deterministic": Help(
        "No answer depends on what else is served at the time, to the bit, in bf16 too. For Llamas with "
        "engine native or pipeline on x86 CPUs; long prompts take longer.",
        False,
    ),
    "packWeights": Help(
        "bfloat16 weights are kept in 12 bits each while they are served, and nothing is lost: steps of "
        "few tokens are up to a third faster. They are no longer the file's pages, which replicas share. For "
        "Llamas with engine native or pipeline on CPUs with AVX512-BF16 and -VBMI.",
        True,
    ),
    "int8Activations": Help(
        "In steps of 16 tokens and more int8 weights meet numbers of 8 bits, too, each 256 of them with a "
        "scale: up to twice as fast, logits half again as far from exact. For engines native and pipeline in "
        "bfloat16, on CPUs with AVX512-VNNI and AVX512-BF16.",
        True,
    ),
    "reshard": Help(
        "Files that `sluice convert` made for another number of ranks are divided anew at each start.", False
    ),
}
_API = {
    "chatTemplate": Help(
        "A file with a Jinja chat template, relative to the YAML file.", otherwise="the model's own"
    ),
    "handler.chat_template": _same_as("chatTemplate"),
    "toolFormat": Help("How the model writes calls of tools; auto: as its chat template shows.", "auto"),
    "reasoningFormat": Help("The tags of the model's thoughts; auto: those of its chat template.", "auto"),
    "pooling": Help(
        "`/v1/embeddings` is served, too: the mean of all tokens, or the last one's.",
        otherwise="no embeddings",
    ),
}
_SPLIT = {
    "parallelType": Help(
        "How a group splits the model: `tp` ranks share each layer, `pp` stages of consecutive layers, "
        "`pptp` both, `custom` one process that places layers on its devices.",
        otherwise="one rank; the sizes below are refused without it",
    ),
    "parallelLevel": Help(
        "Ranks of a group; with `custom` the devices of its one process.",
        otherwise="the product of the sizes below; with `custom` all GPUs (or `deviceIds`), divided by "
        "`minWorkers`",
    ),
    "torchrun.nproc-per-node": Help("The same as `parallelLevel`; if both are given they must be equal."),
    "tensorParallel": Help(
        "Ranks that share each layer, for `tp` and `pptp`.",
        otherwise="`parallelLevel`, divided by `pipelineParallel`",
    ),
    "pipelineParallel": Help(
        "Stages, for `pp` and `pptp`.", otherwise="`parallelLevel`, divided by `tensorParallel`"
    ),
    "minWorkers": Help("Groups of the model, each with all of its weights: replicas.", 1),
    "maxWorkers": Help(
        "Nothing is scaled: more than `minWorkers` has no effect (a warning), fewer is an error.",
        otherwise="`minWorkers`",
    ),
    "engine": Help(
        "Which engine serves: native, pipeline, accelerate, deepspeed_tp, deepspeed_inject or a plug-in's.",
        otherwise="by `parallelType` and `deepspeed`",
    ),
}
_DEVICES = {
    "deviceType": Help("What the ranks compute on; `cuda` is `gpu`.", otherwise="gpu where there are GPUs"),
    "deviceIds": Help(
        "GPUs that the groups may hold, as counted within CUDA_VISIBLE_DEVICES.",
        otherwise="the lowest that are free",
    ),
    "shareDevices": Help(
        "Groups that all say so may hold one GPU together, where their `gpuMemoryShare` add to at most 1; "
        "it must be stated then.",
        False,
    ),
    "gpuMemoryShare": Help(
        "Part of each GPU's whole memory that a group may use, weights included; K/V gets what is left.",
        0.9,
    ),
    "kvCacheMemory": Help(
        "K/V memory of each rank on a CPU, at most; it is taken as it is used, 256 MiB ahead.", "1GiB"
    ),
    "torchrun.OMP_NUMBER_THREADS": Help(
        "CPU threads of each rank.", otherwise="the cores, divided by all ranks on CPUs"
    ),
}
_BATCH = {
    "maxNumSeqs": Help("Sequences that a group runs at once.", 256),
    "handler.max_batch_size": _same_as("maxNumSeqs"),
    "maxNumBatchedTokens": Help(
        "Tokens that one step computes at most; longer prompts are read in pieces.",
        otherwise="2048; in a pipeline 256 on CPUs and 512 on GPUs, more where `maxNumSeqs` needs it",
    ),
    "maxPromptSlowdown": Help(
        "How many times as long a step of running streams may take because it reads a long prompt as well, "
        "of more than 256 tokens: it comes in pieces of such a size, by measurement.",
        otherwise="2 on CPUs; no limit on GPUs; a pipeline has its own rule",
    ),
    "promptLookup": Help(
        "Tokens that are guessed at once for each sequence, where its last ones have come before in its "
        "text; one step checks them all. It changes no token in float32, in bf16 no more than requests "
        "beside it do. Answers that repeat their prompt come faster while few run; where many run, the "
        "checks delay them. 0: none.",
        0,
    ),
    "kvBlockSize": Help(
        "Tokens in a block of K/V; on GPUs a multiple of 256, or a slower kernel is used.",
        otherwise="16; 256 on GPUs",
    ),
    "prefixCache": Help("Prompts of one API key that begin alike share that part's K/V.", True),
    "batchSize": Help("Rows of a batch, for deepspeed_inject, which alone batches statically.", 1),
    "maxBatchDelay": Help("Milliseconds that such a batch waits to fill.", 100),
}
_ENGINES = {
    "stageSplit": Help(
        "pipeline: how layers are divided into stages: by the work of a step, in equal numbers, by bytes, or "
        "the number of layers of each stage.",
        "work",
    ),
    "pippy.chunks": Help("pipeline: micro-batches in flight.", otherwise="one for each stage"),
    "deviceMap": Help(
        "accelerate: auto, balanced, balanced_low_0, sequential; one device (cpu, disk, cuda:0 or 0, ...); "
        "or a mapping of module names to devices.",
        "auto",
    ),
    "handler.device_map": _same_as("deviceMap"),
    "maxMemory": Help(
        'accelerate: a mapping of devices (cpu, cuda:0 or 0, ...) to bytes of weights, as `cpu: "8GiB"`.',
        otherwise="GPUs: three quarters of `gpuMemoryShare`; cpu: what is free",
    ),
    "handler.max_memory": _same_as("maxMemory"),
    "deepspeed.config": Help(
        "The DeepSpeed JSON file, relative to the YAML file; the section needs it and makes DeepSpeed the "
        "engine: deepspeed_inject where the file says replace_with_kernel_inject, else deepspeed_tp."
    ),
    "deepspeed.fallback": Help(
        "deepspeed_tp serves what deepspeed_inject cannot.", otherwise="what it cannot serve is refused"
    ),
    "deepspeed.checkpoint": Help(
        "Has no effect (a warning): each rank reads its part of the model's safetensors."
    ),
}
_REQUESTS = {
    "jobQueueSize": Help(
        "Sequences that may wait for each group, beyond those that run; then 429. The group itself holds an "
        "eighth of `maxNumSeqs` of them, at least 2 (deepspeed_inject all); the others wait in the gateway.",
        100,
    ),
    "useJobTicket": Help("Nothing waits: what cannot run at once gets 429; `jobQueueSize` is 0.", False),
    "responseTimeout": Help(
        "Seconds without a token of a sequence that is in a group, until its request gets 504. They begin "
        "when it is sent there, so the wait in the group and the reading of the prompt count, and anew with "
        "each token. A group whose steps stand for as long hangs.",
        120.0,
    ),
}
_RECOVERY = {
    "startupTimeout": Help(
        "Seconds from the start of a group's processes until it is ready, at each start; then it has died. "
        "What the progress shows as `compile` is not counted, up to 30 minutes.",
        120.0,
    ),
    "maxRetryTimeoutInSec": Help(
        "A group that dies is started again, at once, then after 1, 1, 2, 3, 5, 8, ... at most 30 s. If it "
        "dies more than so many seconds after the first of these deaths, it has failed for good. Ready for "
        "a minute, it begins anew. 0: it is not started again. Nor is it, whatever is set, if it says at its "
        "first start that it never can.",
        300,
    ),
    "torchrun.monitor-interval": Help("Seconds between torchrun's looks at its ranks.", 0.1),
}

GROUPS = {
    "Model": _MODEL,
    "API": _API,
    "Split and replicas": _SPLIT,
    "Devices and memory": _DEVICES,
    "Batches": _BATCH,
    "Engines": _ENGINES,
    "Waiting and time": _REQUESTS,
    "Recovery": _RECOVERY,
}
HELP = {key: help for group in GROUPS.values() for key, help in group.items()}
