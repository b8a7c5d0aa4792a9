"""Chat templates: those of real models write what they always wrote; those that would loop, grow or nest for ever end with one sentence."""

import contextlib
import resource
import sys
import threading
import time

import pytest

from kvcast import InputError, KvcastError, Llama, ModelError
from kvcast.chat.conversation import Conversation
from kvcast.limits import Limits
from kvcast.llama.template import ChatTemplate
from places import ROOT
from shapes import write_shape

sys.path.insert(0, str(ROOT / "scripts"))
from llama_cpp import llama_chat_format
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

import vendor

SMALL = Limits(template_seconds=0.5, template_characters=1 << 20)
DOUBLED = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ %s }}"
BIG = "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(16) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"  # half of what is allowed
ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "loops that pass over all": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "loops in filters": "{% for a in range(99999) %}{% set x = range(99999)|map('string')|list|length %}{% endfor %}",
    "tests in filters": "{% set x = range(99999)|list %}{{ x|select('in', x)|list|length }}",
    "large range": "{{ range(10**9)|list|length }}",
    "text times": "{{ 'x' * 10**10 }}",
    "times text": "{{ 10**10 * 'x' }}",
    "list times": "{{ ([0] * 10**10)|length }}",
    "list times, twice": "{{ (([0] * 10000) * 10000)|length }}",
    "power": "{{ 10**(10**10) }}",
    "power of a power": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "shifted by rounding": "{{ 1.5|round(1000000000, 'ceil') }}",
    "width of a format": "{{ '%1000000000d' % 1 }}",
    "precision of a format": "{{ '%.1000000000f' % 1.0 }}",
    "width from a value": "{{ '%*d' % (1000000000, 1) }}",
    "format filter": "{{ '%1000000000s'|format('x') }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "format method, nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format_map": "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
    "format of one many times": BIG + "{{ ('%(a)s' * 10000) % {'a': ns.x} }}",
    "format method of one many times": BIG + "{{ ('{0}' * 10000).format(ns.x) }}",
    "center": "{{ 'x'.center(1000000000) }}",
    "center filter": "{{ 'x'|center(1000000000) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "attr": "{{ ('x'|attr('center'))(1000000000) }}",
    "translate": "{{ 'xxxx'.translate({120: 'y' * 1000}) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big')|length }}",
    "replace": BIG + "{{ ns.x.replace('x', ns.x) }}",
    "replace filter": BIG + "{{ ns.x|replace('x', ns.x) }}",
    "replace nothing": BIG + "{{ ns.x.replace('', ns.x) }}",
    "join": BIG + "{{ ns.x.join(['x'] * 100000) }}",
    "join filter": BIG + "{{ (['x'] * 100000)|join(ns.x) }}",
    "join of one many times": BIG + "{{ ([ns.x] * 100000)|join }}",
    "join of a generator": BIG + "{{ range(99999)|map('replace', '0', ns.x)|join }}",
    "indent": BIG + "{{ ('\n' * 10000)|indent(1000000000) }}",
    "indent with a text": BIG + "{{ ('\n' * 10000)|indent(ns.x) }}",
    "tojson indent": "{{ [[[1]]]|tojson(indent=1000000000) }}",
    "tojson separators": BIG + "{{ ([0] * 10000)|tojson(separators=(ns.x, ns.x)) }}",
    "int": "{{ ('9' * 500000)|int }}",
    "sum of lists": "{% set x = [[0] * 10000] * 10000 %}{{ (x|sum(start=[]))|length }}",
    "batch": "{{ [1]|batch(1000000000, 0)|list|length }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "doubled text": DOUBLED % ("'x'", "ns.x ~ ns.x", "ns.x"),
    "doubled text, plus": DOUBLED % ("'x'", "ns.x + ns.x", "ns.x"),
    "doubled list": DOUBLED % ("[1]", "ns.x + ns.x", "ns.x|length"),
    "doubled by a block": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "doubled tree, written": DOUBLED % ("[1]", "[ns.x, ns.x]", "ns.x"),
    "doubled tree, tojson": DOUBLED % ("[1]", "[ns.x, ns.x]", "ns.x|tojson"),
    "doubled tree, string": DOUBLED % ("[1]", "{'a': ns.x, 'b': ns.x}", "ns.x|string|length"),
    "doubled tree, concatenated": DOUBLED % ("[1]", "[ns.x, ns.x]", "(ns.x ~ 'x')|length"),
    "doubled tree, formatted": DOUBLED % ("[1]", "[ns.x, ns.x]", "('%s' % (ns.x,))|length"),
    "doubled tree, upper": DOUBLED % ("[1]", "[ns.x, ns.x]", "ns.x|upper|length"),
    "doubled tree, items": DOUBLED % ("{'a': 1}", "{'a': ns.x, 'b': ns.x}", "ns.x.items()"),
    "doubled trees, compared": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "doubled trees, searched": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ [ns.x].index(ns.y) }}",
    "doubled trees, tested": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x is eq ns.y }}",
    "doubled tuple, as a key": DOUBLED % ("(1,)", "(ns.x, ns.x)", "{}[ns.x]"),
    "doubled namespaces, from the top": "{% set a = namespace(x=1) %}"
    + "".join(f"{{% set n{i} = namespace(x=1) %}}" for i in range(41))
    + "".join(f"{{% set n{i}.x = [n{i - 1}, n{i - 1}] %}}" for i in range(40, 0, -1))
    + "{{ n40 }}",
    "a namespace in itself": "{% set ns = namespace(x=1) %}{% set ns.x = [ns] %}{{ ns }}",
    "deep list": "{% set ns = namespace(x=[1]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
    "loop that calls itself": "{% for x in [range(50)|list] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "block that calls itself": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "constants": "{% for i in range(99999) %}" + "x" * 10000 + "{% endfor %}",
    "constants in a macro": "{% macro f() %}" + "x" * 10000 + "{% endmacro %}{% set x = range(99999)|map('string')|list %}"
    "{% for i in x %}{% set ns = f() %}{{ ns }}{% endfor %}",
    "slices": BIG + "{% set m = namespace(l=[]) %}{% for i in range(9999) %}{% set m.l = m.l + [ns.x[1:]] %}{% endfor %}",
    "characters": BIG + "{{ ns.x|list|list|length * 0 }}{% for i in range(99) %}{% set y = ns.x|list %}{% endfor %}",
    "split": BIG + "{% for i in range(99) %}{% set y = ns.x.split('x') %}{% endfor %}",
    "comparisons": BIG + "{% for i in range(99999) %}" + "{% if 'y' in ns.x %}{% endif %}" * 50 + "{% endfor %}",
    "dates": "{{ strftime_now('%1000000000d') }}",
    "its own words": "{{ raise_exception('x' * 1000000) }}",
    "python": "{{ ''.__class__.__mro__ }}",
    "division": "{{ 1 // 0 }}",
}  # fmt: skip
UNREADABLE = {
    "parentheses": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "lists": "{{ " + "[" * 5000 + "1" + "]" * 5000 + " }}",
    "nots": "{{ " + "not " * 20000 + "1 }}",
    "sums": "{{ " + "1+" * 20000 + "1 }}",
    "ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "loops": "{% for a in b %}" * 300 + "{% endfor %}" * 300,
    "attributes": "{{ a" + ".b" * 20000 + " }}",
    "constant": "{{ 'x'|center(1000000000) }}",
    "constant, replaced": "{{ 'xxxxxxxx'" + "|replace('x','xxxxxxxx')" * 12 + " }}",
    "open": "{% if 1 %}",
    "unknown filter": "{{ x|nope }}",
}


