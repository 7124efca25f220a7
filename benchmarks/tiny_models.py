"""Tiny models of many architectures, with random weights, from configs of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

_TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {**_TEXT, "intermediate_size": 48, "max_position_embeddings": 40}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_SEQUENCE = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_MOE = {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
_IMAGE_TEXT = {"image_token_id": 63, "image_token_index": 63}


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[5, 9, 3, 7, 11, 2]])}


def _pairs() -> dict[str, Tensor]:
    return {**_tokens(), "decoder_input_ids": torch.tensor([[1, 8, 4]])}


def _pixels(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)}


def _both() -> dict[str, Tensor]:
    return {**_tokens(), **_pixels()}


def _speech() -> dict[str, Tensor]:
    features = torch.linspace(-1, 1, 8 * 40).reshape(1, 8, 40)
    return {"input_features": features, "decoder_input_ids": torch.tensor([[1, 8, 4]])}


def _wave() -> dict[str, Tensor]:
    return {"input_values": torch.linspace(-1, 1, 400).reshape(1, 400)}


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers, a tiny config for it, and inputs.

    Attributes:
        kind: What it is, for the table.
        model: Name of the class.
        config: Values of its config.
        inputs: Makes the arguments of a call.
    """

    kind: str
    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[], dict[str, Tensor]] = _tokens

    def build(self, seed: int) -> Any:
        """Return the model with random weights, ready to compute."""
        torch.manual_seed(seed)
        model_class = getattr(transformers, self.model)
        model = model_class(model_class.config_class(**self.config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # some begin as zeros or ones, which hide mistakes
                parameter.add_(0.02 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if name.endswith("running_var"):
                    buffer.add_(torch.rand_like(buffer))
        return model


ARCHITECTURES: Mapping[str, Architecture] = {
    "bert": Architecture("encoder, tied head", "BertForMaskedLM", _ENCODER),
    "roberta": Architecture("encoder", "RobertaForSequenceClassification", _ENCODER),
    "distilbert": Architecture(
        "encoder", "DistilBertForSequenceClassification",
        {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    ),
    "albert": Architecture("encoder, shared layers", "AlbertForMaskedLM", {**_ENCODER, "embedding_size": 16}),
    "deberta-v2": Architecture(
        "encoder", "DebertaV2ForSequenceClassification",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "modernbert": Architecture(
        "encoder, tied head", "ModernBertForMaskedLM", {**_ENCODER, "pad_token_id": 0},
    ),
    "llama": Architecture("decoder", "LlamaForCausalLM", _DECODER),
    "llama-tied": Architecture(
        "decoder, tied head", "LlamaForCausalLM", {**_DECODER, "tie_word_embeddings": True},
    ),
    "mistral": Architecture("decoder", "MistralForCausalLM", _DECODER),
    "qwen2": Architecture(
        "decoder, tied head", "Qwen2ForCausalLM", {**_DECODER, "tie_word_embeddings": True},
    ),
    "qwen3": Architecture("decoder", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 8}),
    "gemma2": Architecture("decoder, tied head", "Gemma2ForCausalLM", {**_DECODER, "head_dim": 8}),
    "gpt2": Architecture(
        "decoder, tied head, convolutions", "GPT2LMHeadModel",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
    ),
    "gpt-neox": Architecture("decoder", "GPTNeoXForCausalLM", _ENCODER),
    "opt": Architecture(
        "decoder, tied head", "OPTForCausalLM",
        {**_TEXT, "ffn_dim": 48, "max_position_embeddings": 40, "word_embed_proj_dim": 32},
    ),
    "phi3": Architecture("decoder, fused", "Phi3ForCausalLM", _DECODER),
    "bloom": Architecture(
        "decoder, tied head, fused", "BloomForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "mamba": Architecture(
        "state space, tied head", "MambaForCausalLM",
        {**_TEXT, "state_size": 4, "tie_word_embeddings": True},
    ),
    "mixtral": Architecture("mixture of experts", "MixtralForCausalLM", {**_DECODER, "num_local_experts": 4}),
    "qwen2-moe": Architecture(
        "mixture of experts", "Qwen2MoeForCausalLM", {**_MOE, "shared_expert_intermediate_size": 24}
    ),
    "qwen3-moe": Architecture("mixture of experts", "Qwen3MoeForCausalLM", _MOE),
    "gpt-oss": Architecture(
        "mixture of experts", "GptOssForCausalLM", {**_MOE, "num_local_experts": 4, "intermediate_size": 16}
    ),
    "deepseek-v3": Architecture(
        "mixture of experts", "DeepseekV3ForCausalLM",
        {
            **_DECODER, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "n_group": 2, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
        },
    ),
    "t5": Architecture("encoder-decoder, tied", "T5ForConditionalGeneration", _T5, _pairs),
    "t5-untied": Architecture(
        "encoder-decoder", "T5ForConditionalGeneration",
        {**_T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}, _pairs,
    ),
    "bart": Architecture("encoder-decoder, tied", "BartForConditionalGeneration", _SEQUENCE, _pairs),
    "marian": Architecture("encoder-decoder, tied", "MarianMTModel", _SEQUENCE, _pairs),
    "whisper": Architecture(
        "speech to text, tied", "WhisperForConditionalGeneration",
        {**_SEQUENCE, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40}, _speech,
    ),
    "wav2vec2": Architecture(
        "speech, weight norm", "Wav2Vec2ForCTC",
        {
            **_ENCODER, "vocab_size": 32, "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4),
            "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
        },
        _wave,
    ),
    "vit": Architecture("vision", "ViTForImageClassification", _VISION, _pixels),
    "deit": Architecture("vision", "DeiTForImageClassification", _VISION, _pixels),
    "beit": Architecture("vision", "BeitForImageClassification", {**_VISION, "vocab_size": 64}, _pixels),
    "dinov2": Architecture("vision", "Dinov2ForImageClassification", {**_VISION, "mlp_ratio": 2}, _pixels),
    "swin": Architecture(
        "vision, position indexes", "SwinForImageClassification",
        {
            "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
            "window_size": 4,
        },
        _pixels,
    ),
    "segformer": Architecture(
        "vision", "SegformerForImageClassification",
        {"depths": [1] * 4, "hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 2, 2, 4]}, _pixels,
    ),
    "convnext": Architecture(
        "vision, convolutions", "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32}, _pixels,
    ),
    "resnet": Architecture(
        "vision, batch norm", "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}, _pixels,
    ),
    "clip": Architecture(
        "image and text", "CLIPModel",
        {
            "text_config": {**_DECODER, "projection_dim": 16}, "projection_dim": 16,
            "vision_config": {**_VISION, "projection_dim": 16},
        },
        _both,
    ),
    "siglip": Architecture(
        "image and text", "SiglipModel",
        {"text_config": {**_DECODER, "projection_size": 32}, "vision_config": _VISION}, _both,
    ),
    "llava": Architecture(
        "vision and language", "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_DECODER},
            "vision_config": {"model_type": "clip_vision_model", **_VISION}, **_IMAGE_TEXT,
                "vision_feature_layer": -1,
        },
    ),
    "qwen2-vl": Architecture(
        "vision and language", "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**_DECODER, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                            "mrope_section": [1, 1, 2]}},
            "vision_config": {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 4,
                "patch_size": 8},
            **_IMAGE_TEXT,
        },
    ),
    "qwen2.5-vl": Architecture(
        "vision and language", "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**_DECODER, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                            "mrope_section": [1, 1, 2]}},
            "vision_config": {"hidden_size": 32, "depth": 2, "num_heads": 4, "intermediate_size": 48,
                              "out_hidden_size": 32, "patch_size": 8},
            **_IMAGE_TEXT,
        },
    ),
    "gemma3": Architecture(
        "vision and language, tied", "Gemma3ForConditionalGeneration",
        {"text_config": {**_DECODER, "head_dim": 8}, "vision_config": {**_VISION, "vision_use_head": False},
         "image_token_index": 63, "mm_tokens_per_image": 4},
    ),
}  # fmt: skip
