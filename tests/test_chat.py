"""Chat templates: what was said is in the text that the model reads, whatever the template takes; or it raises."""

import json
import warnings
from typing import Any

import pytest
import torch
import transformers

import fsteer_lens as fs
from fsteer_lens import models
from fsteer_lens.errors import InputError, TokenizerError
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.chat import ChatTemplate, canonical_arguments
from fsteer_lens.prompts.tokens import answer_ids, prompt_ids, stop_ids, text_ids
from tests.families import tokenizer

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PARTS = (  # as vision-language models have it
    "{% for m in messages %}[{{ m['role'] }}]{% if m['content'][0]['type'] == 'image' %}<image>{% endif %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<eos>"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
DEMANDS = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}" + PLAIN
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role unknown') }}{% endif %}" + PLAIN
SKIPS = PLAIN.replace("[{{", "{% if m['role'] != 'system' %}[{{", 1).replace("<eos>{%", "<eos>{% endif %}{%", 1)
REFUSES_IN_PARTS = REFUSES.replace(PLAIN, PARTS)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}[system]You are Tiny.<eos>{% endif %}" + PLAIN
THINKS = (
    PLAIN.replace("[assistant]{% endif %}", "[assistant]<think>")
    + "{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}{% endif %}"
)
FORGETS_THOUGHTS = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = [{"role": "user", "content": "what is red?"}]
SYSTEM = [{"role": "system", "content": "be kind"}, *USER]


def with_template(template: Any) -> Any:
    tokens = tokenizer()
    tokens.chat_template = template
    return tokens


def text(template: Any, turns: Any = USER, context: str | None = None, arguments: Any = None) -> str:
    return ChatTemplate(with_template(template), canonical_arguments(arguments)).text(turns, context)


@pytest.fixture(scope="module")
def small() -> SteerableModel:
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    hf_model = transformers.LlamaForCausalLM(config)
    return models.from_hf(hf_model, with_template(THINKS), kind="bridge")


# ------------------------------------------------------------------------------------------------ what templates take


@pytest.mark.parametrize("template", [PLAIN, PARTS, SKIPS, REFUSES, DEFAULT_SYSTEM])
def test_what_the_user_says_is_in_the_prompt(template: str) -> None:
    assert text(template).removeprefix("[system]You are Tiny.<eos>") == "[user]what is red?<eos>[assistant]"


