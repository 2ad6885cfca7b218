"""One made-up secret of every form that `base.secrets` knows, in the context people leave it in.

Put together from pieces, so that no scanner of this repository takes them for real ones.
"""

from __future__ import annotations

import random

_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz23456789"


def _made_up(length: int, *, seed: int, alphabet: str = _LETTERS) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(alphabet) for _ in range(length - 1)) + "7"


def _hex(length: int, seed: int) -> str:
    return _made_up(length, seed=seed, alphabet="0123456789abcdef")


def _upper(length: int, seed: int) -> str:
    return _made_up(length, seed=seed, alphabet="ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")


def secret_formats() -> dict[str, tuple[str, str]]:
    """Name → (the text as people leave it, the part that may be nowhere)."""
    body = {n: _made_up(n, seed=n) for n in (20, 24, 32, 34, 35, 36, 40, 43, 48, 60, 82, 86, 93)}
    pem = "\n".join(_made_up(64, seed=100 + i) for i in range(4))
    jwt = f"eyJ{body[20]}.eyJ{body[40]}.{body[43]}"
    plain = {
        "hugging face": (f"hub answered 401 for hf_{body[34]}", f"hf_{body[34]}"),
        "hugging face organisation": (f"api_org_{body[34]}", body[34]),
        "github": (f"cloning with ghp_{body[36]}", body[36]),
        "github application": (f"ghs_{body[36]} expired", body[36]),
        "github fine-grained": (f"github_pat_{body[82]}", body[82]),
        "gitlab": (f"glpat-{body[20]}", body[20]),
        "aws key id": (f"profile uses AKI{'A'}{_upper(16, 1)}", _upper(16, 1)),
        "aws temporary key id": (f"ASI{'A'}{_upper(16, 2)}", _upper(16, 2)),
        "aws secret key": (f"aws_secret_access_key = {body[40]}", body[40]),
        "aws secret key in the environment": (f"AWS_SECRET_ACCESS_KEY={body[40]}", body[40]),
        "aws session token": (f"AWS_SESSION_TOKEN={body[93]}", body[93]),
        "aws presigned url": (f"https://b.s3.amazonaws.com/x?X-Amz-Expires=60&X-Amz-Signature={_hex(64, 3)}", _hex(64, 3)),
        "google api key": (f"AIz{'a'}{body[35]}", body[35]),
        "google oauth": (f"ya29.{body[60]}", body[60]),
        "google client secret": (f"GOCSPX-{body[24]}", body[24]),
        "google signed url": (f"https://storage.googleapis.com/b/o?X-Goog-Signature={_hex(128, 4)}&x=1", _hex(128, 4)),
        "google service account": (
            f'{{"type": "service_account", "private_key": "-----BEGIN PRIVATE KEY-----\\n{body[60]}\\n-----END PRIVATE KEY-----\\n"}}',
            body[60],
        ),
        "azure shared access signature": (f"https://a.blob.core.windows.net/c?sv=2022&sig={body[43]}%3D", body[43]),
        "azure account key": (f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={body[86]}==;EndpointSuffix=x", body[86]),
        "azure service bus": (f"Endpoint=sb://x/;SharedAccessKeyName=r;SharedAccessKey={body[43]}=", body[43]),
        "wandb": (f"WANDB_API_KEY={_hex(40, 5)}", _hex(40, 5)),
        "wandb in yaml": (f"wandb_api_key: {_hex(40, 6)}", _hex(40, 6)),
        "openai": (f"sk-{body[48]}", body[48]),
        "openai project": (f"sk-proj-{body[82]}", body[82]),
        "anthropic": (f"sk-ant-api03-{body[93]}", body[93]),
        "nvidia": (f"nvapi-{body[60]}", body[60]),
        "slack": (f"xox{'b'}-123456789012-{body[24]}", body[24]),
        "slack webhook": (f"https://hooks.slack.com/services/T0000/B0000/{body[24]}", body[24]),
        "discord webhook": (f"https://discord.com/api/webhooks/1234/{body[60]}", body[60]),
        "telegram": (f"https://api.telegram.org/bot123456789:AA{body[34]}/send", body[34]),
        "stripe": (f"sk_{'live'}_{body[24]}", body[24]),
        "sendgrid": (f"SG.{body[24]}.{body[43]}", body[43]),
        "npm": (f"npm_{body[36]}", body[36]),
        "pypi": (f"pypi-{body[60]}", body[60]),
        "docker": (f"dckr_pat_{body[32]}", body[32]),
        "databricks": (f"dapi{_hex(32, 7)}", _hex(32, 7)),
        "vault": (f"hvs.{body[24]}", body[24]),
        "json web token": (f"got {jwt}", body[43]),
        "bearer header": (f"Authorization: Bearer {body[40]}", body[40]),
        "basic header": (f"authorization: Basic {body[40]}==", body[40]),
        "cookie": (f"Cookie: session={body[40]}; theme=dark", body[40]),
        "url password": (f"https://anna:{body[20]}@data.example.org/shards", body[20]),
        "url user": (f"https://{body[20]}@data.example.org/shards", body[20]),
        "url password with an at sign": (f"s3://anna:p@{body[20]}@bucket/shards", body[20]),
        "database": (f"postgresql://trainer:{body[20]}@db:5432/runs", body[20]),
        "redis": (f"redis://:{body[20]}@cache:6379/0", body[20]),
        "odbc": (f"Driver=x;Uid=anna;Pwd={body[20]};", body[20]),
        "password": ("password=hunter2!", "hunter2!"),
        "password in yaml": ("db_password: hunter3!", "hunter3!"),
        "quoted password": ('passphrase: "correct horse battery"', "correct horse battery"),
        "password in json": ('{"passwd": "hunter4!"}', "hunter4!"),
        "token": (f"token={body[24]}", body[24]),
        "access token in json": (f'{{"access_token": "{body[24]}"}}', body[24]),
        "client secret": (f"client_secret={body[24]}", body[24]),
        "api key header": (f"x-api-key: {body[32]}", body[32]),
        "query key": (f"https://api.example.org/v1?key={body[32]}&page=2", body[32]),
        "netrc": (f"machine example.org login anna password {body[20]}", body[20]),
        "curl": (f"curl -u anna:{body[20]} https://example.org", body[20]),
        "command line": (f"tool --token {body[20]}", body[20]),
        "age": (f"AGE-SECRET-KEY-1{_upper(58, 8)}", _upper(58, 8)),
    }  # fmt: skip
    for kind in ("RSA ", "EC ", "OPENSSH ", ""):
        block = f"-----BEGIN {kind}PRIVATE KEY-----\n{pem}\n-----END {kind}PRIVATE KEY-----"
        plain[f"{kind.lower()}private key"] = (f"read {block} from disk", pem.splitlines()[1])
    return plain
