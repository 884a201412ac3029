"""How text is cut into words before byte-level BPE: one table, by ``tokenizer.ggml.pre``.

Owns the patterns. They are those of each model's own tokenizer.json (regular expressions of
Oniguruma, which the ``tokenizers`` library runs), under the names that llama.cpp's converter gives
them, with one change: where a file says ``(?i:...)`` the cases are spelt out, since that also
matches U+017F (long s) and llama.cpp does not. Where llama.cpp approximates a pattern (the letter
cases of ``gpt-4o`` and ``tekken``, which it knows for ASCII alone), the original stands here.
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
    ("tiny_aya cohere2moe", PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))),
)
