"""Keeps secrets out of what is written: logs, events, saved configurations, error messages. Finds them by form and name.

Known by form: keys and tokens with a vendor's prefix, private keys, JSON web tokens, passwords in URLs, signatures in
queries. Known by name: `password=...`, `"api_key": "..."`. Known by value: what the process environment holds under such
a name. A hash, a path, a model's `mask_token` and a count of tokens are none of these. What is found is replaced by
`<redacted>`, which is plain text in YAML and JSON. This is a net under people's mistakes: a secret in no known form
under an innocent name passes. The text itself is never parsed, and cost grows with its length only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from dstrain.base.errors import ConfigError

REDACTED = "<redacted>"

_WORDS = (
    r"pass(?:word|wd|phrase)|secret(?:[_-]?(?:access[_-]?)?key)?|client[_-]?secret|api[_-]?key|access[_-]?key|account[_-]?key"
    r"|auth[_-]?key|signing[_-]?key|encryption[_-]?key|private[_-]?key|credentials?|(?:webhook[_-]?)?secret"
)
# Names of a model's special tokens and of rates; "mask_token" holds no secret.
_NO_TOKEN = "".join(
    rf"(?<!{word}[_-])"
    for word in ("mask", "pad", "cls", "sep", "unk", "bos", "eos", "per", "special", "added", "word")
)
_TOKEN = rf"{_NO_TOKEN}token"
_SECRET_NAME = re.compile(rf"(?i)(?:^|[^a-z])(?:[a-z]*)(?:{_WORDS}|{_TOKEN})$")
_NAMED = rf"(?i)((?:{_WORDS})\\{{0,4}}[\"']?\s{{0,3}}[=:]\s{{0,3}})"
_MIN_KNOWN_VALUE = 12
_SHORTEST = len("token=") + 1

_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # Private keys, whole blocks, also with line ends spelled out as in a service account's JSON.
        (
            r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?:(?!-----END)[\s\S]){0,16384}"
            r"(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----)?",
            REDACTED,
        ),
        (r"AGE-SECRET-KEY-1[0-9A-Z]{20,}", REDACTED),
        # URLs: passwords, and over HTTP also a bare user, which is often a token. abfs://CONTAINER@ACCOUNT is a place.
        (
            r"(?<![A-Za-z0-9])([A-Za-z][A-Za-z0-9+.-]{1,20}://)[^\s/@:'\"<>]{0,256}:[^\s/'\"<>]{1,2048}@",
            rf"\1{REDACTED}@",
        ),
        (r"(?i)\b((?:https?|ftps?)://)[^\s/@'\"<>]{1,2048}@", rf"\1{REDACTED}@"),
        (
            r"(?i)([?&](?:sig|signature|x-(?:amz|goog)-(?:signature|credential|security-token)|awsaccesskeyid|key|auth|code"
            r"|googleaccessid|[a-z_-]{0,20}token|jwt)=)[^&\s'\"<>]+",
            rf"\1{REDACTED}",
        ),
        (r"(hooks\.slack\.com/(?:services|workflows)/)[A-Za-z0-9/_-]+", rf"\1{REDACTED}"),
        (r"(discord(?:app)?\.com/api/webhooks/)[A-Za-z0-9/_-]+", rf"\1{REDACTED}"),
        # HTTP headers.
        (
            r"(?i)\b(bearer|basic|digest)(\s{1,3})(?=[A-Za-z0-9+/._~-]{0,512}[0-9=])[A-Za-z0-9+/._~-]{8,}=*",
            rf"\1\2{REDACTED}",
        ),
        (r"(?i)\b((?:set-)?cookie:\s{0,3})[^\n]+", rf"\1{REDACTED}"),
        # Vendors' forms.
        (r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+", REDACTED),
        (r"\b(?:AKIA|ASIA|AGPA|AIDA|AROA|ABIA|ACCA)[A-Z0-9]{16}\b", REDACTED),
        (r"\bAIza[0-9A-Za-z_-]{35}", REDACTED),
        (r"\bGOCSPX-[A-Za-z0-9_-]{20,}", REDACTED),
        (r"\bGOOG1?[A-Z0-9]{20,}\b", REDACTED),
        (r"\bya29\.[0-9A-Za-z_-]{20,}", REDACTED),
        (r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}", REDACTED),
        (r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{40,})", REDACTED),
        (r"\bgl(?:pat|rt|dt|cbt|ptt)-[A-Za-z0-9_-]{18,}", REDACTED),
        (r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}", REDACTED),
        (r"\bxapp-[0-9]-[A-Za-z0-9-]{10,}", REDACTED),
        (r"\bsk-(?=[A-Za-z0-9-]{0,64}[A-Za-z0-9_]{20})[A-Za-z0-9_-]{20,}", REDACTED),
        (r"\b(?:sk|rk|whsec)_(?:live|test)?_?[A-Za-z0-9]{24,}", REDACTED),
        (r"\bpypi-[A-Za-z0-9_-]{40,}", REDACTED),
        (r"\bnpm_[A-Za-z0-9]{36}", REDACTED),
        (r"\bdckr_(?:pat|oat)_[A-Za-z0-9_-]{20,}", REDACTED),
        (r"\bdapi[0-9a-f]{32}", REDACTED),
        (r"\bdo[oprt]_v1_[0-9a-f]{64}", REDACTED),
        (r"\bhv[sbr]\.[A-Za-z0-9_-]{20,}", REDACTED),
        (r"\bnvapi-[A-Za-z0-9_-]{20,}", REDACTED),
        (r"\bwandb_v1_[A-Za-z0-9_]{20,}", REDACTED),
        (r"\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}", REDACTED),
        (r"(?<!\d)\d{8,10}:AA[A-Za-z0-9_-]{32,}", REDACTED),
        # Names.
        (rf"{_NAMED}([\"'])(?!<redacted>)(?:\\.|(?!\2)[^\\\n]){{1,4096}}\2", rf"\1\2{REDACTED}\2"),
        (rf"{_NAMED}(\\{{1,4}}[\"'])(?!<redacted>)[^\"'\\\n]{{1,4096}}\2", rf"\1\2{REDACTED}\2"),
        (rf"{_NAMED}(?!<redacted>)[^\s,;&'\"\\\]}})]+", rf"\1{REDACTED}"),
        (
            rf"(?i)({_TOKEN}\\{{0,4}}[\"']?\s{{0,3}}=\s{{0,3}}\\{{0,4}}[\"']?)(?!<redacted>)[^\s,;&'\"\\\]\[}})]{{6,}}",
            rf"\1{REDACTED}",
        ),
        (
            rf"(?i)({_TOKEN}\\{{0,4}}[\"']?:\s{{0,3}}\\{{0,4}}[\"']?)(?=[^\s'\",;]{{0,256}}\d)(?!<redacted>)[^\s,;&'\"\\\]\[}})]{{12,}}",
            rf"\1{REDACTED}",
        ),
        (r"(?i)(\b(?:sharedaccess|shared_access)(?:key|signature)\s{0,3}=\s{0,3})[^\s;,'\"]+", rf"\1{REDACTED}"),
        (r"(?i)((?:^|[;\s\"'])pwd\s{0,3}=\s{0,3})(?!/)[^\s;,'\"]+", rf"\1{REDACTED}"),
        (r"(?i)(\blogin\s+\S{1,256}\s+password\s+)\S+", rf"\1{REDACTED}"),
        (r"((?:^|\s)(?:-u|--user|--proxy-user)[\s=][^\s:'\"]{1,256}:)[^\s'\"]+", rf"\1{REDACTED}"),
        (r"(?i)((?:^|\s)--(?:password|token|api-key|secret)\s+)(?!-)\S+", rf"\1{REDACTED}"),
    )
)


def redact(text: str) -> str:
    """`text` with every secret that can be recognised replaced by `<redacted>`; applying it twice changes nothing more."""
    if len(text) < _SHORTEST or text.isdigit():
        return text
    for value in _environment_secrets():
        text = text.replace(value, REDACTED)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def redacted(data: Any) -> Any:
    """JSON-able data with the secrets in its texts replaced, at any depth.

    A text under a secret's name (`password`, `hf_token`, `client_secret`) is replaced whole, whatever its form.
    """
    if isinstance(data, str):
        return redact(data)
    if isinstance(data, Mapping):
        return {
            key: REDACTED if isinstance(value, str) and value and is_secret_name(str(key)) else redacted(value)
            for key, value in data.items()
        }
    if isinstance(data, (list, tuple)):
        return [redacted(item) for item in data]
    return data


def is_secret_name(name: str) -> bool:
    """Whether a key or variable of this name holds a secret."""
    return _SECRET_NAME.search(name) is not None


def refuse_redacted(data: Mapping[str, Any], *, source: str) -> None:
    """Make sure that no value of a configuration read back from a run folder is one whose secret was not kept.

    Raises:
        ConfigError: naming the first such key and how to give it again.
    """
    for key, value in _texts(data, ""):
        if REDACTED in value:
            raise ConfigError(
                f"{source}: {key}: its secret was not written into the run folder ({value!r}); "
                f"give it again on the command line: {key}=..."
            )


def _texts(data: Any, key: str) -> list[tuple[str, str]]:
    if isinstance(data, str):
        return [(key, data)]
    if isinstance(data, Mapping):
        return [found for name, value in data.items() for found in _texts(value, f"{key}.{name}" if key else str(name))]
    if isinstance(data, (list, tuple)):
        return [found for place, value in enumerate(data) for found in _texts(value, f"{key}.{place}")]
    return []


@cache
def _environment_secrets() -> tuple[str, ...]:
    """Values, longest first, that the process was started with under a secret's name; short ones could be ordinary words."""
    values = {
        value.strip() for name, value in os.environ.items() if is_secret_name(name) and not value.startswith(("/", "~"))
    }
    return tuple(sorted((value for value in values if len(value) >= _MIN_KNOWN_VALUE), key=len, reverse=True))
