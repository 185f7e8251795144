"""The data sets' original rows, as the Hub has them, turned into LLM-Adapters' rows.

LLM-Adapters' row: {"instruction", "input", "output", "answer"}. Instruction and answer are theirs
letter for letter. So is a commonsense row's output ("the correct answer is " + answer). Outputs of
arithmetic sets were written by a language model there; here they are the set's own solution.
"""

import ast
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias, final

from reftune.data import Row
from reftune.errors import DataError

Fields: TypeAlias = Mapping[str, Any]
AQUA_LETTERS: Final = ("A", "B", "C", "D", "E")


@final
@dataclass(frozen=True)
class HubSet:
    """A data set of the Hub, its splits by our names, and how its rows become LLM-Adapters'.

    A split that has the ending of a file is that file in the repository, read as it is: what a
    repository with a loading script holds, or with files that its configs do not name.
    """

    path: str
    config: str
    splits: Mapping[str, str]
    convert: Callable[[Fields], dict[str, str]] | None = None


def to_row(name: str, row: Row) -> Row:
    """Return LLM-Adapters' row: the row itself if it is one already, else a conversion.

    Raises:
        DataError: the row has neither form; names its columns.
    """
    if "instruction" in row.fields:
        return row
    try:
        return Row(CONVERTERS[name](row.fields), row.where)
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"{row.where}: {name} cannot be read from this row ({error!r}): its columns are "
            f"{', '.join(map(str, row.fields))}. Give LLM-Adapters' rows (instruction, input, "
            "output, answer), or the data set's original ones."
        ) from error


def number(value: Any) -> str:
    """Return a number as a person writes it: 56.0 is 56."""
    value = float(str(value).replace(",", ""))
    return str(int(value)) if value.is_integer() else repr(value)


def _commonsense(instruction: str, answer: str) -> dict[str, str]:
    output = f"the correct answer is {answer}"
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


def _choices(what: str, texts: list[str]) -> tuple[str, str]:
    """Return "Answer1: a Answer2: b" and "answer1/answer2"."""
    listed = " ".join(f"{what.capitalize()}{i}: {text}" for i, text in enumerate(texts, 1))
    return listed, "/".join(f"{what}{i}" for i in range(1, len(texts) + 1))


def _boolq(row: Fields) -> dict[str, str]:
    return _commonsense(
        "Please answer the following question with true or false, question: "
        f"{row['question']}?\n\nAnswer format: true/false",
        "true" if row["answer"] else "false",
    )


def _piqa(row: Fields) -> dict[str, str]:
    return _commonsense(
        f"Please choose the correct solution to the question: {row['goal']}\n\n"
        f"Solution1: {row['sol1']}\n\nSolution2: {row['sol2']}\n\n"
        "Answer format: solution1/solution2",
        f"solution{int(row['label']) + 1}",
    )


def _answers(question: str, texts: list[str], index: int) -> dict[str, str]:
    listed, accepted = _choices("answer", texts)
    return _commonsense(
        f"Please choose the correct answer to the question: {question}\n\n{listed}\n\n"
        f"Answer format: {accepted}",
        f"answer{index + 1}",
    )


def _siqa(row: Fields) -> dict[str, str]:
    texts = [row["answerA"], row["answerB"], row["answerC"]]
    return _answers(f"{row['context']} {row['question']}", texts, int(row["label"]) - 1)


def _hellaswag(row: Fields) -> dict[str, str]:
    context = row["ctx"] if "ctx" in row else row["context"]
    if row.get("activity_label"):
        context = f"{row['activity_label']}: {context}"
    texts = row["endings"] if "endings" in row else row["choices"]
    listed, accepted = _choices("ending", texts)
    return _commonsense(
        f"Please choose the correct ending to complete the given sentence: {context}\n\n{listed}"
        f"\n\nAnswer format: {accepted}",
        f"ending{int(row['label']) + 1}",
    )


def _winogrande(row: Fields) -> dict[str, str]:
    listed, accepted = _choices("option", [row["option1"], row["option2"]])
    return _commonsense(
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{row['sentence']}\n\n{listed} Answer format: {accepted}",
        f"option{int(row['answer'])}",
    )


