"""What comes from outside, before anything trusts it: JSON read strictly, a folder or a hub repository, writing that is whole
or not at all. Bytes and paths only; what they mean is for other rooms."""
