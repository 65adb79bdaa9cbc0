"""Tokens and positions on small tokenizers of each kind: byte-level, SentencePiece-like, and one that gives no offsets."""

from __future__ import annotations

import unicodedata
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from patchscopes.core.errors import NotAvailableError, PositionError, PromptError
from patchscopes.model.tokens import Span, Tokens, tokenize, visible

SENTENCES = (
    "The cat sat on the mat. The cat is in Wales, and Wales is in the west.",
    "Diana, Princess of Wales, was born in England.",
    "hello world, hello Wales",
    "if x:\n        y",
)
SPECIAL = ["<s>", "</s>", "<|user|>"]
DIANA = "Diana, Princess of Wales"
CHAT = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|user|>{% endif %}"
# (text, tokens of its single characters, as bytes cut them)
FAR = (
    ("é", ["é(1/2)", "é(2/2)"]),
    ("日本", ["日(1/3)", "日(2/3)", "日(3/3)", "本(1/3)", "本(2/3)", "本(3/3)"]),
    (
        "👩‍👧",
        [*(f"👩({k}/4)" for k in (1, 2, 3, 4)), *(f"\u200d({k}/3)" for k in (1, 2, 3)), *(f"👧({k}/4)" for k in (1, 2, 3, 4))],
    ),
    ("שלום", [f"{letter}({k}/2)" for letter in "שלום" for k in (1, 2)]),
)


@cache
def byte_level(*, bos: bool = True, trim: bool = False) -> PreTrainedTokenizerFast:
    """As of GPT-2 and Llama-3. trim: offsets leave out the space in front of a word, as RoBERTa's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim)]
    steps += [processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])] if bos else []
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|user|>"]
    )


@cache
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As of Llama-2: words begin with ▁, one is put in front, unknown characters fall apart into bytes."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyzDPW,."]
    merges = [("▁", "W"), ("▁W", "a"), ("l", "e"), ("le", "s"), ("▁Wa", "les"), ("o", "f"), ("▁", "of")]
    vocabulary = {token: i for i, token in enumerate([*tokens, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


class Replacing(ByT5Tokenizer):
    """As ByT5, which leaves half characters out; here they are shown as U+FFFD."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return bytes(ord(token) for token in tokens if len(token) == 1).decode(errors="replace")


class TestTokenize:
    def test_ids_strings_offsets_and_which_are_added(self) -> None:
        tokens = tokenize(byte_level(), DIANA)
        assert tokens.text == DIANA and len(tokens) == 6
        assert tokens.strings == ("<s>", "Diana", ",", " Princess", " of", " Wales")
        assert tokens.offsets == ((0, 0), (0, 5), (5, 6), (6, 15), (15, 18), (18, 24))
        assert tokens.special == (True, False, False, False, False, False)
        assert tokens.ids == tuple(byte_level()(DIANA)["input_ids"])
        assert tokens.tensor.tolist() == [list(tokens.ids)]

    def test_without_bos(self) -> None:
        tokens = tokenize(byte_level(bos=False), DIANA)
        assert tokens.strings == ("Diana", ",", " Princess", " of", " Wales")
        assert not any(tokens.special)
        assert tokens.position("Diana") == tokens.position(0) == 0

    def test_a_special_token_written_out_is_one(self) -> None:
        tokens = tokenize(byte_level(), "hello<|user|>world")
        k = tokens.position("<|user|>")
        assert tokens.strings[k] == "<|user|>" and tokens.special[k] and tokens.offsets[k] == (5, 13)

    @pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u3000"])
    @pytest.mark.parametrize("chat", [False, True])
    def test_an_empty_prompt(self, text: str, chat: bool) -> None:
        with pytest.raises(PromptError, match="is empty; expected some text"):
            tokenize(byte_level(), text, chat=chat)

    def test_sentencepiece(self) -> None:
        tokens = tokenize(sentencepiece_like(), "Princess of Wales")
        assert tokens.strings[-2:] == (" of", " Wales")  # the piece decoded alone loses its space
        assert tokens.position("Wales") == len(tokens) - 1 and tokens.position("of") == len(tokens) - 2
        assert tokens.position("Princess") == 9  # P r i n c e s s behind <s> ▁
        assert tokens.notes == ()

    def test_bytes_of_sentencepiece(self) -> None:
        tokens = tokenize(sentencepiece_like(), "a é 日")
        assert tokens.strings[-6:] == ("é(1/2)", "é(2/2)", " ", "日(1/3)", "日(2/3)", "日(3/3)")
        assert [tokens.position(piece) for piece in ("é", "日")] == [len(tokens) - 5, len(tokens) - 1]

    @pytest.mark.parametrize("kind", [ByT5Tokenizer, Replacing])
    def test_offsets_where_the_tokenizer_gives_none(self, kind: type) -> None:
        tokens = tokenize(kind(), "hé 日 Wales")  # a token a byte; </s> at the end
        assert tokens.special == (False,) * 13 + (True,)
        assert tokens.offsets[-1] == (0, 0)
        assert tokens.position("h") == 0 and tokens.position("é") == 2 and tokens.position("日") == 6
        assert tokens.find("Wales") == Span(8, 12) and tokens.upto(8) == "hé 日 W"


class TestChat:
    @pytest.fixture
    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=byte_level().backend_tokenizer, bos_token="<s>", additional_special_tokens=["<|user|>"]
        )
        tokenizer.chat_template = CHAT
        return tokenizer

    def test_the_prompt_is_a_users_turn(self, tokenizer: PreTrainedTokenizerFast) -> None:
        tokens = tokenize(tokenizer, "hello Wales", chat=True)
        assert tokens.text == "<|user|>hello Wales<|user|>"
        assert tokens.strings == ("<|user|>", "hello", " Wales", "<|user|>")  # no <s>: the template writes what it wants
        assert tokens.special == (True, False, False, True)
        assert tokens.position("Wales") == 2 and tokens.upto(2) == "<|user|>hello Wales"

    def test_notes_on_spaces_are_for_plain_prompts(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """In a chat the template decides what stands in front of the first word and behind the last."""
        assert tokenize(tokenizer, "cat ", chat=True).notes == ()

    def test_without_a_template(self) -> None:
        with pytest.raises(NotAvailableError, match="no chat template; give the prompt as plain text"):
            tokenize(byte_level(), "hello", chat=True)


class TestNotes:
    def test_a_trailing_space(self) -> None:
        (note,) = tokenize(byte_level(), " hello Wales ").notes
        assert "ends in a space" in note
        assert tokenize(byte_level(), " hello Wales").notes == tokenize(byte_level(), " hello Wales\n").notes == ()

    def test_no_leading_space(self) -> None:
        tokens = tokenize(byte_level(), "Wales is")
        (note,) = tokens.notes_at(tokens.position("Wales"))
        assert "'Wa'" in note and "' Wales'" in note  # what it is here, what it would be inside a text
        assert tokens.notes_at(tokens.position("is")) == tokens.notes_at(0) == ()  # other words, and <s>, are what they are

    def test_a_text_that_begins_with_spaces(self) -> None:
        assert tokenize(byte_level(), "  y").first_word_note == tokenize(byte_level(), "\n  y").first_word_note == ""

    def test_both(self) -> None:
        tokens = tokenize(byte_level(), "Wales ")
        assert len(tokens.notes_at(tokens.position("Wales"))) == 2

    def test_a_word_that_is_the_same_tokens_anywhere(self) -> None:
        assert tokenize(byte_level(), "Zz").first_word_note == ""  # "Z" "z"; with a space in front, " " "Z" "z"


class TestPieces:
    @pytest.mark.parametrize("trim", [False, True])
    @pytest.mark.parametrize(("text", "shown"), FAR)
    def test_pieces_of_one_character_are_shown_as_such(self, text: str, shown: list[str], trim: bool) -> None:
        tokens = tokenize(byte_level(trim=trim), f"a{text} b")
        assert list(tokens.strings[2:-2]) == shown
        assert tokens.strings[:2] == ("<s>", "a")
        for character, last in {c: i for i, (a, b) in enumerate(tokens.offsets) for c in tokens.text[a:b]}.items():
            if tokens.text.count(character) == 1 and not character.isspace():
                assert tokens.position(character) == last, character

    def test_no_replacement_character_even_where_bytes_are_left_over(self) -> None:
        broken = tokenize(byte_level(), "é\ufffd")  # U+FFFD is what the user wrote
        assert not any("\ufffd" in shown for shown in broken.strings)

    def test_a_part_of_a_character_has_seen_all_of_it(self) -> None:
        tokens = tokenize(byte_level(), "aé,")
        assert tokens.strings == ("<s>", "a", "é(1/2)", "é(2/2)", ",")
        assert [tokens.upto(i) for i in range(5)] == ["", "a", "aé", "aé", "aé,"]


class TestPositions:
    TEXT = "hello Wales, hello world"

    @pytest.fixture
    def tokens(self) -> Tokens:
        return tokenize(byte_level(), self.TEXT)

    def test_by_index(self, tokens: Tokens) -> None:
        n = len(tokens)
        assert [tokens.position(i) for i in (0, n - 1, -1, -n)] == [0, n - 1, n - 1, 0]

    def test_by_span(self, tokens: Tokens) -> None:
        assert tokens.position(tokens.find("hello Wales")) == 2 and tokens.position(Span(0, -1)) == len(tokens) - 1

    def test_by_text(self, tokens: Tokens) -> None:
        assert tokens.strings[tokens.position("Wales")] == " Wales"
        assert tokens.position(" Wales") == tokens.position("Wales") == tokens.position("al")
        assert tokens.position("hello Wales, h") == tokens.position("hello#2")
        assert tokens.position("world") == len(tokens) - 1

    def test_the_last_token_of_a_word_of_several(self, tokens: Tokens) -> None:
        first = tokenize(byte_level(), "Wales")
        assert first.strings == ("<s>", "Wa", "les")
        assert first.find("Wales") == Span(1, 2) and first.position("Wales") == 2 and first.position("Wa") == 1

    def test_the_space_in_front_belongs_to_the_word(self) -> None:
        """Also where offsets leave it out, and where a space is a token of its own."""
        for text in ("in Wales", "in  Wales", "Zz Qq"):
            for trim in (False, True):
                tokens = tokenize(byte_level(trim=trim), text)
                word = text.split()[1]
                assert tokens.find(f" {word}") == tokens.find(word), (text, trim)
                assert tokens.find(word).last == len(tokens) - 1

    def test_numbered_occurrences(self, tokens: Tokens) -> None:
        assert tokens.position("hello#1") == 1
        assert tokens.position("hello#2") == tokens.strings.index(" hello")
        assert tokens.find("hello", occurrence=2) == Span(tokens.position("hello#2"), tokens.position("hello#2"))

    def test_a_number_sign_in_the_text_is_text(self) -> None:
        tokens = tokenize(byte_level(bos=False), "a a#2 b")
        assert tokens.text[slice(*tokens.offsets[tokens.position("a#2")])] == "2"

    def test_ambiguous_text_lists_the_places(self, tokens: Tokens) -> None:
        places = f"#1 is token 1; #2 is token {tokens.position('hello#2')}"
        with pytest.raises(PositionError) as caught:
            tokens.position("hello")
        for words in ("'hello' occurs 2 times", repr(self.TEXT), places, "'hello#1'"):
            assert words in str(caught.value)

    def test_overlapping_occurrences_count(self) -> None:
        with pytest.raises(PositionError, match="'aa' occurs 2 times"):
            tokenize(byte_level(), "b aaa").position("aa")

    @pytest.mark.parametrize("piece", ["hello#3", "hello#0"])
    def test_an_occurrence_that_is_not_there(self, tokens: Tokens, piece: str) -> None:
        with pytest.raises(PositionError, match=rf"occurrence {piece[-1]} of 'hello': it occurs 2 times .*count from 1"):
            tokens.position(piece)

    @pytest.mark.parametrize("piece", ["Spain", "wales", "", "Spain#1", "hello  Wales"])
    def test_absent_text_lists_the_tokens(self, tokens: Tokens, piece: str) -> None:
        with pytest.raises(PositionError) as caught:
            tokens.position(piece)
        for words in ("does not occur", repr(self.TEXT), "0:'<s>'", "2:' Wales'", f"{len(tokens) - 1}:' world'"):
            assert words in str(caught.value)

    @pytest.mark.parametrize("index", [99, -99])
    def test_out_of_range_says_the_range(self, tokens: Tokens, index: int) -> None:
        n = len(tokens)
        with pytest.raises(
            PositionError, match=rf"position {index} is out of range: .* has {n} tokens, 0 to {n - 1} \(-1 is the last\)"
        ):
            tokens.position(index)

    def test_upto_is_what_a_token_has_seen(self, tokens: Tokens) -> None:
        assert tokens.upto(0) == ""  # <s>
        assert tokens.upto(2) == "hello Wales"
        assert tokens.upto(len(tokens) - 1) == self.TEXT
        assert [tokens.upto(i) for i in range(-len(tokens), 0)] == [tokens.upto(i) for i in range(len(tokens))]


ANY_TEXT = st.text(min_size=1, max_size=24).filter(lambda text: bool(text.strip()))
WORDS = st.lists(st.sampled_from([*" .,é日👩\u200d👧שa", "Wales", " Wales", "cat", "\n", "  "]), min_size=1, max_size=12).map(
    "".join
)


class TestProperties:
    @settings(deadline=None, derandomize=True, max_examples=80)
    @given(st.one_of(ANY_TEXT, WORDS.filter(lambda text: bool(text.strip()))), st.booleans(), st.data())
    def test_every_piece_of_every_text_is_found(self, text: str, bos: bool, data: st.DataObject) -> None:
        tokens = tokenize(byte_level(bos=bos), text)
        assert tokens.special == ((True,) if bos else ()) + (False,) * (len(tokens) - bos)
        covered = {k for a, b in tokens.offsets for k in range(a, b)}
        assert covered == set(range(len(text)))
        assert all(0 <= a <= b <= len(text) for a, b in tokens.offsets)
        assert all(a <= c and b <= d for (a, b), (c, d) in zip(tokens.offsets, tokens.offsets[1:], strict=False))
        assert not any("\ufffd" in shown for shown in tokens.strings)
        assert tokens.upto(len(tokens) - 1) == text

        start = data.draw(st.integers(0, len(text) - 1))
        stop = data.draw(st.integers(start + 1, len(text)))
        piece = text[start:stop]
        nth = sum(text.startswith(piece, k) for k in range(start + 1))
        span = tokens.find(piece, occurrence=nth)
        covering = [i for i, (a, b) in enumerate(tokens.offsets) if a <= stop - 1 < b]
        assert span.last == covering[-1]  # the last token of the piece's last character
        assert 0 <= span.first <= span.last
        if text.count(piece) == 1 and nth == 1 and not any(text.startswith(piece, k) for k in range(start + 1, len(text))):
            assert tokens.position(piece) == span.last
        assert tokens.upto(span.last).startswith(text[:stop])

    @settings(deadline=None, derandomize=True, max_examples=40)
    @given(ANY_TEXT)
    def test_visible_leaves_nothing_that_a_terminal_obeys(self, text: str) -> None:
        shown = visible(text)
        assert not any(c in " \n\t\r" or (unicodedata.category(c)[0] == "C" and c != "\u200d") for c in shown)
        assert visible(text * 2) == shown * 2
        if all(unicodedata.category(c)[0] in "LMNPS" for c in text):
            assert shown == text


def test_visible() -> None:
    assert visible(" a\n\tb\r") == "␣a↵⇥b␍"
    assert visible("é日👩\u200d👧ש") == "é日👩\u200d👧ש"
    assert visible("\x1b[31mred\x07") == "\\x1b[31mred\\x07"
    assert visible("a\u202eb") == "a\\x202eb"  # right-to-left override: would turn the rest of a line around


@pytest.mark.parametrize("line_end", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_every_line_end_is_made_visible(line_end: str) -> None:
    assert len(visible(f"a{line_end}b").splitlines()) == 1
