"""Evaluation: oracle engines have known scores; an interrupted evaluation equals a whole one."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from reftune.errors import ReftConfigError, RunError
from reftune.evaluate import Sample, paired_difference, read_samples, run
from reftune.generate import Completion, HFEngine, OnDone, Sampling
from reftune.tasks import Task, get_task
from tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
N = 12


def write_set(data_dir: Path, name: str, split: str, n: int) -> None:
    """Write a commonsense file in LLM-Adapters' form."""
    answers = ["true", "false"] if name == "boolq" else [f"answer{i}" for i in range(1, 5)]
    rows = []
    for i in range(n):
        answer = answers[i % len(answers)]
        instruction = (
            f"Please answer, question {i} of {name}?\n\nAnswer format: {'/'.join(answers)}"
        )
        output = f"the correct answer is {answer}"
        rows.append({"instruction": instruction, "input": "", "output": output, "answer": answer})
    folder = data_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.json").write_text(json.dumps(rows, indent=4))


class FakeEngine:
    """Answer by a table from prompt text to completion, the last prompt first; may be killed."""

    def __init__(self, answers: dict[str, str], identity: str = "fake") -> None:
        self.tokenizer = TOKENIZER
        self.identity = identity
        self.answers = answers
        self.killed_after: int | None = None
        self.prompts_seen: list[str] = []
        self.adapters_seen: list[str | None] | None = None

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        adapters: Sequence[str | None] | None = None,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        self.adapters_seen = None if adapters is None else list(adapters)
        done = {}
        for i in reversed(range(len(prompts))):
            if len(done) == self.killed_after:
                raise KeyboardInterrupt
            prompt = TOKENIZER.decode(prompts[i])
            self.prompts_seen.append(prompt)
            text = self.answers[prompt]
            ids = TOKENIZER(text)["input_ids"]
            done[i] = Completion(tuple(prompts[i]), tuple(ids), text, "stop")
            if on_done is not None:
                on_done(i, done[i])
        return [done[i] for i in range(len(prompts))]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    write_set(tmp_path, "boolq", "test", N)
    return get_task("boolq", tmp_path)


def oracle(task: Task, wrong: set[int] = frozenset()) -> FakeEngine:
    """Answer every example rightly, but for those in `wrong`."""
    examples = [task.example(i) for i in range(task.num_examples)]
    return FakeEngine(
        {f"{e.prompt}\n": "?" if i in wrong else e.completion for i, e in enumerate(examples)}
    )


def timeless(samples: list[Sample]) -> list[Sample]:
    return [dataclasses.replace(s, seconds=0.0) for s in samples]


def test_an_engine_that_knows_all_answers_has_accuracy_1(task):
    result = run(task, oracle(task))
    assert (result.task, result.metric, result.value, result.n) == ("boolq", "accuracy", 1.0, N)
    assert result.stderr == 0.0
    expected = sum(len(TOKENIZER(task.example(i).completion)["input_ids"]) for i in range(N))
    assert result.generated_tokens == expected


def test_value_and_standard_error_are_those_of_a_binomial(task):
    result = run(task, oracle(task, wrong={0, 4, 5}))
    p = 9 / 12
    assert result.value == pytest.approx(p)
    assert result.stderr == pytest.approx(math.sqrt(p * (1 - p) / 11))


def test_a_result_is_one_line_of_json(task):
    result = run(task, oracle(task), limit=1)
    line = result.to_json()
    assert "\n" not in line
    assert json.loads(line) == dataclasses.asdict(result)
    assert result.stderr is None


def test_every_sample_is_kept_with_what_it_takes_to_check_it(task, tmp_path):
    path = tmp_path / "new" / "samples.jsonl"
    run(task, oracle(task, wrong={2}), samples_path=path)
    samples = read_samples(path)
    assert [s.index for s in samples] == list(range(N))
    for i, sample in enumerate(samples):
        example = task.example(i)
        assert sample.where == example.where
        assert sample.prompt == f"{example.prompt}\n"
        assert sample.gold == example.fields["answer"]
        assert sample.completion == ("?" if i == 2 else example.completion)
        assert sample.extracted == ("" if i == 2 else sample.gold)
        assert sample.score == float(i != 2)


