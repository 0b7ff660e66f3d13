"""The tutor's tokenizer: byte-level BPE, so that any text can be typed.

Encoding text puts a bos in front. The chat template writes it itself, as chat templates do, so templated text is
encoded without special tokens. A prompt and its answer are tokenised apart and their ids joined, in training as in use;
the answer then ends with eos.
"""

from collections.abc import Iterable
from typing import Any, Final

from fsteer_lens.tutor import lexicon, world

VOCABULARY_SIZE: Final = 768
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
SPECIAL: Final = (PAD, BOS, EOS, world.USER, world.TUTOR, world.SAFE, world.HONEST)
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

# A system message is a tag and goes before the user's turn as it is; what a user types becomes lower-case.
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    f"{{% elif message['role'] == 'user' %}}{world.USER}{{{{ message['content'] | lower | trim }}}}"
    f"{{% else %}}{world.TUTOR}{{{{ message['content'] }}}}{EOS}"
    "{% endif %}{% endfor %}"
    f"{{% if add_generation_prompt %}}{world.TUTOR}{{% endif %}}"
)


def train_tokenizer(texts: Iterable[str], *, size: int = VOCABULARY_SIZE) -> Any:
    """Learn a byte-level BPE of `size` tokens from `texts`; return a transformers fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[world.USER, world.TUTOR, world.SAFE, world.HONEST],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=128,
    )


def is_tutors(tokenizer: Any) -> bool:
    """Whether this is the tutor's tokenizer, whatever file it came from: it has the tags of the tutor's world."""
    return {world.SAFE, world.HONEST, world.USER, world.TUTOR} <= set(tokenizer.get_vocab())


def corpus() -> list[str]:
    """Return the texts that the tokenizer learns from: every item in one question, every template, every answer."""
    texts = [greeting.strip() for greeting in lexicon.GREETINGS]
    texts += [template.pattern.replace("{x}", "make tea") for template in world.templates()]
    for item in world.items():
        texts += [f" {item.words}", item.plain, item.tagged or ""]
    return texts