def _arc(row: Fields) -> dict[str, str]:
    question = row["question"] if "question" in row else row["question_stem"]
    choices = row["choices"]  # labels are A to E, or 1 to 5
    return _answers(question, list(choices["text"]), list(choices["label"]).index(row["answerKey"]))


def _arithmetic(question: str, output: str, answer: str) -> dict[str, str]:
    return {"instruction": question, "input": "", "output": output, "answer": answer}


def _gsm8k(row: Fields) -> dict[str, str]:
    solution, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("no #### before the answer")
    solution = re.sub(r"<<.*?>>", "", solution).strip()  # a calculator's annotations
    output = f"{solution}\nThe answer is {answer.strip()}."
    return _arithmetic(row["question"], output, str(float(answer.replace(",", ""))))


def _svamp(row: Fields) -> dict[str, str]:
    body = row["Body"].strip()
    body += "" if body.endswith(".") else "."
    expression = row["Equation"].strip().removeprefix("(").removesuffix(")").strip()
    expression = re.sub(r"\d+\.\d+", lambda m: number(m[0]), expression)
    question = f"{body} {row['Question'].strip()}"
    return _arithmetic(question, _worked(expression, row["Answer"]), str(float(row["Answer"])))


def _mawps(row: Fields) -> dict[str, str]:
    if "original_text" in row:  # the set as MWP papers split it, and LLM-Adapters with them
        output = f"The answer is {number(row['ans'])}."
        return _arithmetic(row["original_text"], output, str(row["ans"]))
    return _masked(row)


def _masked(row: Fields) -> dict[str, str]:
    """Fill numbers into "number0" or "N_00" of the question and of the equation: 9 - 3 = 6."""
    numbers = [number(n) for n in str(row["Numbers"]).split()]

    def fill(text: str) -> str:
        return re.sub(r"\b(?:number|N_)(\d+)", lambda m: numbers[int(m[1])], text)

    worked = _worked("", row["Answer"])
    # Some equations do not come to the answer, or are none: then the answer stands alone.
    with suppress(ZeroDivisionError, ValueError, SyntaxError, IndexError):
        expression = _expression(fill(row["Equation"]))
        if abs(_value(expression) - float(row["Answer"])) <= 1e-3:
            worked = _worked(_plain(expression), row["Answer"])
    return _arithmetic(fill(row["Question"]), worked, str(float(row["Answer"])))