def is_one_sentence(error):
    return "\n" not in str(error) and len(str(error)) < 600


def test_endless_templates_end():
    wrong = []
    for name, text in ENDLESS.items():
        begin, before = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            ChatTemplate(text, "", "", limits=SMALL)(messages=[{"role": "user", "content": "Hi"}])
            wrong.append(f"{name} came through")
        except KvcastError as error:
            if not is_one_sentence(error):
                wrong.append(f"{name}: {error}")
        if time.thread_time() - begin > 4 * SMALL.template_seconds:
            wrong.append(f"{name} took {time.thread_time() - begin:.1f} s")
        if (more := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) > 100 << 10:
            wrong.append(f"{name} took {more >> 10} MiB")
    assert not wrong


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_templates_are_refused(name):
    begin = time.thread_time()
    with pytest.raises(ModelError) as error:
        ChatTemplate(UNREADABLE[name], "", "")
    assert is_one_sentence(error.value)
    assert time.thread_time() - begin < 20


TOOL = {
    "name": "weather", "description": "Says it.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["A", "B"]}}, "required": ["city"]},
}  # fmt: skip
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "A"}}}
SYSTEM, QUESTION = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
CHATS = [
    {"messages": [QUESTION]},
    {"messages": [SYSTEM, QUESTION, {"role": "assistant", "content": "<think>\nx\n</think>\n\nSo."}, QUESTION]},
    {
        "messages": [
            SYSTEM,
            QUESTION,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "12"},
            QUESTION,
        ],
        "tools": [{"type": "function", "function": TOOL}],
    },
]


