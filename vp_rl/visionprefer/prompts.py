"""Stage 1 of VisionPrefer: where prompts come from."""

from pathlib import Path

from vp_rl.interfaces import PromptSource
from vp_rl.scenes.grammar import unique_scenes
from vp_rl.types import Split


class ScenePrompts(PromptSource):
    """Prompts of the embedded world; the test split holds combinations that no other split has."""

    def __init__(self, train: int = 2000, validation: int = 128, test: int = 128, seed: int = 0) -> None:
        self._sizes: dict[Split, int] = {"train": train, "validation": validation, "test": test}
        self._seed = seed

    def split(self, name: Split) -> list[str]:
        """`train`, `validation` or `test` different prompts, categories in equal shares."""
        return [scene.prompt for scene in unique_scenes(name, self._sizes[name], self._seed)]


class FilePrompts(PromptSource):
    """One prompt a line of a UTF-8 text file, duplicates dropped; the last prompts of the file are held out."""

    def __init__(self, path: str, validation: int = 64, test: int = 128) -> None:
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"No prompt file at {path!r}: give a text file with one prompt a line.")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a UTF-8 text file (byte {error.start}): save it as one.") from error
        lines = (line.strip() for line in text.splitlines())
        prompts = list(dict.fromkeys(line for line in lines if line))
        if len(prompts) <= validation + test:
            raise ValueError(
                f"{path} has {len(prompts)} different prompts; {validation + test} are held out, so none is left to "
                "train on. Add prompts or lower `validation` and `test`."
            )
        cut = len(prompts) - test
        self._prompts: dict[Split, list[str]] = {
            "train": prompts[: cut - validation],
            "validation": prompts[cut - validation : cut],
            "test": prompts[cut:],
        }

    def split(self, name: Split) -> list[str]:
        """The file's prompts of one split, in the file's order."""
        return self._prompts[name]
