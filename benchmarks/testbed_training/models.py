"""The testbed's models at their shipped sizes, those of the second model, and tiny ones."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from hgc.testbed.scenes import CLASSES, LIGHTS, SHAPES

TEXT_LENGTH = 32
WORDS = ("a", "scene", "with", "and", ",", ".", *LIGHTS, *SHAPES, *CLASSES)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Widths of the four kinds of model; the defaults are what is shipped."""

    vae: tuple[int, ...] = (16, 32, 64)
    text: int = 64
    unet: tuple[int, ...] = (32, 64, 96, 96)
    condition: tuple[int, ...] = (16, 32, 64)
    groups: int = 16


# The second model: with two ControlNets under 12 MB in fp16.
OTHER = Sizes(text=48, unet=(48, 48, 56, 56), condition=(16, 32, 48), groups=8)
TINY = Sizes(vae=(8, 8, 8), text=16, unet=(8, 8, 16, 16), condition=(8, 8, 8), groups=4)

_DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


def make_vae(sizes: Sizes) -> Any:
    """AutoencoderKL, f = 4, 4 latent channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=sizes.vae,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )


def make_unet(sizes: Sizes) -> Any:
    """UNet2DConditionModel with SD1.5's topology: 12 skips, 16 cross-attentions."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=sizes.unet,
        down_block_types=_DOWN,
        up_block_types=_UP,
        layers_per_block=2,
        cross_attention_dim=sizes.text,
        attention_head_dim=4,
        norm_num_groups=sizes.groups,
    )


def make_controlnet(sizes: Sizes) -> Any:
    """ControlNetModel that matches `make_unet`; its condition embedding downsamples by 4."""
    from diffusers import ControlNetModel

    return ControlNetModel(
        block_out_channels=sizes.unet,
        down_block_types=_DOWN,
        layers_per_block=2,
        cross_attention_dim=sizes.text,
        attention_head_dim=4,
        norm_num_groups=sizes.groups,
        conditioning_embedding_out_channels=sizes.condition,
    )


def make_tokenizer() -> Any:
    """A CLIPTokenizer in which every word a caption uses is one token.

    The byte-pair merges are learned from those words until none is left in pieces; other words
    fall into their letters, as with CLIP's own.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
    )
    bpe.train_from_iterator(list(WORDS), trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)
        # The round trip checks that the saved form gives the same tokenizer.
        tokenizer.save_pretrained(folder)
        tokenizer = CLIPTokenizer.from_pretrained(Path(folder))
    for word in WORDS:
        ids = tokenizer(word).input_ids
        if len(ids) != 3:
            raise RuntimeError(f"{word!r} is {len(ids) - 2} tokens, expected 1")
    return tokenizer


def make_text_encoder(sizes: Sizes, tokenizer: Any) -> Any:
    """A two-layer CLIPTextModel."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.text,
            intermediate_size=4 * sizes.text,
            projection_dim=sizes.text,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler(prediction: str = "v_prediction") -> Any:
    """UniPC on SD1.5's noise schedule and spacing.

    The spacing is the one a pipeline of SD1.5 has after
    `UniPCMultistepScheduler.from_config(pipe.scheduler.config)`: its PNDM's "leading".

    prediction: "v_prediction" as SD2.1, the shipped model's, or "epsilon" as SD1.5.
    """
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type=prediction,
        steps_offset=1,
        timestep_spacing="leading",
    )
