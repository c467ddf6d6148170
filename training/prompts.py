"""What the teacher is asked to write: instructions about many topics, openings of plain text, and questions of its own.

A prompt is text up to where the teacher goes on. Instructions are ChatML, as the teacher's template writes it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
INSTRUCTIONS = (
    "What is {topic}?",
    "Explain {topic} to a child.",
    "Explain the history of {topic} in a few sentences.",
    "Why does {topic} matter?",
    "Write a short story about {topic}.",
    "Write a poem about {topic}.",
    "Give me five facts about {topic}.",
    "List three advantages and three disadvantages of {topic}.",
    "Write a short email to a friend about {topic}.",
    "How does {topic} relate to {other}?",
    "Compare {topic} and {other}.",
    "What is the difference between {topic} and {other}?",
    "Write a dialogue between two friends about {topic}.",
    "Can you help me understand {topic}? I know little about it.",
    "Give me some tips about {topic}.",
    "What should I know before I learn about {topic}?",
    "Describe {topic} in one sentence.",
    "Write a product description that mentions {topic}.",
    "Suggest a title for an article about {topic} and {other}.",
    "Write a paragraph that uses the words {topic} and {other}.",
    "How would you teach a lesson about {topic}?",
    "Write a step-by-step guide about {topic}.",
    "What are common mistakes people make about {topic}?",
    "Summarize what is known about {topic}.",
    "Tell me a joke about {topic}.",
    "Rewrite this sentence in simpler words: the importance of {topic} can hardly be overstated.",
    "Write a Python function that has to do with {topic}, and explain it.",
    "What questions would you ask an expert on {topic}?",
    "Is {topic} good or bad? Explain.",
    "Write a review of a book about {topic}.",
    "Translate the idea of {topic} into an everyday example.",
    "Imagine a world without {topic}. What would change?",
)
OPENINGS = (
    "{Topic} is",
    "The history of {topic}",
    "In this article, we will look at {topic}",
    "Once upon a time, there was a {topic}",
    "Chapter 1: {Topic}\n\n",
    "# {Topic}\n\n",
    "Question: What is the role of {topic} in {other}?\nAnswer:",
    "The relationship between {topic} and {other} has",
    "When people think of {topic}, they",
    "{Topic} and {other} are",
)
# How often each kind is drawn: instructions, questions the teacher makes up itself, openings, text from nothing.
_KINDS = ("instruction", "own", "opening", "free")
_WEIGHTS = (50, 15, 25, 10)


def chat_start(question: str | None) -> str:
    """ChatML up to the assistant's answer, or up to the user's question where that is the teacher's to write."""
    start = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    return start if question is None else f"{start}{question}<|im_end|>\n<|im_start|>assistant\n"


def draw_prompts(topics: Sequence[str], seed: int) -> Iterator[str]:
    """Prompts without end, the same for the same seed."""
    random_ = random.Random(seed)  # noqa: S311 – variety, not secrecy
    while True:
        topic, other = random_.sample(topics, 2)
        words = {"topic": topic, "Topic": topic.capitalize(), "other": other}
        match random_.choices(_KINDS, _WEIGHTS)[0]:
            case "instruction":
                yield chat_start(random_.choice(INSTRUCTIONS).format(**words))
            case "own":
                yield chat_start(None)
            case "opening":
                yield random_.choice(OPENINGS).format(**words)
            case _:
                yield ""
