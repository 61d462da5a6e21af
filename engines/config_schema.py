"""Every key of a model-config.yaml: its type, its bounds, and what becomes of it here.

A key acts, is IGNORED (a warning says why), or is REFUSED when a value would change what users get.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """The types a value may have, in words for messages."""

    INT = "an integer"
    NUMBER = "a number"
    BOOL = "true or false"
    TEXT = "text"
    NAME = "a name of letters, digits and -_./: that starts with a letter or digit"
    BYTES = 'a size: bytes as an integer, or text such as "2GiB"'
    TEXTS = "a list of texts, or one text"
    INTS = "a list of integers"
    COUNTS = "a list of integers of 1 or more"
    ANY = "anything"


@dataclass(frozen=True, slots=True)
class Key:
    """One key. `low` and `high` bound numbers and sizes; `choices` maps what may be written (case
    ignored) to what it means. `ignored` says why a key has no effect here, `refused` why any value
    but the `harmless` ones cannot be served, `remedy` what to do instead."""

    kind: Kind
    low: float | None = None
    high: float | None = None
    above: bool = False  # low itself is excluded
    choices: dict[str, str] | None = None
    ignored: str = ""
    refused: str = ""
    harmless: tuple[object, ...] = ()
    remedy: str = ""

    def allowed(self) -> str:
        """What may be written, in words."""
        if self.choices:
            return ", ".join([*self.choices, *([self.kind.value] if self.kind is Kind.COUNTS else [])])
        if self.kind is Kind.INTS:
            return f"{self.kind.value} of 0 or more, none twice"
        low, high = _plain(self.low), _plain(self.high)
        if low is None:
            return str(self.kind.value)
        start = f"above {low}" if self.above else f"{low}"
        return f"{self.kind.value}, {start} to {high}" if high else f"{self.kind.value}, {start} or more"


def _plain(bound: float | None) -> str | None:
    return None if bound is None else f"{bound:g}" if bound < 1e6 else str(int(bound))


DEVICES = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}
PARALLEL_TYPES = {name: name for name in ("pp", "tp", "pptp", "custom")}
DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}
STAGE_SPLITS = {name: name for name in ("work", "layers", "bytes")}
TOOL_FORMATS = {  # the gateway's gateway/answer/formats.py
    name: name
    for name in (
        *("auto", "none", "hermes", "llama-json", "llama-pythonic"),
        *("mistral", "deepseek-v3", "deepseek-v3.1"),
    )
}
REASONING_FORMATS = {  # gateway/answer/reasoning.py
    name: name
    for name in ("auto", "none", "think", "thinking", "thought", "reasoning", "seed", "mistral", "cohere")
}
POOLINGS = {name: name for name in ("mean", "last")}  # engines.wire.PoolingMethod
MAX_INT = 2**31 - 1
DAY = 86400

_STATEFUL = "requests are stateless here; a sequence's earlier turns come with each request"
_SAMPLING = "requests state it; without, it is 1"

FRONTEND = {
    "minWorkers": Key(Kind.INT, 1, 1024),
    "maxWorkers": Key(Kind.INT, 1, 1024),
    "batchSize": Key(Kind.INT, 1, 4096),
    "maxBatchDelay": Key(Kind.INT, 0, DAY * 1000),
    "responseTimeout": Key(Kind.NUMBER, 0, DAY, above=True),
    "startupTimeout": Key(Kind.NUMBER, 0, DAY, above=True),
    "deviceType": Key(Kind.TEXT, choices=DEVICES),
    "deviceIds": Key(Kind.INTS, 0, 1023),
    "parallelType": Key(Kind.TEXT, choices=PARALLEL_TYPES),
    "parallelLevel": Key(Kind.INT, 1, 1024),
    "maxRetryTimeoutInSec": Key(Kind.INT, 0, MAX_INT),
    "jobQueueSize": Key(Kind.INT, 0, 1_000_000),
    "useJobTicket": Key(Kind.BOOL),
    "clientTimeoutInMills": Key(
        Kind.INT,
        0,
        MAX_INT,
        ignored="--queue-timeout bounds a request's wait, responseTimeout each silence, no key the whole",
    ),
    "asyncCommunication": Key(
        Kind.BOOL, ignored="every group is talked to asynchronously, whatever the parallelType"
    ),
    "continuousBatching": Key(
        Kind.BOOL,
        harmless=(True,),
        ignored="paged engines always batch continuously; limit them with maxNumSeqs",
    ),
    "sequenceBatching": Key(Kind.BOOL, harmless=(False,), refused=_STATEFUL, remedy="remove the key"),
    "sequenceMaxIdleMSec": Key(
        Kind.INT, 0, MAX_INT, harmless=(0,), refused=_STATEFUL, remedy="remove the key"
    ),
    "sequenceTimeoutMSec": Key(
        Kind.INT, 0, MAX_INT, harmless=(0,), refused=_STATEFUL, remedy="remove the key"
    ),
    "maxSequenceJobQueueSize": Key(Kind.INT, 1, MAX_INT, ignored=_STATEFUL),
    "maxNumSequence": Key(Kind.INT, 1, MAX_INT, ignored=f"{_STATEFUL}; maxNumSeqs limits the batch"),
    "useVenv": Key(
        Kind.BOOL,
        harmless=(False,),
        refused="workers run in the environment of sluice itself",
        remedy="install what the model needs there, and remove the key",
    ),
    "pt2": Key(Kind.ANY, ignored="the engine decides what it compiles"),
    "micro_batching": Key(Kind.ANY, ignored="it tuned a handler's threads; scheduling is ours"),
}

OURS = {
    "modelName": Key(Kind.NAME),
    "servedModelNames": Key(Kind.TEXTS),
    "modelPath": Key(Kind.TEXT),
    "engine": Key(Kind.NAME),
    "tensorParallel": Key(Kind.INT, 1, 1024),
    "pipelineParallel": Key(Kind.INT, 1, 1024),
    "stageSplit": Key(Kind.COUNTS, 1, 1 << 16, choices=STAGE_SPLITS),
    "dtype": Key(Kind.TEXT, choices=DTYPES),
    "maxModelLen": Key(Kind.INT, 1, MAX_INT),
    "maxNumSeqs": Key(Kind.INT, 1, 65536),
    "maxNumBatchedTokens": Key(Kind.INT, 1, 1 << 20),
    "maxPromptSlowdown": Key(Kind.NUMBER, 1, 1000, above=True),
    "kvBlockSize": Key(Kind.INT, 1, 4096),
    "kvCacheMemory": Key(Kind.BYTES, 1 << 20, 1 << 50),
    "gpuMemoryShare": Key(Kind.NUMBER, 0, 1, above=True),
    "prefixCache": Key(Kind.BOOL),
    "deterministic": Key(Kind.BOOL),
    "int8Activations": Key(Kind.BOOL),
    "packWeights": Key(Kind.BOOL),
    "promptLookup": Key(Kind.INT, 0, 32),
    "reshard": Key(Kind.BOOL),
    "shareDevices": Key(Kind.BOOL),
    "chatTemplate": Key(Kind.TEXT),
    "toolFormat": Key(Kind.TEXT, choices=TOOL_FORMATS),
    "reasoningFormat": Key(Kind.TEXT, choices=REASONING_FORMATS),
    "pooling": Key(Kind.TEXT, choices=POOLINGS),
    "deviceMap": Key(Kind.ANY),  # read by config_accelerate
    "maxMemory": Key(Kind.ANY),
}

_RENDEZVOUS = "the ranks of a group meet in a file of a private directory, not over the network"
TORCHRUN = {
    "nproc-per-node": Key(Kind.INT, 1, 1024),
    "OMP_NUMBER_THREADS": Key(Kind.INT, 1, 4096),
    "monitor-interval": Key(Kind.NUMBER, 0, 60, above=True),
    "nnodes": Key(
        Kind.INT,
        1,
        1024,
        harmless=(1,),
        refused="groups over several nodes are not supported in this version",
        remedy="nnodes: 1, with nproc-per-node up to this machine's devices",
    ),
    "node-rank": Key(
        Kind.INT,
        0,
        1023,
        harmless=(0,),
        refused="groups over several nodes are not supported in this version",
        remedy="remove the key",
    ),
    "rdzv-backend": Key(Kind.TEXT, harmless=("c10d",), ignored=_RENDEZVOUS),
    "rdzv-endpoint": Key(Kind.TEXT, ignored=_RENDEZVOUS),
    "rdzv-conf": Key(Kind.ANY, ignored=_RENDEZVOUS),
}

_NO_RPC = "stages talk by send and receive, not by RPC"
PIPPY = {
    "chunks": Key(Kind.INT, 1, 1024),
    "rpc_timeout": Key(
        Kind.NUMBER, 0, MAX_INT, ignored=f"{_NO_RPC}; startupTimeout and responseTimeout hold"
    ),
    "num_worker_threads": Key(Kind.INT, 1, 65536, ignored=_NO_RPC),
    "input_names": Key(Kind.TEXTS, ignored="the model is split by layers, not traced from its inputs"),
    "model_type": Key(Kind.TEXT, ignored="the model's own config.json says what it is"),
    "pp_group_size": Key(
        Kind.INT, 1, 1024, ignored="the stages are those of parallelLevel or nproc-per-node"
    ),
}

DEEPSPEED = {
    "config": Key(Kind.TEXT),
    "checkpoint": Key(Kind.TEXT),
    "fallback": Key(Kind.TEXT, choices={"autotp": "autotp"}),
}

_DIRECTORY = "it is read from the model's directory"
_DTYPE_ON_TOP = "write dtype: at the top level, beside handler:"
HANDLER = {
    "model_path": Key(Kind.TEXT),
    "max_seq_len": Key(Kind.INT, 1, MAX_INT),
    "max_batch_size": Key(Kind.INT, 1, 65536),
    "chat_template": Key(Kind.TEXT),
    "device_map": Key(Kind.ANY),
    "max_memory": Key(Kind.ANY),
    "torch_dtype": Key(Kind.ANY, ignored=_DTYPE_ON_TOP),
    "dtype": Key(Kind.ANY, ignored=_DTYPE_ON_TOP),
    "low_cpu_mem_usage": Key(Kind.BOOL, ignored="weights are always read one tensor at a time"),
    "offload_folder": Key(
        Kind.TEXT, ignored="offloaded weights are read from the checkpoint itself; nothing is written"
    ),
    "max_length": Key(
        Kind.INT,
        1,
        MAX_INT,
        ignored="prompts are neither cut nor padded; maxModelLen bounds prompt plus answer",
    ),
    "max_new_tokens": Key(Kind.INT, 1, MAX_INT, ignored="requests state max_tokens"),
    "temperature": Key(Kind.NUMBER, 0, 100, ignored=_SAMPLING),
    "top_p": Key(Kind.NUMBER, 0, 1, ignored=_SAMPLING),
    "manual_seed": Key(Kind.INT, 0, 2**63, ignored="requests state a seed"),
    "mode": Key(Kind.TEXT, ignored="completions and chat are both served"),
    "model_name": Key(
        Kind.TEXT, ignored="modelName names the model to clients, model_path says where it lies"
    ),
    "index_filename": Key(Kind.TEXT, ignored=_DIRECTORY),
    "tokenizer_path": Key(Kind.TEXT, ignored=_DIRECTORY),
    "model_args_path": Key(Kind.TEXT, ignored=_DIRECTORY),
    "converted_ckpt_dir": Key(Kind.TEXT, ignored="set model_path to a directory in Hugging Face format"),
    "return_full_text": Key(Kind.BOOL, ignored="requests state echo"),
    "vllm_engine_config": Key(
        Kind.ANY, ignored="write dtype, maxModelLen, maxNumSeqs, gpuMemoryShare at the top level instead"
    ),
    "quantization": Key(
        Kind.ANY,
        harmless=(False, None, "none"),
        refused="weights are not quantised while they are read",
        remedy="remove the key, and serve what `sluice convert --quantize int8` writes",
    ),
    "adapters": Key(
        Kind.ANY,
        harmless=(None,),
        refused="adapters are not in this version",
        remedy="merge the adapter into the weights",
    ),
}

SECTIONS = {"torchrun": TORCHRUN, "pippy": PIPPY, "deepspeed": DEEPSPEED, "handler": HANDLER}
TOP = FRONTEND | OURS
FREE_FORM = frozenset({"handler"})  # an unknown key there was a handler's own: a warning, not an error
