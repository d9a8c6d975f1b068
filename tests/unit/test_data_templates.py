"""Chat templates: the learnt text has the whole answer once, or the template is named as the reason why not."""

from __future__ import annotations

import pytest
from data_support import CHATML, byte_tokenizer, encode, encoder

from ds_agsel.errors import ConfigError, DataError

OPEN = "{% if add_generation_prompt %}[A]{% endif %}"
# As DeepSeek-R1-Distill's: the reasoning is cut out of the answer.
CUTS = (
    "{% for m in messages %}{% if m.role == 'user' %}[U]{{ m.content }}{% else %}"
    "[A]{{ m.content.split('</think>')[-1] }}[end]{% endif %}{% endfor %}" + OPEN
)
CUTS_AND_OPENS = CUTS.replace("}[A]{% endif", "}[A]<think>\n{% endif")
# As Qwen3's: an empty reasoning is put in, and a given one is written anew.
WRITES = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 }}\n</think>\n\n"
    "{{ parts[-1].strip() }}{% else %}{{ m.content }}{% endif %}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As vision-language models': contents are lists of parts.
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{{ part.text }}{% endfor %}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TRIMS = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
THINKING = "<think>add</think>4"


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        (CHATML, "4", ("[user]2+2?[end][assistant]", "4[end]")),
        (CHATML, "Write [end] and go on.", ("[user]2+2?[end][assistant]", "Write [end] and go on.[end]")),
        (CHATML, "a[end]", ("[user]2+2?[end][assistant]", "a[end][end]")),
        (TRIMS, " 4 ", ("[user]2+2?[end][assistant]", "4[end]")),
        (CUTS, "4", ("[U]2+2?[A]", "4[end]")),
        (CUTS, THINKING, ("[U]2+2?[A]", "<think>add</think>4[end]")),
        (CUTS_AND_OPENS, THINKING, ("[U]2+2?[A]<think>\n", "add</think>4[end]")),
        (WRITES, "think", ("[user]2+2?[end]\n[assistant]", "<think>\n\n</think>\n\nthink[end]")),
        (WRITES, THINKING, ("[user]2+2?[end]\n[assistant]", "<think>\nadd\n</think>\n\n4[end]")),
        (PARTS, "4", ("[user]2+2?[end][assistant]", "4[end]")),
    ],
)
def test_the_whole_answer_is_learnt_once(template: str, answer: str, expected: tuple[str, str]) -> None:
    assert encoder(byte_tokenizer(template), use_chat_template=True).render("2+2?", answer) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{% endfor %}", "the chat template leaves out the user's turn"),
        ("{{ raise_exception('no\ntalk.') }}", "the chat template refuses it: no. Use --chat-template=never"),
        ("{{ messages[0].content + 1 }}", "the chat template refuses it: "),
        ("{% for m in messages %}", "the chat template refuses it: "),
    ],
)
def test_a_template_that_can_not_be_used_is_named_before_the_first_row(template: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        encoder(byte_tokenizer(template), use_chat_template=True)
    text = str(caught.value)
    assert text.startswith("The tokenizer's chat template can't be used: ") and message in text and "\n" not in text


def test_a_template_that_takes_no_system_turn_is_named() -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    encoder(byte_tokenizer(refuses + CHATML), use_chat_template=True)
    with pytest.raises(ConfigError, match="refuses it: System role not supported"):
        encoder(byte_tokenizer(refuses + CHATML), use_chat_template=True, system="be kind")
    drops = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(ConfigError, match="leaves out the system's turn"):
        encoder(byte_tokenizer(drops), use_chat_template=True, system="be kind")


def test_a_template_that_refuses_one_row_is_named_with_the_row() -> None:
    picky = "{% for m in messages if m.content == 'no' %}{{ raise_exception('not that') }}{% endfor %}" + CHATML
    chat = encoder(byte_tokenizer(picky), use_chat_template=True)
    rows = [{"question": "a", "answer": "1"}, {"question": "no", "answer": "1"}]
    with pytest.raises(DataError, match=r"^Row 2 of the train split can't be used: .* refuses it: not that"):
        encode(rows, chat)


def test_a_template_that_repeats_the_answer_only_opens_the_turn() -> None:
    twice = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% if m.role == 'assistant' %} {{ m.content }}{% endif %}"
    )
    chat = encoder(byte_tokenizer(twice), use_chat_template=True)
    assert chat.render("q", "It is four, I say.")[1] == "It is four, I say.[end]"
