"""The ``eval`` group as a dataclass: types and ranges are checked before anything is read or built."""

from dataclasses import dataclass

from memlm.settings import require

# More rows, questions or documents than anyone waits for, and more tokens than one forward takes.
_MOST, _LONGEST = 10**6, 2**24


@dataclass(frozen=True)
class EvalSettings:
    """factors: lengths of recall, times the training length; recall_rows, needle_rows: test rows of a length, and of a
    cell; depths: of the needle, 0 is the front; text_documents, text_length: held-out documents, and tokens of each;
    bank_documents, bank_questions: sizes of banks, and questions to each. None of something leaves it out.
    """

    factors: list
    recall_rows: int
    depths: list
    needle_rows: int
    text_documents: int
    text_length: int
    bank_documents: list
    bank_questions: int

    def __post_init__(self) -> None:
        for name, least in (
            ("recall_rows", 1),
            ("needle_rows", 1),
            ("text_documents", 0),
            ("text_length", 2),
            ("bank_questions", 1),
        ):
            value, most = getattr(self, name), _LONGEST if name == "text_length" else _MOST
            require(least <= value <= most, f"{name}={value} must lie in {least}..{most}")
        for name in ("factors", "bank_documents"):
            whole = all(type(n) is int and 1 <= n <= _MOST for n in getattr(self, name))
            require(whole, f"{name}={getattr(self, name)} must be whole numbers in 1..{_MOST}")
        numbers = all(type(d) in (int, float) and 0 <= d <= 1 for d in self.depths)
        require(numbers, f"depths={self.depths} must be numbers in 0..1")

    def check_length(self, seq_len: int) -> None:
        """Raise ValueError for a factor that makes rows too long to read."""
        longest = max(self.factors, default=0) * seq_len
        require(
            longest <= _LONGEST,
            f"eval.factors={self.factors} times data.seq_len={seq_len} is more than {_LONGEST} tokens; lower one",
        )
