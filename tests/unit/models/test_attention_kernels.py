"""Which kernel serves where, and that each is called with what it expects.

The CUDA kernels themselves are compared with the others where a GPU is at hand; here the packages' functions are replaced by a dense
reference that reads its arguments as their documentation says.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from dstrain.base.errors import ConfigError
from dstrain.models import attention_kernels
from dstrain.models.attention import segment_attention, segment_layout
from dstrain.models.attention_kernels import Circumstances, blocks_seen, choose_kernel
from dstrain.models.huggingface import choose_attention_kernel
from tests.support.fake_gpu import GPU, fake_gpu
from tests.support.tiny_models import tiny_encoder, tiny_model

LENGTHS = (9, 9, 5, 1)
HALF, FULL = torch.bfloat16, torch.float32
WINDOWS = pytest.mark.parametrize("window", [None, 2])
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")


def at(device: str = "cuda", dtype: torch.dtype = HALF, width: int = 64, dropout: float = 0.0) -> Circumstances:
    return Circumstances(device=device, dtype=dtype, head_width=width, dropout=dropout)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch with the varlen kernel, no flash-attn."""
    monkeypatch.setattr(attention_kernels, "_varlen_function", lambda: reference_varlen)
    monkeypatch.setattr(attention_kernels.importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("circumstances", "name", "reason"),
    [
        (at(), "varlen", "the first choice on a GPU"),
        (at("cpu"), "sdpa", "the only one without a GPU"),
        (at(dtype=FULL), "flex", "computes in bf16 and fp16, not in float32"),
        (at(dropout=0.1), "sdpa", "no dropout on attention weights (0.1 here"),
        (at(width=20), "sdpa", "heads of 20 are not a multiple of 8"),
    ],
)
def test_auto_takes_the_first_that_can_serve_and_says_why_not_the_others(
    circumstances: Circumstances, name: str, reason: str
) -> None:
    choice = choose_kernel("auto", circumstances)
    assert choice.name == name
    assert reason in choice.reason


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("wanted", "circumstances", "message"),
    [
        ("varlen", at("cpu"), "runs on CUDA devices only"),
        ("flash-attn", at(), "not installed"),
        ("flex", at(dropout=0.1), "no dropout"),
        ("varlen", at(dtype=FULL), "not in float32"),
    ],
)
def test_a_kernel_that_cannot_serve_is_refused(wanted: Any, circumstances: Circumstances, message: str) -> None:
    with pytest.raises(
        ConfigError, match=f"model.attention_kernel: {wanted} is not possible here: .*{message}.*use auto"
    ):
        choose_kernel(wanted, circumstances)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("dtype", [torch.float16, FULL])
def test_a_gpu_older_than_ampere_gets_the_one_kernel_that_runs_there(dtype: torch.dtype) -> None:
    """fp16 exists for these GPUs."""
    old = dataclasses.replace(at(dtype=dtype), capability=(7, 5))
    choice = choose_kernel("auto", old)
    assert choice.name == "sdpa"
    assert "no flex: it needs compute capability 8.0, and this GPU has 7.5" in choice.reason
    assert choose_kernel("auto", dataclasses.replace(old, capability=(9, 0))).name != "sdpa"


def test_flash_attn_serves_where_it_is_installed_also_with_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels.importlib.util, "find_spec", lambda name: object())
    assert choose_kernel("auto", at(dropout=0.1)).name == "flash-attn"


def test_an_old_torch_has_no_varlen_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "_varlen_function", lambda: None)
    with pytest.raises(ConfigError, match=f"torch {torch.__version__.split('+')[0]}.* does not have it"):
        choose_kernel("varlen", at())


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_a_model_is_told_its_kernel(family: str) -> None:
    model = tiny_model(family)
    assert choose_attention_kernel(model, "auto", device="cpu", precision="fp32").startswith("attention kernel: sdpa")
    assert model.kernel == "sdpa"
    with pytest.raises(ConfigError, match="CUDA devices only"):
        choose_attention_kernel(model, "varlen", device="cpu", precision="bf16")


def test_attention_dropout_of_a_model_counts() -> None:
    model = tiny_model("bert", attention_probs_dropout_prob=0.1)
    with pytest.raises(ConfigError, match=r"\(0\.1 here"):
        choose_attention_kernel(model, "flex", device="cuda", precision="fp32")


def test_padded_models_keep_transformers_attention() -> None:
    model = tiny_model("deberta-v2")
    assert "padded rows" in choose_attention_kernel(model, "auto", device="cpu", precision="fp32")


def qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, sum(LENGTHS), 16, generator=generator, requires_grad=True) for _ in range(3)]


def answers(kernel: str, window: int | None, *, dropout: float = 0.0) -> list[Tensor]:
    inputs = qkv()
    layout = segment_layout(LENGTHS, device=torch.device("cpu"), kernel=kernel)
    out = segment_attention(*inputs, layout, scale=0.3, dropout=dropout, window=window)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]  # type: ignore[misc]


