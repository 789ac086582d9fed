"""An OWLv2 of random weights, small enough for a test, stored as the real one is."""

from pathlib import Path

import random_clip
import torch
from transformers import Owlv2Config, Owlv2ForObjectDetection
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

SIZE = random_clip.SIZE


def save_owl(folder: Path) -> Owlv2ForObjectDetection:
    """Two layers a tower, patches of 8: sixteen boxes. Tokenizer and preprocessing lie with it."""
    random_clip.save_processor(folder)
    small = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {"vocab_size": random_clip.END + 1, "bos_token_id": random_clip.END - 1, "eos_token_id": random_clip.END}
    text = {"hidden_size": 32, "pad_token_id": 0, "max_position_embeddings": 40, **words, **small}
    vision = {"hidden_size": 24, "image_size": SIZE, "patch_size": 8, **small}
    torch.manual_seed(1)
    model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=32)).eval()
    random_clip.shake(model)
    model.save_pretrained(folder)
    Owlv2ImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return model
