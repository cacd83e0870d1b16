"""The prompts of the demo: two questions on long texts that begin alike.

Layer: L5.
"""

from importlib import resources
from typing import Any, Final

COLD: Final = "cold"
SHARED: Final = "shared"
_BREAK: Final = "Section 8."
_ASK: Final = {
    COLD: "What does this text say about the House of Representatives and the Senate? "
    "Answer in a short paragraph.",
    SHARED: "Explain in your own words how the President is chosen and what his duties are.",
}


def text_of(name: str) -> str:
    """Return a prompt as a user writes it: a document and a question.

    The first is Article I of the Constitution of the United States. The second has Sections 1 to 7
    of it in common, and goes on with Article II.
    """
    folder = resources.files("kvfs.demo") / "data"
    document = (folder / "article1.txt").read_text(encoding="ascii")
    if name == SHARED:
        head, _, _ = document.partition(_BREAK)
        document = head + (folder / "article2.txt").read_text(encoding="ascii")
    return f"{document}\n{_ASK[name]}"


def token_ids(tokenizer: Any, name: str) -> list[int]:
    """Return a prompt's tokens, in the chat form that the model was trained on."""
    chat = [{"role": "user", "content": text_of(name)}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