@pytest.mark.parametrize("template", [PLAIN, PARTS, DEMANDS])
def test_a_system_message_that_is_taken_stays_one(template: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text(template, SYSTEM) == text(template, USER, "be kind")
        assert text(template, SYSTEM) == "[system]be kind<eos>[user]what is red?<eos>[assistant]"


@pytest.mark.parametrize("template", [REFUSES, SKIPS, REFUSES_IN_PARTS])
@pytest.mark.parametrize("given", [(SYSTEM, None), (USER, "be kind")])
def test_a_system_message_that_is_refused_or_skipped_opens_the_user_turn(template: str, given: Any) -> None:
    with pytest.warns(UserWarning, match="takes no system message"):
        assert text(template, *given) == "[user]be kind\n\nwhat is red?<eos>[assistant]"


def test_a_template_that_demands_a_system_message_is_given_an_empty_one() -> None:
    with pytest.warns(UserWarning, match="demands a system message; it is given an empty one"):
        assert text(DEMANDS) == "[system]<eos>[user]what is red?<eos>[assistant]"


def test_a_context_takes_the_place_of_the_default_system_message_and_stands_before_a_given_one() -> None:
    assert text(DEFAULT_SYSTEM) == "[system]You are Tiny.<eos>[user]what is red?<eos>[assistant]"
    assert "Tiny" not in text(DEFAULT_SYSTEM, USER, "Be brief.")
    own = [{"role": "system", "content": "You are Tiny."}, *USER]
    kept = text(DEFAULT_SYSTEM, own, "Be brief.")  # so what a last-prompt shift holds is the context alone
    assert kept == "[system]Be brief.\n\nYou are Tiny.<eos>[user]what is red?<eos>[assistant]"
    assert text(DEFAULT_SYSTEM, own) == text(DEFAULT_SYSTEM)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}[{{ m['role'] }}]hello<eos>{% endfor %}", "leaves out the turn of 'user'"),
        ("{% for m in messages %}{{ m['content'][:3] }}{% endfor %}", "leaves out the turn of 'user'"),
        ("{% for m in messages %}{{ 1 // 0 }}{% endfor %}", "ZeroDivisionError"),
        ("{% for m in messages %}{{ m['content'].nothing() }}{% endfor %}", "UndefinedError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m['content'] }", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_drops_or_refuses_what_was_said_raises_an_error_of_ours(template: str, words: str) -> None:
    with pytest.raises(TokenizerError, match=words) as caught:
        text(template)
    assert "chat=False" in str(caught.value)


def test_a_text_that_alone_is_dropped_raises_as_well() -> None:
    """The template takes turns of these roles; what it does with this very text is seen afterwards."""
    template = PLAIN.replace("{{ m['content'] }}", "{{ m['content'].replace('red', '') }}")
    assert "blue" in text(template, [{"role": "user", "content": "what is blue?"}])
    with pytest.raises(TokenizerError, match="drops what was said: expected 'what is red"):
        text(template)


def test_thoughts_of_earlier_turns_may_be_left_out() -> None:
    earlier = [*USER, {"role": "assistant", "content": "<think>hm</think>a colour"}, *USER]
    assert "hm" not in (rendered := text(FORGETS_THOUGHTS, earlier)) and "a colour" in rendered


def test_a_plain_prompt_needs_no_template_and_ends_where_the_model_says(small: SteerableModel) -> None:
    """A template that fails has no part in a prompt that does not go through it, nor in what ends an answer."""
    for template in ("{{ raise_exception('never') }}", PARTS, DEMANDS):
        small.tokenizer.chat_template = template
        made = fs.generate(small, "hello", max_new_tokens=2, progress=False)
        assert 1 <= len(made[0].tokens) <= 2 and small.tokenizer.eos_token_id in stop_ids(small)
    small.tokenizer.chat_template = THINKS


# ---------------------------------------------------------------------------------------------------------- arguments


def test_arguments_reach_the_template_and_unknown_ones_raise() -> None:
    assert text(THINKS).endswith("[assistant]<think>")
    assert text(THINKS, arguments={"enable_thinking": False}).endswith("[assistant]<think></think>")
    with pytest.raises(InputError, match="does not know 'enable_thinking'"):
        text(PLAIN, arguments={"enable_thinking": False})
    for name in ("add_generation_prompt", "continue_final_message", "tokenize"):
        with pytest.raises(InputError, match=f"{name!r}, set here"):
            text(PLAIN, arguments={name: True})
    for wrong in ({"tools": [object()]}, "tools", {1: 2}):
        with pytest.raises(InputError, match="chat_template_kwargs"):
            text(PLAIN, arguments=wrong)


def test_tools_are_functions_or_schemas() -> None:
    def add(first: int, second: int) -> int:
        """Add two numbers.

        Args:
            first: one of them.
            second: the other.
        """
        return first + second

    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + PLAIN
    shown = text(template, arguments={"tools": [add]})
    schema = json.loads(canonical_arguments({"tools": [add]}))["tools"]
    assert schema[0]["function"]["name"] == "add" and '"add"' in shown
    assert text(template, arguments={"tools": schema}) == shown
    with pytest.raises(InputError, match="chat_template_kwargs"):
        text(template, arguments={"tools": [lambda first: first]})


def test_several_templates_by_name() -> None:
    named = {"default": PLAIN, "rag": "rag: " + PLAIN}
    assert text(named, arguments={"chat_template": "rag"}) == "rag: " + text(named)
    with pytest.raises(TokenizerError, match="chat template"):
        text({"one": PLAIN, "other": PARTS})


# ------------------------------------------------------------------------------------------------------- continuation


@pytest.mark.parametrize("begun", ["well, i", "<think>let me see", "ends with a blank "])
@pytest.mark.parametrize("template", [PLAIN, PARTS, REFUSES, THINKS])
def test_a_last_assistant_message_is_continued(template: str, begun: str) -> None:
    turns = [*USER, {"role": "assistant", "content": begun}]
    assert text(template, turns) == f"[user]what is red?<eos>[assistant]{begun}"


def test_generate_and_collect_go_on_from_a_begun_answer(small: SteerableModel) -> None:
    turns = [*USER, {"role": "assistant", "content": "well, i"}]
    ids = prompt_ids(small, turns)
    assert small.tokenizer.decode(ids) == "[user]what is red?<eos>[assistant]well, i"
    options: Any = {"max_new_tokens": 4, "progress": False}
    assert fs.generate(small, [turns], **options)[0].tokens == fs.generate(small, [ids], **options)[0].tokens
    read = fs.collect(small, [fs.Contrast(turns, " think", " know")], layer=1, progress=False)
    by_ids = fs.collect(small, [fs.Contrast(ids, " think", " know")], layer=1, progress=False)
    torch.testing.assert_close(read.shifts, by_ids.shifts)
    closed = prompt_ids(small, [*turns, *USER])
    assert small.tokenizer.decode(closed).startswith("[user]what is red?<eos>[assistant]well, i<eos>[user]")


def test_arguments_of_the_template_reach_every_function(small: SteerableModel) -> None:
    given: Any = {"chat": True, "chat_template_kwargs": {"enable_thinking": False}}
    ids = prompt_ids(small, "hello", **given)
    assert small.tokenizer.decode(ids).endswith("<think></think>")
    options: Any = {"max_new_tokens": 3, "progress": False}
    assert fs.generate(small, "hello", **given, **options)[0].tokens == fs.generate(small, [ids], **options)[0].tokens
    assert [token for token, _ in fs.stream(small, "hello", max_new_tokens=3, **given)] == [
        token for token, _ in fs.stream(small, ids, max_new_tokens=3)
    ]
    read = fs.collect_queries(small, ["hello"], layer=1, progress=False, **given)
    torch.testing.assert_close(read.queries, fs.collect_queries(small, [ids], layer=1, progress=False).queries)
    with pytest.raises(InputError, match="no effect on a plain string"):
        fs.generate(small, "hello", chat_template_kwargs={"enable_thinking": False}, **options)


# ---------------------------------------------------------------------------------- rendered before, special tokens


def test_a_chat_that_was_rendered_before_is_taken_as_it_is(tutor_model: SteerableModel) -> None:
    tokens = tutor_model.tokenizer
    rendered = tokens.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    ids = prompt_ids(tutor_model, "what is red?", chat=True)
    assert prompt_ids(tutor_model, rendered) == prompt_ids(tutor_model, rendered, chat=True) == ids
    assert prompt_ids(tutor_model, rendered + "no", chat=True) == [*ids, *answer_ids(tutor_model, "no")]


def test_a_bos_stands_where_the_tokenizer_puts_one_and_nowhere_else() -> None:
    own, none = tokenizer(), tokenizer()
    none.backend_tokenizer.post_processor = None
    bare = own("what", add_special_tokens=False).input_ids
    assert text_ids(own, "what") == own("what").input_ids == [own.bos_token_id, *bare]
    assert text_ids(none, "what") == none("what").input_ids == bare
    assert text_ids(none, "what", True) == [own.bos_token_id, *bare] == text_ids(own, "<bos>what")
    assert text_ids(own, "what", False) == bare
    none.bos_token = None
    assert text_ids(none, "what") == bare
    with pytest.raises(TokenizerError, match="prepend_bos=True"):
        text_ids(none, "what", True)
