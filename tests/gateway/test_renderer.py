"""Templates are programs of whoever made the model: they end in time, and reach nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import psutil
import pytest

from gateway.grammar import Grammars
from gateway.helper import Helper, HelperUnavailable
from gateway.prompt.conversation import Conversation
from gateway.prompt.renderer import Renderer
from gateway.prompt.template import MAX_ADDED_CHARS, ChatTemplate, TemplateRefused
from gateway.protocol.common import GenerationParams
from gateway.protocol.structured import Shape

pytestmark = pytest.mark.anyio
HELLO = Conversation(messages=[{"role": "user", "content": "hello"}])
GOOD = "{{ messages[0].content }}"
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
END = "{% endfor %}" * 3

ENDLESS = [
    NESTED + END,
    NESTED + "{{ a }}{% if false %}x{% endif %}" + END,
    "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else '' }}{% endmacro %}{{ f(90) }}",
    "{% set x = [1] %}{% for a in range(99999) %}{% set x = x %}" + NESTED + END + "{% endfor %}",
    "{% set n = namespace(x=1) %}{% for a in range(99999) %}{% set n.x = n.x * 3 + n.x ** 2 %}{% endfor %}",
    "{{ 10 ** (10 ** 8) }}",
    "{{ (7 ** (7 ** 9)) % 10 }}",
    "{{ (9 ** 9999999) | string | length }}",
    "{% for a in range(99999) %}{% set y = (messages[0].content * 1000000) | upper %}{% endfor %}",
    "{% for a in range(99999) %}{% set y = range(99999) | list | sort %}{% endfor %}",
    "{% for a in range(99999) %}{% set y = range(99999) | map('string') | join %}{% endfor %}",
    "{{ lipsum(n=99999, html=false, max=999) | length }}",
    "{% for a in range(99999) %}{% if 'ab' in messages[0].content * 9999999 %}{% endif %}{% endfor %}",
    "{% for a in range(99999) %}{% set y = ('ab' * 999999).replace('a', 'bb') %}{% endfor %}",
    "{% for a in range(99999) %}{% set y = range(99999) | sum %}{% endfor %}",
    "{% for a in range(99999) %}{% set y = ('a ' * 99999).split() %}{% endfor %}",
    "{% for x in [[1], [1]] recursive %}{{ loop([[1], [1]]) if loop.depth < 60 }}{% endfor %}",
    "{% set c = cycler(1, 2) %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% if c.next() > 2 %}{% endif %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% set y = range(99999) | groupby('real') | list %}{% endfor %}",
    "{% for a in range(99999) %}{% set y = (messages[0].content * 9999) | wordwrap(1) %}{% endfor %}",
]

HUGE = [
    "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ 'x' * 10 ** 7 }}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ 'x'.ljust(10 ** 10) }}",
    "{{ 'x' | center(10 ** 10) }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ (1).to_bytes(10 ** 10, 'big') | length }}",
    "{% set x = 'x' * 1000 %}" + "{% set x = x ~ x %}" * 40 + "{{ x | length }}",
    "{% set x %}xxxxxxxxxx{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40 + "{{ x | length }}",
]

ROOTS = [
    "''",
    "[]",
    "{}",
    "messages",
    "messages[0]",
    "range",
    "lipsum",
    "cycler",
    "joiner",
    "namespace",
    "self",
    "raise_exception",
    "strftime_now",
    "''.format",
    "messages[0].get",
    "(1).bit_length",
    "dict",
    "cycler.next",
    "self._TemplateReference__context",
    "loop",
]
CHAINS = [
    "{{ ROOT.__class__.__mro__[1].__subclasses__() }}",
    "{{ ROOT.__globals__['os'].system('touch CANARY') }}",
    "{{ ROOT.__init__.__globals__.__builtins__.open('CANARY', 'w').write('x') }}",
    "{{ ROOT['__cl' ~ 'ass__']['__ba' ~ 'se__']['__subcl' ~ 'asses__']() }}",
    "{{ ROOT|attr('__class__')|attr('__base__')|attr('__subclasses__')() }}"
    "{{ '{0.__class__.__init__.__globals__}'.format(ROOT) }}"
    "{{ ['{0.__class__}']|map('format', ROOT)|list }}{{ ('{0.__class__}'|attr('format'))(ROOT) }}",
]


async def _refusal(source: str, seconds: float = 1.0) -> str:
    with pytest.raises(TemplateRefused) as caught:
        await Renderer(ChatTemplate(source, {}), seconds).render(HELLO)
    return str(caught.value)


async def test_twenty_endless_templates_end() -> None:
    assert len(ENDLESS) == 20
    for source in ENDLESS:
        assert "chat template" in await _refusal(source, 0.1), source


@pytest.mark.parametrize("source", HUGE)
async def test_a_template_that_takes_too_much_memory_or_writes_too_much_is_refused(source: str) -> None:
    assert "chat template" in await _refusal(source)


async def test_a_hundred_ways_out_of_the_sandbox_lead_nowhere(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payloads = [
        chain.replace("ROOT", root).replace("CANARY", str(canary)) for chain in CHAINS for root in ROOTS
    ]
    assert len(payloads) == 100
    for payload in payloads:
        try:
            text = ChatTemplate(payload, {}).render(HELLO)
        except TemplateRefused:
            continue
        assert not any(word in text for word in ("<class", "<module", "__builtins__", "os.py")), payload
    assert not canary.exists()


async def test_after_a_kill_the_next_conversation_is_served() -> None:
    source = "{% if messages[0].content == 'kill' %}" + NESTED + END + "{% endif %}" + GOOD
    renderer = Renderer(ChatTemplate(source, {}), 0.2)
    assert await renderer.render(HELLO) == "hello"
    kill = Conversation(messages=[{"role": "user", "content": "kill"}])
    results = await asyncio.gather(
        *(renderer.render(messages) for messages in (HELLO, kill, HELLO, kill, HELLO)), return_exceptions=True
    )
    assert [result if isinstance(result, str) else type(result) for result in results] == [
        "hello",
        TemplateRefused,
        "hello",
        TemplateRefused,
        "hello",
    ]


async def test_output_may_be_as_long_as_the_messages_and_a_megabyte() -> None:
    fits = GOOD + f"{{{{ 'x' * {MAX_ADDED_CHARS} }}}}"
    long = Conversation(messages=[{"role": "", "content": "ü🦆\n" * 1_000_000}])
    text = await Renderer(ChatTemplate(fits, {})).render(long)
    assert len(text) == 3_000_000 + MAX_ADDED_CHARS
    assert str(MAX_ADDED_CHARS) in await _refusal(fits + "!" * 100, 60.0)


async def test_what_a_template_refuses_it_says() -> None:
    assert "system comes first" in await _refusal("{{ raise_exception('system comes first') }}")
    assert "ZeroDivisionError" in await _refusal("{{ 1 / 0 }}")


def _render_processes() -> set[int]:
    """Of this process. Those of other tests may end at any time."""
    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "gateway.prompt.render_process" in child.cmdline():
                found.add(child.pid)
    return found


async def test_the_process_ends_with_its_renderer() -> None:
    others = _render_processes()
    renderer = Renderer(ChatTemplate(GOOD, {}))
    renderer.start()
    assert await renderer.render(HELLO) == "hello"
    [pid] = _render_processes() - others
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)], 30)
    with pytest.raises(TemplateRefused):
        await renderer.render(HELLO)
    assert await renderer.render(HELLO) == "hello"
    assert len(_render_processes() - others) == 1
    del renderer
    assert _render_processes() <= others


async def test_a_helper_that_cannot_start_is_the_servers_fault() -> None:
    helper = Helper("gateway.no_such_module", {"seconds": 1})
    with pytest.raises(HelperUnavailable):
        await helper.ask({})


async def test_a_grammar_that_nobody_could_look_at_is_no_refused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape("regex", "a+", "structured_outputs")
    grammars = Grammars()
    with monkeypatch.context() as patch:
        patch.setattr("gateway.helper.sys.executable", "/no/such/python")
        with pytest.raises(HelperUnavailable):
            await grammars.constrain(GenerationParams(), shape)
    assert (await grammars.constrain(GenerationParams(), shape)).grammar
