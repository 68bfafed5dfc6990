"""Examples of serving: what comes out of a batch is what each request would get alone."""

import inspect

import numpy as np
import pytest

from examples import serve_queue, speculative
from tests.covering import longest
from tests.models import oracles


def test_a_queue_gives_each_what_it_gets_alone():
    """Three sequences of another library's model through two slots, all from one forked cache."""
    model, original = oracles.oracle("qwen3")
    prompts, _, greedy, *_ = oracles.greedy_batch(original)
    known = [[*prompts[0][:8].tolist(), *greedy[0]], [*prompts[1][:8].tolist(), *greedy[1]]]
    for prefix, requests, new, expected in (
        (known[0][:4], [known[0][4:8], known[0][4:10], known[0][4:9]], 4, known[0]),
        (known[1][:6], [known[1][6:8], known[1][6:11]], 3, known[1]),
    ):
        settings = {"slots": 2, "capacity": 24, "max_new_tokens": new, "steps": 2}
        answers = dict(serve_queue.serve(model, prefix, requests, **settings))
        assert sorted(answers) == list(range(len(requests)))
        for request, tokens in answers.items():
            start = len(prefix) + len(requests[request])
            assert tokens == expected[start : start + new]


@pytest.mark.slow
def test_a_queue_of_the_shipped_model(capsys):
    sizes = ["--slots=2", "--requests=3", "--max-new-tokens=4", "--scheme=W8A16C8"]
    answers = serve_queue.main([*sizes, "--check"])
    assert sorted(answers) == [0, 1, 2] and all(map(len, answers.values()))
    assert "what the model says to it alone" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.longest
def test_a_queue_on_a_mesh(capsys):
    """The answers of one device; sequences are cut over an axis of their own."""
    sizes = ["--slots=2", "--requests=3", "--max-new-tokens=4", "--scheme=W8A16C8"]
    many = serve_queue.main([*sizes, "--mesh=tensor=2,data=2", "--check"])
    assert many == serve_queue.main(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, longest("tensor=2")])
def test_a_draft_changes_nothing_but_the_time(mesh, capsys):
    """The example asserts that the text is the target's own; W2 is often wrong, itself never."""
    devices = [] if mesh is None else [f"--mesh={mesh}"]
    sizes = ["--max-new-tokens=10", "--length=2", "--target=W8A16", *devices]
    drafts = ("W2A16-g64", "W8A16") if mesh else ("W2A16-g64",)
    shares = [speculative.main([*sizes, f"--draft={draft}"]) for draft in drafts]
    assert 0 < shares[0] < 1 and shares[1:] in ([], [1.0])
    assert "without a draft" in capsys.readouterr().out


@pytest.mark.parametrize("example", [serve_queue, speculative])
def test_each_is_short_and_says_how_it_is_called(example, capsys):
    with pytest.raises(SystemExit) as ended:
        example.main(["--help"])
    assert ended.value.code == 0 and "--mesh" in capsys.readouterr().out
    functions = inspect.getmembers(example, inspect.isfunction)
    bodies = [inspect.getsource(inspect.unwrap(one)).splitlines() for _, one in functions]
    assert np.max([len(body) for body in bodies]) <= 55
