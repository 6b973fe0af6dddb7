"""Token ids of HPSv3's texts and a tokenizer folder, for both sides; runs in rsaft's own environment.

python -m benchmarks.reward_parity.hpsv3_ids FOLDER
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen2VLConfig

from benchmarks.reward_parity import problem

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEMPLATE = "\nRate this image for the prompt - {prompt}\n\n\nOverall: <|Reward|>\n\nEND\n"
TOKENS = 256  # of 448 x 448 pixels
SIZES = {  # of the tiny network: both sides
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
VISION = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
SECTIONS = [2, 3, 3]  # of the rotary positions: half of a head's 16 values


def main() -> None:
    folder: Path = problem.arguments(__doc__).folder / "hpsv3"
    words = Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    words.add_tokens(list(SPECIAL), special_tokens=True)
    words.save_pretrained(folder / "base")
    image = words.convert_tokens_to_ids("<|image_pad|>")
    text = {**SIZES, "vocab_size": len(words) + 8, "bos_token_id": None, "eos_token_id": 0}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": SECTIONS, "rope_theta": 1e6}
    Qwen2VLConfig(text_config=text, vision_config=VISION, image_token_id=image).save_pretrained(folder / "base")
    words.add_tokens(["<|Reward|>"], special_tokens=True)
    texts = [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * TOKENS
        + f"<|vision_end|>{TEMPLATE.replace('{prompt}', prompt)}<|im_end|>\n<|im_start|>assistant\n"
        for prompt in problem.PROMPTS
    ]
    facts = {
        "ids": [words.encode(text) for text in texts],
        "rows": len(words),  # HPSv3 cuts the embeddings to this
        "image": image,
        "reward": words.convert_tokens_to_ids("<|Reward|>"),
        "template": TEMPLATE,
        "text": SIZES,
        "vision": VISION,
        "sections": SECTIONS,
    }
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
