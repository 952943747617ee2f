"""The parts of phi1.py: the data of three kinds, exercises and their admission, the sandbox, scores, the report."""