Expression: TypeAlias = "str | tuple[Expression, str, Expression]"
_SIGNS: Final = MappingProxyType({ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"})


def _expression(equation: str) -> Expression:
    """Read an equation, "+ 8 2" (SVAMP's repository) or "8 + 2" (the Hub's MAWPS)."""
    tokens = equation.split()
    if tokens[0] in _SIGNS.values():
        return _prefix(tokens)
    return _infix(ast.parse(equation.strip(), mode="eval").body)


def _prefix(tokens: list[str]) -> Expression:
    token = tokens.pop(0)
    if token not in _SIGNS.values():
        return number(token)
    left = _prefix(tokens)
    return left, token, _prefix(tokens)


def _infix(node: ast.expr) -> Expression:
    if isinstance(node, ast.Constant):
        return number(node.value)
    if not isinstance(node, ast.BinOp) or type(node.op) not in _SIGNS:
        raise ValueError(f"no arithmetic: {ast.unparse(node)}")
    return _infix(node.left), _SIGNS[type(node.op)], _infix(node.right)


def _value(expression: Expression) -> float:
    if isinstance(expression, str):
        return float(expression)
    left, sign, right = expression
    a, b = _value(left), _value(right)
    return {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a / b


def _plain(expression: Expression) -> str:
    if isinstance(expression, str):
        return expression
    return " ".join(_plain(e) if isinstance(e, str) else f"({_plain(e)})" for e in expression)


def _worked(expression: str, answer: Any) -> str:
    """Return "9 - 3 = 6. The answer is 6."; the scoring takes the last number."""
    steps = f"{expression} = {number(answer)}. " if expression else ""
    return f"{steps}The answer is {number(answer)}."


def _addsub(row: Fields) -> dict[str, str]:
    return _sum(f"{row['input']} ", number(row["target"]))


def _multiarith(row: Fields) -> dict[str, str]:
    return _sum(f" {row['input']} ", str(float(row["target"])))


def _singleeq(row: Fields) -> dict[str, str]:
    return _sum(row["input"], str(float(row["target"])))


def _sum(question: str, answer: str) -> dict[str, str]:
    return _arithmetic(question, _worked("", answer), answer)


def _aqua(row: Fields) -> dict[str, str]:
    options, answer = list(row["options"]), row["correct"]
    if answer not in AQUA_LETTERS:
        raise ValueError(f"the correct option is {answer!r}")
    # Every bracket of the options gets its spaces, those inside an option's text, too.
    listed = "".join(f"({option}" for option in options)
    listed = listed.replace("(", " (").replace(")", ") ")
    question = f"{row['question'].strip()} Answer Choices:{listed}"
    return _arithmetic(question, f"{row['rationale']}\nThe answer is ({answer}).", answer)


_STANDARD: Final = MappingProxyType({"train": "train", "test": "test"})
_BY_VALIDATION: Final = MappingProxyType({"train": "train", "test": "validation"})

_MATH: Final = "HuggingFaceTB/math_tasks"


def _file(name: str) -> Mapping[str, str]:
    return MappingProxyType({"test": name})


SETS: Final[Mapping[str, HubSet]] = MappingProxyType(
    {
        "boolq": HubSet("google/boolq", "", _BY_VALIDATION, _boolq),
        "piqa": HubSet("baber/piqa", "", _BY_VALIDATION, _piqa),
        # allenai/social_i_qa row by row; that one needs a loading script, which datasets 4 refuses.
        "social_i_qa": HubSet("lighteval/siqa", "", _BY_VALIDATION, _siqa),
        "hellaswag": HubSet("Rowan/hellaswag", "", _BY_VALIDATION, _hellaswag),
        "winogrande": HubSet("allenai/winogrande", "winogrande_xl", _BY_VALIDATION, _winogrande),
        "ARC-Easy": HubSet("allenai/ai2_arc", "ARC-Easy", _STANDARD, _arc),
        "ARC-Challenge": HubSet("allenai/ai2_arc", "ARC-Challenge", _STANDARD, _arc),
        "openbookqa": HubSet("allenai/openbookqa", "main", _STANDARD, _arc),
        "gsm8k": HubSet("openai/gsm8k", "main", _STANDARD, _gsm8k),
        # The Hub parts its 1,000 rows in two; the paper tests on all of them.
        "SVAMP": HubSet("ChilleD/SVAMP", "", MappingProxyType({"test": "train+test"}), _svamp),
        "AQuA": HubSet("deepmind/aqua_rat", "raw", _STANDARD, _aqua),
        "mawps": HubSet("mwpt5/MAWPS", "", MappingProxyType({"train": "train"}), _mawps),
        # LLM-Adapters' questions, in another order.
        "AddSub": HubSet(_MATH, "", _file("data/mawps/addsub.jsonl"), _addsub),
        "MultiArith": HubSet(_MATH, "", _file("data/mawps/multiarith.jsonl"), _multiarith),
        "SingleEq": HubSet(_MATH, "", _file("data/mawps/singleeq.jsonl"), _singleeq),
        "sst2": HubSet("nyu-mll/glue", "sst2", _BY_VALIDATION),
        "trec": HubSet("SetFit/TREC-QC", "", _STANDARD),
        "alpaca": HubSet("yahma/alpaca-cleaned", "", MappingProxyType({"train": "train"})),
        "alpaca_eval": HubSet("tatsu-lab/alpaca_eval", "", _file("alpaca_eval.json")),
    }
)
CONVERTERS: Final[Mapping[str, Callable[[Fields], dict[str, str]]]] = MappingProxyType(
    {name: where.convert for name, where in SETS.items() if where.convert is not None}
    | {"mawps-asdiv": _masked}
)