@pytest.mark.parametrize("torn", [b"", b'{"index": 3, "whe', b'{"index": 3}'])
@pytest.mark.parametrize("killed_after", [0, 1, 5, N])
def test_a_killed_evaluation_goes_on_where_it_was(task, tmp_path, killed_after, torn):
    whole_path, path = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    whole = run(task, oracle(task, wrong={1, 7}), samples_path=whole_path)

    engine = oracle(task, wrong={1, 7})
    engine.killed_after = killed_after
    if killed_after < N:
        with pytest.raises(KeyboardInterrupt):
            run(task, engine, samples_path=path)
    else:
        run(task, engine, samples_path=path)
    with path.open("ab") as file:
        file.write(torn)

    engine.killed_after = None
    resumed = run(task, engine, samples_path=path)
    assert len(engine.prompts_seen) == len(set(engine.prompts_seen)) == N, "none is repeated"
    assert dataclasses.replace(resumed, seconds=whole.seconds) == whole
    assert timeless(read_samples(path)) == timeless(read_samples(whole_path))


def test_a_torn_header_is_begun_again(task, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"reftune_samples": 1, "ta')
    assert run(task, oracle(task), samples_path=path).value == 1.0
    assert len(read_samples(path)) == N


def test_a_real_model_resumes_to_the_same_samples(task, tmp_path):
    class KilledError(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 5:
            raise KilledError

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    engine = HFEngine(tiny_llama(), TOKENIZER, batch_size=3)
    expected = run(task, engine, samples_path=whole)
    with pytest.raises(KilledError):
        run(task, engine, samples_path=killed, progress=kill)
    assert len(read_samples(killed)) == 5
    resumed = run(task, HFEngine(tiny_llama(), TOKENIZER, batch_size=3), samples_path=killed)
    assert timeless(read_samples(killed)) == timeless(read_samples(whole))
    assert dataclasses.replace(resumed, seconds=0) == dataclasses.replace(expected, seconds=0)
    with pytest.raises(RunError, match="model:"):
        run(task, HFEngine(tiny_llama(seed=1), TOKENIZER), samples_path=killed)


def test_time_adds_up_over_interruptions(task, tmp_path):
    path = tmp_path / "samples.jsonl"
    run(task, oracle(task), limit=4, samples_path=path)
    result = run(task, oracle(task), samples_path=path)
    assert result.seconds == pytest.approx(sum(s.seconds for s in read_samples(path)), abs=1e-3)


def test_limit_takes_the_first_and_can_be_raised_later(task, tmp_path):
    path = tmp_path / "samples.jsonl"
    engine = oracle(task, wrong={0})
    assert run(task, engine, limit=4, samples_path=path).value == 0.75
    assert run(task, engine, limit=8, samples_path=path).value == 0.875
    assert run(task, engine, limit=2, samples_path=path).value == 0.5
    assert run(task, engine, limit=99, samples_path=path).n == N
    assert len(engine.prompts_seen) == N


def test_progress_counts_every_example(task, tmp_path):
    heard: list[tuple[int, int]] = []
    path = tmp_path / "samples.jsonl"
    run(task, oracle(task), limit=3, samples_path=path)
    run(task, oracle(task), samples_path=path, progress=lambda *a: heard.append(a))
    assert heard == [(i, N) for i in range(4, N + 1)]


def test_a_file_of_another_evaluation_is_refused_and_kept(task, tmp_path, monkeypatch):
    path = tmp_path / "samples.jsonl"
    run(task, oracle(task), samples_path=path, adapters="one")
    before = path.read_bytes()

    write_set(tmp_path, "piqa", "test", N)
    other = get_task("piqa", tmp_path)
    with pytest.raises(RunError, match="task: 'boolq', now 'piqa'"):
        run(other, oracle(other), samples_path=path, adapters="one")
    engine = oracle(task)
    engine.identity = "another model"
    with pytest.raises(RunError, match="model: 'fake', now 'another model'"):
        run(task, engine, samples_path=path, adapters="one")
    with pytest.raises(RunError, match="adapter 'one', now it is 'two'"):
        run(task, oracle(task), samples_path=path, adapters="two")
    with pytest.raises(RunError, match="adapter 'one', now it is None"):
        run(task, oracle(task), samples_path=path)
    monkeypatch.setattr(task, "sampling", Sampling(max_new_tokens=7), raising=False)
    with pytest.raises(RunError, match=r"sampling: .*32.*, now .*7"):
        run(task, oracle(task), samples_path=path, adapters="one")
    assert path.read_bytes() == before


def test_a_file_from_before_there_were_stop_tokens_goes_on(task, tmp_path, monkeypatch):
    path = tmp_path / "samples.jsonl"
    run(task, oracle(task), samples_path=path, limit=2)
    header, *samples = path.read_text().splitlines(keepends=True)
    before = json.loads(header)
    before["sampling"].pop("stop_token_ids", None)
    path.write_text("".join([json.dumps(before) + "\n", *samples]))
    run(task, oracle(task), samples_path=path)
    assert len(read_samples(path)) == N
    other = dataclasses.replace(task.sampling, stop_token_ids=(7,))
    monkeypatch.setattr(task, "sampling", other, raising=False)
    with pytest.raises(RunError, match="stop_token_ids"):
        run(task, oracle(task), samples_path=path)


def test_changed_data_are_refused(task, tmp_path):
    path = tmp_path / "samples.jsonl"
    run(task, oracle(task), samples_path=path)
    file = tmp_path / "boolq" / "test.json"
    file.write_text(file.read_text().replace("question 3", "QUESTION 3"))
    changed = get_task("boolq", tmp_path)
    with pytest.raises(RunError, match="example 3 had another prompt"):
        run(changed, oracle(changed), samples_path=path)


@pytest.mark.parametrize("content", ["my notes", '{"a": 1}\n', "one\ntwo\n"])
def test_someone_elses_file_is_left_alone(task, tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(RunError, match="not a samples file"):
        run(task, oracle(task), samples_path=path)
    assert path.read_text() == content


def test_a_damaged_line_in_the_middle_is_named(task, tmp_path):
    path = tmp_path / "samples.jsonl"
    run(task, oracle(task), samples_path=path)
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2][:20] + "\n"
    path.write_text("".join(lines))
    with pytest.raises(RunError, match="line 3 is not a sample"):
        run(task, oracle(task), samples_path=path)


def test_adapters_reach_the_engine_and_the_samples(task, tmp_path):
    engine = oracle(task)
    names = ["one", None] * (N // 2)
    path = tmp_path / "samples.jsonl"
    run(task, engine, adapters="one", limit=2, samples_path=path)
    run(task, engine, adapters=["one"] * 3 + names[3:], samples_path=path)
    assert engine.adapters_seen == ["one", *names[3:]], "only those of the examples left to do"
    assert [s.adapter for s in read_samples(path)] == ["one"] * 3 + names[3:]
    with pytest.raises(ReftConfigError, match="2 adapters for 12 examples"):
        run(task, engine, adapters=["one", "two"])


def test_a_limit_below_1_is_refused(task):
    with pytest.raises(ReftConfigError, match="limit=0"):
        run(task, oracle(task), limit=0)


def test_a_samples_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RunError, match=r"none\.jsonl does not exist"):
        read_samples(tmp_path / "none.jsonl")


def test_a_paired_difference_is_the_difference_of_means_but_sharper(task, tmp_path):
    a_wrong, b_wrong = {0}, {0, 1, 2}
    for name, wrong in (("a", a_wrong), ("b", b_wrong)):
        run(task, oracle(task, wrong), samples_path=tmp_path / name)
    a, b = read_samples(tmp_path / "a"), read_samples(tmp_path / "b")
    result = paired_difference(a, list(reversed(b)))
    assert result.mean == pytest.approx(2 / N)
    assert (result.wins, result.losses, result.n) == (2, 0, N)
    d = 2 / N
    assert result.stderr == pytest.approx(math.sqrt((d - d * d) / (N - 1)))
    back = paired_difference(b, a)
    assert (back.mean, back.wins, back.losses) == (-result.mean, 0, 2)
    assert paired_difference(a, a).mean == paired_difference(a, a).stderr == 0


def test_samples_of_different_examples_do_not_pair(task, tmp_path):
    run(task, oracle(task), samples_path=tmp_path / "a")
    run(task, oracle(task), limit=3, samples_path=tmp_path / "b")
    a, b = read_samples(tmp_path / "a"), read_samples(tmp_path / "b")
    other = [dataclasses.replace(s, prompt="another") for s in a]
    for wrong in (b, other, []):
        with pytest.raises(RunError, match="do not pair"):
            paired_difference(a, wrong)
    with pytest.raises(RunError, match="do not pair"):
        paired_difference([], [])
