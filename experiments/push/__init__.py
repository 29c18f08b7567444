"""The command `push`: uploads the model of a finished run, with a card that is written from the run."""
