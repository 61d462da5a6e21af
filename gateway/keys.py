"""API keys: from options and from a file, kept as SHA-256 digests only."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic.alias_generators import to_camel

from gateway.tenant import UNLIMITED, Limits, Tenant

_PREFIX = "sk-sluice-"
_MAX_FILE_BYTES = 4 << 20
_DIGEST = "sha256:"


class BadKeyFile(ValueError):  # noqa: N818
    """A file of API keys cannot be used. The message says where and what to do, and shows no key."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    name: str
    digest: bytes
    limits: Limits = UNLIMITED


class KeyRing:
    """The keys that are known now, and their holders. Without any key everybody may ask."""

    def __init__(self, keys: Sequence[str] = (), file: Path | None = None) -> None:
        """Raises BadKeyFile."""
        self._secret = secrets.token_bytes(32)  # of this run: salts are the same nowhere else
        self._given = [_unnamed(digest_of(key.encode())) for key in dict.fromkeys(keys)]
        self._file = file
        self._everybody = Tenant("everybody", self._salt("everybody"))
        self._tenants: dict[str, Tenant] = {}
        self._digests: list[tuple[bytes, Tenant]] = []
        self.reload()

    @property
    def is_open(self) -> bool:
        return not self._digests

    def __len__(self) -> int:
        return len(self._digests)

    @property
    def tenants(self) -> tuple[Tenant, ...]:
        """The holders of the keys."""
        return tuple(self._tenants.values())

    def find(self, key: bytes | None) -> Tenant | None:
        """The holder of this key. Takes as long for a wrong key as for a right one."""
        if self.is_open:
            return self._everybody
        digest = digest_of(key or b"")
        found = [tenant for known, tenant in self._digests if hmac.compare_digest(digest, known)]
        return found[0] if found and key else None

    def reload(self) -> None:
        """Read the file again. Requests underway go on, also those of keys that are gone.

        Raises BadKeyFile, and all stays as it was."""
        keys = [*self._given, *(read_key_file(self._file) if self._file is not None else ())]
        _check_unique(keys, self._file)
        tenants = {key.name: self._tenants.get(key.name) or self._tenant(key.name) for key in keys}
        for key in keys:
            tenants[key.name].set_limits(key.limits)
        self._tenants = tenants
        self._digests = [(key.digest, tenants[key.name]) for key in keys]

    def _tenant(self, name: str) -> Tenant:
        return Tenant(name, self._salt(f"key:{name}"))

    def _salt(self, identity: str) -> bytes:
        return hmac.digest(self._secret, identity.encode(), "sha256")


def digest_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def new_key() -> str:
    return _PREFIX + secrets.token_urlsafe(32)


def file_line(name: str, key: str) -> str:
    """The line of a key file for `key`, without the key. Raises BadKeyFile at a name that is none."""
    entry = _entry({"name": name, "sha256": digest_of(key.encode()).hex()}, _Where("the new key"))
    return f'- {{name: "{entry.name}", sha256: "{entry.digest.hex()}"}}'


def read_key_file(path: Path) -> list[ApiKey]:
    """YAML, a list of entries (README.md, "Keys"); or one key or sha256:DIGEST a line.

    Raises BadKeyFile."""
    text, mode = _read(path)
    numbered = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = {number: line for number, line in numbered if line and not line.startswith("#")}
    if not lines:
        raise BadKeyFile(f"{path}: has no keys; make one with `sluice key NAME >> {path}`")
    first = next(iter(lines.values()))
    if first in ("-", "---") or first.startswith(("- ", "[")):
        entries = _yaml_list(text, path)
        keys = [_entry(entry, where) for entry, where in entries]
        has_plain_key = any("key" in entry for entry, _ in entries)
    else:
        keys = [_line(line, _Where(f"{path}:{number}")) for number, line in lines.items()]
        has_plain_key = any(not line.startswith(_DIGEST) for line in lines.values())
    if has_plain_key and mode & (stat.S_IRGRP | stat.S_IROTH):
        raise BadKeyFile(
            f"{path}: has keys in plain text and can be read by other users (mode {mode:04o}):"
            f" chmod 600 it, or keep digests only (`sluice key`)"
        )
    return keys


