"""Which characters of a rendered chat are the assistant's, against transformers and by hand."""

import json
from pathlib import Path

import pytest
from jinja2 import Template
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from experiments.data import DataConfig, load_token_data, template_process, templates
from tests.tiny import BOS, CHATML, make_tokenizer

# As Qwen3: reasoning stays in the last answer only, which always has a block of it.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}{% if loop.index0 > ns.last %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' }}\n</think>\n\n"
    "{% endif %}{{ parts[-1].lstrip('\\n') }}{% else %}{{ m['content'] }}{% endif %}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
# As DeepSeek R1's distils: the prompt opens the reasoning.
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
MARKED = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>"
    "{% endif %}\n{% endfor %}"
)
# As Mistral's: what comes first is written before the last question only.
LATE_SYSTEM = (
    "{% for m in messages %}{% if loop.last or loop.index0 == messages | length - 2 %}"
    "{% if m['role'] == 'user' %}[SYSTEM] {% endif %}{% endif %}{{ m['role'] }}: "
    "{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# As DeepSeek V3 and R1's distils: calls are written only where the content is none.
CALLS = (
    "{% for m in messages %}{% if m['content'] is none %}[A]{% for c in m['tool_calls'] %}"
    "<call>{{ c['function']['name'] }}({{ c['function']['arguments']['of'] }})</call>{% endfor %}"
    "</s>{% elif m['role'] == 'assistant' %}[A]{{ m['content'] }}</s>"
    "{% else %}[{{ m['role'] }}]{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)
OPENED = CALLS.replace("prompt %}[A]", "prompt %}[A]<think>\n")
# Writes what it gets, "None" too.
WRITTEN = CALLS.replace("m['content'] is none", "m['tool_calls']").replace(
    "[A]{% for", "[A]{{ m['content'] }}{% for"
)
JOINED = WRITTEN.replace("[A]{{ m['content'] }}{% for", "[A]{{ '' + m['content'] }}{% for")

REASONED = "<think>\nAs they met.\n</think>\n\nHello."
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello."},
]


def targets(tokenizer: PreTrainedTokenizerFast, folder: Path, row: dict, **changes) -> list[str]:
    """Pieces of text that count."""
    path = folder / "c.jsonl"
    path.write_text(json.dumps(row) + "\n")
    settings = {"eval_rows": 0, "packing": False, "sequence_length": 400} | changes
    train = load_token_data(DataConfig(path=str(path), **settings), tokenizer).train
    pieces, last = [], -2
    for place in train.loss_mask[0].nonzero()[0].tolist():
        if place > last + 1:
            pieces.append([])
        pieces[-1].append(int(train.tokens[0, place]))
        last = place
    return [tokenizer.decode(piece) for piece in pieces]


def reasoning(*contents: str) -> dict:
    answers = iter(contents)
    return {"messages": [m | {"content": next(answers)} if i % 2 else m for i, m in ENUMERATED]}


ENUMERATED = list(enumerate(CHAT))


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        (
            QWEN3,
            reasoning("Hello.", "Hello."),
            ["Hello.</s>\n", "<think>\n\n</think>\n\nHello.</s>\n"],
        ),
        (QWEN3, reasoning(REASONED, REASONED), ["Hello.</s>\n", f"{REASONED}</s>\n"]),
        (THINKING, reasoning("Hello.", "Hello."), ["Hello.</s>\n"] * 2),
        (THINKING, reasoning("Hi", REASONED), ["Hi</s>\n", REASONED[8:] + "</s>\n"]),
        (LATE_SYSTEM, reasoning(" Hello.\n", "Bye."), ["Hello.</s>", "Bye.</s>"]),
        (CHATML, {"messages": CHAT[1:]}, ["Hello.</s>\n"] * 2),
        (MARKED, reasoning("Hello.", REASONED), ["Hello.</s>", f"{REASONED}</s>"]),
    ],
    ids=["qwen3", "qwen3 reasons", "r1", "r1 reasons", "late system", "begins", "marked"],
)
def test_exactly_the_answers_count(tmp_path, template, row, expected):
    tokenizer = make_tokenizer(begin=False, template=template)
    assert targets(tokenizer, tmp_path, row) == expected


