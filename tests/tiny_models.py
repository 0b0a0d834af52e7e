"""Models of other architectures, small enough to be made on the spot: real GGUF files with random weights.

What they say is noise, but the same noise for the same tokens: whoever evaluates one token too few, too many or in
another's memory hears something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy

EMBEDDING = 64
LAYERS = 4
HEADS = 4
KV_HEADS = 2
HEAD = EMBEDDING // HEADS
HIDDEN = 128
CONTEXT = 1024
WINDOW = 16  # tokens that a layer with a sliding window looks back on
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
WEIGHTS = gguf.GGMLQuantizationType.Q4_1  # as the default model's: computed alike in batches of every size
ADDED = ("token_types.weight", "position_embd.weight")  # to a token's own vector, and not quantised for it
VOCABULARY = ["<unk>", "<s>", "</s>", *BYTE_TOKENS]

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def write_model(architecture: str, path: Path, pooling: gguf.PoolingType | None = None, seed: int = 1) -> Path:
    """A model of one of ARCHITECTURES or ENCODERS, the same at each call. pooling: made to give embeddings so."""
    writer = gguf.GGUFWriter(path, architecture)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(EMBEDDING)
    writer.add_block_count(LAYERS)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_vocabulary(writer)
    rng = numpy.random.default_rng(seed)
    for name, shape in (ARCHITECTURES | ENCODERS)[architecture](writer):
        values: Any
        if name.endswith("norm.bias"):
            values = numpy.zeros(shape)
        elif "norm" in name or name.endswith("ssm_d"):
            values = numpy.ones(shape)
        elif name.endswith("ssm_a"):
            values = -numpy.tile(numpy.arange(1, shape[1] + 1), (shape[0], 1))
        else:
            values = rng.normal(0, 1.5 / numpy.sqrt(shape[-1]), shape)
        values = values.astype(numpy.float32)
        if name.endswith("weight") and len(shape) == 2 and shape[1] % 32 == 0 and name not in ADDED:
            packed = gguf.quantize(values, WEIGHTS)
            writer.add_tensor(name, packed, raw_shape=packed.shape, raw_dtype=WEIGHTS)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(VOCABULARY)
    writer.add_token_scores([0.0] * len(VOCABULARY))
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * len(BYTE_TOKENS))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(False)


def _ends(norm: str = "output_norm") -> Shapes:
    yield "token_embd.weight", (len(VOCABULARY), EMBEDDING)
    yield f"{norm}.weight", (EMBEDDING,)
    yield "output.weight", (len(VOCABULARY), EMBEDDING)


def _feed_forward(layer: int) -> Shapes:
    yield f"blk.{layer}.ffn_norm.weight", (EMBEDDING,)
    yield f"blk.{layer}.ffn_gate.weight", (HIDDEN, EMBEDDING)
    yield f"blk.{layer}.ffn_up.weight", (HIDDEN, EMBEDDING)
    yield f"blk.{layer}.ffn_down.weight", (EMBEDDING, HIDDEN)


def _attention(layer: int) -> Shapes:
    for part, rows in (("q", EMBEDDING), ("k", KV_HEADS * HEAD), ("v", KV_HEADS * HEAD), ("output", EMBEDDING)):
        yield f"blk.{layer}.attn_{part}.weight", (rows, EMBEDDING)


def _head_norms(layer: int) -> Shapes:
    yield f"blk.{layer}.attn_q_norm.weight", (HEAD,)
    yield f"blk.{layer}.attn_k_norm.weight", (HEAD,)


def _add_attention(writer: gguf.GGUFWriter, kv_heads: int | list[int] = KV_HEADS) -> None:
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(kv_heads)
    writer.add_feed_forward_length(HIDDEN)


def _qwen2(writer: gguf.GGUFWriter) -> Shapes:
    """Attention with biases."""
    _add_attention(writer)
    yield from _ends()
    for layer in range(LAYERS):
        yield f"blk.{layer}.attn_norm.weight", (EMBEDDING,)
        yield from _attention(layer)
        for part, size in (("q", EMBEDDING), ("k", KV_HEADS * HEAD), ("v", KV_HEADS * HEAD)):
            yield f"blk.{layer}.attn_{part}.bias", (size,)
        yield from _feed_forward(layer)


def _gemma3(writer: gguf.GGUFWriter) -> Shapes:
    """Attention over a sliding window."""
    _add_attention(writer)
    writer.add_sliding_window(WINDOW)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    yield from _ends()
    for layer in range(LAYERS):
        yield f"blk.{layer}.attn_norm.weight", (EMBEDDING,)
        yield from _attention(layer)
        yield from _head_norms(layer)
        yield f"blk.{layer}.post_attention_norm.weight", (EMBEDDING,)
        yield from _feed_forward(layer)
        yield f"blk.{layer}.post_ffw_norm.weight", (EMBEDDING,)


def _mamba(writer: gguf.GGUFWriter) -> Shapes:
    """A recurrent state instead of attention."""
    inner, state, rank, kernel = 2 * EMBEDDING, 8, 8, 4
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    yield from _ends()
    for layer in range(LAYERS):
        yield f"blk.{layer}.attn_norm.weight", (EMBEDDING,)
        yield f"blk.{layer}.ssm_in.weight", (2 * inner, EMBEDDING)
        yield f"blk.{layer}.ssm_conv1d.weight", (inner, kernel)
        yield f"blk.{layer}.ssm_conv1d.bias", (inner,)
        yield f"blk.{layer}.ssm_x.weight", (rank + 2 * state, inner)
        yield f"blk.{layer}.ssm_dt.weight", (inner, rank)
        yield f"blk.{layer}.ssm_dt.bias", (inner,)
        yield f"blk.{layer}.ssm_a", (inner, state)
        yield f"blk.{layer}.ssm_d", (inner,)
        yield f"blk.{layer}.ssm_out.weight", (EMBEDDING, inner)


def _lfm2(writer: gguf.GGUFWriter) -> Shapes:
    """A hybrid: every other layer is a short convolution, with a state instead of attention."""
    kernel = 3
    _add_attention(writer, [KV_HEADS if layer % 2 else 0 for layer in range(LAYERS)])
    writer.add_shortconv_l_cache(kernel)
    yield from _ends("token_embd_norm")
    for layer in range(LAYERS):
        yield f"blk.{layer}.attn_norm.weight", (EMBEDDING,)
        if layer % 2:
            yield from _attention(layer)
            yield from _head_norms(layer)
        else:
            yield f"blk.{layer}.shortconv.conv.weight", (EMBEDDING, kernel)
            yield f"blk.{layer}.shortconv.in_proj.weight", (3 * EMBEDDING, EMBEDDING)
            yield f"blk.{layer}.shortconv.out_proj.weight", (EMBEDDING, EMBEDDING)
        yield from _feed_forward(layer)


ARCHITECTURES: dict[str, Callable[[gguf.GGUFWriter], Shapes]] = {
    "qwen2": _qwen2,
    "gemma3": _gemma3,
    "mamba": _mamba,
    "lfm2": _lfm2,
}


def _bert(writer: gguf.GGUFWriter) -> Shapes:
    """Attention in both directions, and a place for each of CONTEXT tokens: it reads, and cannot write."""
    writer.add_head_count(HEADS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_layer_norm_eps(1e-5)
    writer.add_causal_attention(value=False)
    writer.add_token_type_count(2)
    yield "token_embd.weight", (len(VOCABULARY), EMBEDDING)
    yield "token_types.weight", (2, EMBEDDING)
    yield "position_embd.weight", (CONTEXT, EMBEDDING)
    yield from _norm("token_embd_norm")
    for layer in range(LAYERS):
        for part in ("q", "k", "v", "output"):
            yield f"blk.{layer}.attn_{part}.weight", (EMBEDDING, EMBEDDING)
            yield f"blk.{layer}.attn_{part}.bias", (EMBEDDING,)
        yield from _norm(f"blk.{layer}.attn_output_norm")
        for part, rows, columns in (("up", HIDDEN, EMBEDDING), ("down", EMBEDDING, HIDDEN)):
            yield f"blk.{layer}.ffn_{part}.weight", (rows, columns)
            yield f"blk.{layer}.ffn_{part}.bias", (rows,)
        yield from _norm(f"blk.{layer}.layer_output_norm")


def _norm(name: str) -> Shapes:
    yield f"{name}.weight", (EMBEDDING,)
    yield f"{name}.bias", (EMBEDDING,)


ENCODERS: dict[str, Callable[[gguf.GGUFWriter], Shapes]] = {"bert": _bert}