def _read(path: Path) -> tuple[str, int]:
    """Text and mode of one and the same file."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(_MAX_FILE_BYTES + 1)
        text = content.decode()
    except OSError as error:
        raise BadKeyFile(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadKeyFile(f"{path}: is not UTF-8 text") from None
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        raise BadKeyFile(f"{path}: is not a regular file")
    if len(content) > _MAX_FILE_BYTES:
        raise BadKeyFile(f"{path}: is larger than {_MAX_FILE_BYTES >> 20} MiB")
    if status.st_uid not in (0, os.geteuid()):
        raise BadKeyFile(f"{path}: belongs to another user (uid {status.st_uid}): chown it")
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BadKeyFile(f"{path}: can be written by other users (mode {mode:04o}): chmod 600 it")
    return text, mode


class _Entry(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        extra="forbid", strict=True, alias_generator=to_camel, hide_input_in_errors=True
    )

    name: Annotated[str, pydantic.Field(pattern=r"\A[A-Za-z0-9._@-]{1,64}\z")]
    sha256: Annotated[str, pydantic.Field(pattern=r"\A[0-9a-f]{64}\z")] | None = None
    key: Annotated[str, pydantic.Field(min_length=16)] | None = None
    concurrent_requests: pydantic.PositiveInt | None = None
    requests_per_minute: pydantic.PositiveInt | None = None
    tokens_per_minute: pydantic.PositiveInt | None = None


_ALLOWED = ", ".join(each.alias or "" for each in _Entry.model_fields.values())
_UNKNOWN = ("extra_forbidden", "invalid_key")
_SHOWN = re.compile(r"[A-Za-z_-]{1,32}")  # of unknown fields; what has digits or is longer may be a key


@dataclass(frozen=True, slots=True)
class _Where:
    """An entry's place, for messages, and that of each of its fields."""

    entry: str
    fields: Mapping[object, str] = field(default_factory=dict)

    def of(self, name: object) -> str:
        return self.fields.get(name, self.entry)


def _yaml_list(text: str, path: Path) -> list[tuple[Any, _Where]]:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        entries = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise BadKeyFile(f"{path}{where}: is not valid YAML") from None  # its own message would show a key
    finally:
        loader.dispose()
    if not isinstance(node, yaml.SequenceNode) or not isinstance(entries, list):
        raise BadKeyFile(f"{path}: is not a list of keys, as `sluice key` prints them")
    return [(entry, _where(part, path)) for entry, part in zip(entries, node.value, strict=True)]


def _where(node: yaml.Node, path: Path) -> _Where:
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    fields = {key.value: f"{path}:{key.start_mark.line + 1}" for key, _ in pairs}
    return _Where(f"{path}:{node.start_mark.line + 1}", fields)


def _entry(content: object, where: _Where) -> ApiKey:
    if not isinstance(content, dict):
        raise BadKeyFile(f"{where.entry}: is not a mapping; allowed: {_ALLOWED}")
    try:
        entry = _Entry.model_validate(content)
    except pydantic.ValidationError as error:
        raise BadKeyFile(_problem(error, where)) from None
    if (entry.sha256 is None) == (entry.key is None):
        raise BadKeyFile(f"{where.entry}: needs either sha256 (`sluice key` prints it) or key, and not both")
    digest = (
        bytes.fromhex(entry.sha256) if entry.sha256 is not None else digest_of((entry.key or "").encode())
    )
    limits = Limits(
        concurrent_requests=entry.concurrent_requests,
        requests_per_minute=entry.requests_per_minute,
        tokens_per_minute=entry.tokens_per_minute,
    )
    return ApiKey(entry.name, digest, limits)


def _problem(error: pydantic.ValidationError, where: _Where) -> str:
    """The first one, without what was found: it may be a key. An unknown field explains a missing one."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    first = min(problems, key=lambda problem: problem["type"] not in _UNKNOWN)
    name = str(first["loc"][0])
    if first["type"] in _UNKNOWN:
        shown = f" {name}" if _SHOWN.fullmatch(name) else ""
        return f"{where.of(name)}: unknown field{shown}; allowed: {_ALLOWED}"
    if first["type"] == "missing":
        return f"{where.entry}: {name} is missing"
    words = {
        "name": "1 to 64 of A-Z a-z 0-9 . _ @ -",
        "sha256": "64 hexadecimal digits in lower case, as `sluice key` prints them",
        "key": "16 characters or more",
    }
    return f"{where.of(name)}: {name}: must be {words.get(name, 'a whole number above 0')}"


def _line(line: str, where: _Where) -> ApiKey:
    if not line.startswith(_DIGEST):
        if len(line.split()) > 1:
            raise BadKeyFile(
                f"{where.entry}: is not a key, for it holds spaces; a named one begins with '- '"
            )
        return _unnamed(digest_of(line.encode()))
    key = _entry({"name": "unnamed", "sha256": line.removeprefix(_DIGEST)}, where)
    return _unnamed(key.digest)


def _unnamed(digest: bytes) -> ApiKey:
    """A name that stays the same and tells nothing of the key: a digest of the digest."""
    return ApiKey(f"key-{digest_of(digest).hex()[:8]}", digest)


def _check_unique(keys: Sequence[ApiKey], file: Path | None) -> None:
    names: set[str] = set()
    digests: set[bytes] = set()
    for key in keys:
        if key.digest in digests:
            raise BadKeyFile(f"{file or '--api-key'}: the key of {key.name} is there twice: leave one out")
        if key.name in names:
            raise BadKeyFile(f"{file or '--api-key'}: two keys are named {key.name}: give one another name")
        names.add(key.name)
        digests.add(key.digest)