def reference_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, scale: float,
    window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """As torch documents its varlen attention: (T, h, d), boundaries, inclusive windows, -1 for none."""
    assert torch.equal(cu_q, cu_k)
    assert max_q == max_k == int((cu_q[1:] - cu_q[:-1]).max())
    assert cu_q.dtype == torch.int32
    parts = []
    for begin, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist()):
        a, b, c = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        scores = a @ b.transpose(1, 2) * scale
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)[None, :]
        left, right = window_size
        hidden = (distance > left if left >= 0 else distance > 10**9) | (
            -distance > right if right >= 0 else distance > 10**9
        )
        parts.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ c).transpose(0, 1))
    return torch.cat(parts)


@WINDOWS
def test_torchs_varlen_kernel_is_called_as_documented(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "_varlen_function", lambda: reference_varlen)
    for found, expected in zip(answers("varlen", window), answers("sdpa", window)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@WINDOWS
def test_flash_attn_is_called_as_documented(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        assert not causal
        assert softmax_scale is not None
        seen.append(dropout_p)
        lengths = (max_seqlen_q, max_seqlen_k)
        return reference_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, *lengths, scale=softmax_scale, window_size=window_size
        )

    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    for found, expected in zip(answers("flash-attn", window), answers("sdpa", window)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    answers("flash-attn", window, dropout=0.25)
    assert seen == [0.0, 0.25]


@WINDOWS
def test_flex_masks_what_the_others_mask(window: int | None) -> None:
    """On a CPU FlexAttention computes every block, and only forward: enough to see its mask."""
    layout = segment_layout(LENGTHS, device=torch.device("cpu"), kernel="flex")
    found = segment_attention(*(x.detach() for x in qkv()), layout, scale=0.3, dropout=0.0, window=window)
    torch.testing.assert_close(found, answers("sdpa", window)[0], rtol=1e-5, atol=1e-5)
    assert list(layout.block_masks) == [window]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), window=st.none() | st.integers(0, 30),
    block=st.sampled_from([1, 4, 16]),
)  # fmt: skip
def test_blocks_are_those_that_asking_every_pair_of_tokens_finds(
    lengths: list[int], window: int | None, block: int
) -> None:
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    size = -(-len(segment) // block) * block
    pairs = torch.zeros(size, size, dtype=torch.bool)
    distance = torch.arange(len(segment))[:, None] - torch.arange(len(segment))
    seen = (segment[:, None] == segment) & (distance.abs() <= (size if window is None else window))
    pairs[: len(segment), : len(segment)] = seen
    by_block = pairs.view(size // block, block, size // block, block).transpose(1, 2).flatten(2)
    some, all_ = blocks_seen(lengths, window, block=block)
    assert torch.equal(some, by_block.any(-1))
    assert torch.equal(all_, by_block.all(-1))


@WINDOWS
def test_a_block_mask_is_torchs_own(window: int | None) -> None:
    lengths = (300, 140, 129, 3)
    layout = segment_layout(lengths, device=torch.device("cpu"), kernel="flex")
    ours = layout.block_mask(window)
    theirs = create_block_mask(ours.mask_mod, None, None, sum(lengths), sum(lengths), device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_a_block_mask_is_made_without_waiting_for_a_gpu() -> None:
    with fake_gpu():
        mask = segment_layout((300, 140, 3), device=torch.device("cuda"), kernel="flex").block_mask(64)
        assert mask.kv_indices.device == mask.q_indices.device == GPU


@on_a_gpu
@WINDOWS
@pytest.mark.parametrize("kernel", ["varlen", "flash-attn", "flex"])
def test_kernels_of_this_gpu_agree_with_sdpa(kernel: str, window: int | None) -> None:
    if (obstacle := attention_kernels.why_not(kernel, at(width=16))) is not None:
        pytest.skip(obstacle)
    results = []
    for name, dtype in ((kernel, HALF), ("sdpa", FULL)):
        inputs = [x.detach().to("cuda", dtype).requires_grad_() for x in qkv()]
        layout = segment_layout(LENGTHS, device=torch.device("cuda"), kernel=name)
        out = segment_attention(*inputs, layout, scale=0.3, dropout=0.0, window=window)
        out.float().square().sum().backward()
        results.append([out.float(), *(x.grad.float() for x in inputs)])  # type: ignore[union-attr]
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


@on_a_gpu
@pytest.mark.parametrize("model", [tiny_model("bert"), tiny_model("modernbert"), tiny_encoder()])
def test_models_answer_the_same_on_this_gpu(model: torch.nn.Module) -> None:
    from dstrain.train.device_feed import DeviceFeed
    from tests.support.tiny_models import documents, packed

    batch = packed(documents())
    expected = model(batch)
    model.to("cuda", HALF)
    choose_attention_kernel(model, "auto", device="cuda", precision="bf16")
    [sent] = DeviceFeed("cuda")([batch])
    torch.testing.assert_close(model(sent).float().cpu(), expected, rtol=5e-2, atol=0.3)
