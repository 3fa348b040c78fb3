"""The classes that a user holds: the five models, how they load and save, Auto names, pipelines."""
