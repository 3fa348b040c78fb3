"""Bytes and paths, before anything trusts them: `strict_json`, `hub` (folder or repository), `atomic` (saves, whole or not)."""
