"""What phi1.py is made of: the data of three kinds, exercises and their admission, the sandbox, scores, the report."""
