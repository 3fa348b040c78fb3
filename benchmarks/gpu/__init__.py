"""`make gpu`: stages that check and time a machine with a GPU, and end by themselves."""
