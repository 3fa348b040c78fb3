"""What a file is that should be weights and is not."""

from __future__ import annotations

from .weight_file import WeightFile

_STARTS = {
    b"version https://git-lfs": "a Git LFS pointer and not the file it points to: run git lfs pull",
    b"PK\x03\x04": "a zip archive (torch.save writes these): name it pytorch_model.bin",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "a zstandard archive: unpack it",
    b"\x89HDF": "an HDF5 file (TensorFlow's weights): convert it with transformers",
    b"\x80\x02": "a pickle: only zip archives of torch.save are read",
    b"\x80\x03": "a pickle: only zip archives of torch.save are read",
    b"\x80\x04": "a pickle: only zip archives of torch.save are read",
    b"\x80\x05": "a pickle: only zip archives of torch.save are read",
    b"{": "JSON text: was a server's message saved as the file?",
}
_PAGE = (b"<!doctype html", b"<html", b"<head", b"<?xml")


def kind_of(file: WeightFile) -> str | None:
    """What the first bytes say that the file is, with the way out; None where they say nothing."""
    begin = file.read(0, 512)
    if begin.lstrip().lower().startswith(_PAGE):
        return "this is an HTML page: a download was answered by a web page, perhaps one that asks to log in"
    if len(begin) >= 64 and not any(begin):
        return "it begins with zeros: an interrupted download? delete it and fetch it again"
    return next((f"this is {what}" for start, what in _STARTS.items() if begin.startswith(start)), None)
