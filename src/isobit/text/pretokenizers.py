"""How text is cut into words before byte-level BPE: one table, by ``tokenizer.ggml.pre``.

Owns the patterns. They are those of each model's own tokenizer.json (regular expressions of
Oniguruma, which the ``tokenizers`` library runs), under the names that llama.cpp's converter gives
them, with one change: where a file says ``(?i:...)`` the cases are spelt out, since that also
matches U+017F (long s) and llama.cpp does not. Where llama.cpp approximates a pattern (the letter
cases of ``gpt-4o`` and ``tekken``, which it knows for ASCII alone), the original stands here, or,
where that takes the square of the time for a long run, one that finds the same words.
"""

import re
from dataclasses import dataclass, replace

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

# Places where a word ends with nearly all patterns: before a space that follows something visible,
# and before a letter or digit on the line after something visible (where lines are empty in
# between, the last of several line ends can be a word of its own).
WORDS_END = re.compile(r"(?<=[!-~\w])(?= )|(?<=[!-~\w]\n)(?=[^\W_])")
LINES_END = re.compile(r"(?<=\n)(?=[^\n])")

_CONTRACTION = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"

# Words of Qwen2: contractions, letters with what stands before them, single digits, runs of other
# signs with the line ends after them, line ends, spaces.
_QWEN2 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{_SIGNS}{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_SPACES}"
)
_LLAMA3 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{{1,3}}{_SIGNS}{_SPACES}"

# Words of GPT-2: lower-case contractions, and runs of one kind with a space before them.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Words of GPT-4o: a word ends where a capital follows a small letter.
_HEAD, _TAIL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(digits: str, contraction: str) -> str:
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{_HEAD}*{_TAIL}+{contraction}|{before}{_HEAD}+{_TAIL}*{contraction}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}"
    )


_GPT4O = _cased(r"\p{N}{1,3}", f"(?:{_CONTRACTION})?")

_KIMI = (  # GPT-4o's with Chinese characters in words of their own
    r"\p{Han}+|"
    + _GPT4O.replace(_HEAD, rf"[{_HEAD[1:-1]}&&[^\p{{Han}}]]")
    .replace(_TAIL, rf"[{_TAIL[1:-1]}&&[^\p{{Han}}]]")
    .replace(r"[\r\n/]*", r"[\r\n]*")
)

_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*{_SPACES}"
)

# The same as \s+$, and as \d{1,3}(?=(?:\d{3})*\b), which look at the rest of a run from each of
# its places: here the rest is looked at once, from where the run begins.
_SPACES_AT_END = r"(?<!\s)\s++$"
_THREES_FROM_END = r"(?<!\d)\d{1,3}(?=(?:\d{3})*+\b)|\G(?<=\d)\d{3}"

# Letters that have cases, as the tokenizer.json of DeepSeek LLM and V2 lists them: not all of them.
# What it means as signs has the letters of ASCII, too.
_CASED = re.sub(
    "[0-9A-F]+",
    lambda code: chr(int(code[0], 16)),
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 "
    "388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA "
    "1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 "
    "1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB "
    "1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D "
    "212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 "
    "A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A "
    "FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943",
).replace(" ", "")


@dataclass(frozen=True)
class PreTokenizer:
    """What a name in the table stands for.

    Attributes:
        words: patterns, each applied to the pieces that those before it left; what one matches,
            and what lies between its matches, are pieces.
        ignore_merges: whether a word that is a token is that token, whatever merges would make.
        adds_bos: whether texts begin with BOS where the file does not say.
        byte_level: whether merges join bytes; else they join characters, a space being "▁" and
            what is in no token its bytes.
        breaks: places where a word ends whatever stands around them; long texts are cut there.
    """

    words: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    byte_level: bool = True
    breaks: re.Pattern[str] = WORDS_END

    def build(self, pieces: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
        """The library's tokenizer of a vocabulary; it raises or panics where that is damaged."""
        made = Tokenizer(
            BPE(
                pieces,
                merges,
                ignore_merges=self.ignore_merges,
                byte_fallback=not self.byte_level,
            )
        )
        cuts = [Split(Regex(pattern), behavior="isolated") for pattern in self.words]
        bytes_ = [ByteLevel(add_prefix_space=False, use_regex=False)] if self.byte_level else []
        made.pre_tokenizer = Sequence([*cuts, *bytes_])
        if not self.byte_level:
            made.normalizer = Replace(" ", SPACE)
        return made


SPACE = "▁"  # U+2581, how vocabularies that are not byte-level write a space

# Gemma 4 has no words: merges run over whole lines, and over runs of line ends.
GEMMA4 = PreTokenizer((r"[^\n]+|\n+",), adds_bos=True, byte_level=False, breaks=LINES_END)


def _table(*rows: tuple[str, PreTokenizer]) -> dict[str, PreTokenizer]:
    return {name: kind for names, kind in rows for name in names.split()}


_LLAMA_BPE = PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)
_CHATGLM = PreTokenizer((_LLAMA3,))

PRETOKENIZERS: dict[str, PreTokenizer] = _table(
    (
        "qwen2 deepseek-r1-qwen hunyuan solar-open stablelm2 megrez kormo f2llmv2 grok-2",
        PreTokenizer((_QWEN2,)),
    ),
    ("qwen35", PreTokenizer((_QWEN35,))),
    ("llama-bpe llama3 llama-v3 lfm2 falcon3 falcon-h1 pixtral midm-2.0", _LLAMA_BPE),
    ("chatglm-bpe dbrx smaug-bpe", _CHATGLM),
    ("glm4 glm5", replace(_CHATGLM, ignore_merges=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer((_GPT4O,))),
    ("tekken", PreTokenizer((_cased(r"\p{N}", ""),), ignore_merges=True, adds_bos=True)),
    ("kimi-k2", PreTokenizer((_KIMI,))),
    (
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
        PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    ),
    (
        "deepseek-llm",
        PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?[{_CASED}]+",
                "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
                _SPACES_AT_END,
                "[一-龥ࠀ-一가-퟿]+",
                r"\p{N}",
            ),
            breaks=LINES_END,
        ),
    ),
    (
        "deepseek-coder",
        PreTokenizer(
            (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
            breaks=LINES_END,
        ),
    ),
    (
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        PreTokenizer((r"\p{N}", _GPT2)),
    ),
    (
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat exaone4 a.x-4.0 mellum",
        PreTokenizer((_GPT2,)),
    ),
    ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    ("laguna", PreTokenizer((r"[^\n]+|\n+", _QWEN2))),
    (
        "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer((rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{_SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+",)),
    ),
    (
        "seed-coder",
        PreTokenizer((rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_SPACES}",)),
    ),
    (
        "minicpm5",
        PreTokenizer(
            (r"\p{N}{1,3}", rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}+{_SIGNS}{_SPACES}"),
            ignore_merges=True,
        ),
    ),
    ("tiny_aya cohere2moe", PreTokenizer((_THREES_FROM_END, _GPT4O))),
)
