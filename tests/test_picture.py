"""`scripts/picture.py`: the images of evaluations, each at its place."""

from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest
from hydra.utils import instantiate
from picture import RIGHT, draw, main, make
from PIL import Image
from test_evaluate_images import another, config, run  # noqa: F401  # fixtures

from scripts.evaluate_images import complete
from vp_rl.evaluation.asking import rate
from vp_rl.evaluation.store import Store


def test_rows_are_the_images_that_evaluations_have(run: Path, another: Path, tmp_path: Path) -> None:  # noqa: F811
    adapter, whole = complete(config(f"adapter={run}", "seeds=[3]", "batch_size=4"))
    evaluator, policy = instantiate(whole.evaluation, _convert_="all"), instantiate(whole.policy)
    policy.load_adapter(adapter)
    images = evaluator.make(policy, evaluator.prompts)
    rated, _ = rate(evaluator.annotator, evaluator.prompts, [[image] for image in images], Store(None))
    cache = tmp_path / "c.sqlite"
    prompts, rows, right = make([run, another], ["one", "other"], None, 3, 3, "cpu", True, cache)
    assert prompts == evaluator.prompts[::3]
    assert list(rows) == ["base", "one", "other"]
    assert np.abs(rows["one"].astype(int) - images[::3]).max() <= 1  # batches of other sizes may round otherwise
    assert right["one"].tolist() == [each[0][0].rating == 5 for each in rated[::3]]
    assert (rows["one"] != rows["other"]).any()
    assert (rows["base"] != rows["one"]).any()
    own, alone, judged = make([another], ["other"], prompts[:1], 1, 3, "cpu", False, cache)
    assert (own, judged) == (prompts[:1], {})
    assert (alone["other"][0] == rows["other"][0]).all()  # the first place, and so the same noise


def test_what_is_right_is_framed_and_counted() -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    figure = draw(["a", "b" * 500], {"base": images, "x": images}, {"x": np.array([True, False])})
    frames = [axes.spines["top"].get_edgecolor() for axes in figure.axes]
    assert [frame == matplotlib.colors.to_rgba(RIGHT) for frame in frames] == [False, False, True, False]
    assert [axes.get_ylabel() for axes in figure.axes] == ["base", "", "x\n1 right", ""]
    assert max(len(axes.get_title()) for axes in figure.axes) < 100


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a", "b", "--names", "x"], "one for each run"),
        (["a", "--names", "base"], "none of them `base`"),
        (["x/a", "y/a"], "all different"),
        (["a", "--every", "0"], "--every"),
        (["/nowhere"], "adapter='/nowhere' is no folder of a run"),
    ],
)
def test_mistakes_are_said_before_anything_is_made(
    given: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["picture.py", *given])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert said in f"{stopped.value}{capsys.readouterr().err}"


def test_the_command_leaves_a_picture(
    run: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["picture.py", str(run), "--prompts", "a red circle", "--device", "cpu"])
    main()
    with Image.open("picture.png") as picture:
        assert picture.width > 100
