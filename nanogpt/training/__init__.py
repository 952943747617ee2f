"""What train.py alone uses: the loss and its mean over a text, and checks and measurements of a run."""