@pytest.mark.parametrize("loss", ["answers", "all"])
@pytest.mark.parametrize(
    "template", [CALLS, OPENED, WRITTEN, JOINED], ids=["none", "opened", "written", "fails"]
)
def test_calls_without_content_are_written_as_the_template_can(tmp_path, template, loss):
    call = {"type": "function", "function": {"name": "age", "arguments": {"of": "None"}}}
    row = {
        "messages": [
            CHAT[0],
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "7"},
            CHAT[1],
        ]
    }
    tokenizer = make_tokenizer(begin=False, template=template)
    content = None if template in (CALLS, OPENED) else ""
    messages = [row["messages"][0], row["messages"][1] | {"content": content}, *row["messages"][2:]]
    whole = Template(template).render(messages=messages)
    assert "[A]<call>age(None)</call></s>" in whole
    expected = ["<call>age(None)</call></s>", "Hello.</s>"]
    if loss == "all":
        expected = [whole[1:]]  # nothing predicts the first token
    assert targets(tokenizer, tmp_path, row, loss=loss) == expected


def test_answers_that_cannot_be_found_are_named_with_a_remedy_that_helps(tmp_path):
    # Keeps the last answer only.
    last = "{{ messages[-1]['content'] }}</s>"
    tokenizer = make_tokenizer(begin=False, template=last)
    with pytest.raises(ValueError, match=r"answer 1 cannot be found in the text: use --data\.loss"):
        targets(tokenizer, tmp_path, {"messages": CHAT})
    row = {"messages": [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]]}
    with pytest.raises(ValueError, match=r"answer 1 .*: remove the weight 0, or use conversa"):
        targets(tokenizer, tmp_path, row, loss="all")


def test_marks_of_a_template_are_transformers(tmp_path):
    tokenizer = make_tokenizer(begin=False, template=MARKED)
    expected = tokenizer.apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": CHAT}))
    train = load_token_data(DataConfig(path=str(path), eval_rows=0), tokenizer).train
    count = len(expected["input_ids"])
    assert train.tokens[0, :count].tolist() == expected["input_ids"]
    assert train.loss_mask[0, :count].tolist() == [bool(m) for m in expected["assistant_masks"]]
    assert not train.loss_mask[0, count:].any()
    # "weight" is a key of ours alone.
    unweighted = [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]]
    assert targets(tokenizer, tmp_path, {"messages": unweighted}) == ["Hello.</s>"]


@pytest.mark.parametrize("template", [QWEN3, THINKING], ids=["qwen3", "r1"])
def test_prompts_end_where_answers_begin(tmp_path, template):
    tokenizer = make_tokenizer(begin=False, template=template)
    row = reasoning("Hello.", REASONED)
    whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    prompt = tokenizer.apply_chat_template(CHAT[:3], tokenize=False, add_generation_prompt=True)
    assert targets(tokenizer, tmp_path, row)[-1] == whole.removeprefix(prompt)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 10 ** 10 }}", "asks for more than 1 GB"),
        ("{{ [7] * 10 ** 9 }}", "asks for more than 1 GB"),
        ("{{ 'a' | center(10 ** 10) }}", "asks for more than 1 GB"),
        ("{{ 'a\\nb' | indent(10 ** 10) }}", "asks for more than 1 GB"),
        ("{{ '%99999999999d' % 5 }}", "asks for more than 1 GB"),
        ("{{ '{:>9999999999}'.format(5) }}", "asks for more than 1 GB"),
        ("{{ ('a' * 10 ** 8).replace('a', 'aaaaaaaaaaaa') }}", "asks for more than 1 GB"),
        ("{{ (range(99999) | list) | join('a' * 10 ** 5) }}", "asks for more than 1 GB"),
        ("{{ 'a'.rjust(2 ** 28) }}", "writes 268,435,456 characters, at most 134,217,728"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{{ messages[7]['content'] }}", "has no element 7"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('no\\nway') }}", "no way"),
        ("{{ messages[0]['content'].encode('ascii') }}{{ 1 // 0 }}", "Error"),
    ],
    ids=lambda text: text[:30],
)
def test_failing_templates_are_one_line(tmp_path, template, expected):
    tokenizer = make_tokenizer(begin=False, template=template)
    with pytest.raises(ValueError, match=rf"c\.jsonl, row 1: .*{expected}") as caught:
        targets(tokenizer, tmp_path, {"messages": CHAT})
    assert "\n" not in str(caught.value)


