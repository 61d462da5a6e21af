"""A worker group without torch, for thousands of trials: only the model and torchrun are not the real ones.

`spec.fake_group(FakeSpec(...))` is a GroupSpec for the real Supervisor, which starts `process.py` under the
real guard; there the real inbox, leader and scheduler (paged K/V, prefix cache, preemption, resumption) run a
model that is a hash of all tokens before; `model.expected` says what it must give. Up in about 0.3 s.

Faults: a `Fault` of the spec kills, exits, raises, runs out of memory, stops or hangs at the n-th load,
prefill, decode, sampling or idle round, for all requests or only where a prompt has a certain token. An
iterator of specs makes each start another one. From outside: SIGKILL and SIGSTOP to `Ready.pids`; SIGUSR1
makes the leader hang while its I/O thread beats on, SIGUSR2 makes it raise.

`python -m tests.fake_group.serve` is the whole `sluice serve` (HTTP, signals, drain) over such groups; a test
starts it with `tests.e2e.server.serving(..., program=FAKE_SERVE)`.
"""