def prompt_of(template, chat):
    try:
        return template(**chat).prompt
    except Exception as error:  # noqa: BLE001 - many refuse a role or tools
        return error


def test_templates_of_real_models_write_what_they_always_wrote(tmp_path, monkeypatch):
    vendor.extract(tmp_path / "pin", ("models/templates",))
    for kind in (ChatTemplate, Jinja2ChatFormatter):
        monkeypatch.setattr(kind, "strftime_now", staticmethod(lambda f: "today"))
    files = sorted((tmp_path / "pin/models/templates").glob("*.jinja"))
    assert len(files) > 60
    n_written = 0
    for file in files:
        stock, ours = (kind(file.read_text(encoding="utf-8"), "<eos>", "<bos>") for kind in (Jinja2ChatFormatter, ChatTemplate))
        for chat in CHATS:
            before, now = prompt_of(stock, chat), prompt_of(ours, chat)
            if chat["messages"][0] is SYSTEM and not ours.takes_system:
                assert isinstance(now, InputError) or SYSTEM["content"] in now, file.name
            elif isinstance(before, str):
                assert now == before, file.name
                n_written += 1
            elif isinstance(now, Exception):
                assert isinstance(now, InputError), (file.name, now)
    assert n_written > 150


def written(llm):
    return llm.detokenize(llm.input_ids[: llm.n_tokens].tolist()).replace("\u2581".encode(), b" ")


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
ALTERNATES = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}{% endfor %}"  # noqa: E501
USERS_ONLY = "{% for m in messages if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("start", [REFUSES, ALTERNATES, REFUSES + ALTERNATES, ""], ids=["refused", "must alternate", "both", "left out"])
def test_what_the_system_says_comes_before_the_question_where_there_is_no_such_role(start):
    template = ChatTemplate(start + USERS_ONLY, "", "")
    assert not template.takes_system
    assert template(messages=[SYSTEM, QUESTION]).prompt == "<user>Be brief.\n\nWhy?"
    assert template(messages=[SYSTEM, SYSTEM, QUESTION]).prompt == "<user>Be brief.\n\nBe brief.\n\nWhy?"
    assert template(messages=[SYSTEM]).prompt == "<user>Be brief."
    answered = [SYSTEM, QUESTION, {"role": "assistant", "content": "So."}, QUESTION]
    assert template(messages=answered).prompt == "<user>Be brief.\n\nWhy?<assistant>So.<user>Why?"
    assert answered[0] is SYSTEM and answered[1] is QUESTION and QUESTION["content"] == "Why?"
    assert template(messages=[QUESTION]).prompt == "<user>Why?"
    system, question = ({**message, "content": [{"type": "text", "text": message["content"]}]} for message in (SYSTEM, QUESTION))
    for messages in ([SYSTEM, question], [system, QUESTION], [system, question], [system]):
        assert "Be brief." in template(messages=messages).prompt
    for odd in ([SYSTEM, {"content": "x"}], [SYSTEM, 5], [5], [{}], "text", [SYSTEM, {"role": "user", "content": 5}]):
        with contextlib.suppress(InputError):  # or whatever the template makes of it
            template(messages=odd)


def test_a_document_is_read_with_a_template_without_the_system_role(tmp_path):
    text = REFUSES + "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    llm = Llama(write_shape(tmp_path / "m.gguf", vocabulary="llama", template=text, n_layer=1), n_ctx=512, verbose=False)
    talk = Conversation(llm, "Anna has a dog called Rex.")
    talk.read()
    n_read = llm.n_tokens
    list(talk.ask("What is it called?", max_tokens=2))
    assert n_read > 8 and b"[user] Answer from this document.\n\nAnna has a dog called Rex.\n\nWhat is it called?" in written(llm)
    llm.close()


@pytest.mark.parametrize("known", [llama_chat_format.MISTRAL_INSTRUCT_CHAT_TEMPLATE])
def test_a_format_that_would_leave_the_system_out_is_not_chosen(tmp_path, known):
    llm = Llama(write_shape(tmp_path / "m.gguf", vocabulary="llama", template=known, n_layer=1), n_ctx=512, verbose=False)
    llm.create_chat_completion([SYSTEM, QUESTION], max_tokens=1)
    assert b"Be brief." in written(llm)
    llm.close()


def test_long_chats_are_written():
    text = "{% for m in messages %}{% if m.role == 'user' and loop.index0 != 0 %}<u>{{ m.content|trim }}{% else %}{{ m['content'] + '!' }}{% endif %}{% endfor %}"  # noqa: E501
    messages = [{"role": "user", "content": "x" * 100} for _ in range(20000)]
    assert len(ChatTemplate(text, "", "")(messages=messages).prompt) == 20000 * 103 - 2
    document = [{"role": "user", "content": "x" * (10 << 20)}]
    assert len(ChatTemplate(text, "", "")(messages=document).prompt) == (10 << 20) + 1


def test_a_model_with_an_endless_template(tmp_path):
    loop = ENDLESS["nested loops"]
    model = write_shape(tmp_path / "loop.gguf", vocabulary="llama", template=loop, n_layer=1)
    llm = Llama(model, n_ctx=256, limits=SMALL, verbose=False)
    with pytest.raises(InputError, match="takes more than"):
        llm.create_chat_completion([QUESTION])
    assert llm.create_completion("Once", max_tokens=2)["usage"]["completion_tokens"] == 2
    llm.close()
    constant = write_shape(tmp_path / "constant.gguf", vocabulary="llama", template="{{ 'x' * 10000000000 }}", n_layer=1)
    llm = Llama(constant, n_ctx=256, verbose=False)
    with pytest.raises(InputError, match="makes more than"):
        llm.create_chat_completion([QUESTION])
    llm.close()
    for text in (UNREADABLE["parentheses"], UNREADABLE["constant"], "x" * (Limits().template_length + 1)):
        with pytest.raises(ModelError, match="chat template"):
            Llama(write_shape(tmp_path / "bad.gguf", vocabulary="llama", template=text, n_layer=1), n_ctx=256, verbose=False)


def test_two_threads_have_bounds_of_their_own():
    template = ChatTemplate("{% for i in range(50000) %}{{ i }}{% endfor %}", "", "")
    found = []
    threads = [threading.Thread(target=lambda: found.append(len(template(messages=[]).prompt))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [238890] * 4
