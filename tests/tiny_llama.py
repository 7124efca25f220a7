"""A Llama of random weights, and a tokenizer for which white space counts."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LINES = ["a good film, a bad film and an odd one", "the review: was it good or bad? answer: good"] * 9

CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(context: int = 512, lines: list[str] = LINES, size: int = 320) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE as that of GPT-2, trained on a few lines."""
    model = Tokenizer(BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="</s>", bos_token="</s>", pad_token="</s>", model_max_length=context
    )


def write_llama_family(folder: Path) -> dict:
    """Write a base model and two tasks near it, named llama, and questions; return the values of a recipe."""
    network = LlamaForCausalLM.from_pretrained(write_llama(folder / "llama"))
    for task in "ab":
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        network.save_pretrained(folder / f"llama-{task}")
        tokenizer().save_pretrained(folder / f"llama-{task}")
    rows = [("was it good?", "a"), ("a bad film", "b"), ("the film", "good")]
    lines = [json.dumps({"question": question, "text": answer}) for question, answer in rows]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    data = {"dataset": "./questions.jsonl", "prompt_column": "question"}
    return {
        "schema": 1, "base_model": "./llama", "method": "average",
        "tasks": [{"name": task, "model": f"./llama-{task}"} for task in "ab"],
        "evaluation": {"evaluator": "log-likelihood", "tasks": {"a": data, "b": dict(data)}},
        "output": {"path": "answers"},
    }  # fmt: skip


def write_llama(folder: Path, *, seed: int = 0, context: int = 512, dtype=torch.float32, words=None) -> Path:
    """Write a model and its tokenizer into `folder`."""
    torch.manual_seed(seed)
    words = words or tokenizer(context)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=context, bos_token_id=0, eos_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
