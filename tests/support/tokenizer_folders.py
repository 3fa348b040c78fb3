"""Folders of the demo's tokenizer, which is quickly read, in both forms that a tokenizer has."""

import json
import shutil

FORMS = ("vocab", "json")


N = 1240  # tokens of the demo's tokenizer, which is quickly read


def folder_of(source, tmp_path, **files):
    """A copy of a tokenizer's folder with other JSON files besides."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(source, folder)
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder
