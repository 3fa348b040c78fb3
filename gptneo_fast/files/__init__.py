"""What comes from outside, before anything trusts it: `strict_json`, `hub` (a folder or repository, with `repository`, its part
of the cache), and `atomic`, saves that are whole or leave no trace."""
