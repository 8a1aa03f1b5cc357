"""The tokenizer and the two Llama bases (untrained), in standard Hugging Face form.

Knows the sizes and the chat template; nothing about training data beyond the instruction words.
"""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.tiny.tasks import INSTRUCTIONS, SEPARATOR

PAD, BOS, EOS, UNK, ANSWER = "<pad>", "<s>", "</s>", "<unk>", "<|answer|>"
MAX_POSITIONS = 512

# A chat is its last user message: the bases know single questions, no dialogue.
CHAT_TEMPLATE = (
    "{%- set ns = namespace(text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{%- set ns.text = message['content'] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{{- bos_token + ns.text -}}"
    "{%- if add_generation_prompt -%}{{- '" + ANSWER + "' -}}{%- endif -%}"
)

# Heads are 32 wide because vLLM's attention kernels accept no narrower ones.
SHAPES: dict[str, dict[str, int]] = {
    "large": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4},
    "small": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3},
}
HEAD_DIM = 32


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Characters (printable ASCII and newline), with instruction words and `` ; `` as one token.

    An instruction is one token only at the start of a segment and with its space, so the word in
    ``reverse reverse`` stays letters. Decoding the ids gives the text back unchanged.
    """
    words = [PAD, BOS, EOS, UNK, ANSWER, SEPARATOR, *(f"{word} " for word in INSTRUCTIONS)]
    words += [chr(code) for code in range(32, 127)] + ["\n"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    start = rf"(?:^|(?<={SEPARATOR}))(?:{'|'.join(INSTRUCTIONS)}) "
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{start}|{SEPARATOR}|[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([PAD, BOS, EOS, UNK, ANSWER])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


def make_base(size: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A randomly initialised base of ``size`` ("large" or "small"), in float32."""
    torch.manual_seed(seed)
    heads = SHAPES[size]["hidden_size"] // HEAD_DIM
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **SHAPES[size],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)
