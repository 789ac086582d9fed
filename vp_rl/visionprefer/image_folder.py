"""Images of one's own to be rated, instead of new ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vp_rl.configuration.kinds import Seed, Text, Whole
from vp_rl.files import paths, tables
from vp_rl.interfaces import PromptSource
from vp_rl.types import Dropped, GivenImage, Split
from vp_rl.visionprefer.prompts import split_prompts

_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


class ImageFolder(PromptSource):
    """Images that exist already, with their prompts: they are rated instead of new ones.

    The sidecar has an entry for each image: `file` (its path, relative to the folder), `prompt`, and if it is known
    `generator`; as JSON objects, one a line, as CSV with a header, or another table (see `tables.rows`). Further
    columns, and files that it does not name, are left alone. The images are not opened here: see `pictures.read`.

    Args:
        folder: where the images are.
        sidecar: the sidecar file's name in the folder, ending as its kind does: .jsonl, .csv, ...
        validation, test, seed: see `FilePrompts`.

    Raises:
        FileNotFoundError: there is no sidecar, or no file that it names.
        ValueError: the sidecar cannot be understood, has no entry, names a file twice or one outside of the folder;
            says in which line. Or no prompt is left to train on.
    """

    def __init__(
        self,
        folder: Text,
        sidecar: Text = "metadata.jsonl",
        *,
        validation: Whole = 64,
        test: Whole = 128,
        seed: Seed | None = None,
    ) -> None:
        self.folder = paths.user_path(folder)
        place = self.folder / paths.user_path(sidecar)
        if not place.is_file():
            raise FileNotFoundError(
                f"No sidecar file at '{place}': write one (JSONL or CSV with `file`, `prompt` and, if known, "
                "`generator`), or name the one that there is as `sidecar`."
            )
        if place.suffix.lower() not in _ENDINGS:
            raise ValueError(
                f"The sidecar '{place}' is of no known kind: its name must end in one of {', '.join(_ENDINGS)}."
            )
        self._images: dict[str, list[GivenImage]] = {}
        known = set[Path]()
        for line, entry in tables.objects(place, ["file", "prompt"], ["generator"]):
            prompt, given = self._entry(entry, f"'{place}', {line}")
            if given.file in known:
                raise ValueError(f"'{place}', {line}: {entry['file']!r} has an entry already.")
            known.add(given.file)
            self._images.setdefault(prompt, []).append(given)
        if not known:
            raise ValueError(f"'{place}' names no image.")
        rated = [prompt for prompt, images in self._images.items() if len(images) > 1]
        self._splits = split_prompts(rated, validation, test, seed, f"'{place}'")

    def split(self, name: Split) -> list[str]:
        """The prompts of one split that have at least two images, in the sidecar's order."""
        return self._splits[name]

    def images(self, prompt: str) -> Sequence[GivenImage]:
        """Those of a prompt, in the sidecar's order."""
        return self._images.get(prompt, ())

    def dropped(self) -> Sequence[Dropped]:
        """Prompts with a single image, which has no other to be preferred to."""
        return [Dropped(prompt, "single image") for prompt, images in self._images.items() if len(images) == 1]

    def _entry(self, entry: dict[str, Any], where: str) -> tuple[str, GivenImage]:
        for key in ("file", "prompt"):
            if not isinstance(entry.get(key), str) or not entry[key].strip():
                raise ValueError(f"{where}: no `{key}`, or it is empty or no text; there is {sorted(map(str, entry))}.")
        generator = entry.get("generator") or "unknown"
        if not isinstance(generator, str):
            raise ValueError(f"{where}: the `generator` {generator!r} is no text.")
        return entry["prompt"].strip(), GivenImage(self._file(entry["file"].strip(), where), generator.strip())

    def _file(self, name: str, where: str) -> Path:
        try:
            file = (self.folder / name).resolve()
            there = file.is_file()
        except (OSError, ValueError):  # a name that no file can have: too long, or with a null byte
            file, there = self.folder.resolve(), False
        if not file.is_relative_to(self.folder.resolve()):
            raise ValueError(f"{where}: the file {name!r} is not in '{self.folder}': copy it there.")
        if not there:
            raise FileNotFoundError(f"{where}: no file {name!r} in '{self.folder}'.")
        return file