DOUBLED = "{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}"
NESTED = "{% set n = namespace(x=1) %}" + DOUBLED
LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        # Single calls of C code, which no exception in Python can end.
        NESTED + "{{ {n.x: 1} | length }}",
        "{{ ('a' ~ '-' * 10 ** 6) | wordwrap }}",
        "{{ 9 ** (9 ** 9) }}",
    ],
    ids=["loop", "hash", "regular expression", "power"],
)
def test_templates_have_a_time_limit(tmp_path, monkeypatch, template):
    # No template that wants a whole conversation, but one that is slow on some.
    slow = f"{{% if messages | length < 4 %}}{template}{{% endif %}}{CHATML}"
    tokenizer = make_tokenizer(begin=False, template=CHATML)
    assert targets(tokenizer, tmp_path, {"messages": CHAT}) == ["Hello.</s>\n"] * 2
    monkeypatch.setattr(templates, "_SECONDS", 0.2)
    tokenizer.chat_template = slow
    with pytest.raises(ValueError, match=r"row 1: the chat template did not finish in 0\.2 s"):
        targets(tokenizer, tmp_path, {"messages": CHAT})


def test_a_template_that_ends_its_process_is_one_line(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text("import os; os.kill(os.getpid(), 11)")
    monkeypatch.setattr(template_process, "_PROGRAM", program)
    monkeypatch.setattr(templates, "_PROCESS", template_process.TemplateProcess())
    tokenizer = make_tokenizer(begin=False, template=CHATML)
    with pytest.raises(ValueError, match=r"row 1: .* ended the process .* \(signal 11\): repair"):
        targets(tokenizer, tmp_path, {"messages": CHAT})


def test_memory_that_grows_bit_by_bit_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "_GIGABYTES", 0.1)
    doubling = "{% set n.x = n.x ~ n.x %}"
    template = "{% set n = namespace(x='a') %}{% for i in range(99) %}" + doubling + "{% endfor %}"
    tokenizer = make_tokenizer(begin=False, template=template)
    with pytest.raises(ValueError, match=r"row 1: the chat template asks for more than 0\.1 GB"):
        targets(tokenizer, tmp_path, {"messages": CHAT})


BLANKS = "name        value\nx = 1    # note\n    y"


@pytest.mark.parametrize("kind", ["chat", "alpaca", "roberta"])
def test_blanks_of_an_answer_count_where_offsets_omit_them(tmp_path, kind):
    tokenizer = make_tokenizer(begin=False, template=CHATML)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = (
        processors.RobertaProcessing(("</s>", 2), ("<s>", BOS), add_prefix_space=False)
        if kind == "roberta"
        else processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    )
    before = backend.post_processor.__getstate__()
    row = {"messages": [CHAT[0], {"role": "assistant", "content": BLANKS}]}
    if kind != "chat":
        row = {"instruction": "Hello.", "output": BLANKS}
    end = "</s>\n" if kind == "chat" else "</s>"
    assert targets(tokenizer, tmp_path, row) == [BLANKS + end]
    assert backend.post_processor.__getstate__() == before
