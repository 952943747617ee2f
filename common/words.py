"""What a word is, in any script, and what an emoji is: patterns for the package `regex`."""

WORD = r"[\p{L}\p{N}][\p{L}\p{N}\p{M}]*+"  # letters and digits with their marks: accents, vowel signs
WORD += rf"(?:[\u200c\u200d]{WORD})*+"  # joiners, which Persian and the scripts of India have within a word
EMOJI = r"\p{RI}{2}|(?:\p{Emoji_Presentation}|\p{Emoji}\uFE0F)\p{EMod}?(?:\u200d\p{Emoji}\uFE0F?\p{EMod}?)*"
