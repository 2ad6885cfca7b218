"""Which variables of the shell reach a job: a list of names, so that a run does not depend on what else was exported that day. Pure.

What a run needs is in its YAML; these are what programs and libraries under it read: paths, locale, CUDA, NCCL, credentials of
stores. `dstrain launch --forward NAME` adds one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from dstrain.base.errors import ConfigError

NAMES = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TERM", "TMPDIR", "TEMP", "TMP", "PWD", "HOSTNAME",
        "VIRTUAL_ENV", "NO_COLOR",
    }
)  # fmt: skip
PREFIXES = (
    # the system, compilers, modules
    "LC_", "LD_", "XDG_",
    "SSL_CERT_", "CURL_CA_", "REQUESTS_CA_", "KRB5", "SSH_", "MODULE", "LMOD_", "LOADEDMODULES", "_LM", "_ModuleTable",
    "CONDA_", "PYTHON", "MALLOC_", "GLIBC_", "ASAN_", "COVERAGE_",
    # threads, GPUs, networks
    "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "RAYON_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "FI_", "IBV_",
    "MV2_", "TORCH", "TRITON_", "DS_", "DEEPSPEED_", "PDSH_",
    # data
    "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "DATASETS_", "AWS_", "S3_", "GOOGLE_", "GCLOUD_", "GCS_", "CLOUDSDK_", "AZURE_",
    "FSSPEC_", "STORAGE_EMULATOR_", "ARROW_", "RAY_", "TQDM_", "TENSORBOARD",
    # schedulers, ours
    "SLURM", "SRUN_", "SBATCH_", "SQUEUE_", "MUNGE", "PMI", "DSTRAIN_",
)  # fmt: skip
_PROXIES = frozenset({"http_proxy", "https_proxy", "no_proxy", "all_proxy", "ftp_proxy"})
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def is_forwarded(name: str) -> bool:
    """Whether a variable is on the list."""
    return name in NAMES or name.lower() in _PROXIES or name.startswith(PREFIXES)


def check_forward(name: str) -> str:
    """Return a name that `--forward` may add.

    Raises:
        ConfigError: it is no variable's name; values belong into the environment, not on the command line.
    """
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"--forward {name[:80]!r}: give the name of a variable, without its value")
    return name


def forwarded(environment: Mapping[str, str], more: Iterable[str] = ()) -> dict[str, str]:
    """The part of an environment that a job inherits.

    Args:
        environment: of this process.
        more: names besides the list's.
    """
    chosen = set(more)
    return {name: value for name, value in environment.items() if name in chosen or is_forwarded(name)}
